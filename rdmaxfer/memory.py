"""Page-aligned memory for frames."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rdmaxfer.errors import NoMemory


class Buffer:
    """`nbytes` of zeroed, page-aligned, anonymous memory.

    The memory lives as long as this object or any view or array made from it: Python does not unmap a mapping that is
    exported, and nobody ever calls `mmap.close()`.
    """

    __slots__ = ("__weakref__", "_map", "address", "nbytes")

    def __init__(self, nbytes: int) -> None:
        if nbytes < 0:
            raise ValueError(f"a buffer can't have {nbytes} bytes")
        self.nbytes = nbytes
        # Shared, so that a forked child neither gets a copy nor, by copy-on-write, takes the pages away that the device
        # writes to.
        try:
            self._map = mmap.mmap(-1, max(nbytes, 1))
        except (OSError, OverflowError, MemoryError) as error:
            raise NoMemory(
                f"{nbytes} bytes of memory can't be had: {error}.", fix="use fewer or smaller slots."
            ) from error
        # The array made to ask for the address exports the mapping only until it is gone.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def __repr__(self) -> str:
        return f"<Buffer {self.nbytes} bytes at {self.address:#x}>"

    def view(self, offset: int, nbytes: int) -> memoryview:
        """A writable view of `nbytes` from `offset` on."""
        self._check(offset, nbytes)
        return memoryview(self._map)[offset : offset + nbytes]

    def array(
        self, offset: int, shape: Sequence[int], dtype: npt.DTypeLike, writable: bool = False
    ) -> np.ndarray[Any, np.dtype[Any]]:
        """A C-contiguous array over the memory from `offset` on; no copy. Read-only unless `writable`."""
        kind = np.dtype(dtype)
        count = 1
        for extent in shape:
            count *= int(extent)
        self._check(offset, count * kind.itemsize)
        # By way of an array: over a memoryview, numpy takes the object beneath for the base, and then lets anybody make
        # a read-only array writable again.
        memory = memoryview(self._map)
        base = np.frombuffer(memory if writable else memory.toreadonly(), np.uint8)
        array: np.ndarray[Any, np.dtype[Any]] = np.ndarray(tuple(shape), kind, base, offset)
        return array

    def _check(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"{nbytes} bytes at {offset} are not within a buffer of {self.nbytes}")
