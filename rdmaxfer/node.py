"""What `Sender` and `Receiver` share: lifecycle, bind and connect, links, fork. How they wait is in `waiting`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import secrets
import socket
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from rdmaxfer.cm import messages
from rdmaxfer.cm.endpoint import is_loopback, parse
from rdmaxfer.domains import Domains
from rdmaxfer.errors import (
    ClosedError,
    CurveError,
    ForkedError,
    NoDevice,
    NotConnected,
    PeerLost,
    RdmaxferError,
    Refused,
    RemoteProtocolError,
    VerbsError,
)
from rdmaxfer.fabric.choice import Fabric
from rdmaxfer.handshake import Acceptor, Connector, NewStream
from rdmaxfer.link import Link, LinkState
from rdmaxfer.reconnecting import Reconnecting
from rdmaxfer.routing import Routing
from rdmaxfer.status import AGAIN_S, Status
from rdmaxfer.stream import Origin, Stream
from rdmaxfer.waiting import Deadline, Waiter

if TYPE_CHECKING:
    from typing_extensions import Self

    from rdmaxfer.aio import Alarm
    from rdmaxfer.cm.control import BoundServer, Connection, Control
    from rdmaxfer.cm.curve import Curve
    from rdmaxfer.fabric.base import AnyRoute, Domain
    from rdmaxfer.fabric.events import Events

log = logging.getLogger("rdmaxfer")

CONNECT_GRACE_S = 5.0
BYE_S = 1.0
"""How long to wait for the peer's answer to BYE."""

MAKING_S = 10.0
"""How long `close` waits for a `connect` or `bind` of another thread that is in the middle of making something."""

HANDSHAKES_PER_S = 100.0
"""More are told to come again later: each makes queue pairs and registers memory."""

MAX_REPLACED = 1024

TEARDOWN_S = 1.0
"""How long a dying queue pair may take to give its work requests back."""

L = TypeVar("L", bound=Link)
S = TypeVar("S", bound=Stream[Any])

_nodes: weakref.WeakSet[Node[Any, Any]] = weakref.WeakSet()


def nodes() -> list[Node[Any, Any]]:
    """All Senders and Receivers of this process that are not closed."""
    return [node for node in list(_nodes) if not node.closed and not node._forked]


def _mark_forked() -> None:
    for node in list(_nodes):
        node._forked = True
        if node._status is not None:
            node._status.close()


def _curve(secret_key: str | os.PathLike[str] | None, allowed_keys: str | os.PathLike[str] | None) -> Curve | None:
    from rdmaxfer.cm.curve import AllowedKeys, Curve, load_identity

    if secret_key is None:
        if allowed_keys is not None:
            raise CurveError(
                "allowed_keys was given, but no secret_key of this side.",
                fix="give both; `rdmaxfer keygen NAME` makes a pair of keys.",
            )
        return None
    return Curve(load_identity(secret_key), AllowedKeys(allowed_keys) if allowed_keys is not None else None)


def _end(link: Link) -> messages.End:
    """How to tell the peer that a link has ended."""
    if link.error is None:
        return "goodbye"
    return "broken" if isinstance(link.error, PeerLost) else "lost"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


@dataclasses.dataclass(frozen=True)
class StateChange:
    """What `on_state` is told: a peer came, went, or may come back."""

    peer: str
    """As it calls itself: host/pid. `Frame.peer` of its frames is the same."""
    state: Literal["connected", "reconnecting", "ended", "lost"]
    """"reconnecting": the connection broke, and the next one is waited for. "ended" is a goodbye, "lost" the end without one, or
    with frames that were not released."""
    error: PeerLost | None
    """Why, if it is reconnecting or was lost."""
    reason: str
    """Why the fabric, the device and its GID were chosen, once connected; else the error's text, or nothing."""
    fabric: str = ""
    """What carries the frames, once connected: "verbs", "shm" or "tcp"."""


@dataclasses.dataclass(frozen=True)
class LinkInfo:
    """A connection."""

    peer: str
    """As in StateChange."""
    fabric: str
    """What carries the frames: "verbs", "shm" or "tcp"."""
    reason: str
    """Why this fabric, device and GID."""


class Node(Generic[L, S]):
    """Base of Sender and Receiver; not made by users."""

    role: messages.Role

    def __init__(
        self,
        *,
        device: str | None,
        port: int | None,
        gid_index: int | None,
        fabric: Fabric | None,
        slots: int,
        slot_bytes: int,
        queue_pairs: int,
        max_peers: int,
        spin_s: float | None,
        lease_s: float,
        reconnect: bool,
        reconnect_s: float,
        secret_key: str | os.PathLike[str] | None,
        allowed_keys: str | os.PathLike[str] | None,
        on_state: Callable[[StateChange], object] | None,
    ) -> None:
        if not 1 <= slots <= 4096:
            raise ValueError(f"slots is a number from 1 to 4096, not {slots!r}")
        if not 0 <= slot_bytes <= messages.MAX_SLOT_BYTES:
            raise ValueError(f"slot_bytes is a number of bytes from 0 to {messages.MAX_SLOT_BYTES}, not {slot_bytes!r}")
        if not 1 <= queue_pairs <= messages.MAX_QUEUE_PAIRS:
            raise ValueError(f"queue_pairs is a number from 1 to {messages.MAX_QUEUE_PAIRS}, not {queue_pairs!r}")
        if max_peers < 1:
            raise ValueError(f"max_peers is a number of at least 1, not {max_peers!r}")
        if not 0.2 <= lease_s <= messages.MAX_LEASE_S:
            raise ValueError(f"lease_s is a number of seconds from 0.2 to {messages.MAX_LEASE_S:.0f}, not {lease_s!r}")
        if spin_s is not None and not 0 <= spin_s <= 1:
            raise ValueError(f"spin_s is a number of seconds from 0 to 1, or None, not {spin_s!r}")
        if not 0 <= reconnect_s <= messages.MAX_RECONNECT_S:
            raise ValueError(
                f"reconnect_s is a number of seconds from 0 to {messages.MAX_RECONNECT_S:.0f}, not {reconnect_s!r}"
            )
        self.reconnect_s = reconnect_s if reconnect else 0.0
        self._on_state = on_state
        self._curve = _curve(secret_key, allowed_keys)
        self.routing = Routing(fabric, device, port, gid_index)
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._queue_pairs = queue_pairs
        self._max_peers = max_peers
        self.lease_s = lease_s
        self.id = secrets.token_bytes(messages.NODE_BYTES)
        self.identity = ""
        """What a successor of this side would be recognised by."""
        self.name = f"{socket.gethostname()}/{os.getpid()}"[:128]

        self._waiter: Waiter[L] = Waiter(spin_s, check=self._check_usable, ended=self._drop_ended)
        self._lock = self._waiter.lock
        self._links = self._waiter.links
        self._wait = self._waiter.wait
        self._opening: dict[bytes, L] = {}
        self._streams: dict[bytes, S] = {}
        """What has been connected once and has not ended, by id: connected now, or waiting for the next connection."""
        self._replaced: dict[bytes, None] = {}
        """Ids that streams had before a successor came: whoever had them may not come back, and drive it away."""
        self._reconnecting: list[Reconnecting] = []
        self._reconnects = 0
        self._domains: Domains[L] = Domains(lambda: [*self._links, *self._opening.values()])
        self._control: Control | None = None
        self._servers: list[BoundServer] = []
        self._connections: dict[bytes, Connection] = {}
        self._makers = 0
        self._losses: deque[PeerLost] = deque()
        self._ends = 0
        self._peers_lost = 0
        self._closing = False
        self._closed = False
        self._failure: BaseException | None = None
        self._forked = False
        self._warned_open = False
        self._alarmed: Alarm | None = None
        self._status: Status | None = None
        _nodes.add(self)

    # --- making and ending connections ---------------------------------------------------------------------------------

    def bind(self, endpoint: str) -> str:
        """Wait for peers at `endpoint`, e.g. "tcp://0.0.0.0:7471". May be called many times, and beside `connect`.

        Returns the endpoint with the port that was really bound (port 0 or * takes a free one). Raises EndpointError, and NoDevice
        or VerbsUnavailable if no peer could be served; CurveError if this side has a secret key, but no allowed keys.
        """
        return self._bind(endpoint, self._new_stream)

    def _bind(self, endpoint: str, new_stream: NewStream[S]) -> str:
        host = parse(endpoint, bind=True).host
        if self._curve is None:
            self._warn_if_open(endpoint, host)
        elif self._curve.allowed is None:
            raise CurveError(
                "whose keys to let in was not said.",
                fix=f"{type(self).__name__}(secret_key=..., allowed_keys=DIRECTORY), with NAME.key of each peer that may connect.",
            )
        with self._making():
            if self.routing.fabric == "verbs":
                self.routing.by_verbs(
                    "127.0.0.1"
                )  # without a device (or without the one named), waiting for peers would be in vain
            server = self._get_control().bind(
                endpoint,
                Acceptor(self, new_stream, host),
                lease_s=self.lease_s,
                max_sessions=self._max_peers,
                handshakes_per_s=HANDSHAKES_PER_S,
            )
            self._servers.append(server)
        return server.endpoint

    def connect(
        self, endpoint: str, timeout: float | None = 30.0, *, peer_key: str | os.PathLike[str] | None = None
    ) -> None:
        """Connect to the peer that is bound (or will be, within `timeout` seconds) at `endpoint`, e.g. "tcp://10.0.0.2:7471".

        `peer_key`: the file NAME.key of the peer, if this side has a `secret_key`. May be called many times, and beside `bind`.
        Raises EndpointError, ConnectTimeout, Refused, CurveError, NoDevice, VerbsUnavailable, MemlockError; after an error nothing
        is left behind.
        """
        self._connect(endpoint, timeout, peer_key, self._new_stream)

    def _connect(
        self, endpoint: str, timeout: float | None, peer_key: str | os.PathLike[str] | None, new_stream: NewStream[S]
    ) -> None:
        self._connect_stream(self._stream_towards(endpoint, timeout, peer_key, new_stream), timeout)

    async def _connect_async(
        self, endpoint: str, timeout: float | None, peer_key: str | os.PathLike[str] | None, new_stream: NewStream[S]
    ) -> None:
        from rdmaxfer.aio import in_thread

        stream = self._stream_towards(endpoint, timeout, peer_key, new_stream)

        def stop() -> None:
            with self._lock:
                stream.unwanted = True
                self._waiter.wake()

        await in_thread(self._connect_stream, stream, timeout, stop=stop)

    def _stream_towards(
        self, endpoint: str, timeout: float | None, peer_key: str | os.PathLike[str] | None, new_stream: NewStream[S]
    ) -> S:
        """What is to be connected. Raises EndpointError, CurveError, ValueError."""
        if (peer_key is None) != (self._curve is None):
            raise CurveError(
                "with CURVE, a side that connects needs both its own secret key and the peer's public key.",
                fix=f"{type(self).__name__}(secret_key='ME.key_secret') and connect(..., peer_key='PEER.key'), or neither.",
            )
        key = None
        if peer_key is not None:
            from rdmaxfer.cm.curve import load_public_key

            key = load_public_key(peer_key)
        Deadline(timeout)  # refuses what is no timeout
        origin = Origin(endpoint, parse(endpoint).host, key)
        stream = new_stream(secrets.token_bytes(messages.SESSION_BYTES), origin)
        stream.reconnect_s = self.reconnect_s
        return stream

    def _connect_stream(self, stream: S, timeout: float | None) -> None:
        deadline = Deadline(timeout)
        while True:
            try:
                return self.reach(stream, None if timeout is None else max(0.0, deadline.left_s()))
            except Refused as error:
                # A peer that is so busy that it gave this handshake up before it had come to it.
                if error.code != messages.RefuseCode.UNKNOWN_SESSION.value or deadline.left_s() <= 0:
                    raise

    def reach(self, stream: S, timeout: float | None) -> None:
        """Connect a stream that has an origin, for the first time or again. Raises what `connect` does."""
        assert stream.origin is not None
        deadline = Deadline(timeout)
        host = stream.origin.host
        route = self.routing.shm_towards(host) or self.routing.towards(host)
        while True:
            try:
                return self._reach(stream, route, None if timeout is None else max(0.0, deadline.left_s()))
            except (Refused, NoDevice) as error:
                refused = isinstance(error, Refused) and error.code == messages.RefuseCode.FABRIC.value
                # What this side itself can't do after all is another matter only for shared memory, of which nobody asks before.
                failed = isinstance(error, NoDevice) and route.fabric == "shm"
                if self.routing.fabric != "auto" or route.fabric == "tcp" or not (refused or failed):
                    raise
                if route.fabric == "shm":
                    log.info("not by shared memory: %s", error)
                    route = self.routing.towards(host)
                else:
                    route = self.routing.tcp(host, f"the peer can't take part over verbs: {error}", instead=True)

    def _reach(self, stream: S, route: AnyRoute, timeout: float | None) -> None:
        assert stream.origin is not None
        endpoint, _, key = stream.origin
        deadline = Deadline(None if timeout is None else timeout + CONNECT_GRACE_S)
        connector = Connector(self, stream)
        try:
            with self._making():
                connector.prepare(route)
                self._connections[connector.session] = self._get_control().connect(
                    endpoint, connector.hello, connector, timeout_s=timeout, peer_key=key
                )
            # The session has the deadline, and knows better what it waited for when it ran out.
            self._wait(connector.outcome, deadline, f"connecting to {endpoint}")
        except BaseException:
            connection = self._connections.pop(connector.session, None)
            if connection is not None and not connection.ended:
                with contextlib.suppress(ClosedError):
                    connection.bye("gave up", BYE_S)
            link = connector.link or self._opening.get(connector.session)
            if link is not None and link.state is not LinkState.READY:
                self.retire(link)
            raise

    def _warn_if_open(self, endpoint: str, host: str) -> None:
        if not is_loopback(host) and not self._warned_open:
            self._warned_open = True
            log.warning(
                "whoever can reach %s can connect to it: let only trusted hosts do so, or use CURVE keys (docs/security.md).",
                endpoint,
            )

    @contextlib.contextmanager
    def _making(self) -> Iterator[None]:
        """Something is being made that `close` has to find, in whatever thread."""
        with self._lock:
            self._check_usable()
            self._makers += 1
        try:
            yield
        finally:
            with self._lock:
                self._makers -= 1
                self._waiter.wake()

    def wait_for_peers(self, count: int = 1, timeout: float | None = None) -> None:
        """Wait until at least `count` peers are connected. Raises TimeoutExpired."""
        self._wait(
            lambda: True if len(self._links) >= count else None,
            Deadline(timeout),
            f"waiting for {count} peer{'s' if count != 1 else ''}",
        )

    async def wait_for_peers_async(self, count: int = 1, timeout: float | None = None) -> None:
        """As `wait_for_peers`, without holding up the event loop."""
        what = f"waiting for {count} peer{'s' if count != 1 else ''}"
        await self._alarm.look_and_wait(lambda: True if len(self._links) >= count else None, Deadline(timeout), what)

    @property
    def _alarm(self) -> Alarm:
        """What coroutines wait by."""
        with self._lock:
            if self._alarmed is None:
                from rdmaxfer.aio import Alarm

                self._alarmed = Alarm(self)
            return self._alarmed

    def links(self) -> tuple[LinkInfo, ...]:
        """The connections there are now, what carries their frames, and why."""
        with self._lock:
            return tuple(LinkInfo(link.peer, link.fabric, link.reason) for link in self._links if link.live)

    def pause(self, timeout_s: float) -> bool:
        """Sleep, but not beyond the end of this object. False if it is closing."""
        with self._lock:
            self._waiter.rest(lambda: self._closing, timeout_s)
            return not self._closing

    def _get_control(self) -> Control:
        from rdmaxfer.cm.control import Control

        with self._lock:
            self._check_usable()
            if self._control is None:
                self._control = Control(self.name, self.control_failed, self._curve)
                self._begin_status(self._control)
            return self._control

    def _begin_status(self, control: Control) -> None:
        """Answer `rdmaxfer top`. That it can't be is no reason not to go on."""
        try:
            self._status = status = Status(self)
        except OSError as error:
            log.info("rdmaxfer top will not see this %s: %s", type(self).__name__, error)
            return

        def answer() -> bool:
            try:
                if status.answer():
                    return True
            except Exception:  # by mistake; frames are not to suffer for it
                log.exception("rdmaxfer top got no answer")
                return True
            control.call_later(AGAIN_S, watch)
            return False

        def watch() -> None:
            if status.fd >= 0:
                control.watch_fd(status.fd, answer)

        watch()

    def control_failed(self, error: BaseException) -> None:
        with self._lock:
            self._failure = error
            self._waiter.wake()

    def _domain(self, route: AnyRoute) -> Domain:
        with self._lock:
            self._waiter.begin()
            return self._domains.get(route, self._curve.identity if self._curve is not None else None)

    # --- what the handshake asks of either side (rdmaxfer.handshake) ----------------------------------------------------

    def stream_of(self, hello: messages.Hello, new_stream: NewStream[S]) -> tuple[S, messages.Progress]:
        """On the control thread: what the peer asks a connection for, and from where it is to go on. If as far as is known here it
        has one, that one ends."""
        with self._lock:
            if hello.stream in self._replaced:
                raise Refused("another peer of this name has taken its place.", code=messages.RefuseCode.REPLACED.value)
            stream = self._find_stream(hello)
            if stream is not None and stream.id == hello.stream:
                if hello.attempt <= stream.attempt:
                    raise RemoteProtocolError("this attempt to connect was given up, and another one has followed.")
                stream.attempt = hello.attempt
            links = [link for link in self._opening.values() if link.stream.id == hello.stream]
            if stream is not None and stream.link is not None:
                links.append(stream.link)
        for link in links:
            self._displace(link, replaced=link.stream.id != hello.stream)
        if stream is not None and stream.latest is not None:
            self.retire(stream.latest)  # nothing can arrive any more
        with self._lock:
            if stream is None or self._streams.get(stream.id) is not stream:
                stream = new_stream(hello.stream, None)
                start = self._start_of_new(stream, hello)
            else:
                if stream.id != hello.stream:
                    self._replaced[stream.id] = None
                    if len(self._replaced) > MAX_REPLACED:
                        del self._replaced[next(iter(self._replaced))]
                    del self._streams[stream.id]
                    stream.id = hello.stream
                    self._streams[stream.id] = stream
                start = self._start(stream, hello)
            stream.attempt = hello.attempt
            stream.identity = hello.identity
            # A named one may have a successor, whatever it means to do itself.
            stream.reconnect_s = self.reconnect_s if hello.identity else min(self.reconnect_s, hello.reconnect_s)
            if not stream.peer:
                stream.peer = hello.name
            return stream, start

    def _find_stream(self, hello: messages.Hello) -> S | None:
        return self._streams.get(hello.stream)

    def _displace(self, link: L, *, replaced: bool) -> None:
        """On the control thread: the peer (or, if `replaced`, its successor) has come by another connection."""
        assert self._control is not None
        with self._lock:
            self._waiter.settle()
            link.fail(PeerLost(f"{link.peer} has come by another connection."))
            if link in self._links:
                self._links.remove(link)
                self._note_end(link)
        code = messages.RefuseCode.REPLACED if replaced else messages.RefuseCode.CLOSING
        self._control.end(link.session, "another connection has taken the place of this one", code)
        self.retire(link)

    def _start_of_new(self, stream: S, hello: messages.Hello) -> messages.Progress:
        """From where a stream begins that is not known here."""
        raise NotImplementedError

    def _start(self, stream: S, hello: messages.Hello) -> messages.Progress:
        """From where a stream goes on."""
        raise NotImplementedError

    def check_start(self, link: L, told: messages.Progress | None, accept: messages.Accept) -> None:
        """The bound side has said from where it goes on; `told` is what this side said. Raises RemoteProtocolError."""
        raise NotImplementedError

    def progress(self, stream: S) -> messages.Progress | None:
        """What HELLO says of a stream: None if it is new."""
        with self._lock:
            return stream.progress()

    def _new_stream(self, id_: bytes, origin: Origin | None) -> S:
        raise NotImplementedError

    def open_link(
        self, session: bytes, stream: S, route: AnyRoute, *, queue_pairs: int = messages.MAX_QUEUE_PAIRS
    ) -> L:
        """A link with queue pairs in INIT, receives posted; with no more of them than the peer's `queue_pairs`."""
        lanes = min(self._queue_pairs, queue_pairs)
        with self._making(), ExitStack() as stack:
            link = self._make_link(session, stream, self._domain(route), route, lanes, stack)
            link.reason = route.reason
            with self._lock:
                self._opening[session] = link
            stack.pop_all()  # the link owns it all from here on
            try:
                with self._lock:
                    self._domains.watch(link, self._get_control(), self._on_device)
            except BaseException:
                self.retire(link)
                raise
        return link

    def _on_device(self, events: Events) -> bool:
        """On the control thread: the device of `events` has something to say. False once it has gone."""
        domain = events.domain
        try:
            happened = events.take()
        except VerbsError:
            happened = None
        with self._lock:
            if happened is None:
                self._domains.lose(domain)
            else:
                self._domains.handle(domain, happened)
            self._drop_ended()
            self._waiter.wake()
            return not domain.lost

    def prepare_link(
        self, link: L, theirs: messages.Fabric, *, path_mtu: int, max_msg_sz: int, max_slot_bytes: int
    ) -> None:
        """Connect the link's endpoint to the peer's, which may have named more queue pairs than there are here."""
        if isinstance(theirs, messages.TcpAddress):
            origin = link.stream.origin
            link.endpoint.connect(
                port=theirs.port, key=theirs.key, peer_key=origin.peer_key if origin is not None else None
            )
            return
        if isinstance(theirs, messages.ShmAddress):
            link.endpoint.connect(host=theirs.host, key=theirs.key)
            return
        link.endpoint.connect(
            queue_pairs=[(each.qp_num, each.psn) for each in theirs.queue_pairs][: link.endpoint.lanes],
            gid=theirs.gid,
            lid=theirs.lid,
            path_mtu=path_mtu,
            max_msg_sz=max_msg_sz,
        )

    def activate(self, link: L) -> None:
        """Both sides are ready: frames may flow."""
        with self._lock:
            self._opening.pop(link.session, None)
            stream: S = link.stream
            if link.state is LinkState.OPENING and not self._closing and stream.link is None:
                link.endpoint.start()
                link.state, link.connected = LinkState.READY, True
                stream.link, stream.peer = link, link.peer
                stream.latest = link
                before = self._streams.get(stream.id)
                self._streams[stream.id] = stream
                if before is not None and before is not stream:
                    self._forget(before)
                self._reconnects += 1 if stream.waits else 0
                self._links.append(link)
                again = "again, " if stream.waits else ""
                # Never in silence: the user may believe that it is RDMA.
                level = logging.WARNING if getattr(link.endpoint.route, "instead", False) else logging.INFO
                log.log(level, "connected with %s %sover %s: %s", link.peer, again, link.fabric, link.reason)
                self._tell_state(StateChange(link.peer, "connected", None, link.reason, link.fabric))
                self._began(stream)
            self._waiter.wake()

    def _began(self, stream: S) -> None:
        """A stream has a connection (again). With the lock held."""

    def _make_link(self, session: bytes, stream: S, domain: Domain, route: AnyRoute, lanes: int, owned: ExitStack) -> L:
        raise NotImplementedError

    def wishes(self) -> tuple[int, int, int]:
        """slots, slot_bytes and max_slot_bytes to ask for in HELLO."""
        raise NotImplementedError

    def agree(self, hello: messages.Hello) -> tuple[int, int, int]:
        """slots, slot_bytes and max_slot_bytes for a peer that asked for these in HELLO."""
        raise NotImplementedError

    def check_agreed(self, accept: messages.Accept) -> None:
        """Raise RemoteProtocolError unless ACCEPT is within what HELLO asked for."""
        raise NotImplementedError

    def make_ring(self, link: L, slots: int, slot_bytes: int, start: messages.Progress) -> messages.RingAddress | None:
        """The receiver registers its ring; a sender has none. Both go on from `start`. Raises RemoteProtocolError, DeviceError."""
        raise NotImplementedError

    def use_ring(self, link: L, ring: messages.RingAddress | None) -> None:
        """The sender takes note of the receiver's ring."""
        raise NotImplementedError

    def resize(self, link: L, wanted_bytes: int, ring: messages.RingAddress | None) -> messages.RingAddress | None:
        """The connecting peer wants (as a sender) or brings (as a receiver) a ring with larger slots."""
        raise NotImplementedError

    def resize_answered(self, link: L, answer: messages.Resized | messages.Refuse) -> None:
        """The bound peer answered our RESIZE."""
        raise NotImplementedError

    def wanted(self, link: L) -> int:
        """Slot bytes that this side, as a bound sender, waits for; 0 for none."""
        return 0

    def renewed(self, link: L, wanted_bytes: int) -> None:
        """The bound peer is alive, and as a sender waits for slots of `wanted_bytes` (0: for none)."""

    def slot_limit(self, link: L) -> int:
        """The largest payload in bytes that `link` can be resized to."""
        raise NotImplementedError

    # --- links that end ------------------------------------------------------------------------------------------------

    def _drop_ended(self) -> None:
        """Take links that ended or failed out of service; the control thread destroys them. With the lock held."""
        for link in [link for link in self._links if not link.live]:
            self._links.remove(link)
            self._note_end(link)
            if not self._closing:
                self._on_control(functools.partial(self._end_session, link))

    def _later(self, delay_s: float, work: Callable[[], None]) -> None:
        """Have the control thread do something later."""
        if self._control is not None:
            with contextlib.suppress(ClosedError):
                self._control.call_later(delay_s, work)

    def _on_control(self, work: Callable[[], None]) -> None:
        """Have the control thread do something, for the errors of which nobody waits here."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.control_failed(error)

        if self._control is not None:
            with contextlib.suppress(ClosedError):
                self._control.call(run)

    def _note_end(self, link: L) -> None:
        """A link has ended: its stream waits for another one, or ends. With the lock held, once a link."""
        stream: S = link.stream
        error = link.error
        self._count_link(link)
        if stream.link is not link:
            return
        stream.link = None
        if link.comes_back and isinstance(error, PeerLost) and not self._closing:
            self._await(stream, error)
        else:
            self._end_stream(stream, error)

    def _count_link(self, link: L) -> None:
        """Keep the counters of a link that has ended."""

    def _await(self, stream: S, error: PeerLost) -> None:
        """The connection broke: see to it that there will be another one, or that the stream ends. With the lock held."""
        stream.lost = error
        stream.waits += 1
        text = str(error).removesuffix(f" Fix: {error.fix}").rstrip(".")
        log.warning("%s; waiting up to %g s for another connection", text, stream.reconnect_s)
        self._tell_state(StateChange(stream.peer, "reconnecting", error, str(error)))
        if stream.origin is not None:
            self._reconnecting = [each for each in self._reconnecting if each.is_alive()]
            self._reconnecting.append(Reconnecting(self, stream, stream.reconnect_s))
            return
        waiting = [other for other in self._streams.values() if other.link is None and other.origin is None]
        if len(waiting) > self._max_peers:
            self.give_up(waiting[0], None)
        expire = functools.partial(self._expire, stream, stream.waits)
        self._later(stream.reconnect_s, expire)

    def _expire(self, stream: S, waits: int) -> None:
        with self._lock:
            if stream.waits == waits:
                self.give_up(stream, None)

    def give_up(self, stream: S, error: RdmaxferError | None) -> None:
        """There will be no other connection; `error` says why not, if it is known."""
        with self._lock:
            if stream.link is not None or self._streams.get(stream.id) is not stream:
                return
            lost = stream.lost
            if lost is not None:
                text = str(lost).removesuffix(f" Fix: {lost.fix}").rstrip(".")
                if error is None:
                    lost = type(lost)(f"{text}. It has not come back within {stream.reconnect_s:g} s.", fix=lost.fix)
                else:
                    why = str(error).removesuffix(f" Fix: {error.fix}")
                    lost = type(lost)(f"{text}. It could not be connected with again: {why}", fix=error.fix or lost.fix)
            self._end_stream(stream, lost)
            self._waiter.wake()

    def _end_stream(self, stream: S, error: RdmaxferError | None) -> None:
        """Count and report the end of a stream: for no error, a goodbye. With the lock held."""
        lost = self._loss(stream, error)
        if self._streams.get(stream.id) is stream:
            del self._streams[stream.id]
        self._forget(stream)
        if lost is None:
            self._ends += 1
            log.info("%s said goodbye", stream.peer)
            self._tell_state(StateChange(stream.peer, "ended", None, ""))
            return
        self._peers_lost += 1
        self._tell_state(StateChange(stream.peer, "lost", lost, str(lost)))
        if stream.origin is not None or lost.unreleased:
            self._losses.append(lost)
        else:
            log.warning("%s", lost)

    def _forget(self, stream: S) -> None:
        """A stream has ended. With the lock held."""

    def _tell_state(self, change: StateChange) -> None:
        """Have `on_state` told, in order. With the lock held, which the callback will not find held."""
        if self._on_state is not None and not self._closing:
            self._on_control(functools.partial(self._call_on_state, self._on_state, change))

    def _call_on_state(self, on_state: Callable[[StateChange], object], change: StateChange) -> None:
        try:
            on_state(change)
        except Exception:
            log.exception("on_state raised an exception at %s", change)

    def _loss(self, stream: S, error: RdmaxferError | None) -> PeerLost | None:
        """What is to be told to the user about the end of this stream; None where all is well."""
        if error is None or isinstance(error, PeerLost):
            return error
        return PeerLost(f"the connection with {stream.peer} ended: {error}")

    def _end_session(self, link: L) -> None:
        """On the control thread: tell the peer, then destroy."""
        connection = self._connections.pop(link.session, None)
        reason = str(link.error)[:500] if link.error is not None else "ended"
        if connection is None:
            assert self._control is not None
            hostile = isinstance(link.error, RemoteProtocolError)
            code = messages.RefuseCode.MALFORMED if hostile else messages.RefuseCode.CLOSING
            self._control.end(link.session, reason, code)
        elif not connection.ended:
            connection.bye(reason, BYE_S, _end(link))
        self.retire(link)

    def session_ended(self, link: L, error: RdmaxferError | None) -> None:
        """On the control thread: the control plane says that the peer is gone. `error` is None for a goodbye."""
        with self._lock:
            self._waiter.settle()  # what arrived before the end is not lost, a goodbye above all
            self._opening.pop(link.session, None)
            self._connections.pop(link.session, None)
            if error is None and link.live and not self._closing and self._control is not None:
                link.leaving = True
                # What it wrote before is in our completion queue or just about to be, with a goodbye in band at the end. Wait
                # for that, but not on this thread, nor for ever.
                self._control.call_later(TEARDOWN_S, functools.partial(self._end_link, link, None))
                return
        self._end_link(link, error)

    def _end_link(self, link: L, error: RdmaxferError | None) -> None:
        with self._lock:
            if error is None:
                link.end()
            else:
                link.fail(error)
            if link in self._links:
                self._links.remove(link)
                if not self._closing:
                    self._note_end(link)
            self._waiter.wake()
        self.retire(link)

    def retire(self, link: L) -> None:
        """Destroy a link that nobody uses any more. Not with the lock held."""
        if link.work is not None:
            link.work.join()
        with self._lock:
            self._opening.pop(link.session, None)
            if link in self._links:
                self._links.remove(link)
            self._waiter.leave_alone(link)
            link.teardown(TEARDOWN_S)
            self._waiter.wake()

    def _check_usable(self) -> None:
        if self._forked:
            raise ForkedError(
                f"this {type(self).__name__} was made by the parent process and can't be used after fork().",
                fix=f'make a new {type(self).__name__} in the child, or start it with multiprocessing\'s "spawn" method.',
            )
        if self._closing:
            raise ClosedError(f"this {type(self).__name__} is closed.")
        if self._failure is not None:
            raise RdmaxferError("the control thread failed; this object can't go on.") from self._failure

    # --- the end -------------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Frames that may be on their way or held at a time, for each peer."""
        return self._slots

    def statistics(self) -> Any:
        """A snapshot of the counters."""
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        return self._closing

    def close(self, timeout: float = 5.0) -> None:
        """Say goodbye to all peers and free everything, within about `timeout` seconds whatever they do. Twice is harmless."""
        if self._forked:
            return
        deadline = Deadline(timeout)
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._say_goodbye(deadline)
        finally:
            with self._lock:
                self._closing = True
                self._waiter.wake()
                self._waiter.rest(lambda: not self._makers, MAKING_S)
            self._dismantle(deadline)

    async def close_async(self, timeout: float = 5.0) -> None:
        """As `close`, without holding up the event loop. It goes on to its end also when this is cancelled."""
        from rdmaxfer.aio import in_thread

        await in_thread(self.close, timeout)

    def _say_goodbye(self, deadline: Deadline) -> None:
        raise NotImplementedError

    def _dismantle(self, deadline: Deadline) -> None:
        with ExitStack() as stack:
            for domain in self._domains:
                stack.callback(domain.close)
            stack.callback(self._waiter.close)
            stack.callback(self._free_memory)
            stack.callback(self._retire_all)
            stack.callback(self._join_threads)
            if self._status is not None:
                stack.callback(self._status.close)
            if self._control is not None:
                self._control.close(max(0.2, min(1.0, deadline.left_s())))

    def _join_threads(self) -> None:
        for each in self._reconnecting:
            each.join(MAKING_S)
        if self._alarmed is not None:
            self._alarmed.join(MAKING_S)

    def _retire_all(self) -> None:
        for link in [*self._links, *self._opening.values()]:
            self.retire(link)

    def _free_memory(self) -> None:
        """Unregister memory that belongs to no link."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except RdmaxferError as second:
            log.warning("while closing after %r: %s", error, second)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from rdmaxfer.aio import in_thread

        await in_thread(self.__exit__, kind, error, trace)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self._forked and (self._control is not None or self._domains):
            warnings.warn(f"unclosed {self!r}: use `with` or close()", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        state = "closed" if self._closing else "forked" if self._forked else f"{len(self._links)} peers"
        return f"<{type(self).__name__} {state}>"

    def _check_connected(self) -> None:
        """Raise what there is to raise when no peer is left and none can come."""
        if self._losses:
            raise self._losses.popleft()
        if not self._links and not self._servers and not self._opening and not self._streams:
            raise NotConnected(
                f"this {type(self).__name__} is connected to nobody.",
                fix="call connect(endpoint) or bind(endpoint) first.",
            )
