"""The header of a frame <-> bytes.

Pure. A header is a block of `header_bytes` bytes, a multiple of 64, that ends exactly where the payload begins, so that
one contiguous WRITE carries both. Little-endian:

      0  4  magic               16  4  epoch of the ring          48  8  captured_ns (signed; 0: unknown)
      4  1  version             20  4  slot                       56  8  pushed_ns (signed)
      5  1  ndim                24  8  seq, of the sender         64     shape: ndim x 8
      6  2  gap                 32  8  position, on this link            dtype
      8  2  header_bytes        40  8  payload_bytes                     metadata: a msgpack map, or nothing
     10  2  bytes of dtype                                               zeros up to header_bytes
     12  2  bytes of metadata
     14  2  reserved, 0

`gap` says why numbers are missing since the frame before this one: a sum of GAP_REASONS, 0 where none is.

The payload is the array in C order. The dtype is numpy's `dtype.str` (`<f4`, `|u1`, `>M8[25us]`) or, for a structure,
msgpack:

    type      = text | ["struct", itemsize, [[name, type, offset], ...]] | ["array", type, [dimension, ...]]

The first byte tells them apart: in msgpack, `<`, `>` and `|` would be small integers.

The rules of this file:

- What a sender may send is exactly what a receiver accepts: both sides go through the same `_build`, which makes the
  dtype from the wire form. numpy parses no text of a peer's that did not match a table or a strict pattern first.
- `unpack` gets a *copy* of the block, because the sender could still be writing to the original. Whatever is wrong with
  it raises RemoteProtocolError and nothing else.
- Everything that depends on shape and dtype alone is done once and kept in a bounded cache: `FrameType` on the sending
  side, `_parse_type` on the receiving side.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import numpy as np

from rdmaxfer.errors import FrameError, FrameTooLarge, RemoteProtocolError, UnsupportedDtype

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    AnyDType = np.dtype[Any]

GAP_REASONS: Final = {1: "when_full", 2: "elsewhere", 4: "too_large"}
"""Dropped by the connection's `when_full`; sent to another receiver (`distribute="balance"`); above what the receiver takes."""

HEADER_ROOM: Final = 8192
HEADER_UNIT: Final = 64
MAGIC: Final = b"RXFR"
VERSION: Final = 1

MAX_DIMS: Final = 8
MAX_DTYPE_BYTES: Final = 3584
MAX_DTYPE_DEPTH: Final = 8
MAX_ITEM_BYTES: Final = (1 << 31) - 1  # a C int in numpy 1
MAX_METADATA_BYTES: Final = 4096
MAX_METADATA_DEPTH: Final = 32
MAX_PAYLOAD_BYTES: Final = 0xFF_FFFF * 4096  # the most that an in-band RESIZE_WANTED can ask for

_PREFIX = struct.Struct("<4sBB")
_FIXED_FORMAT = "HHHHHIIQQQqq"
_FIXED = struct.Struct("<4sBB" + _FIXED_FORMAT)
_SHAPES = [struct.Struct(f"<{ndim}Q") for ndim in range(MAX_DIMS + 1)]
# By length in units: a whole block in one pack_into. "s" fills up with zeros.
_BLOCKS = [
    struct.Struct(f"<6s{_FIXED_FORMAT}{(units - 1) * HEADER_UNIT}s") if units else _FIXED
    for units in range(HEADER_ROOM // HEADER_UNIT + 1)
]
_ALL_REASONS = sum(GAP_REASONS)
_ZEROS = [bytes(count) for count in range(HEADER_UNIT)]

_SIMPLE: Final[dict[str, AnyDType]] = {
    text: np.dtype(text)
    for text in ["|b1", "|i1", "|u1"]
    + [order + code for order in "<>" for code in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")]
}
_TIME = re.compile(r"[<>][mM]8(\[([1-9][0-9]{0,8})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?", re.ASCII)

_DTYPE_DECODER = msgspec.msgpack.Decoder(list[Any])


# --- dtypes -----------------------------------------------------------------------------------------------------------


class _Invalid(Exception):
    """Why a dtype or shape in wire form can't be used; becomes a local or a remote error."""


def _dtype_to_wire(dtype: AnyDType, depth: int = 0) -> str | list[Any]:
    """The wire form of a dtype. It may still be refused by `_build`."""
    if depth > MAX_DTYPE_DEPTH:
        raise _Invalid(f"it is nested more than {MAX_DTYPE_DEPTH} deep")
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return ["array", _dtype_to_wire(base, depth + 1), list(shape)]
    if dtype.fields is not None:
        fields = [(name, dtype.fields[name]) for name in dtype.names or ()]
        return [
            "struct",
            dtype.itemsize,
            [[name, _dtype_to_wire(field[0], depth + 1), field[1]] for name, field in fields],
        ]
    text: str = dtype.str
    # A dtype that another package defines can have the name of a built-in one: only what comes back equal may go.
    if _leaf(text) != dtype:
        raise _Invalid(f"{dtype} is not a built-in numpy type")
    return text


def _leaf(text: str) -> AnyDType:
    simple = _SIMPLE.get(text)
    if simple is not None:
        return simple
    if _TIME.fullmatch(text) is None:
        raise _Invalid(f"{text[:40]!r} is not one of the types that can travel")
    return _make(text)


def _build(wire: object, depth: int = 0) -> AnyDType:
    """Make the dtype of a wire form, from either side. Raises only _Invalid."""
    if depth > MAX_DTYPE_DEPTH:
        raise _Invalid(f"it is nested more than {MAX_DTYPE_DEPTH} deep")
    if isinstance(wire, str):
        return _leaf(wire)
    match wire:
        case ["struct", int(itemsize), [*fields]]:
            return _build_struct(itemsize, fields, depth)
        case ["array", base, [*dims]]:
            return _build_subarray(base, dims, depth)
    raise _Invalid("it is not a type description")


def _build_struct(itemsize: int, fields: list[object], depth: int) -> AnyDType:
    if not 0 < itemsize <= MAX_ITEM_BYTES:
        raise _Invalid(f"a structure has {itemsize} bytes")
    if not fields:
        raise _Invalid("a structure has no fields")
    names: list[str] = []
    formats: list[AnyDType] = []
    offsets: list[int] = []
    for field in fields:
        match field:
            case [str(name), wire, int(offset)] if name:
                pass
            case _:
                raise _Invalid("a field is not [name, type, offset]")
        dtype = _build(wire, depth + 1)
        if not 0 <= offset <= itemsize - dtype.itemsize:
            raise _Invalid(f"the field {name[:40]!r} lies outside its structure")
        names.append(name)
        formats.append(dtype)
        offsets.append(offset)
    if len(set(names)) != len(names):
        raise _Invalid("two fields have one name")
    return _make({"names": names, "formats": formats, "offsets": offsets, "itemsize": itemsize})


def _build_subarray(wire: object, dims: list[object], depth: int) -> AnyDType:
    base = _build(wire, depth + 1)
    if base.subdtype is not None:
        raise _Invalid("a sub-array consists of sub-arrays")
    shape = []
    for dim in dims:
        if type(dim) is not int or not 0 < dim <= MAX_ITEM_BYTES:
            raise _Invalid("a sub-array has a dimension that is not a positive number")
        shape.append(dim)
    if not 0 < len(shape) <= MAX_DIMS:
        raise _Invalid(f"a sub-array has {len(shape)} dimensions, not 1 to {MAX_DIMS}")
    if math.prod(shape) * base.itemsize > MAX_ITEM_BYTES:
        raise _Invalid("a sub-array is too large")
    return _make((base, tuple(shape)))


def _make(checked: Any) -> AnyDType:
    try:
        dtype: AnyDType = np.dtype(checked)
    except (ValueError, TypeError, OverflowError) as error:
        raise _Invalid(f"numpy refuses it: {error}") from None
    return dtype


def _encode_dtype(dtype: AnyDType) -> bytes:
    wire = _dtype_to_wire(dtype)
    _build(wire)
    if isinstance(wire, str):
        return wire.encode("ascii")
    data = msgspec.msgpack.encode(wire)
    if len(data) > MAX_DTYPE_BYTES:
        raise FrameTooLarge(
            f"the description of the dtype takes {len(data)} bytes; at most {MAX_DTYPE_BYTES} fit in a header.",
            fix="use fewer fields or shorter names, or send the fields as separate frames",
        )
    return data


def _decode_dtype(data: bytes) -> AnyDType:
    """Make the dtype of its bytes in a header. Raises only _Invalid."""
    if data[:1] in (b"<", b">", b"|"):
        try:
            return _leaf(data.decode("ascii"))
        except UnicodeDecodeError:
            raise _Invalid("it is not ASCII text") from None
    try:
        wire = _DTYPE_DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        raise _Invalid("it is not valid msgpack") from None
    dtype = _build(wire)
    if dtype.subdtype is not None:
        raise _Invalid("it is a sub-array outside a structure")
    return dtype


def _dtype_fix(dtype: AnyDType) -> str:
    """What to do about a dtype that can't travel."""
    kind = dtype.kind
    if dtype.hasobject:
        return "convert to a fixed-size dtype, e.g. array.astype(np.float64)"
    if kind in "fc" and dtype.itemsize > (8 if kind == "f" else 16):
        target = "np.float64" if kind == "f" else "np.complex128"
        return f"long double differs between platforms; convert it, e.g. array.astype({target})"
    if kind in "SUT":
        return "put text into the metadata, or send its bytes, e.g. np.frombuffer(text.encode(), np.uint8)"
    if dtype.fields is None and dtype.itemsize in (1, 2, 4, 8):
        return f"send its bits, array.view(np.uint{dtype.itemsize * 8}), and view them back at the other end"
    if dtype.fields is None:
        return "send the bytes, e.g. array.view(np.uint8)"
    return "use fields of fixed-size numeric, bool, complex, datetime64 or timedelta64 types"


# --- the sending side -------------------------------------------------------------------------------------------------


class FrameType:
    """What the headers of all frames of one shape and dtype have in common. Made by `frame_type`."""

    __slots__ = ("_bytes_before_metadata", "_dtype_bytes", "_prefix", "_tail", "dtype", "payload_bytes", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: AnyDType, payload_bytes: int, dtype_data: bytes) -> None:
        self.shape = shape
        self.dtype = dtype
        self.payload_bytes = payload_bytes
        self._prefix = _PREFIX.pack(MAGIC, VERSION, len(shape))
        self._dtype_bytes = len(dtype_data)
        self._tail = _SHAPES[len(shape)].pack(*shape) + dtype_data
        self._bytes_before_metadata = _FIXED.size + len(self._tail)

    def __repr__(self) -> str:
        return f"<FrameType {self.shape} {self.dtype} {self.payload_bytes} bytes>"

    def header_bytes(self, metadata: bytes = b"") -> int:
        """The length of a header with this metadata."""
        return (self._bytes_before_metadata + len(metadata) + HEADER_UNIT - 1) & -HEADER_UNIT

    def pack_into(
        self,
        buffer: memoryview | bytearray,
        end: int,
        *,
        epoch: int,
        slot: int,
        seq: int,
        position: int,
        captured_ns: int = 0,
        pushed_ns: int = 0,
        gap: int = 0,
        metadata: bytes = b"",
    ) -> int:
        """Write the header so that it ends at the offset `end` of `buffer`; returns its length.

        `metadata` comes from `encode_metadata`, so its length was checked.
        """
        metadata_bytes = len(metadata)
        units = (self._bytes_before_metadata + metadata_bytes + HEADER_UNIT - 1) // HEADER_UNIT
        header_bytes = units * HEADER_UNIT
        start = end - header_bytes
        if start < 0:  # pack_into would count it from the end of the buffer
            raise FrameTooLarge(f"the header has {header_bytes} bytes, and there is room for {end}.")
        try:
            _BLOCKS[units].pack_into(
                buffer,
                start,
                self._prefix,
                gap,
                header_bytes,
                self._dtype_bytes,
                metadata_bytes,
                0,
                epoch,
                slot,
                seq,
                position,
                self.payload_bytes,
                captured_ns,
                pushed_ns,
                self._tail + metadata,
            )
        except struct.error as error:
            raise FrameError(
                f"a number does not fit in the frame header: {error}.",
                fix="pass captured_ns as a whole number of nanoseconds, e.g. time.time_ns()",
            ) from None
        return header_bytes


def frame_type(shape: int | Sequence[int], dtype: DTypeLike) -> FrameType:
    """The prepared FrameType of a shape and dtype, cached. Raises a FrameError if it can't travel."""
    try:
        return _frame_type(shape, dtype)  # type: ignore[arg-type]
    except FrameError:
        raise
    except TypeError:  # not hashable, such as a list
        return _frame_type(_normal_shape(shape), _normal_dtype(dtype))


def _normal_shape(shape: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(dim) for dim in shape) if np.iterable(shape) else (operator.index(shape),)
    except TypeError:
        raise FrameError(f"a shape is a tuple of whole numbers, not {shape!r}.") from None


def _normal_dtype(dtype: Any) -> AnyDType:
    try:
        normal: AnyDType = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError, OverflowError) as error:
        raise UnsupportedDtype(f"numpy makes no dtype of {dtype!r}: {error}.") from None
    return normal


@functools.lru_cache(maxsize=256)
def _frame_type(shape: Any, dtype: Any) -> FrameType:
    dims, dtype = _normal_shape(shape), _normal_dtype(dtype)
    if dtype.subdtype is not None:  # as in np.empty: the dimensions of a sub-array become dimensions of the array
        base, extra = dtype.subdtype
        dtype, dims = base, dims + extra
    try:
        payload_bytes = _payload_bytes(dims, dtype.itemsize)
    except _Invalid as why:
        raise FrameTooLarge(
            f"a frame of shape {dims} and dtype {dtype} can't be sent: {why}.",
            fix=f"reshape or split the array; at most {MAX_DIMS} dimensions and {MAX_PAYLOAD_BYTES >> 30} GiB",
        ) from None
    try:
        data = _encode_dtype(dtype)
    except (_Invalid, UnicodeEncodeError) as why:
        raise UnsupportedDtype(f"dtype {dtype} can't be sent: {why}.", fix=_dtype_fix(dtype)) from None
    return FrameType(dims, dtype, payload_bytes, data)


def _payload_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """The size of an array. Raises _Invalid for one that numpy could not address, even an empty one like (0, 2**63)."""
    if len(shape) > MAX_DIMS:
        raise _Invalid(f"it has {len(shape)} dimensions")
    extent = itemsize
    for dim in shape:
        if dim < 0:
            raise _Invalid("a dimension is negative")
        extent *= dim or 1
    if extent > MAX_PAYLOAD_BYTES:
        raise _Invalid(f"its dimensions span {extent} bytes")
    return 0 if 0 in shape else extent


# --- the receiving side -----------------------------------------------------------------------------------------------


class FrameHeader(NamedTuple):
    """A validated header. `metadata` is still encoded: see `decode_metadata`."""

    seq: int
    position: int
    epoch: int
    slot: int
    shape: tuple[int, ...]
    dtype: AnyDType
    payload_bytes: int
    captured_ns: int
    pushed_ns: int
    metadata: bytes
    header_bytes: int
    gap: int


def unpack(
    block: bytes,
    *,
    epoch: int,
    slot: int,
    position: int,
    slot_bytes: int,
    received_bytes: int | None = None,
) -> FrameHeader:
    """Decode a header that was copied out of slot `slot`. Raises RemoteProtocolError for anything but the expected one.

    `received_bytes` is what the completion says was written, header and payload; None where the device doesn't tell.
    """
    size = len(block)
    if size < HEADER_UNIT or size > HEADER_ROOM or size % HEADER_UNIT:
        raise RemoteProtocolError(f"the peer announced a frame header of {size} bytes")
    (
        magic,
        version,
        ndim,
        gap,
        header_bytes,
        dtype_bytes,
        metadata_bytes,
        reserved,
        its_epoch,
        its_slot,
        seq,
        its_position,
        payload_bytes,
        captured_ns,
        pushed_ns,
    ) = _FIXED.unpack_from(block)
    if magic != MAGIC:
        raise RemoteProtocolError(f"slot {slot} holds no frame header: it begins with {magic!r}")
    if version != VERSION:
        raise RemoteProtocolError(f"the peer sent a frame header of version {version}; this is version {VERSION}")
    if its_epoch != epoch or its_slot != slot or its_position != position:
        raise RemoteProtocolError(
            f"expected frame {position} in slot {slot} of ring {epoch}, "
            f"and found the header of frame {its_position} in slot {its_slot} of ring {its_epoch}"
        )
    if gap & ~_ALL_REASONS or reserved:
        raise RemoteProtocolError(f"a reserved field of a frame header is not 0 (gap {gap:#x}, {reserved:#x})")
    if ndim > MAX_DIMS or dtype_bytes > MAX_DTYPE_BYTES or metadata_bytes > MAX_METADATA_BYTES:
        raise RemoteProtocolError(
            f"a frame header is above its limits: {ndim} dimensions, dtype of {dtype_bytes} bytes, "
            f"metadata of {metadata_bytes} bytes"
        )
    metadata_at = HEADER_UNIT + 8 * ndim + dtype_bytes
    used = metadata_at + metadata_bytes
    if header_bytes != size or not size - HEADER_UNIT < used <= size or block[used:] != _ZEROS[size - used]:
        raise RemoteProtocolError(
            f"a frame header of {size} bytes says that it has {header_bytes}, fills {used}, or isn't padded by zeros"
        )
    shape, dtype, needed = _parse_type(ndim, block[HEADER_UNIT:metadata_at])
    if payload_bytes != needed or payload_bytes > slot_bytes:
        raise RemoteProtocolError(
            f"a frame of shape {shape} and dtype {dtype} has {needed} bytes, the header says {payload_bytes}, "
            f"and the slot has {slot_bytes}"
        )
    if received_bytes is not None and received_bytes != header_bytes + payload_bytes:
        raise RemoteProtocolError(
            f"a frame of {header_bytes} + {payload_bytes} bytes was announced, and {received_bytes} bytes were written"
        )
    return FrameHeader(
        seq,
        its_position,
        its_epoch,
        its_slot,
        shape,
        dtype,
        payload_bytes,
        captured_ns,
        pushed_ns,
        block[metadata_at:used],
        header_bytes,
        gap,
    )


@functools.lru_cache(maxsize=256)
def _parse_type(ndim: int, tail: bytes) -> tuple[tuple[int, ...], AnyDType, int]:
    """Shape, dtype and payload bytes, from what follows the fixed part. The cache is bounded: peers fill it."""
    shape = _SHAPES[ndim].unpack_from(tail)
    try:
        dtype = _decode_dtype(tail[8 * ndim :])
        return shape, dtype, _payload_bytes(shape, dtype.itemsize)
    except _Invalid as why:
        raise RemoteProtocolError(f"the peer sent a frame whose type is not allowed: {why}") from None


# --- metadata ---------------------------------------------------------------------------------------------------------


def encode_metadata(metadata: Mapping[str, object] | None) -> bytes:
    """Encode what a user attaches to a frame; nothing for None or an empty mapping.

    Values: None, bool, int (64 bits), float, str, bytes, datetime, and lists and dicts of these; numpy numbers become
    Python numbers. Tuples and sets arrive as lists, datetimes with a time zone in UTC, those without one as ISO text.
    """
    if not metadata:
        return b""
    if not isinstance(metadata, Mapping):
        raise FrameError(f"metadata is a dict with string keys, not {type(metadata).__name__}.")
    try:
        data = _encode_checked(dict(metadata))
    except _METADATA_ERRORS as error:
        raise _metadata_error(metadata, error) from None
    if len(data) > MAX_METADATA_BYTES:
        raise FrameTooLarge(
            f"the metadata takes {len(data)} bytes; at most {MAX_METADATA_BYTES} travel with a frame.",
            fix="send large values as a frame of their own",
        )
    return data


def decode_metadata(data: bytes) -> dict[str, Any]:
    """Decode the metadata of a header. Raises RemoteProtocolError if it is not what `encode_metadata` makes."""
    if not data:
        return {}
    if len(data) > MAX_METADATA_BYTES:
        raise RemoteProtocolError(
            f"the peer sent metadata of {len(data)} bytes; at most {MAX_METADATA_BYTES} are allowed"
        )
    try:
        return _decode_checked(data)
    except _METADATA_ERRORS as error:
        raise RemoteProtocolError(f"the peer sent metadata that can't be decoded: {error}") from None


def _decode_checked(data: bytes) -> dict[str, Any]:
    metadata: dict[str, Any] = _DECODER.decode(data)
    _check_depth(metadata)
    return metadata


def _encode_checked(metadata: dict[str, object]) -> bytes:
    nested = False
    for key, value in metadata.items():
        if type(key) is not str:
            raise FrameError(f"a key of the metadata is not a string: {key!r}.", fix=f"use {str(key)!r}")
        nested = nested or type(value) not in _FLAT
    data = _ENCODER.encode(metadata)
    if nested and len(data) <= MAX_METADATA_BYTES:
        _decode_checked(data)  # it must not be the receiver who finds out
    return data


def _check_depth(value: object) -> None:
    """Without this, a peer could send a nesting that makes the user's own code run into the recursion limit."""
    level = [value]
    for _ in range(MAX_METADATA_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list, tuple))  # a tuple: a key that was an array
            for inner in ((*outer, *outer.values()) if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_METADATA_DEPTH} deep")


def _metadata_error(metadata: Mapping[str, object], error: Exception) -> FrameError:
    if isinstance(error, FrameError):
        return error
    for key, value in metadata.items():  # find the one to blame
        try:
            _encode_checked({key: value})
        except _METADATA_ERRORS as why:
            return FrameError(
                f"the metadata value of {key!r} can't be sent: {why}.",
                fix="use None, bool, int of 64 bits, float, str, bytes, datetime, and lists and dicts of these",
            )
    return FrameError(f"the metadata can't be sent: {error}.")


def _encode_hook(value: object) -> object:
    """Called by msgspec for what it doesn't know."""
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer) and not isinstance(value, np.timedelta64):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"{type(value).__name__} is not supported")


def _refuse_extension(code: int, data: memoryview) -> object:
    raise ValueError(f"extension type {code}")


_FLAT = frozenset({type(None), bool, int, float, str, bytes})
_METADATA_ERRORS = (FrameError, msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError)
_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_hook)
_DECODER = msgspec.msgpack.Decoder(dict[str, Any], ext_hook=_refuse_extension)
