"""Frames over TCP, where there is no RDMA device: one-sided writes by the words of `base.py`, carried by ZeroMQ.

Each connection has a socket of its own: a ROUTER at the side that is bound, at a free port, and a DEALER. A peer is known by a key
of 16 random bytes, which it got over the control plane and says first; nobody else is listened to. With CURVE, the data are
encrypted as the control plane is.

A message is a head (`_HEAD`), with the frame's header behind it, and as a second part the payload, which ZeroMQ reads from where it
lies, on both sides. The service thread of a node owns all sockets, and appends completions.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import zmq

from rdmaxfer.cm.curve import Identity
from rdmaxfer.errors import NoDevice, VerbsError
from rdmaxfer.fabric import soft
from rdmaxfer.fabric.owner import Owner
from rdmaxfer.fabric.soft import FLUSHED, Completion, Posted

log = logging.getLogger("rdmaxfer")

KEY_BYTES: Final = 16
_HEAD: Final = struct.Struct("<BxxxIIIQQ")
"""kind, immediate, rkey, bytes of the frame's header, remote address, bytes of the payload."""
_HELLO, _WRITE, _IMM, _SEND = range(1, 5)

AT_A_TIME: Final = 32
"""Messages of one connection before the next one's turn."""
LINGER_MS: Final = 500
"""For small messages under way when a connection ends: the goodbye above all."""
TRACK_MS: Final = 50
"""How often to look whether ZeroMQ is done with memory, if nothing else happens."""
GRACE_S: Final = 0.2
"""So long a connection that has ended is not told of."""
CALL_S: Final = 10.0
CLOSING_S: Final = 1.0
SMALL_MESSAGE_BYTES: Final = 65536
"""Enough for a head with the header of a frame."""
COPIED_BELOW: Final = 16384
"""Payloads that ZeroMQ copies: following what becomes of the memory costs more."""


@dataclass(frozen=True)
class TcpRoute:
    """How to reach a peer: the host that its control plane is at; where we are bound ourselves, that host."""

    host: str
    bound: bool
    reason: str = field(compare=False, default="")
    instead: bool = False
    """Whether RDMA was wanted, and could not be had."""
    fabric: ClassVar[str] = "tcp"
    device: ClassVar[str] = "tcp"

    def __str__(self) -> str:
        return f"tcp, {'bound to' if self.bound else 'towards'} {self.host}"


class TcpDomain(Owner):
    """The connections of one node, and the thread that serves them."""

    name = "tcp"
    reports = False

    def __init__(self, identity: Identity | None = None) -> None:
        super().__init__()
        self.lost = False
        self.identity = identity
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._service = _Service()
        self._opened()

    def __repr__(self) -> str:
        return "<TcpDomain>"

    def protection_domain(self) -> TcpProtectionDomain:
        return TcpProtectionDomain(self)

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        return self._context.socket(kind)

    @property
    def service(self) -> _Service:
        return self._service

    def _destroy(self) -> None:
        self._service.stop()
        self._context.destroy(linger=LINGER_MS)


class TcpProtectionDomain(soft.ProtectionDomain):
    """... whose endpoints are connected by TCP."""

    def endpoint(
        self,
        route: TcpRoute,
        *,
        send_depth: int,
        recv_depth: int,
        recv_bytes: int = 0,
        lanes: int = 1,
        remote_write: bool,
        max_write_bytes: int = 0,
    ) -> TcpEndpoint:
        """`max_write_bytes`: no more is taken of a peer at once."""
        return TcpEndpoint(
            self, route, recv_depth=recv_depth, max_message_bytes=max(max_write_bytes, SMALL_MESSAGE_BYTES)
        )


@dataclass(frozen=True)
class EndpointAddress:
    """What the peer must know: the port (0 at the side that connects), and what to say there."""

    port: int
    key: bytes


class TcpEndpoint(soft.Endpoint):
    """One end of a connection."""

    def __init__(self, pd: soft.ProtectionDomain, route: TcpRoute, *, recv_depth: int, max_message_bytes: int) -> None:
        super().__init__(pd, recv_depth=recv_depth)
        self.route = route
        self._domain: TcpDomain = pd.domain
        self._service = self._domain.service
        self._key = secrets.token_bytes(KEY_BYTES)
        self._limit = max_message_bytes
        self._recv_depth = recv_depth
        self.under_way: deque[tuple[Posted, zmq.MessageTracker | None]] = deque()
        """Sent, as far as ZeroMQ was told."""
        self.left: list[zmq.MessageTracker] = []
        """Of what was under way when the socket was closed: ZeroMQ may still read from that memory."""
        self.peer: bytes | None = None
        """The ROUTER's name for the peer; b"" at a DEALER; None as long as nobody has said the key."""
        self.socket: zmq.Socket[bytes] | None = None
        self.watch: zmq.Socket[bytes] | None = None
        self.port = 0
        self.ends_s: float | None = None
        """When to say that the connection has ended."""
        if route.bound:
            self._bind()
        self._opened()

    def __repr__(self) -> str:
        return f"<TcpEndpoint {'at port' if self.route.bound else 'to port'} {self.port} of {self.route.host}>"

    @property
    def address(self) -> EndpointAddress:
        return EndpointAddress(self.port, self._key)

    # --- connecting ----------------------------------------------------------------------------------------------------

    def _new_socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._domain.socket(kind)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)  # what is under way is limited by credit
        socket.setsockopt(zmq.RCVHWM, self._recv_depth)
        socket.setsockopt(zmq.MAXMSGSIZE, self._limit)
        return socket

    def _bind(self) -> None:
        socket = self._new_socket(zmq.ROUTER)
        try:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            curve = self._domain.identity
            if curve is not None:
                # Who the peer is, the control plane has seen; here the key that it was told there says so.
                socket.setsockopt(zmq.CURVE_SERVER, 1)
                socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.public)
                socket.setsockopt(zmq.CURVE_SECRETKEY, curve.secret)
            socket.bind(_endpoint(self.route.host, "*"))
            self.port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise NoDevice(f"no port could be bound at {self.route.host}: {zmq.strerror(error.errno or 0)}.") from None
        self.socket = socket
        self._service.call(lambda: self._service.serve(self))

    def connect(self, *, port: int, key: bytes, peer_key: bytes | None) -> None:
        """Connect to the bound peer's `port`. (The bound side waits for it.) `peer_key`: its public key, with CURVE."""
        self._check_open()
        if self.route.bound:
            return
        socket = self._new_socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.RECONNECT_IVL, -1)  # not ZeroMQ's: only ours knows what has to be sent again
            socket.setsockopt(zmq.CONNECT_TIMEOUT, 5000)
            curve = self._domain.identity
            if curve is not None and peer_key is not None:
                socket.setsockopt(zmq.CURVE_SERVERKEY, peer_key)
                socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.public)
                socket.setsockopt(zmq.CURVE_SECRETKEY, curve.secret)
            ends = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            ends |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            self.watch = socket.get_monitor_socket(ends)
            self.port = port
            socket.connect(_endpoint(self.route.host, port))
            socket.send(_HEAD.pack(_HELLO, 0, 0, 0, 0, 0) + key)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise NoDevice(
                f"port {port} of {self.route.host} can't be connected to: {zmq.strerror(error.errno or 0)}."
            ) from None
        self.socket = socket
        self.peer = b""
        self._service.call(lambda: self._service.serve(self))

    # --- posting -------------------------------------------------------------------------------------------------------

    def attend(self) -> None:
        self._service.attend(self)

    def write(
        self,
        header_address: int,
        header_bytes: int,
        header_lkey: int,
        address: int,
        nbytes: int,
        lkey: int,
        remote_address: int,
        rkey: int,
        imm: int,
        wr_id: int,
        signaled: bool,
        lane: int = 0,
        more: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        payload: bytes | memoryview = self.pd.local(lkey, address, nbytes) if nbytes else b""
        if more:
            payload = self.pd.joined(payload, more)
        head = _HEAD.pack(_WRITE, imm, rkey, header_bytes, remote_address, len(payload))
        small = head + bytes(self.pd.local(header_lkey, header_address, header_bytes))
        self.post(Posted(wr_id, signaled, (small, payload) if nbytes else (small,)))

    def write_imm(self, imm: int, wr_id: int, lane: int = 0) -> None:
        self.post(Posted(wr_id, True, (_HEAD.pack(_IMM, imm, 0, 0, 0, 0),)))

    def send_inline(self, data: bytes, wr_id: int, signaled: bool) -> None:
        if len(data) > soft.MAX_SEND:
            raise ValueError(f"a message of {len(data)} bytes is above {soft.MAX_SEND}")
        self.post(Posted(wr_id, signaled, (_HEAD.pack(_SEND, 0, 0, 0, 0, 0) + data,)))

    # --- on the service's thread ---------------------------------------------------------------------------------------

    def send(self) -> bool:
        """Hand to ZeroMQ what was posted. Whether there is more."""
        socket = self.socket
        if socket is None or self.peer is None:
            return False
        for _ in range(AT_A_TIME):
            if not self.outbox:
                return False
            posted = self.outbox.first()
            tracker = None
            if posted.parts:
                try:
                    tracker = self._send_parts(socket, posted.parts)
                except zmq.ZMQError as error:
                    self.broke(f"the TCP connection broke: {zmq.strerror(error.errno or 0)}")
                    return False
            self.under_way.append((posted, tracker))
            self.outbox.take()
        return bool(self.outbox)

    def _send_parts(self, socket: zmq.Socket[bytes], parts: tuple[Any, ...]) -> zmq.MessageTracker | None:
        if self.peer:
            socket.send(self.peer, zmq.SNDMORE)
        if len(parts) == 1:
            socket.send(parts[0])
            return None
        socket.send(parts[0], zmq.SNDMORE)
        if len(parts[1]) < COPIED_BELOW:
            socket.send(parts[1])
            return None
        tracker: zmq.MessageTracker = socket.send(parts[1], copy=False, track=True)
        return tracker

    def confirm(self) -> None:
        """Complete what ZeroMQ is done with. Not once the connection has ended, for it may have thrown it away."""
        while self.ends_s is None and self.under_way and ((tracker := self.under_way[0][1]) is None or tracker.done):
            posted, _ = self.under_way.popleft()
            if posted.signaled:
                self.complete(Completion(posted.wr_id))

    def receive(self) -> bool:
        """Place what has arrived, as long as there are receives for it. Whether there may be more."""
        socket = self.socket
        if socket is None:
            return False
        for _ in range(AT_A_TIME):
            if not self.receives:
                return False
            try:
                parts: list[Any] = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            except zmq.ZMQError as error:
                self.broke(f"the TCP connection broke: {zmq.strerror(error.errno or 0)}")
                return False
            if self.route.bound:
                sender, parts = parts[0].bytes, parts[1:]
                if sender != self.peer:
                    self._stranger(sender, parts)
                    continue
            if not self._place(parts):
                self.broke("the peer sent what is no write of this version, or one to memory that is not its")
                return False
        return True

    def _stranger(self, sender: bytes, parts: list[Any]) -> None:
        if self.peer is None and len(parts) == 1 and len(parts[0]) == _HEAD.size + KEY_BYTES:
            data = parts[0].bytes
            if data[0] == _HELLO and hmac.compare_digest(data[_HEAD.size :], self._key):
                self.peer = sender

    def _place(self, parts: list[Any]) -> bool:
        if not parts or len(parts) > 2 or len(parts[0]) < _HEAD.size:
            return False
        small = parts[0].buffer
        kind, imm, rkey, header_bytes, address, nbytes = _HEAD.unpack_from(small)
        rest = small[_HEAD.size :]
        if kind == _WRITE:
            payload = parts[1].buffer if len(parts) == 2 else b""
            if len(rest) != header_bytes or len(payload) != nbytes:
                return False
            if self.pd.remote(rkey, address, header_bytes + nbytes) is None:
                return False
            # The payload stays where ZeroMQ has put it: copying it into the ring would only cost time.
            self.arrived(header_bytes + nbytes, imm, (bytes(rest), memoryview(payload).toreadonly()))
        elif kind == _IMM and not len(rest) and len(parts) == 1:
            self.arrived(0, imm)
        elif kind == _SEND and len(rest) <= soft.MAX_SEND and len(parts) == 1:
            self.message(bytes(rest))
        else:
            return False
        return True

    def look(self) -> None:
        """The socket's monitor has something to say: there is no connection (any more)."""
        watch = self.watch
        if watch is None:
            return
        with contextlib.suppress(zmq.Again):
            while True:
                watch.recv_multipart(zmq.NOBLOCK)
                self.ends_s = self.ends_s or time.monotonic() + GRACE_S

    def end_if_due(self) -> None:
        """Some time after the connection has ended: what came before, and a goodbye by the control plane, come first."""
        if self.ends_s is not None and time.monotonic() >= self.ends_s and not self.error:
            self.receive()
            self.broke(
                f"the TCP connection to port {self.port} of {self.route.host}, which carries the frames, has ended or "
                "could not be made (a firewall must let it through)"
            )

    def flush(self) -> None:
        """Nothing will be sent or received any more."""
        for posted, _ in self.under_way:
            self.complete(Completion(posted.wr_id, status=FLUSHED))
        while self.outbox:
            self.complete(Completion(self.outbox.take().wr_id, status=FLUSHED))
        self.left += [tracker for _, tracker in self.under_way if tracker is not None]
        self.under_way.clear()

    # --- the end -------------------------------------------------------------------------------------------------------

    def to_error(self) -> None:
        """Give up the connection; everything outstanding completes, with a status."""
        self._check_open()
        self._service.call(lambda: self._service.release(self, clean=False, reason="it was given up"))

    def drain(self, timeout_s: float) -> bool:
        self._check_open()
        end_s = time.monotonic() + timeout_s
        self._service.call(lambda: self._service.retire(self))
        trackers = self.left + [tracker for _, tracker in self.under_way if tracker is not None]
        done = bool(self.error) or _wait_for(trackers, end_s)
        self._service.call(lambda: self._service.release(self, clean=done and not self.error))
        # Closing takes away what was not sent; until then ZeroMQ may read from it.
        return _wait_for(trackers, end_s + CLOSING_S)

    def _destroy(self) -> None:
        self._service.call(lambda: self._service.release(self, clean=False))


def _wait_for(trackers: list[zmq.MessageTracker], end_s: float) -> bool:
    """Wait until ZeroMQ is done with some memory. Whether it is."""
    try:
        for tracker in trackers:
            tracker.wait(max(0.0, end_s - time.monotonic()))
    except zmq.NotDone:
        return False
    return True


def _endpoint(host: str, port: int | str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class _Service:
    """The thread that owns the sockets."""

    def __init__(self) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls: deque[Callable[[], None]] = deque()
        self._attend: deque[TcpEndpoint] = deque()
        self._endpoints: dict[Any, TcpEndpoint] = {}
        """By socket, and by the monitor of it."""
        self._poller = zmq.Poller()
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._over = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="rdmaxfer-tcp", daemon=True)
        self._thread.start()

    # --- for any thread ------------------------------------------------------------------------------------------------

    def attend(self, endpoint: TcpEndpoint) -> None:
        self._attend.append(endpoint)
        os.eventfd_write(self._wake_fd, 1)

    def call(self, fn: Callable[[], Any]) -> Any:
        """Run something on the thread, and return what it returns."""
        if threading.current_thread() is self._thread:
            return fn()
        done = threading.Event()
        outcome: list[tuple[Any, BaseException | None]] = []

        def run() -> None:
            try:
                outcome.append((fn(), None))
            except BaseException as error:
                outcome.append((None, error))
            done.set()

        self._calls.append(run)
        os.eventfd_write(self._wake_fd, 1)
        end_s = time.monotonic() + CALL_S
        while not done.wait(0.1):
            if not self._thread.is_alive() or time.monotonic() > end_s:
                raise VerbsError(
                    "the thread that serves TCP connections does not answer.", verb="tcp", errno=5
                ) from self._failure
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def stop(self) -> None:
        self._over = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(CALL_S)
        os.close(self._wake_fd)

    # --- on the thread -------------------------------------------------------------------------------------------------

    def serve(self, endpoint: TcpEndpoint) -> None:
        for socket in (endpoint.socket, endpoint.watch):
            if socket is not None:
                self._endpoints[socket] = endpoint
                self._poller.register(socket, zmq.POLLIN)

    def retire(self, endpoint: TcpEndpoint) -> None:
        """Say what is left to be said, and listen no more."""
        if endpoint.socket is not None and not endpoint.error:
            endpoint.send()
        for socket in (endpoint.socket, endpoint.watch):
            if socket is not None and self._endpoints.pop(socket, None) is not None and socket in self._poller:
                self._poller.unregister(socket)

    def release(self, endpoint: TcpEndpoint, *, clean: bool, reason: str = "") -> None:
        """Close an endpoint's socket; if `clean`, after what was handed to it."""
        if endpoint.socket is None:
            return
        self.retire(endpoint)
        if endpoint.watch is not None:
            endpoint.socket.disable_monitor()
            endpoint.watch.close(linger=0)
        endpoint.socket.close(linger=LINGER_MS if clean else 0)
        endpoint.socket = endpoint.watch = None
        endpoint.flush()
        if reason:
            endpoint.broke(reason)

    def _main(self) -> None:
        try:
            while not self._over:
                self._turn()
        except BaseException as error:
            self._failure = error
            log.exception("the thread that serves TCP connections died")
            for endpoint in set(self._endpoints.values()):
                endpoint.broke(f"an internal error: {error!r}")

    def _turn(self) -> None:
        waiting = any(endpoint.under_way or endpoint.ends_s for endpoint in self._endpoints.values())
        busy = self._attend or self._calls
        events = dict(self._poller.poll(0 if busy else TRACK_MS if waiting else None))
        if self._wake_fd in events:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        while self._calls:
            self._calls.popleft()()
        due: dict[TcpEndpoint, None] = {}
        while self._attend:
            due[self._attend.popleft()] = None
        for source in events:
            endpoint = self._endpoints.get(source)
            if endpoint is not None:
                due[endpoint] = None
                if source is endpoint.watch:
                    endpoint.look()
        for endpoint in due:
            if endpoint.error or endpoint.socket is None:
                continue
            if endpoint.receive() | endpoint.send():
                self._attend.append(endpoint)
        for endpoint in set(self._endpoints.values()):
            if endpoint.under_way:
                endpoint.confirm()
            if endpoint.ends_s is not None:
                endpoint.end_if_due()
        self._rest()

    def _rest(self) -> None:
        """Who has no receives left, or is broken, is not polled until that has changed."""
        for source, endpoint in self._endpoints.items():
            if source is endpoint.socket:
                self._poller.modify(source, zmq.POLLIN if endpoint.receives and not endpoint.error else 0)


__all__ = ["EndpointAddress", "TcpDomain", "TcpEndpoint", "TcpProtectionDomain", "TcpRoute"]
