"""The control thread with real ZeroMQ sockets on the loopback interface. No sleeps: conditions with deadlines."""

from __future__ import annotations

import gc
import os
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
import zmq
from cm_fakes import ANY_PORT, PATIENCE_MS, PATIENCE_S, Client, Server, make_hello, wait_until

from rdmaxfer.cm import messages as m
from rdmaxfer.cm.control import Connection, Control
from rdmaxfer.errors import (
    ClosedError,
    ConnectTimeout,
    EndpointError,
    ForkedError,
    LocalProtocolError,
    PeerLost,
    RdmaxferError,
    Refused,
    RemoteProtocolError,
    TimeoutExpired,
)


def ask(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, parts: list[bytes]) -> bytes:
    """The reply to a request, which is repeated: a REP socket can lose replies after it was sent rubbish."""
    for _ in range(int(PATIENCE_S)):
        with context.socket(zmq.REQ) as request:
            request.linger = 0
            request.connect(endpoint)
            request.send_multipart(parts)
            if request.poll(1000):
                return request.recv()
    raise AssertionError("no reply")


class Side:
    """A Control, and what it died of."""

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self.control = Control("this side", self.failures.append)

    def connect(self, endpoint: str, timeout_s: float = PATIENCE_S, lease_s: float = 10.0) -> tuple[Connection, Client]:
        client = Client()
        return self.control.connect(endpoint, make_hello(lease_s), client, timeout_s=timeout_s), client


def ended(side: Side, session: bytes) -> bool:
    call = side.control.end(session, "enough")
    assert call.wait(PATIENCE_S)
    return call.result()


@pytest.fixture
def sides() -> Iterator[Callable[[], Side]]:
    made: list[Side] = []

    def make() -> Side:
        made.append(Side())
        return made[-1]

    yield make
    for side in made:
        side.control.close(0.2)
    assert all(not side.failures for side in made)
    assert not [thread for thread in threading.enumerate() if thread.name == "rdmaxfer-control"]


def test_a_whole_life(sides: Callable[[], Side]) -> None:
    here, there = sides(), sides()
    handler = Server()
    server = there.control.bind(ANY_PORT, handler)
    assert server.endpoint.startswith("tcp://127.0.0.1:")
    begun = time.monotonic()
    connection, client = here.connect(server.endpoint)
    connection.wait_started(PATIENCE_S)
    assert time.monotonic() - begun < 2.0
    assert handler.ready_ones == {connection.session}
    assert handler.peers == {"127.0.0.1"}
    assert handler.threads == {"rdmaxfer-control"}
    connection.request_resize(8192, None)
    wait_until(lambda: client.answers)
    assert client.answers[0].session == connection.session
    assert server.statistics().sessions == 1
    connection.bye("done")
    assert client.ends == [None]
    assert handler.gone_ones == [(connection.session, True)]
    with pytest.raises(ClosedError):
        connection.wait_started(1.0)


def test_leases_are_renewed(sides: Callable[[], Side]) -> None:
    side = sides()
    handler = Server()
    server = side.control.bind(ANY_PORT, handler)
    connection, client = side.connect(server.endpoint, lease_s=0.6)
    connection.wait_started(PATIENCE_S)
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() - begun > 1.5)
    assert (client.ends, handler.gone_ones) == ([], [])


def test_many_peers_at_one_endpoint(sides: Callable[[], Side]) -> None:
    there, here = sides(), sides()
    handler = Server()
    server = there.control.bind(ANY_PORT, handler, max_sessions=20)
    connections = [here.connect(server.endpoint)[0] for _ in range(20)]
    for connection in connections:
        connection.wait_started(PATIENCE_S)
    extra, _ = here.connect(server.endpoint)
    with pytest.raises(Refused) as caught:
        extra.wait_started(PATIENCE_S)
    assert caught.value.code == "limit"
    here.control.close()
    wait_until(lambda: not handler.open)
    assert all(graceful for _, graceful in handler.gone_ones)


def test_the_peer_may_come_later(sides: Callable[[], Side]) -> None:
    side = sides()
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
    connection, _ = side.connect(endpoint)
    with pytest.raises(TimeoutExpired):
        connection.wait_started(0.1)
    side.control.bind(endpoint, Server())
    connection.wait_started(PATIENCE_S)


def test_nobody_is_there(sides: Callable[[], Side]) -> None:
    side = sides()
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, but not listening: refused
        connection, client = side.connect(f"tcp://127.0.0.1:{reserved.getsockname()[1]}", timeout_s=0.2)
        with pytest.raises(ConnectTimeout, match="waiting for an answer to HELLO"):
            connection.wait_started(PATIENCE_S)
    assert len(client.ends) == 1


def test_a_restarted_server_does_not_know_the_session(sides: Callable[[], Side]) -> None:
    first, here = sides(), sides()
    server = first.control.bind(ANY_PORT, Server())
    connection, client = here.connect(server.endpoint, lease_s=0.9)
    connection.wait_started(PATIENCE_S)
    first.control.close()
    second = sides()
    handler = Server()
    second.control.bind(server.endpoint, handler)
    wait_until(lambda: client.ends)
    assert isinstance(client.ends[0], PeerLost)
    again, _ = here.connect(server.endpoint)
    again.wait_started(PATIENCE_S)
    assert handler.open == {again.session}


def test_a_vanished_client_is_given_up(sides: Callable[[], Side]) -> None:
    side = sides()
    handler = Server()
    server = side.control.bind(ANY_PORT, handler, lease_s=0.2)
    hello = make_hello()
    with zmq.Context() as context, context.socket(zmq.REQ) as request:
        request.connect(server.endpoint)
        for message in (hello, m.Ready(session=hello.session, request=2, ring=None)):
            request.send(m.encode(message))
            assert request.poll(PATIENCE_MS)
            assert not isinstance(m.decode(request.recv()), m.Refuse)
    wait_until(lambda: handler.gone_ones)
    assert handler.gone_ones == [(hello.session, False)]


def test_rubbish_at_the_port_disturbs_nobody(sides: Callable[[], Side]) -> None:
    side = sides()
    handler = Server()
    server = side.control.bind(ANY_PORT, handler)
    host, port = server.endpoint.removeprefix("tcp://").split(":")
    noise = random.Random(1).randbytes(5000)
    for rubbish in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f" + bytes(500), noise):
        with socket.create_connection((host, int(port)), PATIENCE_S) as raw:
            raw.sendall(rubbish)
    hello = make_hello()
    with zmq.Context() as context:
        for parts in ([b"hello?"], [b""], [b"", b""], [m.encode(hello), b"more"], [m.encode(hello)] * 2):
            reply = m.decode(ask(context, server.endpoint, parts))
            assert isinstance(reply, m.Refuse)
            assert reply.code is m.RefuseCode.MALFORMED
        with context.socket(zmq.REQ) as request:
            request.linger = 0
            request.connect(server.endpoint)
            request.send(bytes(m.MAX_MESSAGE_BYTES + 1))
            connection, _ = side.connect(server.endpoint)
            connection.wait_started(PATIENCE_S)
            assert not request.poll(0)
    assert server.statistics().malformed >= 5
    assert handler.open == {connection.session}


def test_a_repeated_request_gets_the_same_answer(sides: Callable[[], Side]) -> None:
    side = sides()
    server = side.control.bind(ANY_PORT, Server())
    data = m.encode(make_hello())
    replies = set()
    with zmq.Context() as context:
        for _ in range(3):
            with context.socket(zmq.REQ) as request:
                request.connect(server.endpoint)
                request.send(data)
                assert request.poll(PATIENCE_MS)
                replies.add(request.recv())
    assert len(replies) == 1
    assert server.statistics().repeated == 2


def test_a_port_of_somebody_else(sides: Callable[[], Side]) -> None:
    side = sides()
    with zmq.Context() as context, context.socket(zmq.REP) as stranger:
        stranger.linger = 0
        port = stranger.bind_to_random_port("tcp://127.0.0.1")
        connection, _ = side.connect(f"tcp://127.0.0.1:{port}")
        assert stranger.poll(PATIENCE_MS)
        stranger.recv()
        stranger.send_multipart([b"World", b"!"])
        with pytest.raises(RemoteProtocolError, match="no message of rdmaxfer"):
            connection.wait_started(PATIENCE_S)


def test_a_handlers_exception_is_an_answer(sides: Callable[[], Side]) -> None:
    side = sides()
    handler = Server()
    handler.raises = KeyError("bug")
    server = side.control.bind(ANY_PORT, handler)
    connection, _ = side.connect(server.endpoint)
    with pytest.raises(Refused) as caught:
        connection.wait_started(PATIENCE_S)
    assert caught.value.code == "internal"
    assert handler.errors == [handler.raises]
    handler.raises = None
    connection, _ = side.connect(server.endpoint)
    connection.wait_started(PATIENCE_S)
    assert ended(side, connection.session)
    assert not ended(side, connection.session)
    assert handler.gone_ones == [(connection.session, True)]


def test_closing_is_prompt_when_the_peer_is_dead(sides: Callable[[], Side]) -> None:
    there, here = sides(), sides()
    server = there.control.bind(ANY_PORT, Server())
    connection, client = here.connect(server.endpoint)
    connection.wait_started(PATIENCE_S)
    there.control.close()
    begun = time.monotonic()
    here.control.close(0.3)
    here.control.close(0.3)
    assert time.monotonic() - begun < 3.0
    assert client.ends == [None]
    for call in (lambda: here.connect(server.endpoint), lambda: here.control.call(int), lambda: connection.bye("x")):
        with pytest.raises(ClosedError):
            call()


def test_endpoints_that_cant_be_bound(sides: Callable[[], Side]) -> None:
    side = sides()
    server = side.control.bind(ANY_PORT, Server())
    for endpoint, fix in (
        (server.endpoint, "close it, choose another port"),
        ("tcp://192.0.2.1:7471", "ip addr"),
        ("tcp://no-such-device:7471", "ip addr"),
        ("tcp://127.0.0.1", "tcp://HOST:PORT"),
    ):
        with pytest.raises(EndpointError, match=fix):
            side.control.bind(endpoint, Server())
    with pytest.raises(EndpointError):
        side.connect("tcp://*:7471")


def test_ipv6(sides: Callable[[], Side]) -> None:
    side = sides()
    handler = Server()
    try:
        server = side.control.bind("tcp://[::1]:*", handler)
    except EndpointError:
        pytest.skip("no IPv6 on this machine")
    connection, _ = side.connect(server.endpoint)
    connection.wait_started(PATIENCE_S)
    assert handler.peers == {"::1"}


def test_calls_from_other_threads(sides: Callable[[], Side]) -> None:
    control = sides().control
    assert control.run(lambda: threading.current_thread().name) == "rdmaxfer-control"
    assert control.run(lambda: control.run(lambda: 5)) == 5
    with pytest.raises(ZeroDivisionError):
        control.run(lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="mine"):
        control.run(lambda: (_ for _ in ()).throw(TimeoutError("mine")))
    with pytest.raises(LocalProtocolError):
        control.run(control.close)
    done: list[int] = []
    control.call_later(0.02, lambda: done.append(2))
    control.call_later(0.01, lambda: done.append(1))
    control.call_later(0.015, lambda: done.append(9)).cancel()
    wait_until(lambda: len(done) == 2)
    assert done == [1, 2]
    gate = threading.Event()
    blocked = control.call(lambda: gate.wait(PATIENCE_S))
    with pytest.raises(TimeoutExpired):
        control.run(int, timeout_s=0.15)
    gate.set()
    assert blocked.wait(PATIENCE_S)
    assert blocked.result()


def test_the_death_of_the_thread_is_told_to_everybody() -> None:
    side = Side()
    server = side.control.bind(ANY_PORT, Server())
    waiting, client = side.connect("tcp://127.0.0.1:1")
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            waiting.wait_started(PATIENCE_S)
        except RdmaxferError as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    bug = ZeroDivisionError("bug")

    def fail() -> None:
        raise bug

    side.control.call_later(0.0, fail)
    waiter.join(PATIENCE_S)
    wait_until(lambda: side.failures)
    assert side.failures == [bug]
    assert isinstance(errors[0], LocalProtocolError)
    assert len(client.ends) == 1
    with pytest.raises(LocalProtocolError, match="bug"):
        server.statistics()
    side.control.close()


def test_an_exception_of_ended_is_not_lost() -> None:
    side = Side()
    connection, client = side.connect("tcp://127.0.0.1:1", timeout_s=0.05)
    client.raises = ZeroDivisionError("bug")
    wait_until(lambda: side.failures)
    assert side.failures == [client.raises]
    with pytest.raises(RdmaxferError):
        connection.wait_started(PATIENCE_S)
    side.control.close()


def test_a_forked_child_lets_go(sides: Callable[[], Side]) -> None:
    side = sides()
    server = side.control.bind(ANY_PORT, Server())
    connection, client = side.connect(server.endpoint)
    connection.wait_started(PATIENCE_S)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tested
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            try:
                side.control.call(int)
            except ForkedError:
                side.control.close()
                del side, server, connection
                gc.collect()
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert server.statistics().sessions == 1
    assert client.ends == []
