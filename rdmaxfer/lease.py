"""What a user holds: a `Frame` leases a slot of the receiver's ring, a `Slot` leases staging memory of the sender.

A lease ends by `release()` (or leaving its `with` block), or when the last reference to the frame *and* to every view of its
array is gone. A view kept after an explicit release points to memory that is still there, but may show a later frame.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from rdmaxfer.errors import FrameReleased
from rdmaxfer.frame import FrameHeader, decode_metadata

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Self

    from rdmaxfer.recv_stream import RecvStream
    from rdmaxfer.sender import Sender
    from rdmaxfer.staging import Holder, StagingSlot


@dataclasses.dataclass(frozen=True)
class Gap:
    """Numbers that are missing between two frames of a sender: `first_seq` to `last_seq`, both included.

    `reasons`, one or several: "when_full" (dropped by that connection's policy), "elsewhere" (sent to another receiver, with
    `distribute="balance"`), "too_large" (above this receiver's limit), "not_connected" (pushed while there was no connection with
    this receiver, and not kept for it).
    """

    first_seq: int
    last_seq: int
    reasons: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many numbers are missing."""
        return self.last_seq - self.first_seq + 1


class _Writable:
    """An array as if it could be written to, for as long as anybody has it."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self._array = array


class Frame:
    """A received frame: a lease on a slot of registered memory.

    `array` is a read-only numpy view on the slot itself: nothing was copied. Release the frame (leave its `with` block, call
    `release()`, or drop it and all views of its array) to give the slot back to the sender. Copy what you want to keep.
    """

    __slots__ = ("__weakref__", "_array", "_end", "_header", "_lease", "_metadata", "gap", "peer")

    def __init__(
        self,
        header: FrameHeader,
        array: np.ndarray[Any, Any],
        peer: str,
        gap: Gap | None,
        end: Callable[[], None],
        lease: FrameLease | None = None,
    ) -> None:
        self._lease = lease
        self._header = header
        self._array: np.ndarray[Any, Any] | None = array
        self._metadata: dict[str, Any] | None = None
        self.peer = peer
        """Who sent it: host/pid of the sender, as it calls itself."""
        self.gap = gap
        """What is missing right before this frame, and why; None if nothing is."""
        self._end = end

    def __repr__(self) -> str:
        state = "released " if self._array is None else ""
        return f"<{state}Frame seq={self.seq} shape={self.shape} dtype={self.dtype} from {self.peer}>"

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The frame's data, of the sender's shape and dtype: read-only, C-contiguous, in registered memory.

        Raises FrameReleased once the frame was released or its receiver closed.
        """
        if self._array is None:
            raise FrameReleased(
                f"frame {self.seq} was released (or its receiver closed), and its memory may hold another frame by now.",
                fix="use frame.array inside the `with frame:` block, or keep frame.array.copy().",
            )
        return self._array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._header.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._header.dtype

    @property
    def seq(self) -> int:
        """The sender's number for this frame: 0, 1, 2, ... since the sender was made."""
        return self._header.seq

    @property
    def nbytes(self) -> int:
        """Bytes of payload."""
        return self._header.payload_bytes

    @property
    def captured_ns(self) -> int:
        """When it was captured, as the sender said: nanoseconds since 1970 (`time.time_ns()`), or 0."""
        return self._header.captured_ns

    @property
    def pushed_ns(self) -> int:
        """When the sender pushed it: nanoseconds since 1970 by the sender's clock."""
        return self._header.pushed_ns

    @property
    def metadata(self) -> dict[str, Any]:
        """The mapping that was pushed along with the array. Raises RemoteProtocolError if it can't be decoded."""
        if self._metadata is None:
            self._metadata = decode_metadata(self._header.metadata)
        return self._metadata

    @property
    def timestamp(self) -> np.datetime64:
        """When it was captured, or, if the sender did not say that, when it was pushed: UTC, in nanoseconds."""
        return np.datetime64(self.captured_ns or self.pushed_ns, "ns")

    # What other libraries ask for, to take a frame for its array without a copy. As long as they have that, the frame stays leased,
    # unless it is released.

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.array
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"a frame of {array.dtype} can't be had as {np.dtype(dtype)} without a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.array.__array_interface__

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **options: Any) -> Any:
        if max_version is not None and max_version[0] >= 1:
            return self.array.__dlpack__(max_version=max_version, **options)
        # Before its version 1.0, DLPack could not say that an array is read-only, and numpy refuses to export such. PyTorch before
        # 2.9 asks so, and has no read-only tensors in any case.
        return np.asarray(_Writable(self.array)).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, number = self.array.__dlpack_device__()
        return int(kind), int(number)

    def __buffer__(self, flags: int, /) -> memoryview:  # Python 3.12 and later
        return self.array.data

    def copy(self) -> Frame:
        """The same frame in memory of its own, which nobody else writes to and which stays as long as you keep it.

        This frame is still to be released. Raises FrameReleased.
        """
        array = self.array
        kept = np.ndarray(array.shape, array.dtype, array.tobytes())
        return Frame(self._header, kept, self.peer, self.gap, _nothing)

    def release(self) -> None:
        """Give the slot back to the sender. Doing it twice is harmless."""
        if self._array is not None:
            self._end()
            self._array = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _nothing() -> None:
    """A frame in memory of its own has nothing to give back."""


class FrameLease:
    """The bookkeeping behind a Frame: ends exactly once, by release, by garbage collection or by the receiver's close."""

    __slots__ = ("_base", "_borrowers", "_frame", "_in_hand", "_stream", "_watch", "forwarded", "memory", "position")

    def __init__(self, stream: RecvStream, position: int, memory: object = None) -> None:
        self._stream = stream
        self.position = position
        self.memory = memory
        """What the frame lies in (a Buffer or ForeignMemory), if that is known."""
        self._in_hand = True
        """Whether the user has it."""
        self.forwarded = False
        """Whether the receiver has shared it."""
        self._borrowers: tuple[weakref.ref[Holder], ...] = ()
        self._base: weakref.ref[Any] | None = None
        self._frame: weakref.ref[Frame] | None = None
        self._watch: weakref.ref[Any] | None = None

    def issue(
        self, header: FrameHeader, array: np.ndarray[Any, Any], base: np.ndarray[Any, Any], gap: Gap | None
    ) -> Frame:
        """`base`: what `array` and every view of it hold on to, and nobody else does."""
        frame = Frame(header, array, self._stream.peer, gap, self._released, self)
        self._frame = weakref.ref(frame)
        self._base = weakref.ref(base)
        self._watch = weakref.ref(base, self._collected)
        return frame

    def refuse(self) -> None:
        """Nobody is to get the frame."""
        self._in_hand = False

    def lend(self, holder: Holder) -> None:
        """The frame's memory is read by somebody else, too, until `holder` is gone."""
        holder.keeps = self._base() if self._base is not None else None
        self._borrowers = (
            *(each for each in self._borrowers if each() is not None),
            weakref.ref(holder, self._given_back),
        )
        self._stream.lent()

    def _given_back(self, _: object) -> None:
        # As `_collected`: anywhere, at any time.
        self._stream.abandoned.append(self)
        self._stream.given_back()

    @property
    def lent_out(self) -> bool:
        return any(holder() is not None for holder in self._borrowers)

    @property
    def in_use(self) -> bool:
        return self._in_hand or self.lent_out

    def _released(self) -> None:
        self._in_hand = False
        self._stream.release(self)
        self._watch = None

    def _collected(self, _: object) -> None:
        # May run in any thread, at any bytecode, even with the receiver's lock held: leave a note, take no lock.
        self._watch = None
        self._in_hand = False
        self._stream.abandoned.append(self)

    def revoke(self) -> None:
        """The receiver is closing: `frame.array` is an error from now on. The memory stays as long as views of it."""
        self._watch = None
        self._in_hand = False
        frame = self._frame() if self._frame is not None else None
        if frame is not None:
            frame._array = None


class Slot:
    """Registered memory to fill in place: what `Sender.reserve` gives.

    Leaving its `with` (or `async with`) block pushes the frame; an exception in the block discards it.
    """

    __slots__ = ("_array", "_holder", "_sender", "_staging", "_timeout", "captured_ns", "metadata", "seq")

    def __init__(
        self,
        sender: Sender,
        staging: StagingSlot,
        holder: Holder,
        array: np.ndarray[Any, Any],
        metadata: Mapping[str, Any] | None,
        timeout: float | None,
    ) -> None:
        self._sender = sender
        self._staging: StagingSlot | None = staging
        self._holder: Holder | None = holder  # a slot that is forgotten takes it along, and so its memory is free again
        self._array = array
        self._timeout = timeout
        self.metadata = metadata
        """Mapping to send along; may be set until the slot is committed."""
        self.captured_ns = 0
        """Capture time in nanoseconds since 1970; may be set until the slot is committed."""
        self.seq: int | None = None
        """The frame's sequence number once it was committed."""

    def __repr__(self) -> str:
        state = (
            "reserved"
            if self._staging is not None
            else "discarded"
            if self.seq is None
            else f"committed seq={self.seq}"
        )
        return f"<Slot {state} shape={self._array.shape} dtype={self._array.dtype}>"

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The writable array, its contents undefined at first. Raises FrameReleased once committed or discarded."""
        if self._staging is None:
            raise FrameReleased(
                "this slot was committed or discarded: its memory is on its way to the receivers.",
                fix="fill slot.array before the end of the `with sender.reserve(...)` block, and reserve another slot next time.",
            )
        return self._array

    def commit(self) -> int:
        """Push the frame; returns its sequence number. Raises as `Sender.push` does; after TimeoutExpired it may be tried again."""
        if self._staging is None or self._holder is None:
            raise FrameReleased("this slot was already committed or discarded.", fix="reserve another slot.")
        self.seq = self._sender._push_staged(
            self._staging,
            self._holder,
            self._array,
            metadata=self.metadata,
            captured_ns=self.captured_ns,
            timeout=self._timeout,
        )
        self._staging = None
        return self.seq

    async def commit_async(self) -> int:
        """As `commit`, without holding up the event loop. When cancelled, nothing was pushed, and it may be tried again."""
        if self._staging is None or self._holder is None:
            raise FrameReleased("this slot was already committed or discarded.", fix="reserve another slot.")
        self.seq = await self._sender._push_staged_async(
            self._staging,
            self._holder,
            self._array,
            metadata=self.metadata,
            captured_ns=self.captured_ns,
            timeout=self._timeout,
        )
        self._staging = None
        return self.seq

    def discard(self) -> None:
        """Give the memory back without pushing. Harmless after a commit."""
        staging, self._staging = self._staging, None
        if staging is not None and self._holder is not None:
            self._sender._discard_staged(staging, self._holder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._staging is None:
            return
        if kind is not None:
            self.discard()
            return
        try:
            self.commit()
        finally:
            self.discard()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._staging is None:
            return
        if kind is not None:
            self.discard()
            return
        try:
            await self.commit_async()
        finally:
            self.discard()


__all__ = ["Frame", "FrameLease", "Gap", "Slot"]
