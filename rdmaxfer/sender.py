"""The user's object that pushes frames."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rdmaxfer.cm.messages import MAX_SLOT_BYTES, Accept, Hello, Refuse, RefuseCode, Resized, RingAddress
from rdmaxfer.errors import (
    DeviceError,
    FrameError,
    FrameTooLarge,
    PeerLost,
    RdmaxferError,
    RemoteProtocolError,
    TimeoutExpired,
    VerbsError,
)
from rdmaxfer.frame import FrameType, encode_metadata, frame_type
from rdmaxfer.inband import MESSAGE_BYTES
from rdmaxfer.lease import Slot
from rdmaxfer.link import recv_depth, send_depth
from rdmaxfer.node import Node, StateChange
from rdmaxfer.send_link import SendLink
from rdmaxfer.staging import Holder, Registration, Source, StagingPool, StagingSlot
from rdmaxfer.waiting import Deadline

if TYPE_CHECKING:
    from rdmaxfer.fabric.devices import Route
    from rdmaxfer.fabric.verbs import Domain, ProtectionDomain

RESIZE_RETRY_S = 0.02
"""How long to leave a receiver that is registering memory for larger slots alone."""

log = logging.getLogger("rdmaxfer")

GOODBYE_S = 1.0
"""How long `close` waits for the receivers' devices to confirm BYE."""


@dataclasses.dataclass(frozen=True)
class SenderStatistics:
    """A snapshot of a sender's counters, since it was made."""

    peers: int
    """Receivers connected now."""
    turned_away: int
    """Connections to endpoints bound here that failed before a word was said: no CURVE key, a wrong one, or no ZeroMQ at all."""
    peers_lost: int
    """Connections that ended without a goodbye, or before all frames were released."""
    frames: int
    """Frames accepted by `push` and `reserve`: each counts once, however many receivers there are."""
    bytes: int
    """Their payload bytes."""
    copied: int
    """Frames that were copied into staging memory first (the others were in registered memory already)."""
    waits: int
    """How often `push` had to wait for credit or staging memory."""
    unreleased: int
    """Frames that some receiver has not released yet."""
    credits_received: int
    """Credit messages received."""
    resizes: int
    """Resizes asked for."""


class Sender(Node[SendLink]):
    """Pushes frames to every receiver that is connected: each receiver gets every frame pushed while it is there.

    Parameters (all have working defaults):
      device: name of the RDMA device, e.g. "rxe0"; by default the one whose GID matches the route to the peer, or the
        environment's RDMAXFER_DEVICE.
      port, gid_index: which port and GID of the device; found by default.
      slots: frames that may be on their way or unreleased at a time. Each receiver may lower it for itself.
      slot_bytes: payload bytes to ask receivers to begin with (0: what they have); larger frames make slots grow.
      max_peers: receivers that may be connected to each endpoint bound here.
      queue_pairs: queue pairs of each connection (1 to 8), over which its frames take turns; the smaller wish of the two sides
        counts. Two keep more of a device or of Soft-RoCE busy than one.
      spin_s: seconds to poll busily before a wait sleeps. Lowers latency when a core is to spare.
      lease_s: seconds without a sign of life after which a peer is given up.
      secret_key: this side's file NAME.key_secret (`rdmaxfer keygen`). With it, CURVE authenticates and encrypts the control plane
        of every endpoint, and `connect` needs the peer's public key.
      allowed_keys: directory with the files NAME.key of the receivers that may connect to endpoints bound here.
      on_state: called with a StateChange when a peer has connected, said goodbye, or was lost; on a thread of this object, which
        waits for it: keep it short, and call nothing of this object that waits (set an event, and connect elsewhere).

    Use it in a `with` block, or close() it. All methods may be called from any thread.
    """

    role = "sender"

    def __init__(
        self,
        *,
        device: str | None = None,
        port: int | None = None,
        gid_index: int | None = None,
        slots: int = 16,
        slot_bytes: int = 0,
        max_peers: int = 1024,
        queue_pairs: int = 2,
        spin_s: float = 0.0,
        lease_s: float = 5.0,
        secret_key: str | os.PathLike[str] | None = None,
        allowed_keys: str | os.PathLike[str] | None = None,
        on_state: Callable[[StateChange], object] | None = None,
    ) -> None:
        super().__init__(
            device=device,
            port=port,
            gid_index=gid_index,
            slots=slots,
            slot_bytes=slot_bytes,
            queue_pairs=queue_pairs,
            max_peers=max_peers,
            spin_s=spin_s,
            lease_s=lease_s,
            secret_key=secret_key,
            allowed_keys=allowed_keys,
            on_state=on_state,
        )
        self._pool = StagingPool(slots)
        self._pds: dict[Domain, ProtectionDomain] = {}
        self._registrations: list[Registration] = []
        self._seq = 0
        self._bytes = 0
        self._copied = 0
        self._waits = 0
        self._resizes = 0
        self._credits_before = 0

    # --- pushing -------------------------------------------------------------------------------------------------------

    def push(
        self,
        array: npt.ArrayLike,
        *,
        metadata: Mapping[str, Any] | None = None,
        captured_ns: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send an array to every connected receiver; returns the frame's sequence number.

        `array`: any shape of up to 8 dimensions, any fixed-size numeric, bool, complex, datetime64, timedelta64 or structured
        dtype, any byte order. It is copied once, into staging memory, unless it is C-contiguous and lies in memory registered by
        `register`: then the device reads it where it is, and it must not be changed before `flush` has returned.
        `metadata`: a small mapping (4 KiB as msgpack) that travels along. `captured_ns`: capture time, nanoseconds since 1970.

        Waits up to `timeout` seconds (for ever by default) until every receiver has a free slot, and for the first receiver to
        connect. Raises TimeoutExpired (the frame was not sent to anybody), UnsupportedDtype, FrameTooLarge, FrameError,
        PeerLost (once, when a connection was lost), NotConnected, ClosedError.
        """
        data = np.asanyarray(array)
        kind = frame_type(data.shape, data.dtype)
        packed = encode_metadata(metadata) if metadata else b""
        captured_ns = _nanoseconds(captured_ns)
        deadline = Deadline(timeout)
        if self._registrations and data.flags.c_contiguous and data.nbytes:
            address = data.__array_interface__["data"][0]
            with self._lock:
                source = self._registered(address, data.nbytes)
                if source is not None:
                    source.in_flight += 1  # keeps it registered while we wait
                    try:
                        return self._push(kind, source, address, packed, captured_ns, deadline)
                    finally:
                        source.in_flight -= 1
        holder = Holder()
        staging = self._stage(kind, holder, deadline)
        try:
            _copy(data, staging)
            with self._lock:
                seq = self._push(kind, staging, staging.address, packed, captured_ns, deadline)
                self._copied += 1
                return seq
        finally:
            self._discard_staged(staging)

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
        return Slot(
            self, staging, holder, staging.buffer.array(0, kind.shape, kind.dtype, writable=True), metadata, timeout
        )

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
            self._registrations.append(registration)
        return registration

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every frame pushed so far has been released by every receiver it went to.

        After it, registered arrays may be changed. Raises TimeoutExpired (it names what is outstanding), PeerLost with the numbers
        of the frames that a receiver that left had not released.
        """
        with self._lock:
            targets = [(link, link.ring.position) for link in self._links]

            def released() -> bool | None:
                for link, position in targets:
                    if not link.live:
                        continue
                    if link.ring.released < position:
                        link.ask_credit()
                        return None
                    if link.ring.completed < position:
                        link.fence()
                        return None
                for loss in self._losses:
                    if loss.unreleased:
                        self._losses.remove(loss)
                        raise loss
                return True

            try:
                self._waiter.wait_locked(released, Deadline(timeout), "flushing")
            except TimeoutExpired as error:
                waiting = {link.peer: list(link.seqs) for link in self._links if link.ring.outstanding}
                text = "; ".join(
                    f"{peer} has not released {len(seqs)} frame{'s' if len(seqs) != 1 else ''}, the first is {seqs[0]}"
                    for peer, seqs in waiting.items()
                    if seqs
                )
                raise TimeoutExpired(
                    f"{error} {text or 'the device has not confirmed all writes'}.",
                    fix="the receiver must release its frames (leave their `with` blocks) and call recv() again.",
                ) from None

    def statistics(self) -> SenderStatistics:
        """A snapshot of the counters."""
        with self._lock:
            return SenderStatistics(
                peers=len(self._links),
                turned_away=sum(server.turned_away for server in self._servers),
                peers_lost=self._peers_lost,
                frames=self._seq,
                bytes=self._bytes,
                copied=self._copied,
                waits=self._waits,
                unreleased=max((link.ring.outstanding for link in self._links), default=0),
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
        staging = self._pool.take(nbytes, holder)
        if staging is None:
            for link in self._links:
                link.fence()
        return staging

    def _registered(self, address: int, nbytes: int) -> Registration | None:
        for registration in self._registrations:
            if registration.covers(address, nbytes):
                return registration
        return None

    def _push_staged(
        self,
        staging: StagingSlot,
        array: np.ndarray[Any, Any],
        *,
        metadata: Mapping[str, Any] | None,
        captured_ns: int,
        timeout: float | None,
    ) -> int:
        kind = frame_type(array.shape, array.dtype)
        packed = encode_metadata(metadata) if metadata else b""
        with self._lock:
            seq = self._push(kind, staging, staging.address, packed, _nanoseconds(captured_ns), Deadline(timeout))
            staging.let_go()
            return seq

    def _discard_staged(self, staging: StagingSlot) -> None:
        with self._lock:
            staging.let_go()

    def _push(
        self, kind: FrameType, source: Source, address: int, metadata: bytes, captured_ns: int, deadline: Deadline
    ) -> int:
        """Write the frame to all receivers at once, or to none. With the lock held."""
        self._check_usable()
        if self._seq & 7 == 0:
            self._waiter.poll()  # to notice receivers that have left
        while True:
            if not self._can_push(kind.payload_bytes):
                self._waits += 1
                what = (
                    "waiting for every receiver to have a free slot"
                    if self._links
                    else "waiting for a receiver to connect"
                )
                self._waiter.wait_locked(lambda: self._can_push(kind.payload_bytes), deadline, what)
            if self._register_for_all(source):
                break
        seq = self._seq
        pushed_ns = time.time_ns()
        interrupt: KeyboardInterrupt | None = None
        done = False
        while not done:
            try:
                self._seq = seq + 1
                for link in self._links:
                    if link.latest_seq != seq and link.live:
                        link.push(
                            kind,
                            source,
                            address,
                            seq=seq,
                            captured_ns=captured_ns,
                            pushed_ns=pushed_ns,
                            metadata=metadata,
                        )
                done = True
            except KeyboardInterrupt as error:  # finish what was begun: all receivers get the frame, or none
                interrupt = error
        self._bytes += kind.payload_bytes
        if any(not link.live for link in self._links):
            self._drop_ended()
        if interrupt is not None:
            raise interrupt
        return seq

    def _register_for_all(self, source: Source) -> bool:
        """Register memory on each receiver's device, where it is not yet: an error here is the caller's, and nothing was sent.
        False if a device turned out to be lost; its links have ended then."""
        for link in self._links:
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

    def _can_push(self, nbytes: int) -> bool | None:
        """Whether every receiver can take a frame of `nbytes` now (then True); asks for larger rings where they are too small."""
        if self._losses or not self._links:
            self._check_connected()
            return None
        can = True
        for link in self._links:
            if nbytes > link.slot_bytes:
                self._grow(link, nbytes)
                can = False
            elif not link.can_push(nbytes):
                can = False
        return can or None

    def _check_size(self, nbytes: int) -> None:
        """Raise FrameTooLarge if some receiver could never take a frame of `nbytes`."""
        for link in self._links:
            if nbytes > link.max_slot_bytes:
                raise FrameTooLarge(
                    f"a frame of {nbytes} bytes is above the limit of {link.max_slot_bytes} bytes of the receiver {link.peer}.",
                    fix=f"Receiver(max_frame_bytes={nbytes}) at the receiving end, or push smaller frames.",
                )
            if not link.fits_queue(nbytes):
                raise FrameTooLarge(
                    f"a frame of {nbytes} bytes would need more work requests than the send queue to {link.peer} holds.",
                    fix="push smaller frames, or give sender and receiver more slots.",
                )

    def _grow(self, link: SendLink, nbytes: int) -> None:
        self._check_size(nbytes)
        if link.resize_error is not None:
            error, link.resize_error = link.resize_error, None
            raise error
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
        with self._lock:
            if registration not in self._registrations:
                return

            def idle() -> bool | None:
                if not registration.in_flight:
                    return True
                for link in self._links:
                    link.fence()
                return None

            self._waiter.wait_locked(idle, Deadline(30.0), "waiting for the last push from a registered array")
            self._registrations.remove(registration)
            registration.unregister()

    # --- what the handshake asks (rdmaxfer.handshake) -------------------------------------------------------------------

    def _make_link(
        self, session: bytes, peer: str, domain: Domain, route: Route, lanes: int, owned: ExitStack
    ) -> SendLink:
        from rdmaxfer.fabric.verbs import Endpoint

        with self._lock:
            pd = self._pds.get(domain)
            if pd is None:
                pd = self._pds[domain] = domain.protection_domain()
        endpoint = Endpoint(
            pd,
            route,
            send_depth=send_depth(self._slots),
            recv_depth=recv_depth(self._slots),
            recv_bytes=MESSAGE_BYTES,
            lanes=lanes,
            remote_write=False,
        )
        owned.callback(endpoint.close)
        return SendLink(session, peer, endpoint, owned.pop_all(), pd)

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
        link.max_slot_bytes = max_slot_bytes

    def make_ring(self, link: SendLink, slots: int, slot_bytes: int) -> None:
        link.prepare(slots)

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
        return link.max_slot_bytes

    # --- the end -------------------------------------------------------------------------------------------------------

    def _note_end(self, link: SendLink) -> None:
        super()._note_end(link)
        self._credits_before += link.credits_received

    def _loss(self, link: SendLink) -> PeerLost | None:
        unreleased = tuple(link.seqs)
        error = super()._loss(link)
        if error is not None:
            return type(error)(str(error).removesuffix(f" Fix: {error.fix}"), unreleased=unreleased, fix=error.fix)
        if unreleased:
            text = f"the receiver {link.peer} left before it had released {len(unreleased)} of the frames it was sent."
            return PeerLost(text, unreleased=unreleased)
        if link.chosen_here:
            return PeerLost(
                f"the receiver {link.peer} closed the connection; it has received and released every frame."
            )
        return None

    def _say_goodbye(self, deadline: Deadline) -> None:
        """Wait until the devices of all receivers have confirmed every frame, then say goodbye in band, after the last of them."""

        def placed() -> bool | None:
            for link in self._links:
                link.fence()
            return None if any(not link.all_completed for link in self._links) else True

        def told() -> bool | None:
            said = [link.say_bye() for link in self._links]
            return True if all(said) and all(link.all_completed for link in self._links) else None

        if self._failure is not None:
            return
        with self._lock:
            try:
                self._waiter.wait_locked(
                    placed, deadline, "closing: waiting for the devices to confirm the last frames"
                )
                try:
                    self._waiter.wait_locked(told, deadline.within(GOODBYE_S), "closing: saying goodbye")
                except TimeoutExpired as error:
                    log.info("%s All frames were confirmed.", error)
            finally:
                lost = [loss for loss in self._losses if loss.unreleased]
                self._losses.clear()
        if lost:
            raise lost[0]

    def _free_memory(self) -> None:
        with self._lock:
            for registration in self._registrations:
                registration.unregister()
            self._registrations.clear()
            self._pool.close()
            pds, self._pds = self._pds, {}
        for pd in pds.values():
            pd.close()


def _copy(data: np.ndarray[Any, Any], staging: StagingSlot) -> None:
    if data.flags.c_contiguous:
        # As bytes: numpy leaves out the padding of structures.
        np.copyto(staging.buffer.array(0, (data.nbytes,), np.uint8, writable=True), data.reshape(-1).view(np.uint8))
        return
    target = staging.buffer.array(0, data.shape, data.dtype, writable=True)
    if data.dtype.fields is not None:
        target.reshape(-1).view(np.uint8)[...] = 0  # nothing of an earlier frame is to show through the padding
    np.copyto(target, data, casting="no")


def _nanoseconds(captured_ns: int | None) -> int:
    if captured_ns is None:
        return 0
    if not isinstance(captured_ns, (int, np.integer)) or not -(1 << 63) <= captured_ns < 1 << 63:
        raise FrameError(
            f"captured_ns is a whole number of nanoseconds since 1970 that fits in 64 bits, not {captured_ns!r}.",
            fix="pass time.time_ns(), or int(seconds * 1e9).",
        )
    return int(captured_ns)
