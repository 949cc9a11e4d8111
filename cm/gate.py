"""Who gets in: ZeroMQ's authentication protocol (ZAP) for bound sockets, and what became of handshakes. On the control thread.

ZeroMQ does the cryptography, pyzmq's Authenticator the protocol; what is here asks the directory of allowed keys, and counts.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import zmq
from zmq.auth.base import Authenticator
from zmq.utils.monitor import parse_monitor_message

from rdmaxfer.cm.curve import AllowedKeys
from rdmaxfer.errors import LocalProtocolError

log = logging.getLogger("rdmaxfer")

EVENTS_A_TURN = 256
FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class Gate:
    """Answers ZeroMQ's question about each key that comes to a bound socket of `context`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: AllowedKeys) -> None:
        self._allowed = allowed
        self._authenticator = Authenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", self)
        self.socket: zmq.Socket[bytes] = self._authenticator.zap_socket

    def callback(self, domain: str, key: bytes) -> bool:
        """What the Authenticator asks: may the owner of this key come in?"""
        name = self._allowed.name_of(key)
        if name is None:
            log.warning(
                "turned away a peer with the key %s, which is not in %s", key.decode("ascii"), self._allowed.directory
            )
        return name is not None

    def on_readable(self) -> None:
        """Answer what was asked."""
        for _ in range(EVENTS_A_TURN):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # A coroutine for the sake of callbacks that wait; this one does not.
            try:
                self._authenticator.handle_zap_message(parts).send(None)
            except StopIteration:
                continue
            raise LocalProtocolError("the authentication of a peer was to wait")


class HandshakeWatch:
    """What became of the handshakes of a socket's connections."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._watched = socket
        self.socket: zmq.Socket[bytes] = socket.get_monitor_socket(FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def events(self) -> Iterator[tuple[int, int]]:
        """(event, value) of each that has come."""
        for _ in range(EVENTS_A_TURN):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = parse_monitor_message(parts)
            yield event["event"], event["value"]

    def close(self) -> None:
        with contextlib.suppress(zmq.ZMQError):
            self._watched.disable_monitor()
        self.socket.close(linger=0)
