"""Slots and credits of one connection. Pure: no I/O, no clock, no memory.

Frames are counted by *position*: 0, 1, 2, ... since the connection began. The frame at position `p` lies in slot `p % slots`.
The sender may be at most `slots` positions ahead of what the receiver has *released*; the receiver tells it that count, as an
absolute number, so that a repeated or late message is harmless. Slots are released in any order, but counted in ring order:
one lease held for long stops the ring once the other slots are used up, and never loses anything.

Positions and counts are 64-bit and don't wrap.
"""

from __future__ import annotations

from rdmaxfer.errors import LocalProtocolError, RemoteProtocolError
from rdmaxfer.inband import EPOCH_MODULUS, MAX_SLOTS


def _check_slots(slots: int) -> None:
    if not 1 <= slots <= MAX_SLOTS:
        raise LocalProtocolError(f"a ring has 1 to {MAX_SLOTS} slots, not {slots}")


class SendRing:
    """The sender's view: how many frames it may still write."""

    __slots__ = ("completed", "position", "released", "slots")

    def __init__(self, slots: int) -> None:
        _check_slots(slots)
        self.slots = slots
        self.position = 0
        """Position of the next frame."""
        self.released = 0
        """Frames that the receiver has released: what the latest credit said."""
        self.completed = 0
        """Frames whose work request has completed here: their memory may be reused."""

    def __repr__(self) -> str:
        return f"<SendRing position={self.position} completed={self.completed} released={self.released} slots={self.slots}>"

    @property
    def credit(self) -> int:
        """Frames that may be written now."""
        return self.slots - (self.position - self.released)

    @property
    def outstanding(self) -> int:
        """Frames written and not yet released."""
        return self.position - self.released

    def can_take(self) -> bool:
        """Whether the next slot is free at both ends: released there, and its last work request completed here."""
        return self.position - min(self.released, self.completed) < self.slots

    def take(self) -> int:
        """Use one credit; returns the position of the frame."""
        if not self.can_take():
            raise LocalProtocolError("a frame was to be written without credit")
        position = self.position
        self.position = position + 1
        return position

    def on_credit(self, released: int) -> None:
        """The receiver says how many slots it has released since the beginning."""
        if not self.released <= released <= self.position:
            raise RemoteProtocolError(
                f"the receiver gave credit for {released} frames, after {self.released}, when {self.position} were written"
            )
        self.released = released

    def on_completed(self, position: int) -> None:
        """The work request of `position`, and so of all before it, has completed."""
        if not self.completed <= position + 1 <= self.position:
            raise LocalProtocolError(f"position {position} completed after {self.completed} of {self.position}")
        self.completed = position + 1


class RecvRing:
    """The receiver's view: which slot comes next, which are leased, and when credit is due."""

    __slots__ = ("_done", "announced", "epoch", "received", "released", "slots", "spare_epoch")

    def __init__(self, slots: int, epoch: int = 0) -> None:
        _check_slots(slots)
        self.slots = slots
        self.epoch = epoch
        """Number of the memory that frames arrive in; a resize adds one."""
        self.spare_epoch = epoch
        """Number of the newest memory on offer, to which the sender may turn at any frame."""
        self.received = 0
        """Position of the next frame."""
        self.released = 0
        """Released without a gap from the beginning."""
        self.announced = 0
        """What the sender was last told of `released`."""
        self._done = bytearray(slots)

    def __repr__(self) -> str:
        return (
            f"<RecvRing received={self.received} released={self.released} announced={self.announced} "
            f"slots={self.slots} epoch={self.epoch}>"
        )

    def offer(self) -> int:
        """New memory is being offered to the sender; returns its epoch."""
        self.spare_epoch += 1
        return self.spare_epoch

    def check_frame(self, epoch: int, slot: int) -> tuple[int, int]:
        """Whether a frame may have arrived in `slot` of epoch `epoch` (mod 64) now. Returns (position, full epoch) and changes
        nothing: set `epoch` and `received` when the frame is good. Raises RemoteProtocolError."""
        position = self.received
        if slot != position % self.slots:
            raise RemoteProtocolError(f"the sender wrote slot {slot}, but slot {position % self.slots} comes next")
        if position - self.announced >= self.slots:
            raise RemoteProtocolError("the sender wrote a frame without credit")
        for full in range(self.epoch, self.spare_epoch + 1):
            if full % EPOCH_MODULUS == epoch:
                return position, full
        raise RemoteProtocolError(
            f"the sender wrote into epoch {epoch}; {self.epoch} to {self.spare_epoch} are on offer"
        )

    def release(self, position: int) -> None:
        """The lease on `position` has ended. Repeating it changes nothing."""
        if position >= self.received:
            raise LocalProtocolError(f"position {position} is not leased")
        if position >= self.released:
            self._done[position % self.slots] = 1
        while self.released < self.received and self._done[self.released % self.slots]:
            self._done[self.released % self.slots] = 0
            self.released += 1

    def credit_due(self, *, asked: bool = False) -> bool:
        """Whether to tell the sender now: half of the ring was released since, or it may be starved, or it has asked."""
        new = self.released - self.announced
        return new > 0 and (2 * new >= self.slots or self.received - self.announced >= self.slots or asked)

    def on_announced(self, released: int) -> None:
        self.announced = released
