"""The messages of the control plane <-> bytes.

Pure. A message is one ZeroMQ frame: the 7 bytes `RDMAXFR`, one byte with the protocol version, and a msgpack map with
the fields below and `type`. The rules of this file:

- Whatever bytes a peer sends, `decode` returns a message that is safe to use, or raises RemoteProtocolError.
- What `encode` sends is exactly what `decode` accepts: it tries.
- Within one version the maps are closed: a field more, or one less, is an error. Both sides agree on what was said.
- Only `Refuse` is promised to all versions: any peer can read why another does not talk to it. Later versions may add
  fields and codes to it.
- Every message of every version has `session` and `request`, so that even what can't be understood can be answered.
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from rdmaxfer.errors import LocalProtocolError, RemoteProtocolError

PROTOCOL_VERSION = 1
MAGIC = b"RDMAXFR"
PREFIX_BYTES = 8
MAX_MESSAGE_BYTES = 65536

SESSION_BYTES = 16
NODE_BYTES = 16
NO_SESSION = bytes(SESSION_BYTES)
"""The session of a refusal that answers something whose session could not be read."""

TCP_KEY_BYTES = 16
SHM_KEY_BYTES = 16
HOST_BYTES = 16
MAX_TEXT_CHARS = 1024
MAX_NAME_CHARS = 128
MAX_FABRICS = 8
MAX_QUEUE_PAIRS = 8
MAX_SLOTS = 1 << 16
MAX_SLOT_BYTES = 0xFF_FFFF * 4096
"""The most that the in-band RESIZE_WANTED can ask for."""
MAX_LEASE_S = 86400.0
MIN_LEASE_S = 0.05
MAX_RECONNECT_S = 86400.0
NO_MTU = 0
NO_MAX_MSG_SZ = (1 << 32) - 1
"""What ACCEPT says for a fabric without them."""
PATH_MTUS = (256, 512, 1024, 2048, 4096)
ADDRESS_END = 1 << 64

End: TypeAlias = Literal["goodbye", "broken", "lost"]
Role: TypeAlias = Literal["sender", "receiver"]

SessionId: TypeAlias = Annotated[bytes, Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
_Request: TypeAlias = Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]
_Text: TypeAlias = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]
_Name: TypeAlias = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
_U16: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 16) - 1)]
_U24: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 24) - 1)]
_U32: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
_Id: TypeAlias = Annotated[bytes, Meta(min_length=NODE_BYTES, max_length=NODE_BYTES)]
_Position: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
# msgpack has no integers above 64 bits, and msgspec no bounds above 63.
_U64: TypeAlias = Annotated[int, Meta(ge=0)]
_Slots: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_SLOTS)]
_SlotBytes: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_SLOT_BYTES)]
_SlotWish: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_SLOT_BYTES)]
_Lease: TypeAlias = Annotated[float, Meta(ge=MIN_LEASE_S, le=MAX_LEASE_S)]
_MaxMsgSz: TypeAlias = Annotated[int, Meta(ge=256, le=(1 << 32) - 1)]


class RefuseCode(str, enum.Enum):
    """Why a request is refused; docs/protocol.md has the meaning and the fix of each."""

    VERSION = "version"
    ROLE = "role"
    FABRIC = "fabric"
    MTU = "mtu"
    LIMIT = "limit"
    FRAME_TOO_LARGE = "frame_too_large"
    UNKNOWN_SESSION = "unknown_session"
    MALFORMED = "malformed"
    BUSY = "busy"
    CLOSING = "closing"
    REPLACED = "replaced"
    INTERNAL = "internal"


class QueuePair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Its number, and the PSN of the first packet it sends."""

    qp_num: _U24
    psn: _U24


class VerbsAddress(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="verbs"
):
    """The queue pairs of one end, and how to reach them. `active_mtu` and `max_msg_sz` are in bytes."""

    device: _Name
    gid: Annotated[bytes, Meta(min_length=16, max_length=16)]
    lid: _U16
    queue_pairs: Annotated[tuple[QueuePair, ...], Meta(min_length=1, max_length=MAX_QUEUE_PAIRS)]
    link_layer: Literal["ethernet", "infiniband"]
    active_mtu: int
    max_msg_sz: _MaxMsgSz


class TcpAddress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="tcp"):
    """Where the bound side listens for frames, on the host of the control plane, and what to say there first; from the connecting
    side, which has nothing to tell, port 0 and any key."""

    port: _U16
    key: Annotated[bytes, Meta(min_length=TCP_KEY_BYTES, max_length=TCP_KEY_BYTES)]


class ShmAddress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="shm"):
    """Which user of which machine this is (`host`, a hash), and, from the bound side, the key of the socket where it takes
    memory; from the connecting side, any key."""

    host: Annotated[bytes, Meta(min_length=HOST_BYTES, max_length=HOST_BYTES)]
    key: Annotated[bytes, Meta(min_length=SHM_KEY_BYTES, max_length=SHM_KEY_BYTES)]


Fabric: TypeAlias = VerbsAddress | TcpAddress | ShmAddress
"""A way to move frames."""


class RingAddress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A receiver's memory. Slot `i` begins at `address + i * slot_stride`, its payload `payload_offset` bytes later."""

    address: _U64
    rkey: _U32
    slots: _Slots
    slot_bytes: _SlotBytes
    slot_stride: Annotated[int, Meta(ge=1, le=1 << 40)]
    payload_offset: Annotated[int, Meta(ge=0, le=1 << 30)]
    epoch: _U32


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a stream is: frames that the receiver has released and received, without a gap from its beginning."""

    released: _Position
    received: _Position


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    session: SessionId
    request: _Request


class Hello(_Message, frozen=True, tag="hello"):
    """The connecting side asks for a connection. `slots` and `slot_bytes` are wishes, `slot_bytes` 0 is none.

    `node` stands for the object that asks, `stream` for the frames between it and its peer, over however many connections;
    `attempt` grows, so that a HELLO which comes late is known as such. A
    receiver with an `identity` is the successor of any other with the same one. `resume` is there when `stream` is to go on: a
    receiver says what it has, a sender from where it kept frames (`released`) and what it has written (`received`). For
    `reconnect_s` seconds this side will try to come back if the connection breaks."""

    role: Role
    node: _Id
    stream: _Id
    attempt: _Request
    identity: _Name
    resume: Progress | None
    fabrics: Annotated[tuple[Fabric, ...], Meta(min_length=1, max_length=MAX_FABRICS)]
    slots: _Slots
    slot_bytes: _SlotWish
    max_slot_bytes: _SlotBytes
    lease_s: _Lease
    reconnect_s: Annotated[float, Meta(ge=0, le=MAX_RECONNECT_S)]
    name: _Name


class Accept(_Message, frozen=True, tag="accept"):
    """The bound side agrees. `ring` is there if and only if it is the receiver; `reason` says why this fabric. `start`: from where
    both go on, zeros for a new stream."""

    role: Role
    node: _Id
    start: Progress
    fabric: Fabric
    reason: _Text
    path_mtu: int
    max_msg_sz: _MaxMsgSz
    slots: _Slots
    slot_bytes: _SlotWish
    max_slot_bytes: _SlotBytes
    lease_s: _Lease
    name: _Name
    ring: RingAddress | None


class Ready(_Message, frozen=True, tag="ready"):
    """The connecting side's queue pair is in RTS. `ring` is there if and only if it is the receiver."""

    ring: RingAddress | None


class Started(_Message, frozen=True, tag="started"):
    """The bound side's queue pair is in RTS too: frames may flow."""


class Renew(_Message, frozen=True, tag="renew"):
    """The connecting side is alive."""


class Renewed(_Message, frozen=True, tag="renewed"):
    """The bound side is alive. A bound sender says here, too, what slots it wants (0: those it has), should the receiver not
    poll its queue, where RESIZE_WANTED would tell it sooner."""

    wanted_bytes: _SlotWish


class Resize(_Message, frozen=True, tag="resize"):
    """A connecting sender wants slots of `wanted_bytes` (`ring` is None); a connecting receiver offers such a ring."""

    wanted_bytes: _SlotBytes
    ring: RingAddress | None


class Resized(_Message, frozen=True, tag="resized"):
    """The bound receiver's new ring; None from a bound sender, which has taken note of the one offered."""

    ring: RingAddress | None


class Bye(_Message, frozen=True, tag="bye"):
    """The connecting side leaves: for good ("goodbye"), because the connection broke, for which it may come back ("broken"), or for
    another error, after which it will not ("lost")."""

    end: End
    reason: _Text


class Gone(_Message, frozen=True, tag="gone"):
    """The bound side has ended the session."""


class Refuse(_Message, frozen=True, tag="refuse"):
    """No. `limit` is what would do, where `code` is about a number (slot bytes, sessions, the version), else 0."""

    # NO_SESSION and 0 answer a request that could not be read.
    request: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
    code: RefuseCode
    message: _Text
    fix: _Text
    limit: _U64


Message: TypeAlias = Hello | Accept | Ready | Started | Renew | Renewed | Resize | Resized | Bye | Gone | Refuse


class WrongVersion(RemoteProtocolError):
    """The peer speaks version `version` of the protocol, not ours."""

    def __init__(self, version: int) -> None:
        super().__init__(
            f"the peer speaks version {version} of the protocol, this side speaks version {PROTOCOL_VERSION}.",
            fix="run releases of rdmaxfer on both sides that share a protocol version.",
        )
        self.version = version
        self.message_for_peer = f"version {PROTOCOL_VERSION} of the protocol is spoken here, not version {version}."


class _Envelope(msgspec.Struct, frozen=True):
    session: SessionId
    request: _Request


class _ForeignRefuse(msgspec.Struct, frozen=True, tag_field="type", tag="refuse"):
    session: SessionId
    request: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
    code: Annotated[str, Meta(max_length=64)]
    message: _Text
    fix: _Text
    limit: _U64


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_envelope_decoder = msgspec.msgpack.Decoder(_Envelope)
_foreign_decoder = msgspec.msgpack.Decoder(_ForeignRefuse)

# ValueError: invalid UTF-8, for one. RecursionError: nested too deep. MemoryError: a length that lies.
_DECODE_ERRORS = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError, MemoryError)
_PREFIX = MAGIC + bytes([PROTOCOL_VERSION])


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises LocalProtocolError if it is not one that a peer would accept."""
    try:
        data = _PREFIX + _encoder.encode(message)
        decode(data)
    except (RemoteProtocolError, *_DECODE_ERRORS) as error:
        name = type(message).__name__
        raise LocalProtocolError(f"a {name} that no peer would accept was to be sent: {error}") from error
    return data


def decode(data: bytes) -> Message:
    """The message that a peer's bytes mean. Raises WrongVersion or another RemoteProtocolError."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"the peer sent a message of {len(data)} bytes; the most is {MAX_MESSAGE_BYTES}")
    if len(data) < PREFIX_BYTES or data[: len(MAGIC)] != MAGIC:
        raise RemoteProtocolError(
            "the peer sent something that is no message of rdmaxfer.",
            fix="check that the port is the one rdmaxfer is bound to.",
        )
    body = memoryview(data)[PREFIX_BYTES:]
    if (version := data[len(MAGIC)]) != PROTOCOL_VERSION:
        return _foreign_refuse(body, version)
    try:
        message = _decoder.decode(body)
        _check(message)
    except _DECODE_ERRORS as error:
        raise RemoteProtocolError(f"the peer sent a malformed message: {error}") from None
    return message


def peek(data: bytes) -> tuple[bytes, int]:
    """The session and request number of anything that a peer of any version sent; (NO_SESSION, 0) if there are none."""
    if len(data) > MAX_MESSAGE_BYTES or data[: len(MAGIC)] != MAGIC:
        return NO_SESSION, 0
    try:
        envelope = _envelope_decoder.decode(memoryview(data)[PREFIX_BYTES:])
    except _DECODE_ERRORS:
        return NO_SESSION, 0
    return envelope.session, envelope.request


def _foreign_refuse(body: memoryview, version: int) -> Refuse:
    try:
        refuse = _foreign_decoder.decode(body)
    except _DECODE_ERRORS:
        raise WrongVersion(version) from None
    try:
        code = RefuseCode(refuse.code)
    except ValueError:
        code = RefuseCode.INTERNAL  # a code of the future: its sentence and fix are what counts
    return Refuse(
        session=refuse.session,
        request=refuse.request,
        code=code,
        message=refuse.message,
        fix=refuse.fix,
        limit=refuse.limit,
    )


# --- what a single field's bounds can't say --------------------------------------------------------------------------


def _check(message: Message) -> None:
    # ValueError here becomes the error of whoever called.
    match message:
        case Hello():
            for fabric in message.fabrics:
                _check_fabric(fabric)
            if message.resume is not None:
                _check_progress(message.resume)
            if message.slot_bytes > message.max_slot_bytes:
                raise ValueError("slot_bytes is above max_slot_bytes")
        case Accept():
            _check_fabric(message.fabric)
            _check_progress(message.start)
            _check_path(message)
            if message.slot_bytes > message.max_slot_bytes:
                raise ValueError("slot_bytes is above max_slot_bytes")
            if (message.ring is not None) != (message.role == "receiver"):
                raise ValueError("a receiver has a ring, and a sender has none")
            if message.ring is not None:
                _check_ring(message.ring)
                if message.ring.slots != message.slots:
                    raise ValueError("the ring does not have the number of slots agreed")
        case Ready() | Resize() | Resized():
            if message.ring is not None:
                _check_ring(message.ring)
        case _:
            pass


def _check_path(accept: Accept) -> None:
    fabric = accept.fabric
    if isinstance(fabric, TcpAddress):
        if (accept.path_mtu, accept.max_msg_sz) != (NO_MTU, NO_MAX_MSG_SZ):
            raise ValueError("TCP has no path MTU or message size")
        if not fabric.port:
            raise ValueError("the acceptor names no port")
        return
    if isinstance(fabric, ShmAddress):
        if (accept.path_mtu, accept.max_msg_sz) != (NO_MTU, NO_MAX_MSG_SZ):
            raise ValueError("shared memory has no path MTU or message size")
        return
    _check_mtu("path_mtu", accept.path_mtu)
    if accept.path_mtu > fabric.active_mtu:
        raise ValueError("path_mtu is above the acceptor's own active_mtu")


def _check_fabric(fabric: Fabric) -> None:
    if isinstance(fabric, TcpAddress | ShmAddress):
        return
    _check_mtu("active_mtu", fabric.active_mtu)
    if len({each.qp_num for each in fabric.queue_pairs}) < len(fabric.queue_pairs):
        raise ValueError("queue_pairs has one of them twice")


def _check_progress(progress: Progress) -> None:
    if progress.released > progress.received:
        raise ValueError("more frames are said to be released than received")


def _check_mtu(name: str, value: int) -> None:
    if value not in PATH_MTUS:
        raise ValueError(f"{name} is {value}, which is none of {PATH_MTUS}")


def _check_ring(ring: RingAddress) -> None:
    if ring.payload_offset + ring.slot_bytes > ring.slot_stride:
        raise ValueError("a slot's payload does not fit its stride")
    if ring.address + ring.slots * ring.slot_stride > ADDRESS_END:
        raise ValueError("the ring goes beyond the end of the address space")
