"""The bound side of the handshake: all sessions of one endpoint. Pure: bytes and times in, bytes out.

Every request gets a reply, whatever it is. A request has effect once: its reply is kept and given again to a repeat.
The handler is called from within these methods, and may call `end` and `close` itself.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from rdmaxfer.cm.messages import (
    MAX_TEXT_CHARS,
    NO_SESSION,
    PROTOCOL_VERSION,
    Accept,
    Bye,
    End,
    Gone,
    Hello,
    Message,
    Ready,
    Refuse,
    RefuseCode,
    Renewed,
    Resize,
    Resized,
    Started,
    WrongVersion,
    decode,
    encode,
    peek,
)
from rdmaxfer.cm.states import REPLIES, SERVER, ServerState
from rdmaxfer.errors import LocalProtocolError, RdmaxferError, RemoteProtocolError

MAX_REMEMBERED = 1024
"""Ended sessions whose ids, and last replies, are kept."""
ENDS_A_TICK = 4
"""Taking down queue pairs and rings takes time, in which nobody is answered."""


class ServerHandler(Protocol):
    """What the bound side does at each step. Session ids and request numbers of what it returns are filled in.

    An exception from any of the first four refuses the request as `internal`, ends the session and goes to `failed`.
    """

    def hello(self, hello: Hello, peer: str) -> Accept | Refuse:
        """`peer` is the network address the request came from, or "" where it is not known."""

    def ready(self, session: bytes, ready: Ready) -> Started | Refuse:
        """A Refuse ends the session."""

    def resize(self, session: bytes, resize: Resize) -> Resized | Refuse:
        """A Refuse leaves the session as it is."""

    def wanted(self, session: bytes) -> int:
        """Slot bytes that a sender here waits for, to be told to the receiver; 0 for none."""

    def gone(self, session: bytes, reason: str, end: End) -> None:
        """Called exactly once for every session that `hello` accepted. `end`: "goodbye" if one of the sides said that it leaves,
        "broken" if the peer may come back, "lost" if it will not."""

    def failed(self, error: Exception) -> None:
        """This handler raised `error`. What `failed` itself raises goes to the caller of the method."""


class ServerStatistics(NamedTuple):
    """Counts since the beginning, but `sessions`: those there are now."""

    sessions: int
    handshakes: int
    repeated: int
    malformed: int
    expired: int
    refused: dict[str, int]
    """By `RefuseCode` value."""


@dataclass(slots=True)
class _Session:
    id: bytes
    hello: Hello
    lease_s: float
    deadline_s: float
    spared: bool = False
    """Whether `on_late` has let it live, and it was not heard of since."""
    state: ServerState = ServerState.NEW
    request: int = 0
    digest: bytes = b""
    reply: bytes = b""


class _Past(NamedTuple):
    digest: bytes
    reply: bytes
    """The last reply, or b"" if it is no longer true."""
    code: RefuseCode
    text: str


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class ServerSessions:
    """See the module. Times are seconds of any monotonic clock. `lease_s` is the longest lease granted. A second's worth of
    `handshakes_per_s` may come at once."""

    def __init__(
        self,
        handler: ServerHandler,
        *,
        lease_s: float,
        handshake_timeout_s: float,
        max_sessions: int,
        handshakes_per_s: float = math.inf,
    ) -> None:
        self._handler = handler
        self._lease_s = lease_s
        self._handshake_timeout_s = handshake_timeout_s
        self._max_sessions = max_sessions
        self._handshakes_per_s = handshakes_per_s
        self._allowance = handshakes_per_s
        self._counted_s: float | None = None
        self._sessions: dict[bytes, _Session] = {}
        self._past: OrderedDict[bytes, _Past] = OrderedDict()
        self._closed: str | None = None
        self._handshakes = 0
        self._repeated = 0
        self._expired = 0
        self._refused: Counter[str] = Counter()
        self._refused_in_all = 0

    def __repr__(self) -> str:
        return f"<ServerSessions sessions={len(self._sessions)} handshakes={self._handshakes}>"

    # --- what happens ---------------------------------------------------------------------------------------------

    def on_request(self, data: bytes, peer: str, now_s: float) -> bytes:
        """Take a request, return the reply to send. Never raises for what a peer did."""
        try:
            message = decode(data)
        except WrongVersion as error:
            return self._refuse(
                peek(data), RefuseCode.VERSION, error.message_for_peer, fix=error.fix, limit=PROTOCOL_VERSION
            )
        except RemoteProtocolError as error:
            return self._refuse(peek(data), RefuseCode.MALFORMED, f"this was received, and is no request: {error}")
        key = (message.session, message.request)
        if type(message) not in REPLIES:
            return self._refuse(key, RefuseCode.MALFORMED, f"{_name(message)} is no request")
        if self._closed is not None:
            return self._refuse(key, RefuseCode.CLOSING, self._closed)
        if (session := self._sessions.get(message.session)) is not None:
            return self._on_known(session, message, data, now_s)
        if (past := self._past.get(message.session)) is not None:
            if past.reply and past.digest == _digest(data):
                self._repeated += 1
                return past.reply
            return self._refuse(key, past.code, past.text)
        if isinstance(message, Hello):
            return self._on_hello(message, data, peer, now_s)
        return self._refuse(
            key,
            RefuseCode.UNKNOWN_SESSION,
            "no such session here: it ended, or this side was restarted.",
            fix="connect again.",
        )

    def is_started(self, data: bytes) -> bool:
        """Whether a request is of a connected peer. (Not that it is valid.)"""
        session = self._sessions.get(peek(data)[0])
        return session is not None and session.state is ServerState.STARTED

    def on_tick(self, now_s: float) -> None:
        """Time has passed: end sessions that were not heard of, a few at a time. Call it at `next_deadline`, or more often."""
        late = (session for session in self._sessions.values() if session.deadline_s <= now_s)
        for session in list(itertools.islice(late, ENDS_A_TICK)):
            self._expired += 1
            if session.state is ServerState.STARTED:
                text = f"nothing was heard of the peer for {session.lease_s:g} s"
            else:
                text = f"the peer was accepted, but was not ready within {self._handshake_timeout_s:g} s"
            self._end(session, text, "broken")

    def on_late(self, now_s: float) -> None:
        """This side was held up, and maybe all of its machine, with the peers on it: they get another lease to be heard of."""
        for session in self._sessions.values():
            if session.state is ServerState.STARTED and not session.spared and session.deadline_s <= now_s:
                session.spared = True
                session.deadline_s = now_s + session.lease_s

    def next_deadline(self) -> float | None:
        """When `on_tick` has something to do; None if there is nothing to wait for."""
        return min((session.deadline_s for session in self._sessions.values()), default=None)

    def end(self, session_id: bytes, reason: str, code: RefuseCode = RefuseCode.CLOSING) -> bool:
        """This side leaves a session; `code` says so to a peer that still asks. False if there is no such one, or it had ended."""
        session = self._sessions.get(session_id)
        if session is None:
            return False
        self._end(session, reason, "goodbye", code=code)
        return True

    def close(self, reason: str) -> None:
        """This side leaves all sessions, and refuses whatever comes from now on."""
        self._closed = self._closed or _short(reason)
        for session in list(self._sessions.values()):
            if session.state is not ServerState.ENDED:
                self._end(session, reason, "goodbye", code=RefuseCode.CLOSING)

    @property
    def refused(self) -> int:
        """Refusals so far; may be read by any thread."""
        return self._refused_in_all

    @property
    def expired(self) -> int:
        """Sessions that ended because the peer was silent; may be read by any thread."""
        return self._expired

    def statistics(self) -> ServerStatistics:
        return ServerStatistics(
            sessions=len(self._sessions),
            handshakes=self._handshakes,
            repeated=self._repeated,
            malformed=self._refused[RefuseCode.MALFORMED.value],
            expired=self._expired,
            refused=dict(self._refused),
        )

    # --- requests -------------------------------------------------------------------------------------------------

    def _on_hello(self, hello: Hello, data: bytes, peer: str, now_s: float) -> bytes:
        key = (hello.session, hello.request)
        if hello.session == NO_SESSION:
            return self._refuse(key, RefuseCode.MALFORMED, "a session id is 16 random bytes, not zeros")
        if len(self._sessions) >= self._max_sessions:
            # Not remembered: it cost nothing, and a repeat may find room.
            return self._refuse(
                key,
                RefuseCode.LIMIT,
                f"there are {len(self._sessions)} connections already, which is the most this side takes.",
                fix="close another connection, or raise max_peers at the side that is bound.",
                limit=self._max_sessions,
            )
        if not self._within_rate(now_s):
            return self._refuse(
                key,
                RefuseCode.BUSY,
                f"more than {self._handshakes_per_s:g} sides a second want to connect here.",
                fix="repeat the same request a little later.",
            )
        try:
            reply = self._handler.hello(hello, peer)
            if isinstance(reply, Refuse):
                return self._remember_refusal(hello, data, self._send_refusal(key, reply))
        except Exception as error:
            self._handler.failed(error)
            return self._remember_refusal(hello, data, self._internal(key, error))
        lease_s = min(self._lease_s, hello.lease_s)
        session = _Session(hello.session, hello, lease_s, now_s + self._handshake_timeout_s)
        self._sessions[session.id] = session
        if self._closed is not None:  # by the handler itself
            self._end(session, self._closed, "goodbye", code=RefuseCode.CLOSING)
            return self._refuse(key, RefuseCode.CLOSING, self._closed)
        try:
            if reply.role == hello.role:
                raise LocalProtocolError(f"a {hello.role} was accepted by a {reply.role}")
            return self._done(session, hello, data, msgspec.structs.replace(reply, lease_s=lease_s))
        except Exception as error:
            return self._crashed(session, key, error)

    def _within_rate(self, now_s: float) -> bool:
        rate = self._handshakes_per_s
        if math.isinf(rate):
            return True
        if self._counted_s is not None:
            self._allowance = min(max(rate, 1.0), self._allowance + (now_s - self._counted_s) * rate)
        self._counted_s = now_s
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    def _on_known(self, session: _Session, message: Message, data: bytes, now_s: float) -> bytes:
        key = (message.session, message.request)
        if message.request == session.request and _digest(data) == session.digest:
            self._repeated += 1
            self._heard(session, now_s)
            return session.reply
        if message.request <= session.request:
            text = f"request {message.request} is not above {session.request}, the last one, and no repeat of it"
            return self._refuse(key, RefuseCode.MALFORMED, text)
        if type(message) not in SERVER[session.state]:
            text = f"{_name(message)} has no place in a session that is {session.state.value}"
            return self._refuse(key, RefuseCode.MALFORMED, text)
        if isinstance(message, Ready | Resize) and (message.ring is None) != (session.hello.role == "sender"):
            text = f"{_name(message)} of a {session.hello.role} {'lacks its' if message.ring is None else 'has a'} ring"
            return self._refuse(key, RefuseCode.MALFORMED, text)
        self._heard(session, now_s)
        try:
            return self._effect(session, message, data, now_s)
        except Exception as error:
            return self._crashed(session, key, error)

    def _effect(self, session: _Session, message: Message, data: bytes, now_s: float) -> bytes:
        key = (message.session, message.request)
        reply: Message
        match message:
            case Ready():
                reply = self._handler.ready(session.id, message)
            case Resize():
                reply = self._handler.resize(session.id, message)
                if isinstance(reply, Resized) and (reply.ring is None) != (session.hello.role == "receiver"):
                    raise LocalProtocolError(f"a wrong RESIZED was to be sent to a {session.hello.role}: {reply}")
            case Bye():
                gone = encode(Gone(session=session.id, request=message.request))
                session.digest = _digest(data)
                word = "said goodbye" if message.end == "goodbye" else "ended it"
                self._end(session, f"the peer {word}: {message.reason}", message.end, reply=gone)
                return gone
            case _:
                wanted_bytes = self._handler.wanted(session.id)
                reply = Renewed(session=session.id, request=message.request, wanted_bytes=wanted_bytes)
        past = self._past.get(session.id)
        if past is not None:  # the handler itself ended the session meanwhile
            return self._refuse(key, past.code, past.text)
        if isinstance(reply, Refuse) and isinstance(message, Ready):
            refusal = self._send_refusal(key, reply)
            session.digest = _digest(data)
            self._end(session, f"it was refused: {reply.message}", "lost", reply=refusal)
            return refusal
        sent = self._done(session, message, data, reply)
        if isinstance(message, Ready):
            self._handshakes += 1
            session.deadline_s = now_s + session.lease_s
        return sent

    def _heard(self, session: _Session, now_s: float) -> None:
        if session.state is ServerState.STARTED:
            session.deadline_s = now_s + session.lease_s
            session.spared = False

    def _done(self, session: _Session, message: Message, data: bytes, reply: Message) -> bytes:
        """A request had its effect: note it, return the reply."""
        if not isinstance(reply, Refuse | REPLIES[type(message)]):
            raise LocalProtocolError(f"{_name(message)} was to be answered by {reply!r}")
        if isinstance(reply, Refuse):
            sent = self._send_refusal((session.id, message.request), reply)
        else:
            sent = encode(msgspec.structs.replace(reply, session=session.id, request=message.request))
        session.state = SERVER[session.state][type(message)]
        session.request = message.request
        session.digest = _digest(data)
        session.reply = sent
        return sent

    # --- ends -----------------------------------------------------------------------------------------------------

    def _crashed(self, session: _Session, key: tuple[bytes, int], error: Exception) -> bytes:
        if session.id in self._sessions:
            self._end(session, f"an internal error: {error!r}", "lost")
        self._handler.failed(error)
        return self._internal(key, error)

    def _end(
        self,
        session: _Session,
        text: str,
        end: End,
        *,
        code: RefuseCode = RefuseCode.UNKNOWN_SESSION,
        reply: bytes = b"",
    ) -> None:
        # First everything of our own, then the handler: it may call back, or raise.
        del self._sessions[session.id]
        session.state = ServerState.ENDED
        self._remember(session.id, _Past(session.digest, reply, code, _short(f"this session has ended: {text}")))
        try:
            self._handler.gone(session.id, text, end)
        except Exception as error:
            self._handler.failed(error)

    def _remember(self, session_id: bytes, past: _Past) -> None:
        self._past[session_id] = past
        while len(self._past) > MAX_REMEMBERED:
            self._past.popitem(last=False)

    def _remember_refusal(self, hello: Hello, data: bytes, refusal: bytes) -> bytes:
        past = _Past(_digest(data), refusal, RefuseCode.UNKNOWN_SESSION, "this session was refused")
        self._remember(hello.session, past)
        return refusal

    # --- refusals -------------------------------------------------------------------------------------------------

    def _refuse(self, key: tuple[bytes, int], code: RefuseCode, text: str, *, fix: str = "", limit: int = 0) -> bytes:
        return self._send_refusal(
            key, Refuse(session=key[0], request=key[1], code=code, message=text, fix=fix, limit=limit)
        )

    def _internal(self, key: tuple[bytes, int], error: Exception) -> bytes:
        # Our own errors are written for users; what others say may be anything.
        text = str(error) if isinstance(error, RdmaxferError) else "the peer met an internal error; see its log"
        return self._refuse(key, RefuseCode.INTERNAL, text)

    def _send_refusal(self, key: tuple[bytes, int], refuse: Refuse) -> bytes:
        self._refused[refuse.code.value] += 1
        self._refused_in_all += 1
        return encode(
            msgspec.structs.replace(
                refuse, session=key[0], request=key[1], message=_short(refuse.message), fix=_short(refuse.fix)
            )
        )


def _name(message: Message) -> str:
    return type(message).__name__.upper()


def _short(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # a path in an error can hold what is no Unicode
    return text if len(text) <= MAX_TEXT_CHARS else text[: MAX_TEXT_CHARS - 1] + "…"
