"""Hashes of frames, by which the far end checks what arrived.

Both are cryptographic hashes of the content: no damage goes unnoticed, as it could with a checksum. SHA-256 is the one
that everybody can recompute, and the faster one on processors with SHA instructions. BLAKE2b needs no such ones:
where there are none, as in an emulated machine, it is much faster, so the demo uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

ALGORITHMS = ("sha256", "blake2b")


def digest(array: np.ndarray[Any, Any], algorithm: str) -> str:
    """The hash of an array's bytes in C order, in hexadecimal."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if algorithm == "blake2b":
        return hashlib.blake2b(flat.data, digest_size=32).hexdigest()
    return hashlib.sha256(flat.data).hexdigest()


def check(array: np.ndarray[Any, Any], metadata: Mapping[str, Any]) -> str:
    """What is wrong with a received frame, or an empty string."""
    for algorithm in ALGORITHMS:
        expected = metadata.get(algorithm)
        if isinstance(expected, str):
            return "" if digest(array, algorithm) == expected else f"its {algorithm} differs from the sender's"
    return "the sender attached no hash, so it can't be verified"
