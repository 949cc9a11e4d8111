"""What comes from one sender: the frames that have arrived, which of them are held, and which numbers are missing.

A frame that is held outlives the connection it came by. The next connection is told which frames were received, and gives credit
for those that are released by then.

All methods but `release` are called with the receiver's lock held.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from rdmaxfer.cm.messages import Progress
from rdmaxfer.frame import GAP_REASONS
from rdmaxfer.lease import FrameLease, Gap
from rdmaxfer.recv_link import RecvLink
from rdmaxfer.ring import RecvRing
from rdmaxfer.stream import Origin, Stream

if TYPE_CHECKING:
    from rdmaxfer.lease import Frame


class Inbox(Protocol):
    """What a RecvStream needs of its receiver."""

    def frame_arrived(self, frame: Frame, tag: tuple[int, int]) -> None: ...
    def release(self, stream: RecvStream, lease: FrameLease) -> None: ...
    def lent(self) -> None: ...
    def given_back(self) -> None: ...


class RecvStream(Stream[RecvLink]):
    """See the module."""

    def __init__(self, id_: bytes, origin: Origin | None, inbox: Inbox) -> None:
        super().__init__(id_, origin)
        self.ring = RecvRing(1)
        self.leases: dict[int, FrameLease] = {}
        self.abandoned: deque[FrameLease] = deque()
        """Leases that ended by garbage collection; their slots are given back at the next occasion."""
        self.node = b""
        """The sender's own id."""
        self.seq_before_first = -1
        """The latest number known of this sender when the stream began; for gaps."""
        self.received_seq = -1
        """Frames up to this number were received over an earlier stream; the sender may not know it, and send them again."""
        self._latest = (-1, -1)
        self._before = -1
        self._inbox = inbox

    def successor(self) -> RecvStream:
        """A new stream in the place of this one, which its sender has forgotten."""
        stream = RecvStream(self.id, self.origin, self._inbox)
        stream.node, stream.peer = self.node, self.peer
        stream.attempt = self.attempt
        stream.waits, stream.lost, stream.reconnect_s = self.waits, self.lost, self.reconnect_s
        stream.received_seq = stream.seq_before_first = max(self.latest_seq, self.received_seq)
        return stream

    def progress(self) -> Progress | None:
        self.collect()
        if not self.waits:
            return None  # the first connection
        return Progress(released=self.ring.released, received=self.ring.received)

    def resume(self, slots: int, lanes: int, start: Progress) -> None:
        """Another link takes over, from `start`. Raises RemoteProtocolError."""
        if not self.ring.received and not self.leases:
            self.ring = RecvRing(slots, lanes)
            self.ring.begin_at(start.received)
        else:
            self.ring.resume(slots, lanes, start.released)

    @property
    def latest_seq(self) -> int:
        """The number of the latest frame; -1 before the first."""
        return self._latest[1]

    def seq_before(self, position: int) -> int:
        """The number before the one at `position`, also when asked again; -1 for none."""
        return self._before if self._latest[0] == position else self._latest[1]

    def note(self, position: int, seq: int) -> None:
        """The frame at `position` has this number. Repeated, as after Ctrl-C, it changes nothing."""
        self._before = self.seq_before(position)
        self._latest = (position, seq)

    def gap_before(self, position: int, seq: int, reasons: int) -> Gap | None:
        """What is missing right before the frame at `position`, with number `seq`."""
        before = self.seq_before(position)
        if before < 0:
            before = self.seq_before_first
            if before < 0:
                return None
        if seq <= before + 1:
            return None
        names = tuple(name for bit, name in GAP_REASONS.items() if reasons & bit)
        return Gap(before + 1, seq - 1, names or ("not_connected",))

    def deliver(self, frame: Frame, tag: tuple[int, int]) -> None:
        self._inbox.frame_arrived(frame, tag)

    def release(self, lease: FrameLease) -> None:
        """A lease ended by `Frame.release`: called by users' threads, takes the receiver's lock."""
        self._inbox.release(self, lease)

    def lent(self) -> None:
        """A frame of this stream is read by somebody else, too."""
        self._inbox.lent()

    def given_back(self) -> None:
        """It is not any more. Takes no lock."""
        self._inbox.given_back()

    def finish(self, lease: FrameLease) -> None:
        """Give a leased slot back, and credit where it is due."""
        if lease.in_use:
            return  # whoever has it will tell
        # A position not received yet: Ctrl-C came while its frame was being made, and it is about to be made again.
        if self.leases.get(lease.position) is lease and lease.position < self.ring.received:
            self.ring.release(lease.position)
            link = self.link
            if link is not None and not link.torn_down:
                link.give_credit()
            self.leases.pop(lease.position, None)

    def collect(self) -> None:
        """Give back the slots of frames that were dropped without a release."""
        while self.abandoned:
            self.finish(self.abandoned.popleft())

    def revoke_leases(self) -> None:
        """The receiver is closing: frames still held become errors."""
        for lease in self.leases.values():
            lease.revoke()
        self.leases.clear()
