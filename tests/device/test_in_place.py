"""Frames from memory of the user's: several arrays as one frame, and arrays that are pushed again with `copy=False`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import FABRIC, TIMEOUT_S, Background, pair, picture

import rdmaxfer

IN_PLACE = FABRIC != "shm"
"""Whether memory of the user's can be sent from. (Other processes can't read it.)"""
GATHERS = FABRIC == "verbs"


def take(rx: rdmaxfer.Receiver) -> np.ndarray[Any, Any]:
    with rx.recv(timeout=TIMEOUT_S) as frame:
        return frame.array.copy()


@pytest.mark.parametrize("bind", ["sender", "receiver"])
def test_several_arrays_are_one_frame(bind: str) -> None:
    ring = np.stack([picture(seed) for seed in range(8)])
    others = [picture(seed) for seed in range(8, 12)]
    picks: list[list[int]] = [[0], [0, 1, 2], [5, 3, 7, 1], [0, 2, 4, 6, 1, 3, 5, 7]]
    with pair(bind=bind) as (tx, rx), tx.register(ring):
        copied = 0
        for number in range(40):
            pick = picks[number % len(picks)]
            tx.push([ring[each] for each in pick], timeout=TIMEOUT_S)
            copied += not (GATHERS or (IN_PLACE and len(pick) in (1, 3)))
            assert np.array_equal(take(rx), ring[pick])
        tx.flush(timeout=TIMEOUT_S)
        assert tx.statistics().copied == copied
        tx.push((*others, ring[0]), timeout=TIMEOUT_S)
        assert np.array_equal(take(rx), np.stack([*others, ring[0]]))
        assert tx.statistics().copied == copied + 1
        tx.push_many([[ring[0], ring[2]], [others[0], ring[1]], ring[3]], timeout=TIMEOUT_S)
        for expected in (ring[[0, 2]], np.stack([others[0], ring[1]]), ring[3]):
            assert np.array_equal(take(rx), expected)


def test_pieces_of_any_size_up_to_sixteen_of_them() -> None:
    with pair(sender={"slots": 4}, receiver={"slots": 4}) as (tx, rx):
        for size in (1, 63, 4096, 4097, 100_000):
            ring = np.random.default_rng(size).integers(0, 256, (40, size), dtype=np.uint8)
            with tx.register(ring):
                pushing = Background(
                    lambda ring=ring: [tx.push(list(ring[0:36:n]), timeout=TIMEOUT_S) for n in (1, 2, 3, 4)]
                )
                for step in (1, 2, 3, 4):
                    assert np.array_equal(take(rx), ring[0:36:step])
                pushing.result()
                tx.flush(timeout=TIMEOUT_S)
        if GATHERS:
            assert tx.statistics().copied == 5, "only those of 18 pieces"


def test_pieces_that_are_longer_than_a_message_may_be() -> None:
    big = np.random.default_rng(1).integers(
        0, 1 << 62, (3, 9 << 17), dtype=np.int64
    )  # 9 MiB each; Soft-RoCE takes 8 at once
    with pair(sender={"slots": 2}, receiver={"slots": 2}) as (tx, rx), tx.register(big):
        pushing = Background(lambda: tx.push([big[2], big[0]], timeout=TIMEOUT_S))
        assert np.array_equal(take(rx), big[[2, 0]])
        pushing.result()
        tx.flush(timeout=TIMEOUT_S)


def test_arrays_that_stay_as_they_are_need_not_be_copied() -> None:
    arrays = [picture(seed) for seed in range(3)]
    with pair() as (tx, rx):
        for _ in range(5):
            for array in arrays:
                tx.push(array, copy=False, timeout=TIMEOUT_S)
                assert np.array_equal(take(rx), array)
            tx.push_many([arrays[0], arrays[1:]], copy=False, timeout=TIMEOUT_S)
            assert np.array_equal(take(rx), arrays[0])
            assert np.array_equal(take(rx), np.stack(arrays[1:]))
        tx.flush(timeout=TIMEOUT_S)
        frames, gathered = 25, 5
        assert tx.statistics().copied == (frames if not IN_PLACE else gathered if not GATHERS else 0)
        assert tx.push(arrays[0][:, ::2], copy=False, timeout=TIMEOUT_S) == frames
        assert np.array_equal(take(rx), arrays[0][:, ::2])


def test_arrays_may_be_forgotten_at_once_and_new_ones_take_their_place() -> None:
    """The sender keeps them until they have gone out; and what was registered of them is not taken for the next ones'."""
    with pair(sender={"slots": 4}, receiver={"slots": 4}) as (tx, rx):

        def push() -> None:
            for number in range(300):
                tx.push(np.full(300_000 + number % 3, number % 251, np.uint8), copy=False, timeout=TIMEOUT_S)

        pushing = Background(push)
        for number in range(300):
            array = take(rx)
            assert (array.shape, set(np.unique(array))) == ((300_000 + number % 3,), {number % 251})
        pushing.result()
        tx.flush(timeout=TIMEOUT_S)


def test_who_gives_arrays_may_wait_until_they_may_be_used_again() -> None:
    """push_many takes a few arrays before it sends the first: a flush, or the end of a registration, sends them."""
    with pair() as (tx, rx):
        buffer = np.zeros(1000, np.uint8)

        def arrays() -> Any:
            with tx.register(buffer):
                for number in range(5):
                    buffer[:] = number
                    yield buffer
                    tx.flush(timeout=TIMEOUT_S)
                buffer[:] = 5
                yield buffer
            buffer[:] = 99

        pushing = Background(lambda: tx.push_many(arrays(), timeout=TIMEOUT_S))
        assert [int(take(rx)[-1]) for _ in range(6)] == [0, 1, 2, 3, 4, 5]
        assert pushing.result() == [0, 1, 2, 3, 4, 5]
