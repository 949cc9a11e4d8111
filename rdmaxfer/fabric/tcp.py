"""Frames over TCP, where there is no RDMA device: one-sided writes by the words of `base.py`, carried by ZeroMQ.

Each connection has a socket of its own: a ROUTER at the side that is bound, at a free port, and a DEALER. A peer is known by a key
of 16 random bytes, which it got over the control plane and says first; nobody else is listened to. With CURVE, the data are
encrypted as the control plane is.

A message is a head (`_HEAD`), with the frame's header behind it, and as a second part the payload, which ZeroMQ reads from where it
lies, on both sides. Whoever posts or polls uses the socket, under a lock, through the native core (wire.h). What ZeroMQ's own
thread has taken it carries on by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hmac
import importlib
import logging
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple

import zmq

from rdmaxfer.cm.curve import Identity
from rdmaxfer.errors import NoDevice, VerbsError
from rdmaxfer.fabric import soft
from rdmaxfer.fabric.owner import Owner
from rdmaxfer.fabric.soft import FLUSHED, Completion, Mailbox

log = logging.getLogger("rdmaxfer")

KEY_BYTES: Final = 16
_HEAD: Final = struct.Struct("<BxxxIIIQQ")
"""kind, immediate, rkey, bytes of the frame's header, remote address, bytes of the payload."""
_HELLO, _WRITE, _IMM, _SEND = range(1, 5)

AT_A_TIME: Final = 32
"""Messages of one connection before the next one's turn."""
HELLO_S: Final = 0.05
"""How long the first post waits for the peer's key, which is about to come."""
LINGER_MS: Final = 500
"""For small messages under way when a connection ends: the goodbye above all."""
TRACK_S: Final = 0.05
"""How often to look whether ZeroMQ is done with memory, if nothing else happens."""
GRACE_S: Final = 0.2
"""So long a connection that has ended is not told of."""
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


@functools.cache
def _native() -> tuple[Any, Any, Any]:
    """cffi's `ffi` and `lib`, and libzmq's entry points. Raises NoDevice."""
    try:
        module = importlib.import_module("rdmaxfer._wire")
    except ImportError as error:
        raise NoDevice(
            f"rdmaxfer was installed without its native core ({error}), so frames can't go over TCP.",
            fix="install a C compiler and Python's headers (apt: gcc python3-dev), then reinstall rdmaxfer.",
        ) from None
    pyzmq = importlib.import_module("zmq.backend.cython._zmq")
    message = module.ffi.new("char[512]")
    library = module.lib.wx_open(str(pyzmq.__file__).encode(), message, len(message))
    if library == module.ffi.NULL:
        why = module.ffi.string(message).decode(errors="replace")
        raise NoDevice(
            f"this pyzmq does not let its libzmq be used: {why}.", fix="install pyzmq from PyPI or the distribution."
        )
    return module.ffi, module.lib, library


class TcpDomain(Owner):
    """The connections of one node."""

    name = "tcp"
    reports = False

    def __init__(self, identity: Identity | None = None) -> None:
        super().__init__()
        _native()
        self.lost = False
        self.identity = identity
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._freed: list[tuple[Any, object]] = []
        """Channels that are of no use any more, and the memory that ZeroMQ may still read from."""
        self._opened()

    def __repr__(self) -> str:
        return "<TcpDomain>"

    def protection_domain(self) -> TcpProtectionDomain:
        return TcpProtectionDomain(self)

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        return self._context.socket(kind)

    def free(self, channel: Any, memory: object) -> None:
        """Free a channel, and `memory` with it, once ZeroMQ has let go of it."""
        self._freed.append((channel, memory))
        self.sweep()

    def sweep(self) -> None:
        """Look what ZeroMQ has let go of."""
        _, lib, _ = _native()
        for each in list(self._freed):
            if lib.wx_let_go(each[0]) >= lib.wx_referred(each[0]):
                self._freed.remove(each)
                lib.wx_free(each[0])

    def _destroy(self) -> None:
        self._context.destroy(linger=LINGER_MS)  # it has no threads any more
        while self._freed:
            _native()[1].wx_free(self._freed.pop()[0])


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
        self.domain.sweep()
        return TcpEndpoint(
            self, route, recv_depth=recv_depth, max_message_bytes=max(max_write_bytes, SMALL_MESSAGE_BYTES)
        )


@dataclass(frozen=True)
class EndpointAddress:
    """What the peer must know: the port (0 at the side that connects), and what to say there."""

    port: int
    key: bytes


class _Posted(NamedTuple):
    """Something to be sent."""

    ordinal: int
    """Its number among all that was posted."""
    wr_id: int
    signaled: bool
    small: bytes | None
    """None: nothing, for a mere completion."""
    payload: bytes | memoryview | None


class TcpEndpoint(soft.Endpoint):
    """One end of a connection."""

    def __init__(self, pd: soft.ProtectionDomain, route: TcpRoute, *, recv_depth: int, max_message_bytes: int) -> None:
        super().__init__(pd, recv_depth=recv_depth)
        self.route = route
        self._domain: TcpDomain = pd.domain
        self._ffi, self._lib, self._library = _native()
        self._key = secrets.token_bytes(KEY_BYTES)
        self._limit = max_message_bytes
        self._recv_depth = recv_depth
        self._mutex = threading.Lock()
        """For the sockets. Inside, nothing waits, and no other lock is taken."""
        self._outbox: Mailbox[_Posted] = Mailbox()
        self._corked = False
        self._posted_before = 0
        self._under_way: deque[tuple[_Posted, int]] = deque()
        """Sent, and how many payloads ZeroMQ has to have let go of then."""
        self._channel: Any = None
        self._peer: bytes | None = None
        """The ROUTER's name for the peer; b"" at a DEALER; None as long as nobody has said the key."""
        self._greeted = False
        """Whether the peer's key was waited for."""
        self._gathering = False
        self.drained = False
        """Whether there was nothing more to receive, and ZeroMQ's descriptor will say so when there is."""
        self.hurry = False
        """Whether there is more to look at, of which nothing tells."""
        self._strangers = 0
        """Messages that took no receive, among those consumed."""
        self._socket: zmq.Socket[bytes] | None = None
        self._watch: zmq.Socket[bytes] | None = None
        self._files: dict[int, object] = {}
        self.port = 0
        self._ends_s: float | None = None
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

    def _use(self, socket: zmq.Socket[bytes]) -> None:
        self._channel = self._lib.wx_new(self._library, self._ffi.cast("void *", socket.underlying))
        if self._channel == self._ffi.NULL:
            raise MemoryError
        self._socket = socket
        watched = [each for each in (socket, self._watch) if each is not None]
        self._files = {int(each.getsockopt(zmq.FD)): each for each in watched}
        self.changes += 1

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
        self._use(socket)

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
            self._watch = socket.get_monitor_socket(ends)
            self.port = port
            socket.connect(_endpoint(self.route.host, port))
            socket.send(_HEAD.pack(_HELLO, 0, 0, 0, 0, 0) + key)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise NoDevice(
                f"port {port} of {self.route.host} can't be connected to: {zmq.strerror(error.errno or 0)}."
            ) from None
        self._peer = b""
        self._use(socket)
        self.look()  # the monitor's descriptor tells of what comes after one has looked in vain

    # --- posting -------------------------------------------------------------------------------------------------------

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
        payload: bytes | memoryview | None = self.pd.local(lkey, address, nbytes) if nbytes else None
        if more:
            payload = self.pd.joined(payload or b"", more)
        head = _HEAD.pack(_WRITE, imm, rkey, header_bytes, remote_address, len(payload or b""))
        self._post(wr_id, signaled, head + bytes(self.pd.local(header_lkey, header_address, header_bytes)), payload)

    def write_imm(self, imm: int, wr_id: int, lane: int = 0) -> None:
        self._post(wr_id, True, _HEAD.pack(_IMM, imm, 0, 0, 0, 0))

    def write_empty(self, wr_id: int, lane: int = 0) -> None:
        self.look()  # who asks for this completion means to rely on it
        self._post(wr_id, True, None)

    def send_inline(self, data: bytes, wr_id: int, signaled: bool) -> None:
        if len(data) > soft.MAX_SEND:
            raise ValueError(f"a message of {len(data)} bytes is above {soft.MAX_SEND}")
        self._post(wr_id, signaled, _HEAD.pack(_SEND, 0, 0, 0, 0, 0) + data)

    def _post(self, wr_id: int, signaled: bool, small: bytes | None, payload: bytes | memoryview | None = None) -> None:
        if self._state != "open":
            self._check_open()
        if self.error:
            raise VerbsError(f"{self.error}.", verb="post_send", errno=107)
        self._outbox.put(_Posted(self._outbox.total, wr_id, signaled, small, payload))
        if not self._corked:
            self._attend()

    def cork(self) -> None:
        self._corked = True

    def uncork(self) -> None:
        self._corked = False
        self._attend()

    def clear_posted(self) -> None:
        self._posted_before = self._outbox.total

    @property
    def last_posted(self) -> int:
        return self._outbox.total - self._posted_before

    def repost_recv(self, wr_ids: Iterable[int], lane: int = 0) -> None:
        had_none = not self.receives
        for wr_id in wr_ids:
            self.receives.put(wr_id)
        if had_none:
            self.drained = False
            if self.asleep:
                self.wake()

    def _attend(self) -> None:
        """Send what was posted."""
        with self._mutex:
            idle = not self._under_way
            if self._peer is None and not self._greeted and self._socket is not None:
                self._greeted = True
                if self._socket.poll(int(HELLO_S * 1000)) and self._lib.wx_fetch(self._channel, 1):
                    self._on_stranger(self._lib.wx_at(self._channel, 0))
            self._pump()
            self.drained = False
            if not self.asleep or self._socket is None:
                return
            # Who sleeps does not know of what is under way now. And ZeroMQ's descriptor says only once that there is something to
            # receive; sending takes that.
            missed = (idle and self._under_way) or self._lib.wx_readable(self._channel)
        if missed:
            self.wake()

    def _pump(self) -> None:
        while self._outbox and self._peer is not None and self._socket is not None and not self.error:
            posted = self._outbox.peek(0)
            if posted.ordinal >= self._lib.wx_sent(self._channel):  # else it was sent, and Ctrl-C came
                rc = self._send(posted)
                if rc == 0:
                    return
                if rc < 0:
                    self.broke(f"the TCP connection broke: {zmq.strerror(-rc)}")
                    return
            if not self._under_way or self._under_way[-1][0] is not posted:
                self._under_way.append((posted, self._lib.wx_referred(self._channel)))
            self._outbox.take()

    def _send(self, posted: _Posted) -> int:
        null = self._ffi.NULL
        small, payload = posted.small, posted.payload
        return int(
            self._lib.wx_send(
                self._channel,
                self._peer or null,
                len(self._peer or b""),
                null if small is None else small,
                0 if small is None else len(small),
                null if payload is None else self._ffi.from_buffer(payload),
                0 if payload is None else len(payload),
                payload is not None and len(payload) >= COPIED_BELOW,
            )
        )

    # --- completions ---------------------------------------------------------------------------------------------------

    @property
    def files(self) -> dict[int, object]:
        return self._files

    def look(self) -> None:
        """The socket's monitor may have something to say: that there is no connection (any more)."""
        with self._mutex:
            watch = self._watch
            if watch is None or not watch.poll(0):
                return
            self._ends_s = self._ends_s or time.monotonic() + GRACE_S
            self.drained = False
            with contextlib.suppress(zmq.Again):
                while True:
                    watch.recv_multipart(zmq.NOBLOCK)

    @property
    def patience_s(self) -> float | None:
        """How long one may sleep until `gather` could find something that no descriptor tells."""
        if self.hurry:
            return 0.0
        if self._ends_s is not None and not self.error:
            return max(0.0, self._ends_s - time.monotonic())
        return TRACK_S if self._under_way and not self.error else None

    def gather(self) -> None:
        with self._mutex:
            if self._socket is None or self.error:
                return
            if self._gathering:
                self._settle()
            self._strangers = self._lib.wx_consumed(self._channel) - self.receives.taken
            if self._outbox:
                self._pump()
            self._gathering = True
            new = self._confirmed()
            lie = self._take_in(new)
            self.done.extend(new)
            self._settle()
            self._gathering = False
            if lie:
                self.broke(lie)
            elif self._ends_s is not None and time.monotonic() >= self._ends_s and not new:
                self.broke(
                    f"the TCP connection to port {self.port} of {self.route.host}, which carries the frames, has ended "
                    "or could not be made (a firewall must let it through)"
                )

    def _confirmed(self) -> list[Completion]:
        """Complete what ZeroMQ is done with. Not once the connection has ended, for it may have thrown it away."""
        if not self._under_way or self._ends_s is not None:
            return []
        let_go = self._lib.wx_let_go(self._channel)
        new: list[Completion] = []
        for posted, referred in self._under_way:
            if referred > let_go:
                break
            if posted.signaled:
                new.append(Completion(posted.wr_id, ordinal=posted.ordinal + 1))
        return new

    def _take_in(self, new: list[Completion]) -> str:
        """Take what has arrived, as long as there are receives for it. What is wrong with it, if anything."""
        room = min(AT_A_TIME, len(self.receives))
        count = self._fetch(room)
        if count < 0:
            return f"the TCP connection broke: {zmq.strerror(-count)}"
        part = int(self.route.bound)  # behind the sender's name
        for index in range(count):
            message = self._lib.wx_at(self._channel, index)
            if part and not self._is_peers(message):
                self.drained = False
                break  # its turn comes when those before it were taken
            arrived = self._placed(message, part, self.receives.peek(index))
            if arrived is None:
                return "the peer sent what is no write of this version, or one to memory that is not its"
            arrived.ordinal = self.receives.taken + index + 1
            new.append(arrived)
        return ""

    def _fetch(self, room: int) -> int:
        """Have up to `room` messages here, of which the first is the peer's. How many are here, or a negative errno."""
        self.drained = self.hurry = False
        if not room:
            return 0
        for _ in range(AT_A_TIME):
            count = int(self._lib.wx_fetch(self._channel, room))
            if count <= 0 or not self.route.bound:
                break
            message = self._lib.wx_at(self._channel, 0)
            if self._is_peers(message):
                break
            self._on_stranger(message)
        else:
            self.hurry = True
            return 0
        self.drained = 0 <= count < room
        return count

    def _is_peers(self, message: Any) -> bool:
        return bytes(self._ffi.buffer(message.data[0], message.bytes[0])) == self._peer

    def _on_stranger(self, message: Any) -> None:
        """The first message of all that are here, of one who is not the peer: or not yet."""
        if self._peer is None and message.parts == 2 and message.bytes[1] == _HEAD.size + KEY_BYTES:
            data = bytes(self._ffi.buffer(message.data[1], message.bytes[1]))
            if data[0] == _HELLO and hmac.compare_digest(data[_HEAD.size :], self._key):
                self._peer = bytes(self._ffi.buffer(message.data[0], message.bytes[0]))
        self._lib.wx_consume(self._channel, self._lib.wx_consumed(self._channel) + 1)
        self._strangers = self._lib.wx_consumed(self._channel) - self.receives.taken
        self._pump()

    def _placed(self, message: Any, part: int, wr_id: int) -> Completion | None:
        """The completion of a message; None if it is none."""
        parts = message.parts - part
        small = bytes(self._ffi.buffer(message.data[part], message.bytes[part])) if 1 <= parts <= 2 else b""
        if len(small) < _HEAD.size:
            return None
        kind, imm, rkey, header_bytes, address, nbytes = _HEAD.unpack_from(small)
        rest = small[_HEAD.size :]
        if kind == _WRITE:
            payload_bytes = message.bytes[part + 1] if parts == 2 else 0
            if len(rest) != header_bytes or payload_bytes != nbytes:
                return None
            if self.pd.remote(rkey, address, header_bytes + nbytes) is None:
                return None
            # The payload stays where ZeroMQ has put it: copying it into the ring would only cost time.
            payload = self._payload(message, part + 1) if nbytes else memoryview(b"")
            return Completion(wr_id, is_recv=True, byte_len=header_bytes + nbytes, imm=imm, placed=(rest, payload))
        if kind == _IMM and not rest and parts == 1:
            return Completion(wr_id, is_recv=True, imm=imm)
        if kind == _SEND and len(rest) <= soft.MAX_SEND and parts == 1:
            self._messages[wr_id] = rest
            return Completion(wr_id, is_recv=True, byte_len=len(rest))
        return None

    def _payload(self, message: Any, part: int) -> memoryview:
        data, nbytes = message.data[part], message.bytes[part]
        if nbytes < COPIED_BELOW:
            return memoryview(bytes(self._ffi.buffer(data, nbytes)))
        memory: Any = (ctypes.c_char * nbytes).from_address(int(self._ffi.cast("uintptr_t", data)))
        memory.owner = self._ffi.gc(
            self._lib.wx_hold(message), self._lib.wx_release
        )  # whoever has a view has the message
        return memoryview(memory).cast("B").toreadonly()

    def _settle(self) -> None:
        """Take out of the queues what is in `done`. Ctrl-C may have kept an earlier call from it."""
        arrived = sent = 0
        for each in self.done:
            if each.is_recv:
                arrived = max(arrived, each.ordinal)
            else:
                sent = max(sent, each.ordinal)
        while self.receives.taken < arrived:
            self.receives.take()
        if arrived:
            self._lib.wx_consume(self._channel, arrived + self._strangers)
        while self._under_way and self._under_way[0][0].ordinal < sent:
            self._under_way.popleft()

    # --- the end -------------------------------------------------------------------------------------------------------

    def to_error(self) -> None:
        """Give up the connection; everything outstanding completes, with a status."""
        self._check_open()
        self._release(clean=False)
        self.broke("it was given up")

    def drain(self, timeout_s: float) -> bool:
        self._check_open()
        end_s = time.monotonic() + timeout_s
        with self._mutex:
            self._pump()
        done = bool(self.error) or self._let_go(end_s)
        self._release(clean=done and not self.error)
        # Closing takes away what was not sent; until then ZeroMQ may read from it.
        return self._let_go(end_s + CLOSING_S)

    def _let_go(self, end_s: float) -> bool:
        """Wait until ZeroMQ is done with all payloads. Whether it is."""
        channel, wait_s = self._channel, 0.0001
        if channel is None:
            return True
        while self._lib.wx_let_go(channel) < self._lib.wx_referred(channel):
            if time.monotonic() >= end_s:
                return False
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, 0.01)
        return True

    def _release(self, *, clean: bool) -> None:
        """Close the socket; if `clean`, after what was handed to it."""
        with self._mutex:
            if self._socket is None:
                return
            if not self.error:
                self._pump()
            flushed = [each for each, _ in self._under_way] + [self._outbox.peek(i) for i in range(len(self._outbox))]
            self.done.extend(Completion(each.wr_id, status=FLUSHED) for each in flushed)
            self._files = {}
            self.changes += 1
            if self._watch is not None:
                self._socket.disable_monitor()
                self._watch.close(linger=0)
                self._watch = None
            self._socket.close(linger=LINGER_MS if clean else 0)
            self._socket = None
        self.wake()

    def _destroy(self) -> None:
        self._release(clean=False)
        channel, self._channel = self._channel, None
        if channel is not None:
            self._domain.free(channel, (self._under_way, self.holds))
        self.done.clear()


def _endpoint(host: str, port: int | str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


__all__ = ["EndpointAddress", "TcpDomain", "TcpEndpoint", "TcpProtectionDomain", "TcpRoute"]
