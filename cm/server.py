"""The REP side: one bound socket and the sessions of all who connect to it. Used from the control thread only.

The socket is a ROUTER that speaks REP's part of the REQ/REP protocol (it puts the requester's envelope before the reply). A REP
socket of libzmq 4.3.5 does the same for a well-behaved peer, but after rubbish on its port it lost the next replies to other
peers in 52 of 60 trials; a ROUTER lost none.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import Any

import zmq

from rdmaxfer.cm import endpoint as endpoints
from rdmaxfer.cm.curve import Identity
from rdmaxfer.cm.gate import FAILED, HandshakeWatch
from rdmaxfer.cm.messages import MAX_MESSAGE_BYTES
from rdmaxfer.cm.protocol import ServerHandler, ServerSessions
from rdmaxfer.cm.turns import Request, Turns
from rdmaxfer.errors import EndpointError

REQUESTS_A_TURN = 64
"""So that a flood of requests does not keep the control thread from everything else."""

HANDSHAKES_FOR_S = 0.005
"""So long a turn answers who is not connected yet: queue pairs and rings take time, and those who are connected renew leases."""
MAX_WAITING = 1024
"""Requests of such that wait for it. Others are not answered, and their senders ask again."""

_FIXES = {
    errno.EADDRINUSE: "another socket is bound there: close it, choose another port, or bind to port * for a free one.",
    errno.EADDRNOTAVAIL: "this host has no such address: see `ip addr`, or bind to tcp://*:PORT for all of them.",
    errno.ENODEV: "HOST is neither an address of this host nor the name of one of its network devices: see `ip addr`.",
    errno.EACCES: "ports below 1024 are for root: choose a higher one.",
    errno.EINVAL: endpoints.FORM,
}


class ServerChannel:
    """A bound socket. Raises EndpointError if it can't be bound."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        handler: ServerHandler,
        *,
        lease_s: float,
        handshake_timeout_s: float,
        max_sessions: int,
        handshakes_per_s: float,
        identity: Identity | None,
    ) -> None:
        wanted = endpoints.parse(endpoint, bind=True)
        self.socket = context.socket(zmq.ROUTER)
        try:
            self.socket.setsockopt(zmq.IPV6, 1)
            self.socket.setsockopt(zmq.LINGER, 0)
            self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            if identity is not None:
                self.socket.setsockopt(zmq.CURVE_SERVER, 1)
                self.socket.setsockopt(zmq.CURVE_PUBLICKEY, identity.public)
                self.socket.setsockopt(zmq.CURVE_SECRETKEY, identity.secret)
            self.socket.bind(str(wanted))
            self.endpoint = str(endpoints.from_zmq(self.socket.getsockopt_string(zmq.LAST_ENDPOINT)))
        except zmq.ZMQError as error:
            self.socket.close(linger=0)
            code = error.errno or 0
            text = f"{endpoint!r} can't be bound: {zmq.strerror(code)}."
            raise EndpointError(text, fix=_FIXES.get(code, "")) from None
        self.watch = HandshakeWatch(self.socket)
        self._waiting = Turns(MAX_WAITING)
        """Requests of who is not connected."""
        self.turned_away = 0
        """Connections whose ZeroMQ handshake failed: no key, a wrong one, or no ZeroMQ at all."""
        self.sessions = ServerSessions(
            handler,
            lease_s=lease_s,
            handshake_timeout_s=handshake_timeout_s,
            max_sessions=max_sessions,
            handshakes_per_s=handshakes_per_s,
        )

    def on_handshake(self) -> None:
        """Count what has failed."""
        self.turned_away += sum(1 for event, _ in self.watch.events() if event & FAILED)

    @property
    def busy(self) -> bool:
        """Whether requests wait for `on_turn`."""
        return bool(self._waiting)

    def on_readable(self, now_s: float) -> None:
        """Answer what has arrived from those who are connected; what others want waits for `on_turn`."""
        for _ in range(REQUESTS_A_TURN):
            try:
                parts: list[Any] = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            envelope, data = _open(parts)
            peer = _peer(parts[-1])
            if self.sessions.is_started(data):
                self._answer(envelope, data, peer, now_s)
            else:
                self._waiting.add(Request(data, envelope, peer))

    def on_turn(self, clock_s: Callable[[], float]) -> None:
        """Answer some of those who are not connected, one at least."""
        end_s = clock_s() + HANDSHAKES_FOR_S
        while self._waiting:
            data, envelope, peer = self._waiting.take()
            self._answer(envelope, data, peer, clock_s())
            if clock_s() >= end_s:
                return

    def _answer(self, envelope: list[bytes], data: bytes, peer: str, now_s: float) -> None:
        reply = self.sessions.on_request(data, peer, now_s)
        # A ROUTER drops what is for somebody who is gone.
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart([*envelope, reply], zmq.NOBLOCK)

    def close(self, reason: str) -> None:
        """End all sessions. The socket goes on to refuse until `close_socket`."""
        self.sessions.close(reason)

    def close_socket(self) -> None:
        self.watch.close()
        self.socket.close(linger=0)


def _open(parts: list[Any]) -> tuple[list[bytes], bytes]:
    """A request's envelope (the requester, perhaps REQ's correlation number, an empty part), and its body; b"" if it is not a
    request of one part, which is then refused as malformed."""
    for end in (2, 3):
        if len(parts) >= end and not len(parts[end - 1]):
            return [part.bytes for part in parts[:end]], parts[end].bytes if len(parts) == end + 1 else b""
    return [parts[0].bytes, b""], b""


def _peer(part: Any) -> str:
    try:
        return endpoints.plain_address(str(part.get("Peer-Address")))
    except (zmq.ZMQError, UnicodeError):
        return ""
