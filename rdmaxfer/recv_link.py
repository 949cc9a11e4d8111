"""The receiver's side of a connection: owns the ring, turns completions into leased frames, gives credit. See `rdmaxfer.link`
for the rules."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from rdmaxfer import frame as framing
from rdmaxfer import inband
from rdmaxfer.cm.messages import RingAddress
from rdmaxfer.errors import PeerLost, RdmaxferError, RemoteProtocolError
from rdmaxfer.lease import FrameLease
from rdmaxfer.link import Completion, Link, send_depth
from rdmaxfer.memory import Buffer

if TYPE_CHECKING:
    from rdmaxfer.cm.messages import Progress
    from rdmaxfer.fabric.base import Endpoint, ProtectionDomain
    from rdmaxfer.recv_stream import RecvStream


PAGE = 4096


class RingMemory:
    """The memory of one epoch of a receiver's ring."""

    __slots__ = ("buffer", "region", "slot_bytes", "stride", "view")

    @staticmethod
    def nbytes_of(slots: int, slot_bytes: int) -> int:
        """What such a ring takes."""
        return slots * (framing.HEADER_ROOM + -(-slot_bytes // PAGE) * PAGE)

    def __init__(self, pd: ProtectionDomain, slots: int, slot_bytes: int, *, shared: bool = False) -> None:
        self.slot_bytes = slot_bytes
        self.stride = framing.HEADER_ROOM + -(-slot_bytes // PAGE) * PAGE
        self.buffer = Buffer(self.nbytes_of(slots, slot_bytes), shared=shared)
        self.region = pd.register(self.buffer, remote_write=True)
        self.view = self.buffer.view(0, self.buffer.nbytes).toreadonly()


class _Arrival(NamedTuple):
    """A frame that is in its slot, and was not looked at yet."""

    position: int
    imm: inband.Imm
    written_bytes: int
    tag: tuple[int, int]
    placed: tuple[bytes, memoryview] | None
    """Header and payload, if they are not in the slot."""


class Host(Protocol):
    """What a RecvLink needs of its receiver."""

    shares: bool
    """Whether other processes are to map the rings."""

    def resize_asked(self, link: RecvLink, wanted_bytes: int) -> None: ...
    def pin(self, nbytes: int) -> None: ...
    def unpin(self, nbytes: int) -> None: ...


class RecvLink(Link):
    """The receiver's side: owns the memory, turns completions into leased frames, gives credit."""

    stream: RecvStream

    def __init__(
        self,
        session: bytes,
        stream: RecvStream,
        endpoint: Endpoint,
        owned: ExitStack,
        pd: ProtectionDomain,
        host: Host,
    ) -> None:
        super().__init__(session, stream.peer, endpoint, owned)
        self.stream = stream
        self.pd = pd
        self.ring = stream.ring
        self.writes_received = 0
        self.credits_sent = 0
        self.resizing = False
        """Whether a larger ring is being registered, or offered to a bound sender."""
        self.grown: RingAddress | RdmaxferError | None = None
        """What a connecting sender is to be told at its next RESIZE."""
        self.wanted_bytes = 0
        """The latest slot size that the sender asked for in band, or by its answer to RENEW."""
        self._host = host
        self._memory: dict[int, RingMemory] = {}
        self._depth = 0
        self._unsignalled = 0
        self._sent = 0
        self._sent_completed = 0
        self._arrivals: list[_Arrival | None] = []
        """By slot: a lane may be ahead of another, and frames are taken in the order of their positions."""
        self._byes = 0
        """Bit `n`: the sender said goodbye on lane `n`."""
        self._consumed: list[int] = []
        self._reposted: list[int] = []
        self._repost_due = False
        self._credit_asked = -1
        """How many frames had been sent when the sender asked for credit; -1: it has not."""
        self._credit_seen = 0
        self._began_at = 0
        """Position of the first frame of this connection."""
        owned.callback(self._unregister)

    def resume(self, slots: int, start: Progress) -> None:
        """Go on with the stream from `start`, over the lanes of the connected endpoint. With the receiver's lock held. Raises
        RemoteProtocolError."""
        lanes = self.endpoint.lanes
        self.stream.resume(slots, lanes, start)
        self.ring = self.stream.ring
        self._began_at = self.ring.received
        self._arrivals = [None] * slots
        self._consumed, self._reposted = [0] * lanes, [0] * lanes
        self._depth = send_depth(slots)

    def make_ring(self, slot_bytes: int) -> RingAddress:
        """Register the first ring of this connection. Raises NoMemory, MemlockError, VerbsError."""
        return self._address(self.ring.epoch, self.new_memory(slot_bytes))

    def new_memory(self, slot_bytes: int) -> RingMemory:
        """Memory for a ring with such slots. Takes long if it is large; not with the receiver's lock held."""
        nbytes = RingMemory.nbytes_of(self.ring.slots, slot_bytes)
        self._host.pin(nbytes)
        try:
            return RingMemory(self.pd, self.ring.slots, slot_bytes, shared=self._host.shares)
        except BaseException:
            self._host.unpin(nbytes)
            raise

    def offer(self, memory: RingMemory) -> RingAddress:
        """A ring with larger slots, beside those in use; the sender turns to it with its next frame."""
        return self._address(self.ring.offer(), memory)

    @property
    def offers_open(self) -> int:
        """Rings offered that the sender has not turned to yet."""
        return self.ring.spare_epoch - self.ring.epoch

    @property
    def slot_bytes(self) -> int:
        """Payload bytes that a slot of the newest ring holds."""
        return self._memory[max(self._memory)].slot_bytes if self._memory else 0

    def _address(self, epoch: int, memory: RingMemory) -> RingAddress:
        self._memory[epoch] = memory
        return RingAddress(
            address=memory.buffer.address,
            rkey=memory.region.rkey,
            slots=self.ring.slots,
            slot_bytes=memory.slot_bytes,
            slot_stride=memory.stride,
            payload_offset=framing.HEADER_ROOM,
            epoch=epoch,
        )

    def _on_recv(self, wc: Completion, tag: tuple[int, int]) -> None:
        if not wc.has_imm:
            raise RemoteProtocolError("the sender sent a message where only frames are expected")
        imm, lane, ring = inband.unpack_imm(wc.imm), wc.lane, self.ring
        if imm.kind is inband.ImmKind.FRAME:
            position = ring.check_arrival(lane, imm.slot)
            placed = None if self.endpoint.in_ring else wc.placed
            self._arrivals[imm.slot] = _Arrival(position, imm, wc.byte_len, tag, placed)
            ring.next_on[lane] = position + ring.lanes
            self.writes_received += 1
            self._consumed[lane] += 1
            self._handled = tag
            return
        if imm.kind is inband.ImmKind.BYE:
            self._byes |= 1 << lane
            if self._byes + 1 == 1 << ring.lanes:
                self._take_arrivals()
                if ring.received - self._began_at != self.writes_received:
                    raise RemoteProtocolError("the sender said goodbye, and left out frames on one of its lanes")
                self.end()
        elif imm.kind is inband.ImmKind.CREDIT_WANTED:
            self._credit_asked = max(self._credit_asked, ring.next_on[lane] - ring.lanes + 1)
        else:
            self._host.resize_asked(self, imm.wanted_bytes)
        self._consumed[lane] += 1
        self._repost_due = True
        self._handled = tag
        if imm.kind is inband.ImmKind.CREDIT_WANTED:
            self.give_credit()

    def after_poll(self) -> None:
        try:
            self._take_arrivals()
            # Receives that frames took are posted again along with their credit; those of other messages have none to wait for.
            if self._repost_due and self.live:
                self._repost()
                self._repost_due = False
        except RdmaxferError as error:
            self._drop(error)

    def _repost(self) -> None:
        for lane, consumed in enumerate(self._consumed):
            due = consumed - self._reposted[lane]
            if due:
                self.endpoint.clear_reposted()
                try:
                    self.endpoint.repost_recv([0] * due, lane)
                finally:  # also after Ctrl-C: as many as are posted, neither more nor fewer
                    self._reposted[lane] += self.endpoint.last_reposted

    def _take_arrivals(self) -> None:
        """Make frames of what has arrived, as far as there is no gap."""
        ring = self.ring
        while (arrival := self._arrivals[ring.received % ring.slots]) and arrival.position == ring.received:
            index = ring.received % ring.slots
            try:
                self._take(arrival)
                self._arrivals[index] = None  # it refers to memory that did not come to the ring
            except RdmaxferError:
                self._arrivals = [None] * ring.slots  # the end of this link: nothing behind it is taken
                raise

    def _take(self, arrival: _Arrival) -> None:
        position, imm, written_bytes, tag, placed = arrival
        epoch = self.ring.check_epoch(imm.epoch)
        memory = self._memory[epoch]
        if placed is not None:
            (block, payload), start = placed, 0
            if len(block) != imm.header_bytes:
                raise RemoteProtocolError("the sender wrote a header of another length than it says")
        else:
            payload, start = memory.view, imm.slot * memory.stride + framing.HEADER_ROOM
            # Copied once, then checked: the sender could change the original at any time.
            block = bytes(payload[start - imm.header_bytes : start])
        header = framing.unpack(block, epoch=epoch, slot=imm.slot, position=position, slot_bytes=memory.slot_bytes)
        total_bytes = header.header_bytes + header.payload_bytes
        # A device counts the bytes of the last of the frame's messages only.
        if written_bytes > total_bytes or (placed is not None and written_bytes < total_bytes):
            raise RemoteProtocolError(f"the sender wrote {written_bytes} bytes for a frame of {total_bytes}")
        # The flat array is the base of every view of the frame: when it goes, the lease ends. And as it is made from a read-only
        # memoryview, none of them can be made writable.
        flat = np.frombuffer(payload, np.uint8, header.payload_bytes, start)
        array: np.ndarray[Any, Any] = np.ndarray(header.shape, header.dtype, flat)
        if epoch != self.ring.epoch:
            self._leave_older(epoch)
        ring, stream, seq = self.ring, self.stream, header.seq
        before = stream.seq_before(position)
        lease = FrameLease(stream, position, memory.buffer if placed is None else payload.obj)
        if seq > max(before, stream.received_seq):
            gap = None if seq == before + 1 else stream.gap_before(position, seq, header.gap)
            stream.leases[position] = lease
            stream.deliver(lease.issue(header, array, flat, gap), tag)
            stream.note(position, seq)
        elif seq > before:
            stream.leases[position] = lease
            lease.refuse()
            stream.abandoned.append(lease)  # received before; the sender could not know it
        else:
            raise RemoteProtocolError(f"the sender wrote frame number {seq} after number {before}")
        ring.epoch = epoch
        ring.received = position + 1

    def _leave_older(self, epoch: int) -> None:
        # All frames before this one have arrived, so nothing can arrive there any more. Leases keep the memory itself.
        for old in [number for number in self._memory if number < epoch]:
            self._unpin(self._memory.pop(old))

    def _unpin(self, memory: RingMemory) -> None:
        memory.region.close()
        self._host.unpin(memory.buffer.nbytes)

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

    @property
    def all_completed(self) -> bool:
        """Whether the device has confirmed all messages, up to the last signalled one."""
        return self._sent - self._sent_completed <= self._unsignalled

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

    def _unregister(self) -> None:
        while self._memory:
            self._unpin(self._memory.popitem()[1])
