"""The shm fabric by itself: what strangers and liars can do, what becomes of memory, and what is left behind (nothing)."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, picture, wait_until

import rdmaxfer
from rdmaxfer.errors import NoDevice
from rdmaxfer.fabric import shm
from rdmaxfer.fabric.poller import Poller
from rdmaxfer.fabric.soft import BROKEN
from rdmaxfer.memory import Buffer, map_foreign

NBYTES = 4096
RECVS = 4
NATIVE = shm._native()


class Side:
    """An endpoint with memory that can be shared, and some that can't."""

    def __init__(self, stack: ExitStack, *, bound: bool, recvs: int = RECVS) -> None:
        domain = stack.enter_context(shm.ShmDomain())
        self.pd = stack.enter_context(domain.protection_domain())
        self.endpoint = self.pd.endpoint(shm.ShmRoute(bound=bound), send_depth=16, recv_depth=recvs, remote_write=True)
        stack.callback(self.endpoint.close)
        self.buffers = [Buffer(NBYTES, shared=shared) for shared in (True, False)]
        self.regions = [self.pd.register(buffer, remote_write=True) for buffer in self.buffers]
        self.poller = stack.enter_context(Poller())
        self.poller.watch([self.endpoint])

    def write(self, to: Side, data: bytes, *, imm: int = 7, which: int = 0, signaled: bool = False) -> None:
        buffer, region = self.buffers[which], self.regions[which]
        buffer.view(0, len(data))[:] = data
        self.endpoint.write(
            *(buffer.address, 8, region.lkey, buffer.address + 8, len(data) - 8, region.lkey),
            *(to.buffers[0].address, to.regions[0].rkey, imm, imm, signaled),
        )

    def take(self, count: int) -> list[Any]:
        found: list[Any] = []

        def enough() -> bool:
            self.poller.wait(0, 0.05)
            found.extend(wc for _, wc in self.poller.found())
            self.poller.clear()
            return len(found) >= count

        wait_until(enough, f"{count} completions")
        return found


def data_of(wc: Any) -> bytes:
    header, payload = wc.placed
    return bytes(header) + bytes(payload)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def join(bound: Side, other: Side) -> None:
    there = bound.endpoint.address
    other.endpoint.connect(host=there.host, key=there.key)
    bound.endpoint.start()


def test_what_is_written_is_where_the_sender_has_it(stack: ExitStack) -> None:
    bound, other = Side(stack, bound=True), Side(stack, bound=False)
    join(bound, other)
    other.write(bound, b"h" * 8 + b"before")
    (came,) = bound.take(1)
    assert data_of(came) == b"h" * 8 + b"before"
    other.buffers[0].view(8, 6)[:] = b"after!"
    assert bytes(came.placed[1]) == b"after!", "it was copied"
    with pytest.raises(TypeError):
        came.placed[1][0] = 1


def test_memory_that_cant_be_shared_is_copied_once(stack: ExitStack) -> None:
    bound, other = Side(stack, bound=True), Side(stack, bound=False)
    join(bound, other)
    for number in range(3):
        other.write(bound, b"h" * 8 + b"before", which=1, imm=number)
        (came,) = bound.take(1)
        other.buffers[1].view(8, 6)[:] = b"after!"
        assert data_of(came) == b"h" * 8 + b"before"
        bound.endpoint.repost_recv([came.wr_id])
    assert len(bound.endpoint._segments) == 0, "memory for one frame is kept"


def test_more_than_the_queue_holds_waits_for_room(stack: ExitStack) -> None:
    bound, other = Side(stack, bound=True), Side(stack, bound=False)
    join(bound, other)
    count = 5 * 16
    other.endpoint.clear_posted()
    for number in range(count):
        other.write(bound, b"h" * 8 + bytes([number]), imm=number, signaled=number == count - 1)
    assert other.endpoint.last_posted == count
    assert other.endpoint._backlog, "the queue is larger than this test knows"
    seen: list[int] = []
    while len(seen) < count:
        for wc in bound.take(1):
            seen.append(wc.imm)
            bound.endpoint.repost_recv([wc.wr_id])
        other.poller.wait(0, 0.01)
    assert seen == list(range(count))
    assert [wc.wr_id for wc in other.take(1) if not wc.is_recv] == [count - 1]


def test_ctrl_c_between_taking_and_handing_on_neither_loses_nor_doubles(stack: ExitStack) -> None:
    bound, other = Side(stack, bound=True), Side(stack, bound=False)
    join(bound, other)
    settle = bound.endpoint._settle
    calls = []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        settle()

    bound.endpoint._settle = interrupted  # type: ignore[method-assign]
    for number in range(3):
        other.write(bound, b"h" * 8 + b"x", imm=number)
    with pytest.raises(KeyboardInterrupt):
        bound.poller.poll()
    other.write(bound, b"h" * 8 + b"x", imm=3)
    assert [wc.imm for wc in bound.take(4)] == [0, 1, 2, 3]


def test_a_removed_region_is_forgotten_by_the_peer(stack: ExitStack) -> None:
    bound, other = Side(stack, bound=True), Side(stack, bound=False)
    join(bound, other)
    other.write(bound, b"h" * 8 + b"x")
    bound.take(1)
    assert len(bound.endpoint._segments) == 1
    other.regions[0].close()
    wait_until(lambda: bound.poller.wait(0, 0.01) == 0 and not bound.endpoint._segments, "the segment was forgotten")


# --- strangers and liars -----------------------------------------------------------------------------------------------


def test_memory_may_come_while_other_memory_goes(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side(stack, bound=True)
    stack.callback(side.pd.endpoint(shm.ShmRoute(bound=True), send_depth=4, recv_depth=4, remote_write=True).close)
    forget, added = shm.ShmEndpoint.forget, list[shm.ShmRegion]()

    def forget_beside_others(endpoint: shm.ShmEndpoint, number: int) -> None:
        added.append(
            side.pd.register(Buffer(NBYTES, shared=True), remote_write=False)
        )  # as another thread may at any time
        forget(endpoint, number)

    monkeypatch.setattr(shm.ShmEndpoint, "forget", forget_beside_others)
    side.regions[0].close()
    assert side.regions[0].closed
    assert len(added) == 2
    assert not added[0].closed


def test_ctrl_c_while_memory_goes(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side(stack, bound=True)

    def interrupt(endpoint: shm.ShmEndpoint, number: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shm.ShmEndpoint, "forget", interrupt)
        with pytest.raises(KeyboardInterrupt):
            side.regions[0].close()
    side.regions[0].close()
    assert side.regions[0].closed


def dial(key: bytes) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        link.connect(shm._name(key))
    except OSError:
        link.close()
        raise
    return link


class Liar:
    """A peer that does what it likes with what an honest one would have."""

    def __init__(self, stack: ExitStack, target: Side, capacity: int = 16) -> None:
        self.queues = Buffer(NATIVE.lib.sx_bytes(capacity), shared=True)
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        for fd in self.fds:
            stack.callback(os.close, fd)
        self.link = stack.enter_context(dial(target.endpoint.address.key))
        assert self.queues.fd is not None
        hello = shm._HELLO.pack(target.endpoint.address.key, shm.VERSION, capacity)
        socket.send_fds(self.link, [hello], [self.queues.fd, *self.fds])
        self._memory = NATIVE.ffi.from_buffer(self.queues.view(0, self.queues.nbytes))
        self.ep = NATIVE.ffi.gc(NATIVE.lib.sx_new(self._memory, capacity, 1, *self.fds), NATIVE.lib.sx_free)
        target.endpoint.start()

    def post(self, data: bytes = b"h" * 8, **fields: int) -> None:
        item = NATIVE.ffi.new("sx_item *", {"data_bytes": len(data), **fields})
        assert NATIVE.lib.sx_post(self.ep, item, NATIVE.ffi.from_buffer(data), 0, 0) == 1

    def say(self, kind: int, number: int, nbytes: int, *buffers: Buffer) -> None:
        socket.send_fds(
            self.link, [shm._SEGMENT.pack(kind, number, nbytes)], [b.fd for b in buffers if b.fd is not None]
        )


def lies(liar: Liar, target: Side) -> dict[str, Any]:
    ring, rkey = target.buffers[0].address, target.regions[0].rkey
    memory = Buffer(NBYTES, shared=True)
    open_end = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    os.ftruncate(open_end, NBYTES)

    def frame(**fields: int) -> None:
        liar.say(1, 5, NBYTES, memory)
        liar.post(**{"kind": 1, "rkey": rkey, "address": ring, "segment": 5, "offset": 0, "nbytes": 10, **fields})

    def unsealed() -> None:
        socket.send_fds(liar.link, [shm._SEGMENT.pack(1, 6, NBYTES)], [open_end])
        os.close(open_end)

    def tail(value: int) -> None:
        liar.queues.view(0, 8)[:] = value.to_bytes(8, "little")

    def too_long() -> None:
        liar.post(kind=2, data=b"")
        at = 256 + 12  # the first record's data_bytes
        liar.queues.view(at, 4)[:] = (9000).to_bytes(4, "little")

    return {
        "a wrong key": lambda: frame(rkey=rkey ^ 1),
        "key 0": lambda: frame(rkey=0),
        "beyond the ring": lambda: frame(address=ring + NBYTES),
        "before the ring": lambda: frame(address=ring - 1),
        "more than the ring": lambda: frame(nbytes=1 << 63),
        "a segment that was not handed over": lambda: frame(segment=9),
        "beyond the segment": lambda: frame(offset=NBYTES - 5),
        "far beyond the segment": lambda: frame(offset=(1 << 64) - 5),
        "an unknown kind": lambda: frame(kind=9),
        "a message that is too long": lambda: liar.post(kind=3, data=b"m" * 65),
        "an index ahead of the queue": lambda: tail(17),
        "an index behind": lambda: tail((1 << 64) - 1),
        "more data than a record has": too_long,
        "memory that can shrink": unsealed,
        "more memory than there is": lambda: liar.say(1, 5, NBYTES + 4096, memory),
        "no memory": lambda: liar.say(1, 5, NBYTES),
        "an unknown word": lambda: liar.say(7, 5, NBYTES, memory),
        "half a word": lambda: liar.link.send(b"abc"),
    }


LIES = (
    *("a wrong key", "key 0", "beyond the ring", "before the ring", "more than the ring", "no memory"),
    *("a segment that was not handed over", "beyond the segment", "far beyond the segment", "an unknown kind"),
    *("a message that is too long", "an index ahead of the queue", "an index behind", "more data than a record has"),
    *("memory that can shrink", "more memory than there is", "an unknown word", "half a word"),
)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_of_the_peer_ends_the_connection(stack: ExitStack, lie: str) -> None:
    target = Side(stack, bound=True)
    liar = Liar(stack, target)
    lies(liar, target)[lie]()
    os.eventfd_write(liar.fds[1], 1)
    (wc,) = target.take(1)
    assert wc.status == BROKEN
    assert "broke the rules of shared memory" in target.endpoint.explain(wc.status, 0)


def test_strangers_at_the_socket_are_turned_away(stack: ExitStack) -> None:
    bound, other = Side(stack, bound=True), Side(stack, bound=False)
    key = bound.endpoint.address.key
    memory = Buffer(NBYTES, shared=True)
    assert memory.fd is not None
    for say, fds in (
        (b"", []),
        (b"hello", []),
        (shm._HELLO.pack(os.urandom(16), shm.VERSION, 16), [memory.fd] * 3),
        (shm._HELLO.pack(key, shm.VERSION + 1, 16), [memory.fd] * 3),
        (shm._HELLO.pack(key, shm.VERSION, 3), [memory.fd] * 3),
        (shm._HELLO.pack(key, shm.VERSION, 1 << 31), [memory.fd] * 3),
        (shm._HELLO.pack(key, shm.VERSION, 256), [memory.fd] * 3),  # too small for that
        (shm._HELLO.pack(key, shm.VERSION, 16), [memory.fd]),
    ):
        with dial(key) as stranger:
            if say:
                socket.send_fds(stranger, [say], fds)
            bound.endpoint.look()
        bound.endpoint.look()
        assert bound.endpoint.ep is None
    for _ in range(3 * shm.MAX_GUESTS):  # who says nothing does not keep the peer out
        stack.enter_context(dial(key))
        bound.endpoint.look()
    join(bound, other)
    other.write(bound, b"h" * 8 + b"hello")
    assert data_of(bound.take(1)[0]) == b"h" * 8 + b"hello"
    with pytest.raises(ConnectionRefusedError):
        dial(key)


def test_a_peer_of_another_machine_or_user(stack: ExitStack) -> None:
    bound, other = Side(stack, bound=True), Side(stack, bound=False)
    with pytest.raises(NoDevice, match="not on this machine, or belongs to another user"):
        other.endpoint.connect(host=bytes(16), key=bound.endpoint.address.key)
    with pytest.raises(NoDevice, match="can't be reached by shared memory"):
        other.endpoint.connect(host=shm.host_id(), key=bytes(16))


def test_foreign_memory_is_looked_at_before_it_is_mapped() -> None:
    memory = Buffer(NBYTES, shared=True)
    assert memory.fd is not None
    memory.view(0, 3)[:] = b"abc"
    assert bytes(map_foreign(memory.fd, NBYTES)[:3]) == b"abc"
    for nbytes in (0, -1, NBYTES + 1):
        with pytest.raises(ValueError, match="the memory has"):
            map_foreign(memory.fd, nbytes)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 1)


# --- by Sender and Receiver ----------------------------------------------------------------------------------------------


def test_frames_that_a_receiver_holds_stay_as_they_are_when_the_sender_has_gone() -> None:
    with rdmaxfer.Receiver(fabric="shm", slots=8) as rx:
        endpoint = rx.bind("tcp://127.0.0.1:*")
        with rdmaxfer.Sender(fabric="shm", slots=8) as tx:
            tx.connect(endpoint, timeout=TIMEOUT_S)
            for seed in range(4):
                tx.push(picture(seed), timeout=TIMEOUT_S)
            held = [rx.recv(timeout=TIMEOUT_S) for _ in range(4)]
        wait_until(lambda: rx.statistics().peers == 0, "the goodbye was noticed")
        for seed, frame in enumerate(held):
            assert np.array_equal(frame.array, picture(seed))
            frame.release()


def test_memory_that_a_lost_receiver_may_read_is_not_used_again() -> None:
    with (
        rdmaxfer.Sender(fabric="shm", slots=4, reconnect=False) as tx,
        rdmaxfer.Receiver(fabric="shm", slots=4, reconnect=False) as rx,
    ):
        rx.connect(tx.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        tx.wait_for_peers(1, timeout=TIMEOUT_S)
        for seed in range(3):
            tx.push(picture(seed), timeout=TIMEOUT_S)
        held = [rx.recv(timeout=TIMEOUT_S) for _ in range(3)]
        tx._links[0].endpoint.to_error()
        with pytest.raises(rdmaxfer.PeerLost) as caught:
            tx.flush(timeout=TIMEOUT_S)
        assert caught.value.unreleased == (0, 1, 2)
        for _ in range(20):  # more than there is staging memory
            with tx.reserve(picture(0).shape, timeout=TIMEOUT_S) as slot:
                slot.array[...] = 255
                slot.discard()
        for seed, frame in enumerate(held):
            assert np.array_equal(frame.array, picture(seed))


SENDER = """
import sys, rdmaxfer, numpy as np
with rdmaxfer.Sender(fabric="shm", slots=4) as tx:
    tx.connect(sys.argv[1])
    for seed in range(4):
        tx.push(np.full((1 << 20,), seed, np.uint8))
    print("pushed", flush=True)
    sys.stdin.readline()
"""


def shared_memory() -> set[str]:
    """By inode: what this process has mapped, or has descriptors of. Memory of a memfd is gone when no process has it."""
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/memfd:rdmaxfer" in line:
            found.add(line.split()[4])
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "/memfd:rdmaxfer" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(str(os.stat(f"/proc/self/fd/{name}").st_ino))
    return found


def test_a_sender_that_is_killed_leaves_its_frames_and_then_nothing() -> None:
    before = shared_memory()
    files = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    with rdmaxfer.Receiver(fabric="shm", slots=4, reconnect=False) as rx:
        endpoint = rx.bind("tcp://127.0.0.1:*")
        with subprocess.Popen(
            [sys.executable, "-c", SENDER, endpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as sender:
            assert sender.stdout is not None
            assert sender.stdout.readline() == "pushed\n"
            sender.kill()
        for seed in range(4):
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert (frame.array == seed).all()
        assert shared_memory() - before, "the frames lay in memory that is not shared"
    del frame
    if os.path.isdir("/dev/shm"):
        assert set(os.listdir("/dev/shm")) <= files
    gc.collect()
    wait_until(lambda: shared_memory() <= before, "the memory was let go of")


WAITING = """
import rdmaxfer
with rdmaxfer.Receiver(fabric="shm", slots=4) as rx:
    print(rx.bind("tcp://127.0.0.1:*"), flush=True)
    while True:
        with rx.recv() as frame:
            print(frame.seq, flush=True)
"""


WAKE_UPS = 20


def test_a_waiting_receiver_costs_next_to_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        try:
            with rdmaxfer.Sender(fabric="shm") as tx:
                tx.connect(waiting.stdout.readline().strip(), timeout=TIMEOUT_S)
                tx.push(picture(0), timeout=TIMEOUT_S)
                assert waiting.stdout.readline() == "0\n"
                start_s, slept, cpu = time.monotonic(), sleeps(waiting.pid), cpu_s(waiting.pid)
                wait_until(lambda: sleeps(waiting.pid) >= slept + WAKE_UPS, "it sleeps and wakes up")
                used, elapsed_s = cpu_s(waiting.pid) - cpu, time.monotonic() - start_s
                tx.push(picture(0), timeout=TIMEOUT_S)
                assert waiting.stdout.readline() == "1\n"
        finally:
            waiting.send_signal(signal.SIGKILL)
    # It wakes up ten times a second for Ctrl-C, and now and then for its lease: who spins hardly ever sleeps, or uses the CPU up.
    assert elapsed_s > WAKE_UPS * 0.02
    assert used <= 0.03, f"{used} s of {elapsed_s} s"  # the clock ticks every 0.01 s


def sleeps(pid: int) -> int:
    """How often the main thread of a process has gone to sleep."""
    status = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
