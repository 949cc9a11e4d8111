"""The sender's side of a connection: writes frames into the receiver's ring. See `rdmaxfer.link` for the rules."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rdmaxfer import frame as framing
from rdmaxfer import inband
from rdmaxfer.cm.messages import RingAddress
from rdmaxfer.errors import DeviceError, FrameTooLarge, PeerLost, RdmaxferError, RemoteProtocolError
from rdmaxfer.link import Completion, Link, send_depth
from rdmaxfer.memory import Buffer
from rdmaxfer.outgoing import MAX_PIECES

if TYPE_CHECKING:
    from rdmaxfer.cm.messages import Progress
    from rdmaxfer.fabric.base import Endpoint, ProtectionDomain
    from rdmaxfer.outgoing import Outgoing
    from rdmaxfer.send_stream import SendStream


LOOKS_APART_S = 2.0
"""Looks after a link that are further apart say nothing."""

SLOWEST_BYTES_PER_S = 2e6
"""A connection that carries less counts as dead; it is slower than an emulated machine."""


class _Posted:
    """Work requests that were posted and not yet seen completed: up to which ordinal, which position (-1: no frame), and the frame
    whose memory they read."""

    __slots__ = ("ordinal", "out", "position")

    def __init__(self, ordinal: int, position: int, out: Outgoing | None) -> None:
        self.ordinal = ordinal
        self.position = position
        self.out = out


class _Lane:
    """What was posted on one queue pair, counted in work requests, and which of it was not seen completed."""

    __slots__ = ("completed", "in_flight", "number", "posted", "said_bye", "unsignalled")

    def __init__(self, number: int) -> None:
        self.number = number
        self.posted = 0
        self.completed = 0
        self.unsignalled = 0
        self.in_flight: deque[_Posted] = deque()
        self.said_bye = False


class SendLink(Link):
    """The sender's side: writes frames into the receiver's ring."""

    stream: SendStream

    def __init__(
        self, session: bytes, stream: SendStream, endpoint: Endpoint, owned: ExitStack, pd: ProtectionDomain
    ) -> None:
        super().__init__(session, stream.peer, endpoint, owned)
        self.stream = stream
        self.pd = pd
        self.ring = stream.ring
        self.remote: RingAddress | None = None
        self.resize_wanted = 0
        """Slot bytes asked for and not yet granted; 0 when no resize is under way."""
        self.resize_error: RdmaxferError | None = None
        self._credit_asked_at = -1
        self.credits_received = 0
        self._headers = Buffer(0)
        self._header_view = self._headers.view(0, 0)
        self._header_lkey = 0
        self._half = 1
        self._depth = 0
        self._lanes: list[_Lane] = []
        self._recvs_due: list[int] = []
        self._looked_s = 0.0
        self._progress = (-1, -1)
        self._progress_s = 0.0
        self.latest_seq = -1
        """Sequence number of the latest frame written."""

    def prepare(self, slots: int, start: Progress) -> None:
        """Make room for `slots` frames on their way, over the lanes of the connected endpoint, and go on from `start`. Raises
        RemoteProtocolError, MemlockError, VerbsError."""
        self._lanes = [_Lane(number) for number in range(self.endpoint.lanes)]
        self.stream.resume(slots, len(self._lanes), start)
        self._half = max(1, slots // 2)
        self._depth = send_depth(slots)
        self.stream.lends = self.stream.lends or self.endpoint.lends
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
        if ring.slot_bytes < self.resize_wanted:
            raise RemoteProtocolError(
                f"the receiver offered slots of {ring.slot_bytes} bytes; {self.resize_wanted} were asked for"
            )
        self.remote = ring
        self.resize_wanted = 0

    @property
    def slot_bytes(self) -> int:
        return self.remote.slot_bytes if self.remote is not None else 0

    def can_push(self, nbytes: int) -> bool:
        """Whether a frame of `nbytes` could be written now."""
        return self.ring.can_take() and self._room(self._next_lane) >= self._most_wrs(nbytes)

    @property
    def _next_lane(self) -> _Lane:
        return self._lanes[self.ring.position % len(self._lanes)]

    def _room(self, lane: _Lane) -> int:
        return self._depth - (lane.posted - lane.completed)

    def fits_queue(self, nbytes: int) -> bool:
        """Whether a frame of `nbytes` is few enough work requests for the send queue at all."""
        return self._most_wrs(nbytes) <= self._depth

    def _most_wrs(self, nbytes: int) -> int:
        return self.endpoint.wr_count(nbytes + framing.HEADER_ROOM) + MAX_PIECES - 1

    def push(self, out: Outgoing, gap: int) -> None:
        """Write one frame; `gap` says why numbers are missing before it. The caller has seen `can_push`; failures end the link."""
        remote = self.remote
        assert remote is not None
        ring, written = self.ring, self.stream.written
        position = ring.position
        slot = position % remote.slots
        lane = self._next_lane
        end = (slot + 1) * framing.HEADER_ROOM
        payload_bytes = out.payload_bytes
        self.endpoint.clear_posted()
        try:
            first = out.pieces[0]
            lkey = first.source.lkey(self.pd) if payload_bytes else 0
            more = [(each.address, each.nbytes, each.source.lkey(self.pd)) for each in out.pieces[1:]]
            header_bytes = out.kind.pack_into(
                self._header_view,
                end,
                epoch=remote.epoch,
                slot=slot,
                seq=out.seq,
                position=position,
                captured_ns=out.captured_ns,
                pushed_ns=out.pushed_ns,
                gap=gap,
                metadata=out.metadata,
            )
            wrs = self.endpoint.wr_count(header_bytes + payload_bytes) + len(more)
            signaled = self._record(lane, wrs, position, out)
            imm = inband.pack_frame_imm(remote.epoch, header_bytes, slot)
            ring.take()
            if not written or written[-1] is not out:
                written.append(out)
            self.latest_seq = out.seq
            self.endpoint.write(
                self._headers.address + end - header_bytes,
                header_bytes,
                self._header_lkey,
                first.address,
                first.nbytes,
                lkey,
                remote.address + slot * remote.slot_stride + framing.HEADER_ROOM - header_bytes,
                remote.rkey,
                imm,
                lane.posted,
                signaled,
                lane.number,
                more,
            )
        except DeviceError as error:
            self._broke(error)
            self._take_back(out, position)  # for another link
        except BaseException:
            if not self.endpoint.last_posted:
                self._take_back(out, position)
            raise

    def _take_back(self, out: Outgoing, position: int) -> None:
        """This frame was not written."""
        written = self.stream.written
        if written and written[-1] is out:
            written.pop()
        self.ring.position = position
        self.latest_seq = -1

    def _record(self, lane: _Lane, wrs: int, position: int, out: Outgoing | None, *, signaled: bool = False) -> bool:
        """Note work requests about to be posted; says whether the last of them must be signalled."""
        unsignalled = lane.unsignalled + wrs
        if not signaled:
            # Each lane's last frame in half of the ring.
            signaled = position % self._half >= self._half - len(self._lanes) or unsignalled * 4 >= self._depth
        lane.in_flight.append(_Posted(lane.posted + wrs, position, out))
        lane.unsignalled = 0 if signaled else unsignalled
        lane.posted += wrs
        return signaled

    def _broke(self, error: RdmaxferError) -> None:
        self.fail(PeerLost(f"the connection with {self.peer} broke: {error}"))

    def cork(self) -> None:
        """Several frames are about to be pushed: post them together."""
        self.endpoint.cork()

    def uncork(self) -> None:
        """They were. Harmless to repeat."""
        try:
            self.endpoint.uncork()
        except DeviceError as error:
            self._broke(error)

    def fence(self) -> None:
        """Make sure that the completion of everything posted so far will be seen: an empty, signalled WRITE ends each queue."""
        for lane in self._lanes:
            if lane.unsignalled and self.live and self._room(lane):
                self._post_empty(lane, None)

    def ask_credit(self) -> None:
        """Ask the receiver to tell at once what it releases, rather than to wait until half of the ring has come together."""
        if self._credit_asked_at == self.ring.position or not self.live:
            return
        # Behind the last frame of every lane, so that the receiver knows all that is meant.
        if all(self._write_imm(lane, inband.pack_credit_imm()) for lane in self._lanes):
            self._credit_asked_at = self.ring.position

    def ask_resize(self, nbytes: int) -> bool:
        """Ask the receiver, in band, for larger slots (it answers with RESIZE on its control socket). False: no room now."""
        return self._write_imm(self._lanes[0], inband.pack_resize_imm(nbytes))

    def say_bye(self) -> bool:
        """Tell the receiver, on every lane and after all frames, that no more come. False while a send queue is full."""
        for lane in self._lanes:
            if not lane.said_bye and self.live:
                lane.said_bye = self._write_imm(lane, inband.pack_bye_imm())
        return not self.live or all(lane.said_bye for lane in self._lanes)

    def _write_imm(self, lane: _Lane, imm: int) -> bool:
        if not self._room(lane):
            return False
        self._post_empty(lane, imm)
        return True

    def _post_empty(self, lane: _Lane, imm: int | None) -> None:
        """An empty, signalled WRITE, with an immediate or without."""
        self.endpoint.clear_posted()
        try:
            self._record(lane, 1, -1, None, signaled=True)
            if imm is None:
                self.endpoint.write_empty(lane.posted, lane.number)
            else:
                self.endpoint.write_imm(imm, lane.posted, lane.number)
        except DeviceError as error:
            self._broke(error)
        except BaseException:
            if not self.endpoint.last_posted:
                lane.unsignalled += 1  # recorded, but no completion will come of it: a later `fence` has to ask for one
            raise

    def look_after(self, now_s: float, patience_s: float) -> None:
        """Called now and then while frames are on their way. Ends the link if the device has confirmed nothing for `patience_s`
        and as long as what is on its way may take: a device can repeat for ever what the network does not carry."""
        in_flight = [lane for lane in self._lanes if lane.in_flight]
        progress = (sum(lane.completed for lane in self._lanes), self.ring.released)
        late = now_s - self._looked_s > LOOKS_APART_S  # this process was stopped, not the device
        self._looked_s = now_s
        if not in_flight or late or progress != self._progress:
            self._progress, self._progress_s = progress, now_s
            return
        self.fence()
        bytes_in_flight = sum(out.payload_bytes for out in self.reads_from)
        if now_s - self._progress_s > patience_s + bytes_in_flight / SLOWEST_BYTES_PER_S and self.live:
            text = f"the device has not confirmed anything of what was written to {self.peer} for {now_s - self._progress_s:.1f} s."
            self.fail(PeerLost(text, fix="see that both sides and all switches between have the same MTU, and are up."))

    @property
    def reads_from(self) -> Iterator[Outgoing]:
        """The frames whose memory work requests may still read from."""
        for lane in self._lanes:
            for posted in lane.in_flight:
                if posted.out is not None:
                    yield posted.out

    @property
    def all_completed(self) -> bool:
        return not any(lane.in_flight for lane in self._lanes)

    def _on_sent(self, wc: Completion) -> None:
        lane = self._lanes[wc.lane]
        in_flight = lane.in_flight
        while in_flight and in_flight[0].ordinal <= wc.wr_id:
            posted = in_flight[0]
            if posted.position >= 0:
                self.ring.on_completed(posted.position)
            lane.completed = posted.ordinal
            in_flight.popleft()

    def _on_recv(self, wc: Completion, tag: tuple[int, int]) -> None:
        message = inband.unpack_message(self.endpoint.recv_payload(wc.wr_id, wc.byte_len))
        if wc.wr_id not in self._recvs_due:
            self._recvs_due.append(wc.wr_id)
        if message.kind is inband.MessageKind.RESIZE_REFUSED:
            self.refuse_resize(message.value)
            return
        self.stream.on_credit(message.value)
        if message.kind is inband.MessageKind.BYE:
            self.end()
        else:
            self.credits_received += 1

    def refuse_resize(self, limit: int, error: RdmaxferError | None = None) -> None:
        """The receiver can't give larger slots."""
        self.resize_wanted = 0
        self.resize_error = error or FrameTooLarge(
            f"the receiver {self.peer} could not make room for larger frames: {limit} bytes is what it can take now.",
            fix="give the receiver a larger max_frame_bytes, fewer slots, or a higher memlock limit (`ulimit -l`).",
        )

    def after_poll(self) -> None:
        if self._recvs_due and self.live:
            self.endpoint.clear_reposted()
            try:
                self.endpoint.repost_recv(self._recvs_due)
            except DeviceError as error:
                self.fail(error)
            finally:  # also after Ctrl-C: what is posted is not due any more
                self._recvs_due = self._recvs_due[self.endpoint.last_reposted :]

    def teardown(self, timeout_s: float) -> None:
        self.endpoint.holds = list(self.reads_from)
        super().teardown(timeout_s)
        self.endpoint.holds = None
        # The queue pairs are gone: no device reads from the memory any more.
        for lane in self._lanes:
            lane.in_flight.clear()
