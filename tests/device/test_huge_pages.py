"""Rings in huge pages. Where the kernel has none (User Mode Linux), or they are not ours to set aside, in ordinary ones."""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import TIMEOUT_S, pair, picture, wait_until

from rdmaxfer.memory import huge_page_bytes

POOL = Path("/proc/sys/vm/nr_hugepages")
RING = {"slots": 15, "slot_bytes": 1 << 20}
RING_BYTES = 15 * (8192 + (1 << 20))


def free_pages() -> int:
    found = re.search(r"^HugePages_Free: *(\d+)$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def set_aside(count: int) -> Iterator[None]:
    """So many more, where this is possible."""
    if not os.access(POOL, os.W_OK):
        yield
        return
    before = POOL.read_text()
    POOL.write_text(f"{int(before) + count}\n")
    try:
        assert free_pages() >= count, "the kernel had no memory for them"
        yield
    finally:
        POOL.write_text(before)


@pytest.mark.verbs
@pytest.mark.smoke
def test_a_ring_takes_the_huge_pages_that_are_free() -> None:
    with set_aside(16):
        free = free_pages()
        wanted = -(-RING_BYTES // huge_page_bytes()) if huge_page_bytes() else 0
        with pair(receiver=RING) as (tx, rx):
            assert free - free_pages() == (wanted if free >= wanted else 0)
            for seed in range(30):
                array = picture(seed, (700, 1000))
                tx.push(array, timeout=TIMEOUT_S)
                with rx.recv(timeout=TIMEOUT_S) as frame:
                    assert frame.array.tobytes() == array.tobytes()
            tx.flush(timeout=TIMEOUT_S)
        del tx, rx, frame
        gc.collect()
        wait_until(lambda: free_pages() == free, "they are given back")
