"""How a Sender or Receiver answers the control plane: one handler for each bound endpoint, one for each `connect`.

Everything here but `Connector.prepare` and `Connector.outcome` runs on the control thread, and decides by the node's own
settings what the two sides agree on: fabric, GID, queue pairs, path MTU, slots, slot bytes.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from rdmaxfer.cm import messages
from rdmaxfer.cm.messages import Accept, End, Hello, Ready, Refuse, RefuseCode, Resize, Resized, RingAddress, Started
from rdmaxfer.errors import ClosedError, DeviceError, PeerLost, RdmaxferError, Refused, RemoteProtocolError
from rdmaxfer.fabric.devices import ETHERNET
from rdmaxfer.link import Link, LinkState
from rdmaxfer.stream import Origin, Stream

if TYPE_CHECKING:
    from rdmaxfer.fabric.base import AnyRoute, Endpoint
    from rdmaxfer.node import Node

log = logging.getLogger("rdmaxfer")

L = TypeVar("L", bound=Link)
S = TypeVar("S", bound=Stream[Any])

NewStream: TypeAlias = Callable[["bytes", "Origin | None"], S]


def address_of(endpoint: Endpoint) -> messages.Fabric:
    """What the peer must know of an endpoint."""
    a = endpoint.address
    if endpoint.route.fabric == "tcp":
        return messages.TcpAddress(port=a.port, key=a.key)
    if endpoint.route.fabric == "shm":
        return messages.ShmAddress(host=a.host, key=a.key)
    return messages.VerbsAddress(
        device=a.device,
        gid=a.gid,
        lid=a.lid,
        queue_pairs=tuple(messages.QueuePair(qp_num=each.qp_num, psn=each.psn) for each in a.queue_pairs),
        link_layer="ethernet" if a.link_layer == ETHERNET else "infiniband",
        active_mtu=a.active_mtu,
        max_msg_sz=a.max_msg_sz,
    )


def path_of(mine: messages.Fabric, theirs: messages.Fabric) -> tuple[int, int]:
    """Path MTU and largest message between two endpoints of one fabric, in bytes."""
    if not isinstance(mine, messages.VerbsAddress) or not isinstance(theirs, messages.VerbsAddress):
        return messages.NO_MTU, messages.NO_MAX_MSG_SZ
    return min(mine.active_mtu, theirs.active_mtu), min(mine.max_msg_sz, theirs.max_msg_sz)


def check_path(accept: Accept, mine: messages.Fabric) -> None:
    """Raise RemoteProtocolError unless what the peer chose fits what this side has."""
    theirs = accept.fabric
    if not isinstance(theirs, messages.VerbsAddress) or not isinstance(mine, messages.VerbsAddress):
        if type(theirs) is not type(mine):
            raise RemoteProtocolError("the peer chose a fabric that was not offered")
        return
    if theirs.link_layer != mine.link_layer:
        raise RemoteProtocolError("the peer chose a device of another link layer")
    if len(theirs.queue_pairs) > len(mine.queue_pairs):
        raise RemoteProtocolError("the peer chose more queue pairs than this side has")
    if accept.path_mtu > min(mine.active_mtu, theirs.active_mtu) or accept.max_msg_sz > mine.max_msg_sz:
        raise RemoteProtocolError("the peer chose a larger path MTU or message size than this side has")


def refusal(message: Hello | Ready | Resize, code: RefuseCode, error: Exception | str, *, limit: int = 0) -> Refuse:
    """A REFUSE that answers `message`."""
    fix = getattr(error, "fix", "")
    text = str(error).removesuffix(f" Fix: {fix}")
    return Refuse(
        session=message.session, request=message.request, code=code, message=text[:1024], fix=fix[:1024], limit=limit
    )


def refused_for_fabric(hello: Hello, error: DeviceError) -> Refuse:
    """This side can't do what the peer asks for: it has to be told to both, as the mending is to be done here."""
    # Who offers shared memory mostly has something else to offer next, and does so at once.
    level = logging.INFO if isinstance(hello.fabrics[0], messages.ShmAddress) else logging.WARNING
    log.log(level, "%s was refused: %s", hello.name, error)
    fix = f"on the peer's machine: {error.fix}" if error.fix else "look at the peer's own messages."
    text = str(error).removesuffix(f" Fix: {error.fix}")
    return refusal(hello, RefuseCode.FABRIC, DeviceError(f"the peer can't take part: {text}", fix=fix))


class Acceptor(Generic[L, S]):
    """Answers the peers of one bound endpoint (`rdmaxfer.cm.protocol.ServerHandler`). `new_stream` makes what belongs to a new
    peer."""

    def __init__(self, node: Node[L, S], new_stream: NewStream[S], host: str) -> None:
        self._node = node
        self._new_stream = new_stream
        self._host = host
        """Where it is bound."""
        self._links: dict[bytes, L] = {}

    def hello(self, hello: Hello, peer: str) -> Accept | Refuse:
        node = self._node
        if node.closed:
            return refusal(hello, RefuseCode.CLOSING, "this side is closing.")
        if hello.role == node.role:
            return refusal(
                hello,
                RefuseCode.ROLE,
                f"both sides are a {node.role}; a sender connects to a receiver and a receiver to a sender.",
            )
        theirs = hello.fabrics[0]
        try:
            route = node.routing.back(theirs, self._host)
            stream, start = node.stream_of(hello, self._new_stream)
            lanes = len(theirs.queue_pairs) if isinstance(theirs, messages.VerbsAddress) else 1
            link = node.open_link(hello.session, stream, route, queue_pairs=lanes)
            link.peer = hello.name
        except DeviceError as error:
            return refused_for_fabric(hello, error)
        except Refused as error:
            return refusal(hello, RefuseCode(error.code), error)
        except RemoteProtocolError as error:
            return refusal(hello, RefuseCode.MALFORMED, error)
        except ClosedError:
            return refusal(hello, RefuseCode.CLOSING, "this side is closing.")
        try:
            mine = address_of(link.endpoint)
            slots, slot_bytes, max_slot_bytes = node.agree(hello)
            path_mtu, max_msg_sz = path_of(mine, theirs)
            node.prepare_link(link, theirs, path_mtu=path_mtu, max_msg_sz=max_msg_sz, max_slot_bytes=max_slot_bytes)
            ring = node.make_ring(link, slots, slot_bytes, start)
        except BaseException as error:
            node.retire(link)
            if isinstance(error, DeviceError):
                return refused_for_fabric(hello, error)
            if isinstance(error, RemoteProtocolError):
                return refusal(hello, RefuseCode.MALFORMED, error)
            raise
        self._links[hello.session] = link
        return Accept(
            session=hello.session,
            request=hello.request,
            role=node.role,
            node=node.id,
            start=start,
            fabric=mine,
            reason=route.reason[:1024],
            path_mtu=path_mtu,
            max_msg_sz=max_msg_sz,
            slots=slots,
            slot_bytes=slot_bytes,
            max_slot_bytes=max_slot_bytes,
            lease_s=min(hello.lease_s, node.lease_s),
            name=node.name,
            ring=ring,
        )

    def ready(self, session: bytes, ready: Ready) -> Started | Refuse:
        link = self._links[session]
        try:
            self._node.use_ring(link, ready.ring)
        except RemoteProtocolError as error:
            return refusal(ready, RefuseCode.MALFORMED, error)
        self._node.activate(link)
        return Started(session=session, request=ready.request)

    def resize(self, session: bytes, resize: Resize) -> Resized | Refuse:
        link = self._links[session]
        if not link.live:
            return refusal(resize, RefuseCode.CLOSING, "this side is ending the connection.")
        try:
            ring = self._node.resize(link, resize.wanted_bytes, resize.ring)
        except RemoteProtocolError as error:
            return refusal(resize, RefuseCode.MALFORMED, error)
        except RdmaxferError as error:
            return refusal(resize, RefuseCode.FRAME_TOO_LARGE, error, limit=self._node.slot_limit(link))
        if ring is None and resize.ring is None:
            return refusal(resize, RefuseCode.BUSY, "the memory is being registered; ask again.")
        return Resized(session=session, request=resize.request, ring=ring)

    def wanted(self, session: bytes) -> int:
        return self._node.wanted(self._links[session])

    def gone(self, session: bytes, reason: str, end: End) -> None:
        link = self._links.pop(session, None)
        if link is not None:
            error = None if end == "goodbye" else PeerLost(f"{link.peer} is gone: {reason}")
            if end == "lost":
                link.final = True
            self._node.session_ended(link, error)

    def failed(self, error: Exception) -> None:
        # That peer was refused as `internal`; the others are not to suffer for it.
        log.error("a handshake failed by a mistake in rdmaxfer", exc_info=error)


class Connector(Generic[L, S]):
    """Drives one attempt to connect `stream` (`rdmaxfer.cm.protocol.ClientHandler`)."""

    hello: Hello

    def __init__(self, node: Node[L, S], stream: S) -> None:
        self._node = node
        self._stream = stream
        self.session = secrets.token_bytes(16)
        self.link: L | None = None
        self._error: RdmaxferError | None = None
        self._ended = False

    def prepare(self, route: AnyRoute) -> None:
        """Make the endpoint, on the caller's thread. Raises NoDevice, VerbsUnavailable, VerbsError."""
        node = self._node
        link = node.open_link(self.session, self._stream, route)
        self.link = link
        slots, slot_bytes, max_slot_bytes = node.wishes()
        self._stream.attempt += 1
        self.hello = Hello(
            session=self.session,
            request=1,
            role=node.role,
            node=node.id,
            stream=self._stream.id,
            attempt=self._stream.attempt,
            identity=node.identity,
            resume=node.progress(self._stream),
            fabrics=(address_of(link.endpoint),),
            slots=slots,
            slot_bytes=slot_bytes,
            max_slot_bytes=max_slot_bytes,
            lease_s=node.lease_s,
            reconnect_s=node.reconnect_s,
            name=node.name,
        )

    def outcome(self) -> bool | None:
        """True once connected, also if that has broken again and is to be made again; None while under way; raises what ended the
        attempt. With the node's lock held."""
        if self._error is not None:
            raise self._error
        if self._stream.unwanted and self._link.state is LinkState.OPENING:
            raise ClosedError("connecting was given up.")
        goes_on = self._link.connected and self._link.comes_back
        if self._link.state is LinkState.FAILED and self._link.error is not None and not goes_on:
            raise self._link.error
        return None if self._link.state is LinkState.OPENING else True

    @property
    def _link(self) -> L:
        assert self.link is not None, "prepare() comes first"
        return self.link

    def accepted(self, accept: Accept) -> RingAddress | None:
        node, link = self._node, self._link
        if accept.role == node.role:
            raise Refused(f"both sides are a {node.role}.", code=RefuseCode.ROLE.value)
        check_path(accept, address_of(link.endpoint))
        node.check_agreed(accept)
        node.check_start(link, self.hello.resume, accept)
        link.peer = accept.name
        node.prepare_link(
            link,
            accept.fabric,
            path_mtu=accept.path_mtu,
            max_msg_sz=accept.max_msg_sz,
            max_slot_bytes=accept.max_slot_bytes,
        )
        ring = node.make_ring(link, accept.slots, accept.slot_bytes, accept.start)
        node.use_ring(link, accept.ring)
        return ring

    def started(self) -> None:
        self._node.activate(self._link)

    def resized(self, answer: Resized | Refuse) -> None:
        self._node.resize_answered(self._link, answer)

    def renewed(self, wanted_bytes: int) -> None:
        self._node.renewed(self._link, wanted_bytes)

    def ended(self, error: RdmaxferError | None) -> None:
        """The session is over; called once."""
        self._ended = True
        if self._link.state is LinkState.OPENING:
            self._error = error or PeerLost(f"{self._link.peer} ended the connection during the handshake.")
        self._node.session_ended(self._link, error)
