"""Back-pressure, leases, closing, threads, fork, Ctrl-C: nothing is lost, nothing hangs, nothing leaks."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, Background, pair, picture, resources, rest, spawn, wait_until

import rdmaxfer


@pytest.mark.smoke
def test_a_slow_receiver_holds_the_sender_and_loses_nothing() -> None:
    with pair(receiver={"slots": 4}, sender={"slots": 8}) as (tx, rx):
        pushing = Background(lambda: [tx.push(picture(seed), timeout=TIMEOUT_S) for seed in range(50)])
        wait_until(lambda: tx.statistics().frames == 4, "the ring is full")
        held = [rx.recv(timeout=TIMEOUT_S) for _ in range(4)]
        with pytest.raises(rdmaxfer.TimeoutExpired):
            rx.recv(timeout=0.3)
        assert tx.statistics().frames == 4, "the sender went on without credit"
        assert [frame.array.tobytes() for frame in held] == [picture(seed).tobytes() for seed in range(4)]
        for frame in reversed(held):
            frame.release()
        for seed in range(4, 50):
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.seq == seed
                assert frame.array.tobytes() == picture(seed).tobytes()
        assert pushing.result() == list(range(50))
        tx.flush(timeout=TIMEOUT_S)


@pytest.mark.verbs
@pytest.mark.parametrize(("wish", "have", "agreed"), [(1, 1, 1), (1, 8, 1), (3, 2, 2), (8, 8, 8)])
@pytest.mark.parametrize("bind", ["sender", "receiver"])
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_frames_come_in_order_over_any_number_of_queue_pairs(
    bind: str, wish: int, have: int, agreed: int, slots: int
) -> None:
    sizes = [0, 1, 30000, 5, 200000, 7]  # small ones overtake large ones between queue pairs
    arrays = [np.random.default_rng(seed).integers(0, 256, sizes[seed % 6], np.uint8) for seed in range(60)]
    options = {"slots": slots, "queue_pairs": wish}, {"slots": slots, "slot_bytes": 1 << 18, "queue_pairs": have}
    with pair(bind=bind, sender=options[0], receiver=options[1]) as (tx, rx):
        assert [link.endpoint.lanes for node in (tx, rx) for link in node._links] == [agreed, agreed]
        pushing = Background(lambda: [tx.push(array, timeout=TIMEOUT_S) for array in arrays])
        held: list[rdmaxfer.Frame] = []
        for seq, array in enumerate(arrays):
            frame = rx.recv(timeout=TIMEOUT_S)
            assert frame.seq == seq
            assert frame.array.tobytes() == array.tobytes()
            held.append(frame)
            if len(held) == slots:  # given back in another order than they came
                for each in held[1::2] + held[::2]:
                    each.release()
                held.clear()
        assert pushing.result() == list(range(60))
        for frame in held:
            frame.release()
        tx.flush(timeout=TIMEOUT_S)
        tx.close()
        with pytest.raises(rdmaxfer.RdmaxferError) if bind == "sender" else pytest.raises(rdmaxfer.TimeoutExpired):
            rx.recv(timeout=0.2)
        assert rx.statistics().peers_lost == 0


def test_flush_does_not_wait_for_kept_credit_on_any_queue_pair() -> None:
    with pair(sender={"queue_pairs": 3}, receiver={"queue_pairs": 3}) as (tx, rx):
        for seed in range(5):  # less than half of the ring: without being asked, the receiver would keep the credit
            tx.push(picture(seed), timeout=TIMEOUT_S)
        flushing = Background(lambda: tx.flush(timeout=TIMEOUT_S))
        for _ in range(5):
            take(rx)
        flushing.result()
        assert rx.statistics().credits_sent >= 1


def test_a_push_that_times_out_sends_nothing() -> None:
    with pair(receiver={"slots": 2}, sender={"slots": 4}) as (tx, rx):
        for seed in range(2):
            tx.push(picture(seed), timeout=TIMEOUT_S)
        for _ in range(3):
            with pytest.raises(rdmaxfer.TimeoutExpired):
                tx.push(picture(99), timeout=0.05)
        with pytest.raises(rdmaxfer.TimeoutExpired, match="not released 2 frames, the first is 0"):
            tx.flush(timeout=0.05)
        assert [take(rx) for _ in range(2)] == [picture(0).tobytes(), picture(1).tobytes()]
        assert tx.push(picture(2), timeout=TIMEOUT_S) == 2
        assert take(rx) == picture(2).tobytes()


def take(rx: rdmaxfer.Receiver) -> bytes:
    with rx.recv(timeout=TIMEOUT_S) as frame:
        return bytes(frame.array.tobytes())


def test_a_frame_is_released_when_the_last_view_of_it_is_gone() -> None:
    with pair(receiver={"slots": 2}, sender={"slots": 2}) as (tx, rx):
        for seed in range(2):
            tx.push(picture(seed), timeout=TIMEOUT_S)
        part = rx.recv(timeout=TIMEOUT_S).array[3:5]
        other: Any = rx.recv(timeout=TIMEOUT_S)
        gc.collect()
        with pytest.raises(rdmaxfer.TimeoutExpired):
            tx.push(picture(2), timeout=0.1)
        assert part.tobytes() == picture(0)[3:5].tobytes()
        del part, other
        gc.collect()
        pushing = Background(lambda: tx.push(picture(2), timeout=TIMEOUT_S))
        assert take(rx) == picture(2).tobytes()
        pushing.result()


def test_using_a_frame_after_its_end_is_an_error_and_its_memory_stays() -> None:
    with pair() as (tx, rx):
        tx.push(picture(0), timeout=TIMEOUT_S)
        tx.push(picture(1), timeout=TIMEOUT_S)
        first, second = rx.recv(timeout=TIMEOUT_S), rx.recv(timeout=TIMEOUT_S)
        view = second.array
        first.release()
        first.release()
        with pytest.raises(rdmaxfer.FrameReleased):
            _ = first.array
        rx.close()
        with pytest.raises(rdmaxfer.FrameReleased):
            _ = second.array
        assert view.tobytes() == picture(1).tobytes(), "memory was taken away under a view"
        second.release()
        with pytest.raises(rdmaxfer.PeerLost):
            tx.flush(timeout=TIMEOUT_S)


@pytest.mark.parametrize("bind", ["receiver", "sender"])
def test_frames_in_flight_outlive_the_sender(bind: str) -> None:
    with pair(bind=bind) as (tx, rx):
        for seed in range(10):
            tx.push(picture(seed), timeout=TIMEOUT_S)
        first = rx.recv(timeout=TIMEOUT_S)
        tx.close()
        assert first.array.tobytes() == picture(0).tobytes()
        for seed in range(1, 10):
            assert take(rx) == picture(seed).tobytes()
        if bind == "sender":
            with pytest.raises(rdmaxfer.EndOfStream):
                rx.recv(timeout=TIMEOUT_S)
            assert list(rx) == []
        else:
            with pytest.raises(rdmaxfer.TimeoutExpired):
                rx.recv(timeout=0.1)
        assert rx.statistics().peers_lost == 0


@pytest.mark.parametrize("bind", ["receiver", "sender"])
@pytest.mark.parametrize("state", ["fresh", "idle", "full", "leased", "pushing", "receiving"])
@pytest.mark.parametrize("first", ["receiver", "sender"])
def test_close_returns_promptly_in_any_state(bind: str, state: str, first: str) -> None:
    with pair(bind=bind, receiver={"slots": 4}, sender={"slots": 4}) as (tx, rx):
        beside = None
        held = None
        if state != "fresh":
            tx.push(picture(0), timeout=TIMEOUT_S)
            held = rx.recv(timeout=TIMEOUT_S)
            if state != "leased":
                held.release()
        if state in ("full", "pushing"):
            for seed in range(4):
                tx.push(picture(seed), timeout=TIMEOUT_S)
        if state == "pushing":
            beside = Background(lambda: tx.push(picture(9), timeout=TIMEOUT_S))
        elif state == "receiving":
            beside = Background(lambda: rx.recv(timeout=TIMEOUT_S))
        began = time.monotonic()
        for node in (rx, tx) if first == "receiver" else (tx, rx):
            with contextlib.suppress(rdmaxfer.PeerLost):  # the frames that were not released
                node.close()
        assert time.monotonic() - began < 8
        if beside is not None:
            with pytest.raises((rdmaxfer.ClosedError, rdmaxfer.PeerLost, rdmaxfer.EndOfStream)):
                beside.result()
        for node in (rx, tx):
            node.close()
        with pytest.raises(rdmaxfer.ClosedError):
            tx.push(picture(0))
        with pytest.raises(rdmaxfer.ClosedError):
            rx.recv(timeout=1)


def test_a_receiver_that_leaves_with_frames_unreleased_is_reported_by_number() -> None:
    with pair() as (tx, rx):
        for seed in range(3):
            tx.push(picture(seed), timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S):
            pass
        rx.close()
        with pytest.raises(rdmaxfer.PeerLost) as caught:
            tx.flush(timeout=TIMEOUT_S)
        assert caught.value.unreleased == (1, 2)


def test_fifty_connections_leave_nothing_behind() -> None:
    with rdmaxfer.Receiver(slots=4, slot_bytes=4096) as rx:
        endpoint = rx.bind("tcp://127.0.0.1:*")
        before: dict[str, int] = {}
        for cycle in range(51):
            if cycle == 1:
                before = resources(settled=True)
            with rdmaxfer.Sender(slots=4) as tx:
                tx.connect(endpoint, timeout=TIMEOUT_S)
                tx.push(picture(cycle), timeout=TIMEOUT_S)
                assert take(rx) == picture(cycle).tobytes()
                tx.flush(timeout=TIMEOUT_S)
            wait_until(lambda: rx.statistics().peers == 0, "the goodbye was noticed")
        wait_until(lambda: resources() == before, f"{resources()} != {before}")
        assert before, "rdma resource show said nothing"
        threads = [thread for thread in threading.enumerate() if "rdmaxfer" in thread.name]
        assert len(threads) == 1


def test_many_threads_push_and_receive_at_once() -> None:
    with pair(receiver={"slots": 8}, sender={"slots": 8}) as (tx, rx):
        pushing = [
            Background(lambda i=i: [tx.push(np.array([i, n]), timeout=TIMEOUT_S) for n in range(60)]) for i in range(4)
        ]

        def take_some() -> list[tuple[int, tuple[int, int]]]:
            got = []
            for _ in range(60):
                with rx.recv(timeout=TIMEOUT_S) as frame:
                    got.append((frame.seq, tuple(frame.array.tolist())))
            return got

        taken = [item for each in [Background(take_some) for _ in range(4)] for item in each.result()]
        seqs = [seq for each in pushing for seq in each.result()]
        assert sorted(seqs) == list(range(240)) == sorted(seq for seq, _ in taken)
        assert sorted(value for _, value in taken) == [(i, n) for i in range(4) for n in range(60)]


def test_a_blocked_call_lets_other_threads_run() -> None:
    with pair() as (_, rx):
        waiting = Background(lambda: rx.recv(timeout=1.0))
        count = 0
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            count += 1
        assert count > 100, "the waiting thread held the interpreter"
        with pytest.raises(rdmaxfer.TimeoutExpired):
            waiting.result()


INTERRUPTED = """
import sys, numpy as np, rdmaxfer
what, endpoint = sys.argv[1:]
with rdmaxfer.Receiver(slots=2) as rx, rdmaxfer.Sender(slots=2) as tx:
    tx.connect(rx.bind("tcp://127.0.0.1:*"), timeout=60)
    for _ in range(2):
        tx.push(np.zeros(3), timeout=60)
    if what == "recv":
        for _ in range(2):
            rx.recv().release()
    print("ready", flush=True)
    try:
        if what == "recv":
            rx.recv()
        elif what == "push":
            tx.push(np.zeros(3))
        elif what == "flush":
            tx.flush()
        elif what == "reserve":
            tx.reserve((3,)).commit()
        elif what == "wait_for_peers":
            rx.wait_for_peers(5)
        else:
            tx.connect(endpoint, timeout=None)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    if what != "recv":
        for _ in range(2):
            rx.recv(timeout=60).release()
    tx.push(np.arange(3), timeout=60)
    with rx.recv(timeout=60) as frame:
        print(frame.array.tolist(), flush=True)
"""


@pytest.mark.parametrize("what", ["recv", "push", "flush", "reserve", "wait_for_peers", "connect"])
def test_ctrl_c_works_in_every_blocking_call_and_the_stream_goes_on(what: str) -> None:
    process = spawn(INTERRUPTED, what, "tcp://127.0.0.1:9")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        threading.Event().wait(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - began < 5
        out, err = rest(process)
        assert out == "[0, 1, 2]\n", err
        assert process.returncode == 0, err
    finally:
        process.kill()
        process.communicate()


def test_a_forked_child_gets_a_clear_error_and_harms_nobody() -> None:
    with pair() as (tx, rx):
        tx.push(picture(0), timeout=TIMEOUT_S)
        held = rx.recv(timeout=TIMEOUT_S)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            said = []
            for call in (
                lambda: tx.push(picture(1)),
                lambda: rx.recv(timeout=1),
                lambda: tx.flush(timeout=1),
                lambda: rx.bind("tcp://*:*"),
            ):
                try:
                    call()
                    said.append("nothing")
                except BaseException as error:
                    said.append(type(error).__name__)
            for node in (tx, rx):
                node.close()
            held.release()
            os.write(write, json.dumps(said).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answers:
            assert json.load(answers) == ["ForkedError"] * 4
        assert os.waitpid(child, 0)[1] == 0
        assert held.array.tobytes() == picture(0).tobytes()
        held.release()
        for seed in range(40):
            tx.push(picture(seed), timeout=TIMEOUT_S)
            assert take(rx) == picture(seed).tobytes()
        tx.flush(timeout=TIMEOUT_S)


PEER = """
import hashlib, sys, numpy as np, rdmaxfer
with rdmaxfer.Receiver() as rx:
    print(rx.bind("tcp://127.0.0.1:*"), flush=True)
    for _ in range(int(sys.argv[1])):
        with rx.recv(timeout=60) as frame:
            print(frame.seq, hashlib.sha256(frame.array.tobytes()).hexdigest(), flush=True)
"""


@pytest.mark.smoke
def test_frames_reach_another_process() -> None:
    process = spawn(PEER, "30")
    try:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        with rdmaxfer.Sender() as tx:
            tx.connect(endpoint, timeout=TIMEOUT_S)
            for seed in range(30):
                tx.push(picture(seed, (240, 320, 3)), timeout=TIMEOUT_S)
            tx.flush(timeout=TIMEOUT_S)
        out, err = rest(process)
        assert process.returncode == 0, err
        expected = [
            f"{seed} {hashlib.sha256(picture(seed, (240, 320, 3)).tobytes()).hexdigest()}" for seed in range(30)
        ]
        assert out.split("\n")[:-1] == expected
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("bind", ["receiver", "sender"])
def test_whoever_waits_for_frames_is_told_that_they_are_lost(bind: str) -> None:
    """A loss is told once; but no flush that waits for its frames ends as if they had been released."""
    with pair(bind=bind) as (tx, rx):
        seq = tx.push(picture(1), timeout=TIMEOUT_S)
        held = rx.recv(timeout=TIMEOUT_S)
        flushing = [Background(lambda: tx.flush(timeout=TIMEOUT_S)) for _ in range(3)]
        wait_until(lambda: tx._waiter._followers + tx._waiter._leader >= 3, "all of them wait")
        rx.close()
        for each in flushing:
            with pytest.raises(rdmaxfer.PeerLost) as lost:
                each.result()
            assert lost.value.unreleased == (seq,)
        held.release()
        tx.flush(timeout=TIMEOUT_S)  # who asks later has nothing to wait for
