"""The user's object that pushes frames."""

from __future__ import annotations

import errno
import functools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from rdmaxfer.callback import Callback
from rdmaxfer.cm.messages import MAX_SLOT_BYTES, Accept, Hello, Progress, Refuse, RefuseCode, Resized, RingAddress
from rdmaxfer.errors import (
    ClosedError,
    DeviceError,
    ForkedError,
    FrameError,
    FrameTooLarge,
    NotConnected,
    PeerLost,
    RdmaxferError,
    RemoteProtocolError,
    TimeoutExpired,
    VerbsError,
)
from rdmaxfer.fabric.choice import Fabric
from rdmaxfer.frame import FrameType, encode_metadata, frame_type
from rdmaxfer.inband import MESSAGE_BYTES
from rdmaxfer.intake import Intake
from rdmaxfer.lease import Frame, Slot
from rdmaxfer.link import recv_depth, send_depth
from rdmaxfer.memory import Buffer, ForeignMemory
from rdmaxfer.node import MAKING_S, Node, StateChange
from rdmaxfer.outgoing import Outgoing, Piece, whole
from rdmaxfer.payload import Payload, payload_of
from rdmaxfer.registrations import Registrations, hold, let_go
from rdmaxfer.send_link import SendLink
from rdmaxfer.send_stream import TOO_LARGE, WHEN_FULL, Dropped, SendStream, WhenFull
from rdmaxfer.staging import Holder, Registration, Source, StagingPool, StagingSlot
from rdmaxfer.statistics import SenderStatistics
from rdmaxfer.waiting import PATIENCE_S, Deadline

if TYPE_CHECKING:
    from rdmaxfer.fabric.base import AnyRoute, Domain, ProtectionDomain
    from rdmaxfer.stream import Origin

RESIZE_RETRY_S = 0.02
"""How long to leave a receiver that is registering memory for larger slots alone."""

WATCH_S = 0.2
"""How often to look after frames that are on their way, if nobody else does."""
ATTENDED_WATCH_S = 1.0
"""... and if somebody does."""

log = logging.getLogger("rdmaxfer")

MAX_BORROWED = 64
"""Pieces of memory of Receivers that stay registered for `forward`, if they are not in use."""

PUSHING_FAILED = (TimeoutExpired, PeerLost, NotConnected, ClosedError, ForkedError)
"""Errors that are not about what was to be pushed."""

END: Any = object()
"""Comes after the last array."""

BATCH = 16
"""Frames that `push_many` posts at once at the most."""

GOODBYE_S = 1.0
"""How long `close` waits for the receivers' devices to confirm BYE."""


class Sender(Node[SendLink, SendStream]):
    """Pushes frames to every receiver that is connected: each receiver gets every frame pushed while it is there.

    A frame is kept until all its receivers have released it. If a connection breaks, the side that connected comes back, and what
    the receiver has not received is sent again, in its order: to a receiver that stayed alive each frame once.

    Parameters (all have working defaults):
      device: name of the RDMA device, e.g. "rxe0"; by default the one whose GID matches the route to the peer, or the
        environment's RDMAXFER_DEVICE.
      port, gid_index: which port and GID of the device; found by default.
      fabric: what carries the frames: "verbs" (RDMA), "shm" (shared memory), "tcp", or "auto" (the default, unless RDMAXFER_FABRIC
        says something else): shared memory between processes of one user on one machine, else verbs if both sides can, and TCP
        else, with a line in the log. Who names a device wants verbs.
      slots: frames that may be on their way or unreleased at a time. Each receiver may lower it for itself.
      slot_bytes: payload bytes to ask receivers to begin with (0: what they have); larger frames make slots grow.
      max_peers: receivers that may be connected to each endpoint bound here.
      queue_pairs: queue pairs of each connection (1 to 8), over which its frames take turns; the smaller wish of the two sides
        counts. Two keep more of a device or of Soft-RoCE busy than one.
      spin_s: seconds to poll busily before a wait sleeps; 0: never. By default, as long as that is rewarded: where frames or credit
        come within 0.3 ms. A wait for what does not come costs nothing.
      distribute: "all", each frame to every receiver, or "balance", each to one: to the one that can take the most.
      lease_s: seconds without a sign of life after which a connection counts as broken.
      reconnect, reconnect_s: whether, and for how many seconds, to hold the frames of a receiver whose connection broke, and to
        connect to it again if it was this side that connected. Then it is given up: PeerLost has the numbers of its frames.
      secret_key: this side's file NAME.key_secret (`rdmaxfer keygen`). With it, CURVE authenticates and encrypts the control plane
        of every endpoint, and `connect` needs the peer's public key.
      allowed_keys: directory with the files NAME.key of the receivers that may connect to endpoints bound here.
      on_state: called with a StateChange when a peer has connected, is to come back, said goodbye, or was lost; on a thread of this
        object, which waits for it: keep it short, and call nothing of this object that waits (set an event, and connect elsewhere).

    Use it in a `with` block, or close() it. All methods may be called from any thread.
    """

    role = "sender"

    def __init__(
        self,
        *,
        device: str | None = None,
        port: int | None = None,
        gid_index: int | None = None,
        fabric: Fabric | None = None,
        slots: int = 16,
        slot_bytes: int = 0,
        max_peers: int = 1024,
        queue_pairs: int = 2,
        spin_s: float | None = None,
        distribute: Literal["all", "balance"] = "all",
        lease_s: float = 5.0,
        reconnect: bool = True,
        reconnect_s: float = 30.0,
        secret_key: str | os.PathLike[str] | None = None,
        allowed_keys: str | os.PathLike[str] | None = None,
        on_state: Callable[[StateChange], object] | None = None,
    ) -> None:
        if distribute not in ("all", "balance"):
            raise ValueError(f'distribute is "all" or "balance", not {distribute!r}')
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
        self._balance = distribute == "balance"
        self._bound_policies: list[WhenFull] = []
        self._pool = StagingPool(2 * slots)
        self._pds: dict[Domain, ProtectionDomain] = {}
        self._registrations = Registrations(self._in_use)
        self._seq = 0
        self._bytes = 0
        self._copied = 0
        self._waits = 0
        self._resizes = 0
        self._credits_before = 0
        self._dropped_before = 0
        self._drops: list[Dropped] = []
        """Of receivers that are gone."""
        self._unheard = 0
        self._made_links: weakref.WeakSet[SendLink] = weakref.WeakSet()
        """Also those that have ended and are about to be torn down."""
        self._watching = False
        self._retired = 0
        """Connections that have ended, and use no memory any more."""
        self._borrowed: dict[int, Source] = {}
        """Memory of Receivers that frames were forwarded from. (It is kept, so nothing else has its id.)"""
        self._batches: dict[int, Callable[[], None]] = {}
        """By thread: how to push what `push_many` has gathered there."""
        self._corked = False
        """Whether frames are being posted together."""
        self._pumping: threading.Thread | None = None
        self._intakes: list[Intake] = []
        self._lossy = 0
        """Receivers that were lost with frames, in all; and what was said of the latest."""
        self._latest_loss: PeerLost | None = None

    # --- connections -----------------------------------------------------------------------------------------------------

    def bind(self, endpoint: str, *, when_full: WhenFull = "block") -> str:
        """Wait for receivers at `endpoint`, e.g. "tcp://0.0.0.0:7471". May be called many times, and beside `connect`.

        `when_full`: what to do for a receiver that has no room for a frame: "block", wait for it (and so hold up all);
        "drop_newest", drop that frame; "drop_oldest", drop the oldest of up to `slots` frames that wait; "latest", keep only the
        newest, and give it no more than the one in its hands and the next. Only frames that were not written yet are ever dropped.
        Returns the endpoint with the port that was really bound (port 0 or * takes a free one). Raises EndpointError, and NoDevice
        or VerbsUnavailable if no peer could be served; CurveError if this side has a secret key, but no allowed keys.
        """
        _check_policy(when_full)
        bound = self._bind(endpoint, functools.partial(self._new_stream, when_full=when_full))
        self._bound_policies.append(when_full)
        return bound

    def connect(
        self,
        endpoint: str,
        timeout: float | None = 30.0,
        *,
        peer_key: str | os.PathLike[str] | None = None,
        when_full: WhenFull = "block",
    ) -> None:
        """Connect to the receiver that is bound (or will be, within `timeout` seconds) at `endpoint`, e.g. "tcp://10.0.0.2:7471".

        `when_full`: as in `bind`. `peer_key`: the file NAME.key of the peer, if this side has a `secret_key`. May be called many
        times, and beside `bind`. Raises EndpointError, ConnectTimeout, Refused, CurveError, NoDevice, VerbsUnavailable,
        MemlockError; after an error nothing is left behind.
        """
        _check_policy(when_full)
        self._connect(endpoint, timeout, peer_key, functools.partial(self._new_stream, when_full=when_full))

    async def connect_async(
        self,
        endpoint: str,
        timeout: float | None = 30.0,
        *,
        peer_key: str | os.PathLike[str] | None = None,
        when_full: WhenFull = "block",
    ) -> None:
        """As `connect`, without holding up the event loop. When cancelled, the attempt is given up; if it has just succeeded, the
        connection stays."""
        _check_policy(when_full)
        await self._connect_async(endpoint, timeout, peer_key, functools.partial(self._new_stream, when_full=when_full))

    def _new_stream(self, id_: bytes, origin: Origin | None, when_full: WhenFull = "block") -> SendStream:
        return SendStream(id_, origin, when_full, self._slots)

    # --- pushing -------------------------------------------------------------------------------------------------------

    def push(
        self,
        array: npt.ArrayLike,
        *,
        metadata: Mapping[str, Any] | None = None,
        captured_ns: int | None = None,
        copy: bool = True,
        timeout: float | None = None,
    ) -> int:
        """Send an array to every connected receiver; returns the frame's sequence number.

        `array`: any shape of up to 8 dimensions, any fixed-size numeric, bool, complex, datetime64, timedelta64 or structured
        dtype, any byte order; also bytes, a bytearray or a memoryview, and whatever numpy takes for an array without a copy, like
        a torch tensor on the CPU. It is copied once, into staging memory, unless it is C-contiguous and lies in memory
        registered by `register`: then the device reads it where it is, and it must not be changed before `flush` has returned.
        A list or tuple of arrays of one shape and dtype is one frame, which has them along its first axis, as numpy.stack makes
        it: the device gathers up to 16 of them from registered memory; others are copied, once.
        `metadata`: a small mapping (4 KiB as msgpack) that travels along. `captured_ns`: capture time, nanoseconds since 1970.
        `copy=False` promises that the array stays as it is until `flush` has returned: it is sent from where it lies. Its memory is
        registered for that, and stays so as long as the array exists (the latest 64 of them), so that pushing it again costs
        nothing. It is copied nevertheless if it is not C-contiguous, and for receivers by shared memory, which can't read there.

        Waits up to `timeout` seconds (for ever by default) until every receiver with `when_full="block"` has a free slot (with
        distribute="balance": one of them), and for the first receiver to connect. Raises TimeoutExpired (the frame was not sent to
        anybody), UnsupportedDtype, FrameTooLarge, FrameError, PeerLost (once, when a receiver was given up), NotConnected,
        ClosedError.
        """
        payload = payload_of(array)
        kind = payload.kind
        packed = encode_metadata(metadata) if metadata else b""
        captured_ns = _nanoseconds(captured_ns)
        deadline = Deadline(timeout)
        holder = Holder()
        if self._registrations or not copy:
            with self._lock:
                self._check_usable()
                pieces = self._in_place(payload, keep=not copy)
                if pieces is not None:
                    holder.keeps = payload.parts
                    try:
                        hold(pieces, holder)
                        return self._push(kind, pieces, holder, packed, captured_ns, deadline)
                    finally:
                        let_go(pieces, holder)
        staging = self._stage(kind, holder, deadline)
        try:
            payload.copy_into(staging)
            with self._lock:
                seq = self._push(kind, whole(staging, kind.payload_bytes), holder, packed, captured_ns, deadline)
                self._copied += 1
                return seq
        finally:
            if not holder.sent:
                self._discard_staged(staging, holder)

    async def push_async(
        self,
        array: npt.ArrayLike,
        *,
        metadata: Mapping[str, Any] | None = None,
        captured_ns: int | None = None,
        copy: bool = True,
        timeout: float | None = None,
    ) -> int:
        """As `push`, without holding up the event loop; what is larger than 1 MiB is copied on another thread. When cancelled, the
        frame was not sent to anybody. Frames that coroutines push at the same time come in any order."""
        from rdmaxfer import async_sending

        captured_ns = _nanoseconds(captured_ns)
        return await async_sending.push(
            self, array, metadata=metadata, captured_ns=captured_ns, copy=copy, timeout=timeout
        )

    def as_callback(self, *, metadata: Mapping[str, Any] | None = None, timeout: float = 0.0) -> Callback:
        """For camera libraries that call back from a thread of theirs: `camera.on_frame(sender.as_callback())`.

        What is called with a frame pushes it, within `timeout` seconds, or drops and counts it; it never raises. `metadata`: goes
        along with each, such as {"pixel_format": "BGR8"}.
        """
        return Callback(self, metadata, timeout)

    def intake(self, name: str, *, slots: int = 16, slot_bytes: int) -> Intake:
        """Let a C or C++ program on this machine, of this user, fill frames in memory that lies here: they are pushed from there.

        It attaches by `name` (rdmaxfer.h; docs/howto.md), reserves one of `slots` slots of `slot_bytes` each, fills and publishes
        it. The slot is free again when all receivers have released the frame and those before it. One program at a time. Raises
        EndpointError if the name is taken.
        """
        with self._lock:
            self._check_usable()
        for each in [each for each in self._intakes if each.over]:
            self._intakes.remove(each)
            each.end()
        made = Intake(self, name, slots, slot_bytes)
        self._intakes.append(made)
        return made

    def push_many(
        self,
        arrays: Iterable[npt.ArrayLike],
        *,
        metadata: Mapping[str, Any] | None = None,
        captured_ns: int | None = None,
        copy: bool = True,
        timeout: float | None = None,
    ) -> list[int]:
        """Send each of several arrays as a frame, as `push` does, with less work for each; returns their sequence numbers.

        `metadata`, `captured_ns` and `copy` go for all of them, `timeout` is for all together. Raises as `push` does; then those
        before the one it is about were sent, and `error.pushed` has their numbers.
        """
        packed = encode_metadata(metadata) if metadata else b""
        captured_ns = _nanoseconds(captured_ns)
        deadline = Deadline(timeout)
        pushed: list[int] = []
        batch: deque[_Prepared] = deque()

        def push_batch() -> None:
            self._push_batch(batch, pushed, packed, captured_ns, deadline)

        outer = self._batches.get(threading.get_ident())
        self._batches[threading.get_ident()] = push_batch
        try:
            iterator = iter(arrays)
            while True:
                try:
                    array = next(iterator, END)
                    if array is END:
                        break
                    batch.append(self._prepare(array, not copy, deadline, push_batch))
                except Exception as error:
                    if not isinstance(error, PUSHING_FAILED):  # it is about this array, and not about those before it
                        push_batch()
                    raise
                if len(batch) >= BATCH:
                    push_batch()
            push_batch()
        except RdmaxferError as error:
            error.pushed = tuple(pushed)
            raise
        finally:
            if outer is None:
                self._batches.pop(threading.get_ident(), None)
            else:
                self._batches[threading.get_ident()] = outer
            for each in batch:
                if each.staging is not None:
                    self._discard_staged(each.staging, each.holder)
                else:
                    with self._lock:
                        let_go(each.pieces, each.holder)
        return pushed

    def _prepare(
        self, array: npt.ArrayLike, keep: bool, deadline: Deadline, push_batch: Callable[[], None]
    ) -> _Prepared:
        """Get an array ready to be sent. If there is no staging memory, the batch, which has some, goes first."""
        payload = payload_of(array)
        kind = payload.kind
        holder = Holder()
        with self._lock:
            self._check_usable()
            self._check_size(kind.payload_bytes)
            pieces = self._in_place(payload, keep=keep)
            if pieces is not None:
                holder.keeps = payload.parts
                hold(pieces, holder)
                return _Prepared(kind, pieces, None, holder)
            staging = self._free_slot(kind.payload_bytes, holder)
        if staging is None:
            push_batch()
            staging = self._stage(kind, holder, deadline)
        try:
            payload.copy_into(staging)
        except BaseException:
            self._discard_staged(staging, holder)
            raise
        return _Prepared(kind, whole(staging, kind.payload_bytes), staging, holder)

    def _push_own_batch(self) -> None:
        """This may be called by what `push_many` takes its arrays from, to use again what it has already given."""
        push_batch = self._batches.get(threading.get_ident())
        if push_batch is not None:
            push_batch()

    def _push_batch(
        self, batch: deque[_Prepared], pushed: list[int], metadata: bytes, captured_ns: int, deadline: Deadline
    ) -> None:
        """Push what was prepared, in its order, and take it out of `batch`."""
        if not batch:
            return
        with self._lock:
            try:
                self._cork()
                while batch:
                    kind, pieces, staging, holder = batch[0]
                    pushed.append(self._push(kind, pieces, holder, metadata, captured_ns, deadline))
                    self._copied += staging is not None
                    batch.popleft()
            finally:
                self._uncork()

    def _cork(self) -> None:
        self._corked = True
        for link in self._links:
            link.cork()

    def _uncork(self) -> None:
        """Whatever comes in between: frames that were accepted are not left lying about."""
        interrupt: KeyboardInterrupt | None = None
        while self._corked:
            try:
                for link in self._links:
                    link.uncork()
                self._corked = False
            except KeyboardInterrupt as error:
                interrupt = error
        if any(not link.live for link in self._links):
            self._drop_ended()
        if interrupt is not None:
            try:
                raise interrupt
            finally:
                interrupt = None

    def reserve(
        self,
        shape: int | tuple[int, ...],
        dtype: npt.DTypeLike = np.uint8,
        *,
        metadata: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Slot:
        """Registered memory to fill in place: `with sender.reserve(shape, dtype) as slot: camera.read_into(slot.array)`.

        Leaving the block pushes the frame, an exception in it discards it. `timeout` (seconds) goes for the wait for memory, and
        again for the wait for receivers at the end. Raises as `push` does.
        """
        kind = frame_type(shape, dtype)
        holder = Holder()
        staging = self._stage(kind, holder, Deadline(timeout))
        return Slot(self, staging, holder, staging.array(kind.shape, kind.dtype), metadata, timeout)

    async def reserve_async(
        self,
        shape: int | tuple[int, ...],
        dtype: npt.DTypeLike = np.uint8,
        *,
        metadata: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Slot:
        """As `reserve`, without holding up the event loop: `async with await sender.reserve_async(shape, dtype) as slot: ...`.
        When cancelled, no memory stays reserved."""
        from rdmaxfer import async_sending

        kind = frame_type(shape, dtype)
        holder = Holder()
        staging = await async_sending.stage(self, kind, holder, Deadline(timeout))
        return Slot(self, staging, holder, staging.array(kind.shape, kind.dtype), metadata, timeout)

    def forward(
        self,
        frame: Frame,
        *,
        metadata: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send a received frame on, from where it lies: nothing is copied, if all receivers can read that memory. Returns its
        sequence number here.

        The frame may be released at once; its slot goes back to its sender when all receivers here have released it, too. Its
        metadata and capture time go along, unless `metadata` says something else. In place by shared memory, for frames of a
        Receiver with `share` or of one that got them by shared memory; and by other fabrics, for frames that came over RDMA. Else
        it is copied, as by `push`. Raises as `push` does, and FrameReleased.
        """
        deadline, holder = Deadline(timeout), Holder()
        lent = self._lend(frame, holder)
        sent_along = frame.metadata if metadata is None else metadata
        if lent is None:
            return self.push(frame.array, metadata=sent_along, captured_ns=frame.captured_ns, timeout=timeout)
        kind, pieces = lent
        packed = encode_metadata(sent_along) if sent_along else b""
        with self._lock:
            return self._push(kind, pieces, holder, packed, frame.captured_ns, deadline)

    async def forward_async(
        self,
        frame: Frame,
        *,
        metadata: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> int:
        """As `forward`, without holding up the event loop. When cancelled, the frame was sent to nobody."""
        from rdmaxfer import async_sending

        deadline, holder = Deadline(timeout), Holder()
        lent = self._lend(frame, holder)
        sent_along = frame.metadata if metadata is None else metadata
        if lent is None:
            return await self.push_async(
                frame.array, metadata=sent_along, captured_ns=frame.captured_ns, timeout=timeout
            )
        kind, pieces = lent
        packed = encode_metadata(sent_along) if sent_along else b""
        await self._alarm.checkpoint()
        return await async_sending.send(self, kind, pieces, holder, packed, frame.captured_ns, deadline)

    def _lend(self, frame: Frame, holder: Holder) -> tuple[FrameType, tuple[Piece, ...]] | None:
        """What is to be sent of a received frame from where it lies, for as long as there is `holder`; None if that can't be."""
        array, lease = frame.array, frame._lease
        if lease is None or not array.nbytes or not self._can_send_from(lease.memory):
            return None
        lease.lend(holder)
        address = int(array.__array_interface__["data"][0])
        with self._lock:
            return frame_type(array.shape, array.dtype), (Piece(self._source_of(lease.memory), address, array.nbytes),)

    @property
    def next_seq(self) -> int:
        """Sequence number of the next frame."""
        return self._seq

    @property
    def heard(self) -> bool:
        """Whether there is a receiver."""
        return bool(self._streams)

    def wait_for_release(self, seen: int) -> int:
        """Wait until receivers have released more frames, or have gone, than when this returned `seen` (0 at first), and no work
        request has their memory any more. Raises ClosedError."""

        def more() -> int | None:
            self._pump_all()
            for link in self._links:
                if link.ring.completed < link.ring.released:
                    link.fence()  # until its completion is seen, a work request has the memory, too
            streams = self._streams.values()
            count = self._retired + sum(min(each.ring.released, each.ring.completed) for each in streams)
            return count if count != seen else None

        return self._waiter.wait(more, Deadline(None), "waiting for receivers to release frames")

    def _can_send_from(self, memory: object) -> bool:
        if isinstance(memory, ForeignMemory):  # which a device could not register: it would have to be writable
            return memory.fd is not None and self._all_lend()
        return isinstance(memory, Buffer) and (memory.fd is not None or not self._pool.shared)

    def _all_lend(self) -> bool:
        return not [link for link in [*self._links, *self._opening.values()] if not link.endpoint.lends]

    def _source_of(self, memory: Any) -> Source:
        """The memory of a Receiver, to send from. With the lock held."""
        known = self._borrowed.get(id(memory))
        if known is None:
            known = Source(memory.address, memory.nbytes, memory)
            if len(self._borrowed) >= MAX_BORROWED:
                used = self._in_use()
                for key, other in list(self._borrowed.items()):
                    if other not in used:
                        del self._borrowed[key]
                        other.unregister()
            self._borrowed[id(memory)] = known
        return known

    def register(self, array: npt.NDArray[Any]) -> Registration:
        """Register an array's memory with the device, so that pushes of it, or of any C-contiguous view of it, copy nothing.

        Close the result (or use it in a `with` block) to end that; it is also ended by closing the sender. Raises MemlockError,
        FrameError.
        """
        if not isinstance(array, np.ndarray):
            raise TypeError(f"register() takes a numpy array, not {type(array).__name__}")
        registration = Registration(array, self._unregister)
        with self._lock:
            self._check_usable()
            for domain, pd in self._pds.items():
                if not domain.lost:
                    registration.lkey(pd)
            self._registrations.add(registration)
        return registration

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every frame pushed so far has been released by every receiver it went to.

        After it, registered arrays may be changed. Raises TimeoutExpired (it names what is outstanding), PeerLost with the numbers
        of the frames that a receiver that left had not released.
        """
        self._push_own_batch()
        with self._lock:
            latest, known = self._seq - 1, self._lossy
            try:
                self._waiter.wait_locked(lambda: self._released(latest, known), Deadline(timeout), "flushing")
            except TimeoutExpired as error:
                raise self._flush_expired(error) from None

    async def flush_async(self, timeout: float | None = None) -> None:
        """As `flush`, without holding up the event loop."""
        from rdmaxfer import async_sending

        await async_sending.flush(self, timeout)

    def _released(self, latest: int, known: int) -> bool | None:
        """Whether all frames up to number `latest` are done with, where `known` receivers had been lost with frames when the wait
        began. With the lock held."""
        self._pump_all()
        waiting = False
        for stream in self._streams.values():
            oldest = stream.oldest_seq
            link = stream.link
            if oldest is not None and oldest <= latest:
                waiting = True
                if link is not None:
                    link.ask_credit()
            elif link is not None and link.ring.completed < link.ring.released:
                waiting = True
                link.fence()
        if waiting:
            return None
        for loss in self._losses:
            if loss.unreleased:
                self._losses.remove(loss)
                raise loss
        told = self._latest_loss
        if self._lossy != known and told is not None and told.unreleased[0] <= latest:
            # To somebody else, meanwhile; but who has waited for these frames is not to think that they were released.
            raise type(told)(str(told).removesuffix(f" Fix: {told.fix}"), unreleased=told.unreleased, fix=told.fix)
        return True

    def _flush_expired(self, error: TimeoutExpired) -> TimeoutExpired:
        """The same error, which says what is outstanding."""
        with self._lock:
            text = "; ".join(
                f"{stream.peer}{'' if stream.link else ', which is to come back,'} has not released {len(seqs)} "
                f"frame{'s' if len(seqs) != 1 else ''}, the first is {seqs[0]}"
                for stream in self._streams.values()
                if (seqs := stream.unreleased)
            )
        return TimeoutExpired(
            f"{error} {text or 'the device has not confirmed all writes'}.",
            fix="the receiver must release its frames (leave their `with` blocks) and call recv() again.",
        )

    def take_drops(self) -> list[Dropped]:
        """Which frames were dropped for which receiver since the latest call: ranges of numbers, for each receiver in their order.

        Ranges of the same receiver are merged when there are thousands of them.
        """
        with self._lock:
            drops, self._drops = self._drops, []
            for stream in self._streams.values():
                drops += stream.take_drops()
            return drops

    def statistics(self) -> SenderStatistics:
        """A snapshot of the counters."""
        with self._lock:
            return SenderStatistics(
                peers=len(self._links),
                turned_away=sum(server.turned_away for server in self._servers),
                refused=sum(server.refused for server in self._servers),
                expired=sum(server.expired for server in self._servers),
                reconnecting=sum(stream.link is None for stream in self._streams.values()),
                reconnects=self._reconnects,
                peers_lost=self._peers_lost,
                frames=self._seq,
                bytes=self._bytes,
                copied=self._copied,
                waits=self._waits,
                unreleased=max((stream.holds for stream in self._streams.values()), default=0),
                dropped=self._dropped_before + sum(stream.dropped for stream in self._streams.values()),
                unheard=self._unheard,
                credits_received=self._credits_before + sum(link.credits_received for link in self._links),
                resizes=self._resizes,
            )

    # --- how a frame goes out ------------------------------------------------------------------------------------------

    def _stage(self, kind: FrameType, holder: Holder, deadline: Deadline) -> StagingSlot:
        """A free staging slot, large enough."""
        with self._lock:
            self._check_usable()
            self._check_size(kind.payload_bytes)
            staging = self._free_slot(kind.payload_bytes, holder)
            if staging is None:
                self._waits += 1
                staging = self._waiter.wait_locked(
                    lambda: self._free_slot(kind.payload_bytes, holder),
                    deadline,
                    "waiting for staging memory (all slots hold frames on their way, or are reserved)",
                )
            return staging

    def _free_slot(self, nbytes: int, holder: Holder) -> StagingSlot | None:
        # What the slowest may hold, and as much again to be filled meanwhile. Who holds up nobody when it is slow needs its own.
        own = [stream for stream in self._streams.values() if self._balance or stream.when_full != "block"]
        self._pool.limit = 2 * self._slots * (1 + len(own))
        staging = self._pool.take(nbytes, holder)
        if staging is None:
            self._pool.reclaim(self._in_use())
            for link in self._links:
                link.fence()
        return staging

    def _in_use(self) -> set[Source]:
        """The memory that frames on their way have, or that devices may read from."""
        held = [out for stream in self._streams.values() for queue in (stream.written, stream.pending) for out in queue]
        held += [out for link in self._made_links if not link.torn_down for out in link.reads_from]
        return {piece.source for out in held for piece in out.pieces}

    def _in_place(self, payload: Payload, *, keep: bool) -> tuple[Piece, ...] | None:
        """The registered memory that all of it lies in (`keep`: registered from now on); None if it has to be copied. With the
        lock held."""
        if self._pool.shared or not (keep or self._registrations):
            return None  # what other processes read where it is has to lie in memory that can be shared: from `reserve`
        return self._registrations.pieces(payload, keep=keep, gather=self._all_gather())

    def _all_gather(self) -> bool:
        return not [link for link in [*self._links, *self._opening.values()] if not link.endpoint.gathers]

    def _push_staged(
        self,
        staging: StagingSlot,
        holder: Holder,
        array: np.ndarray[Any, Any],
        *,
        metadata: Mapping[str, Any] | None,
        captured_ns: int,
        timeout: float | None,
    ) -> int:
        kind = frame_type(array.shape, array.dtype)
        packed = encode_metadata(metadata) if metadata else b""
        captured_ns = _nanoseconds(captured_ns)
        with self._lock:
            return self._push(kind, whole(staging, kind.payload_bytes), holder, packed, captured_ns, Deadline(timeout))

    async def _push_staged_async(
        self,
        staging: StagingSlot,
        holder: Holder,
        array: np.ndarray[Any, Any],
        *,
        metadata: Mapping[str, Any] | None,
        captured_ns: int,
        timeout: float | None,
    ) -> int:
        from rdmaxfer import async_sending

        kind = frame_type(array.shape, array.dtype)
        packed = encode_metadata(metadata) if metadata else b""
        captured_ns = _nanoseconds(captured_ns)
        pieces = whole(staging, kind.payload_bytes)
        return await async_sending.send(self, kind, pieces, holder, packed, captured_ns, Deadline(timeout))

    def _discard_staged(self, staging: StagingSlot, holder: Holder) -> None:
        with self._lock:
            staging.let_go(holder)
            self._waiter.wake()

    def _push(
        self,
        kind: FrameType,
        pieces: tuple[Piece, ...],
        holder: Holder,
        metadata: bytes,
        captured_ns: int,
        deadline: Deadline,
    ) -> int:
        """Give the frame to all receivers at once (or to the one whose turn it is), or to none. With the lock held."""
        self._check_usable()
        if self._seq & 7 == 0:
            self._waiter.poll()  # to notice receivers that have left
        while True:
            streams = self._takers(kind.payload_bytes)
            if streams is None:
                self._waits += 1
                if self._corked:
                    self._uncork()  # else nobody would ever have room
                what = (
                    "waiting for every receiver to have a free slot"
                    if self._streams
                    else "waiting for a receiver to connect"
                )
                streams = self._waiter.wait_locked(lambda: self._takers(kind.payload_bytes), deadline, what)
            if not [piece for piece in pieces if not self._register_for(piece.source, streams)]:
                break
        out = Outgoing(
            kind,
            pieces,
            holder,
            seq=self._seq,
            captured_ns=captured_ns,
            pushed_ns=time.time_ns(),
            metadata=metadata,
        )
        interrupt: KeyboardInterrupt | None = None
        done = False
        while not done:
            try:
                self._seq = out.seq + 1
                for stream in streams:
                    stream.offer(out, balanced=self._balance)
                done = True
            except KeyboardInterrupt as error:  # finish what was begun: all receivers get the frame, or none
                interrupt = error
        self._bytes += kind.payload_bytes
        if not streams:
            self._unheard += 1
        if any(not link.live for link in self._links):
            self._drop_ended()
        if any(stream.pending for stream in streams):
            self._pump_later()
        if not self._watching:
            self._watch_later()
        if interrupt is not None:
            try:
                raise interrupt
            finally:
                interrupt = None  # or its traceback, which has this frame, would keep the memory
        return out.seq

    def _takers(self, nbytes: int) -> list[SendStream] | None:
        """Who is to get a frame of `nbytes`, once there is room for it; None while there is none. Asks for larger slots where they
        are too small."""
        if not self._losses:
            self._pump_all()  # after which there may be fewer
        # Who has said goodbye gets nothing more, also while the last of what it sent is still to come.
        streams = [each for each in self._streams.values() if each.link is None or not each.link.leaving]
        if self._losses or not streams:
            self._check_connected()
            if self._bound_policies and "block" not in self._bound_policies and not self._opening:
                return []  # nobody listens, and nobody asked to be waited for
            return None
        for stream in streams:
            if stream.link is not None and nbytes > stream.link.slot_bytes:
                self._grow(stream.link, nbytes)
        if self._balance:
            return self._taker(streams, nbytes)
        for stream in streams:
            if stream.when_full == "block" and not stream.has_room(nbytes):
                return None
        return streams

    def _taker(self, streams: list[SendStream], nbytes: int) -> list[SendStream] | None:
        """The one receiver that can take the most. If none has room: one whose policy drops, where all do; else none, for now."""
        here = [stream for stream in streams if stream.link is not None] or streams
        best = max(here, key=lambda stream: (stream.credit, -stream.holds))
        patient = all(stream.when_full != "block" for stream in here)
        if best.has_room(nbytes) and (patient or best.credit > 0 or best.link is None):
            return [best]
        return [best] if patient else None

    def _pump_all(self) -> None:
        """Write what waits, as far as there is room."""
        for stream in self._streams.values():
            if not stream.pending:
                continue
            try:
                while stream.pump():
                    link, out = stream.link, stream.pending[0]
                    if link is None or link.resize_wanted:
                        break
                    if link.resize_error is not None:
                        link.resize_error = None
                        stream.drop_first(TOO_LARGE, "too_large")
                        continue
                    self._ask_for_larger(link, out.payload_bytes)
                    break
            except DeviceError as error:  # no room to register memory that waits, as little as there is for the others
                if stream.link is not None:
                    stream.link.fail(error)
        if any(not link.live for link in self._links):
            self._drop_ended()

    def _watch_later(self) -> None:
        """While frames are not released, see to it that errors are noticed also if nobody calls this object. With the lock held."""
        self._later(ATTENDED_WATCH_S if self._waiter.attended else WATCH_S, self._watch)
        self._watching = True

    def _watch(self) -> None:
        if not self._lock.acquire(timeout=PATIENCE_S):  # somebody is at work, and leases are renewed on this thread
            self._later(WATCH_S, self._watch)
            return
        try:
            self._watching = False
            self._waiter.poll()  # nothing if another thread polls: it will notice by itself
            now_s = time.monotonic()
            for link in self._links:
                link.look_after(now_s, self.lease_s)
            if any(not link.live for link in self._links):
                self._drop_ended()
                self._waiter.wake()
            if not self._closing and any(stream.holds for stream in self._streams.values()):
                self._watch_later()
        finally:
            self._lock.release()

    def _pump_later(self) -> None:
        """See to it that what waits is written also if nobody calls this object. With the lock held."""
        if not self._closing and (self._pumping is None or not self._pumping.is_alive()):
            self._pumping = threading.Thread(target=self._pump_main, name="rdmaxfer-pump", daemon=True)
            self._pumping.start()

    def _pump_main(self) -> None:
        def pumped() -> bool | None:
            self._pump_all()
            waiting = any(stream.pending and stream.link is not None for stream in self._streams.values())
            return None if waiting else True

        try:
            with self._lock:
                try:
                    self._waiter.wait_locked(pumped, Deadline(None), "writing what waits")
                finally:
                    self._pumping = None
        except (ClosedError, ForkedError):
            pass
        except BaseException as error:
            self.control_failed(error)

    def _join_threads(self) -> None:
        super()._join_threads()
        pumping = self._pumping
        if pumping is not None and pumping.is_alive():
            pumping.join(MAKING_S)

    def _began(self, stream: SendStream) -> None:
        if stream.pending:
            self._pump_later()

    def _register_for(self, source: Source, streams: list[SendStream]) -> bool:
        """Register memory on each receiver's device, where it is not yet: an error here is the caller's, and nothing was sent.
        False if a device turned out to be lost; its links have ended then."""
        for stream in streams:
            link = stream.link
            if link is None:
                continue
            try:
                source.lkey(link.pd)
            except DeviceError as error:
                if isinstance(error, VerbsError) and error.errno == errno.EIO:  # its event is about to come, too
                    self._domains.lose(link.pd.domain)
                    self._drop_ended()
                    return False
                self._pool.forget(source)
                raise
        return True

    def _check_size(self, nbytes: int) -> None:
        """Raise FrameTooLarge if some receiver could never take a frame of `nbytes`."""
        for stream in self._streams.values():
            if nbytes > stream.max_slot_bytes:
                raise FrameTooLarge(
                    f"a frame of {nbytes} bytes is above the limit of {stream.max_slot_bytes} bytes of the receiver {stream.peer}.",
                    fix=f"Receiver(max_frame_bytes={nbytes}) at the receiving end, or push smaller frames.",
                )
            if stream.link is not None and not stream.link.fits_queue(nbytes):
                raise FrameTooLarge(
                    f"a frame of {nbytes} bytes would need more work requests than the send queue to {stream.peer} holds.",
                    fix="push smaller frames, or give sender and receiver more slots.",
                )

    def _grow(self, link: SendLink, nbytes: int) -> None:
        self._check_size(nbytes)
        if link.resize_error is not None:
            error, link.resize_error = link.resize_error, None
            raise error
        self._ask_for_larger(link, nbytes)

    def _ask_for_larger(self, link: SendLink, nbytes: int) -> None:
        if link.resize_wanted:
            return
        connection = self._connections.get(link.session)
        if connection is not None:
            connection.request_resize(nbytes, None)
        elif not link.ask_resize(nbytes):
            return
        link.resize_wanted = nbytes
        self._resizes += 1

    def _unregister(self, registration: Registration) -> None:
        self._push_own_batch()
        with self._lock:
            if registration not in self._registrations:
                return

            def idle() -> bool | None:
                if not registration.awaited and registration not in self._in_use():
                    return True
                self._pump_all()
                for link in self._links:
                    link.fence()
                return None

            self._waiter.wait_locked(idle, Deadline(30.0), "waiting for the last push from a registered array")
            self._registrations.remove(registration)

    # --- what the handshake asks (rdmaxfer.handshake) -------------------------------------------------------------------

    def _make_link(
        self, session: bytes, stream: SendStream, domain: Domain, route: AnyRoute, lanes: int, owned: ExitStack
    ) -> SendLink:
        with self._lock:
            pd = self._pds.get(domain)
            if pd is None:
                pd = self._pds[domain] = domain.protection_domain()
        if route.fabric == "shm":
            self._pool.shared = True
        endpoint = pd.endpoint(
            route,
            send_depth=send_depth(self._slots),
            recv_depth=recv_depth(self._slots),
            recv_bytes=MESSAGE_BYTES,
            lanes=lanes,
            remote_write=False,
        )
        owned.callback(endpoint.close)
        link = SendLink(session, stream, endpoint, owned.pop_all(), pd)
        with self._lock:  # which others have who look through them
            self._made_links.add(link)
        return link

    def wishes(self) -> tuple[int, int, int]:
        return self._slots, self._slot_bytes, MAX_SLOT_BYTES

    def agree(self, hello: Hello) -> tuple[int, int, int]:
        slot_bytes = min(max(self._slot_bytes, hello.slot_bytes), hello.max_slot_bytes)
        return min(self._slots, hello.slots), slot_bytes, hello.max_slot_bytes

    def check_agreed(self, accept: Accept) -> None:
        if accept.slots > self._slots:
            raise RemoteProtocolError("the receiver chose more slots than this sender has")
        if accept.ring is None or accept.ring.slots != accept.slots:
            raise RemoteProtocolError("the receiver offered no ring, or not the one agreed on")

    def prepare_link(self, link: SendLink, theirs: Any, *, path_mtu: int, max_msg_sz: int, max_slot_bytes: int) -> None:
        super().prepare_link(link, theirs, path_mtu=path_mtu, max_msg_sz=max_msg_sz, max_slot_bytes=max_slot_bytes)
        link.stream.max_slot_bytes = max_slot_bytes

    def make_ring(self, link: SendLink, slots: int, slot_bytes: int, start: Progress) -> None:
        with self._lock:
            link.prepare(slots, start)

    def _find_stream(self, hello: Hello) -> SendStream | None:
        found = super()._find_stream(hello)
        if found is None and hello.identity and hello.resume is None:
            # The successor of a receiver of that name, which was restarted.
            named = [stream for stream in self._streams.values() if stream.identity == hello.identity]
            found = named[0] if named else None
        return found

    def _start_of_new(self, stream: SendStream, hello: Hello) -> Progress:
        return Progress(released=0, received=0)

    def _start(self, stream: SendStream, hello: Hello) -> Progress:
        if hello.resume is not None:
            return hello.resume
        released = stream.ring.released
        return Progress(released=released, received=released)

    def check_start(self, link: SendLink, told: Progress | None, accept: Accept) -> None:
        if told is None and accept.start.received:
            raise RemoteProtocolError("the receiver says that it has frames of a stream that is only beginning")

    def use_ring(self, link: SendLink, ring: RingAddress | None) -> None:
        if ring is None:
            raise RemoteProtocolError("the receiver offered no ring")
        with self._lock:
            link.set_remote(ring)

    def resize(self, link: SendLink, wanted_bytes: int, ring: RingAddress | None) -> None:
        self.use_ring(link, ring)
        with self._lock:
            self._waiter.wake()

    def resize_answered(self, link: SendLink, answer: Resized | Refuse) -> None:
        if isinstance(answer, Refuse) and answer.code == RefuseCode.BUSY:
            self._ask_again(link)
            return
        with self._lock:
            try:
                if isinstance(answer, Resized):
                    if answer.ring is None:
                        raise RemoteProtocolError("the receiver answered RESIZE without a ring")
                    link.set_remote(answer.ring)
                elif answer.code == RefuseCode.FRAME_TOO_LARGE:
                    link.refuse_resize(answer.limit, FrameTooLarge(answer.message, fix=answer.fix))
                else:
                    link.refuse_resize(answer.limit, RdmaxferError(answer.message, fix=answer.fix))
            except RemoteProtocolError as error:
                link.fail(error)
                self._drop_ended()
            self._waiter.wake()

    def _ask_again(self, link: SendLink) -> None:
        """On the control thread: the receiver is still registering memory."""

        def ask() -> None:
            connection = self._connections.get(link.session)
            if connection is not None and link.resize_wanted:
                connection.request_resize(link.resize_wanted, None)

        if self._control is not None:
            self._control.call_later(RESIZE_RETRY_S, ask)

    def wanted(self, link: SendLink) -> int:
        return link.resize_wanted

    def slot_limit(self, link: SendLink) -> int:
        return link.stream.max_slot_bytes

    # --- the end -------------------------------------------------------------------------------------------------------

    def _count_link(self, link: SendLink) -> None:
        self._credits_before += link.credits_received

    def _loss(self, stream: SendStream, error: RdmaxferError | None) -> PeerLost | None:
        lost = self._loss_of(stream, error)
        if lost is not None and lost.unreleased:
            self._lossy += 1
            self._latest_loss = lost
        return lost

    def _loss_of(self, stream: SendStream, error: RdmaxferError | None) -> PeerLost | None:
        unreleased = stream.unreleased
        lost = super()._loss(stream, error)
        if lost is not None:
            return type(lost)(str(lost).removesuffix(f" Fix: {lost.fix}"), unreleased=unreleased, fix=lost.fix)
        if unreleased:
            text = (
                f"the receiver {stream.peer} left before it had released {len(unreleased)} of the frames it was sent."
            )
            return PeerLost(text, unreleased=unreleased)
        if stream.origin is not None:
            return PeerLost(
                f"the receiver {stream.peer} closed the connection; it has received and released every frame."
            )
        return None

    def _forget(self, stream: SendStream) -> None:
        self._dropped_before += stream.dropped
        self._drops += stream.take_drops()
        stream.end()
        self._pool.forget_lent()

    def close(self, timeout: float = 5.0) -> None:
        """Say goodbye to all peers and free everything, within about `timeout` seconds whatever they do. Twice is harmless."""
        deadline = Deadline(timeout)
        try:
            for intake in self._intakes:
                intake.close(deadline.left_s())
        finally:
            super().close(deadline.left_s())

    def _say_goodbye(self, deadline: Deadline) -> None:
        """Wait until the devices of all receivers have confirmed every frame, then say goodbye in band, after the last of them."""

        def placed() -> bool | None:
            self._pump_all()
            for link in self._links:
                link.fence()
            waiting = any(stream.pending or (stream.link is None and stream.holds) for stream in self._streams.values())
            return None if waiting or any(not link.all_completed for link in self._links) else True

        def told() -> bool | None:
            said = [link.say_bye() for link in self._links]
            return True if all(said) and all(link.all_completed for link in self._links) else None

        if self._failure is not None:
            return
        with self._lock:
            try:
                try:
                    self._waiter.wait_locked(
                        placed, deadline, "closing: waiting for the devices to confirm the last frames"
                    )
                except TimeoutExpired:
                    behind = [stream for stream in self._streams.values() if stream.link is None or stream.pending]
                    if not behind:
                        raise
                    for stream in behind:
                        self._leave_behind(stream)
                try:
                    self._waiter.wait_locked(told, deadline.within(GOODBYE_S), "closing: saying goodbye")
                except TimeoutExpired as error:
                    log.info("%s All frames were confirmed.", error)
            finally:
                lost = [loss for loss in self._losses if loss.unreleased]
                self._losses.clear()
        if lost:
            raise lost[0]

    def _leave_behind(self, stream: SendStream) -> None:
        """There is no time left for this receiver, which is away or has no room for the last frames."""
        if stream.link is None:
            self.give_up(stream, None)
            return
        numbers = tuple(out.seq for out in stream.pending)
        text = (
            f"the receiver {stream.peer} had no room for the last {len(numbers)} frames before this sender was closed."
        )
        self._losses.append(
            PeerLost(text, unreleased=numbers, fix="flush() before close(), or give close() more time.")
        )
        stream.pending.clear()

    def retire(self, link: SendLink) -> None:
        super().retire(link)
        with self._lock:
            self._pool.forget_lent()
            self._retired += 1
            self._waiter.wake()

    def _free_memory(self) -> None:
        for intake in self._intakes:
            intake.end()
        with self._lock:
            self._registrations.clear()
            for source in self._borrowed.values():
                source.unregister()
            self._borrowed.clear()
            self._pool.close()
            pds, self._pds = self._pds, {}
        for pd in pds.values():
            pd.close()


class _Prepared(NamedTuple):
    """What is ready to be sent: from staging memory, or (None) where it is."""

    kind: FrameType
    pieces: tuple[Piece, ...]
    staging: StagingSlot | None
    holder: Holder


def _check_policy(when_full: str) -> None:
    if when_full not in WHEN_FULL:
        raise ValueError(f"when_full is one of {', '.join(map(repr, WHEN_FULL))}, not {when_full!r}")


def _nanoseconds(captured_ns: int | None) -> int:
    if captured_ns is None:
        return 0
    if not isinstance(captured_ns, (int, np.integer)) or not -(1 << 63) <= captured_ns < 1 << 63:
        raise FrameError(
            f"captured_ns is a whole number of nanoseconds since 1970 that fits in 64 bits, not {captured_ns!r}.",
            fix="pass time.time_ns(), or int(seconds * 1e9).",
        )
    return int(captured_ns)
