"""Strangers at a bound endpoint, beside a live stream: half-open handshakes, replayed messages, rubbish.

Whatever they do, the stream goes on with every byte, somebody new can connect, and what they were given is back afterwards.
(Strangers with keys: test_stranger_keys.py.)
"""

from __future__ import annotations

import collections
import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from helpers import TIMEOUT_S, Background, check_frames, resources, wait_until
from streams import Stream, streaming, through
from tcp_proxy import TcpProxy

import rdmaxfer
from rdmaxfer.cm import messages
from rdmaxfer.cm.messages import Accept, Bye, Hello, QueuePair, Refuse, RefuseCode, VerbsAddress
from rdmaxfer.cm.server_sessions import ServerStatistics
from rdmaxfer.fabric.devices import Route

pytestmark = pytest.mark.verbs

BOUND = pytest.mark.parametrize("bound", ["receiver", "sender"])
OPTIONS: dict[str, Any] = {"slots": 4, "lease_s": 5.0}
PAUSE_S = 0.02
"""Between frames of the stream: who floods, who is flooded and the stream share one interpreter."""
LEAK_BYTES = 24 << 20
"""Less than a thousand half-open sessions take, and more than what Python keeps of them."""


def counted(node: Any) -> ServerStatistics:
    """What the bound endpoint has counted. There is no public way to it yet."""
    (server,) = node._servers
    found: ServerStatistics = server.statistics()
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Live:
    """A bound and a connected side, and a stream between them that runs beside the test."""

    def __init__(self, bound: str, stack: contextlib.ExitStack) -> None:
        small = {"slot_bytes": 16384}
        self.rx = stack.enter_context(rdmaxfer.Receiver(**OPTIONS, **small))
        self.tx = stack.enter_context(rdmaxfer.Sender(**OPTIONS))
        self.here, self.there = (self.rx, self.tx) if bound == "receiver" else (self.tx, self.rx)
        self.endpoint = self.here.bind("tcp://127.0.0.1:*")
        self.there.connect(self.endpoint, timeout=TIMEOUT_S)
        self.here.wait_for_peers(1, timeout=TIMEOUT_S)
        self.stream: Stream = stack.enter_context(streaming(self.tx, self.rx, PAUSE_S))
        self.stream.goes_on(50)

    @contextlib.contextmanager
    def connected_too(self) -> Iterator[Any]:
        kind = rdmaxfer.Sender if self.here is self.rx else rdmaxfer.Receiver
        with kind(**OPTIONS) as other:
            other.connect(self.endpoint, timeout=TIMEOUT_S)
            self.here.wait_for_peers(2, timeout=TIMEOUT_S)
            yield other

    @contextlib.contextmanager
    def newcomer(self) -> Iterator[None]:
        """Somebody else connects, and takes part until the stream is finished."""
        with self.connected_too() as other:
            over = threading.Event()
            taking = Background(lambda: _drain(other, over)) if isinstance(other, rdmaxfer.Receiver) else None
            yield
            self.stream.finish()
            over.set()
            if taking is not None:
                assert taking.result() > 0

    def unharmed(self, *, reconnects: bool = False) -> None:
        """Frames arrive. `reconnects`: it does not matter here whether the connection broke meanwhile."""
        self.stream.goes_on()
        for node in (self.tx, self.rx):
            assert node.statistics().peers_lost == 0
            assert reconnects or node.statistics().reconnects == 0


def _drain(rx: rdmaxfer.Receiver, over: threading.Event) -> int:
    count = 0
    while not over.is_set():
        with contextlib.suppress(rdmaxfer.TimeoutExpired):
            rx.recv(timeout=0.1).release()
            count += 1
    return count


@contextlib.contextmanager
def living(bound: str) -> Iterator[Live]:
    with contextlib.ExitStack() as stack:
        yield Live(bound, stack)


# --- half-open handshakes ----------------------------------------------------------------------------------------------


def made_up_hello(route: Route, role: Any) -> Hello:
    """A valid one, of queue pairs that nobody has."""
    first = 0x800000 + secrets.randbelow(0x700000)
    return Hello(
        session=secrets.token_bytes(16),
        request=1,
        role=role,
        node=secrets.token_bytes(16),
        stream=secrets.token_bytes(16),
        attempt=1,
        identity="",
        resume=None,
        fabrics=(
            VerbsAddress(
                device=route.device,
                gid=route.gid,
                lid=route.lid,
                queue_pairs=(QueuePair(qp_num=first, psn=1), QueuePair(qp_num=first + 1, psn=1)),
                link_layer="ethernet",
                active_mtu=route.active_mtu,
                max_msg_sz=route.max_msg_sz,
            ),
        ),
        slots=4,
        slot_bytes=4096,
        max_slot_bytes=1 << 20,
        lease_s=5.0,
        reconnect_s=30.0,
        name="stranger",
    )


class Knocking:
    """So many say HELLO, again when they are put off, and nothing else."""

    def __init__(self, endpoint: str, route: Route, role: str, count: int) -> None:
        self.sessions: list[bytes] = []
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.put_off = 0
        hellos = [made_up_hello(route, role) for _ in range(count)]
        self._waiting = {hello.session: messages.encode(hello) for hello in hellos}
        self._endpoint = endpoint
        self.thread = Background(self._run)

    def _run(self) -> None:
        deadline = time.monotonic() + 3 * TIMEOUT_S
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.SNDHWM, 0)
            dealer.setsockopt(zmq.RCVHWM, 0)
            dealer.connect(self._endpoint)
            while self._waiting:
                assert time.monotonic() < deadline, f"{len(self._waiting)} have got no answer but busy"
                asked = len(self._waiting)
                for said in self._waiting.values():
                    dealer.send_multipart([b"", said])
                for _ in range(asked):
                    assert dealer.poll(TIMEOUT_S * 1000), "some got no answer"
                    self._take(messages.decode(dealer.recv_multipart()[-1]))
                threading.Event().wait(0.25)  # as long as a well-behaved side would

    def _take(self, reply: Any) -> None:
        if isinstance(reply, Refuse) and reply.code is RefuseCode.BUSY:
            self.put_off += 1
            return
        del self._waiting[reply.session]
        self.sessions.append(reply.session)
        self.outcomes["accepted" if isinstance(reply, Accept) else reply.code.value] += 1


@BOUND
@pytest.mark.timeout(360)
def test_a_thousand_half_open_handshakes(bound: str, route: Route) -> None:
    # Whether it breaks leases: test_control_races.py.
    role = "sender" if bound == "receiver" else "receiver"
    with living(bound) as live:
        Knocking(live.endpoint, route, role, 20).thread.result()  # what is made once is there then
        wait_until(lambda: counted(live.here).sessions == 1, "the first ones expired")
        before, memory = resources(settled=True), resident_bytes()
        knocking = Knocking(live.endpoint, route, role, 1000)
        wait_until(lambda: counted(live.here).sessions > 20, "many are half open")
        live.unharmed(reconnects=True)
        assert live.here.statistics().peers == 1, "who was never ready is no peer"
        began = time.monotonic()
        with live.newcomer():
            came_in_s = time.monotonic() - began
            knocking.thread.result(3 * TIMEOUT_S)
            live.unharmed(reconnects=True)
            assert knocking.outcomes == {"accepted": 1000}
        wait_until(lambda: counted(live.here).sessions == 1, "they expired")
        statistics = counted(live.here)
        assert statistics.expired >= 1020
        assert statistics.handshakes >= 2
        assert statistics.refused.get("busy", 0) >= knocking.put_off
        wait_until(lambda: _back(before), f"resources are back to {before}: {resources()}")
        grown = resident_bytes() - memory
        assert grown < LEAK_BYTES
        check_frames(live.tx, live.rx)
        with live.connected_too():
            assert counted(live.here).handshakes >= 3
        print(f"{knocking.put_off} put off, a newcomer was in after {came_in_s:.1f} s; {grown >> 10} KiB more memory")


def _back(before: dict[str, int]) -> bool:
    now = resources()
    staging = 2 * 2 * OPTIONS["slots"]  # of the sender, registered when first needed
    return all(now[kind] == before[kind] for kind in ("pd", "cq", "qp")) and now["mr"] <= before["mr"] + staging


@BOUND
def test_strangers_fill_only_what_max_peers_allows(bound: str, route: Route) -> None:
    role = "sender" if bound == "receiver" else "receiver"
    with contextlib.ExitStack() as stack:
        kind = rdmaxfer.Receiver if bound == "receiver" else rdmaxfer.Sender
        node = stack.enter_context(kind(**OPTIONS, max_peers=10))
        endpoint = node.bind("tcp://127.0.0.1:*")
        knocking = Knocking(endpoint, route, role, 50)
        knocking.thread.result()
        assert knocking.outcomes == {"accepted": 10, "limit": 40}
        assert counted(node).refused["limit"] == 40
        for session in knocking.sessions:
            say(endpoint, messages.encode(Bye(session=session, request=2, end="lost", reason="")))
        assert counted(node).sessions == 0, "who says that he leaves, is out at once"
        assert node.statistics().peers_lost == 0


# --- replayed messages -------------------------------------------------------------------------------------------------


def say(endpoint: str, said: bytes) -> Any:
    """The answer to some bytes."""
    with zmq.Context() as context, context.socket(zmq.REQ) as asking:
        asking.setsockopt(zmq.LINGER, 0)
        asking.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        asking.connect(endpoint)
        asking.send(said)
        return messages.decode(asking.recv())


def recorded(proxy: TcpProxy, *kinds: str) -> list[bytes]:
    return [said for _, kind, said in proxy.messages if kind in kinds]


@BOUND
def test_a_replayed_handshake_has_no_effect(bound: str) -> None:
    with through(bound, sender=OPTIONS, receiver=OPTIONS) as (proxy, tx, rx):
        here, there = (rx, tx) if bound == "receiver" else (tx, rx)
        endpoint = here._servers[0].endpoint
        wait_until(lambda: len(recorded(proxy, "renewed")) >= 1, "a request came after the handshake")
        handshake = recorded(proxy, "hello", "ready")
        assert len(handshake) == 2
        before = resources()
        with streaming(tx, rx) as stream:
            stream.goes_on()
            for turn in range(10):
                for said in handshake:
                    answer = say(endpoint, said)
                    assert isinstance(answer, Refuse)
                    assert answer.code is RefuseCode.MALFORMED
                assert counted(here).refused["malformed"] == 2 * (turn + 1)
            stream.goes_on()
        assert (counted(here).sessions, counted(here).handshakes) == (1, 1)
        assert _back(before)
        for node in (tx, rx):
            assert (node.statistics().peers, node.statistics().reconnects) == (1, 0)
        there.close()
        wait_until(lambda: here.statistics().peers == 0, "it has left")
        wait_until(lambda: counted(here).sessions == 0, "its session has ended")
        for said in [*handshake, *recorded(proxy, "renew")]:
            answer = say(endpoint, said)
            assert isinstance(answer, Refuse)
            assert answer.code is RefuseCode.UNKNOWN_SESSION
        assert (counted(here).sessions, counted(here).handshakes) == (0, 1)
        assert here.statistics().peers == here.statistics().reconnecting == 0


# --- rubbish -----------------------------------------------------------------------------------------------------------

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16) + b"\x00" + bytes(31)
assert len(GREETING) == 64
RUBBISH = {
    "random": [secrets.token_bytes(4000) for _ in range(50)],
    "http": [b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"] * 50,
    "tls": [bytes.fromhex("16030100c8010000c40303") + secrets.token_bytes(200) for _ in range(50)],
    "greeting": [GREETING] * 50,
    "half-a-greeting": [GREETING[:20]] * 50,
    "greeting-and-rubbish": [GREETING + b"\x04" + secrets.token_bytes(100) for _ in range(50)],
    "an-endless-frame": [GREETING + b"\x04\x19\x05READY" + bytes(19) + b"\x02" + b"\x7f" * 8 + bytes(1000)] * 50,
    "nothing": [b""] * 500,
}


def dial(endpoint: str) -> socket.socket:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), TIMEOUT_S)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@BOUND
@pytest.mark.parametrize("what", RUBBISH)
@pytest.mark.parametrize("stay", [True, False], ids=["stay", "leave"])
def test_rubbish_harms_nobody(bound: str, what: str, stay: bool) -> None:
    with living(bound) as live:
        before = descriptors()
        with contextlib.ExitStack() as stack:
            for said in RUBBISH[what]:
                connection = dial(live.endpoint)
                if stay:
                    stack.enter_context(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(said)
                if not stay:
                    connection.close()
            live.unharmed()
            assert live.here.statistics().peers == 1
            with live.newcomer():
                live.unharmed()
        wait_until(lambda: descriptors() <= before, f"file descriptors are back to {before}, from {descriptors()}")
        assert counted(live.here).handshakes == 2
        if what in ("random", "http", "tls"):
            wait_until(lambda: live.here.statistics().turned_away > 0, "it was counted")


@BOUND
def test_the_stream_is_unharmed_by_a_flood_of_rubbish_from_many_threads(bound: str) -> None:
    with living(bound) as live:
        over = threading.Event()

        def flood(number: int) -> int:
            sent = 0
            kinds = [said for saids in RUBBISH.values() for said in saids[:5]]
            while not over.is_set():
                with contextlib.suppress(OSError), dial(live.endpoint) as connection:
                    connection.sendall(kinds[(sent + number) % len(kinds)])
                    sent += 1
            return sent

        flooding = [Background(lambda number=number: flood(number)) for number in range(8)]
        try:
            for _ in range(5):
                live.unharmed()
            with live.newcomer():
                live.unharmed()
        finally:
            over.set()
        assert sum(each.result() for each in flooding) > 100
        assert counted(live.here).handshakes == 2
        check_frames(live.tx, live.rx)
