"""What a C program says of a frame: whatever it is, it is a frame that fits, or a FrameError."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmaxfer.errors import FrameError, FrameTooLarge
from rdmaxfer.frame import decode_metadata
from rdmaxfer.published import FRAME, Published, parse

SLOT_BYTES = 1000


def described(
    shape: tuple[int, ...] = (10,), dtype: bytes = b"u1", *, metadata: bytes = b"", ndim: int | None = None
) -> bytes:
    dims = [*shape, *[0] * (8 - len(shape))]
    return FRAME.pack(7, *dims, len(shape) if ndim is None else ndim, dtype, 0) + metadata


def checked(data: bytes) -> Published | None:
    try:
        found = parse(data, SLOT_BYTES)
    except FrameError:
        return None
    assert 0 <= found.kind.payload_bytes <= SLOT_BYTES
    assert found.kind.dtype.hasobject is False
    assert len(found.metadata) <= 4096
    return found


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    checked(data)


@given(
    st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=8).map(tuple),
    st.binary(max_size=63)
    | st.sampled_from([b"u1", b"<f8", b"O", b"O,u1", b"(3,)u2", b"S3", b"M8[ns]", b"1000000000u8"]),
    st.binary(max_size=40) | st.sampled_from([b'{"a": 1}', b"[1]", b"{" * 40]),
    st.none() | st.integers(0, 2**32 - 1),
)
def test_nearly_frames(shape: tuple[int, ...], dtype: bytes, metadata: bytes, ndim: int | None) -> None:
    checked(described(shape, dtype, metadata=metadata, ndim=ndim))


def test_a_frame() -> None:
    found = parse(described((2, 3), b"<f4", metadata=b'{"gain": 2.5}'), SLOT_BYTES)
    assert (found.kind.shape, found.kind.dtype.str, found.captured_ns) == ((2, 3), "<f4", 7)
    assert decode_metadata(found.metadata) == {"gain": 2.5}


@pytest.mark.parametrize(
    "metadata", [b"[" * 4000, b'{"a":' * 700, b'{"a": ' + b"9" * 30 + b"}", b'"' + b"\xff" * 9 + b'"']
)
def test_metadata_that_can_not_travel(metadata: bytes) -> None:
    with pytest.raises(FrameError):
        parse(described(metadata=metadata), SLOT_BYTES)


def test_metadata_that_grows_when_it_is_encoded() -> None:
    """JSON has shorter numbers: what fits as text may not fit as msgpack."""
    with pytest.raises(FrameTooLarge):
        parse(described(metadata=json.dumps({"n": [1e9] * 800}).encode()), SLOT_BYTES)


def test_the_layout_is_that_of_the_header() -> None:
    header = (Path(__file__).parents[2] / "rdmaxfer" / "_native" / "intake.h").read_text()
    fields = re.search(r"struct intake_frame \{(.*?)\n\};", header, re.DOTALL)
    assert fields is not None
    bytes_of = {"int64_t": 8, "uint64_t": 8, "uint32_t": 4, "char": 1}
    found = re.findall(r"(\w+) \w+(?:\[(\d+)\])?;", fields[1])
    assert sum(bytes_of[kind] * int(count or 1) for kind, count in found) == FRAME.size
