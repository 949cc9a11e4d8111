"""What a receiver can do about peers it does not trust: limits, and frames that nobody can change."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, Background, pair, picture, wait_until

import rdmaxfer

RING_BYTES = 4 * (8192 + 65536)
"""Of 4 slots of 64 KiB."""
SMALL = {"slots": 4, "slot_bytes": 65536}


def ring_memory(rx: rdmaxfer.Receiver) -> memoryview:
    """The writable memory of the only ring: what a sender's device may write to at any time."""
    ((_, memory),) = rx._links[0]._memory.items()
    return memory.buffer.view(0, memory.buffer.nbytes)


@pytest.mark.parametrize("dtype", ["u1", ">f4", [("a", "<i2"), ("b", "u1")]])
def test_a_copied_frame_can_not_be_changed_by_its_sender(dtype: Any) -> None:
    data = np.ones(50, dtype)
    with pair(receiver={**SMALL, "copy": True}) as (tx, rx):
        for _ in range(10):
            tx.push(data, metadata={"n": 1}, timeout=TIMEOUT_S)
            frame = rx.recv(timeout=TIMEOUT_S)
            ring_memory(rx)[:] = bytes(len(ring_memory(rx)))
            assert frame.array.tobytes() == data.tobytes()
            assert (frame.dtype, frame.shape, frame.metadata) == (data.dtype, data.shape, {"n": 1})
            assert not frame.array.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                frame.array.flags.writeable = True
        tx.flush(timeout=TIMEOUT_S)  # nothing is held
        assert rx.statistics().leased == 0
    assert frame.array.tobytes() == data.tobytes(), "it is for good"


@pytest.mark.verbs
def test_without_copy_the_frame_is_the_ring() -> None:
    with pair(receiver=SMALL) as (tx, rx):
        tx.push(np.ones(50, np.uint8), timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            kept = frame.copy()
            ring_memory(rx)[:] = bytes(len(ring_memory(rx)))
            assert frame.array.tobytes() == bytes(50)
        assert kept.array.tobytes() == b"\1" * 50
        assert (kept.seq, kept.peer) == (frame.seq, frame.peer)
        kept.release()
        with pytest.raises(rdmaxfer.FrameReleased):
            frame.copy()


def test_copies_keep_order_and_back_pressure() -> None:
    with pair(receiver={**SMALL, "copy": True}, sender={"slots": 4}) as (tx, rx):
        pushing = Background(lambda: [tx.push(picture(seed), timeout=TIMEOUT_S) for seed in range(40)])
        frames = [rx.recv(timeout=TIMEOUT_S) for _ in range(40)]
        assert pushing.result() == list(range(40))
        assert [frame.array.tobytes() for frame in frames] == [picture(seed).tobytes() for seed in range(40)]
        for seed in range(4):
            tx.push(picture(seed), timeout=TIMEOUT_S)
        with pytest.raises(rdmaxfer.TimeoutExpired):
            tx.push(picture(5), timeout=0.3)  # nobody takes them: copies don't pile up


def test_zero_size_frames_can_be_copied() -> None:
    with pair(receiver={**SMALL, "copy": True}) as (tx, rx):
        tx.push(np.zeros((0, 3), np.float32), timeout=TIMEOUT_S)
        assert rx.recv(timeout=TIMEOUT_S).array.shape == (0, 3)


@pytest.mark.parametrize("bind", ["sender", "receiver"])
def test_memory_for_all_senders_together_is_limited(bind: str) -> None:
    with contextlib.ExitStack() as stack:
        rx = stack.enter_context(rdmaxfer.Receiver(**SMALL, max_pinned_bytes=2 * RING_BYTES + 100))
        endpoint = rx.bind("tcp://127.0.0.1:*")
        senders = [stack.enter_context(rdmaxfer.Sender(slots=4)) for _ in range(3)]

        def join(tx: rdmaxfer.Sender) -> None:
            if bind == "receiver":
                tx.connect(endpoint, timeout=TIMEOUT_S)
            else:
                rx.connect(tx.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)

        for tx in senders[:2]:
            join(tx)
        assert rx.statistics().pinned_bytes == 2 * RING_BYTES
        with pytest.raises(rdmaxfer.RdmaxferError, match=f"{RING_BYTES} bytes more would be above max_pinned_bytes"):
            join(senders[2])
        with pytest.raises(rdmaxfer.FrameTooLarge):  # nor does a resize get around it
            senders[0].push(np.zeros(200_000, np.uint8), timeout=TIMEOUT_S)
        assert rx.statistics().pinned_bytes == 2 * RING_BYTES
        rx.wait_for_peers(2, timeout=TIMEOUT_S)
        for tx in senders[:2]:
            tx.push(picture(1)[:100], timeout=TIMEOUT_S)
            rx.recv(timeout=TIMEOUT_S).release()
        senders[0].close()

        def freed() -> bool:
            with contextlib.suppress(rdmaxfer.RdmaxferError):
                rx.recv(timeout=0.01)  # sees the goodbye
            return rx.statistics().pinned_bytes == RING_BYTES

        wait_until(freed, "the first sender's ring is gone")
        join(senders[2])
        assert rx.statistics().pinned_bytes == 2 * RING_BYTES
    assert rx._pinned_bytes == 0


def test_how_many_may_connect_is_limited() -> None:
    with rdmaxfer.Receiver(**SMALL, max_peers=1) as rx, rdmaxfer.Sender() as tx, rdmaxfer.Sender() as more:
        endpoint = rx.bind("tcp://127.0.0.1:*")
        tx.connect(endpoint, timeout=TIMEOUT_S)
        with pytest.raises(rdmaxfer.Refused, match="raise max_peers") as caught:
            more.connect(endpoint, timeout=TIMEOUT_S)
        assert caught.value.code == "limit"


@pytest.mark.parametrize("wrong", [{"max_peers": 0}, {"max_pinned_bytes": 0}, {"queue_pairs": 0}, {"queue_pairs": 9}])
def test_limits_that_are_none(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        rdmaxfer.Receiver(**wrong)
