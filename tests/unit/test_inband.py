"""Immediates and in-band messages: layout, round trips, and what hostile bytes can do."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rdmaxfer import inband
from rdmaxfer.errors import LocalProtocolError, RemoteProtocolError
from rdmaxfer.inband import Imm, ImmKind, Message, MessageKind


def test_the_bits_of_the_immediates_never_change() -> None:
    assert inband.pack_frame_imm(epoch=5, header_bytes=128, slot=7) == 0x45020007
    assert inband.pack_resize_imm(3 * 4096) == 0x80000003
    assert inband.pack_bye_imm() == 0xC0000000
    assert inband.pack_credit_imm() == 1


def test_the_bytes_of_the_messages_never_change() -> None:
    assert inband.pack_message(MessageKind.CREDIT, 258) == bytes.fromhex("01 00000000000000 0201000000000000")
    assert inband.pack_message(MessageKind.BYE, 1) == bytes.fromhex("02 00000000000000 0100000000000000")
    assert inband.pack_message(MessageKind.RESIZE_REFUSED, 1) == bytes.fromhex("03 00000000000000 0100000000000000")


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 128).map(lambda units: units * 64), st.integers(0, inband.MAX_SLOTS - 1)
)
@example(63, 8192, inband.MAX_SLOTS - 1)
@example(64, 64, 0)
def test_a_frame_survives_with_its_epoch_modulo_64(epoch: int, header_bytes: int, slot: int) -> None:
    imm = inband.pack_frame_imm(epoch, header_bytes, slot)
    assert 0 <= imm < 2**32
    assert inband.unpack_imm(imm) == Imm(ImmKind.FRAME, epoch % inband.EPOCH_MODULUS, header_bytes, slot)


@given(st.integers(0, (2**24 - 1) * inband.RESIZE_UNIT))
@example(1)
@example(inband.RESIZE_UNIT)
@example(inband.RESIZE_UNIT + 1)
@example((2**24 - 1) * inband.RESIZE_UNIT)
def test_a_wanted_size_is_rounded_up(wanted: int) -> None:
    imm = inband.unpack_imm(inband.pack_resize_imm(wanted))
    assert imm.kind is ImmKind.RESIZE_WANTED
    assert wanted <= imm.wanted_bytes < wanted + inband.RESIZE_UNIT


def test_a_wanted_size_beyond_the_immediate_is_a_local_error() -> None:
    with pytest.raises(LocalProtocolError):
        inband.pack_resize_imm((2**24 - 1) * inband.RESIZE_UNIT + 1)


def test_bye_survives() -> None:
    assert inband.unpack_imm(inband.pack_bye_imm()) == Imm(ImmKind.BYE)
    assert inband.unpack_imm(inband.pack_credit_imm()) == Imm(ImmKind.CREDIT_WANTED)


@pytest.mark.parametrize("imm", [0, 2, 0x3FFFFFFF, 0x81000000, 0xA0000000, 0xC0000001, 0xFFFFFFFF])
def test_an_unknown_immediate_is_refused(imm: int) -> None:
    with pytest.raises(RemoteProtocolError):
        inband.unpack_imm(imm)


@given(st.integers(0, 2**32 - 1))
def test_every_immediate_is_refused_or_means_exactly_its_bits(imm: int) -> None:
    try:
        decoded = inband.unpack_imm(imm)
    except RemoteProtocolError:
        return
    again = {
        ImmKind.FRAME: lambda: inband.pack_frame_imm(decoded.epoch, decoded.header_bytes, decoded.slot),
        ImmKind.RESIZE_WANTED: lambda: inband.pack_resize_imm(decoded.wanted_bytes),
        ImmKind.BYE: inband.pack_bye_imm,
        ImmKind.CREDIT_WANTED: inband.pack_credit_imm,
    }[decoded.kind]()
    assert again == imm


@given(st.sampled_from(MessageKind), st.integers(0, 2**64 - 1))
def test_messages_survive(kind: MessageKind, value: int) -> None:
    data = inband.pack_message(kind, value)
    assert len(data) == inband.MESSAGE_BYTES
    assert inband.unpack_message(data) == Message(kind, value)


@given(st.binary(max_size=40) | st.binary(min_size=16, max_size=16))
@example(b"")
@example(bytes(16))
@example(b"\x04" + bytes(15))
@example(b"\x01" + bytes(14))
@example(b"\x01" + bytes(16))
def test_random_messages_raise_nothing_else(data: bytes) -> None:
    try:
        message = inband.unpack_message(data)
    except RemoteProtocolError:
        return
    assert len(data) == inband.MESSAGE_BYTES
    assert (message.kind, message.value) == (data[0], int.from_bytes(data[8:], "little"))
