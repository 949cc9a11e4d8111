"""Both sides of the handshake, joined by a simulated network, with simulated time.

Faults come as runs, a kind and a number of messages, because that is how networks fail: single losses hardly ever hit
twice what has to be hit twice to break a protocol. Whatever happened: once everything has run out, both sides agree,
and every handler was told everything exactly once.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Any

import msgspec
import pytest
from cm_fakes import VERBS
from hypothesis import given, settings
from hypothesis import strategies as st

from rdmaxfer.cm import messages as m
from rdmaxfer.cm.protocol import ClientSession, ClientState, ServerSessions
from rdmaxfer.cm.server_sessions import ENDS_A_TICK
from rdmaxfer.errors import (
    ConnectTimeout,
    FrameTooLarge,
    LocalProtocolError,
    PeerLost,
    RdmaxferError,
    Refused,
    RemoteProtocolError,
)

LEASE_S = 6.0
HANDSHAKE_S = 5.0
RETRY_S = 0.5


def make_ring(epoch: int = 0, slot_bytes: int = 4096) -> m.RingAddress:
    return m.RingAddress(
        address=4096,
        rkey=7,
        slots=4,
        slot_bytes=slot_bytes,
        slot_stride=8192 + slot_bytes,
        payload_offset=8192,
        epoch=epoch,
    )


def make_hello(number: int = 1, role: m.Role = "sender", lease_s: float = LEASE_S) -> m.Hello:
    return m.Hello(
        session=number.to_bytes(16, "big"),
        request=1,
        role=role,
        node=b"n" * 16,
        stream=b"s" * 16,
        attempt=1,
        identity="",
        resume=None,
        fabrics=(VERBS,),
        slots=4,
        slot_bytes=4096,
        max_slot_bytes=1 << 20,
        lease_s=lease_s,
        reconnect_s=30.0,
        name="client",
    )


class Server:
    """A ServerHandler that keeps a diary."""

    def __init__(self) -> None:
        self.diary: list[tuple[str, bytes]] = []
        self.handled: list[tuple[str, bytes, int]] = []
        self.open: set[bytes] = set()
        self.ready_ones: set[bytes] = set()
        self.gone_ones: list[tuple[bytes, bool]] = []
        self.errors: list[Exception] = []
        self.epochs: dict[bytes, int] = {}
        self.refuse: m.RefuseCode | None = None
        self.raises: Exception | None = None

    def _step(self, name: str, message: Any) -> m.Refuse | None:
        self.handled.append((name, message.session, message.request))
        if self.raises is not None:
            raise self.raises
        if self.refuse is not None:
            return m.Refuse(session=m.NO_SESSION, request=0, code=self.refuse, message="no", fix="do", limit=5)
        return None

    def hello(self, hello: m.Hello, peer: str) -> m.Accept | m.Refuse:
        refusal = self._step("hello", hello)
        if refusal is not None:
            return refusal
        self.open.add(hello.session)
        self.epochs[hello.session] = 0
        receiver = hello.role == "sender"
        return m.Accept(
            session=m.NO_SESSION,
            request=1,
            role="receiver" if receiver else "sender",
            node=b"m" * 16,
            start=m.Progress(released=0, received=0),
            fabric=VERBS,
            reason="because",
            path_mtu=1024,
            max_msg_sz=1 << 23,
            slots=4,
            slot_bytes=4096,
            max_slot_bytes=1 << 20,
            lease_s=1.0,
            name="server",
            ring=make_ring() if receiver else None,
        )

    def ready(self, session: bytes, ready: m.Ready) -> m.Started | m.Refuse:
        refusal = self._step("ready", ready)
        if refusal is not None:
            return refusal
        self.ready_ones.add(session)
        return m.Started(session=session, request=1)

    def wanted(self, session: bytes) -> int:
        return 0

    def resize(self, session: bytes, resize: m.Resize) -> m.Resized | m.Refuse:
        refusal = self._step("resize", resize)
        if refusal is not None:
            return refusal
        self.epochs[session] += 1
        ring = make_ring(self.epochs[session], resize.wanted_bytes) if resize.ring is None else None
        return m.Resized(session=session, request=1, ring=ring)

    def gone(self, session: bytes, reason: str, end: m.End) -> None:
        self.gone_ones.append((session, end == "goodbye"))
        self.open.remove(session)  # KeyError if it is told twice

    def failed(self, error: Exception) -> None:
        self.errors.append(error)


class Client:
    """A ClientHandler that keeps a diary."""

    def __init__(self, role: m.Role = "sender") -> None:
        self.role = role
        self.diary: list[str] = []
        self.accept: m.Accept | None = None
        self.answers: list[m.Resized | m.Refuse] = []
        self.ends: list[RdmaxferError | None] = []
        self.raises: Exception | None = None

    def accepted(self, accept: m.Accept) -> m.RingAddress | None:
        self.diary.append("accepted")
        self.accept = accept
        if self.raises is not None:
            raise self.raises
        return make_ring() if self.role == "receiver" else None

    def started(self) -> None:
        self.diary.append("started")

    def resized(self, resized: m.Resized | m.Refuse) -> None:
        self.answers.append(resized)

    def renewed(self, wanted_bytes: int) -> None:
        self.wanted = wanted_bytes

    def ended(self, error: RdmaxferError | None) -> None:
        self.ends.append(error)


def make_server(handler: Server, max_sessions: int = 8) -> ServerSessions:
    return ServerSessions(handler, lease_s=10.0, handshake_timeout_s=HANDSHAKE_S, max_sessions=max_sessions)


def make_client(handler: Client, number: int = 1) -> ClientSession:
    return ClientSession(
        handler,
        make_hello(number, handler.role),
        endpoint="tcp://peer:1",
        retry_s=RETRY_S,
        handshake_timeout_s=HANDSHAKE_S,
    )


class World:
    """One client, one server, the network between them, and the clock."""

    def __init__(self, role: m.Role = "sender") -> None:
        self.now = 0.0
        self.server_handler = Server()
        self.client_handler = Client(role)
        self.server: ServerSessions | None = make_server(self.server_handler)
        self.client = make_client(self.client_handler)
        self.client_crashed = False
        self.faults: list[list[Any]] = []
        self.replies_of: dict[bytes, set[bytes]] = {}
        self._flying: list[tuple[float, int, str, bytes]] = []
        self._order = itertools.count()

    def _launch(self, kind: str, data: bytes) -> None:
        delays = [0.01]
        if self.faults:
            fault = self.faults[0]
            fault[1] -= 1
            if fault[1] <= 0:
                self.faults.pop(0)
            match fault[0]:
                case "outage":
                    delays = []
                case "lose requests":
                    delays = [] if kind == "request" else delays
                case "lose replies":
                    delays = [] if kind == "reply" else delays
                case "duplicate":
                    delays = [0.01, 0.02, 1.7]
                case "delay":
                    delays = [0.3 + 0.9 * (fault[1] % 3)]
                case "long delay":
                    delays = [4.0]
        for delay in delays:
            heapq.heappush(self._flying, (self.now + delay, next(self._order), kind, data))

    def pump(self) -> None:
        if not self.client_crashed and (out := self.client.outgoing()) is not None:
            self._launch("request", out)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            self.pump()
            due = [end]
            if self._flying:
                due.append(self._flying[0][0])
            if self.server is not None and (deadline := self.server.next_deadline()) is not None:
                due.append(deadline)
            if not self.client_crashed and (deadline := self.client.next_deadline()) is not None:
                due.append(deadline)
            self.now = max(self.now, min(due))
            while self._flying and self._flying[0][0] <= self.now:
                _, _, kind, data = heapq.heappop(self._flying)
                if kind == "request" and self.server is not None:
                    self._launch("reply", self.server.on_request(data, "client", self.now))
                elif kind == "reply" and not self.client_crashed:
                    self.client.on_reply(data, self.now)
                self.pump()
            if self.server is not None:
                self.server.on_tick(self.now)
            if not self.client_crashed:
                self.client.on_tick(self.now)
            if self.now >= end:
                self.pump()
                return

    def connect(self) -> None:
        self.client.start(self.now)
        self.run(0.1)
        assert self.client.state is ClientState.CONNECTED

    def check_told_once(self) -> None:
        handled = self.server_handler.handled
        assert len(handled) == len(set(handled))
        assert len(self.client_handler.ends) <= 1
        assert self.client_handler.diary in ([], ["accepted"], ["accepted", "started"])
        gone = [session for session, _ in self.server_handler.gone_ones]
        assert len(gone) == len(set(gone))
        assert not self.server_handler.errors

    def check_agreed(self) -> None:
        self.check_told_once()
        sides = set(self.server_handler.open) if self.server is not None else set()
        if self.client_crashed or self.client.state is ClientState.ENDED:
            assert not sides
            if not self.client_crashed:
                assert len(self.client_handler.ends) == 1
        elif self.client.state is ClientState.CONNECTED:
            assert self.client_handler.ends == []
            assert sides == {self.client.session_id}
            assert sides == self.server_handler.ready_ones
            accept = self.client_handler.accept
            assert accept is not None
            assert accept.lease_s == self.client.lease_s == LEASE_S
        else:
            raise AssertionError(f"half-open: {self.client.state}")


# --- the ordinary course ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_whole_life(role: m.Role) -> None:
    world = World(role)
    world.connect()
    ring = make_ring(1, 8192) if role == "receiver" else None
    world.client.request_resize(8192, ring, world.now)
    world.client.request_resize(16384, make_ring(2, 16384) if ring else None, world.now)
    world.run(5 * LEASE_S)
    world.check_agreed()
    assert world.client.state is ClientState.CONNECTED
    answers = world.client_handler.answers
    rings = [answer.ring for answer in answers if isinstance(answer, m.Resized)]
    assert rings == ([None, None] if ring else [make_ring(1, 8192), make_ring(2, 16384)])
    world.client.bye("done", world.now, world.now + 1.0)
    world.run(0.1)
    world.check_agreed()
    assert world.client_handler.ends == [None]
    assert world.server_handler.gone_ones == [(world.client.session_id, True)]


def test_nobody_answers() -> None:
    world = World()
    world.server = None
    world.client.start(0.0)
    world.run(HANDSHAKE_S + 2)
    (error,) = world.client_handler.ends
    assert isinstance(error, ConnectTimeout)
    assert "tcp://peer:1" in str(error)
    assert "waiting for an answer to HELLO" in str(error)
    assert "firewall" in error.fix
    assert world.client.state is ClientState.ENDED
    assert world.client.next_deadline() is None


def test_a_refused_hello_ends_it_and_is_not_asked_twice() -> None:
    world = World()
    world.server_handler.refuse = m.RefuseCode.FABRIC
    world.faults = [["lose replies", 3]]
    world.client.start(0.0)
    world.run(4)
    (error,) = world.client_handler.ends
    assert isinstance(error, Refused)
    assert (error.code, error.fix) == ("fabric", "do")
    assert len(world.server_handler.handled) == 1
    assert not world.server_handler.gone_ones


def test_a_refused_ready_ends_it_on_both_sides() -> None:
    world = World()
    world.client.start(0.0)
    world.pump()
    world.run(0.015)
    world.server_handler.refuse = m.RefuseCode.INTERNAL
    world.run(1)
    assert isinstance(world.client_handler.ends[0], Refused)
    world.check_agreed()
    assert world.server_handler.gone_ones == [(world.client.session_id, False)]


def test_a_refused_resize_changes_nothing() -> None:
    world = World()
    world.connect()
    world.server_handler.refuse = m.RefuseCode.FRAME_TOO_LARGE
    world.client.request_resize(1 << 30, None, world.now)
    world.run(2 * LEASE_S)
    (answer,) = world.client_handler.answers
    assert isinstance(answer, m.Refuse)
    assert answer.limit == 5
    assert world.client.state is ClientState.CONNECTED
    world.check_agreed()


def test_an_error_of_the_clients_handler_is_its_end_and_the_peer_hears_of_it() -> None:
    world = World()
    world.client_handler.raises = FrameTooLarge("x")
    world.client.start(0.0)
    world.run(0.5)
    assert world.client_handler.ends == [world.client_handler.raises]
    world.check_agreed()
    other = World()
    other.client_handler.raises = KeyError("bug")
    other.client.start(0.0)
    other.run(0.5)
    (error,) = other.client_handler.ends
    assert isinstance(error, LocalProtocolError)
    assert error.__cause__ is other.client_handler.raises


def test_a_restarted_server_is_noticed_at_the_next_renewal() -> None:
    world = World()
    world.connect()
    world.server_handler = Server()
    world.server = make_server(world.server_handler)
    world.run(LEASE_S / 3 + 0.5)
    assert isinstance(world.client_handler.ends[0], PeerLost)
    assert world.client.state is ClientState.ENDED


def test_what_the_server_ends_stays_ended() -> None:
    world = World()
    world.connect()
    assert world.server is not None
    session = world.client.session_id
    assert world.server.end(session, "enough")
    assert not world.server.end(session, "enough")
    again = m.decode(world.server.on_request(m.encode(make_hello(1)), "", world.now))
    assert isinstance(again, m.Refuse)
    assert again.code is m.RefuseCode.CLOSING
    world.run(LEASE_S)
    assert isinstance(world.client_handler.ends[0], PeerLost)
    world.check_agreed()


def test_a_closed_server_refuses() -> None:
    world = World()
    world.connect()
    assert world.server is not None
    world.server.close("going home")
    world.server.close("going home")
    assert world.server_handler.gone_ones == [(world.client.session_id, True)]
    reply = m.decode(world.server.on_request(m.encode(make_hello(2)), "", world.now))
    assert isinstance(reply, m.Refuse)
    assert (reply.code, reply.message) == (m.RefuseCode.CLOSING, "going home")


# --- a server and one request -------------------------------------------------------------------------------------


def refusal(server: ServerSessions, data: bytes) -> m.Refuse:
    reply = m.decode(server.on_request(data, "peer", 0.0))
    assert isinstance(reply, m.Refuse)
    return reply


def test_garbage_is_refused_and_counted() -> None:
    server = make_server(Server())
    answer = m.encode(m.Gone(session=bytes(16), request=1))
    for data in (b"", b"GET / HTTP/1.1", bytes(70000), b"RDMAXFR\x01\xc1", answer):
        assert refusal(server, data).code is m.RefuseCode.MALFORMED
    assert server.statistics().malformed == 5
    wrong = b"RDMAXFR\x07" + m.encode(make_hello())[8:]
    reply = refusal(server, wrong)
    assert (reply.code, reply.limit) == (m.RefuseCode.VERSION, m.PROTOCOL_VERSION)
    assert (reply.session, reply.request) == (make_hello().session, 1)


def test_old_and_changed_requests_have_no_effect() -> None:
    handler = Server()
    server = make_server(handler)
    hello = make_hello()
    first = server.on_request(m.encode(hello), "", 0.0)
    assert server.on_request(m.encode(hello), "", 0.0) == first
    ready = m.Ready(session=hello.session, request=2, ring=None)
    started = server.on_request(m.encode(ready), "", 0.0)
    assert isinstance(m.decode(started), m.Started)
    assert server.on_request(m.encode(ready), "", 0.0) == started
    for wrong in (
        hello,
        msgspec.structs.replace(ready, ring=make_ring()),
        m.Bye(session=hello.session, request=2, end="goodbye", reason="x"),
        msgspec.structs.replace(ready, request=3),
        msgspec.structs.replace(hello, request=3),
        m.Resize(session=hello.session, request=3, wanted_bytes=5, ring=make_ring()),
    ):
        assert refusal(server, m.encode(wrong)).code is m.RefuseCode.MALFORMED
    assert [name for name, _, _ in handler.handled] == ["hello", "ready"]
    assert handler.open == {hello.session}
    statistics = server.statistics()
    assert (statistics.sessions, statistics.handshakes, statistics.repeated) == (1, 1, 2)


def test_the_number_of_sessions_is_limited() -> None:
    server = make_server(Server(), max_sessions=1)
    server.on_request(m.encode(make_hello(1)), "", 0.0)
    reply = refusal(server, m.encode(make_hello(2)))
    assert (reply.code, reply.limit) == (m.RefuseCode.LIMIT, 1)
    server.on_tick(HANDSHAKE_S)
    assert isinstance(m.decode(server.on_request(m.encode(make_hello(2)), "", HANDSHAKE_S)), m.Accept)


def limited(handler: Server, handshakes_per_s: float) -> ServerSessions:
    return ServerSessions(
        handler, lease_s=10.0, handshake_timeout_s=HANDSHAKE_S, max_sessions=1000, handshakes_per_s=handshakes_per_s
    )


def test_handshakes_a_second_are_limited_and_nothing_is_kept_of_those_put_off() -> None:
    handler = Server()
    server = limited(handler, 10.0)
    hellos = [m.encode(make_hello(number)) for number in range(1, 101)]
    first = [m.decode(server.on_request(data, "", 5.0)) for data in hellos]
    assert [isinstance(reply, m.Accept) for reply in first] == [True] * 10 + [False] * 90
    assert {reply.code for reply in first if isinstance(reply, m.Refuse)} == {m.RefuseCode.BUSY}
    assert len(handler.open) == 10
    assert isinstance(m.decode(server.on_request(hellos[0], "", 5.0)), m.Accept), "a repeat costs nothing"
    again = [m.decode(server.on_request(data, "", 5.5)) for data in hellos[10:]]
    assert [isinstance(reply, m.Accept) for reply in again] == [True] * 5 + [False] * 85
    late = [m.decode(server.on_request(data, "", 1000.0)) for data in hellos[15:]]
    assert sum(isinstance(reply, m.Accept) for reply in late) == 10, "no more than a second's worth is saved up"
    assert server.statistics().refused == {"busy": 90 + 85 + 75}


def test_a_client_that_is_put_off_comes_again_by_itself() -> None:
    world = World()
    world.server = limited(world.server_handler, 1.0)
    assert isinstance(m.decode(world.server.on_request(m.encode(make_hello(77)), "", 0.0)), m.Accept)
    world.client.start(world.now)
    world.run(0.1)
    assert world.client.state is ClientState.HELLO_SENT
    world.run(RETRY_S + 1.1)
    assert world.client.state is ClientState.CONNECTED
    assert not world.client_handler.ends


def test_a_client_that_is_put_off_for_ever_says_why() -> None:
    world = World()
    world.server = limited(world.server_handler, 0.0)
    world.client.start(world.now)
    world.run(HANDSHAKE_S + 5)
    (error,) = world.client_handler.ends
    assert isinstance(error, ConnectTimeout)
    assert "it was busy: more than 0 sides a second want to connect here." in str(error)


@pytest.mark.parametrize("step", ["hello", "ready", "resize"])
def test_a_handlers_exception_is_refused_and_reported(step: str) -> None:
    handler = Server()
    server = make_server(handler)
    requests: dict[str, m.Message] = {
        "hello": make_hello(),
        "ready": m.Ready(session=make_hello().session, request=2, ring=None),
        "resize": m.Resize(session=make_hello().session, request=3, wanted_bytes=5, ring=None),
    }
    for name, message in requests.items():
        if name == step:
            handler.raises = KeyError("\udcff")
            assert refusal(server, m.encode(message)).code is m.RefuseCode.INTERNAL
            break
        server.on_request(m.encode(message), "", 0.0)
    assert handler.errors == [handler.raises]
    assert not handler.open
    assert len(handler.gone_ones) == (0 if step == "hello" else 1)
    handler.raises = None
    assert isinstance(m.decode(server.on_request(m.encode(make_hello(2)), "", 0.0)), m.Accept)


def test_a_handler_may_end_its_own_session() -> None:
    handler = Server()
    server = make_server(handler)
    hello = make_hello()
    server.on_request(m.encode(hello), "", 0.0)
    original = handler.ready

    def ready(session: bytes, message: m.Ready) -> m.Started | m.Refuse:
        server.end(session, "changed my mind")
        return original(session, message)

    handler.ready = ready  # type: ignore[method-assign,assignment]
    reply = refusal(server, m.encode(m.Ready(session=hello.session, request=2, ring=None)))
    assert reply.code is m.RefuseCode.CLOSING
    assert handler.gone_ones == [(hello.session, True)]
    assert not handler.errors


# --- a client and one reply ---------------------------------------------------------------------------------------


def test_a_garbage_reply_ends_the_session() -> None:
    for reply in (b"World", m.encode(m.Started(session=make_hello().session, request=1))):
        handler = Client()
        client = make_client(handler)
        client.start(0.0)
        client.outgoing()
        client.on_reply(reply, 0.0)
        assert isinstance(handler.ends[0], RemoteProtocolError)
        assert "tcp://peer:1" in str(handler.ends[0])
        bye = client.outgoing()
        assert bye is not None
        assert isinstance(m.decode(bye), m.Bye)
        client.on_tick(100.0)
        assert client.state is ClientState.ENDED
        assert len(handler.ends) == 1


def test_the_lease_counts_from_when_the_answered_request_was_sent() -> None:
    world = World()
    world.connect()
    assert world.server is not None
    client, sent_s = world.client, world.now + LEASE_S / 3
    client.on_tick(sent_s)
    renew = client.outgoing()
    assert renew is not None
    reply = world.server.on_request(renew, "", sent_s)
    client.on_reply(reply, sent_s + 3.0)
    client.on_tick(sent_s + LEASE_S - 0.01)
    assert client.state is ClientState.CONNECTED
    client.on_tick(sent_s + LEASE_S)
    assert isinstance(world.client_handler.ends[0], PeerLost)


class HeldUp:
    """Both sides of a connection, and what they do after a time in which neither could look."""

    def __init__(self) -> None:
        self.world = World()
        self.world.connect()
        assert self.world.server is not None
        self.server, self.client = self.world.server, self.world.client

    def look(self, now_s: float, *, late: bool) -> None:
        for side in (self.server, self.client):
            if late:
                side.on_late(now_s)
            side.on_tick(now_s)

    def check_connected(self) -> None:
        assert self.client.state is ClientState.CONNECTED
        assert self.world.client_handler.ends == []
        assert self.world.server_handler.open


def test_who_was_held_up_asks_once_more_before_a_peer_is_dead() -> None:
    sides = HeldUp()
    now_s = sides.world.now + 100 * LEASE_S
    sides.look(now_s, late=True)
    renew = sides.client.outgoing()
    assert renew is not None, "it is asked at once"
    sides.client.on_reply(sides.server.on_request(renew, "", now_s + 0.01), now_s + 0.02)
    sides.look(now_s + 0.9 * LEASE_S, late=False)
    sides.check_connected()


def test_who_was_held_up_before_the_answer_came_repeats_the_question() -> None:
    sides = HeldUp()
    asked_s = sides.world.now + LEASE_S / 3
    sides.client.on_tick(asked_s)
    renew = sides.client.outgoing()
    assert renew is not None
    answer = sides.server.on_request(renew, "", asked_s)
    now_s = asked_s + 100 * LEASE_S
    sides.look(now_s, late=True)
    assert sides.client.outgoing() == renew, "it is repeated at once"
    sides.client.on_reply(answer, now_s + 0.1)  # the one to the first question, which had been on its way
    sides.look(now_s + 0.3, late=False)
    sides.check_connected()


def test_who_is_held_up_again_and_again_finds_a_dead_peer_nevertheless() -> None:
    sides = HeldUp()
    now_s = sides.world.now + 2 * LEASE_S
    for part in (0.0, 0.3, 0.6):
        sides.look(now_s + part * LEASE_S, late=True)
        sides.check_connected()
    sides.look(now_s + 0.7 * LEASE_S, late=True)
    assert isinstance(sides.world.client_handler.ends[0], PeerLost)
    assert sides.world.server_handler.open, "the connecting side is the first"
    sides.look(now_s + LEASE_S, late=True)
    assert not sides.world.server_handler.open


def test_who_is_late_does_not_shorten_a_lease() -> None:
    sides = HeldUp()
    for side in (sides.server, sides.client):
        side.on_late(sides.world.now)
    sides.look(sides.world.now + 0.9 * LEASE_S, late=False)
    sides.check_connected()


def test_a_peer_that_is_far_away_is_given_the_time_that_it_took_before() -> None:
    world = World()
    world.client.start(world.now)
    hello = world.client.outgoing()
    assert hello is not None
    assert world.server is not None
    answer = world.server.on_request(hello, "", world.now)
    took_s = RETRY_S * 0.9
    world.client.on_reply(answer, world.now + took_s)
    assert world.client.outgoing() is not None, "READY"
    world.client.on_tick(world.now + took_s + 1.9 * took_s)
    assert world.client.outgoing() is None, "READY is not asked again before it can be answered"
    world.client.on_tick(world.now + took_s + 2.1 * took_s)
    assert world.client.outgoing() is not None


def test_who_is_connected_is_told_from_all_others() -> None:
    world = World()
    assert world.server is not None
    assert not world.server.is_started(m.encode(make_hello(1)))
    world.connect()
    started = m.encode(m.Renew(session=make_hello(1).session, request=9))
    assert world.server.is_started(started)
    for other in (
        m.encode(make_hello(2)),
        m.encode(m.Renew(session=make_hello(2).session, request=9)),
        b"",
        b"rubbish",
    ):
        assert not world.server.is_started(other)


def test_many_that_are_late_are_ended_a_few_at_a_time() -> None:
    handler = Server()
    server = make_server(handler, max_sessions=100)
    for number in range(1, 51):
        server.on_request(m.encode(make_hello(number)), "", 0.0)
    server.on_tick(HANDSHAKE_S)
    assert len(handler.open) == 50 - ENDS_A_TICK
    deadline_s = server.next_deadline()
    assert deadline_s is not None
    assert deadline_s <= HANDSHAKE_S, "the others are due at once"
    for _ in range(50):
        server.on_tick(HANDSHAKE_S)
    assert not handler.open
    assert server.statistics().expired == 50


def test_late_replies_are_ignored() -> None:
    handler = Client()
    client = make_client(handler)
    client.start(0.0)
    for session, request in ((make_hello(2).session, 1), (make_hello().session, 7)):
        client.on_reply(m.encode(m.Renewed(session=session, request=request, wanted_bytes=0)), 0.0)
    assert client.ignored == 2
    assert client.state is ClientState.HELLO_SENT
    assert handler.ends == []


def test_calls_out_of_order_are_errors() -> None:
    client = make_client(Client())
    with pytest.raises(LocalProtocolError):
        client.request_resize(1, None, 0.0)
    client.start(0.0)
    with pytest.raises(LocalProtocolError):
        client.start(0.0)
    world = World()
    world.connect()
    with pytest.raises(LocalProtocolError):
        world.client.request_resize(1, make_ring(), 0.0)
    with pytest.raises(LocalProtocolError):
        world.client.request_resize(0, None, 0.0)
    assert world.client.state is ClientState.CONNECTED


# --- faults -------------------------------------------------------------------------------------------------------

KINDS = ["none", "outage", "lose requests", "lose replies", "duplicate", "delay", "long delay"]
faults = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 14)), max_size=6)
ACTIONS = ["run", "run", "run", "resize", "bye", "server end", "server restart", "server crash", "client crash"]
actions = st.lists(st.tuples(st.sampled_from(ACTIONS), st.floats(0.0, 2 * LEASE_S)), max_size=6)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(["sender", "receiver"]), faults, actions)
def test_both_sides_agree_in_the_end(
    role: m.Role, runs: list[tuple[str, int]], script: list[tuple[str, float]]
) -> None:
    world = World(role)
    world.faults = [[kind, length] for kind, length in runs]
    world.client.start(0.0)
    epoch = 0
    for action, seconds in script:
        match action:
            case "resize" if world.client.state is ClientState.CONNECTED:
                epoch += 1
                ring = make_ring(epoch) if role == "receiver" else None
                world.client.request_resize(4096, ring, world.now)
            case "bye":
                world.client.bye("enough", world.now, world.now + 1.0)
            case "server end" if world.server is not None:
                world.server.end(world.client.session_id, "enough")
            case "server restart" if world.server is not None:
                world.check_told_once()
                world.server_handler = Server()
                world.server = make_server(world.server_handler)
            case "server crash":
                world.server = None
            case "client crash":
                world.client_crashed = True
            case _:
                pass
        world.run(seconds)
        world.check_told_once()
    # The network is well again; whatever still hangs runs out.
    world.faults.clear()
    world.run(2 * LEASE_S + 2 * HANDSHAKE_S)
    world.check_agreed()


@settings(max_examples=300, deadline=None)
@given(faults, st.floats(0.0, 3 * LEASE_S))
def test_the_connecting_side_gives_up_first(runs: list[tuple[str, int]], until: float) -> None:
    # A bound side may believe for a while in a connection that has ended; a connecting side never does.
    world = World()
    world.connect()
    world.faults = [[kind, length] for kind, length in runs if kind not in ("delay", "long delay", "duplicate")]
    while world.now < until and world.server_handler.open:
        world.run(0.1)
    if not world.server_handler.open:
        assert world.client.state in (ClientState.CLOSING, ClientState.ENDED)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=64) | st.integers(0, 11), max_size=30))
def test_no_sequence_of_requests_upsets_a_server(requests: list[bytes | int]) -> None:
    handler = Server()
    server = make_server(handler, max_sessions=2)
    session = make_hello().session
    pool: list[m.Message] = [make_hello(1), make_hello(2), make_hello(3, "receiver")]
    pool += [m.Ready(session=session, request=number, ring=None) for number in (1, 2, 3)]
    pool += [m.Renew(session=session, request=number) for number in (3, 4)]
    pool += [m.Resize(session=session, request=5, wanted_bytes=9, ring=None)]
    pool += [m.Bye(session=session, request=6, end="goodbye", reason="")]
    pool += [m.Started(session=session, request=1), m.Renew(session=make_hello(2).session, request=2)]
    for now, request in enumerate(requests):
        data = request if isinstance(request, bytes) else m.encode(pool[request])
        m.decode(server.on_request(data, "", now / 10))
        server.on_tick(now / 10)
        assert len(handler.handled) == len(set(handler.handled))
    server.close("end")
    assert not handler.open
    assert not handler.errors
