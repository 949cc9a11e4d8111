"""A frame on its way out, as all receivers share it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from rdmaxfer.frame import FrameType
    from rdmaxfer.staging import Holder, Source

MAX_PIECES: Final = 16
"""Pieces of memory that a frame may be gathered from; of more it is made by copying."""


class Piece(NamedTuple):
    """Some registered memory."""

    source: Source
    address: int
    nbytes: int


def whole(source: Source, nbytes: int) -> tuple[Piece, ...]:
    """The first `nbytes` of it, in one piece."""
    return (Piece(source, source.address, nbytes),)


class Outgoing:
    """Whoever has this has the frame's memory: it is reused when the last reference to `holder` is gone."""

    __slots__ = ("captured_ns", "holder", "kind", "metadata", "payload_bytes", "pieces", "pushed_ns", "seq")

    def __init__(
        self,
        kind: FrameType,
        pieces: tuple[Piece, ...],
        holder: Holder,
        *,
        seq: int,
        captured_ns: int,
        pushed_ns: int,
        metadata: bytes,
    ) -> None:
        self.kind = kind
        self.payload_bytes = kind.payload_bytes
        self.pieces = pieces
        """Where the payload lies, in its order; at least one."""
        self.holder = holder
        holder.sent = True
        self.seq = seq
        self.captured_ns = captured_ns
        self.pushed_ns = pushed_ns
        self.metadata = metadata

    def __repr__(self) -> str:
        return f"<Outgoing seq={self.seq} {self.kind}>"
