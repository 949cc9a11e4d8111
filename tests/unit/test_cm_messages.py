"""Messages of the control plane: what goes in comes out, and whatever else comes is refused."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdmaxfer import inband
from rdmaxfer.cm import messages as m
from rdmaxfer.errors import LocalProtocolError, RemoteProtocolError

SESSION = bytes(range(16))
VERBS = m.VerbsAddress(
    device="rxe0",
    gid=bytes(16),
    lid=0,
    queue_pairs=(m.QueuePair(qp_num=0x11, psn=0xFFFFFF), m.QueuePair(qp_num=0x12, psn=0)),
    link_layer="ethernet",
    active_mtu=1024,
    max_msg_sz=1 << 31,
)
RING = m.RingAddress(
    address=(1 << 64) - (4 << 20), rkey=7, slots=4, slot_bytes=4096, slot_stride=1 << 20, payload_offset=8192, epoch=0
)
HELLO = m.Hello(
    session=SESSION,
    request=1,
    role="sender",
    node=b"n" * 16,
    stream=b"s" * 16,
    attempt=1,
    identity="",
    resume=m.Progress(released=3, received=5),
    fabrics=(VERBS,),
    slots=4,
    slot_bytes=0,
    max_slot_bytes=1 << 20,
    lease_s=10.0,
    reconnect_s=30.0,
    name="host/1",
)
ACCEPT = m.Accept(
    session=SESSION,
    request=1,
    role="receiver",
    node=b"m" * 16,
    start=m.Progress(released=4, received=5),
    fabric=VERBS,
    reason="it is the only one",
    path_mtu=1024,
    max_msg_sz=1 << 31,
    slots=4,
    slot_bytes=4096,
    max_slot_bytes=1 << 20,
    lease_s=10.0,
    name="host/2",
    ring=RING,
)
REFUSE = m.Refuse(session=SESSION, request=1, code=m.RefuseCode.MTU, message="no", fix="do", limit=3)
ALL: list[m.Message] = [
    HELLO,
    ACCEPT,
    m.Ready(session=SESSION, request=2, ring=None),
    m.Ready(session=SESSION, request=2, ring=RING),
    m.Started(session=SESSION, request=2),
    m.Renew(session=SESSION, request=3),
    m.Renewed(session=SESSION, request=3, wanted_bytes=1 << 20),
    m.Resize(session=SESSION, request=4, wanted_bytes=1, ring=None),
    m.Resized(session=SESSION, request=4, ring=RING),
    m.Bye(session=SESSION, request=5, end="goodbye", reason="done"),
    m.Bye(session=SESSION, request=5, end="broken", reason="too many retries"),
    m.Gone(session=SESSION, request=5),
    REFUSE,
]
PREFIX = b"RDMAXFR\x01"


def as_map(message: m.Message) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.msgpack.decode(m.encode(message)[8:])
    return found


def wire(fields: dict[str, Any], version: int = 1) -> bytes:
    return b"RDMAXFR" + bytes([version]) + msgspec.msgpack.encode(fields)


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_what_is_encoded_is_decoded(message: m.Message) -> None:
    data = m.encode(message)
    assert data.startswith(PREFIX)
    assert m.decode(data) == message
    assert m.peek(data) == (message.session, message.request)


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_a_field_more_or_less_is_refused(message: m.Message) -> None:
    fields = as_map(message)
    for name in fields:
        with pytest.raises(RemoteProtocolError):
            m.decode(wire({key: value for key, value in fields.items() if key != name}))
    with pytest.raises(RemoteProtocolError):
        m.decode(wire({**fields, "colour": 1}))


def replaced(message: m.Message, path: str, value: Any) -> bytes:
    fields = as_map(message)
    *parents, last = path.split(".")
    at: Any = fields
    for parent in parents:
        at = at[int(parent)] if parent.isdigit() else at[parent]
    at[last] = value
    return wire(fields)


@pytest.mark.parametrize(
    ("message", "path", "value"),
    [
        (HELLO, "session", bytes(15)),
        (HELLO, "session", bytes(17)),
        (HELLO, "request", 0),
        (HELLO, "request", -1),
        (HELLO, "request", 1 << 53),
        (HELLO, "role", "both"),
        (HELLO, "fabrics", []),
        (HELLO, "fabrics", [msgspec.to_builtins(VERBS, builtin_types=(bytes,))] * 9),
        (HELLO, "fabrics.0.kind", "carrier pigeon"),
        (HELLO, "fabrics.0.gid", bytes(15)),
        (HELLO, "fabrics.0.queue_pairs", []),
        (HELLO, "fabrics.0.queue_pairs", [{"qp_num": number, "psn": 0} for number in range(9)]),
        (HELLO, "fabrics.0.queue_pairs", [{"qp_num": 5, "psn": 0}, {"qp_num": 5, "psn": 1}]),
        (HELLO, "fabrics.0.queue_pairs.0.qp_num", 1 << 24),
        (HELLO, "fabrics.0.queue_pairs.0.psn", 1 << 24),
        (HELLO, "fabrics.0.lid", 1 << 16),
        (HELLO, "fabrics.0.active_mtu", 1500),
        (HELLO, "fabrics.0.max_msg_sz", 0),
        (HELLO, "fabrics.0.link_layer", "token ring"),
        (HELLO, "slots", 0),
        (HELLO, "slots", 65537),
        (HELLO, "slot_bytes", (1 << 20) + 1),
        (HELLO, "max_slot_bytes", 1 << 40),
        (HELLO, "lease_s", float("nan")),
        (HELLO, "lease_s", float("inf")),
        (HELLO, "lease_s", -1.0),
        (HELLO, "name", "x" * 129),
        (ACCEPT, "path_mtu", 2048),
        (ACCEPT, "path_mtu", 1000),
        (ACCEPT, "role", "sender"),
        (ACCEPT, "ring", None),
        (ACCEPT, "slots", 5),
        (ACCEPT, "ring.address", (1 << 64) - (4 << 20) + 1),
        (ACCEPT, "ring.rkey", 1 << 32),
        (ACCEPT, "ring.slots", 0),
        (ACCEPT, "ring.slot_bytes", (1 << 20) - 8191),
        (ACCEPT, "ring.slot_stride", 1 << 62),
        (ACCEPT, "ring.payload_offset", 1 << 20),
        (ACCEPT, "ring.epoch", -1),
        (REFUSE, "code", "because"),
        (REFUSE, "message", "x" * 1025),
        (REFUSE, "limit", -1),
    ],
)
def test_a_value_out_of_bounds_is_refused(message: m.Message, path: str, value: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        m.decode(replaced(message, path, value))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x91" * 60000,
        b"\x81\xa1q" + b"\x91" * 60000,
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\x82\xa4type\xa5hello\xa7fabrics\xdd\xff\xff\xff\xff",
        b"\x81\xa4type\xa2\xff\xfe",
        b"\x81\xa2\xff\xfe\x01",
        b"\x81\xa4type\xc7\x00\x01",
        b"\xd6\xff" + struct.pack(">I", 0),
    ],
)
def test_a_malformed_body_is_refused(body: bytes) -> None:
    for prefix in (PREFIX, b"RDMAXFR\x02"):
        with pytest.raises(RemoteProtocolError):
            m.decode(prefix + body)
        assert m.peek(prefix + body) == (m.NO_SESSION, 0)


def test_trailing_bytes_and_long_messages_are_refused() -> None:
    data = m.encode(HELLO)
    for wrong in (data + b"\xc0", data + bytes(m.MAX_MESSAGE_BYTES), data[:-1], data[1:], b"", b"RDMAXFR"):
        with pytest.raises(RemoteProtocolError):
            m.decode(wrong)


def test_another_version_is_told_apart_and_its_sender_can_be_answered() -> None:
    data = wire({**as_map(HELLO), "colour": 1}, version=9)
    with pytest.raises(m.WrongVersion) as caught:
        m.decode(data)
    assert caught.value.version == 9
    assert m.peek(data) == (SESSION, 1)


def test_a_refusal_of_any_version_can_be_read() -> None:
    fields = as_map(REFUSE)
    assert m.decode(wire(fields, version=2)) == REFUSE
    newer = m.decode(wire({**fields, "code": "eclipse", "until": 3}, version=255))
    assert isinstance(newer, m.Refuse)
    assert (newer.code, newer.message) == (m.RefuseCode.INTERNAL, "no")


def test_what_no_peer_would_accept_is_not_sent() -> None:
    for wrong in (
        msgspec.structs.replace(HELLO, slots=0),
        msgspec.structs.replace(REFUSE, message="x" * 2000),
        msgspec.structs.replace(REFUSE, message="\udcff"),
        msgspec.structs.replace(ACCEPT, ring=None),
    ):
        with pytest.raises(LocalProtocolError):
            m.encode(wrong)


def test_limits_agree_with_the_in_band_format() -> None:
    assert m.MAX_SLOTS == inband.MAX_SLOTS
    assert inband.unpack_imm(inband.pack_resize_imm(m.MAX_SLOT_BYTES)).wanted_bytes == m.MAX_SLOT_BYTES


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ALL), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4), st.binary())
def test_damaged_bytes_raise_only_remote_protocol_errors(
    message: m.Message, damage: list[tuple[int, int]], tail: bytes
) -> None:
    data = bytearray(m.encode(message) + tail)
    for position, value in damage:
        data[position % len(data)] = value
    for candidate in (bytes(data), bytes(tail), PREFIX + tail):
        m.peek(candidate)
        with contextlib.suppress(RemoteProtocolError):
            m.decode(candidate)
