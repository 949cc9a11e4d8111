"""Copying arrays of any strides into contiguous memory: natively where that is faster than numpy, which is for transposed and
Fortran-ordered arrays, and for pixels of which not all channels are wanted, or in another order."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

NATIVE_FROM_BYTES = 1 << 16
"""Below it, calling takes longer than what can be gained."""


@functools.cache
def native() -> Any:
    """The compiled module; None if it was built without a compiler, or there is no libgomp here."""
    try:
        return importlib.import_module("rdmaxfer._copy")
    except ImportError:
        return None


def copy_into(target: np.ndarray[Any, Any], data: np.ndarray[Any, Any]) -> None:
    """Copy all of `data` into `target`, a C-contiguous array of the same shape and dtype; no memory of theirs overlaps."""
    if not _may_gain(data) or not copy_natively(target, data):
        np.copyto(target, data, casting="no")


def _may_gain(data: np.ndarray[Any, Any]) -> bool:
    if data.nbytes < NATIVE_FROM_BYTES or data.dtype.hasobject or native() is None:
        return False
    lib = native().lib
    in_rows = data.strides[-1] == data.itemsize and data.shape[-1] > lib.RX_PIXEL  # asked here, as it is most arrays
    return not in_rows or data.nbytes >= lib.RX_PARALLEL_FROM


def copy_natively(target: np.ndarray[Any, Any], data: np.ndarray[Any, Any], threads: int = 0) -> int:
    """The same, with so many threads at the most (0: as OpenMP would take). How many it were; 0 if nothing was copied, as numpy is
    as fast, or the native module is not there."""
    module = native()
    if module is None:
        return 0
    cast = module.ffi.cast
    return int(
        module.lib.rx_copy(
            cast("char *", target.__array_interface__["data"][0]),
            cast("char *", data.__array_interface__["data"][0]),
            data.ndim,
            data.shape,
            data.strides,
            data.itemsize,
            threads,
        )
    )
