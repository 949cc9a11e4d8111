"""The REQ side: one session and the socket that carries it. Used from the control thread only."""

from __future__ import annotations

import contextlib

import zmq

from rdmaxfer.cm import endpoint as endpoints
from rdmaxfer.cm.curve import Identity
from rdmaxfer.cm.gate import FAILED, HandshakeWatch
from rdmaxfer.cm.messages import MAX_MESSAGE_BYTES, Hello
from rdmaxfer.cm.protocol import ClientHandler, ClientSession, ClientState
from rdmaxfer.errors import EndpointError, Refused

RETRY_S = 0.5
RECONNECT_MS = 20
RECONNECT_MAX_MS = 500
CONNECT_TIMEOUT_MS = 2000

MECHANISM_MISMATCH = 0x11000002
"""ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH, zmq_socket_monitor(3): one side uses CURVE, the other does not."""
FAILURES_IN_A_ROW = 3
"""A peer that does not use the key we expect just hangs up; so does one that stops at that moment, but not that often."""


class ClientChannel:
    """A session and its present REQ socket. Raises EndpointError for an endpoint that can't be one."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        handler: ClientHandler,
        hello: Hello,
        *,
        handshake_timeout_s: float,
        identity: Identity | None,
        peer_key: bytes | None,
    ) -> None:
        self._identity = identity
        self._peer_key = peer_key
        self._failures = 0
        self.endpoint = str(endpoints.parse(endpoint))
        self.session = ClientSession(
            handler,
            hello,
            endpoint=self.endpoint,
            retry_s=RETRY_S,
            handshake_timeout_s=handshake_timeout_s,
        )
        self._context = context
        self._waiting = False
        self.socket = self._open()
        self.watch = HandshakeWatch(self.socket)

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """What to poll: replies, and what became of handshakes."""
        return self.socket, self.watch.socket

    @property
    def ended(self) -> bool:
        return self.session.state is ClientState.ENDED

    def _open(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.REQ)
        try:
            socket.setsockopt(zmq.IPV6, 1)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            socket.setsockopt(zmq.REQ_RELAXED, 1)
            socket.setsockopt(zmq.REQ_CORRELATE, 1)
            socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
            socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
            if self._identity is not None and self._peer_key is not None:
                socket.setsockopt(zmq.CURVE_PUBLICKEY, self._identity.public)
                socket.setsockopt(zmq.CURVE_SECRETKEY, self._identity.secret)
                socket.setsockopt(zmq.CURVE_SERVERKEY, self._peer_key)
            socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise EndpointError(
                f"{self.endpoint!r} can't be connected to: {zmq.strerror(error.errno or 0)}.", fix=endpoints.FORM
            ) from None
        return socket

    def flush(self) -> bool:
        """Send what the session has to send. True if `socket` is another one now."""
        data = self.session.outgoing()
        if data is None:
            return False
        # A request while another is unanswered goes by a new socket. With REQ_RELAXED the old one would take it too,
        # but it drops its connection then and can lose the request; and a new one looks the name up again.
        renewed = self._waiting
        if renewed:
            self.close_socket()
            self.socket = self._open()
            self.watch = HandshakeWatch(self.socket)
        self._waiting = True
        with contextlib.suppress(zmq.Again):  # no way to the peer now: the session repeats it
            self.socket.send(data, zmq.NOBLOCK)
        return renewed

    def on_readable(self, now_s: float) -> None:
        """Take the reply that has arrived."""
        try:
            parts = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        self._waiting = False
        self.session.on_reply(parts[0] if len(parts) == 1 else b"", now_s)

    def on_handshake(self) -> None:
        """See whether the keys fit. If not, waiting is in vain: the session ends with Refused."""
        for event, value in self.watch.events():
            if not event & FAILED:
                self._failures = 0
                continue
            self._failures += 1
            error = self._why(event, value)
            if error is not None and self.session.state in (ClientState.HELLO_SENT, ClientState.READY_SENT):
                self.session.abort(error)

    def _why(self, event: int, value: int) -> Refused | None:
        """What a failed handshake means, or None if it may be chance."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return _refused(
                f"{self.endpoint} does not let this side's key in.",
                "put NAME.key, the file beside this side's NAME.key_secret, into the peer's directory of allowed keys.",
            )
        if self._peer_key is None:
            if value != MECHANISM_MISMATCH:
                return None
            return _refused(
                f"{self.endpoint} wants a CURVE key, and this side has none.",
                "make one (`rdmaxfer keygen NAME`), and give secret_key=... here and peer_key=... to connect().",
            )
        if value == MECHANISM_MISMATCH or self._failures >= FAILURES_IN_A_ROW:
            return _refused(
                f"{self.endpoint} does not have the key that was expected of it, or does not use CURVE.",
                "peer_key=... must be the NAME.key that belongs to the peer's secret key.",
            )
        return None

    def close_socket(self) -> None:
        self.watch.close()
        self.socket.close(linger=0)


def _refused(text: str, fix: str) -> Refused:
    return Refused(text, code="curve", fix=fix)
