"""How the connecting side comes back to a peer: it tries again and again, at growing intervals, until it is connected or the time
is up. On a thread of its own, as resolving names and opening devices takes time."""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from rdmaxfer.errors import ClosedError, ForkedError, RdmaxferError, Refused, RemoteProtocolError

if TYPE_CHECKING:
    from rdmaxfer.node import Node
    from rdmaxfer.stream import Stream

log = logging.getLogger("rdmaxfer")

FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 2.0

TEARDOWN_PAUSE_S: Final = 0.02

ATTEMPT_S: Final = 5.0
"""How long to ask one address: then the name is looked up, and the device chosen, anew."""

TEMPORARY: Final = {"busy", "closing", "unknown_session", "limit", "fabric", "internal"}
"""Refusals that may be different the next time."""


class Reconnecting(threading.Thread):
    """Connects `stream` again, within `reconnect_s` seconds, or gives it up."""

    def __init__(self, node: Node[Any, Any], stream: Stream[Any], reconnect_s: float) -> None:
        super().__init__(name="rdmaxfer-reconnect", daemon=True)
        self._node = node
        self._stream = stream
        self._turn = stream.waits
        self._end_s = time.monotonic() + reconnect_s
        self.start()

    def run(self) -> None:
        try:
            self._try()
        except ClosedError:
            pass
        except BaseException as error:
            self._node.control_failed(error)

    def _try(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            # Not all sides that lost one peer at a time come back at a time.
            if not self._node.pause(min(pause_s * random.uniform(0.5, 1.0), max(0.0, self._end_s - time.monotonic()))):
                return
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            latest = self._stream.latest
            while (
                latest is not None and not latest.torn_down
            ):  # what it still brings must be known before HELLO says what has come
                if not self._node.pause(TEARDOWN_PAUSE_S):
                    return
            left_s = self._end_s - time.monotonic()
            if self._stream.waits != self._turn or self._stream.link is not None:
                return
            try:
                self._node.reach(self._stream, max(0.1, min(ATTEMPT_S, left_s)))
                return
            except (ClosedError, ForkedError):
                return
            except RdmaxferError as error:
                if self._stream.waits != self._turn or self._stream.link is not None:
                    return  # it was connected, and broke again
                log.debug("connecting with %s again: %s", self._stream.peer, error)
                final = isinstance(error, RemoteProtocolError) or (
                    isinstance(error, Refused) and error.code not in TEMPORARY
                )
                if final or time.monotonic() >= self._end_s:
                    self._node.give_up(self._stream, error)
                    return
