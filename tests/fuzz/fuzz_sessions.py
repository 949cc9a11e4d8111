"""Whole sessions with a peer that says anything: proper requests and replies, those of another moment, repeats, changed bytes.

An episode is a function of a string of bytes, so that one that failed can be run again, and a fuzzer can vary it.
"""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import fuzz_examples as examples
import fuzz_mutate as mutate
import msgspec
from cm_fakes import RING, Client, Server, make_hello
from fuzz_choices import Choices, Script

from rdmaxfer.cm import messages as m
from rdmaxfer.cm import server_sessions
from rdmaxfer.cm.client_session import ClientSession
from rdmaxfer.cm.server_sessions import ServerSessions
from rdmaxfer.cm.states import REPLIES, ClientState
from rdmaxfer.errors import LocalProtocolError, PeerLost, RdmaxferError, RemoteProtocolError

REMEMBERED = 8
"""Instead of MAX_REMEMBERED: few, so that short episodes reach the limit."""
PAUSES_S = (0.01, 0.3, 1.1, 5.0)
BY_TYPE: dict[type, list[m.Message]] = {
    cls: [message for message in examples.MESSAGES if type(message) is cls] for cls in map(type, examples.MESSAGES)
}
ACCEPT = examples.first_of(m.Accept)
ACCEPT_RECEIVER = msgspec.structs.replace(ACCEPT, role="sender", ring=None)
"""The answer to a receiver."""


class Planned(Exception):
    """What a handler raises because it was told to."""


def sent(message: m.Message, session: bytes, request: int) -> bytes:
    request = max(1, min(request, (1 << 53) - 1))
    return m.encode(msgspec.structs.replace(message, session=session, request=request))


def changed(data: bytes, choose: Choices) -> bytes:
    if choose.one_in(2):
        return mutate.change_bytes(data, choose)
    return mutate.change_message(data, msgspec.msgpack.decode(data[m.PREFIX_BYTES :]), choose)


# --- the bound side ---------------------------------------------------------------------------------------------------


class BoundHandler(Server):
    """Accepts both roles; refuses, fails, answers nonsense or ends the session when it is in the mood for it."""

    def __init__(self) -> None:
        super().__init__()
        self.mood = ""
        self.calls = 0
        self.roles: dict[bytes, m.Role] = {}
        self.sessions: ServerSessions | None = None

    def _moody(self, session: bytes, answer: Any) -> Any:
        self.calls += 1
        match self.mood:
            case "refuse":
                return examples.REFUSALS[self.calls % len(examples.REFUSALS)]
            case "raise":
                raise Planned("\udcff" * (self.calls % 3000))
            case "nonsense":
                return examples.MESSAGES[self.calls % len(examples.MESSAGES)]
            case "end" if self.sessions is not None:
                self.sessions.end(session, "the handler ends it")
        return answer

    def hello(self, hello: m.Hello, peer: str) -> Any:
        answer = ACCEPT if hello.role == "sender" else ACCEPT_RECEIVER
        answer = self._moody(hello.session, answer)
        if not isinstance(answer, m.Refuse):
            self.open.add(hello.session)
            self.roles[hello.session] = hello.role
        return answer

    def ready(self, session: bytes, ready: m.Ready) -> Any:
        return self._moody(session, super().ready(session, ready))

    def resize(self, session: bytes, resize: m.Resize) -> Any:
        ring = RING if self.roles[session] == "sender" else None
        return self._moody(session, m.Resized(session=session, request=1, ring=ring))

    def wanted(self, session: bytes) -> Any:
        return self._moody(session, 4096)

    def gone(self, session: bytes, reason: str, graceful: bool) -> None:
        super().gone(session, reason, graceful)  # a second time, or of one that never was: KeyError
        del self.roles[session], self.gone_ones[:]
        self.ready_ones.discard(session)

    def failed(self, error: Exception) -> None:
        if not isinstance(error, Planned | LocalProtocolError | AttributeError | TypeError):
            raise error


class Peers:
    """Makes the requests of a few peers, most of them such as could come next."""

    NEXT: tuple[tuple[type, ...], ...] = ((m.Hello,), (m.Ready,), (m.Renew, m.Resize, m.Renew, m.Resize, m.Bye))

    def __init__(self, choose: Choices) -> None:
        self.choose = choose
        self.ids = [bytes([1]) * 16]
        self.step: dict[bytes, int] = {}
        self.number: dict[bytes, int] = {}
        self.before: list[bytes] = []

    def request(self) -> bytes:
        choose = self.choose
        if choose.one_in(16):
            self.ids.append((len(self.ids) + 1).to_bytes(16, "big"))
        if self.before and choose.one_in(8):
            return choose.pick(self.before)
        session = m.NO_SESSION if choose.one_in(64) else choose.pick(self.ids[-12:])
        number = self.number.get(session, 0) + 1
        if choose.one_in(4):
            message = choose.pick(examples.MESSAGES)
            number = number + choose.below(5) - 3
        else:
            message = choose.pick(BY_TYPE[choose.pick(self.NEXT[self.step.get(session, 0)])])
        data = sent(message, session, number)
        if choose.one_in(4):
            data = changed(data, choose)
        self.before = [*self.before[-7:], data]
        return data

    def answered(self, reply: m.Message) -> None:
        if not isinstance(reply, m.Refuse):
            self.number[reply.session] = reply.request
            self.step[reply.session] = {m.Accept: 1, m.Gone: 0}.get(type(reply), 2)


def server(data: bytes) -> int:
    """Every request gets a reply that can be read and belongs to it; nothing is raised; what is kept is bounded."""
    choose = Script(data)
    handler = BoundHandler()
    most = 1 + choose.below(6)
    sessions = handler.sessions = ServerSessions(
        handler,
        lease_s=4.0,
        handshake_timeout_s=2.0,
        max_sessions=most,
        handshakes_per_s=choose.pick((math.inf, math.inf, 1.0, 20.0)),
    )
    peers = Peers(choose)
    now_s, steps = 0.0, 0
    with mock.patch.object(server_sessions, "MAX_REMEMBERED", REMEMBERED):
        while not choose.done:
            match choose.below(24):
                case 0:
                    now_s += choose.pick(PAUSES_S)
                    sessions.on_tick(now_s)
                case 1:
                    handler.mood = choose.pick(("", "", "", "refuse", "raise", "nonsense", "end"))
                case 2 if choose.one_in(4):
                    sessions.end(choose.pick(peers.ids), "this side leaves")
                case 3 if choose.one_in(100):
                    sessions.close("all end")
            ask(sessions, handler, peers, now_s)
            steps += 1
            assert sessions.statistics().sessions == len(sessions._sessions) == len(handler.open) <= most
            assert len(sessions._past) <= REMEMBERED
    sessions.close("the end")
    assert not handler.open
    assert not sessions._sessions
    return steps


def ask(sessions: ServerSessions, handler: BoundHandler, peers: Peers, now_s: float) -> None:
    request = peers.request()
    answer = sessions.on_request(request, "192.0.2.1", now_s)
    reply = m.decode(answer)
    asked, key = read(request)
    assert type(reply) in (m.Refuse, REPLIES.get(asked)), f"{asked} was answered by {reply}"
    assert (reply.session, reply.request) == key, "it answers something else"
    peers.answered(reply)
    if type(reply) is not m.Refuse and peers.choose.one_in(4):
        calls = handler.calls
        assert sessions.on_request(request, "192.0.2.1", now_s) == answer, "a repeat got another reply"
        assert handler.calls == calls, "a repeat had a second effect"


def read(request: bytes) -> tuple[Any, tuple[bytes, int]]:
    """The type of a request, if it is one, and what its reply must refer to."""
    try:
        message = m.decode(request)
    except RemoteProtocolError:
        return None, m.peek(request)
    return type(message), (message.session, message.request)  # also of a Refuse number 0, which `peek` does not take


# --- the connecting side ----------------------------------------------------------------------------------------------


class ConnectingHandler(Client):
    def __init__(self, role: m.Role) -> None:
        super().__init__()
        self.role = role
        self.mood = ""
        self.session: ClientSession | None = None

    def _moody(self) -> None:
        assert not self.ends, "told something after the end"
        assert self.session is not None
        match self.mood:
            case "raise":
                raise Planned("as planned")
            case "lose":
                raise PeerLost("as planned")
            case "bye":
                self.session.bye("the handler leaves", 0.0, 1.0)
            case "abort":
                self.session.abort(None)

    def accepted(self, accept: m.Accept) -> m.RingAddress | None:
        self._moody()
        return RING if (self.role == "receiver") != (self.mood == "nonsense") else None

    def started(self) -> None:
        self._moody()

    def resized(self, resized: m.Resized | m.Refuse) -> None:
        self._moody()

    def renewed(self, wanted_bytes: int) -> None:
        self._moody()

    def ended(self, error: RdmaxferError | None) -> None:
        assert not self.ends, "told the end twice"
        super().ended(error)


def client(data: bytes) -> int:
    """No reply makes it raise; the handler learns the end once; it always knows when to go on, and what it asks can be read."""
    choose = Script(data)
    role: m.Role = choose.pick(("sender", "receiver"))
    handler = ConnectingHandler(role)
    hello = msgspec.structs.replace(make_hello(), session=examples.SESSION, role=role)
    session = handler.session = ClientSession(
        handler, hello, endpoint="tcp://x:1", retry_s=0.5, handshake_timeout_s=5.0
    )
    session.start(0.0)
    now_s, steps = 0.0, 0
    asked: m.Message = hello
    while not choose.done:
        out = session.outgoing()
        if out is not None:
            asked = m.decode(out)
            assert type(asked) in REPLIES
            assert asked.session == hello.session
        match choose.below(24):
            case 0:
                now_s += choose.pick(PAUSES_S)
                session.on_tick(now_s)
            case 1:
                handler.mood = choose.pick(("", "", "", "", "raise", "lose", "bye", "abort", "nonsense"))
            case 2 if session.state is ClientState.CONNECTED:
                session.request_resize(4096, RING if role == "receiver" else None, now_s)
            case 3 if choose.one_in(16):
                session.bye("this side leaves", now_s, now_s + 1)
        session.on_reply(reply_to(asked, role, choose), now_s)
        steps += 1
        assert len(session._resizes) <= steps
        check_client(session, handler)
        if session.state is ClientState.ENDED:
            return steps
    handler.mood = ""
    session.bye("the end", now_s, now_s + 1)
    for _ in range(400):  # repeats BYE for a second, up to 12 times in the shortest lease of 0.05 s
        if (due_s := session.next_deadline()) is not None:
            session.on_tick(due_s)
    assert session.state is ClientState.ENDED, "it never ends"
    check_client(session, handler)
    return steps


def check_client(session: ClientSession, handler: ConnectingHandler) -> None:
    over = session.state is ClientState.ENDED
    assert over == (session.next_deadline() is None)
    assert len(handler.ends) <= 1
    if over:
        assert len(handler.ends) == 1
        assert session.outgoing() is None


def reply_to(asked: m.Message, role: m.Role, choose: Choices) -> bytes:
    match choose.below(8):
        case 0:
            message = choose.pick(examples.MESSAGES)
        case 1:
            message = choose.pick(examples.REFUSALS)
        case _:
            message = choose.pick(BY_TYPE[REPLIES[type(asked)]])
            if isinstance(message, m.Accept):
                message = ACCEPT if role == "sender" else ACCEPT_RECEIVER
            elif isinstance(message, m.Resized):
                message = msgspec.structs.replace(message, ring=RING if role == "sender" else None)
    number = asked.request if not choose.one_in(16) else asked.request + choose.below(5) - 3
    session = asked.session if not choose.one_in(32) else m.NO_SESSION
    data = sent(message, session, number)
    return changed(data, choose) if choose.one_in(8) else data
