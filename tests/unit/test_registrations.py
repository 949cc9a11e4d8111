"""What memory of the user's a frame may be sent from, and how long it stays registered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rdmaxfer.errors import FrameError
from rdmaxfer.outgoing import MAX_PIECES, Piece
from rdmaxfer.payload import payload_of
from rdmaxfer.registrations import MAX_KEPT, Registrations, hold, let_go
from rdmaxfer.staging import Holder, Registration, Source


class CountingDomain:
    """Counts regions; they are no memory regions of verbs."""

    def __init__(self) -> None:
        self.open = 0

    def register_memory(self, address: int, nbytes: int, keepalive: object, *, remote_write: bool) -> Any:
        self.open += 1
        return CountingRegion(self)


class CountingRegion:
    lkey = 1

    def __init__(self, domain: CountingDomain) -> None:
        self.domain = domain

    def close(self) -> None:
        self.domain.open -= 1


class Kit:
    def __init__(self) -> None:
        self.used: set[Source] = set()
        self.domain: Any = CountingDomain()
        self.registrations = Registrations(lambda: self.used)

    def pieces(self, array: Any, *, keep: bool = False, gather: bool = True) -> tuple[Piece, ...] | None:
        found = self.registrations.pieces(payload_of(array), keep=keep, gather=gather)
        for piece in found or ():
            piece.source.lkey(self.domain)
        return found

    def register(self, array: np.ndarray[Any, Any]) -> Registration:
        registration = Registration(array, lambda _: None)
        self.registrations.add(registration)
        return registration


def test_a_list_of_arrays_is_the_frame_that_numpy_makes_of_it() -> None:
    parts = [np.arange(6, dtype=np.int16).reshape(2, 3) + 10 * n for n in range(3)]
    for given in (parts, tuple(parts), [part[:, ::-1] for part in parts], [np.array(2.5)] * 2):
        payload = payload_of(given)
        stacked = np.stack(given)
        assert (payload.kind.shape, payload.kind.dtype) == (stacked.shape, stacked.dtype)
        assert len(payload.parts) == len(given)
    assert payload_of([np.zeros(2, np.uint8), np.zeros(2, np.float32)]).kind.dtype == np.float32
    assert payload_of([1, 2, 3]).kind.shape == (3,)
    assert payload_of([]).kind.shape == (0,)
    with pytest.raises(FrameError, match=r"number 1 \(from 0\) has \(3,\).*push_many"):
        payload_of([np.zeros(2), np.zeros(3)])


def test_pieces_are_in_order_and_what_is_adjacent_is_one() -> None:
    kit = Kit()
    ring, other = np.zeros((8, 100), np.uint8), np.zeros((4, 100), np.uint8)
    first, second = kit.register(ring), kit.register(other)
    at, there = first.address, second.address
    assert kit.pieces(ring) == (Piece(first, at, 800),)
    assert kit.pieces([ring[0], ring[1], ring[3]]) == (Piece(first, at, 200), Piece(first, at + 300, 100))
    assert kit.pieces([ring[1], ring[0]]) == (Piece(first, at + 100, 100), Piece(first, at, 100))
    assert kit.pieces([other[2], ring[0]]) == (Piece(second, there + 200, 100), Piece(first, at, 100))
    assert kit.pieces([ring[0], ring[2]], gather=False) is None
    assert kit.pieces([ring[0], ring[1]], gather=False) == (Piece(first, at, 200),)


def test_what_lies_otherwise_is_copied() -> None:
    kit = Kit()
    ring = np.zeros((4 * MAX_PIECES, 100), np.uint8)
    kit.register(ring)
    assert kit.pieces([ring[2 * n] for n in range(MAX_PIECES)]) is not None
    assert kit.pieces([ring[2 * n] for n in range(MAX_PIECES + 1)]) is None
    for array in (ring[:, ::2], ring.T, ring[:0], np.zeros(3), [ring[0], np.zeros(100, np.uint8)]):
        assert kit.pieces(array) is None
    assert kit.pieces(ring[:, ::2], keep=True) is None


def test_an_array_stays_registered_as_long_as_it_exists() -> None:
    kit = Kit()
    array = np.zeros(100, np.uint8)
    (piece,) = kit.pieces(array, keep=True) or ()
    for view in (array, array[10:], array.reshape(10, 10)[3:4], array.view(np.int32)):
        (again,) = kit.pieces(view, keep=True) or ()
        assert again.source is piece.source
    assert kit.domain.open == 1
    del array, view
    other = np.zeros(50, np.uint8)
    kit.pieces(other, keep=True)
    assert (kit.registrations.kept, kit.domain.open) == (1, 1)
    kit.registrations.clear()
    assert kit.domain.open == 0


def test_memory_of_frames_on_their_way_stays_registered() -> None:
    kit = Kit()
    array, other = np.zeros(100, np.uint8), np.zeros(100, np.uint8)
    pieces = kit.pieces(array, keep=True)
    assert pieces is not None
    kit.used = {pieces[0].source}
    del array
    kit.pieces(other, keep=True)
    assert kit.domain.open == 2
    kit.used = set()
    holder = Holder()
    hold(pieces, holder)  # not a frame yet, but about to be one
    kit.pieces(other, keep=True)
    assert kit.domain.open == 2
    let_go(pieces, holder)
    kit.pieces(other, keep=True)
    assert kit.domain.open == 1


def test_another_array_at_the_same_address_is_another_one() -> None:
    kit = Kit()
    seen = set()
    for nbytes in range(100_000, 101_000):
        array = np.zeros(nbytes, np.uint8)
        seen.add(id(array))
        (piece,) = kit.pieces(array, keep=True) or ()
        assert (piece.address, piece.source.nbytes) == (array.__array_interface__["data"][0], nbytes)
        assert kit.registrations.kept <= 2
    assert len(seen) < 1000, "no identity came twice, so this test has shown nothing"
    assert kit.domain.open <= 2


def test_the_least_recently_used_make_room() -> None:
    kit = Kit()
    arrays = [np.zeros(10, np.uint8) for _ in range(MAX_KEPT + 1)]
    sources = [(kit.pieces(array, keep=True) or ())[0].source for array in arrays[:-1]]
    assert (kit.pieces(arrays[0], keep=True) or ())[0].source is sources[0]
    kit.pieces(arrays[-1], keep=True)
    assert (kit.pieces(arrays[0], keep=True) or ())[0].source is sources[0]
    assert (kit.pieces(arrays[1], keep=True) or ())[0].source is not sources[1]
    kit.pieces(arrays[0], keep=True)
    assert (kit.registrations.kept, kit.domain.open) == (MAX_KEPT, MAX_KEPT)
