"""Buffers: aligned, zeroed, bounded, and alive as long as anybody looks at them."""

from __future__ import annotations

import errno
import gc
import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmaxfer import memory
from rdmaxfer.errors import MemlockError
from rdmaxfer.fabric import verbs
from rdmaxfer.memory import Buffer


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 1 << 20])
def test_a_buffer_is_zeroed_and_page_aligned(nbytes: int) -> None:
    buffer = Buffer(nbytes)
    assert buffer.nbytes == nbytes
    assert buffer.address % mmap.PAGESIZE == 0
    assert bytes(buffer.view(0, nbytes)) == bytes(nbytes)


@pytest.mark.parametrize(
    "page_bytes", [0, 4096, 2 << 20, 512 << 20], ids=["none", "of no such size", "2 MiB", "too large"]
)
def test_without_free_huge_pages_there_are_ordinary_ones(page_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "huge_page_bytes", lambda: page_bytes)
    buffer = Buffer(4 << 20)
    buffer.view(0, 4 << 20)[-1] = 7
    assert bytes(buffer.view((4 << 20) - 2, 2)) == b"\0\7"


def test_huge_pages_that_may_not_be_touched_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose limit denies them: mapping succeeds, and populating does not."""
    made: list[int] = []

    class Map(mmap.mmap):
        def __new__(cls, fileno: int, length: int, flags: int) -> Map:  # noqa: PYI034 (Self is not in Python 3.10)
            made.append(flags & memory._MAP_HUGETLB)
            return super().__new__(cls, fileno, length, flags=flags & ~memory._MAP_HUGETLB)

        def madvise(self, option: int, *args: int) -> None:
            raise OSError(errno.EFAULT, "denied")

    monkeypatch.setattr(memory, "huge_page_bytes", lambda: 2 << 20)
    monkeypatch.setattr(mmap, "mmap", Map)
    assert bytes(Buffer(4 << 20).view(0, 8)) == bytes(8)
    assert made == [memory._MAP_HUGETLB, 0]


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        Buffer(-1)


def test_views_and_arrays_share_the_memory() -> None:
    buffer = Buffer(4096)
    array = buffer.array(8, (2, 3), "<u2", writable=True)
    array[:] = [[1, 2, 3], [4, 5, 6]]
    assert bytes(buffer.view(8, 4)) == b"\1\0\2\0"
    assert array.__array_interface__["data"][0] == buffer.address + 8
    assert array.flags.c_contiguous


def test_an_array_is_read_only_unless_asked_otherwise() -> None:
    array = Buffer(64).array(0, (8,), np.float64)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True


def test_the_memory_outlives_the_buffer_while_an_array_is_left() -> None:
    array = Buffer(1 << 20).array(0, (1 << 20,), np.uint8, writable=True)
    gc.collect()
    array[:] = 7
    others = [Buffer(1 << 20) for _ in range(4)]
    assert int(array.sum()) == 7 << 20
    assert all(not any(other.view(0, 64)) for other in others)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_empty_arrays_and_scalars_fit_anywhere(shape: tuple[int, ...]) -> None:
    assert Buffer(8).array(0, shape, np.float64).shape == shape
    assert Buffer(0).array(0, (0,), np.float64).size == 0


@given(offset=st.integers(-5, 40), nbytes=st.integers(-5, 40))
def test_only_what_lies_within_can_be_seen(offset: int, nbytes: int) -> None:
    buffer = Buffer(32)
    if offset >= 0 and nbytes >= 0 and offset + nbytes <= 32:
        assert len(buffer.view(offset, nbytes)) == nbytes
        assert buffer.array(offset, (nbytes,), np.uint8).size == nbytes
    else:
        with pytest.raises(ValueError, match="not within"):
            buffer.view(offset, nbytes)
        with pytest.raises(ValueError, match=r"not within|negative"):
            buffer.array(offset, (nbytes,), np.uint8)


def test_sizes_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="not within"):
        Buffer(32).array(0, (1 << 62, 4), np.uint8)


def test_it_says_what_it_is() -> None:
    assert repr(Buffer(5)).startswith("<Buffer 5 bytes at 0x")


# --- the limit on locked memory ---


@pytest.mark.parametrize("limit", [0, 65536, 8 << 20])
def test_memory_above_the_limit_names_the_limit_and_the_fixes(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(verbs.resource, "getrlimit", lambda kind: (limit, limit))
    monkeypatch.setattr(verbs, "_may_lock_any_amount", lambda: False)
    verbs._check_memlock(limit)
    with pytest.raises(
        MemlockError, match=rf"{limit + 1} bytes.*may lock {limit} bytes.*limits\.d.*LimitMEMLOCK"
    ) as caught:
        verbs._check_memlock(limit + 1)
    assert (caught.value.verb, caught.value.errno) == ("ibv_reg_mr", errno.ENOMEM)


def test_who_may_lock_any_amount_is_not_held_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs.resource, "getrlimit", lambda kind: (4096, 4096))
    monkeypatch.setattr(verbs, "_may_lock_any_amount", lambda: True)
    verbs._check_memlock(1 << 40)


def test_without_a_limit_a_failed_registration_has_another_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs.resource, "getrlimit", lambda kind: (verbs.resource.RLIM_INFINITY,) * 2)
    assert not isinstance(verbs._no_memory(5), MemlockError)
