"""What the coroutines of a Sender do: the same as its methods, waiting by its alarm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rdmaxfer.aio import in_thread
from rdmaxfer.errors import TimeoutExpired
from rdmaxfer.frame import FrameType, encode_metadata
from rdmaxfer.outgoing import whole
from rdmaxfer.payload import payload_of
from rdmaxfer.registrations import hold, let_go
from rdmaxfer.staging import Holder
from rdmaxfer.waiting import Deadline

if TYPE_CHECKING:
    import numpy.typing as npt

    from rdmaxfer.outgoing import Piece
    from rdmaxfer.sender import Sender
    from rdmaxfer.staging import StagingSlot

COPIED_ON_LOOP_BYTES = 1 << 20
"""More than this is copied on another thread: it takes longer than the way there and back."""


async def push(
    sender: Sender,
    array: npt.ArrayLike,
    *,
    metadata: Mapping[str, Any] | None,
    captured_ns: int,
    copy: bool,
    timeout: float | None,
) -> int:
    payload = payload_of(array)
    kind = payload.kind
    packed = encode_metadata(metadata) if metadata else b""
    deadline = Deadline(timeout)
    holder = Holder()
    await sender._alarm.checkpoint()
    if sender._registrations or not copy:
        with sender._lock:
            sender._check_usable()
            pieces = sender._in_place(payload, keep=not copy)
            if pieces is not None:
                holder.keeps = payload.parts
                hold(pieces, holder)
        if pieces is not None:
            try:
                return await send(sender, kind, pieces, holder, packed, captured_ns, deadline)
            finally:
                with sender._lock:
                    let_go(pieces, holder)
    staging = await stage(sender, kind, holder, deadline)
    try:
        if kind.payload_bytes > COPIED_ON_LOOP_BYTES:
            await in_thread(payload.copy_into, staging)
        else:
            payload.copy_into(staging)
        seq = await send(sender, kind, whole(staging, kind.payload_bytes), holder, packed, captured_ns, deadline)
        sender._copied += 1
        return seq
    finally:
        if not holder.sent:
            sender._discard_staged(staging, holder)


async def stage(sender: Sender, kind: FrameType, holder: Holder, deadline: Deadline) -> StagingSlot:
    """A free staging slot, large enough."""
    with sender._lock:
        sender._check_usable()
        sender._check_size(kind.payload_bytes)
        staging = sender._free_slot(kind.payload_bytes, holder)
    if staging is not None:
        return staging

    def give_back(slot: StagingSlot) -> None:
        slot.let_go(holder)

    return await sender._alarm.until(
        lambda: sender._free_slot(kind.payload_bytes, holder),
        deadline,
        "waiting for staging memory (all slots hold frames on their way, or are reserved)",
        give_back,
    )


async def send(
    sender: Sender,
    kind: FrameType,
    pieces: tuple[Piece, ...],
    holder: Holder,
    metadata: bytes,
    captured_ns: int,
    deadline: Deadline,
) -> int:
    """Give the frame to all receivers at once, when there is room for it at each. It is on its way, or nobody has got it."""
    while True:
        try:
            with sender._lock:
                return sender._push(kind, pieces, holder, metadata, captured_ns, Deadline(0.0))
        except TimeoutExpired:
            if deadline.left_s() <= 0:
                raise
        await sender._alarm.until(
            lambda: sender._takers(kind.payload_bytes), deadline, "waiting for every receiver to have a free slot"
        )


async def flush(sender: Sender, timeout: float | None) -> None:
    latest, known = sender._seq - 1, sender._lossy
    deadline = Deadline(timeout)
    try:
        await sender._alarm.look_and_wait(lambda: sender._released(latest, known), deadline, "flushing")
    except TimeoutExpired as error:
        raise sender._flush_expired(error) from None


__all__ = ["flush", "push", "send", "stage"]
