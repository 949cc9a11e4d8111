"""Who gets in: ZeroMQ's authentication protocol (ZAP) for bound sockets, and what became of handshakes. On the control thread.

ZeroMQ does the cryptography, pyzmq's Authenticator the protocol; what is here asks the directory of allowed keys, and counts.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterator

import zmq
from zmq.auth.base import Authenticator
from zmq.utils.monitor import parse_monitor_message

from rdmaxfer.cm.curve import AllowedKeys
from rdmaxfer.errors import LocalProtocolError

log = logging.getLogger("rdmaxfer")

EVENTS_A_TURN = 256
FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


LINES_A_MINUTE = 10
MENTION_AGAIN_S = 3600.0
MAX_REMEMBERED = 1024


class Mentions:
    """Which of those turned away are worth a line in the log: each key once an hour, and so many a minute in all. Pure.

    Whoever reaches the port can make up keys as fast as he likes; the log, and the disk below it, are not for him to fill.
    """

    def __init__(self, lines_a_minute: int = LINES_A_MINUTE) -> None:
        self._lines_a_minute = lines_a_minute
        self._said_s: OrderedDict[bytes, float] = OrderedDict()
        self._minute_s = -math.inf
        self._lines = 0
        self._unsaid = 0

    def take(self, key: bytes, now_s: float) -> tuple[bool, int]:
        """The owner of `key` was turned away: whether to say so; and, once a minute, how many times nothing was said."""
        unsaid = 0
        if now_s >= self._minute_s + 60:
            unsaid, self._unsaid = self._unsaid, 0
            self._minute_s, self._lines = now_s, 0
        if now_s < self._said_s.get(key, -math.inf) + MENTION_AGAIN_S or self._lines >= self._lines_a_minute:
            self._unsaid += 1
            return False, unsaid
        self._lines += 1
        self._said_s[key] = now_s
        self._said_s.move_to_end(key)
        while len(self._said_s) > MAX_REMEMBERED:
            self._said_s.popitem(last=False)
        return True, unsaid


class Gate:
    """Answers ZeroMQ's question about each key that comes to a bound socket of `context`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: AllowedKeys) -> None:
        self._allowed = allowed
        self._mentions = Mentions()
        self._authenticator = Authenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", self)
        self.socket: zmq.Socket[bytes] = self._authenticator.zap_socket

    def callback(self, domain: str, key: bytes) -> bool:
        """What the Authenticator asks: may the owner of this key come in?"""
        name = self._allowed.name_of(key)
        if name is None:
            self._mention(key)
        return name is not None

    def _mention(self, key: bytes) -> None:
        say, unsaid = self._mentions.take(key, time.monotonic())
        directory = self._allowed.directory
        if unsaid:
            log.warning("turned away %d more connections of peers whose keys are not in %s", unsaid, directory)
        if say:
            log.warning("turned away a peer with the key %s, which is not in %s", key.decode("ascii"), directory)

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
