"""The user's object that receives frames."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rdmaxfer.cm.messages import MAX_NAME_CHARS, MAX_SLOT_BYTES, Accept, Hello, Progress, Refuse, Resized, RingAddress
from rdmaxfer.errors import (
    ClosedError,
    EndOfStream,
    FrameReleased,
    FrameTooLarge,
    NoMemory,
    RdmaxferError,
    RemoteProtocolError,
    TimeoutExpired,
)
from rdmaxfer.fabric.choice import Fabric
from rdmaxfer.lease import Frame, FrameLease
from rdmaxfer.link import recv_depth, send_depth
from rdmaxfer.node import Node, StateChange
from rdmaxfer.recv_link import RecvLink
from rdmaxfer.recv_stream import RecvStream
from rdmaxfer.statistics import MAX_SAMPLES, SAMPLED, Latency, ReceiverStatistics, Times
from rdmaxfer.waiting import PATIENCE_S, Deadline

if TYPE_CHECKING:
    from typing_extensions import Self

    from rdmaxfer.fabric.base import AnyRoute, Domain
    from rdmaxfer.sharing import Sharing
    from rdmaxfer.stream import Origin

log = logging.getLogger("rdmaxfer")

GOODBYE_S = 1.0
"""How long `close` waits for the senders' devices to confirm BYE."""

RESIZE_PATIENCE_S = 0.05
"""How long a sender that asks for larger slots is kept waiting, before it is told to ask again."""

RELEASED_TOGETHER = 4
"""One part in so many of a ring may be released without being counted at once."""
CREDIT_S = 0.05
"""How long credit for a few slots is kept back, at the least, when the sender has not asked for it."""

MAX_FIRST_RING_BYTES = 256 << 20
"""A sender's wish for slots to begin with is granted up to this; if its frames need more, there will be a resize."""

MAX_REMEMBERED = 1024
"""Streams that were given up, and senders, whose latest numbers are kept."""

MAX_OFFERS = 4
"""Larger rings a sender may have asked for without using any: more would be memory for nothing."""


class Receiver(Node[RecvLink, RecvStream]):
    """Receives frames from any number of senders: each gets a ring of slots in registered memory here and writes into it.

    Parameters (all have working defaults):
      device: name of the RDMA device, e.g. "rxe0"; by default the one whose GID matches the route to the peer, or the
        environment's RDMAXFER_DEVICE.
      port, gid_index: which port and GID of the device; found by default.
      fabric: what carries the frames: "verbs" (RDMA), "shm" (shared memory), "tcp", or "auto" (the default, unless RDMAXFER_FABRIC
        says something else): shared memory between processes of one user on one machine, else verbs if both sides can, and TCP
        else, with a line in the log. Who names a device wants verbs.
      slots: frames that may be on their way or held at a time, for each sender.
      slot_bytes: payload bytes a slot begins with; it grows when a larger frame comes.
      max_frame_bytes: the largest frame accepted. A sender can make this receiver register up to slots * max_frame_bytes.
      max_pinned_bytes: the most memory to register for all senders together; by default there is no limit but the machine's.
      max_peers: senders that may be connected to each endpoint bound here.
      copy: hand out frames in memory of their own, and give the slot back at once. A sender can change what it sent as long as it
        is connected; copies can't be changed by anybody. For senders that you don't trust.
      queue_pairs: queue pairs of each connection (1 to 8), over which its frames take turns; the smaller wish of the two sides
        counts. Two keep more of a device or of Soft-RoCE busy than one.
      share: a name by which other processes of this user on this machine can have every frame, too: `rdmaxfer.attach(name)`. They
        read it where it lies (over RDMA, where the network card has put it), each with a lease of its own.
      spin_s: seconds to poll busily before a wait sleeps; 0: never. By default, as long as that is rewarded: where frames come
        within 0.3 ms. A wait for what does not come costs nothing.
      name: what a successor of this receiver, in another process, will also be called: if this one is restarted, a sender that is
        bound goes on with the frames that it has not released. Nobody else who connects to that sender may have the same name.
      lease_s: seconds without a sign of life after which a connection counts as broken.
      reconnect, reconnect_s: whether, and for how many seconds, a sender whose connection broke may come back (or is connected to
        again, if it was this side that connected) before it is given up. It goes on where it was: no frame comes twice.
      secret_key: this side's file NAME.key_secret (`rdmaxfer keygen`). With it, CURVE authenticates and encrypts the control plane
        of every endpoint, and `connect` needs the peer's public key.
      allowed_keys: directory with the files NAME.key of the senders that may connect to endpoints bound here.
      on_state: called with a StateChange when a peer has connected, is to come back, said goodbye, or was lost; on a thread of this
        object, which waits for it: keep it short, and call nothing of this object that waits (set an event, and connect elsewhere).

    Use it in a `with` block, or close() it. All methods may be called from any thread.
    """

    role = "receiver"

    def __init__(
        self,
        *,
        device: str | None = None,
        port: int | None = None,
        gid_index: int | None = None,
        fabric: Fabric | None = None,
        slots: int = 16,
        slot_bytes: int = 1 << 20,
        max_frame_bytes: int = 128 << 20,
        max_pinned_bytes: int | None = None,
        max_peers: int = 1024,
        copy: bool = False,
        queue_pairs: int = 2,
        spin_s: float | None = None,
        name: str = "",
        share: str | None = None,
        lease_s: float = 5.0,
        reconnect: bool = True,
        reconnect_s: float = 30.0,
        secret_key: str | os.PathLike[str] | None = None,
        allowed_keys: str | os.PathLike[str] | None = None,
        on_state: Callable[[StateChange], object] | None = None,
    ) -> None:
        if not 1 <= slot_bytes <= max_frame_bytes <= MAX_SLOT_BYTES:
            raise ValueError(
                f"1 <= slot_bytes <= max_frame_bytes <= {MAX_SLOT_BYTES} does not hold for slot_bytes={slot_bytes!r} and "
                f"max_frame_bytes={max_frame_bytes!r}"
            )
        if max_pinned_bytes is not None and max_pinned_bytes < 1:
            raise ValueError(f"max_pinned_bytes is a number of bytes of at least 1, or None, not {max_pinned_bytes!r}")
        super().__init__(
            device=device,
            port=port,
            gid_index=gid_index,
            fabric=fabric,
            slots=slots,
            slot_bytes=slot_bytes,
            queue_pairs=queue_pairs,
            max_peers=max_peers,
            spin_s=spin_s,
            lease_s=lease_s,
            reconnect=reconnect,
            reconnect_s=reconnect_s,
            secret_key=secret_key,
            allowed_keys=allowed_keys,
            on_state=on_state,
        )
        if not isinstance(name, str) or len(name) > MAX_NAME_CHARS:
            raise ValueError(f"a name is a text of at most {MAX_NAME_CHARS} characters, not {name!r}")
        self.identity = name
        self._max_frame_bytes = max_frame_bytes
        self._max_pinned_bytes = max_pinned_bytes
        self._pinned_bytes = 0
        self._copy = copy
        self.shares = share is not None
        self._sharing: Sharing | None = None
        self._ready: deque[tuple[tuple[int, int], Frame]] = deque()
        self._draining: list[RecvStream] = []
        """Streams that have ended, but whose frames are still leased."""
        self._past: OrderedDict[bytes, int] = OrderedDict()
        """The latest number received over streams that were given up, should their senders come back after all."""
        self._latest_seqs: OrderedDict[bytes, int] = OrderedDict()
        """... and from senders, by their own ids: for gaps between streams."""
        self._times: deque[Times] = deque(maxlen=MAX_SAMPLES)
        self._frames = 0
        self._bytes = 0
        self._missed = 0
        self._writes_before = 0
        self._credits_before = 0
        self._resizes = 0
        self._ticking = False
        if share is not None:
            from rdmaxfer.sharing import Sharing

            self._sharing = Sharing(share, self.collect)

    # --- receiving -----------------------------------------------------------------------------------------------------

    def recv(self, timeout: float | None = None) -> Frame:
        """The next frame, as a lease: release it (or use it in a `with` block) when done. With `copy`, it is yours for good.

        Frames of one sender come in its order. Waits up to `timeout` seconds, for ever by default.

        Raises TimeoutExpired; EndOfStream when every sender that this receiver connected to has said goodbye (a bound receiver
        waits for the next one); PeerLost, once, when a connection made by `connect` broke; NotConnected; ClosedError.
        """
        return self._recv(1, timeout)[0]

    def recv_many(self, max_frames: int, timeout: float | None = None) -> list[Frame]:
        """The next frame, and those behind it that have arrived, up to `max_frames`: as `recv`, with less work for each.

        Raises as `recv` does.
        """
        if max_frames < 1:
            raise ValueError(f"max_frames is a number of at least 1, not {max_frames!r}")
        return self._recv(max_frames, timeout)

    def _recv(self, most: int, timeout: float | None) -> list[Frame]:
        taken: list[tuple[tuple[int, int], Frame]] = []
        ready, deadline = self._ready, Deadline(timeout)
        try:
            with self._lock:
                # What Ctrl-C has cut off comes first: the latest frame may be about to be made again.
                at_once = bool(ready) and not self._waiter.unfinished
                if at_once:
                    self._check_usable()
                if not at_once or self._next() is None:
                    self._waiter.wait_locked(self._next, deadline, "waiting for a frame")
                while ready and len(taken) < most:
                    entry = ready[0]
                    taken.append(entry)
                    ready.popleft()
                    if self._frames % SAMPLED == 0:
                        self._times.append((entry[1].captured_ns, entry[1].pushed_ns, time.time_ns()))
                    self._frames += 1
                    self._bytes += entry[1].nbytes
                    gap = entry[1].gap
                    if gap is not None:
                        self._missed += gap.count
            if self._sharing is not None:
                for _, frame in taken:
                    self._sharing.forward(frame, deadline)
            if self._copy:
                for index, (tag, leased) in enumerate(taken):
                    try:
                        taken[index] = (tag, leased.copy())
                    except FrameReleased:
                        self._check_usable()  # closed by another thread just now
                        raise
                    leased.release()
            return [frame for _, frame in taken]
        except BaseException:
            if taken:  # Ctrl-C: the frames are not lost
                with self._lock:
                    for entry in reversed(taken):
                        if all(other is not entry for other in ready):
                            ready.appendleft(entry)
            raise

    async def recv_async(self, timeout: float | None = None) -> Frame:
        """As `recv`, without holding up the event loop. When cancelled, no frame is lost: the next call has it."""
        return (await self._recv_async(1, timeout))[0]

    async def recv_many_async(self, max_frames: int, timeout: float | None = None) -> list[Frame]:
        """As `recv_many`, without holding up the event loop. When cancelled, no frame is lost."""
        if max_frames < 1:
            raise ValueError(f"max_frames is a number of at least 1, not {max_frames!r}")
        return await self._recv_async(max_frames, timeout)

    async def _recv_async(self, most: int, timeout: float | None) -> list[Frame]:
        deadline = Deadline(timeout)
        await self._alarm.checkpoint()
        while True:
            try:
                return self._recv(most, 0.0)
            except TimeoutExpired:
                if deadline.left_s() <= 0:
                    raise
            if self._ready and self._sharing is not None:
                await self._sharing.room(self._ready[0][1], deadline)
            else:
                await self._alarm.until(self._next, deadline, "waiting for a frame")

    def __aiter__(self) -> Self:
        """Frames until the end of the stream (see `recv`), or until this receiver is closed."""
        return self

    async def __anext__(self) -> Frame:
        try:
            return await self.recv_async()
        except (EndOfStream, ClosedError):
            raise StopAsyncIteration from None

    async def connect_async(
        self, endpoint: str, timeout: float | None = 30.0, *, peer_key: str | os.PathLike[str] | None = None
    ) -> None:
        """As `connect`, without holding up the event loop. When cancelled, the attempt is given up; if it has just succeeded, the
        connection stays."""
        await self._connect_async(endpoint, timeout, peer_key, self._new_stream)

    def __iter__(self) -> Iterator[Frame]:
        """Frames until the end of the stream (see `recv`), or until this receiver is closed."""
        while True:
            try:
                frame = self.recv()
            except (EndOfStream, ClosedError):
                return
            yield frame

    def _next(self) -> tuple[tuple[int, int], Frame] | None:
        for stream in self._streams.values():
            if stream.abandoned:
                stream.collect()
                if stream.link is not None and stream.link.credit_kept and not self._ticking:
                    self._tick_later()
        if self._ready:
            return self._ready[0]
        if self._ends and not self._streams and not self._servers and not self._opening and not self._losses:
            raise EndOfStream("every sender has said goodbye, and all their frames were received.")
        self._check_connected()
        return None

    def statistics(self) -> ReceiverStatistics:
        """A snapshot of the counters."""
        with self._lock:
            for stream in [*self._streams.values(), *self._draining]:
                stream.collect()
            return ReceiverStatistics(
                peers=len(self._links),
                turned_away=sum(server.turned_away for server in self._servers),
                refused=sum(server.refused for server in self._servers),
                expired=sum(server.expired for server in self._servers),
                reconnecting=sum(stream.link is None for stream in self._streams.values()),
                reconnects=self._reconnects,
                peers_lost=self._peers_lost,
                frames=self._frames,
                bytes=self._bytes,
                missed=self._missed,
                writes=self._writes_before + sum(link.writes_received for link in self._links),
                credits_sent=self._credits_before + sum(link.credits_sent for link in self._links),
                leased=sum(len(stream.leases) for stream in [*self._streams.values(), *self._draining]),
                resizes=self._resizes,
                pinned_bytes=self._pinned_bytes,
                push_to_recv=Latency.of([taken - pushed for _, pushed, taken in self._times]),
                capture_to_recv=Latency.of([taken - captured for captured, _, taken in self._times if captured]),
            )

    # --- what streams and links ask (rdmaxfer.recv_stream.Inbox, rdmaxfer.recv_link.Host) --------------------------------

    def frame_arrived(self, frame: Frame, tag: tuple[int, int]) -> None:
        ready = self._ready
        if ready and ready[-1][0] == tag:
            ready[-1] = (tag, frame)
        else:
            ready.append((tag, frame))

    def release(self, stream: RecvStream, lease: FrameLease) -> None:
        if self._forked:
            return
        stream.abandoned.append(lease)
        # The next call of `recv`, or the tick, gives it back along with others; unless the sender may be waiting for it.
        if self._ticking and RELEASED_TOGETHER * len(stream.abandoned) < stream.ring.slots:
            return
        with self._lock:
            stream.collect()
            if stream.link is not None and stream.link.credit_kept and not self._ticking:
                self._tick_later()

    def lent(self) -> None:
        """While somebody else reads frames, look now and then whether they are given back."""
        with self._lock:
            if not self._ticking:
                self._tick_later()

    def given_back(self) -> None:
        """From anywhere, at any time, even with the lock held: only wakes who waits."""
        self._waiter.nudge()

    def collect(self) -> None:
        """Give back what nobody uses any more."""
        with self._lock:
            for stream in [*self._streams.values(), *self._draining]:
                stream.collect()
            if any(link.credit_kept for link in self._links) and not self._ticking:
                self._tick_later()

    def pin(self, nbytes: int) -> None:
        """`nbytes` are about to be registered for a sender. Raises NoMemory."""
        with self._lock:
            most = self._max_pinned_bytes
            if most is not None and self._pinned_bytes + nbytes > most:
                raise NoMemory(
                    f"{nbytes} bytes more would be above max_pinned_bytes={most}: {self._pinned_bytes} are registered already.",
                    fix="Receiver(max_pinned_bytes=...) larger, fewer or smaller slots, or fewer senders.",
                )
            self._pinned_bytes += nbytes

    def unpin(self, nbytes: int) -> None:
        """They are not registered any more."""
        with self._lock:
            self._pinned_bytes -= nbytes

    def _began(self, stream: RecvStream) -> None:
        # What was released since HELLO, which said what was until then: the sender may wait for just that.
        link = stream.link
        if link is not None:
            link.give_credit()
            if link.credit_kept and not self._ticking:
                self._tick_later()

    def _tick_later(self) -> None:
        """See to it that credit is not kept for long. With the lock held."""
        if self._control is not None and not self._closing:
            with contextlib.suppress(ClosedError):
                self._control.call_later(CREDIT_S, self._tick)
                self._ticking = True

    def _tick(self) -> None:
        if not self._lock.acquire(timeout=PATIENCE_S):  # somebody is at work, and leases are renewed on this thread
            self._later(CREDIT_S, self._tick)
            return
        try:
            self._ticking = False
            for stream in [*self._streams.values(), *self._draining]:
                stream.collect()
            for link in self._links:
                link.give_kept_credit()
            lent = any(lease.lent_out for stream in self._streams.values() for lease in stream.leases.values())
            if lent or any(link.credit_kept for link in self._links):
                self._tick_later()
        finally:
            self._lock.release()

    def resize_asked(self, link: RecvLink, wanted_bytes: int) -> None:
        if link.session not in self._connections:
            raise RemoteProtocolError("the sender asked in band for a resize that it should have asked for by RESIZE")
        link.wanted_bytes = wanted_bytes
        self._offer_larger(link)

    def _offer_larger(self, link: RecvLink) -> None:
        """Offer a bound sender the larger slots that it asked for, one ring at a time. With the lock held."""
        if link.resizing or link.wanted_bytes <= link.slot_bytes:
            return
        connection = self._connections.get(link.session)
        if connection is None:
            return

        def offer(outcome: RingAddress | RdmaxferError) -> None:
            if isinstance(outcome, RingAddress):
                connection.request_resize(outcome.slot_bytes, outcome)
                return
            log.warning("no room for the larger frames of %s: %s", link.peer, outcome)
            with self._lock:
                link.resizing = False
                link.wanted_bytes = 0
                link.refuse_resize()

        self._grow(link, link.wanted_bytes, offer)

    def _grow(self, link: RecvLink, wanted_bytes: int, done: Callable[[RingAddress | RdmaxferError], None]) -> None:
        """Register a ring with larger slots, beside the control thread: that goes on to renew leases, which may not wait for
        gigabytes to be registered. With the lock held."""
        link.resizing = True
        # A little more than asked for, so that frames that grow slowly don't need a new ring each.
        slot_bytes = min(self._max_frame_bytes, max(wanted_bytes, link.slot_bytes * 5 // 4))

        def work() -> None:
            outcome: RingAddress | RdmaxferError
            try:
                if wanted_bytes > self._max_frame_bytes:
                    raise FrameTooLarge(
                        f"a frame of {wanted_bytes} bytes is above this receiver's limit of {self._max_frame_bytes}.",
                        fix=f"Receiver(max_frame_bytes={wanted_bytes}) at the receiving end.",
                    )
                memory = link.new_memory(slot_bytes)
                with self._lock:
                    outcome = link.offer(memory)
                    self._resizes += 1
            except RdmaxferError as error:
                outcome = error
            except BaseException as error:
                self.control_failed(error)
                return
            with contextlib.suppress(ClosedError):
                done(outcome)

        link.work = threading.Thread(target=work, name="rdmaxfer-register", daemon=True)
        link.work.start()

    # --- what the handshake asks (rdmaxfer.handshake) -------------------------------------------------------------------

    def _make_link(
        self, session: bytes, stream: RecvStream, domain: Domain, route: AnyRoute, lanes: int, owned: ExitStack
    ) -> RecvLink:
        pd = owned.enter_context(domain.protection_domain())
        endpoint = pd.endpoint(
            route,
            send_depth=send_depth(self._slots),
            recv_depth=recv_depth(self._slots),
            lanes=lanes,
            remote_write=True,
            max_write_bytes=self._max_frame_bytes,
        )
        owned.callback(endpoint.close)
        return RecvLink(session, stream, endpoint, owned.pop_all(), pd, self)

    def wishes(self) -> tuple[int, int, int]:
        return self._slots, self._slot_bytes, self._max_frame_bytes

    def agree(self, hello: Hello) -> tuple[int, int, int]:
        slots = min(self._slots, hello.slots)
        wish = min(hello.slot_bytes, self._max_frame_bytes, MAX_FIRST_RING_BYTES // slots)
        return slots, max(self._slot_bytes, wish), self._max_frame_bytes

    def check_agreed(self, accept: Accept) -> None:
        if accept.ring is not None:
            raise RemoteProtocolError("a sender offered a ring")
        if accept.slots > self._slots or accept.slot_bytes > self._max_frame_bytes:
            raise RemoteProtocolError("the sender wants more slots, or larger ones, than it was told that it can have")

    def make_ring(self, link: RecvLink, slots: int, slot_bytes: int, start: Progress) -> RingAddress:
        with self._lock:
            link.resume(slots, start)
        return link.make_ring(slot_bytes)

    def _new_stream(self, id_: bytes, origin: Origin | None) -> RecvStream:
        return RecvStream(id_, origin, self)

    def _start_of_new(self, stream: RecvStream, hello: Hello) -> Progress:
        stream.node = hello.node
        stream.received_seq = self._past.get(hello.stream, -1)
        stream.seq_before_first = self._latest_seqs.get(hello.node, -1)
        first = hello.resume.released if hello.resume is not None else 0
        return Progress(released=first, received=first)

    def _start(self, stream: RecvStream, hello: Hello) -> Progress:
        stream.collect()
        return Progress(released=stream.ring.released, received=stream.ring.received)

    def check_start(self, link: RecvLink, told: Progress | None, accept: Accept) -> None:
        with self._lock:
            stream, start = link.stream, accept.start
            if told is not None and start != told:
                # The sender has forgotten this stream, or is another one: a new one begins.
                link.stream = stream = stream.successor()
            if start.released != start.received and start != told:
                raise RemoteProtocolError("the sender says that this receiver has frames which it has not")
            if stream.node != accept.node:
                stream.received_seq = -1
                stream.node = accept.node
                stream.seq_before_first = self._latest_seqs.get(accept.node, -1)

    def _forget(self, stream: RecvStream) -> None:
        stream.collect()
        if stream.leases:
            self._draining.append(stream)
        self._draining = [other for other in self._draining if other.leases]
        if stream.latest_seq >= 0:
            for known, key in ((self._past, stream.id), (self._latest_seqs, stream.node)):
                known[key] = stream.latest_seq
                while len(known) > MAX_REMEMBERED:
                    known.popitem(last=False)

    def use_ring(self, link: RecvLink, ring: RingAddress | None) -> None:
        if ring is not None:
            raise RemoteProtocolError("a sender offered a ring")

    def resize(self, link: RecvLink, wanted_bytes: int, ring: RingAddress | None) -> RingAddress | None:
        if ring is not None:
            raise RemoteProtocolError("a sender offered a ring")

        def keep(outcome: RingAddress | RdmaxferError) -> None:
            with self._lock:
                link.grown = outcome
                link.resizing = False

        with self._lock:
            if not link.resizing and link.grown is None:
                if link.offers_open >= MAX_OFFERS:
                    raise FrameTooLarge("the sender asked for one larger ring after another, and has not used any.")
                self._grow(link, wanted_bytes, keep)
        if link.work is not None:
            link.work.join(RESIZE_PATIENCE_S)
        with self._lock:
            outcome, link.grown = link.grown, None
        if isinstance(outcome, RdmaxferError):
            raise outcome
        return outcome

    def resize_answered(self, link: RecvLink, answer: Resized | Refuse) -> None:
        if isinstance(answer, Refuse):
            log.warning("%s refused a larger ring: %s", link.peer, answer.message)
        with self._lock:
            link.resizing = False
            self._offer_larger(link)

    def renewed(self, link: RecvLink, wanted_bytes: int) -> None:
        with self._lock:
            if wanted_bytes > link.slot_bytes and not link.resizing:
                link.wanted_bytes = wanted_bytes
                self._offer_larger(link)

    def slot_limit(self, link: RecvLink) -> int:
        return self._max_frame_bytes

    # --- the end -------------------------------------------------------------------------------------------------------

    def _count_link(self, link: RecvLink) -> None:
        self._writes_before += link.writes_received
        self._credits_before += link.credits_sent

    def _say_goodbye(self, deadline: Deadline) -> None:
        if self._sharing is not None:
            self._sharing.close(deadline.left_s())
        with self._lock:
            for stream in self._streams.values():
                stream.collect()
            for link in self._links:
                link.say_bye()
            for stream in [*self._streams.values(), *self._draining]:
                stream.revoke_leases()
            self._ready.clear()
            # A queue pair that is destroyed at once takes the goodbye along.
            with contextlib.suppress(RdmaxferError):
                self._waiter.wait_locked(
                    lambda: True if all(link.all_completed for link in self._links) else None,
                    deadline.within(GOODBYE_S),
                    "closing: saying goodbye",
                )


__all__ = ["Receiver"]
