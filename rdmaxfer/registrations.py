"""Memory of the user's that a sender may read from where it lies: what `register` was called for, and arrays that were pushed with
`copy=False`, which stay registered as long as they exist, so that the next push of them finds them registered.

Registering takes longer than copying: a cache is what makes `copy=False` worth anything. It must never take new memory at an old
address for the old: so it knows arrays by identity, and numpy tells, by a weak reference, when one is gone. numpy refuses to
resize an array that has weak references.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rdmaxfer.outgoing import MAX_PIECES, Piece
from rdmaxfer.staging import Registration, Source, UserMemory, bounds

if TYPE_CHECKING:
    from rdmaxfer.payload import Payload
    from rdmaxfer.staging import Holder

MAX_KEPT: Final = 64
"""Arrays that stay registered because they were pushed with `copy=False`."""


class _Kept(UserMemory):
    """The memory of an array that was pushed."""

    __slots__ = ("root",)

    def __init__(self, root: np.ndarray[Any, Any], gone: Callable[[weakref.ref[Any]], object]) -> None:
        low, high = bounds(root)
        super().__init__(low, high - low, None)  # the frames keep the array; this must not
        self.root = weakref.ref(root, gone)


class Registrations:
    """See the module. With the sender's lock held; `in_use` says which memory frames on their way have."""

    def __init__(self, in_use: Callable[[], set[Source]]) -> None:
        self._in_use = in_use
        self._lasting: list[Registration] = []
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        """By the id of the array that they are all of; latest used last."""
        self._gone: list[weakref.ref[Any]] = []
        self._left: list[_Kept] = []
        """Out of the cache, but perhaps still in use."""

    def __bool__(self) -> bool:
        return bool(self._lasting)

    def __contains__(self, registration: Registration) -> bool:
        return registration in self._lasting

    @property
    def kept(self) -> int:
        """How many arrays are registered for the next push of them."""
        return len(self._kept)

    def add(self, registration: Registration) -> None:
        self._lasting.append(registration)

    def remove(self, registration: Registration) -> None:
        """Unregister it. Nobody may hold it any more."""
        self._lasting.remove(registration)
        registration.unregister()

    def pieces(self, payload: Payload, *, keep: bool, gather: bool) -> tuple[Piece, ...] | None:
        """The registered memory that all of `payload` lies in, in order; `keep`: register what is not. None if it has to be copied,
        as also if it is in several pieces that nobody would `gather`."""
        found: list[Piece] = []
        for part in payload.parts:
            if not part.flags.c_contiguous or not part.nbytes:
                return None
            address, nbytes = int(part.__array_interface__["data"][0]), part.nbytes
            source = self._find(address, nbytes)
            if source is None and keep:
                source = self._keep(part)
            if source is None:
                return None
            last = found[-1] if found else None
            if last is not None and last.source is source and last.address + last.nbytes == address:
                found[-1] = last._replace(nbytes=last.nbytes + nbytes)
            elif len(found) == (MAX_PIECES if gather else 1):
                return None
            else:
                found.append(Piece(source, address, nbytes))
        return tuple(found)

    def _find(self, address: int, nbytes: int) -> UserMemory | None:
        # No generator that is left before its end: Ctrl-C in its clean-up would be lost.
        for each in self._lasting:
            if each.covers(address, nbytes):
                return each
        return None

    def _keep(self, part: np.ndarray[Any, Any]) -> UserMemory:
        self._sweep()
        root = part
        while isinstance(root.base, np.ndarray):
            root = root.base
        kept = self._kept.get(id(root))
        if kept is not None and kept.root() is root:
            self._kept.move_to_end(id(root))
            return kept
        if kept is not None:
            self._left.append(kept)
        kept = self._kept[id(root)] = _Kept(root, self._gone.append)
        if len(self._kept) > MAX_KEPT:
            self._left.append(self._kept.popitem(last=False)[1])
        return kept

    def _sweep(self) -> None:
        """Unregister what nobody will push again, unless it is still on its way."""
        if self._gone:
            self._gone.clear()
            for key, kept in list(self._kept.items()):
                if kept.root() is None:
                    self._left.append(self._kept.pop(key))
        if self._left:
            used = self._in_use()
            for kept in list(self._left):
                if kept not in used and not kept.awaited:
                    self._left.remove(kept)
                    kept.unregister()

    def clear(self) -> None:
        """Unregister everything. Nobody may hold any of it."""
        for source in [*self._lasting, *self._kept.values(), *self._left]:
            source.unregister()
        self._lasting.clear()
        self._kept.clear()
        self._left.clear()


def hold(pieces: tuple[Piece, ...], holder: Holder) -> None:
    """Keep them registered as long as `holder` is there."""
    for piece in pieces:
        if isinstance(piece.source, UserMemory):
            piece.source.hold(holder)


def let_go(pieces: tuple[Piece, ...], holder: Holder) -> None:
    """The end of that, unless there is a frame by now."""
    for piece in pieces:
        if isinstance(piece.source, UserMemory):
            piece.source.let_go(holder)


__all__ = ["MAX_KEPT", "Registrations", "hold", "let_go"]
