"""Processes that are killed or stopped under load, without reconnecting: the survivor notices within the lease, and nothing stays
behind. (With it: test_resume.py, test_killed.py.)"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import FABRIC, TIMEOUT_S, Background, pair, picture, resources, spawn, wait_until, warm_up

import rdmaxfer

LEASE_S = 2.0
NOTICED_S = 12.0
"""Within this time the loss of a peer must be known: the lease, the transport's own retries, and patience for a slow machine."""


def back_to(before: dict[str, int]) -> bool:
    """Whether no more is open than before. By shared memory it may be less: staging memory that a dead peer may go on to read is
    given up, and made anew when it is needed."""
    now = resources()
    if FABRIC == "shm" and now.get("ShmRegion", 0) < before.get("ShmRegion", 0):
        now["ShmRegion"] = before["ShmRegion"]
    return now == before


SENDER = """
import sys, threading, numpy as np, rdmaxfer
how, endpoint = sys.argv[1:]
lost = threading.Event()

def on_state(change):
    if change.state == "lost":
        lost.set()

with rdmaxfer.Sender(lease_s=2.0, slots=4, reconnect=False, on_state=on_state) as tx:
    if how == "connect":
        tx.connect(endpoint, timeout=60)
    else:
        print(tx.bind("tcp://127.0.0.1:*"), flush=True)
        tx.wait_for_peers(1, timeout=60)
    print("ready", flush=True)
    try:
        while True:
            try:
                tx.push(np.zeros(100_000, np.uint8), timeout=0.5)
            except rdmaxfer.TimeoutExpired:
                # A bound one whose frames were all released has lost nothing, and waits for the next receiver.
                if how == "bind" and lost.is_set():
                    print("PeerLost", flush=True)
                    break
    except rdmaxfer.PeerError as error:
        print(type(error).__name__, flush=True)
"""
RECEIVER = """
import sys, rdmaxfer
how, endpoint = sys.argv[1:]
with rdmaxfer.Receiver(lease_s=2.0, slots=4, reconnect=False) as rx:
    if how == "connect":
        rx.connect(endpoint, timeout=60)
    else:
        print(rx.bind("tcp://127.0.0.1:*"), flush=True)
        rx.wait_for_peers(1, timeout=60)
    print("ready", flush=True)
    try:
        while True:
            rx.recv(timeout=30).release()
    except rdmaxfer.RdmaxferError as error:
        print(type(error).__name__, flush=True)
"""


@contextlib.contextmanager
def peer(code: str, how: str, node: Any, endpoint: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `code`, connected with `node`."""
    process = spawn(code, how, endpoint)
    try:
        assert process.stdout is not None
        if how == "bind":
            node.connect(process.stdout.readline().strip(), timeout=TIMEOUT_S)
        assert process.stdout.readline() == "ready\n"
        node.wait_for_peers(1, timeout=TIMEOUT_S)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.communicate()


def drain(rx: rdmaxfer.Receiver) -> bool:
    """Take what has come. True once the loss of the peer is known."""
    with contextlib.suppress(rdmaxfer.TimeoutExpired, rdmaxfer.PeerLost, rdmaxfer.NotConnected, rdmaxfer.EndOfStream):
        rx.recv(timeout=0.05).release()
    return rx.statistics().peers == 0


def push(tx: rdmaxfer.Sender) -> bool:
    """Push one. True once the loss of the peer was reported."""
    try:
        tx.push(picture(0), timeout=0.05)
    except rdmaxfer.TimeoutExpired:
        return False
    except rdmaxfer.PeerLost:
        return True
    return False


def forget_peers(node: Any) -> None:
    """Wait until no peer is left, then take the loss that may wait to be reported: the next test of it begins afresh."""
    step = drain if isinstance(node, rdmaxfer.Receiver) else push

    def nobody_left() -> bool:
        step(node)
        return bool(node.statistics().peers == 0)

    wait_until(nobody_left, "the peer was missed", TIMEOUT_S)
    step(node)


@pytest.mark.parametrize("how", ["connect", "bind"])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_sender_that_dies_under_load(how: str, blow: signal.Signals) -> None:
    with rdmaxfer.Receiver(lease_s=LEASE_S, slots=4, reconnect=False) as rx:
        endpoint = rx.bind("tcp://127.0.0.1:*")
        with peer(SENDER, "connect", rx, endpoint):  # a first one, so that what is made once is there
            rx.recv(timeout=TIMEOUT_S).release()
        forget_peers(rx)
        before = resources(settled=True)
        lost = rx.statistics().peers_lost
        with peer(SENDER, how, rx, endpoint) as process:
            for _ in range(20):
                rx.recv(timeout=TIMEOUT_S).release()
            process.send_signal(blow)
            wait_until(lambda: drain(rx), "the loss was noticed", NOTICED_S)
            forget_peers(rx)
            assert rx.statistics().peers_lost == lost + 1
            if blow is signal.SIGSTOP:
                process.send_signal(signal.SIGCONT)
                assert process.stdout is not None
                assert process.stdout.readline() == "PeerLost\n", "it did not learn that it was given up"
                assert process.wait(TIMEOUT_S) == 0
        wait_until(lambda: back_to(before), f"resources are back to {before}")
        with peer(SENDER, how, rx, endpoint):
            for _ in range(20):
                rx.recv(timeout=TIMEOUT_S).release()


@pytest.mark.parametrize("how", ["connect", "bind"])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_receiver_that_dies_under_load(how: str, blow: signal.Signals) -> None:
    with rdmaxfer.Sender(lease_s=LEASE_S, slots=4, reconnect=False) as tx:
        endpoint = tx.bind("tcp://127.0.0.1:*")
        with peer(RECEIVER, "connect", tx, endpoint):
            warm_up(tx, None, 4)
        forget_peers(tx)
        before = resources(settled=True)
        with peer(RECEIVER, how, tx, endpoint) as process:
            for seed in range(20):
                tx.push(picture(seed), timeout=TIMEOUT_S)
            process.send_signal(blow)
            wait_until(lambda: push(tx), "the loss was reported", NOTICED_S)
            assert tx.statistics().peers == 0
            if blow is signal.SIGSTOP:
                process.send_signal(signal.SIGCONT)
                assert process.stdout is not None
                if how == "connect":  # a bound one waits for the next sender
                    assert process.stdout.readline() == "PeerLost\n", "it did not learn that it was given up"
                    assert process.wait(TIMEOUT_S) == 0
        wait_until(lambda: back_to(before), f"resources are back to {before}")
        with peer(RECEIVER, how, tx, endpoint):
            for seed in range(20):
                tx.push(picture(seed), timeout=TIMEOUT_S)
            tx.flush(timeout=TIMEOUT_S)


def test_a_receiver_that_stops_reading_holds_the_sender_and_timeouts_hold_too() -> None:
    with rdmaxfer.Sender(slots=4) as tx, rdmaxfer.Receiver(slots=4) as reading, rdmaxfer.Receiver(slots=4) as idle:
        endpoint = tx.bind("tcp://127.0.0.1:*")
        reading.connect(endpoint, timeout=TIMEOUT_S)
        idle.connect(endpoint, timeout=TIMEOUT_S)
        tx.wait_for_peers(2, timeout=TIMEOUT_S)
        taking = Background(lambda: [take(reading) for _ in range(5)])
        for seed in range(4):
            tx.push(picture(seed), timeout=TIMEOUT_S)
        for timeout in (0, 0.2):
            began = time.monotonic()
            with pytest.raises(rdmaxfer.TimeoutExpired):
                tx.push(picture(4), timeout=timeout)
            with pytest.raises(rdmaxfer.TimeoutExpired, match="not released 4 frames, the first is 0"):
                tx.flush(timeout=timeout)
            assert time.monotonic() - began < 5
        with pytest.raises(rdmaxfer.TimeoutExpired):
            reading_more(taking)
        idle.close()
        with pytest.raises(rdmaxfer.PeerLost) as caught:
            tx.flush(timeout=TIMEOUT_S)  # a push goes on with who is left, also before it is certain what was lost
        assert caught.value.unreleased == (0, 1, 2, 3)
        assert tx.push(picture(4), timeout=TIMEOUT_S) == 4
        assert taking.result() == [(seed, picture(seed).tobytes()) for seed in range(5)]


def take(rx: rdmaxfer.Receiver) -> tuple[int, bytes]:
    with rx.recv(timeout=TIMEOUT_S) as frame:
        return frame.seq, frame.array.tobytes()


def reading_more(taking: Background) -> None:
    """A frame that timed out went to nobody: the one who reads must not have it."""
    taking.join(0.3)
    if taking.is_alive():
        raise rdmaxfer.TimeoutExpired("it still waits, as it should")


# --- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["receiver", "sender"])
def test_many_threads_close_at_once_while_others_wait(which: str) -> None:
    with pair(receiver={"slots": 2}, sender={"slots": 2}) as (tx, rx):
        for seed in range(2):
            tx.push(picture(seed), timeout=TIMEOUT_S)
        if which == "receiver":
            take(rx)
            take(rx)
            waiting = [Background(lambda: rx.recv(timeout=TIMEOUT_S)) for _ in range(4)]
        else:
            waiting = [Background(lambda: tx.push(picture(9), timeout=TIMEOUT_S)) for _ in range(2)]
            waiting += [Background(lambda: tx.flush(timeout=TIMEOUT_S)) for _ in range(2)]
        node: Any = rx if which == "receiver" else tx
        together = threading.Barrier(8)

        def close() -> None:
            together.wait(TIMEOUT_S)
            with contextlib.suppress(rdmaxfer.PeerLost):
                node.close()

        for each in [Background(close) for _ in range(8)]:
            each.result(30)
        for other in waiting:
            with pytest.raises((rdmaxfer.ClosedError, rdmaxfer.PeerLost)):
                other.result(30)
        assert node.closed
    wait_until(lambda: not [one for one in threading.enumerate() if "rdmaxfer" in one.name], "control threads ended")


def test_close_returns_only_when_everything_is_closed_whichever_thread_does_it() -> None:
    before = resources()
    with pair() as (tx, rx):
        closers = [Background(rx.close) for _ in range(4)] + [Background(tx.close) for _ in range(4)]
        for each in closers:
            each.result(30)
        assert resources() == before


@pytest.mark.parametrize("there", [True, False])
def test_close_while_another_thread_connects(there: bool) -> None:
    before = resources()
    with rdmaxfer.Receiver() as rx:
        endpoint = rx.bind("tcp://127.0.0.1:*") if there else "tcp://127.0.0.1:9"
        for delay in range(12):
            tx = rdmaxfer.Sender()
            connecting = Background(lambda tx=tx: tx.connect(endpoint, timeout=TIMEOUT_S))
            threading.Event().wait(delay * 0.004)
            tx.close()
            try:
                connecting.result(30)
            except (rdmaxfer.ClosedError, rdmaxfer.PeerError):
                pass
            else:
                assert there
            assert tx.statistics().peers == 0
        wait_until(lambda: rx.statistics().peers == 0, "the receiver forgot them all")
    wait_until(lambda: back_to(before), f"resources are back to {before}")
    wait_until(lambda: not [one for one in threading.enumerate() if "rdmaxfer" in one.name], "control threads ended")


@pytest.mark.verbs
@pytest.mark.parametrize("call", ["connect", "bind"])
def test_close_at_the_worst_moment_of_connect_or_bind_leaves_nothing(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other thread has looked whether this object is closed, and has not made anything yet."""
    before = resources()
    tx = rdmaxfer.Sender()
    looked = threading.Event()
    route = tx.routing.by_verbs

    def route_while_closing(*args: Any, **kwargs: Any) -> Any:
        looked.set()
        wait_until(lambda: tx.closed, "close() has begun")
        return route(*args, **kwargs)

    monkeypatch.setattr(tx.routing, "by_verbs", route_while_closing)
    if call == "connect":
        working = Background(lambda: tx.connect("tcp://127.0.0.1:9", timeout=1))
    else:
        working = Background(lambda: tx.bind("tcp://127.0.0.1:*"))
    assert looked.wait(TIMEOUT_S)
    tx.close()
    with pytest.raises(rdmaxfer.ClosedError):
        working.result(30)
    assert resources() == before
    assert not [one for one in threading.enumerate() if "rdmaxfer" in one.name], "a control thread was left behind"


# --- frames in other hands ---------------------------------------------------------------------------------------------


def test_frames_are_used_and_released_by_other_threads() -> None:
    with pair(receiver={"slots": 8}, sender={"slots": 8}) as (tx, rx):
        pushing = Background(lambda: [tx.push(picture(seed), timeout=TIMEOUT_S) for seed in range(200)])
        using: list[Background] = []

        def use(frame: rdmaxfer.Frame) -> bool:
            same = frame.array.tobytes() == picture(frame.seq).tobytes()
            frame.release()
            return same

        for _ in range(200):
            frame = rx.recv(timeout=TIMEOUT_S)
            using.append(Background(lambda frame=frame: use(frame)))
        del frame
        assert all(each.result() for each in using)
        pushing.result()
        tx.flush(timeout=TIMEOUT_S)


def test_a_frame_released_by_many_threads_at_once_is_released_once() -> None:
    with pair(receiver={"slots": 2}, sender={"slots": 2}) as (tx, rx):
        for seed in range(30):
            tx.push(picture(seed), timeout=TIMEOUT_S)
            frame = rx.recv(timeout=TIMEOUT_S)
            assert frame.seq == seed
            for each in [Background(frame.release) for _ in range(4)]:
                each.result()
        tx.flush(timeout=TIMEOUT_S)


def test_frames_outlive_their_receiver() -> None:
    frames = []
    with pair(receiver={"slots": 8}, sender={"slots": 8}) as (tx, rx):
        for seed in range(6):
            tx.push(picture(seed), timeout=TIMEOUT_S)
        frames = [rx.recv(timeout=TIMEOUT_S) for _ in range(6)]
        views = [frame.array for frame in frames]
        rx.close()
        with pytest.raises(rdmaxfer.PeerLost):
            tx.flush(timeout=TIMEOUT_S)
    releasing = [Background(frame.release) for frame in frames]
    for each in releasing:
        each.result()
    for seed, view in enumerate(views):
        assert view.tobytes() == picture(seed).tobytes()
    for frame in frames:
        with pytest.raises(rdmaxfer.FrameReleased):
            _ = frame.array


def test_frames_that_are_dropped_by_another_thread_during_recv_come_free() -> None:
    with pair(receiver={"slots": 2}, sender={"slots": 2}) as (tx, rx):
        for seed in range(2):
            tx.push(picture(seed), timeout=TIMEOUT_S)
        held = [rx.recv(timeout=TIMEOUT_S) for _ in range(2)]
        receiving = Background(lambda: [take(rx) for _ in range(20)])
        pushing = Background(lambda: [tx.push(picture(seed), timeout=TIMEOUT_S) for seed in range(2, 22)])
        held.clear()
        assert pushing.result() == list(range(2, 22))
        assert [seq for seq, _ in receiving.result()] == list(range(2, 22))
