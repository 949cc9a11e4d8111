"""`when_full` and `distribute`: who gets which frame, what is dropped, and that both sides know."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, Background, picture, spawn, wait_until

import rdmaxfer

SLOTS = 4
DROPPING = ["drop_newest", "drop_oldest", "latest"]


@contextlib.contextmanager
def one_to(count: int, *, when_full: Any = "block", **options: Any) -> Iterator[tuple[Any, ...]]:
    """A bound sender, and receivers connected to it."""
    with contextlib.ExitStack() as stack:
        tx = stack.enter_context(rdmaxfer.Sender(slots=SLOTS, **options))
        endpoint = tx.bind("tcp://127.0.0.1:*", when_full=when_full)
        receivers = []
        for number in range(count):
            rx = stack.enter_context(rdmaxfer.Receiver(slots=SLOTS, slot_bytes=1 << 16))
            rx.connect(endpoint, timeout=TIMEOUT_S)
            tx.wait_for_peers(number + 1, timeout=TIMEOUT_S)
            receivers.append(rx)
        yield (tx, *receivers)


def push(tx: rdmaxfer.Sender, count: int) -> None:
    for _ in range(count):
        seq = tx.statistics().frames
        assert tx.push(picture(seq), timeout=TIMEOUT_S) == seq


def take(rx: rdmaxfer.Receiver, *, last: int) -> list[tuple[int, rdmaxfer.Gap | None]]:
    """All frames up to number `last`, each looked at and released."""
    taken = []
    while not taken or taken[-1][0] < last:
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.array.tobytes() == picture(frame.seq).tobytes()
            taken.append((frame.seq, frame.gap))
    return taken


def missing(taken: list[tuple[int, rdmaxfer.Gap | None]]) -> list[int]:
    """The numbers that the gaps name; each must be right before its frame."""
    named = []
    for seq, gap in taken:
        if gap is not None:
            assert gap.last_seq == seq - 1
            assert gap.count == gap.last_seq - gap.first_seq + 1
            named += range(gap.first_seq, gap.last_seq + 1)
    return named


def dropped(tx: rdmaxfer.Sender) -> list[int]:
    return [seq for drop in tx.take_drops() for seq in range(drop.first_seq, drop.last_seq + 1)]


@pytest.mark.parametrize(
    ("when_full", "kept"),
    [
        # `SLOTS` are written; what waits behind them depends on the policy: the first, the last `SLOTS`, the last.
        ("drop_newest", [0, 1, 2, 3, 4]),
        ("drop_oldest", [0, 1, 2, 3, 16, 17, 18, 19]),
        ("latest", [0, 1, 19]),
    ],
)
def test_what_is_dropped_when_the_receiver_does_not_release(when_full: str, kept: list[int]) -> None:
    with one_to(1, when_full=when_full) as (tx, rx):
        push(tx, 20)
        assert tx.statistics().dropped == 20 - len(kept)
        taken = take(rx, last=kept[-1])
        push(tx, 1)
        taken += take(rx, last=20)
        assert [seq for seq, _ in taken] == [*kept, 20]
        lost = [seq for seq in range(20) if seq not in kept]
        assert missing(taken) == lost
        assert all(gap is None or gap.reasons == ("when_full",) for _, gap in taken)
        assert rx.statistics().missed == len(lost)
        assert dropped(tx) == lost
        assert tx.take_drops() == []
        tx.flush(timeout=TIMEOUT_S)


@pytest.mark.parametrize("when_full", DROPPING)
def test_what_waits_is_written_although_nobody_calls_the_sender(when_full: str) -> None:
    with one_to(1, when_full=when_full) as (tx, rx):
        push(tx, 20)
        kept = 20 - tx.statistics().dropped
        for _ in range(kept):
            rx.recv(timeout=TIMEOUT_S).release()  # as room comes, the rest is written
        tx.flush(timeout=TIMEOUT_S)


@pytest.mark.parametrize("when_full", DROPPING)
def test_a_receiver_that_holds_its_frames_does_not_delay_another(when_full: str) -> None:
    with one_to(2, when_full=when_full) as (tx, slow, fast):
        held = []
        for number in range(50):
            push(tx, 1)
            assert take(fast, last=number) == [(number, None)]
            if number < SLOTS and when_full != "latest":
                held.append(slow.recv(timeout=TIMEOUT_S))
        assert fast.statistics().missed == 0
        for frame in held:
            assert frame.array.tobytes() == picture(frame.seq).tobytes(), "what is held is not written over"
            frame.release()
        taken = take(slow, last=4 if when_full == "drop_newest" else 49)
        assert 0 < len(taken) <= 2 * SLOTS
        assert {drop.peer for drop in tx.take_drops()} == {slow.name}


STOPPED = """
import sys, rdmaxfer
with rdmaxfer.Receiver(slots=4) as rx:
    rx.connect(sys.argv[1], timeout=60)
    print("ready", flush=True)
    for frame in rx:
        frame.release()
"""


@pytest.mark.parametrize("when_full", DROPPING)
def test_a_receiver_that_is_stopped_does_not_delay_another(when_full: str) -> None:
    with one_to(1, when_full=when_full, lease_s=2.0) as (tx, rx):
        victim = spawn(STOPPED, tx._servers[0].endpoint)
        try:
            assert victim.stdout is not None
            assert victim.stdout.readline() == "ready\n"
            tx.wait_for_peers(2, timeout=TIMEOUT_S)
            os.kill(victim.pid, signal.SIGSTOP)
            waits = tx.statistics().waits
            end_s = time.monotonic() + 3.0  # beyond the lease
            number = 0
            while time.monotonic() < end_s:
                push(tx, 1)
                assert take(rx, last=number) == [(number, None)]
                number += 1
            assert tx.statistics().waits == waits
            assert tx.statistics().dropped > 0
        finally:
            os.kill(victim.pid, signal.SIGCONT)
            victim.kill()
            victim.communicate()
        with contextlib.suppress(rdmaxfer.PeerLost):
            tx.close(timeout=0.5)


def test_a_policy_belongs_to_its_connection() -> None:
    with (
        rdmaxfer.Receiver(slots=SLOTS) as patient,
        rdmaxfer.Receiver(slots=SLOTS) as hasty,
        rdmaxfer.Sender(slots=SLOTS) as tx,
    ):
        tx.connect(patient.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        tx.connect(hasty.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S, when_full="latest")
        pushing = Background(lambda: push(tx, 40))
        assert [seq for seq, _ in take(patient, last=39)] == list(range(40))
        pushing.result()
        taken = take(hasty, last=39)
        assert len(taken) < 40
        assert sorted([seq for seq, _ in taken] + missing(taken)) == list(range(40))


def test_nobody_listens_and_nobody_is_waited_for() -> None:
    with rdmaxfer.Sender() as tx, rdmaxfer.Receiver() as rx:
        endpoint = tx.bind("tcp://127.0.0.1:*", when_full="latest")
        push(tx, 3)
        assert tx.statistics().unheard == 3
        rx.connect(endpoint, timeout=TIMEOUT_S)
        tx.wait_for_peers(1, timeout=TIMEOUT_S)
        push(tx, 1)
        assert take(rx, last=3) == [(3, None)], "who comes late misses nothing"
        tx.bind("tcp://127.0.0.1:*")
        rx.close()
        with contextlib.suppress(rdmaxfer.PeerLost):
            wait_until(lambda: tx.statistics().peers == 0 or not tx.push(picture(0), timeout=1), "it left")
        with pytest.raises(rdmaxfer.TimeoutExpired):
            tx.push(picture(4), timeout=0.1)


@pytest.mark.parametrize("when_full", DROPPING)
def test_slots_grow_under_every_policy(when_full: str) -> None:
    with one_to(1, when_full=when_full) as (tx, rx):
        large = np.arange(1 << 16, dtype=np.uint32)
        seq = tx.push(large, timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.seq == seq
            assert frame.array.tobytes() == large.tobytes()


def test_balanced_frames_go_to_one_receiver_each() -> None:
    with one_to(3, distribute="balance") as (tx, *receivers):
        push(tx, 3 * SLOTS)  # nobody takes any yet: as many for each as it has room for
        taking = [Background(lambda rx=rx: list(_until_end(rx))) for rx in receivers]
        push(tx, 200 - 3 * SLOTS)
        tx.flush(timeout=TIMEOUT_S)
        tx.close()
        shares = [each.result() for each in taking]
        assert sorted(seq for share in shares for seq, _ in share) == list(range(200))
        for share in shares:
            assert [seq for seq, _ in share] == sorted(seq for seq, _ in share)
            assert len([seq for seq, _ in share if seq < 3 * SLOTS]) == SLOTS
            gaps = [gap for _, gap in share if gap is not None]
            assert all(gap.reasons == ("elsewhere",) for gap in gaps)


def _until_end(rx: rdmaxfer.Receiver) -> Iterator[tuple[int, rdmaxfer.Gap | None]]:
    for frame in rx:
        with frame:
            assert frame.array.tobytes() == picture(frame.seq).tobytes()
            yield frame.seq, frame.gap


def test_a_slow_receiver_gets_fewer_of_balanced_frames() -> None:
    with one_to(2, distribute="balance") as (tx, slow, fast):
        taking = Background(lambda: list(_until_end(fast)))
        held = [slow.recv(timeout=TIMEOUT_S) for _ in range(SLOTS) if push(tx, 8) is None]
        push(tx, 50)
        assert len(held) == SLOTS
        for frame in held:
            frame.release()
        tx.flush(timeout=TIMEOUT_S)
        tx.close()
        share = taking.result()
        assert sorted([seq for seq, _ in share] + [frame.seq for frame in held]) == list(range(82))


def test_what_waits_when_the_sender_is_closed_is_told() -> None:
    with one_to(1, when_full="drop_oldest") as (tx, rx):
        push(tx, SLOTS + 2)
        with pytest.raises(rdmaxfer.PeerLost, match="no room for the last 2 frames") as caught:
            tx.close(timeout=0.5)
        assert caught.value.unreleased == (SLOTS, SLOTS + 1)
        assert [seq for seq, _ in take(rx, last=SLOTS - 1)] == list(range(SLOTS))


def test_policies_that_are_none() -> None:
    with rdmaxfer.Sender() as tx:
        for call in (tx.bind, tx.connect):
            with pytest.raises(ValueError, match="when_full is one of 'block'"):
                call("tcp://127.0.0.1:7471", when_full="drop")
    with pytest.raises(ValueError, match="distribute"):
        rdmaxfer.Sender(distribute="some")  # type: ignore[arg-type]
