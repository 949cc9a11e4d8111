"""The REQ side: one session and the socket that carries it. Used from the control thread only."""

from __future__ import annotations

import contextlib

import zmq

from rdmaxfer.cm import endpoint as endpoints
from rdmaxfer.cm.messages import MAX_MESSAGE_BYTES, Hello
from rdmaxfer.cm.protocol import ClientHandler, ClientSession, ClientState
from rdmaxfer.errors import EndpointError

RETRY_S = 0.5
RECONNECT_MS = 20
RECONNECT_MAX_MS = 500
CONNECT_TIMEOUT_MS = 2000


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
    ) -> None:
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
            self.socket.close(linger=0)
            self.socket = self._open()
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

    def close_socket(self) -> None:
        self.socket.close(linger=0)
