"""What one receiver is to get: the frames that were written to it and not released, those that wait to be written, and what
becomes of a frame when there is no room for it.

A frame is held from the moment it is accepted until the receiver has released it. When a connection breaks, what the receiver has
not received waits to be written again, in its order, over the next one.

All methods are called with the sender's lock held. Ctrl-C may come at any call: whatever is done in several steps may be repeated.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from rdmaxfer.cm.messages import Progress
from rdmaxfer.ring import SendRing
from rdmaxfer.send_link import SendLink
from rdmaxfer.stream import Origin, Stream

if TYPE_CHECKING:
    from rdmaxfer.outgoing import Outgoing

WhenFull = Literal["block", "drop_newest", "drop_oldest", "latest"]

WHEN_FULL: Final = ("block", "drop_newest", "drop_oldest", "latest")

LATEST_WINDOW: Final = 2
"""Frames that a receiver with "latest" may have: the one in its hands, and the next."""

DROPPED, ELSEWHERE, TOO_LARGE = 1, 2, 4
"""See rdmaxfer.frame.GAP_REASONS."""

MAX_DROP_RANGES: Final = 4096
"""Ranges of dropped frames that are kept to be asked for, of each stream; then the oldest are merged."""


class Dropped(NamedTuple):
    """Frames that a receiver did not get: numbers `first_seq` to `last_seq`, both included, as far as they were for it."""

    peer: str
    first_seq: int
    last_seq: int
    reason: str
    """"when_full", or "too_large": above the limit of a receiver that was restarted with a lower one."""


class SendStream(Stream[SendLink]):
    """See the module. `capacity`: how many frames to hold for a receiver that is away, or (drop_oldest) slow."""

    def __init__(self, id_: bytes, origin: Origin | None, when_full: WhenFull, capacity: int) -> None:
        super().__init__(id_, origin)
        self.when_full = when_full
        self._capacity = capacity
        self._pending_most = capacity if when_full in ("block", "drop_oldest") else 1
        self.ring = SendRing(1)
        self.max_slot_bytes = 0
        """The largest payload that the receiver takes, as far as it has said."""
        self.written: deque[Outgoing] = deque()
        """Frames at the positions from `ring.released` to `ring.position`: in the receiver's memory, or on their way there."""
        self.pending: deque[Outgoing] = deque()
        """Frames that are to be written next, oldest first."""
        self.latest_seq = -1
        """Of the latest frame offered."""
        self.lends = False
        """Whether the receiver reads frames in our own memory, and so may go on to do so when this has ended."""
        self.dropped = 0
        """Frames dropped, in all."""
        self._drops: deque[tuple[int, int, str]] = deque()
        self._latest_dropped = -1
        self._gaps: dict[int, int] = {}
        """Why numbers are missing right before the frame of that number."""
        self._gap_next = 0
        """... and before the next one to come."""

    @property
    def holds(self) -> int:
        """Frames held for this receiver: not written, or not released."""
        return len(self.written) + len(self.pending)

    @property
    def unreleased(self) -> tuple[int, ...]:
        """Their sequence numbers."""
        return tuple(out.seq for queue in (self.written, self.pending) for out in queue)

    @property
    def oldest_seq(self) -> int | None:
        """Of the oldest frame that the receiver has not released; None if there is none."""
        queue = self.written or self.pending
        return queue[0].seq if queue else None

    @property
    def credit(self) -> int:
        """Frames that could be written now."""
        if self.link is None or not self.link.live or self.pending:
            return 0
        return min(self.ring.credit, self._window - self.ring.outstanding)

    @property
    def _window(self) -> int:
        return min(self.ring.slots, LATEST_WINDOW) if self.when_full == "latest" else self.ring.slots

    def _can_write(self, nbytes: int) -> bool:
        link = self.link
        return (
            link is not None
            and link.live
            and not link.leaving
            and nbytes <= link.slot_bytes
            and self.ring.outstanding < self._window
            and link.can_push(nbytes)
        )

    def has_room(self, nbytes: int) -> bool:
        """Whether a frame of `nbytes` could be taken without dropping one."""
        if not self.pending and self.link is not None and self.when_full == "block":
            return self._can_write(nbytes)
        return self.holds < self._capacity if self.when_full == "block" else len(self.pending) < self._pending_most

    def offer(self, out: Outgoing, *, balanced: bool) -> None:
        """Take a frame: write it, or keep it; drop one if there is no room. Harmless to repeat."""
        seq = out.seq
        if self.latest_seq == seq:
            return
        if self._gap_next or balanced:
            gap = self._gap_next
            if balanced and seq != self.latest_seq + 1:
                gap |= ELSEWHERE
            if gap:
                self._gaps[seq] = gap
        link = self.link
        # Ctrl-C may have come behind the write.
        written = link is not None and link.latest_seq == seq
        if not written and not self.pending and link is not None and self._can_write(out.payload_bytes):
            link.push(out, self._gaps.get(seq, 0))
            written = link.latest_seq == seq  # if not, it broke
        if not written and (not self.pending or self.pending[-1] is not out):
            if len(self.pending) >= self._pending_most and self.when_full != "block":
                if self.when_full == "drop_newest":
                    self._note_drop(seq, "when_full")
                    self._gap_next = self._gaps.get(seq, 0) | DROPPED
                    self._gaps.pop(seq, None)
                    self.latest_seq = seq
                    return
                self._drop_oldest(out, DROPPED, "when_full")
            self.pending.append(out)
        self._gap_next = 0
        self.latest_seq = seq

    def pump(self) -> bool:
        """Write what waits, as far as there is room. True if something waits that can't be written before the slots are larger:
        `pending[0]`."""
        while self.pending:
            out = self.pending[0]
            link = self.link
            if link is None or not link.live:
                return False
            if link.latest_seq != out.seq:
                if self.max_slot_bytes and out.payload_bytes > self.max_slot_bytes:
                    self._drop_oldest(None, TOO_LARGE, "too_large")
                    continue
                if out.payload_bytes > link.slot_bytes:
                    return True
                if not self._can_write(out.payload_bytes):
                    return False
                link.push(out, self._gaps.get(out.seq, 0))
                if not link.live:
                    return False
            self.pending.popleft()
        return False

    def drop_first(self, reason: int, name: str) -> None:
        """The oldest frame that waits can't be had by the receiver."""
        self._drop_oldest(None, reason, name)

    def _drop_oldest(self, behind: Outgoing | None, reason: int, name: str) -> None:
        """Drop `pending[0]`; `behind` is the frame that will follow when nothing else waits."""
        oldest = self.pending[0]
        self._note_drop(oldest.seq, name)
        gap = self._gaps.get(oldest.seq, 0) | reason
        follower = self.pending[1] if len(self.pending) > 1 else behind
        if follower is not None:
            self._gaps[follower.seq] = self._gaps.get(follower.seq, 0) | gap
        else:
            self._gap_next |= gap
        self._gaps.pop(oldest.seq, None)
        self.pending.popleft()

    def _note_drop(self, seq: int, reason: str) -> None:
        if self._latest_dropped == seq:
            return
        if self._drops and self._drops[-1][1] == seq - 1 and self._drops[-1][2] == reason:
            self._drops[-1] = (self._drops[-1][0], seq, reason)
        else:
            self._drops.append((seq, seq, reason))
        if len(self._drops) > MAX_DROP_RANGES:
            (first, _, reason), (_, last, _) = self._drops[0], self._drops[1]
            self._drops[1] = (first, last, reason)
            self._drops.popleft()
        self.dropped += 1
        self._latest_dropped = seq

    def take_drops(self) -> list[Dropped]:
        """What was dropped since the latest call."""
        taken = [Dropped(self.peer, *drop) for drop in self._drops]
        self._drops.clear()
        return taken

    def on_credit(self, released: int) -> None:
        """The receiver has released that many, from the beginning. Raises RemoteProtocolError."""
        self.ring.on_credit(released)
        self._let_go()

    def _let_go(self) -> None:
        # A link counts a position before it adds its frame here, so there are never more frames than positions.
        while len(self.written) > self.ring.outstanding:
            self._gaps.pop(self.written[0].seq, None)
            self.written.popleft()

    def progress(self) -> Progress | None:
        if not self.waits:
            return None  # the first connection
        return Progress(released=self.ring.released, received=self.ring.position)

    def resume(self, slots: int, lanes: int, start: Progress) -> None:
        """Another link takes over: what the receiver has not received is to be written again. Raises RemoteProtocolError."""
        self.ring.check_resume(start.released, start.received, slots)
        again = self.ring.position - start.received
        # `written` and `pending` first, so that nothing is in neither of them.
        for _ in range(again):
            if not self.pending or self.pending[0] is not self.written[-1]:
                self.pending.appendleft(self.written[-1])
            self.written.pop()
        self.ring.resume(slots, lanes, start.released, start.received)
        self._let_go()

    def end(self) -> None:
        """Nothing more goes to this receiver: let go of all frames. What a device still reads from is held by the link."""
        self.pending.clear()
        if self.lends:
            for out in self.written:
                for piece in out.pieces:
                    piece.source.lent = True
        self.written.clear()
