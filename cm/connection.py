"""What the control thread hands out: a bound endpoint, a connection. Both are for any thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from rdmaxfer.cm.latch import Call, Latch
from rdmaxfer.cm.messages import Accept, End, Hello, Refuse, Resized, RingAddress
from rdmaxfer.cm.protocol import ClientHandler, ServerStatistics
from rdmaxfer.errors import ClosedError, LocalProtocolError, RdmaxferError, TimeoutExpired

if TYPE_CHECKING:
    from rdmaxfer.cm.client import ClientChannel
    from rdmaxfer.cm.control import Control
    from rdmaxfer.cm.server import ServerChannel

SLICE_S: Final = 0.1
"""The longest that a waiting thread is deaf to Ctrl-C."""
CALL_TIMEOUT_S: Final = 30.0
"""For calls that only wait for the control thread to be free: handlers register memory, which can take seconds."""


def monotonic_s() -> float:
    """The clock of the control plane."""
    return time.monotonic()


class BoundServer:
    """A bound endpoint. `endpoint` is the actual one, with the port that was chosen."""

    def __init__(self, control: Control, channel: ServerChannel) -> None:
        self._control = control
        self._channel = channel
        self.endpoint = channel.endpoint

    def __repr__(self) -> str:
        return f"<BoundServer {self.endpoint}>"

    @property
    def turned_away(self) -> int:
        """Connections whose ZeroMQ handshake failed: no key, a wrong one, or no ZeroMQ at all."""
        return self._channel.turned_away

    @property
    def refused(self) -> int:
        """Requests that were answered by a refusal."""
        return self._channel.sessions.refused

    @property
    def expired(self) -> int:
        """Sessions that were not heard of any more, and handshakes that were not finished."""
        return self._channel.sessions.expired

    def statistics(self) -> ServerStatistics:
        """Raises ClosedError once the control thread has ended."""
        return self._control.run(self._channel.sessions.statistics)


class Connection:
    """A connection to a bound endpoint, from the moment it was asked for."""

    def __init__(self, control: Control, endpoint: str, hello: Hello) -> None:
        self._control = control
        self._channel: ClientChannel | None = None
        self.endpoint = endpoint
        self.session = hello.session
        self._started = False
        self._ended = False
        self._error: RdmaxferError | None = None
        self._settled = Latch()
        self._over = Latch()

    def __repr__(self) -> str:
        state = "ended" if self._ended else "started" if self._started else "starting"
        return f"<Connection {state} to {self.endpoint}>"

    @property
    def ended(self) -> bool:
        return self._ended

    def wait_started(self, timeout_s: float | None = None) -> None:
        """Wait until frames may flow. Raises what ended the connection (Refused, ConnectTimeout, ...), ClosedError if
        this side ended it, or TimeoutExpired."""
        self._wait(self._settled, timeout_s, "the connection was not started")
        if self._ended:
            raise self._error or ClosedError(f"the connection to {self.endpoint} was closed.")

    def request_resize(self, wanted_bytes: int, ring: RingAddress | None) -> Call[None]:
        """Ask for larger slots, see `ClientSession.request_resize`; from any thread. The answer goes to the handler's
        `resized`; the call only tells whether the request was valid."""
        return self._control.call(lambda: self._session_call("resize", wanted_bytes, ring))

    def bye(self, reason: str, timeout_s: float = 1.0, end: End = "goodbye") -> None:
        """Leave (`end` tells the peer for how long).

        Wait until the peer knows, but no longer than `timeout_s`; from the control thread: don't wait."""
        deadline_s = monotonic_s() + timeout_s
        self._control.run(lambda: self._session_call("bye", reason, deadline_s, end), timeout_s + CALL_TIMEOUT_S)
        if not self._control.is_control_thread:
            self._wait(self._over, timeout_s + CALL_TIMEOUT_S, "the connection did not end")

    def attach(self, channel: ClientChannel) -> None:
        """The session is on its way. On the control thread."""
        self._channel = channel

    def _session_call(self, what: str, *args: Any) -> None:
        channel = self._channel
        if channel is None:
            raise LocalProtocolError("the connection is not set up yet")
        if what == "bye":
            channel.session.bye(args[0], monotonic_s(), args[1], args[2])
        else:
            channel.session.request_resize(args[0], args[1], monotonic_s())

    def _wait(self, latch: Latch, timeout_s: float | None, what: str) -> None:
        self._control.check_not_control_thread()
        end_s = None if timeout_s is None else monotonic_s() + timeout_s
        while not latch.is_set:
            self._control.check_alive()
            left_s = SLICE_S if end_s is None else min(SLICE_S, end_s - monotonic_s())
            if left_s <= 0:
                raise TimeoutExpired(f"{what} within {timeout_s:g} s: {self.endpoint}.")
            latch.wait(left_s)

    def mark(self, *, ended: bool, error: RdmaxferError | None = None) -> None:
        """It has started, or ended: wake who waits for it. On the control thread."""
        if ended:
            self._ended = True
            self._error = error
            self._over.set()
        else:
            self._started = True
        self._settled.set()


class Watching:
    """Tells the Connection what its handler is told."""

    def __init__(self, handler: ClientHandler, connection: Connection) -> None:
        self._handler = handler
        self._connection = connection

    def accepted(self, accept: Accept) -> RingAddress | None:
        return self._handler.accepted(accept)

    def started(self) -> None:
        self._handler.started()
        self._connection.mark(ended=False)

    def resized(self, resized: Resized | Refuse) -> None:
        self._handler.resized(resized)

    def renewed(self, wanted_bytes: int) -> None:
        self._handler.renewed(wanted_bytes)

    def ended(self, error: RdmaxferError | None) -> None:
        # The handler first, so that who waits finds everything settled; but wake them in any case.
        try:
            self._handler.ended(error)
        finally:
            self._connection.mark(ended=True, error=error)
