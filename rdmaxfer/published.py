"""What a C or C++ program says of a frame that it has filled (struct intake_frame, _native/intake.h). Pure."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import msgspec

from rdmaxfer.errors import FrameError, FrameTooLarge
from rdmaxfer.frame import FrameType, encode_metadata, frame_type

FRAME: Final = struct.Struct("=q8QI64sI")


class Published(NamedTuple):
    kind: FrameType
    metadata: bytes
    """As it travels."""
    captured_ns: int


def parse(data: bytes, slot_bytes: int) -> Published:
    """A frame in a slot of `slot_bytes`. Raises FrameError, whatever the bytes are: the program may be broken."""
    if len(data) < FRAME.size:
        raise FrameError("the program published what is no frame.")
    captured_ns, *shape, ndim, name, _ = FRAME.unpack_from(data)
    if ndim > len(shape):
        raise FrameError(f"the program published a frame of {ndim} dimensions.", fix=f"up to {len(shape)}.")
    kind = frame_type(tuple(shape[:ndim]), name.partition(b"\0")[0].decode("ascii", errors="replace"))
    if kind.payload_bytes > slot_bytes:
        raise FrameTooLarge(
            f"{kind} takes {kind.payload_bytes} bytes, and a slot of this intake has {slot_bytes}.",
            fix="sender.intake(..., slot_bytes=...), or smaller frames.",
        )
    return Published(kind, _metadata(data[FRAME.size :]), captured_ns)


def _metadata(text: bytes) -> bytes:
    if not text:
        return b""
    try:
        found = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:  # of msgspec, UTF-8
        raise FrameError(f"the metadata is no JSON: {error}.", fix='a JSON object, such as {"gain": 2}.') from None
    if not isinstance(found, dict):
        raise FrameError("the metadata is no JSON object.", fix='such as {"gain": 2}.')
    return encode_metadata(found)
