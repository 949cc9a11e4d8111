"""What travels on the queue pair besides frames: 32-bit immediates and 16-byte messages.

Pure. Two formats, one for each direction:

sender -> receiver, the immediate of a WRITE_WITH_IMM:

    bits 31..30  kind: CREDIT_WANTED, FRAME, RESIZE_WANTED, BYE
    FRAME          bits 29..24 the ring's epoch mod 64; 23..16 header length in units of 64 bytes; 15..0 slot
    RESIZE_WANTED  bits 23..0  payload bytes wanted in a slot, in units of 4096
    CREDIT_WANTED  the rest is 1: the sender waits in `flush`, tell it of every slot released, at once
    BYE            the rest is 0

receiver -> sender, the payload of an inline SEND, little-endian: kind (1 byte), 7 zero bytes, value (8 bytes):

    CREDIT          value: slots released since the connection began (absolute, so that a repeated one is harmless)
    BYE             value: the same count
    RESIZE_REFUSED  value: the largest payload the receiver accepts, in bytes
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from rdmaxfer.errors import LocalProtocolError, RemoteProtocolError

EPOCH_BITS = 6
EPOCH_MODULUS = 1 << EPOCH_BITS
HEADER_UNIT = 64
RESIZE_UNIT = 4096
MAX_SLOTS = 1 << 16

MESSAGE_BYTES = 16
_MESSAGE = struct.Struct("<B7xQ")


class ImmKind(enum.IntEnum):
    CREDIT_WANTED = 0
    FRAME = 1
    RESIZE_WANTED = 2
    BYE = 3


class MessageKind(enum.IntEnum):
    CREDIT = 1
    BYE = 2
    RESIZE_REFUSED = 3


class Imm(NamedTuple):
    """A decoded immediate. Fields that the kind does not have are 0."""

    kind: ImmKind
    epoch: int = 0
    header_bytes: int = 0
    slot: int = 0
    wanted_bytes: int = 0


class Message(NamedTuple):
    kind: MessageKind
    value: int


def pack_frame_imm(epoch: int, header_bytes: int, slot: int) -> int:
    return (ImmKind.FRAME << 30) | ((epoch % EPOCH_MODULUS) << 24) | ((header_bytes // HEADER_UNIT) << 16) | slot


def pack_resize_imm(wanted_bytes: int) -> int:
    units = -(-wanted_bytes // RESIZE_UNIT)
    if units >= 1 << 24:
        raise LocalProtocolError(f"a slot of {wanted_bytes} bytes is above what an immediate can ask for (64 GiB)")
    return (ImmKind.RESIZE_WANTED << 30) | units


def pack_credit_imm() -> int:
    return (ImmKind.CREDIT_WANTED << 30) | 1


def pack_bye_imm() -> int:
    return ImmKind.BYE << 30


def unpack_imm(imm: int) -> Imm:
    """Decode a peer's immediate. Raises RemoteProtocolError if it is none of ours."""
    kind = imm >> 30
    if kind == ImmKind.FRAME:
        return Imm(ImmKind.FRAME, (imm >> 24) & 0x3F, ((imm >> 16) & 0xFF) * HEADER_UNIT, imm & 0xFFFF)
    if kind == ImmKind.RESIZE_WANTED and not imm & 0x3F000000:
        return Imm(ImmKind.RESIZE_WANTED, wanted_bytes=(imm & 0xFFFFFF) * RESIZE_UNIT)
    if kind == ImmKind.BYE and not imm & 0x3FFFFFFF:
        return Imm(ImmKind.BYE)
    if imm == pack_credit_imm():
        return Imm(ImmKind.CREDIT_WANTED)
    raise RemoteProtocolError(f"the peer sent an immediate of no known kind: {imm:#010x}")


def pack_message(kind: MessageKind, value: int) -> bytes:
    return _MESSAGE.pack(kind, value)


def unpack_message(data: bytes) -> Message:
    """Decode a peer's in-band message. Raises RemoteProtocolError if it is none of ours."""
    if len(data) != MESSAGE_BYTES:
        raise RemoteProtocolError(f"the peer sent an in-band message of {len(data)} bytes, not {MESSAGE_BYTES}")
    kind, value = _MESSAGE.unpack(data)
    try:
        return Message(MessageKind(kind), value)
    except ValueError:
        raise RemoteProtocolError(f"the peer sent an in-band message of unknown kind {kind}") from None
