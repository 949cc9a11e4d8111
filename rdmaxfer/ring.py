"""Slots and credits of one connection. Pure: no I/O, no clock, no memory.

Frames are counted by *position*: 0, 1, 2, ... since the stream began. The frame at position `p` lies in slot `p % slots`.
The sender may be at most `slots` positions ahead of what the receiver has *released*; the receiver tells it that count, as an
absolute number, so that a repeated or late message is harmless. Slots are released in any order, but counted in ring order:
one lease held for long stops the ring once the other slots are used up, and never loses anything.

A connection may have several *lanes* (queue pairs): the frame at position `p` goes over lane `p % lanes`. Each keeps its order, but
one may be ahead of another; so the receiver notes what has arrived on each, and takes frames in the order of their positions.

A stream outlives its connection: `resume` goes on with another one, from what the receiver has released and received. Positions
go on with it; what was written above `received` is to be written again.

Positions and counts are 64-bit and don't wrap.
"""

from __future__ import annotations

from rdmaxfer.errors import LocalProtocolError, RemoteProtocolError
from rdmaxfer.inband import EPOCH_MODULUS, MAX_SLOTS


def _check_slots(slots: int) -> None:
    if not 1 <= slots <= MAX_SLOTS:
        raise LocalProtocolError(f"a ring has 1 to {MAX_SLOTS} slots, not {slots}")


def next_on_lanes(position: int, lanes: int) -> list[int]:
    """For each lane, the first position from `position` on that goes over it."""
    return [position + (lane - position) % lanes for lane in range(lanes)]


class SendRing:
    """The sender's view: how many frames it may still write."""

    __slots__ = ("_uncompleted", "completed", "lanes", "position", "released", "slots")

    def __init__(self, slots: int, lanes: int = 1) -> None:
        _check_slots(slots)
        self.slots = slots
        self.lanes = lanes
        self.position = 0
        """Position of the next frame."""
        self.released = 0
        """Frames that the receiver has released: what the latest credit said."""
        self.completed = 0
        """Frames whose work request has completed here, and those of all before them: their memory may be reused."""
        self._uncompleted = list(range(lanes))

    def check_resume(self, released: int, received: int, slots: int) -> None:
        """Whether the receiver can have released and received that many. Raises RemoteProtocolError."""
        if not self.released <= released <= received <= self.position or received - released > slots:
            raise RemoteProtocolError(
                f"the receiver says that it has received {received} frames and released {released}; {self.released} were "
                f"released before, {self.position} were written, and a ring of {slots} slots was agreed on"
            )

    def resume(self, slots: int, lanes: int, released: int, received: int) -> None:
        """Another connection takes over. Nothing is being read from any more."""
        _check_slots(slots)
        self.slots, self.lanes = slots, lanes
        self.released, self.position, self.completed = released, received, received
        self._uncompleted = next_on_lanes(received, lanes)

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
        """The work request of `position`, and so of all before it on its lane, has completed."""
        lane = position % self.lanes
        if not self._uncompleted[lane] <= position + self.lanes or position >= self.position:
            raise LocalProtocolError(
                f"position {position} completed after {self._uncompleted[lane]} of {self.position}"
            )
        self._uncompleted[lane] = position + self.lanes
        self.completed = min(self._uncompleted)


class RecvRing:
    """The receiver's view: which slot comes next, which are leased, and when credit is due."""

    __slots__ = ("_done", "announced", "epoch", "lanes", "next_on", "received", "released", "slots", "spare_epoch")

    def __init__(self, slots: int, lanes: int = 1, epoch: int = 0) -> None:
        _check_slots(slots)
        self.slots = slots
        self.lanes = lanes
        self.next_on = list(range(lanes))
        """Position of the next frame to arrive, for each lane."""
        self.epoch = epoch
        """Number of the memory that frames arrive in; a resize adds one."""
        self.spare_epoch = epoch
        """Number of the newest memory on offer, to which the sender may turn at any frame."""
        self.received = 0
        """Position of the next frame to take: all before it have arrived."""
        self.released = 0
        """Released without a gap from the beginning."""
        self.announced = 0
        """What the sender was last told of `released`."""
        self._done: set[int] = set()
        """Positions released with a gap before them."""

    def resume(self, slots: int, lanes: int, announced: int) -> None:
        """Another connection takes over, whose sender was told that `announced` are released. The memory is another, too, with a
        new epoch. Raises RemoteProtocolError if more frames are held than a ring of `slots` can have."""
        _check_slots(slots)
        if self.received - announced > slots:
            raise RemoteProtocolError(
                f"{self.received - announced} frames are held, too many for a ring of {slots} slots"
            )
        self.slots, self.lanes, self.announced = slots, lanes, announced
        self.next_on = next_on_lanes(self.received, lanes)
        self.epoch = self.spare_epoch = self.spare_epoch + 1

    def begin_at(self, position: int) -> None:
        """The sender has frames from `position` on only. Before anything arrived."""
        self.received = self.released = self.announced = position
        self.next_on = next_on_lanes(position, self.lanes)

    def __repr__(self) -> str:
        return (
            f"<RecvRing received={self.received} released={self.released} announced={self.announced} "
            f"slots={self.slots} epoch={self.epoch}>"
        )

    def offer(self) -> int:
        """New memory is being offered to the sender; returns its epoch."""
        self.spare_epoch += 1
        return self.spare_epoch

    def check_arrival(self, lane: int, slot: int) -> int:
        """Whether a frame may have arrived in `slot` over `lane` now. Returns its position and changes nothing: add `lanes` to
        `next_on[lane]` when it is noted. Raises RemoteProtocolError."""
        position = self.next_on[lane]
        if slot != position % self.slots:
            raise RemoteProtocolError(f"the sender wrote slot {slot}, but slot {position % self.slots} comes next")
        if position - self.announced >= self.slots:
            raise RemoteProtocolError("the sender wrote a frame without credit")
        return position

    def check_epoch(self, epoch: int) -> int:
        """Whether the frame at `received` may lie in the memory of epoch `epoch` (mod 64). Returns the full number and changes
        nothing: set `epoch` and `received` when the frame is good. Raises RemoteProtocolError."""
        for full in range(self.epoch, self.spare_epoch + 1):
            if full % EPOCH_MODULUS == epoch:
                return full
        raise RemoteProtocolError(
            f"the sender wrote into epoch {epoch}; {self.epoch} to {self.spare_epoch} are on offer"
        )

    def release(self, position: int) -> None:
        """The lease on `position` has ended. Repeating it changes nothing."""
        if position >= self.received:
            raise LocalProtocolError(f"position {position} is not leased")
        if position > self.released:
            self._done.add(position)
        elif position == self.released:
            self.released = position + 1
        while self.released in self._done:
            # In this order: Ctrl-C in between leaves a number behind that is passed already.
            self.released += 1
            self._done.discard(self.released - 1)

    def credit_due(self, *, asked: bool = False) -> bool:
        """Whether to tell the sender now: half of the ring was released since, or it may be starved, or it has asked."""
        new = self.released - self.announced
        return new > 0 and (2 * new >= self.slots or self.received - self.announced >= self.slots or asked)

    def on_announced(self, released: int) -> None:
        self.announced = released
