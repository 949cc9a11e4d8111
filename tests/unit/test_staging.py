"""Staging memory: what is used again, and what never is."""

from __future__ import annotations

import pytest

from rdmaxfer.staging import ARENA_SLOTS, ARENA_UP_TO, PAGE, Holder, StagingPool, StagingSlot


def take(pool: StagingPool, nbytes: int = PAGE) -> tuple[StagingSlot, Holder]:
    holder = Holder()
    slot = pool.take(nbytes, holder)
    assert slot is not None
    return slot, holder


@pytest.mark.parametrize("shared", [False, True])
def test_slots_are_used_again_when_their_holders_are_gone_and_not_before(shared: bool) -> None:
    pool = StagingPool(3)
    pool.shared = shared
    held = [take(pool) for _ in range(3)]
    assert len({slot.address for slot, _ in held}) == 3
    assert pool.take(PAGE, Holder()) is None
    latest = held.pop()[0]
    assert take(pool)[0] is latest
    pool.close()


def test_shared_slots_lie_side_by_side_and_do_not_overlap() -> None:
    pool = StagingPool(2 * ARENA_SLOTS + 1)
    pool.shared = True
    held = [take(pool, 3 * PAGE - 5) for _ in range(pool.limit)]
    assert len({slot.buffer.fd for slot, _ in held}) == 3
    for number, (slot, _) in enumerate(held):
        slot.array((slot.nbytes,), "u1")[:] = number
    for number, (slot, _) in enumerate(held):
        assert slot.nbytes == 3 * PAGE
        assert set(slot.array((slot.nbytes,), "u1").tolist()) == {number}
    pool.close()


def test_large_shared_slots_have_memory_of_their_own() -> None:
    pool = StagingPool(2)
    pool.shared = True
    one, other = take(pool, ARENA_UP_TO + 1), take(pool, ARENA_UP_TO + 1)
    assert one[0].buffer is not other[0].buffer
    pool.close()


def test_slots_from_before_sharing_are_replaced() -> None:
    pool = StagingPool(1)
    slot, holder = take(pool)
    assert slot.buffer.fd is None
    pool.shared = True
    assert pool.take(PAGE, Holder()) is None, "it is in use"
    del holder
    fresh, _ = take(pool)
    assert fresh.buffer.fd is not None
    pool.close()


def test_what_was_lent_is_never_used_again() -> None:
    pool = StagingPool(2)
    pool.shared = True
    slot, holder = take(pool)
    slot.lent = True
    del holder
    addresses = set()
    for _ in range(5):
        other, _ = take(pool)
        addresses.add(other.address)
    assert slot.address not in addresses
    pool.close()


def test_larger_frames_get_larger_slots() -> None:
    pool = StagingPool(1)
    first, holder = take(pool)
    del holder
    larger, holder = take(pool, 10 * PAGE)
    assert larger.nbytes >= 10 * PAGE * 5 // 4
    del holder
    assert take(pool)[0] is larger
    assert first is not larger
    pool.close()
