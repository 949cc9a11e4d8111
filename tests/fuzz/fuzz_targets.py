"""What decodes bytes of a peer, and the rules that hold whatever the bytes: each target takes any bytes, and raises
AssertionError, or what the code under test raised, if one is broken."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import fuzz_examples as examples
import fuzz_mutate as mutate
import fuzz_sessions as sessions
import numpy as np
from fuzz_choices import Choices

from rdmaxfer import inband
from rdmaxfer.cm import messages as m
from rdmaxfer.errors import RemoteProtocolError
from rdmaxfer.frame import FrameType, decode_metadata, encode_metadata, frame_type, unpack


def message(data: bytes) -> int:
    """decode: RemoteProtocolError, or a message that encodes again to what decodes equal."""
    key = m.peek(data)
    try:
        found = m.decode(data)
    except RemoteProtocolError:
        return 1
    assert key == (found.session, found.request) or (type(found) is m.Refuse and found.request == 0)
    again = m.encode(found)
    assert len(again) <= m.MAX_MESSAGE_BYTES
    assert m.decode(again) == found
    return 1


MEMORY = bytearray(examples.SLOT_BYTES)
NUMBERS = set(inspect.signature(FrameType.pack_into).parameters) - {"self", "buffer", "end", "metadata"}


def header(data: bytes) -> int:
    """unpack: RemoteProtocolError, or a header whose frame fits its slot, that numpy can view, and that packs to an equal one."""
    try:
        found = unpack(data, **examples.WHERE, slot_bytes=examples.SLOT_BYTES)
    except RemoteProtocolError:
        return 1
    assert found.header_bytes == len(data)
    assert not found.dtype.hasobject
    assert 0 <= found.payload_bytes <= examples.SLOT_BYTES
    view: np.ndarray[Any, Any] = np.ndarray(found.shape, found.dtype, memoryview(MEMORY)[: found.payload_bytes])
    assert (view.shape, view.dtype, view.nbytes) == (found.shape, found.dtype, found.payload_bytes)
    assert view.tobytes() == MEMORY[: found.payload_bytes]
    room = bytearray(8192)
    numbers = {name: getattr(found, name) for name in NUMBERS}
    kind = frame_type(found.shape, found.dtype)
    assert (kind.shape, kind.dtype, kind.payload_bytes) == (found.shape, found.dtype, found.payload_bytes)
    size = kind.pack_into(room, 8192, **numbers, metadata=found.metadata)
    again = unpack(bytes(room[-size:]), **examples.WHERE, slot_bytes=examples.SLOT_BYTES)
    assert again._replace(header_bytes=0) == found._replace(header_bytes=0)
    try:
        metadata = decode_metadata(found.metadata)
    except RemoteProtocolError:
        return 1
    assert type(metadata) is dict
    assert all(type(key) is str for key in metadata)
    # As text, because NaN differs from itself.
    assert repr(decode_metadata(encode_metadata(metadata))) == repr(metadata)
    return 1


def in_band(data: bytes) -> int:
    """unpack_imm and unpack_message: RemoteProtocolError, or what packs to the same bits."""
    imm = int.from_bytes(data[:4], "big")
    try:
        found = inband.unpack_imm(imm)
    except RemoteProtocolError:
        pass
    else:
        match found.kind:
            case inband.ImmKind.FRAME:
                assert inband.pack_frame_imm(found.epoch, found.header_bytes, found.slot) == imm
            case inband.ImmKind.RESIZE_WANTED:
                assert inband.pack_resize_imm(found.wanted_bytes) == imm
            case inband.ImmKind.BYE:
                assert inband.pack_bye_imm() == imm
            case inband.ImmKind.CREDIT_WANTED:
                assert inband.pack_credit_imm() == imm
    try:
        told = inband.unpack_message(data)
    except RemoteProtocolError:
        return 1
    assert inband.unpack_message(inband.pack_message(told.kind, told.value)) == told
    return 1


class Target(NamedTuple):
    run: Callable[[bytes], int]
    """Returns how many inputs it was: more than one for those whose bytes are the script of a whole session."""
    make: Callable[[Choices], bytes]
    seeds: list[bytes]
    inputs_a_run: int = 1
    """About."""
    max_bytes: int = 8192


# --- all of them ------------------------------------------------------------------------------------------------------


def script(choose: Choices) -> bytes:
    return choose.some_bytes(choose.pick((20, 200, 2000)))


TARGETS = {
    "message": Target(message, mutate.message, examples.ENCODED),
    "header": Target(header, mutate.header, examples.HEADERS),
    "in_band": Target(
        in_band, mutate.in_band, [*examples.IN_BAND, *(imm.to_bytes(4, "big") for imm in examples.IMMEDIATES)]
    ),
    "server": Target(sessions.server, script, [bytes(range(256))], inputs_a_run=50, max_bytes=1024),
    "client": Target(sessions.client, script, [bytes(range(256))], inputs_a_run=10, max_bytes=1024),
}
