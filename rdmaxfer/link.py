"""One connection between a sender and a receiver: what both directions share. It owns the queue pairs and the memory.

A link is passive: its node calls it with the node's lock held, and gives it the completions that the node polled. It never waits.

Ctrl-C may raise KeyboardInterrupt at any call, and the program may go on afterwards. So a completion is handled in such an
order that handling it again, from the start, is harmless (look and build first, change state last, by plain assignments), and
`push` asks the endpoint, whose count is kept in C, whether the frame went out.
"""

from __future__ import annotations

import enum
import logging
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from rdmaxfer.errors import PeerLost, RdmaxferError, RemoteProtocolError
from rdmaxfer.outgoing import MAX_PIECES

if TYPE_CHECKING:
    from rdmaxfer.fabric.base import Endpoint

log = logging.getLogger("rdmaxfer")

EXTRA_RECVS = 4
"""Receives posted on a lane beyond one a slot: for BYE and resize messages."""


def send_depth(slots: int) -> int:
    """Work requests that a lane's send queue holds: two a slot, enough to split a large frame where max_msg_sz is small, and one
    for each piece that a frame may be gathered from."""
    return max(64, 2 * slots + 16) + MAX_PIECES


def recv_depth(slots: int) -> int:
    return slots + EXTRA_RECVS


class LinkState(enum.Enum):
    OPENING = "opening"
    READY = "ready"
    ENDED = "ended"
    """The peer said goodbye."""
    FAILED = "failed"


class Completion(Protocol):
    """A polled work completion, as the native core lays it out."""

    wr_id: int
    status: int
    byte_len: int
    imm: int
    has_imm: int
    vendor_err: int
    is_recv: int
    lane: int

    @property
    def placed(self) -> tuple[bytes, memoryview] | None:
        """Only of endpoints that are not `in_ring`."""


class Link:
    """What both directions share."""

    stream: Any
    """The Stream whose frames it moves, which outlives its links."""

    def __init__(self, session: bytes, peer: str, endpoint: Endpoint, owned: ExitStack) -> None:
        self.session = session
        self.peer = peer
        self.endpoint = endpoint
        self.state = LinkState.OPENING
        self.error: RdmaxferError | None = None
        self.connected = False
        """Whether frames could flow at some time."""
        self.reason = ""
        """Why this fabric, device and GID were chosen."""
        self.final = False
        """Whether, however it ends, no other connection is to be waited for."""
        self.leaving = False
        """The control plane has brought the peer's goodbye: what happens to the data plane now is its end."""
        self.torn_down = False
        self.work: threading.Thread | None = None
        """Registers memory for this link beside the control thread; to be waited for before the end."""
        self._owned = owned
        self._handled = (-1, -1)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.state.value} with {self.peer}>"

    @property
    def fabric(self) -> str:
        """What carries the frames."""
        return str(self.endpoint.route.fabric)

    @property
    def live(self) -> bool:
        return self.state is LinkState.READY

    @property
    def comes_back(self) -> bool:
        """Whether its stream is to have another connection after what it has failed of."""
        return bool(self.stream.reconnect_s) and not self.final and isinstance(self.error, PeerLost)

    def fail(self, error: RdmaxferError) -> None:
        """The link is broken; the first error counts."""
        if self.leaving:
            self.end()
        elif self.state in (LinkState.OPENING, LinkState.READY):
            self.state = LinkState.FAILED
            self.error = error

    def end(self) -> None:
        """The peer said goodbye."""
        if self.state in (LinkState.OPENING, LinkState.READY):
            self.state = LinkState.ENDED

    def handle(self, wc: Completion, tag: tuple[int, int]) -> None:
        """Take one completion; `tag` is its own number, by which a repeated call is known. Errors of the peer or the device
        end the link; they don't raise."""
        if tag == self._handled:
            return
        try:
            if wc.status:
                if self.state is LinkState.READY:
                    self.fail(self._completion_error(wc))
            elif wc.is_recv:
                self._on_recv(wc, tag)
            else:
                self._on_sent(wc)
        except RdmaxferError as error:
            self._drop(error)

    def after_poll(self) -> None:
        """All completions of one poll were handled. Called again if Ctrl-C came in between."""

    def _drop(self, error: RdmaxferError) -> None:
        if isinstance(error, RemoteProtocolError):
            log.warning("dropping the connection with %s: %s", self.peer, error)
        self.fail(error)

    def _completion_error(self, wc: Completion) -> RdmaxferError:
        return PeerLost(f"the connection with {self.peer} broke: {self.endpoint.explain(wc.status, wc.vendor_err)}")

    def _on_recv(self, wc: Completion, tag: tuple[int, int]) -> None:
        raise NotImplementedError

    def _on_sent(self, wc: Completion) -> None:
        raise NotImplementedError

    def teardown(self, timeout_s: float) -> None:
        """Drain and destroy the queue pairs, unregister the memory. The caller keeps everybody else away from this link."""
        if self.torn_down:
            return
        self.torn_down = True
        if self.state in (LinkState.OPENING, LinkState.READY):
            self.state = LinkState.ENDED
        try:
            self.endpoint.drain(timeout_s)
        finally:
            self._owned.close()
