"""Hashes of frames, by which the far end checks what arrived.

Both are real content hashes: no damage goes unnoticed. SHA-256 is the one everybody knows (the first 64 digits of
`sha256sum`), and the faster one on processors with SHA instructions. BLAKE2b does not need such instructions: where there
are none, as in an emulated machine, it is three to four times as fast, so the demo uses it.
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
        return hashlib.blake2b(flat, digest_size=32).hexdigest()
    return hashlib.sha256(flat).hexdigest()


def check(array: np.ndarray[Any, Any], metadata: Mapping[str, Any]) -> str:
    """What is wrong with a received frame, or an empty string."""
    for algorithm in ALGORITHMS:
        expected = metadata.get(algorithm)
        if isinstance(expected, str):
            return "" if digest(array, algorithm) == expected else f"its {algorithm} differs from the sender's"
    return "the sender attached no hash, so it can't be verified"
