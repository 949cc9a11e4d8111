"""Page-aligned memory for frames."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rdmaxfer.errors import NoMemory

_ANONYMOUS = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
"""Shared, so that a forked child neither gets a copy nor, by copy-on-write, takes the pages away that the device writes to."""
_MAP_HUGETLB = 0x40000
_MADV_POPULATE_WRITE = 23
_MAX_WASTE = 8
"""No more than one part in so many of huge pages may stay unused."""


def _map(nbytes: int) -> mmap.mmap:
    """Memory of huge pages where the administrator has set some aside (vm.nr_hugepages) and enough of them are free: a device
    registers them faster, and looks up fewer addresses."""
    page_bytes = huge_page_bytes()
    if page_bytes and -nbytes % page_bytes <= nbytes // _MAX_WASTE:
        with contextlib.suppress(OSError):
            mapped = mmap.mmap(-1, nbytes + -nbytes % page_bytes, flags=_ANONYMOUS | _MAP_HUGETLB)
            # Now, since who touches a page that a container's limit denies dies by SIGBUS. madvise(2): Linux 5.14, else EINVAL.
            mapped.madvise(_MADV_POPULATE_WRITE)
            return mapped
    return mmap.mmap(-1, nbytes, flags=_ANONYMOUS)


@functools.cache
def huge_page_bytes() -> int:
    """Size of the kernel's default huge pages; 0 if it has none."""
    with contextlib.suppress(OSError):
        found = re.search(r"^Hugepagesize: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) << 10
    return 0


class _Descriptor:
    """A file descriptor that is closed with the last reference."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` itself may be gone when Python ends
        close(self.fd)


_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""No access behind the end, by which a process dies of SIGBUS."""


def _map_shared(nbytes: int) -> tuple[mmap.mmap, _Descriptor]:
    """Memory without a name that other processes can map, too, if they are given its descriptor (memfd_create(2)): the kernel
    frees it when nobody has it any more, however they ended."""
    # The kernel promises any size of it, and kills for the want of memory later; of anonymous memory it says at once that there is
    # not so much.
    mmap.mmap(-1, nbytes, flags=_ANONYMOUS).close()
    file = _Descriptor(os.memfd_create("rdmaxfer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(file.fd, nbytes)
    fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, _SEALS)
    return mmap.mmap(file.fd, nbytes, flags=mmap.MAP_SHARED), file


class ForeignMemory(mmap.mmap):
    """Another process's memory, mapped to be read. `file` is its descriptor, by which it can be handed on."""

    file: _Descriptor | None = None

    @property
    def fd(self) -> int | None:
        return self.file.fd if self.file is not None else None

    @property
    def nbytes(self) -> int:
        return len(self)

    @functools.cached_property
    def address(self) -> int:
        return int(np.frombuffer(self, np.uint8).__array_interface__["data"][0])


def map_foreign(fd: int, nbytes: int, *, writable: bool = False, keep_fd: bool = False) -> ForeignMemory:
    """Map another process's memory, of which it has sent the descriptor, which stays the caller's; `keep_fd`: keep one like it.
    Raises ValueError if the memory could shrink, or is too small."""
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK == 0:
        raise ValueError("the memory is not sealed against shrinking")
    if not 0 < nbytes <= os.fstat(fd).st_size:
        raise ValueError(f"the memory has {os.fstat(fd).st_size} bytes, not {nbytes}")
    rights = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    memory = ForeignMemory(fd, nbytes, flags=mmap.MAP_SHARED, prot=rights)
    if keep_fd:
        memory.file = _Descriptor(os.dup(fd))
    return memory


class Buffer:
    """`nbytes` of zeroed, page-aligned memory; with `shared`, such that other processes can be given it by its descriptor `fd`.

    The memory lives as long as this object or any view or array made from it: Python does not unmap a mapping that is
    exported, and nobody ever calls `mmap.close()`.
    """

    __slots__ = ("__weakref__", "_file", "_map", "address", "nbytes")

    def __init__(self, nbytes: int, *, shared: bool = False) -> None:
        if nbytes < 0:
            raise ValueError(f"a buffer can't have {nbytes} bytes")
        self.nbytes = nbytes
        self._file: _Descriptor | None = None
        try:
            if shared:
                self._map, self._file = _map_shared(max(nbytes, 1))
            else:
                self._map = _map(max(nbytes, 1))
        except (OSError, OverflowError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise NoMemory(
                    "memory to be shared takes a file descriptor, and this process may not have more.",
                    fix="raise the limit on open files (`ulimit -n`), or use fewer slots.",
                ) from error
            raise NoMemory(
                f"{nbytes} bytes of memory can't be had: {error}.", fix="use fewer or smaller slots."
            ) from error
        # The array made to ask for the address exports the mapping only until it is gone.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def __repr__(self) -> str:
        return f"<Buffer {self.nbytes} bytes at {self.address:#x}>"

    @property
    def fd(self) -> int | None:
        """What another process maps it by; None if it can't."""
        return self._file.fd if self._file is not None else None

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
