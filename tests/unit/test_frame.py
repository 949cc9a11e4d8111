"""The frame header: layout, round trips, limits, and what hostile bytes can do: nothing but RemoteProtocolError."""

from __future__ import annotations

import contextlib
import datetime
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rdmaxfer import frame as wire
from rdmaxfer.errors import FrameError, FrameTooLarge, RemoteProtocolError, UnsupportedDtype
from rdmaxfer.frame import HEADER_ROOM, FrameHeader, decode_metadata, encode_metadata, frame_type, unpack

SLOT_BYTES = 1 << 20
NUMBERS: dict[str, Any] = {"epoch": 7, "slot": 3, "seq": 1 << 40, "position": 99}

SIMPLE = [
    order + code
    for order in "<>"
    for code in ["i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", "M8[ns]", "m8[25us]", "M8[D]", "m8"]
] + ["|b1", "|i1", "|u1"]


def pack(shape: Any, dtype: Any, metadata: bytes = b"", **numbers: Any) -> bytes:
    room = bytearray(b"\xaa" * HEADER_ROOM)
    size = frame_type(shape, dtype).pack_into(room, HEADER_ROOM, metadata=metadata, **{**NUMBERS, **numbers})
    assert room[:-size] == b"\xaa" * (HEADER_ROOM - size)
    return bytes(room[-size:])


def parse(block: bytes, **changes: Any) -> FrameHeader:
    return unpack(block, **{"epoch": 7, "slot": 3, "position": 99, "slot_bytes": SLOT_BYTES, **changes})


# --- layout -----------------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_header_never_change() -> None:
    block = pack((2, 3), "<f4", b"\x81\xa1k\x05", captured_ns=-2, pushed_ns=0x1122334455667788)
    assert block == bytes.fromhex(
        "52584652 01 02 0000 8000 0300 0400 0000"  # RXFR, version 1, 2 dimensions; 128 bytes; dtype 3, metadata 4
        "07000000 03000000 0000000000010000 6300000000000000"  # epoch, slot, seq, position
        "1800000000000000 feffffffffffffff 8877665544332211"  # 24 bytes, captured_ns, pushed_ns
        "0200000000000000 0300000000000000 3c6634 81a16b05"  # shape, "<f4", {"k": 5}
    ) + bytes(41)


def test_the_bytes_of_a_structured_dtype_never_change() -> None:
    block = pack((), np.dtype({"names": ["a"], "formats": [("<i2", (2,))], "offsets": [4], "itemsize": 9}))
    description = msgspec.msgpack.encode(["struct", 9, [["a", ["array", "<i2", [2]], 4]]])
    assert block[64 : 64 + len(description)] == description


def test_a_camera_frame_has_a_short_header() -> None:
    assert len(pack((1080, 1920, 3), np.uint8)) == 128


# --- round trips ------------------------------------------------------------------------------------------------------

simple_dtypes = st.sampled_from(SIMPLE).map(np.dtype)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def structures(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    types = inner | st.tuples(inner, st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple))
    fields = st.lists(st.tuples(names, types), min_size=1, max_size=4, unique_by=lambda field: field[0])
    return st.builds(_structure, fields, st.integers(0, 5), st.integers(0, 5))


def _structure(fields: list[tuple[str, Any]], gap: int, end: int) -> np.dtype[Any]:
    offsets, offset = [], 0
    for _, dtype in fields:
        offset += gap
        offsets.append(offset)
        offset += np.dtype(dtype).itemsize
    formats = [dtype for _, dtype in fields]
    return np.dtype(
        {"names": [name for name, _ in fields], "formats": formats, "offsets": offsets, "itemsize": offset + end}
    )


dtypes = st.recursive(simple_dtypes, structures, max_leaves=6)
shapes = st.lists(st.integers(0, 4), max_size=8).map(tuple)


@given(shapes, dtypes)
@example((), np.dtype("|u1"))
@example((0, 3), np.dtype("<f8"))
@example((1,) * 8, np.dtype([("x", [("y", ">f4", (2, 2))]), ("z", "?")]))
def test_shape_and_dtype_survive(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = parse(pack(shape, dtype), slot_bytes=1 << 40)
    assert (header.shape, header.dtype) == (shape, dtype)
    assert header.payload_bytes == frame_type(shape, dtype).payload_bytes == int(np.prod(shape)) * dtype.itemsize


@given(
    seq=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    slot=st.integers(0, 2**32 - 1),
    captured_ns=st.integers(-(2**63), 2**63 - 1),
    pushed_ns=st.integers(-(2**63), 2**63 - 1),
)
def test_numbers_survive(**numbers: Any) -> None:
    block = pack((3,), "u1", **numbers)
    header = unpack(
        block,
        epoch=numbers["epoch"],
        slot=numbers["slot"],
        position=numbers["position"],
        slot_bytes=3,
        received_bytes=131,
    )
    assert {name: getattr(header, name) for name in numbers} == numbers


@given(st.integers(0, wire.MAX_METADATA_BYTES))
@example(37)  # fills the block exactly
@example(38)
@example(wire.MAX_METADATA_BYTES)
def test_metadata_of_any_length_fits(size: int) -> None:
    metadata = b"m" * size
    block = pack((1, 1, 1), "u1", metadata)
    assert len(block) == frame_type((1, 1, 1), "u1").header_bytes(metadata)
    assert parse(block).metadata == metadata


def test_the_largest_header_fits_its_room() -> None:
    for count in range(400, 0, -1):
        dtype = np.dtype([(f"{number:04}", "u1") for number in range(count)])
        try:
            block = pack((1,) * 8, dtype, b"m" * wire.MAX_METADATA_BYTES)
        except FrameTooLarge:
            continue
        assert parse(block).dtype == dtype
        assert HEADER_ROOM - 512 < len(block) <= HEADER_ROOM
        return
    pytest.fail("no structured dtype fits")


def test_aligned_structures_titles_and_records_arrive_as_plain_structures() -> None:
    aligned = np.dtype([("a", "u1"), ("b", "f8")], align=True)
    assert parse(pack(2, aligned)).dtype == np.dtype(
        {"names": ["a", "b"], "formats": ["u1", "f8"], "offsets": [0, 8], "itemsize": 16}
    )
    assert parse(pack(2, np.dtype([(("title", "a"), "<i4")]))).dtype.names == ("a",)
    assert parse(pack(2, np.dtype((np.record, [("a", "<i4")])))).dtype.type is np.void


def test_a_subarray_dtype_adds_dimensions_as_in_numpy() -> None:
    kind = frame_type((4,), np.dtype(("<f4", (2, 3))))
    assert (kind.shape, kind.dtype) == ((4, 2, 3), np.dtype("<f4"))


@pytest.mark.parametrize("shape", [5, [5], np.int64(5), (np.int64(5),), np.array([5])])
@pytest.mark.parametrize("dtype", ["f4", np.float32, np.dtype("<f4"), float, [("a", "f4")]])
def test_shapes_and_dtypes_may_be_given_as_to_numpy(shape: Any, dtype: Any) -> None:
    assert frame_type(shape, dtype).shape == (5,)
    assert frame_type(shape, dtype).dtype == np.dtype(dtype)


def test_a_frame_type_is_made_once() -> None:
    assert frame_type((2, 3), np.dtype("u1")) is frame_type((2, 3), np.dtype("u1"))
    assert "(2, 3)" in repr(frame_type((2, 3), "u1"))


# --- what the sender refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "fix"),
    [
        (object, "astype(np.float64)"),
        ([("a", object)], "astype(np.float64)"),
        (np.longdouble, "astype(np.float64)"),
        (np.clongdouble, "astype(np.complex128)"),
        ("U4", "metadata"),
        ("S4", "metadata"),
        ("V2", "np.uint16"),
        ("V3", "np.uint8"),
        ([], "fields"),
        ([("a", "U3")], "fields"),
        ([("a", "f4", (0,))], "fields"),
    ],
)
def test_a_dtype_that_cannot_travel_is_refused_with_its_fix(dtype: Any, fix: str) -> None:
    if np.dtype(dtype) in (np.dtype(float), np.dtype(complex)):
        pytest.skip("long double is double on this platform")
    with pytest.raises(UnsupportedDtype, match=r"can't be sent") as caught:
        frame_type((2,), dtype)
    assert fix in caught.value.fix


def test_a_dtype_of_another_package_is_refused_even_under_a_built_in_name() -> None:
    class Impostor:
        subdtype = fields = None
        str = "<f4"

        def __ne__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(wire._Invalid):
        wire._dtype_to_wire(Impostor())  # type: ignore[arg-type]


def test_what_numpy_does_not_know_is_refused() -> None:
    dtypes: list[Any] = ["nonsense", [("a",)], {"names": 1}, 5]
    for dtype in dtypes:
        with pytest.raises(UnsupportedDtype, match="makes no dtype"):
            frame_type((2,), dtype)


def test_too_deep_and_too_long_structures_are_refused() -> None:
    dtype: np.dtype[Any] = np.dtype("u1")
    for _ in range(wire.MAX_DTYPE_DEPTH + 1):
        dtype = np.dtype([("a", dtype)])
    with pytest.raises(UnsupportedDtype, match="nested"):
        frame_type((2,), dtype)
    with pytest.raises(FrameTooLarge, match="description"):
        frame_type((2,), [("n" * wire.MAX_DTYPE_BYTES, "u1")])


@pytest.mark.parametrize(
    "shape", [(1,) * 9, (-1,), (2**62, 2**62), (0, 2**63), (wire.MAX_PAYLOAD_BYTES + 1,), (2**64,)]
)
def test_shapes_beyond_the_limits_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FrameTooLarge):
        frame_type(shape, "u1")


@pytest.mark.parametrize("shape", [2.5, "ab", None, (1.5,), object()])
def test_a_shape_is_whole_numbers(shape: Any) -> None:
    with pytest.raises(FrameError, match="whole numbers"):
        frame_type(shape, "u1")


def test_the_largest_payload_is_allowed() -> None:
    assert frame_type((wire.MAX_PAYLOAD_BYTES,), "u1").payload_bytes == wire.MAX_PAYLOAD_BYTES


@pytest.mark.parametrize("captured_ns", [1.5, "now", 2**63, None])
def test_a_clock_that_is_no_number_of_nanoseconds_is_refused(captured_ns: Any) -> None:
    with pytest.raises(FrameError, match="captured_ns"):
        pack((1,), "u1", captured_ns=captured_ns)


def test_a_header_is_never_written_before_its_buffer() -> None:
    with pytest.raises(FrameTooLarge, match="room for 64"):
        frame_type((1,), "u1").pack_into(bytearray(256), 64, **NUMBERS)


# --- what the receiver refuses ----------------------------------------------------------------------------------------


def changed(block: bytes, offset: int, format: str, value: Any) -> bytes:
    out = bytearray(block)
    struct.pack_into("<" + format, out, offset, value)
    return bytes(out)


@pytest.mark.parametrize(
    ("offset", "format", "value"),
    [
        (0, "4s", b"RXFS"),
        (4, "B", 2),
        (5, "B", 1),
        (5, "B", 3),
        (5, "B", 9),
        (5, "B", 255),
        (6, "H", 8),
        (6, "H", 0x8001),
        (8, "H", 64),
        (8, "H", 192),
        (10, "H", 2),
        (10, "H", 4),
        (10, "H", 65535),
        (12, "H", 65535),
        (12, "H", 64),
        (14, "H", 1),
        (16, "I", 8),
        (20, "I", 4),
        (32, "Q", 100),
        (40, "Q", 23),
        (40, "Q", 2**64 - 1),
        (64, "Q", 3),
        (64, "Q", 2**63),
        (80, "3s", b"|O8"),
        (80, "3s", b"<f3"),
        (80, "3s", b"<\xff4"),
        (80, "3s", b"\x80\x80\x80"),
        (127, "B", 1),
    ],
)
def test_a_wrong_field_is_refused(offset: int, format: str, value: Any) -> None:
    block = pack((2, 3), "<f4")
    parse(block)
    with pytest.raises(RemoteProtocolError):
        parse(changed(block, offset, format, value))


@pytest.mark.parametrize(
    "changes", [{"epoch": 6}, {"slot": 2}, {"position": 98}, {"slot_bytes": 23}, {"received_bytes": 151}]
)
def test_a_header_of_another_frame_is_refused(changes: dict[str, int]) -> None:
    block = pack((2, 3), "<f4")
    parse(block, slot_bytes=24, received_bytes=152)
    with pytest.raises(RemoteProtocolError):
        parse(block, **changes)


def test_a_header_longer_than_it_needs_to_be_is_refused() -> None:
    block = changed(pack((2, 3), "<f4"), 8, "H", 192) + bytes(64)
    with pytest.raises(RemoteProtocolError):
        parse(block)


@pytest.mark.parametrize("size", [0, 1, 63, 65, 127, HEADER_ROOM + 64])
def test_a_block_of_impossible_length_is_refused(size: int) -> None:
    with pytest.raises(RemoteProtocolError):
        parse(pack((2, 3), "<f4").ljust(size, b"\0")[:size])


def with_type(shape: tuple[int, ...], description: bytes, payload_bytes: int) -> bytes:
    """A well-formed header around any dtype description."""
    used = 64 + 8 * len(shape) + len(description)
    size = -(-used // 64) * 64
    fixed = struct.pack(
        "<4sBBHHHHHIIQQQqq",
        *(b"RXFR", 1, len(shape), 0, size, len(description), 0, 0, 7, 3, 0, 99, payload_bytes, 0, 0),
    )
    return (fixed + struct.pack(f"<{len(shape)}Q", *shape) + description).ljust(size, b"\0")


def test_the_hand_made_header_is_like_the_real_one() -> None:
    assert with_type((2, 3), b"<f4", 24) == pack((2, 3), "<f4", seq=0)


@pytest.mark.parametrize(
    "text",
    [
        *("f4", "<f16", "|O", "|V4", "<U1", "|S1", "=f4", "<f4,<f4", "(2,)<f4", "float", "<f4 ", "<f4\n", "|u1\0", ""),
        *(
            "<M8[0us]",
            "<M8[us]]",
            "<M8[01us]",
            "<M8[us/3]",
            "<M8[9999999999us]",
            "|M8[us]",
            "<m8[generic]",
            "<M8[\u00b5s]",
        ),
    ],
)
def test_text_that_is_no_allowed_dtype_is_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse(with_type((), text.encode(), 4))


U1 = "|u1"


@pytest.mark.parametrize(
    "description",
    [
        None,
        5,
        [],
        ["struct"],
        ["struct", 4, []],
        ["struct", 0, [["a", U1, 0]]],
        ["struct", -1, [["a", U1, 0]]],
        ["struct", 2**31, [["a", U1, 0]]],
        ["struct", 2**63, [["a", U1, 0]]],
        ["struct", 4, [["a", U1, 4]]],
        ["struct", 4, [["a", U1, -1]]],
        ["struct", 4, [["a", "<i4", 1]]],
        ["struct", 4, [["a", U1, 2**64 - 1]]],
        ["struct", 4, [["", U1, 0]]],
        ["struct", 4, [["a", U1, 0], ["a", U1, 1]]],
        ["struct", 4, [["a", U1]]],
        ["struct", 4, [["a", U1, 0.0]]],
        ["struct", 4, [[b"a", U1, 0]]],
        ["struct", 8, [["a", "|O", 0]]],
        ["struct", 8, [["a", ["array", "|O", [1]], 0]]],
        ["struct", 4.0, [["a", U1, 0]]],
        ["struct", 4, {"a": U1}],
        ["array", U1, [4]],
        ["struct", 4, [["a", ["array", U1, []], 0]]],
        ["struct", 4, [["a", ["array", U1, [0]], 0]]],
        ["struct", 4, [["a", ["array", U1, [-1]], 0]]],
        ["struct", 4, [["a", ["array", U1, [True]], 0]]],
        ["struct", 4, [["a", ["array", U1, [1] * 9], 0]]],
        ["struct", 4, [["a", ["array", U1, [2**31, 2**31]], 0]]],
        ["struct", 4, [["a", ["array", U1, [2**62, 4]], 0]]],
        ["struct", 4, [["a", ["array", ["array", U1, [2]], [2]], 0]]],
        ["struct", 4, [["a", ["struct", 5, [["b", U1, 0]]], 0]]],
    ],
)
def test_a_description_that_is_no_allowed_structure_is_refused(description: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        parse(with_type((), msgspec.msgpack.encode(description), 4))


def test_deep_nesting_is_refused_and_not_followed() -> None:
    for description in (b"\x91" * 3000 + b"\xc0", b"\x93\xa5array" * 400 + b"\xa3|u1" + b"\x91\x01" * 400):
        with pytest.raises(RemoteProtocolError):
            parse(with_type((), description, 1))


def test_fields_may_overlap_but_stay_inside() -> None:
    description = msgspec.msgpack.encode(["struct", 4, [["a", "<i4", 0], ["b", U1, 3]]])
    assert parse(with_type((2,), description, 8)).dtype.itemsize == 4


BLOCKS = [
    pack((2, 3), "<f4", encode_metadata({"name": "x", "list": [1, 2.5, None]})),
    pack((), ">M8[25us]"),
    pack((2,), [("a", "<i4"), ("b", [("c", "f8", (2, 2))])]),
]


def check_hostile(block: bytes) -> None:
    """The rule for any bytes: RemoteProtocolError, or a frame that fits its slot and that numpy can view."""
    try:
        header = parse(block, slot_bytes=4096)
    except RemoteProtocolError:
        return
    assert header.dtype.hasobject is False
    view = np.ndarray(header.shape, header.dtype, bytearray(4096))
    assert view.nbytes == header.payload_bytes <= 4096
    assert len(view.shape) <= wire.MAX_DIMS
    with contextlib.suppress(RemoteProtocolError):
        assert type(decode_metadata(header.metadata)) is dict


@given(st.sampled_from(BLOCKS), st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=6))
def test_no_changed_byte_gets_past_the_limits(block: bytes, changes: list[tuple[int, int]]) -> None:
    out = bytearray(block)
    for offset, value in changes:
        out[offset % len(out)] = value
    check_hostile(bytes(out))


@given(st.binary(max_size=HEADER_ROOM))
def test_random_bytes_are_refused(block: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse(block)


wire_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=8)
    | st.sampled_from(SIMPLE),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.tuples(st.just("array"), inner, st.lists(st.integers(-1, 2**33), max_size=9))
        | st.tuples(
            st.just("struct"),
            st.integers(-1, 2**32),
            st.lists(st.tuples(st.text(max_size=3), inner, st.integers(-1, 2**33)), max_size=4),
        )
    ),
    max_leaves=12,
)


@given(st.lists(st.integers(0, 3), max_size=8).map(tuple), wire_values, st.integers(0, 64))
def test_no_description_gets_past_the_limits(shape: tuple[int, ...], value: Any, payload_bytes: int) -> None:
    description = msgspec.msgpack.encode(value)
    if len(description) <= wire.MAX_DTYPE_BYTES:
        check_hostile(with_type(shape, description, payload_bytes))


@given(st.binary(max_size=200), st.integers(0, 64))
def test_no_description_of_random_bytes_gets_past_the_limits(description: bytes, payload_bytes: int) -> None:
    check_hostile(with_type((1,), description, payload_bytes))


def test_hostile_types_cannot_grow_the_memory() -> None:
    for count in range(1000):
        parse(with_type((count % 7,), f"<M8[{count + 1}us]".encode(), count % 7 * 8))
    info = wire._parse_type.cache_info()
    assert info.maxsize is not None
    assert info.currsize <= info.maxsize


# --- metadata ---------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.binary(max_size=20)
    | st.datetimes(timezones=st.just(datetime.timezone.utc)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=10), values, max_size=5))
def test_metadata_survives(metadata: dict[str, Any]) -> None:
    try:
        data = encode_metadata(metadata)
    except FrameTooLarge:
        return
    assert decode_metadata(data) == metadata


def test_no_metadata_takes_no_bytes() -> None:
    assert encode_metadata(None) == encode_metadata({}) == b""
    assert decode_metadata(b"") == {}


def test_numpy_numbers_become_python_numbers() -> None:
    given_values = {
        "i": np.int16(-3),
        "u": np.uint64(2**64 - 1),
        "f": np.float32(0.5),
        "b": np.bool_(True),
        "l": [np.int8(1)],
    }
    decoded = decode_metadata(encode_metadata(given_values))
    assert decoded == {"i": -3, "u": 2**64 - 1, "f": 0.5, "b": True, "l": [1]}
    assert [type(value) for value in decoded.values()] == [int, int, float, bool, list]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        *(object(), 1j, 2**64, -(2**63) - 1, np.zeros(3), np.timedelta64(1, "s"), "\ud800", {1: {2: object()}}),
        *(nested(32), nested(100_000), msgspec.msgpack.Ext(5, b"x")),
    ],
)
def test_a_value_that_cannot_travel_is_refused_by_the_name_of_its_key(value: Any) -> None:
    with pytest.raises(FrameError, match="'blamed'"):
        encode_metadata({"fine": 1, "blamed": value})


def test_metadata_that_is_no_dict_of_strings_is_refused() -> None:
    with pytest.raises(FrameError, match="dict"):
        encode_metadata(5)  # type: ignore[arg-type]
    with pytest.raises(FrameError, match="key"):
        encode_metadata({5: 1})  # type: ignore[dict-item]


def test_metadata_has_a_largest_size() -> None:
    largest = {"k": b"v" * (wire.MAX_METADATA_BYTES - 6)}
    assert len(encode_metadata(largest)) == wire.MAX_METADATA_BYTES
    with pytest.raises(FrameTooLarge, match="4097 bytes"):
        encode_metadata({"k": largest["k"] + b"v"})


def test_the_deepest_metadata_that_may_be_sent_may_be_received() -> None:
    metadata = {"k": nested(wire.MAX_METADATA_DEPTH - 2)}
    assert decode_metadata(encode_metadata(metadata)) == metadata


@pytest.mark.parametrize(
    "data",
    [
        *(b"\x80\x80", b"\x90", b"\xc0", b"\x81", b"\x81\x01\x02", b"\x81\xa1\xff\x01", b"\xc1", b"\x81\xa1k\xd4\x05x"),
        *(b"\x81\xa1k" + b"\x91" * 4000 + b"\xc0", b"\x81\xa1k" + b"\x91" * 40 + b"\xc0", b"\x81\xa1k\x81\x80\x01"),
        b"\x81\xa1k\x81" + b"\x91" * 40 + b"\xc0\xc0",
        *(b"\x81\xa1k\xd6\xff\xff", b"\x81\xa1k\xc7\x0c\xff" + b"\xff" * 12, b"\x80" * 5000),
    ],
)
def test_hostile_metadata_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_metadata(data)


@given(st.binary(max_size=100).map(lambda tail: b"\x81\xa1k" + tail) | st.binary(max_size=100))
def test_random_metadata_raises_nothing_else(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert type(decode_metadata(data)) is dict
