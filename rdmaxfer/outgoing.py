"""A frame on its way out, as all receivers share it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdmaxfer.frame import FrameType
    from rdmaxfer.staging import Holder, Source


class Outgoing:
    """Whoever has this has the frame's memory: it is reused when the last reference to `holder` is gone."""

    __slots__ = ("address", "captured_ns", "holder", "kind", "metadata", "payload_bytes", "pushed_ns", "seq", "source")

    def __init__(
        self,
        kind: FrameType,
        source: Source,
        address: int,
        holder: Holder,
        *,
        seq: int,
        captured_ns: int,
        pushed_ns: int,
        metadata: bytes,
    ) -> None:
        self.kind = kind
        self.payload_bytes = kind.payload_bytes
        self.source = source
        self.address = address
        self.holder = holder
        holder.sent = True
        self.seq = seq
        self.captured_ns = captured_ns
        self.pushed_ns = pushed_ns
        self.metadata = metadata

    def __repr__(self) -> str:
        return f"<Outgoing seq={self.seq} {self.kind}>"
