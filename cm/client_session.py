"""The connecting side of the handshake: one session. Pure: bytes and times in, bytes out.

The driver calls `start` once, then sends what `outgoing` returns, gives replies to `on_reply`, and calls `on_tick` at
`next_deadline`. The handler is called from within these methods. It is told the end, once, as soon as it is known; the
session itself may go on for a moment to say BYE, until `state` is ENDED.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import msgspec

from rdmaxfer.cm.messages import (
    MAX_TEXT_CHARS,
    NO_SESSION,
    Accept,
    Bye,
    End,
    Gone,
    Hello,
    Message,
    Ready,
    Refuse,
    RefuseCode,
    Renew,
    Renewed,
    Resize,
    Resized,
    RingAddress,
    Started,
    decode,
    encode,
)
from rdmaxfer.cm.states import CLIENT, FATAL_TO_RESIZE, FORGOTTEN, REPLIES, ClientEvent, ClientState
from rdmaxfer.errors import (
    ConnectTimeout,
    LocalProtocolError,
    PeerLost,
    RdmaxferError,
    Refused,
    RemoteProtocolError,
)

BYE_TIMEOUT_S = 1.0
"""How long BYE is repeated after an error."""
RENEWALS_A_LEASE = 3
RETRIES_A_LEASE = 6
RETRY_AT_LEAST = 3
"""At least so often in a lease a request is repeated."""

LONGEST_RETRY_S = 8.0
"""... and at least every so many seconds during the handshake."""


class ClientHandler(Protocol):
    """What the connecting side does at each step.

    An exception from any but `ended` ends the session: BYE goes to the peer, and the error to `ended`. One that is no
    RdmaxferError comes as the cause of a LocalProtocolError.
    """

    def accepted(self, accept: Accept) -> RingAddress | None:
        """Connect the queue pair. Returns this side's ring if it is the receiver, else None."""

    def started(self) -> None:
        """Frames may flow."""

    def resized(self, resized: Resized | Refuse) -> None:
        """The answer to `request_resize`, in the order of the requests."""

    def renewed(self, wanted_bytes: int) -> None:
        """The peer is alive. If it is a sender: the slot bytes it waits for, or 0."""

    def ended(self, error: RdmaxferError | None) -> None:
        """Called exactly once, and last. None if this side said `bye`; else Refused, ConnectTimeout, PeerLost,
        RemoteProtocolError or what this handler raised."""


class ClientSession:
    """See the module. Times are seconds of any monotonic clock.

    `hello.session` is the id of the session: 16 bytes from `secrets`; `hello.lease_s` is the longest lease wanted.
    `retry_s` is the time after which a request is repeated, `handshake_timeout_s` what all of the handshake may take.
    `endpoint` is for the errors.
    """

    def __init__(
        self,
        handler: ClientHandler,
        hello: Hello,
        *,
        endpoint: str,
        retry_s: float,
        handshake_timeout_s: float,
    ) -> None:
        self._handler = handler
        self._hello = msgspec.structs.replace(hello, request=1)
        self._endpoint = endpoint
        self._retry_s = retry_s
        self._handshake_timeout_s = handshake_timeout_s
        self.state = ClientState.IDLE
        self.lease_s = hello.lease_s
        """The lease asked for; once connected, the one agreed on."""
        self.ignored = 0
        """Replies that answered nothing that was waited for."""
        self._number = 0
        self._awaited: Message | None = None
        self._data = b""
        self._out: bytes | None = None
        self._asked_s = 0.0
        self._sent_s = 0.0
        self._repeats = 0
        self._took_s = 0.0
        """How long the last answer took."""
        self._alive_s = 0.0
        self._spared = False
        """Whether `on_late` has let the peer live, and it has not answered since."""
        self._deadline_s = 0.0
        self._resizes: deque[Resize] = deque()
        self._busy = ""
        """What a peer said that had no time for HELLO."""
        self._told = False

    def __repr__(self) -> str:
        return f"<ClientSession {self._hello.session.hex()[:8]} {self.state.value} at {self._endpoint}>"

    @property
    def session_id(self) -> bytes:
        return self._hello.session

    # --- what the driver calls ------------------------------------------------------------------------------------

    def start(self, now_s: float) -> None:
        """Ask for the connection. Raises LocalProtocolError if the HELLO is not valid, or `start` was called before."""
        self._move(ClientEvent.START)
        self._deadline_s = now_s + self._handshake_timeout_s
        self._ask(self._hello, now_s)

    def outgoing(self) -> bytes | None:
        """What to send now, once; None if there is nothing. Replies to what was sent before are void then."""
        out, self._out = self._out, None
        return out

    def next_deadline(self) -> float | None:
        """When `on_tick` has something to do; None before the start and after the end."""
        if self.state in (ClientState.IDLE, ClientState.ENDED):
            return None
        due: list[float] = []
        if self._awaited is not None:
            due.append(self._sent_s + self._patience_s)
        if self.state is not ClientState.CONNECTED:
            due.append(self._deadline_s)
        else:
            due.append(self._alive_s + self.lease_s)
            if self._awaited is None:
                due.append(self._alive_s + self.lease_s / RENEWALS_A_LEASE)
        return min(due)

    def on_tick(self, now_s: float) -> None:
        """Time has passed: repeat, renew, or give up."""
        match self.state:
            case ClientState.IDLE | ClientState.ENDED:
                return
            case ClientState.CLOSING:
                if now_s >= self._deadline_s:
                    self._over(None)
                    return
            case ClientState.HELLO_SENT | ClientState.READY_SENT:
                if now_s >= self._deadline_s:
                    self._fail(self._timeout(), now_s)
            case ClientState.CONNECTED:
                if now_s >= self._alive_s + self.lease_s:
                    self._fail(PeerLost(f"nothing was heard of {self._endpoint} for {self.lease_s:g} s."), now_s)
                elif self._awaited is None and now_s >= self._alive_s + self.lease_s / RENEWALS_A_LEASE:
                    self._ask(Renew(session=self.session_id, request=1), now_s)
        if self._awaited is not None and now_s >= self._sent_s + self._patience_s:
            self._repeats += 1
            self._send(now_s)

    def on_late(self, now_s: float) -> None:
        """This side was held up, and maybe all of its machine, with the peer, which is asked once more before it is dead."""
        if self.state is ClientState.CONNECTED and not self._spared and now_s >= self._alive_s + self.lease_s:
            self._spared = True
            self._alive_s = now_s - self.lease_s / RENEWALS_A_LEASE
            if self._awaited is not None:
                self._asked_s = now_s
                self._send(now_s)

    def on_reply(self, data: bytes, now_s: float) -> None:
        """Take what the peer sent. What is wrong with it ends the session and goes to the handler: never raises."""
        if self._awaited is None:
            self.ignored += 1
            return
        try:
            reply = decode(data)
        except RemoteProtocolError as error:
            text = str(error).removesuffix(f" Fix: {error.fix}")
            self._fail(RemoteProtocolError(f"{self._endpoint}: {text}", fix=error.fix), now_s)
            return
        # A refusal without a session answers something that could not be read.
        nameless = isinstance(reply, Refuse) and (reply.session, reply.request) == (NO_SESSION, 0)
        if not nameless and (reply.session, reply.request) != (self.session_id, self._number):
            self.ignored += 1
            return
        asked = self._awaited
        if not isinstance(reply, Refuse | REPLIES[type(asked)]):
            text = f"{self._endpoint} answered {_name(asked)} with {_name(reply)}."
            self._fail(RemoteProtocolError(text), now_s)
            return
        self._awaited = None
        self._alive_s = self._asked_s
        self._spared = False
        self._took_s = now_s - self._sent_s
        try:
            self._take(asked, reply, now_s)
        except RdmaxferError as error:
            self._fail(error, now_s)
        except Exception as error:
            wrapped = LocalProtocolError(f"an internal error in the connection to {self._endpoint}: {error!r}")
            wrapped.__cause__ = error
            self._fail(wrapped, now_s)
        self._next_resize(now_s)

    def request_resize(self, wanted_bytes: int, ring: RingAddress | None, now_s: float) -> None:
        """Ask for slots of `wanted_bytes` (a sender), or offer `ring`, which has them (a receiver). The answer goes to
        `resized`; there is none if the session ends before. Raises LocalProtocolError before the session started."""
        if self.state in (ClientState.CLOSING, ClientState.ENDED):
            return
        if self.state is not ClientState.CONNECTED:
            raise LocalProtocolError(f"a resize was asked for while the session was {self.state.value}")
        if (ring is None) != (self._hello.role == "sender"):
            raise LocalProtocolError(f"a {self._hello.role} asked for a resize in the manner of the other side")
        resize = Resize(session=self.session_id, request=1, wanted_bytes=wanted_bytes, ring=ring)
        encode(resize)  # an invalid one is an error of the caller, not of the session
        self._resizes.append(resize)
        self._next_resize(now_s)

    def bye(self, reason: str, now_s: float, deadline_s: float, end: End = "goodbye") -> None:
        """Leave; `end` tells the peer for how long.

        `ended(None)` follows when the peer has answered, and at `deadline_s` (a time, not a duration) at the
        latest. Once it is leaving anyway, this can only bring the deadline forward."""
        match self.state:
            case ClientState.IDLE:
                self._over(None)
            case ClientState.ENDED:
                pass
            case ClientState.CLOSING:
                self._deadline_s = min(self._deadline_s, deadline_s)
            case _:
                self._leave(reason, now_s, deadline_s, end)

    def abort(self, error: RdmaxferError | None) -> None:
        """End at once, without a word to the peer: there is no way to send any more."""
        if self.state is not ClientState.ENDED:
            self._over(error)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _take(self, asked: Message, reply: Message, now_s: float) -> None:
        if isinstance(reply, Refuse):
            self._refused(asked, reply, now_s)
        elif isinstance(reply, Gone):
            self._over(None)
        elif isinstance(reply, Accept):
            self._accepted(reply, now_s)
        elif isinstance(reply, Resized):
            if (reply.ring is None) != (self._hello.role == "receiver"):
                raise RemoteProtocolError(f"{self._endpoint} sent a ring out of place, or none where it must")
            self._move(ClientEvent.ANSWERED)
            self._handler.resized(reply)
        elif isinstance(reply, Started | Renewed):
            self._move(ClientEvent.ANSWERED)
            if isinstance(reply, Started):
                self._handler.started()
            else:
                self._handler.renewed(reply.wanted_bytes)

    def _accepted(self, accept: Accept, now_s: float) -> None:
        if accept.role == self._hello.role:
            raise RemoteProtocolError(f"{self._endpoint} accepted a {accept.role} although it is one itself")
        if accept.lease_s > self.lease_s:
            raise RemoteProtocolError(f"{self._endpoint} granted a longer lease than was asked for")
        self.lease_s = accept.lease_s
        self._retry_s = min(self._retry_s, self.lease_s / RETRIES_A_LEASE)
        ring = self._handler.accepted(accept)
        if self.state is not ClientState.HELLO_SENT:
            return  # the handler said bye
        if (ring is None) != (self._hello.role == "sender"):
            raise LocalProtocolError(f"a {self._hello.role} {'lacks its' if ring is None else 'has a'} ring")
        self._ask(Ready(session=self.session_id, request=1, ring=ring), now_s)
        self._move(ClientEvent.ANSWERED)

    def _refused(self, asked: Message, refuse: Refuse, now_s: float) -> None:
        text = f"{self._endpoint} refused {_name(asked)} ({refuse.code.value}): {refuse.message}"
        error: RdmaxferError = Refused(text, code=refuse.code.value, fix=refuse.fix)
        if self.state is ClientState.CLOSING:
            self._over(None)
        elif self.state is ClientState.HELLO_SENT and refuse.code is RefuseCode.BUSY:
            self._awaited = asked  # repeated as if no answer had come
            self._busy = refuse.message
        elif self.state is ClientState.HELLO_SENT:
            self._over(error)
        elif self.state is ClientState.READY_SENT:
            self._over(error) if refuse.code in FORGOTTEN else self._fail(error, now_s)
        elif refuse.code in FORGOTTEN:
            self._over(PeerLost(f"{self._endpoint} has ended the connection: {refuse.message}", fix=refuse.fix))
        elif isinstance(asked, Resize) and refuse.code not in FATAL_TO_RESIZE:
            self._move(ClientEvent.ANSWERED)
            self._handler.resized(refuse)
        else:
            self._fail(error, now_s)

    def _next_resize(self, now_s: float) -> None:
        if self.state is ClientState.CONNECTED and self._awaited is None and self._resizes:
            self._ask(self._resizes.popleft(), now_s)

    def _timeout(self) -> ConnectTimeout:
        step = "HELLO" if self.state is ClientState.HELLO_SENT else "READY"
        return ConnectTimeout(
            f"{self._endpoint} did not connect within {self._handshake_timeout_s:g} s: "
            f"timed out while waiting for an answer to {step}{f'; it was busy: {self._busy}' if self._busy else '.'}",
            fix="check that the peer is running and bound to this address and port, that a host name resolves, "
            "and that a firewall lets the TCP port through.",
        )

    def _move(self, event: ClientEvent) -> None:
        try:
            self.state = CLIENT[self.state][event]
        except KeyError:
            raise LocalProtocolError(f"{event.value} has no place in a session that is {self.state.value}") from None

    @property
    def _patience_s(self) -> float:
        """How long to wait for an answer before it is asked again. Ever longer: a peer that is busy with many is not helped by
        being asked more often."""
        if self.state is ClientState.CLOSING:
            return self._retry_s  # there is little time
        longest_s = LONGEST_RETRY_S if self.state is not ClientState.CONNECTED else self.lease_s / RETRY_AT_LEAST
        first_s = max(self._retry_s, 2 * self._took_s)  # repeating costs the socket, and far peers much time
        return min(first_s * (1 << min(self._repeats, 10)), max(self._retry_s, longest_s))

    def _ask(self, message: Message, now_s: float) -> None:
        self._number += 1
        self._repeats = 0
        message = msgspec.structs.replace(message, session=self.session_id, request=self._number)
        self._data = encode(message)
        self._awaited = message
        self._asked_s = now_s
        self._send(now_s)

    def _send(self, now_s: float) -> None:
        self._out = self._data
        self._sent_s = now_s

    def _leave(self, reason: str, now_s: float, deadline_s: float, end: End) -> None:
        self._move(ClientEvent.LEAVE)
        self._deadline_s = deadline_s
        self._resizes.clear()
        text = reason.encode("utf-8", "replace").decode()[:MAX_TEXT_CHARS]
        self._ask(Bye(session=self.session_id, request=1, end=end, reason=text), now_s)

    def _fail(self, error: RdmaxferError, now_s: float) -> None:
        """End because of an error: the handler knows at once, the peer if it can be reached."""
        if self.state is ClientState.CLOSING:
            self._over(None)
        elif self.state is not ClientState.ENDED:
            # Who could not connect for the first time has told its user, and does not come back.
            may_come_back = isinstance(error, PeerLost) or (isinstance(error, ConnectTimeout) and self._hello.resume)
            end: End = "broken" if may_come_back else "lost"
            self._leave(str(error), now_s, now_s + BYE_TIMEOUT_S, end)
            self._tell(error)

    def _over(self, error: RdmaxferError | None) -> None:
        self._move(ClientEvent.OVER)
        self._awaited = self._out = None
        self._resizes.clear()
        self._tell(error)

    def _tell(self, error: RdmaxferError | None) -> None:
        if not self._told:
            self._told = True
            self._handler.ended(error)


def _name(message: Message) -> str:
    return type(message).__name__.upper()
