"""One connection between a sender and a receiver: owns its queue pair and memory, drives ring and endpoint.

A link is passive: its node calls it with the node's lock held, and gives it the completions that the node polled. It never waits.

Ctrl-C may raise KeyboardInterrupt at any call, and the program may go on afterwards. So a completion is handled in such an
order that handling it again, from the start, is harmless (look and build first, change state last, by plain assignments), and
`push` asks the endpoint, whose count is kept in C, whether the frame went out.
"""

from __future__ import annotations

import enum
import logging
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rdmaxfer import frame as framing
from rdmaxfer import inband
from rdmaxfer.cm.messages import RingAddress
from rdmaxfer.errors import PeerLost, RdmaxferError, RemoteProtocolError
from rdmaxfer.lease import Frame, FrameLease
from rdmaxfer.memory import Buffer
from rdmaxfer.ring import RecvRing, SendRing

if TYPE_CHECKING:
    from rdmaxfer.fabric.verbs import Endpoint, ProtectionDomain
    from rdmaxfer.staging import Source

log = logging.getLogger("rdmaxfer")

EXTRA_RECVS = 4
"""Receives posted beyond one a slot: for BYE and resize messages."""


def send_depth(slots: int) -> int:
    """Work requests that a link's send queue holds: two a slot, and enough to split a large frame where max_msg_sz is small."""
    return max(64, 2 * slots + 16)


def recv_depth(slots: int) -> int:
    return slots + EXTRA_RECVS


class LinkState(enum.Enum):
    OPENING = "opening"
    READY = "ready"
    ENDED = "ended"
    """The peer said goodbye."""
    FAILED = "failed"


class Completion(Protocol):
    """A polled work completion, as the native core lays it out."""

    wr_id: int
    status: int
    byte_len: int
    imm: int
    has_imm: int
    vendor_err: int
    is_recv: int


class Link:
    """What both directions share."""

    def __init__(self, session: bytes, peer: str, endpoint: Endpoint, owned: ExitStack) -> None:
        self.session = session
        self.peer = peer
        self.endpoint = endpoint
        self.state = LinkState.OPENING
        self.error: RdmaxferError | None = None
        self.reason = ""
        """Why this fabric, device and GID were chosen."""
        self.chosen_here = False
        """Whether this side asked for the connection (`connect`), rather than waited for it (`bind`)."""
        self.torn_down = False
        self._owned = owned
        self._handled = (-1, -1)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.state.value} with {self.peer}>"

    @property
    def live(self) -> bool:
        return self.state is LinkState.READY

    def fail(self, error: RdmaxferError) -> None:
        """The link is broken; the first error counts."""
        if self.state in (LinkState.OPENING, LinkState.READY):
            self.state = LinkState.FAILED
            self.error = error

    def end(self) -> None:
        """The peer said goodbye."""
        if self.state in (LinkState.OPENING, LinkState.READY):
            self.state = LinkState.ENDED

    def handle(self, wc: Completion, tag: tuple[int, int]) -> None:
        """Take one completion; `tag` is its own number, by which a repeated call is known. Errors of the peer or the device
        end the link; they don't raise."""
        if tag == self._handled:
            return
        try:
            if wc.status:
                if self.state is LinkState.READY:
                    self.fail(self._completion_error(wc))
            elif wc.is_recv:
                self._on_recv(wc, tag)
            else:
                self._on_sent(wc)
        except RemoteProtocolError as error:
            log.warning("dropping the connection with %s: %s", self.peer, error)
            self.fail(error)
        except RdmaxferError as error:
            self.fail(error)

    def after_poll(self) -> None:
        """All completions of one poll were handled."""

    def _completion_error(self, wc: Completion) -> RdmaxferError:
        from rdmaxfer.fabric.native import completion_error

        return PeerLost(f"the connection with {self.peer} broke: {completion_error(wc.status, wc.vendor_err)}")

    def _on_recv(self, wc: Completion, tag: tuple[int, int]) -> None:
        raise NotImplementedError

    def _on_sent(self, wc: Completion) -> None:
        raise NotImplementedError

    def teardown(self, timeout_s: float) -> None:
        """Drain and destroy the queue pair, unregister the memory. The caller keeps everybody else away from this link."""
        if self.torn_down:
            return
        self.torn_down = True
        if self.state in (LinkState.OPENING, LinkState.READY):
            self.state = LinkState.ENDED
        try:
            self.endpoint.drain(timeout_s)
        finally:
            self._owned.close()


class SendLink(Link):
    """The sender's side: writes frames into the receiver's ring."""

    def __init__(self, session: bytes, peer: str, endpoint: Endpoint, owned: ExitStack, pd: ProtectionDomain) -> None:
        super().__init__(session, peer, endpoint, owned)
        self.pd = pd
        self.ring = SendRing(1)
        self.remote: RingAddress | None = None
        self.max_slot_bytes = 0
        self.resize_wanted = 0
        """Slot bytes asked for and not yet granted; 0 when no resize is under way."""
        self.resize_error: RdmaxferError | None = None
        self._credit_asked_at = 0
        self.credits_received = 0
        self.said_bye = False
        self._headers = Buffer(0)
        self._header_view = self._headers.view(0, 0)
        self._header_lkey = 0
        self._quarter = 1
        self._depth = 0
        self._unsignalled = 0
        self._in_flight: deque[_Posted] = deque()
        self._posted = 0
        self._completed = 0
        self._recvs_due: list[int] = []
        self.latest_seq = -1
        """Sequence number of the latest frame written."""
        self.seqs: deque[int] = deque()
        """Sequence numbers of frames written and not yet released, oldest first."""

    def prepare(self, slots: int) -> None:
        """Make room for `slots` frames on their way. Raises MemlockError, VerbsError."""
        self.ring = SendRing(slots)
        self._quarter = max(1, slots // 4)
        self._depth = send_depth(slots)
        # A header block for every slot of the ring: the headers differ by receiver, the payload is shared.
        self._headers = Buffer(slots * framing.HEADER_ROOM)
        self._header_view = self._headers.view(0, self._headers.nbytes)
        region = self.pd.register(self._headers, remote_write=False)
        self._owned.callback(region.close)
        self._header_lkey = region.lkey

    def set_remote(self, ring: RingAddress) -> None:
        """The receiver's memory to write to from now on."""
        if self.remote is not None and (ring.epoch != self.remote.epoch + 1 or ring.slots != self.remote.slots):
            raise RemoteProtocolError("the receiver offered a ring that does not follow the one in use")
        if ring.slots != self.ring.slots or ring.payload_offset != framing.HEADER_ROOM:
            raise RemoteProtocolError("the receiver offered a ring that is not as agreed")
        self.remote = ring
        if self.resize_wanted and ring.slot_bytes >= self.resize_wanted:
            self.resize_wanted = 0

    @property
    def slot_bytes(self) -> int:
        return self.remote.slot_bytes if self.remote is not None else 0

    def can_push(self, nbytes: int) -> bool:
        """Whether a frame of `nbytes` could be written now."""
        return self.ring.can_take() and self._room >= self.endpoint.wr_count(nbytes + framing.HEADER_ROOM)

    @property
    def _room(self) -> int:
        return self._depth - (self._posted - self._completed)

    def fits_queue(self, nbytes: int) -> bool:
        """Whether a frame of `nbytes` is few enough work requests for the send queue at all."""
        return self.endpoint.wr_count(nbytes + framing.HEADER_ROOM) <= self._depth

    def push(
        self,
        kind: framing.FrameType,
        source: Source,
        address: int,
        *,
        seq: int,
        captured_ns: int,
        pushed_ns: int,
        metadata: bytes,
    ) -> None:
        """Write one frame. The caller has seen `can_push`; failures end the link."""
        remote = self.remote
        assert remote is not None
        ring = self.ring
        position = ring.position
        slot = position % remote.slots
        end = (slot + 1) * framing.HEADER_ROOM
        self.endpoint.clear_posted()
        try:
            lkey = source.lkey(self.pd) if kind.payload_bytes else 0
            header_bytes = kind.pack_into(
                self._header_view,
                end,
                epoch=remote.epoch,
                slot=slot,
                seq=seq,
                position=position,
                captured_ns=captured_ns,
                pushed_ns=pushed_ns,
                metadata=metadata,
            )
            signaled = self._record(self.endpoint.wr_count(header_bytes + kind.payload_bytes), position, source)
            if not self.seqs or self.seqs[-1] != seq:
                self.seqs.append(seq)
            imm = inband.pack_frame_imm(remote.epoch, header_bytes, slot)
            ring.take()
            self.latest_seq = seq
            self.endpoint.write(
                self._headers.address + end - header_bytes,
                header_bytes,
                self._header_lkey,
                address,
                kind.payload_bytes,
                lkey,
                remote.address + slot * remote.slot_stride + framing.HEADER_ROOM - header_bytes,
                remote.rkey,
                imm,
                self._posted,
                signaled,
            )
        except RdmaxferError as error:
            self._broke(error)
        except BaseException:
            if not self.endpoint.last_posted:
                ring.position = position
                self.latest_seq = -1
            raise

    def _record(self, wrs: int, position: int, source: Source | None, *, signaled: bool = False) -> bool:
        """Note work requests about to be posted; says whether the last of them must be signalled."""
        unsignalled = self._unsignalled + wrs
        if not signaled:
            signaled = (position + 1) % self._quarter == 0 or unsignalled * 4 >= self._depth
        posted = _Posted(self._posted + wrs, position, source)
        self._in_flight.append(posted)
        if source is not None:
            source.in_flight += 1
            posted.counted = True
        self._unsignalled = 0 if signaled else unsignalled
        self._posted += wrs
        return signaled

    def _broke(self, error: RdmaxferError) -> None:
        self.fail(PeerLost(f"the connection with {self.peer} broke: {error}"))

    def fence(self) -> None:
        """Make sure that the completion of everything posted so far will be seen: an empty, signalled WRITE ends the queue."""
        if self._unsignalled and self.live and self._room:
            self._record(1, -1, None, signaled=True)
            try:
                self.endpoint.write_empty(self._posted)
            except RdmaxferError as error:
                self._broke(error)

    def ask_credit(self) -> None:
        """Ask the receiver to tell at once what it releases, rather than to wait until a quarter of the ring has come together."""
        if self._credit_asked_at != self.ring.position and self.live and self._write_imm(inband.pack_credit_imm()):
            self._credit_asked_at = self.ring.position

    def ask_resize(self, nbytes: int) -> bool:
        """Ask the receiver, in band, for larger slots (it answers with RESIZE on its control socket). False: no room now."""
        return self._write_imm(inband.pack_resize_imm(nbytes))

    def say_bye(self) -> bool:
        """Tell the receiver, in band and after all frames, that no more come. False while the send queue is full."""
        if not self.said_bye and self.live:
            self.said_bye = self._write_imm(inband.pack_bye_imm())
            return self.said_bye
        return True

    def _write_imm(self, imm: int) -> bool:
        if not self._room:
            return False
        self._record(1, -1, None, signaled=True)
        try:
            self.endpoint.write_imm(imm, self._posted)
        except RdmaxferError as error:
            self._broke(error)
        return True

    @property
    def all_completed(self) -> bool:
        return not self._in_flight

    def _on_sent(self, wc: Completion) -> None:
        while self._in_flight and self._in_flight[0].ordinal <= wc.wr_id:
            posted = self._in_flight[0]
            if posted.position >= 0:
                self.ring.on_completed(posted.position)
            self._completed = posted.ordinal
            posted.finish()
            self._in_flight.popleft()

    def _on_recv(self, wc: Completion, tag: tuple[int, int]) -> None:
        message = inband.unpack_message(self.endpoint.recv_payload(wc.wr_id, wc.byte_len))
        if wc.wr_id not in self._recvs_due:
            self._recvs_due.append(wc.wr_id)
        if message.kind is inband.MessageKind.RESIZE_REFUSED:
            self.refuse_resize(message.value)
            return
        self.ring.on_credit(message.value)
        while len(self.seqs) > self.ring.outstanding:
            self.seqs.popleft()
        if message.kind is inband.MessageKind.BYE:
            self.end()
        else:
            self.credits_received += 1

    def refuse_resize(self, limit: int, error: RdmaxferError | None = None) -> None:
        """The receiver can't give larger slots."""
        from rdmaxfer.errors import FrameTooLarge

        self.resize_wanted = 0
        self.resize_error = error or FrameTooLarge(
            f"the receiver {self.peer} could not make room for larger frames: {limit} bytes is what it can take now.",
            fix="give the receiver a larger max_frame_bytes, fewer slots, or a higher memlock limit (`ulimit -l`).",
        )

    def after_poll(self) -> None:
        if self._recvs_due and self.live:
            due, self._recvs_due = self._recvs_due, []
            try:
                self.endpoint.repost_recv(due)
            except RdmaxferError as error:
                self.fail(error)

    def teardown(self, timeout_s: float) -> None:
        super().teardown(timeout_s)
        # The queue pair is gone: nothing reads from the memory any more.
        while self._in_flight:
            self._in_flight.popleft().finish()


class _Posted:
    """Work requests that were posted and not yet seen completed: up to which ordinal, which frame (-1: none), what they read."""

    __slots__ = ("counted", "ordinal", "position", "source")

    def __init__(self, ordinal: int, position: int, source: Source | None) -> None:
        self.ordinal = ordinal
        self.position = position
        self.source = source
        self.counted = False
        """Whether `source.in_flight` counts this."""

    def finish(self) -> None:
        source = self.source
        if source is not None and self.counted:
            self.counted = False
            source.in_flight -= 1
            if not source.in_flight:
                source.idle()


class _RingMemory:
    """The memory of one epoch of a receiver's ring."""

    __slots__ = ("buffer", "region", "slot_bytes", "stride", "view")

    def __init__(self, pd: ProtectionDomain, slots: int, slot_bytes: int) -> None:
        page = 4096
        self.slot_bytes = slot_bytes
        self.stride = framing.HEADER_ROOM + -(-slot_bytes // page) * page
        self.buffer = Buffer(slots * self.stride)
        self.region = pd.register(self.buffer, remote_write=True)
        self.view = self.buffer.view(0, self.buffer.nbytes).toreadonly()


class Inbox(Protocol):
    """What a RecvLink needs of its receiver."""

    def frame_arrived(self, frame: Frame, tag: tuple[int, int]) -> None: ...
    def resize_asked(self, link: RecvLink, wanted_bytes: int) -> None: ...
    def release(self, link: RecvLink, lease: FrameLease) -> None: ...


class RecvLink(Link):
    """The receiver's side: owns the ring, turns completions into leased frames, gives credit."""

    def __init__(
        self, session: bytes, peer: str, endpoint: Endpoint, owned: ExitStack, pd: ProtectionDomain, inbox: Inbox
    ) -> None:
        super().__init__(session, peer, endpoint, owned)
        self.pd = pd
        self.abandoned: deque[FrameLease] = deque()
        """Leases that ended by garbage collection; their slots are given back at the next occasion."""
        self.leases: dict[int, FrameLease] = {}
        self.ring = RecvRing(1)
        self.writes_received = 0
        self.credits_sent = 0
        self.resizing = False
        """Whether a larger ring is being offered to a bound sender."""
        self.wanted_bytes = 0
        """The latest slot size that the sender asked for in band, or by its answer to RENEW."""
        self._inbox = inbox
        self._memory: dict[int, _RingMemory] = {}
        self._depth = 0
        self._unsignalled = 0
        self._sent = 0
        self._sent_completed = 0
        self._consumed = 0
        self._reposted = 0
        self._repost_due = False
        self._credit_asked = -1
        """The count of frames received when the sender asked for credit; -1: it has not."""
        self._credit_seen = 0
        owned.callback(self._unregister)

    def make_ring(self, slots: int, slot_bytes: int) -> RingAddress:
        """Register the first ring. Raises MemlockError, VerbsError."""
        self.ring = RecvRing(slots)
        self._depth = send_depth(slots)
        return self._offer(0, slot_bytes)

    def make_larger_ring(self, slot_bytes: int) -> RingAddress:
        """Register a ring with larger slots beside those in use; the sender turns to it with its next frame."""
        address = self._offer(self.ring.spare_epoch + 1, slot_bytes)
        self.ring.offer()
        return address

    @property
    def offers_open(self) -> int:
        """Rings offered that the sender has not turned to yet."""
        return self.ring.spare_epoch - self.ring.epoch

    @property
    def slot_bytes(self) -> int:
        """Payload bytes that a slot of the newest ring holds."""
        return self._memory[max(self._memory)].slot_bytes if self._memory else 0

    def _offer(self, epoch: int, slot_bytes: int) -> RingAddress:
        memory = _RingMemory(self.pd, self.ring.slots, slot_bytes)
        self._memory[epoch] = memory
        return RingAddress(
            address=memory.buffer.address,
            rkey=memory.region.rkey,
            slots=self.ring.slots,
            slot_bytes=slot_bytes,
            slot_stride=memory.stride,
            payload_offset=framing.HEADER_ROOM,
            epoch=epoch,
        )

    def _on_recv(self, wc: Completion, tag: tuple[int, int]) -> None:
        if not wc.has_imm:
            raise RemoteProtocolError("the sender sent a message where only frames are expected")
        imm = inband.unpack_imm(wc.imm)
        if imm.kind is inband.ImmKind.FRAME:
            self._on_frame(imm, tag)
            return
        if imm.kind is inband.ImmKind.BYE:
            self.end()
        elif imm.kind is inband.ImmKind.CREDIT_WANTED:
            self._credit_asked = self.ring.received
        else:
            self._inbox.resize_asked(self, imm.wanted_bytes)
        self._consumed += 1
        self._repost_due = True
        self._handled = tag
        if imm.kind is inband.ImmKind.CREDIT_WANTED:
            self.give_credit()

    def after_poll(self) -> None:
        # Receives that frames took are posted again along with their credit; those of other messages have none to wait for.
        if self._repost_due:
            self._repost_due = False
            try:
                self._repost()
            except RdmaxferError as error:
                self.fail(error)

    def _repost(self) -> None:
        due = self._consumed - self._reposted
        if due:
            self._reposted += due
            self.endpoint.repost_recv([0] * due)

    def _on_frame(self, imm: inband.Imm, tag: tuple[int, int]) -> None:
        position, epoch = self.ring.check_frame(imm.epoch, imm.slot)
        memory = self._memory[epoch]
        start = imm.slot * memory.stride + framing.HEADER_ROOM
        # Copied once, then checked: the sender could change the original at any time.
        block = bytes(memory.view[start - imm.header_bytes : start])
        header = framing.unpack(block, epoch=epoch, slot=imm.slot, position=position, slot_bytes=memory.slot_bytes)
        # The flat array is the base of every view of the frame: when it goes, the lease ends. And as it is made from a read-only
        # memoryview, none of them can be made writable.
        flat = np.frombuffer(memory.view, np.uint8, header.payload_bytes, start)
        array: np.ndarray[Any, Any] = np.ndarray(header.shape, header.dtype, flat)
        if epoch != self.ring.epoch:
            self._leave_older(epoch)
        lease = self.leases[position] = FrameLease(self, position)
        self._inbox.frame_arrived(lease.issue(header, array, flat), tag)
        ring = self.ring
        ring.epoch = epoch
        ring.received = position + 1
        self.writes_received += 1
        self._consumed += 1
        self._handled = tag

    def _leave_older(self, epoch: int) -> None:
        # All earlier writes have completed before this one, so nothing can arrive there any more. Leases keep the memory itself.
        for old in [number for number in self._memory if number < epoch]:
            self._memory.pop(old).region.close()

    def release(self, lease: FrameLease) -> None:
        """A lease ended by `Frame.release`: called by users' threads, takes the receiver's lock."""
        self._inbox.release(self, lease)

    def finish(self, lease: FrameLease) -> None:
        """Give a leased slot back, and credit where it is due. With the receiver's lock held."""
        if self.leases.get(lease.position) is lease:
            self.ring.release(lease.position)
            if not self.torn_down:
                self.give_credit()
            self.leases.pop(lease.position, None)

    def collect(self) -> None:
        """Give back the slots of frames that were dropped without a release."""
        while self.abandoned:
            self.finish(self.abandoned.popleft())

    def give_credit(self) -> None:
        if self.ring.credit_due(asked=self.ring.announced < self._credit_asked) and self.live:
            self._send(inband.MessageKind.CREDIT, self.ring.released)

    @property
    def credit_kept(self) -> bool:
        """Whether slots were released that the sender was not told of, because they are few."""
        return self.live and self.ring.released > self.ring.announced

    def give_kept_credit(self) -> None:
        """Tell the sender what has been kept from it for a while, so that its `flush` also ends if nobody polls here."""
        if self.credit_kept:
            if self.ring.released == self._credit_seen:
                self._send(inband.MessageKind.CREDIT, self.ring.released)
            self._credit_seen = self.ring.released

    def say_bye(self) -> None:
        """Tell the sender that this receiver leaves, and what it has released."""
        if self.live:
            self._send(inband.MessageKind.BYE, self.ring.released)

    def refuse_resize(self) -> None:
        """Tell the sender, in band, that its frame can't be had."""
        if self.live:
            self._send(inband.MessageKind.RESIZE_REFUSED, self.slot_bytes)

    def _send(self, kind: inband.MessageKind, value: int) -> None:
        if self._sent - self._sent_completed >= self._depth:
            return  # tried again when a completion has made room
        try:
            self._repost()  # before the credit, which promises that there is a receive for every frame
            self._unsignalled += 1
            self._sent += 1
            signaled = kind is not inband.MessageKind.CREDIT or self._unsignalled * 4 >= self._depth
            if signaled:
                self._unsignalled = 0
            self.endpoint.send_inline(inband.pack_message(kind, value), self._sent, signaled)
        except RdmaxferError as error:
            self.fail(PeerLost(f"the connection with {self.peer} broke: {error}"))
            return
        if kind is inband.MessageKind.CREDIT:
            self.ring.on_announced(value)
            self.credits_sent += 1

    def _on_sent(self, wc: Completion) -> None:
        self._sent_completed = wc.wr_id
        self.give_credit()

    def revoke_leases(self) -> None:
        """The receiver is closing: frames still held become errors."""
        for lease in self.leases.values():
            lease.revoke()
        self.leases.clear()

    def _unregister(self) -> None:
        while self._memory:
            self._memory.popitem()[1].region.close()
