"""Processes that stand still for a while (SIGSTOP, as in a debugger, a suspended virtual machine or a machine that swaps), without
reconnecting, and clocks that are set. (With reconnecting: test_stopped_resume.py.)"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import TIMEOUT_S, Background, check_frames, pair, picture, wait_until
from peers import Peer, peer
from streams import States, streaming

import rdmaxfer

BINDS = pytest.mark.parametrize("bind", ["sender", "receiver"])
SLOTS = 8
LONG_LEASE_S = 6.0
SHORT_STOP_S = 2.0
"""Longer than a third of the lease, so that a renewal falls into it, and shorter than the lease."""
LEASE_S = 1.0
MARGIN_S = 6.0


def options(lease_s: float) -> dict[str, Any]:
    return {"lease_s": lease_s, "slots": SLOTS, "reconnect": False}


class Here:
    """This process' side of the stream: pushes or takes, until `enough` or an error."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.frames = 0
        self.enough = threading.Event()
        self.work = Background(self._push if isinstance(node, rdmaxfer.Sender) else self._take)

    def _push(self) -> None:
        while not self.enough.wait(0.002):
            assert self.node.push(picture(self.frames), timeout=TIMEOUT_S) == self.frames
            self.frames += 1
        self.node.flush(timeout=TIMEOUT_S)

    def _take(self) -> None:
        while True:
            try:
                frame = self.node.recv(timeout=0.1)
            except rdmaxfer.TimeoutExpired:
                if self.enough.is_set():
                    return
                continue
            except rdmaxfer.EndOfStream:
                return
            with frame:
                assert frame.seq == self.frames
                assert frame.gap is None
                assert frame.array.tobytes() == picture(self.frames).tobytes()
            self.frames += 1

    def goes_on(self, count: int = 20) -> None:
        want = self.frames + count
        wait_until(lambda: self.frames >= want or not self.work.is_alive(), "frames pass")
        if self.frames < want:
            self.work.result()


@contextlib.contextmanager
def stream(kind: str, bind: str, settings: dict[str, Any], **more: Any) -> Iterator[tuple[Any, Here, Peer]]:
    """A `kind` in another process, and the other side here, with frames passing."""
    node = (rdmaxfer.Receiver if kind == "sender" else rdmaxfer.Sender)(**settings, **more)
    with contextlib.ExitStack() as stack:
        stack.callback(_close, node)
        other = stack.enter_context(peer(kind, bind, node, settings))
        here = Here(node)
        stack.callback(here.enough.set)
        assert other.line() == "going"
        here.goes_on()
        yield node, here, other


def _close(node: Any) -> None:
    with contextlib.suppress(rdmaxfer.PeerLost):
        node.close()


def both_agree(here: Here, other: Peer, kind: str) -> dict[str, Any]:
    """Come to an end: all that was pushed was taken."""
    if kind == "sender":
        other.enough()
        result = other.result()
        wait_until(lambda: here.frames >= result["frames"] or not here.work.is_alive(), "all was taken")
        here.enough.set()
        here.work.result()
    else:
        here.enough.set()
        here.work.result()
        other.enough()
        result = other.result()
    assert result["error"] == "NoneType", result
    assert result["frames"] == here.frames > 0
    return result


@BINDS
@pytest.mark.parametrize("kind", ["sender", "receiver"])
def test_a_process_that_stands_still_for_less_than_the_lease_goes_on(kind: str, bind: str) -> None:
    with stream(kind, bind, options(LONG_LEASE_S)) as (node, here, other):
        for _ in range(2):
            other.stop()
            threading.Event().wait(SHORT_STOP_S)  # this is the fault
            other.go_on()
            here.goes_on()
        assert node.statistics().peers_lost == node.statistics().reconnects == 0
        both_agree(here, other, kind)


@pytest.mark.verbs  # a terminal would take this process for one that the user has stopped
@BINDS
@pytest.mark.parametrize("kind", ["sender", "receiver"])
def test_both_sides_that_stand_still_at_a_time_go_on(kind: str, bind: str) -> None:
    """As a machine that was paused: neither may take the time in which it could not look for the other one's silence."""
    lease_s = 2 * LEASE_S
    with stream(kind, bind, options(lease_s)) as (node, here, other):
        for _ in range(2):
            both = f"{os.getpid()} {other.process.pid}"
            stand_still = f"kill -STOP {both}; sleep {2.5 * lease_s}; kill -CONT {both}"
            subprocess.run(["sh", "-c", stand_still], check=True, timeout=TIMEOUT_S)
            here.goes_on()
            threading.Event().wait(1.5 * lease_s)  # in which a lease that was not renewed would end
            here.goes_on()
        assert node.statistics().peers_lost == node.statistics().reconnects == 0
        both_agree(here, other, kind)


@BINDS
@pytest.mark.parametrize("kind", ["sender", "receiver"])
def test_a_process_that_stands_still_for_longer_is_given_up_and_learns_it(kind: str, bind: str) -> None:
    told = States()
    with stream(kind, bind, options(LEASE_S), on_state=told) as (node, here, other):
        other.stop()
        began = time.monotonic()
        wait_until(lambda: told.when("lost") is not None, "this side was told")
        assert told.when("lost") - began < LEASE_S + MARGIN_S
        assert node.statistics().peers == 0
        if kind == "receiver":
            with pytest.raises(rdmaxfer.PeerLost) as caught:
                here.work.result()
            unreleased = caught.value.unreleased
            assert 1 <= len(unreleased) <= SLOTS, "it took nothing any more"
            assert unreleased[-1] == here.frames - 1
            assert unreleased == tuple(range(unreleased[0], here.frames))
        elif bind == "sender":
            with pytest.raises(rdmaxfer.PeerLost):
                here.work.result()
        other.go_on()
        began = time.monotonic()
        result = other.result()
        if kind == bind == "sender" and result["error"] == "TimeoutExpired":
            # It stood still when all it had sent was released: nothing was lost, and a bound one waits for the next receiver.
            assert (result["frames"], result["unreleased"]) == (here.frames, [])
            return
        assert time.monotonic() - began < LEASE_S + MARGIN_S + 5
        assert result["error"] == "PeerLost", result
        if kind == "sender":
            assert here.frames <= result["frames"]
            assert set(range(here.frames, result["frames"])) <= set(result["unreleased"]), (
                "it is told what was not taken"
            )
        else:
            assert result["frames"] <= here.frames
        with contextlib.suppress(rdmaxfer.PeerLost):
            node.close(timeout=2)


# --- clocks ------------------------------------------------------------------------------------------------------------

DAY_S = 86_400.0


@contextlib.contextmanager
def clock_set_by(seconds: float) -> Iterator[None]:
    """The wall clock jumps, and back at the end, corrected by what has passed meanwhile."""
    began = time.monotonic()
    before = time.time()
    time.clock_settime(time.CLOCK_REALTIME, before + seconds)
    try:
        assert abs(time.time() - before - seconds) < 60
        yield
    finally:
        time.clock_settime(time.CLOCK_REALTIME, before + time.monotonic() - began)


@pytest.mark.verbs
@BINDS
@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S], ids=["a-day-on", "a-day-back"])
def test_a_clock_that_is_set_ends_no_lease_and_no_wait(bind: str, jump_s: float) -> None:
    lease_s = 3.0
    both = options(lease_s)
    with pair(bind=bind, sender=both, receiver=both) as (tx, rx):
        with streaming(tx, rx) as going:
            going.goes_on()
            with clock_set_by(jump_s):
                until = time.monotonic() + lease_s * 1.5
                while time.monotonic() < until:
                    going.goes_on()
            going.goes_on()
        with clock_set_by(jump_s):
            _waits_take_their_time(tx, rx)
        for node in (tx, rx):
            assert (node.statistics().peers, node.statistics().peers_lost) == (1, 0)
        check_frames(tx, rx)


def _waits_take_their_time(tx: rdmaxfer.Sender, rx: rdmaxfer.Receiver) -> None:
    """Those begun under the new clock."""
    for _ in range(SLOTS):
        tx.push(picture(0), timeout=TIMEOUT_S)
    held = [rx.recv(timeout=TIMEOUT_S) for _ in range(SLOTS)]
    waits = (
        lambda: rx.recv(timeout=0.5),
        lambda: tx.flush(timeout=0.5),
        lambda: tx.push(picture(0), timeout=0.5),
        lambda: tx.wait_for_peers(2, timeout=0.5),
    )
    for wait in waits:
        began = time.monotonic()
        with pytest.raises(rdmaxfer.TimeoutExpired):
            wait()
        assert 0.4 < time.monotonic() - began < 0.5 + MARGIN_S
    for frame in held:
        frame.release()


@pytest.mark.verbs
@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S], ids=["a-day-on", "a-day-back"])
def test_a_wait_that_is_under_way_ends_neither_early_nor_never_when_the_clock_is_set(jump_s: float) -> None:
    both = options(5.0)
    with pair(sender=both, receiver=both) as (tx, rx):
        for _ in range(SLOTS):
            tx.push(picture(0), timeout=TIMEOUT_S)
        held = [rx.recv(timeout=TIMEOUT_S) for _ in range(SLOTS)]
        began = time.monotonic()
        waiting = [
            Background(lambda: rx.recv(timeout=1.5)),
            Background(lambda: tx.flush(timeout=1.5)),
            Background(lambda: tx.push(picture(0), timeout=1.5)),
        ]
        with clock_set_by(jump_s):
            for each in waiting:
                with pytest.raises(rdmaxfer.TimeoutExpired):
                    each.result()
            assert 1.4 < time.monotonic() - began < 1.5 + MARGIN_S
            with pytest.raises(rdmaxfer.ConnectTimeout):
                tx.connect("tcp://127.0.0.1:9", timeout=0.5)
            assert time.monotonic() - began < 1.5 + 0.5 + 2 * MARGIN_S
        for frame in held:
            frame.release()
        check_frames(tx, rx)
