"""Ctrl-C at every point of a call where Python lets a signal handler run: nothing hangs, nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, Background, pair, rest, spawn

import rdmaxfer
from rdmaxfer.lease import FrameLease

MOST = 3000
"""More points than any call has."""


class CtrlC:
    """Raises KeyboardInterrupt in this thread at the n-th point where CPython looks for signals within the block: on entering a
    Python function, and when a C function has returned (its result is lost then)."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.seen = 0
        self.where = ""

    @property
    def happened(self) -> bool:
        return bool(self.where)

    def _on_event(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in ("call", "c_return") or frame.f_code is CtrlC.__exit__.__code__:
            return
        at: FrameType | None = frame
        while at is not None:
            if at.f_code.co_name in ("__del__", "_collected", "_remove"):  # finalizers: Python drops what they raise
                return
            at = at.f_back
        if self.seen == self.n:
            sys.setprofile(None)
            what = frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name
            self.where = f"{event} in {what}:{frame.f_lineno}" + (f" of {arg.__qualname__}" if event != "call" else "")
            raise KeyboardInterrupt
        self.seen += 1

    def __enter__(self) -> CtrlC:  # noqa: PYI034
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        sys.setprofile(None)
        return kind is KeyboardInterrupt


def each_point() -> Iterator[CtrlC]:
    """Ctrl-C ever later, until a call has ended before it came."""
    for n in range(MOST):
        at = CtrlC(n)
        yield at
        if not at.happened:
            assert n > 10, "nothing was interrupted"
            return
    raise AssertionError(f"a call with more than {MOST} points to interrupt it at")


def check_unlocked(node: Any, where: str) -> None:
    """Other threads, such as the one that keeps the lease, must be able to go on."""
    other = Background(lambda: node._lock.acquire(timeout=5) and (node._lock.release() or True))
    assert other.result(), f"the lock was left locked by Ctrl-C at {where}"


def value(rx: rdmaxfer.Receiver) -> tuple[int, int]:
    with rx.recv(timeout=TIMEOUT_S) as frame:
        return frame.seq, int(frame.array[0])


PUSHES: dict[str, Callable[[rdmaxfer.Sender, Any], int]] = {
    "push": lambda tx, array: tx.push(array, timeout=TIMEOUT_S),
    "registered": lambda tx, array: tx.push(array, timeout=TIMEOUT_S),
    "many": lambda tx, array: tx.push_many([array], timeout=TIMEOUT_S)[0],
    "many registered": lambda tx, array: tx.push_many([array], timeout=TIMEOUT_S)[0],
}


@pytest.mark.parametrize("how", PUSHES)
@pytest.mark.parametrize("peers", [1, 2])
def test_ctrl_c_in_push(how: str, peers: int) -> None:
    with contextlib.ExitStack() as stack:
        tx = stack.enter_context(rdmaxfer.Sender(slots=4))
        endpoint = tx.bind("tcp://127.0.0.1:*")
        receivers = [stack.enter_context(rdmaxfer.Receiver(slots=4)) for _ in range(peers)]
        for rx in receivers:
            rx.connect(endpoint, timeout=TIMEOUT_S)
        tx.wait_for_peers(peers, timeout=TIMEOUT_S)
        array = np.zeros(5, np.int64)
        if "registered" in how:
            tx.register(array)
        count = 0  # frames that went out
        for at in each_point():
            tx.flush(timeout=TIMEOUT_S)
            array[0] = 2 * at.n
            seq = None
            with at:
                seq = PUSHES[how](tx, array)
            check_unlocked(tx, at.where)
            # The next one tells whether the interrupted one went out: to all, or to none.
            marker = np.array([2 * at.n + 1])
            last = tx.push(marker, timeout=TIMEOUT_S)
            assert last in (count, count + 1), f"numbers are missing or doubled after Ctrl-C at {at.where}"
            went = last - count
            if seq is not None:
                assert went == 1
                assert seq == count
            expected = [(count, 2 * at.n)] * went + [(last, 2 * at.n + 1)]
            for rx in receivers:
                assert [value(rx) for _ in expected] == expected, f"after Ctrl-C at {at.where}"
            count = last + 1
        assert tx.statistics().frames == count
        began = time.monotonic()
        tx.flush(timeout=TIMEOUT_S)
        tx.close()
        assert time.monotonic() - began < 10


def test_a_frame_whose_making_ctrl_c_cut_off_is_not_given_back_before_it_is_made_again() -> None:
    with pair(receiver={"slots": 4}, sender={"slots": 4}) as (tx, rx):
        link = rx._links[0]
        lease = FrameLease(link.stream, link.ring.received)
        link.stream.leases[lease.position] = lease
        link.stream.abandoned.append(lease)
        rx._tick()  # what the control thread does now and then
        assert link.ring.released == 0
        for n in range(10):
            tx.push(np.array([n]), timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.array[0] == n
        tx.flush(timeout=TIMEOUT_S)
        assert rx.statistics().leased == 0


def test_ctrl_c_in_recv_loses_no_frame() -> None:
    with pair(receiver={"slots": 4}, sender={"slots": 4}) as (tx, rx):
        for at in each_point():
            tx.push(np.array([at.n]), timeout=TIMEOUT_S)
            tx.push(np.array([-1]), timeout=TIMEOUT_S)
            frame = None
            with at:
                frame = rx.recv(timeout=TIMEOUT_S)
            check_unlocked(rx, at.where)
            if frame is None:
                frame = rx.recv(timeout=TIMEOUT_S)
            assert (frame.seq, frame.array[0]) == (2 * at.n, at.n), f"after Ctrl-C at {at.where}"
            frame.release()
            frame = rx.recv(timeout=TIMEOUT_S)
            assert (frame.seq, frame.array[0]) == (2 * at.n + 1, -1), f"after Ctrl-C at {at.where}"
            frame.release()
        tx.flush(timeout=TIMEOUT_S)


def test_ctrl_c_in_release_gives_the_slot_back_all_the_same() -> None:
    with pair(receiver={"slots": 2}, sender={"slots": 2}) as (tx, rx):
        for at in each_point():
            tx.push(np.array([at.n]), timeout=TIMEOUT_S)
            frame = rx.recv(timeout=TIMEOUT_S)
            with at:
                frame.release()
            check_unlocked(rx, at.where)
            del frame
            with contextlib.suppress(rdmaxfer.TimeoutExpired):
                rx.recv(timeout=0)
            try:
                tx.flush(timeout=5)
            except rdmaxfer.TimeoutExpired:
                pytest.fail(f"a slot was lost by Ctrl-C at {at.where}")


def test_ctrl_c_in_flush() -> None:
    with pair(receiver={"slots": 4}, sender={"slots": 4}) as (tx, rx):
        for at in each_point():
            tx.push(np.array([at.n]), timeout=TIMEOUT_S)
            assert value(rx) == (at.n, at.n)
            with at:
                tx.flush(timeout=TIMEOUT_S)
            check_unlocked(tx, at.where)
        tx.flush(timeout=TIMEOUT_S)


@pytest.mark.verbs
@pytest.mark.parametrize("lane", [0, 1])
@pytest.mark.parametrize("verb", ["write_imm", "write_empty"])
def test_ctrl_c_just_before_an_empty_write_is_posted(verb: str, lane: int) -> None:
    with pair(receiver={"slots": 4}, sender={"slots": 4}) as (tx, rx):
        (link,) = tx._links
        posted: list[int] = []

        def interrupted(*arguments: Any) -> None:
            if arguments[-1] == lane:
                raise KeyboardInterrupt
            posted.append(arguments[-1])
            getattr(type(link.endpoint), verb)(link.endpoint, *arguments)

        if verb == "write_empty":  # has to have something to fence
            with tx._lock:
                link._half = 1 << 20
        for n in range(2):
            tx.push(np.array([n]), timeout=TIMEOUT_S)
            assert value(rx) == (n, n)
        setattr(link.endpoint, verb, interrupted)
        with tx._lock, pytest.raises(KeyboardInterrupt):
            link.ask_credit() if verb == "write_imm" else link.fence()
        delattr(link.endpoint, verb)
        assert posted == list(range(lane))
        began = time.monotonic()
    assert time.monotonic() - began < 5, "close waited for a completion that nothing would bring"


@pytest.mark.verbs
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_ctrl_c_around_posting_receives_neither_loses_nor_doubles_one(side: str, when: str) -> None:
    with pair(receiver={"slots": 4}, sender={"slots": 4}) as (tx, rx):
        (link,) = (tx if side == "sender" else rx)._links
        endpoint = link.endpoint
        posted_at_first = endpoint._lib.rx_ep_receives(endpoint._ep)
        original = endpoint.repost_recv
        interruptions: list[str] = []

        def interrupted(*arguments: Any) -> None:
            here = threading.current_thread() is threading.main_thread()  # the only one that Ctrl-C interrupts
            if when == "after" or not here:
                original(*arguments)
            if here:
                interruptions.append(when)
                raise KeyboardInterrupt

        for n in range(10):
            endpoint.repost_recv = interrupted
            with contextlib.suppress(KeyboardInterrupt):
                for _ in range(2):  # half of the ring: credit is due when the second one is released
                    tx.push(np.array([n]), timeout=TIMEOUT_S)
                for _ in range(2):
                    rx.recv(timeout=TIMEOUT_S).release()
                tx.flush(timeout=TIMEOUT_S)
            endpoint.repost_recv = original
            with contextlib.suppress(rdmaxfer.TimeoutExpired):
                while True:
                    rx.recv(timeout=0.01).release()
            tx.flush(timeout=TIMEOUT_S)
        assert interruptions, "nothing was interrupted"
        with tx._lock, rx._lock:
            link.after_poll()
            if side == "receiver":
                link._repost()
        assert endpoint._lib.rx_ep_receives(endpoint._ep) == posted_at_first


def test_ctrl_c_in_a_reserved_block() -> None:
    with pair(receiver={"slots": 4}, sender={"slots": 4}) as (tx, rx):
        count = 0
        for at in each_point():
            with at, tx.reserve((1,), np.int64, timeout=TIMEOUT_S) as slot:
                slot.array[0] = 2 * at.n
            check_unlocked(tx, at.where)
            try:
                last = tx.push(np.array([2 * at.n + 1]), timeout=5)
            except rdmaxfer.TimeoutExpired:
                pytest.fail(f"staging memory was lost by Ctrl-C at {at.where}")
            expected = [(count, 2 * at.n)] * (last - count) + [(last, 2 * at.n + 1)]
            assert len(expected) <= 2
            assert [value(rx) for _ in expected] == expected, f"after Ctrl-C at {at.where}"
            count = last + 1
            tx.flush(timeout=TIMEOUT_S)


STORM = """
import faulthandler, json, random, signal, sys, numpy as np, rdmaxfer
faulthandler.dump_traceback_later(20, exit=True)  # says where, should it hang
random.seed(int(sys.argv[2]))
armed = False
def on_signal(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt
signal.signal(signal.SIGALRM, on_signal)
accepted, interrupted = {}, 0
with rdmaxfer.Sender(slots=4) as tx:
    tx.connect(sys.argv[1], timeout=60)
    number = 0
    while number < 400 or (interrupted < 20 and number < 50_000):  # the faster a push, the fewer signals hit it
        number += 1
        signal.setitimer(signal.ITIMER_REAL, random.expovariate(500) + 1e-6)
        try:
            armed = True
            seq = tx.push(np.array([number]))
            armed = False
            accepted[number] = seq
        except KeyboardInterrupt:
            interrupted += 1
    armed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    tx.push(np.array([-1]), timeout=60)
    tx.flush(timeout=60)
print(json.dumps([accepted, interrupted]))
"""


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_storm_of_signals_neither_loses_nor_doubles_what_push_accepted(seed: int) -> None:
    with rdmaxfer.Receiver(slots=4) as rx:
        process = spawn(STORM, rx.bind("tcp://127.0.0.1:*"), str(seed))
        try:
            got: dict[int, int] = {}
            while True:
                try:
                    frame = rx.recv(timeout=25)
                except rdmaxfer.TimeoutExpired:
                    pytest.fail(f"the sender stalled after {len(got)} frames: {rest(process)}")
                with frame:
                    number = int(frame.array[0])
                    assert frame.seq == len(got), "a sequence number is missing or doubled"
                    if number < 0:
                        break
                    assert number not in got
                    assert number > max(got, default=-1)
                    got[number] = frame.seq
            out, err = rest(process)
            assert process.returncode == 0, err
            accepted, interrupted = json.loads(out)
            assert {int(number): seq for number, seq in accepted.items()}.items() <= got.items()
            assert interrupted > 5, "the storm was none"
        finally:
            process.kill()
            process.communicate()
