"""The states of a session on both sides, and what may happen in each. Pure.

A session has a connecting side, which asks, and a bound side, which answers; who of them sends frames is another
matter. Each request is answered by exactly one reply. The connecting side has at most one request under way, and
repeats it, with the same bytes, until it is answered or given up. So the bound side may see a request any number of
times, or not at all.

- What is not in a table is an error: LocalProtocolError where this side did it, a refusal or RemoteProtocolError where
  the peer did.
- A refused HELLO makes no session. A refused READY ends it. A refused RESIZE leaves it as it was.
- A session that has ended stays ended: its id is never taken again.
- Who is not heard of is dead. The bound side counts from when it last received something; the connecting side from when
  it *sent* the last request that was answered, which was earlier. So of two sides that lost sight of each other it is
  always the connecting one that gives up first, and a bound side never serves a peer for longer than its lease.
- But a side that was held up itself does not judge by the time in which it could not look, since all of the machine may have
  stood still: the lease begins anew then, once.
"""

from __future__ import annotations

import enum
from typing import Final

from rdmaxfer.cm.messages import (
    Accept,
    Bye,
    Gone,
    Hello,
    Message,
    Ready,
    RefuseCode,
    Renew,
    Renewed,
    Resize,
    Resized,
    Started,
)

REPLIES: Final[dict[type[Message], type[Message]]] = {
    Hello: Accept,
    Ready: Started,
    Renew: Renewed,
    Resize: Resized,
    Bye: Gone,
}
"""What answers what, if it is not refused."""


# --- the bound side --------------------------------------------------------------------------------------------------


class ServerState(enum.Enum):
    """Of one session, on the bound side."""

    NEW = "new"
    ACCEPTED = "accepted"
    """HELLO was answered; the peer is connecting its queue pair."""
    STARTED = "started"
    ENDED = "ended"


SERVER: Final[dict[ServerState, dict[type[Message], ServerState]]] = {
    ServerState.NEW: {Hello: ServerState.ACCEPTED},
    ServerState.ACCEPTED: {Ready: ServerState.STARTED, Bye: ServerState.ENDED},
    ServerState.STARTED: {Renew: ServerState.STARTED, Resize: ServerState.STARTED, Bye: ServerState.ENDED},
    ServerState.ENDED: {},
}


# --- the connecting side ---------------------------------------------------------------------------------------------


class ClientState(enum.Enum):
    """Of one session, on the connecting side. While CLOSING, BYE is under way and nothing else matters any more."""

    IDLE = "idle"
    HELLO_SENT = "hello sent"
    READY_SENT = "ready sent"
    CONNECTED = "connected"
    CLOSING = "closing"
    ENDED = "ended"


class ClientEvent(enum.Enum):
    """What moves the connecting side."""

    START = "start"
    ANSWERED = "answered"
    LEAVE = "leave"
    """This side says goodbye, be it by choice or because of an error."""
    OVER = "over"
    """There is nobody to say goodbye to, or goodbye was said."""


CLIENT: Final[dict[ClientState, dict[ClientEvent, ClientState]]] = {
    ClientState.IDLE: {
        ClientEvent.START: ClientState.HELLO_SENT,
        ClientEvent.OVER: ClientState.ENDED,
    },
    ClientState.HELLO_SENT: {
        ClientEvent.ANSWERED: ClientState.READY_SENT,
        ClientEvent.LEAVE: ClientState.CLOSING,
        ClientEvent.OVER: ClientState.ENDED,
    },
    ClientState.READY_SENT: {
        ClientEvent.ANSWERED: ClientState.CONNECTED,
        ClientEvent.LEAVE: ClientState.CLOSING,
        ClientEvent.OVER: ClientState.ENDED,
    },
    ClientState.CONNECTED: {
        ClientEvent.ANSWERED: ClientState.CONNECTED,
        ClientEvent.LEAVE: ClientState.CLOSING,
        ClientEvent.OVER: ClientState.ENDED,
    },
    ClientState.CLOSING: {ClientEvent.OVER: ClientState.ENDED},
    ClientState.ENDED: {},
}

FORGOTTEN: Final = frozenset({RefuseCode.UNKNOWN_SESSION, RefuseCode.CLOSING})
"""Refusals that say: this session is over, there is no need for BYE."""

FATAL_TO_RESIZE: Final = frozenset(
    {RefuseCode.VERSION, RefuseCode.ROLE, RefuseCode.MALFORMED, RefuseCode.INTERNAL, RefuseCode.REPLACED} | FORGOTTEN
)
"""Refusals of RESIZE that end the session; after any other it goes on with the ring it has."""
