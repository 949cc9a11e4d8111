"""Several frames in one call: `push_many` and `recv_many`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, Background, pair, picture

import rdmaxfer

BINDS = pytest.mark.parametrize("bind", ["sender", "receiver"])


def take(rx: rdmaxfer.Receiver, count: int, most: int = 5) -> list[tuple[int, bytes]]:
    taken: list[tuple[int, bytes]] = []
    while len(taken) < count:
        frames = rx.recv_many(min(most, count - len(taken)), timeout=TIMEOUT_S)
        assert 1 <= len(frames) <= most
        for frame in frames:
            taken.append((frame.seq, frame.array.tobytes()))
            frame.release()
    return taken


@BINDS
@pytest.mark.parametrize("slots", [1, 4, 64])
def test_many_come_as_they_would_one_by_one(bind: str, slots: int) -> None:
    arrays: list[Any] = [picture(seed) for seed in range(50)]
    arrays[7] = b"bytes, too"
    arrays[11] = picture(11)[:, ::2]
    arrays[13] = np.float64(3.5)
    arrays[17] = np.zeros((0, 3))
    expected = [(seq, np.ascontiguousarray(each).tobytes() if seq != 7 else each) for seq, each in enumerate(arrays)]
    with pair(bind=bind, sender={"slots": slots}, receiver={"slots": slots}) as (tx, rx):
        pushing = Background(lambda: tx.push_many(arrays, metadata={"a": 1}, captured_ns=5, timeout=TIMEOUT_S))
        assert take(rx, len(arrays)) == expected
        assert pushing.result() == list(range(50))
        assert tx.push(arrays[0], timeout=TIMEOUT_S) == 50
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.metadata == {}
        tx.flush(timeout=TIMEOUT_S)
        assert rx.statistics().leased == 0
        assert rx.statistics().frames == tx.statistics().frames == 51


def test_registered_arrays_and_others_keep_their_order() -> None:
    ring = np.stack([picture(seed) for seed in range(8)])
    mixed = [row if number % 3 else picture(number) for number, row in enumerate(ring)]
    with pair(sender={"slots": 16}, receiver={"slots": 16}) as (tx, rx), tx.register(ring):
        for _ in range(10):
            tx.push_many(mixed, timeout=TIMEOUT_S)
            assert [data for _, data in take(rx, 8)] == [picture(seed).tobytes() for seed in range(8)]
        tx.flush(timeout=TIMEOUT_S)


def test_a_generator_and_nothing_at_all() -> None:
    with pair() as (tx, rx):
        assert tx.push_many([], timeout=0) == []
        assert tx.push_many((picture(seed) for seed in range(3)), timeout=TIMEOUT_S) == [0, 1, 2]
        assert [seq for seq, _ in take(rx, 3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="max_frames is a number of at least 1"):
            rx.recv_many(0)


def test_what_comes_before_an_array_that_cant_be_sent_is_sent() -> None:
    with pair() as (tx, rx):
        with pytest.raises(rdmaxfer.UnsupportedDtype) as caught:
            tx.push_many([picture(0), picture(1), np.array([object()]), picture(3)], timeout=TIMEOUT_S)
        assert caught.value.pushed == (0, 1)
        assert take(rx, 2) == [(seed, picture(seed).tobytes()) for seed in range(2)]
        assert tx.push_many([picture(4)], timeout=TIMEOUT_S) == [2]
        assert take(rx, 1) == [(2, picture(4).tobytes())]
        tx.flush(timeout=TIMEOUT_S)


def test_what_comes_before_a_frame_that_is_too_large_is_sent() -> None:
    with pair(receiver={"max_frame_bytes": 1 << 20}) as (tx, rx):
        with pytest.raises(rdmaxfer.FrameTooLarge) as caught:
            tx.push_many([picture(0), np.zeros(2 << 20, np.uint8)], timeout=TIMEOUT_S)
        assert caught.value.pushed == (0,)
        assert take(rx, 1) == [(0, picture(0).tobytes())]


def test_what_comes_before_an_error_of_the_iterator_is_sent() -> None:
    def arrays() -> Iterator[Any]:
        yield picture(0)
        raise ZeroDivisionError

    with pair() as (tx, rx):
        with pytest.raises(ZeroDivisionError):
            tx.push_many(arrays(), timeout=TIMEOUT_S)
        assert take(rx, 1) == [(0, picture(0).tobytes())]


@pytest.mark.parametrize("registered", [False, True])
def test_a_timeout_says_how_far_it_came(registered: bool) -> None:
    arrays = np.stack([picture(seed) for seed in range(10)])
    with pair(sender={"slots": 4}, receiver={"slots": 4}) as (tx, rx):
        registration = tx.register(arrays) if registered else None
        with pytest.raises(rdmaxfer.TimeoutExpired) as caught:
            tx.push_many(list(arrays), timeout=0.3)
        assert caught.value.pushed == (0, 1, 2, 3)
        assert take(rx, 4) == [(seed, picture(seed).tobytes()) for seed in range(4)]
        pushing = Background(lambda: tx.push_many(list(arrays[4:]), timeout=TIMEOUT_S))
        assert take(rx, 6) == [(seed, picture(seed).tobytes()) for seed in range(4, 10)]
        assert pushing.result() == list(range(4, 10))
        tx.flush(timeout=TIMEOUT_S)
        if registration is not None:
            registration.close()


def test_many_to_several_receivers() -> None:
    with rdmaxfer.Sender(slots=8) as tx, rdmaxfer.Receiver(slots=8) as one, rdmaxfer.Receiver(slots=4) as other:
        endpoint = tx.bind("tcp://127.0.0.1:*")
        for rx in (one, other):
            rx.connect(endpoint, timeout=TIMEOUT_S)
        tx.wait_for_peers(2, timeout=TIMEOUT_S)
        pushing = Background(lambda: tx.push_many([picture(seed) for seed in range(20)], timeout=TIMEOUT_S))
        taking = Background(lambda: take(other, 20))
        expected = [(seed, picture(seed).tobytes()) for seed in range(20)]
        assert take(one, 20) == expected
        assert taking.result() == expected
        pushing.result()
        tx.flush(timeout=TIMEOUT_S)


def test_copies_are_given_out_many_at_once() -> None:
    with pair(receiver={"copy": True, "slots": 4}, sender={"slots": 4}) as (tx, rx):
        tx.push_many([picture(seed) for seed in range(4)], timeout=TIMEOUT_S)
        frames: list[rdmaxfer.Frame] = []
        while len(frames) < 4:
            frames += rx.recv_many(4, timeout=TIMEOUT_S)
        tx.push_many([picture(9)] * 4, timeout=TIMEOUT_S)  # there is room: the slots were given back
        assert [frame.array.tobytes() for frame in frames] == [picture(seed).tobytes() for seed in range(4)]
