"""Many connections, many frames, many peers: every frame arrives once, in order and whole, and nothing is left behind.

Memory, files, threads and verbs objects are counted after a first round, which makes what is made once, and again at the end.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers import TIMEOUT_S, resources, rest, spawn, wait_until
from soak import rounds

import rdmaxfer

pytestmark = [pytest.mark.counted, pytest.mark.timeout(600)]

PATIENCE_S = 300.0
"""For one of many that share two processors."""
MAX_NEW_BYTES = 8 << 20
"""More resident memory at the end than after the first round. Not 0: a bound side remembers 1024 sessions that ended, about 2 KiB
each, and malloc keeps what threads and rings have freed in as many arenas as there are."""

# --- what there is ----------------------------------------------------------------------------------------------------


COUNTED = {"pd", "cq", "qp", "mr", "TcpDomain", "TcpProtectionDomain", "TcpEndpoint"}


@dataclass(frozen=True)
class Usage:
    """What one process holds, and all verbs objects of this machine."""

    files: int
    threads: int
    verbs: dict[str, int]
    resident: int


def usage(pid: int | None = None) -> Usage:
    """Of this process, or another."""
    gc.collect()
    process = Path(f"/proc/{pid or os.getpid()}")
    return Usage(
        files=len(list((process / "fd").iterdir())),
        threads=len(list((process / "task").iterdir())),
        verbs={kind: count for kind, count in resources().items() if kind in COUNTED},
        resident=int((process / "statm").read_text().split()[1]) * resource.getpagesize(),
    )


def check_nothing_left(before: Usage, what: str, pid: int | None = None, *, staging_slots: int = 0) -> None:
    """Files, threads and verbs objects are as before, resident memory nearly. A sender may have made up to `staging_slots` more
    staging slots, which are registered when they are first needed, and stay."""

    def same() -> bool:
        now = usage(pid)
        more = now.verbs.get("mr", 0) - before.verbs.get("mr", 0)
        others = [{kind: count for kind, count in each.verbs.items() if kind != "mr"} for each in (before, now)]
        return (
            (now.files, now.threads) == (before.files, before.threads)
            and others[0] == others[1]
            and 0 <= more <= staging_slots
        )

    with contextlib.suppress(AssertionError):  # links are torn down by the control thread, a little later
        wait_until(same, "as before")
    after = usage(pid)
    print(f"{what}: {before} -> {after}: {after.resident - before.resident:+} bytes")
    assert same(), f"{before} -> {after}"
    assert after.resident - before.resident <= MAX_NEW_BYTES


def numbered(sender: int, number: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A frame of 0 to 16 KB that no other is equal to; the code of the other processes makes the same."""
    return np.arange(number % 64 * 32, dtype=np.uint64) + np.uint64(sender * 1_000_003 + number)


def check_frame(frame: rdmaxfer.Frame, sender: int, number: int, seq: int) -> None:
    assert frame.seq == seq
    assert frame.metadata == {"of": [sender, number]}
    assert frame.array.tobytes() == numbered(sender, number).tobytes()


def report(what: str, count: int, began: float) -> None:
    print(f"{what}: {count / (time.monotonic() - began):.1f} a second")


# --- connections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bind", ["receiver", "sender"])
def test_many_connections_one_after_the_other(bind: str) -> None:
    """The connecting side is made and closed each time, the bound one stays."""
    count, warm = rounds(ci=80, soak=1000), 20
    before: Usage | None = None
    with rdmaxfer.Receiver() if bind == "receiver" else rdmaxfer.Sender() as bound:
        endpoint = bound.bind("tcp://127.0.0.1:*")
        for cycle in range(warm + count):
            if cycle == warm:
                before, began = usage(), time.monotonic()
            with rdmaxfer.Sender(slots=4) if bind == "receiver" else rdmaxfer.Receiver(slots=4) as connecting:
                connecting.connect(endpoint, timeout=TIMEOUT_S)
                bound.wait_for_peers(1, timeout=TIMEOUT_S)
                tx, rx = (connecting, bound) if isinstance(connecting, rdmaxfer.Sender) else (bound, connecting)
                assert isinstance(tx, rdmaxfer.Sender)
                assert isinstance(rx, rdmaxfer.Receiver)
                for number in range(3):
                    seq = tx.push(numbered(cycle, number), metadata={"of": [cycle, number]}, timeout=TIMEOUT_S)
                    with rx.recv(timeout=TIMEOUT_S) as frame:
                        check_frame(frame, cycle, number, seq)
            del connecting, tx, rx, frame
            wait_until(lambda: bound.statistics().peers == 0, "the bound side noticed")
        report(f"connections to a bound {bind}", count, began)
        check_nothing_left(before, f"{count} connections to a bound {bind}")
        statistics = bound.statistics()
        assert statistics.peers_lost == 0
        assert statistics.frames == 3 * (warm + count)


# --- small frames -----------------------------------------------------------------------------------------------------

SMALL_SLOTS = 64
SMALL = """
import gc, sys, numpy as np, rdmaxfer
endpoint, *counts = sys.argv[1:]
with rdmaxfer.Sender(slots=64) as tx:
    tx.connect(endpoint, timeout=60)
    seq, array = 0, np.zeros(8, np.uint64)
    for count in map(int, counts):
        for _ in range(count):
            array[:] = seq
            assert tx.push(array, timeout=60) == seq
            seq += 1
        tx.flush(timeout=60)
        gc.collect()
        print("pushed", flush=True)
        sys.stdin.readline()
"""


def test_many_small_frames() -> None:
    count, warm = rounds(ci=100_000, soak=1_000_000), 2000
    with rdmaxfer.Receiver(slots=SMALL_SLOTS) as rx:
        with process(SMALL, rx.bind("tcp://127.0.0.1:*"), warm, count) as sender:
            take_small(rx, 0, warm)
            wait_for_line(sender, "pushed")
            before, its_before = usage(), usage(sender.pid)
            go_on(sender)
            began = time.monotonic()
            take_small(rx, warm, count)
            report("small frames", count, began)
            wait_for_line(sender, "pushed")
            check_nothing_left(before, f"receiver of {count} frames", staging_slots=2 * SMALL_SLOTS)
            check_nothing_left(its_before, f"sender of {count} frames", sender.pid, staging_slots=2 * SMALL_SLOTS)
            go_on(sender)
        statistics = rx.statistics()
        assert (statistics.frames, statistics.leased, statistics.peers_lost) == (warm + count, 0, 0)


def take_small(rx: rdmaxfer.Receiver, first: int, count: int) -> None:
    for seq in range(first, first + count):
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.seq == seq
            assert frame.array.tobytes() == seq.to_bytes(8, "little") * 8


# --- many peers at a time ---------------------------------------------------------------------------------------------

SENDERS = """
import sys, numpy as np, rdmaxfer
from helpers import Background
endpoint, first, senders, frames = sys.argv[1], *map(int, sys.argv[2:])
def send(tx, me):
    for number in range(frames):
        array = np.arange(number % 64 * 32, dtype=np.uint64) + np.uint64(me * 1_000_003 + number)
        assert tx.push(array, metadata={"of": [me, number]}, timeout=300) == number
    tx.flush(timeout=300)
    tx.close()
all_of_them = [rdmaxfer.Sender(slots=4, lease_s=60) for _ in range(senders)]
for each in [Background(lambda tx=tx: tx.connect(endpoint, timeout=300)) for tx in all_of_them]:
    each.result(300)
print("connected", flush=True)
sys.stdin.readline()
for each in [Background(lambda tx=tx, me=me: send(tx, me)) for me, tx in enumerate(all_of_them, first)]:
    each.result(3600)
print("done")
"""
RECEIVERS = """
import sys, numpy as np, rdmaxfer
from helpers import Background
endpoint, first_seq, receivers, frames = sys.argv[1], *map(int, sys.argv[2:])
def take(rx):
    for number in range(frames):
        with rx.recv(timeout=300) as frame:
            assert frame.seq == first_seq + number, (frame.seq, first_seq, number)
            assert frame.metadata == {"of": [0, number]}, frame.metadata
            array = np.arange(number % 64 * 32, dtype=np.uint64) + np.uint64(number)
            assert frame.array.tobytes() == array.tobytes(), number
    return frames
all_of_them = [rdmaxfer.Receiver(slots=4, lease_s=60) for _ in range(receivers)]
for rx in all_of_them:
    rx.connect(endpoint, timeout=300)
print("connected", flush=True)
taking = [Background(lambda rx=rx: take(rx)) for rx in all_of_them]
print("taken", sum(each.result(3600) for each in taking), flush=True)
sys.stdin.readline()
for rx in all_of_them:
    rx.close()
print("done")
"""
PROCESSES = 8
LEASE_S = 60.0
SLOT_BYTES = 65536  # 64 rings of the default slots are more pages than a User Mode Linux guest has mappings for
"""A hundred threads on two processors that others use, too: what the lease is for is tested elsewhere."""


@contextlib.contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another process, which must end well."""
    child = spawn(code, *map(str, arguments))
    try:
        yield child
        out, err = rest(child, PATIENCE_S)
        assert (child.returncode, err) == (0, ""), f"{out}\n{err}"
    finally:
        child.kill()
        child.communicate()


def wait_for_line(child: subprocess.Popen[str], expected: str) -> None:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line.startswith(expected):
        child.kill()
        pytest.fail(f"{line!r} instead of {expected!r}: {rest(child)}")


def go_on(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def test_64_senders_into_one_receiver() -> None:
    senders, frames = 64, rounds(ci=20, soak=500)
    before: Usage | None = None
    with rdmaxfer.Receiver(slots=4, slot_bytes=SLOT_BYTES, lease_s=LEASE_S) as rx:
        endpoint = rx.bind("tcp://127.0.0.1:*")
        for _ in range(1 + rounds(ci=1, soak=3)):
            receive_from_all(rx, endpoint, senders, frames)
            before = before or usage()
        assert before is not None
        check_nothing_left(before, f"receiver of {senders} senders")
        statistics = rx.statistics()
        assert (statistics.leased, statistics.peers_lost, statistics.pinned_bytes) == (0, 0, 0)


def test_64_senders_connect_at_once() -> None:
    """Handshakes that have to wait for each other are all done in the end, and nobody is given up meanwhile."""
    senders = 64
    with rdmaxfer.Receiver(slots=4, slot_bytes=SLOT_BYTES, lease_s=LEASE_S) as rx, contextlib.ExitStack() as stack:
        endpoint = rx.bind("tcp://127.0.0.1:*")
        each = senders // PROCESSES
        children = [stack.enter_context(process(SENDERS, endpoint, n * each, each, 1)) for n in range(PROCESSES)]
        began = time.monotonic()
        for child in children:
            wait_for_line(child, "connected")
        report("connections at once", senders, began)
        assert rx.statistics().peers == senders
        for child in children:
            go_on(child)
        assert sorted(take(rx, children).metadata["of"] for _ in range(senders)) == [[n, 0] for n in range(senders)]
        assert rx.statistics().peers_lost == 0


def receive_from_all(rx: rdmaxfer.Receiver, endpoint: str, senders: int, frames: int) -> None:
    each = senders // PROCESSES
    got = [0] * senders
    with contextlib.ExitStack() as stack:
        children = []
        for number in range(PROCESSES):
            children.append(stack.enter_context(process(SENDERS, endpoint, number * each, each, frames)))
            wait_for_line(children[-1], "connected")
        assert rx.statistics().peers == senders
        began = time.monotonic()
        for child in children:
            go_on(child)
        for _ in range(senders * frames):
            with take(rx, children) as frame:
                sender = frame.metadata["of"][0]
                check_frame(frame, sender, got[sender], got[sender])
                got[sender] += 1
        report(f"frames of {senders} senders", senders * frames, began)
    assert got == [frames] * senders
    wait_until(lambda: rx.statistics().peers == 0, "all senders have left")
    with pytest.raises(rdmaxfer.TimeoutExpired):
        rx.recv(timeout=0)


def take(rx: rdmaxfer.Receiver, children: list[subprocess.Popen[str]]) -> rdmaxfer.Frame:
    """The next frame. Fails soon if one of those who send them has failed."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return rx.recv(timeout=5)
        except rdmaxfer.TimeoutExpired:
            failed = [rest(child) for child in children if child.poll() not in (None, 0)]
            assert not failed, failed
            assert time.monotonic() < deadline, "no frame came"


def test_32_receivers_of_one_sender() -> None:
    receivers, frames = 32, rounds(ci=50, soak=500)
    before: Usage | None = None
    with rdmaxfer.Sender(slots=4, lease_s=LEASE_S) as tx:
        endpoint = tx.bind("tcp://127.0.0.1:*")
        for turn in range(1 + rounds(ci=1, soak=3)):
            send_to_all(tx, endpoint, receivers, turn * frames, frames)
            before = before or usage()
        assert before is not None
        check_nothing_left(before, f"sender to {receivers} receivers")
        statistics = tx.statistics()
        assert (statistics.unreleased, statistics.peers_lost) == (0, 0)


def send_to_all(tx: rdmaxfer.Sender, endpoint: str, receivers: int, first_seq: int, frames: int) -> None:
    each = receivers // PROCESSES
    with contextlib.ExitStack() as stack:
        arguments = (endpoint, first_seq, each, frames)
        children = [stack.enter_context(process(RECEIVERS, *arguments)) for _ in range(PROCESSES)]
        for child in children:
            wait_for_line(child, "connected")
        tx.wait_for_peers(receivers, timeout=TIMEOUT_S)
        began = time.monotonic()
        for number in range(frames):
            seq = tx.push(numbered(0, number), metadata={"of": [0, number]}, timeout=PATIENCE_S)
            assert seq == first_seq + number
        tx.flush(timeout=PATIENCE_S)
        report(f"frames to {receivers} receivers", receivers * frames, began)
        for child in children:
            wait_for_line(child, f"taken {each * frames}\n")
        for child in children:
            go_on(child)
    wait_until(lambda: tx.statistics().peers == 0, "all receivers have left")
