"""What is late on the control plane: a slow network, a HELLO of an attempt that was given up, a thread that is held up."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import zmq
from helpers import TIMEOUT_S, check_frames, picture, wait_until
from streams import States, apart, streaming, through
from tcp_proxy import TcpProxy
from test_control_resume import BINDS, OPTIONS, broke, came_back_unharmed
from test_strangers import Knocking

import rdmaxfer
from rdmaxfer.fabric.devices import Route
from rdmaxfer.waiting import SETTLE_S


@BINDS
@pytest.mark.parametrize("one_way_s", [0.02, 0.1, 0.5])
def test_two_sides_that_are_far_apart_connect_and_stay_connected(bind: str, one_way_s: float) -> None:
    both = {"lease_s": 10.0, "reconnect": False}
    with apart(bind, sender=both, receiver=both) as (proxy, tx, rx, bound, connecting):
        proxy.delay(one_way_s)
        connecting.connect(proxy.endpoint, timeout=TIMEOUT_S / 2)
        bound.wait_for_peers(1, timeout=TIMEOUT_S)
        wait_until(lambda: proxy.counts().passed["renewed"] >= 1 or connecting.statistics().peers == 0, "it is renewed")
        check_frames(tx, rx)


@BINDS
def test_one_lost_message_on_a_slow_network_does_not_matter(bind: str) -> None:
    both = {"lease_s": 3.0, "reconnect": False}
    with through(bind, sender=both, receiver=both) as (proxy, tx, rx):
        proxy.delay(0.1)
        proxy.lose("renew", 1)
        wait_until(lambda: proxy.counts().lost["renew"] == 1, "it was lost")
        before = proxy.counts().passed["renewed"]
        wait_until(lambda: proxy.counts().passed["renewed"] > before + 1 or tx.statistics().peers == 0, "renewed")
        check_frames(tx, rx)


@BINDS
def test_a_hello_that_arrives_very_late_does_no_harm(bind: str) -> None:
    """It belongs to an attempt that was given up: the stream has gone on over another connection since."""
    told = States(), States()
    with through(bind, sender={**OPTIONS, "on_state": told[0]}, receiver={**OPTIONS, "on_state": told[1]}) as (
        proxy,
        tx,
        rx,
    ):
        for seq in range(4):
            tx.push(picture(seq), timeout=TIMEOUT_S)
        held = [rx.recv(timeout=TIMEOUT_S) for _ in range(4)]
        late = _lost_hello(proxy, told)
        for seq in range(4, 7):
            tx.push(picture(seq), timeout=TIMEOUT_S)
        held += [rx.recv(timeout=TIMEOUT_S) for _ in range(3)]
        bound = rx if bind == "receiver" else tx
        _say(bound._servers[0].endpoint, late)
        held.clear()
        with streaming(tx, rx) as stream:
            stream.goes_on(200)
            came_back_unharmed(tx, rx)


def _lost_hello(proxy: TcpProxy, told: tuple[States, States]) -> bytes:
    """Break the connection, and lose the first HELLO of the attempts to come back, until a later one has succeeded."""
    known = sum(kind == "hello" for _, kind, _ in proxy.messages)
    proxy.lose("hello")
    proxy.lose("renew")
    wait_until(lambda: all(map(broke, told)), "both know that it broke")
    hellos = lambda: [said for _, kind, said in proxy.messages if kind == "hello"][known:]  # noqa: E731
    wait_until(lambda: len(set(hellos())) >= 2, "the first attempt was given up")
    late = hellos()[0]
    proxy.resume()
    wait_until(lambda: all(states.names[-1] == "connected" for states in told), "they came back")
    return late


def _say(endpoint: str, said: bytes) -> bytes:
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        socket.connect(endpoint)
        socket.send(said)
        return socket.recv()


@BINDS
def test_a_thread_that_was_held_up_when_the_connection_broke(bind: str) -> None:
    """It has completions of the old connection in its hands while the next one is being made."""
    told = States(), States()
    longer = {**OPTIONS, "lease_s": 2.0}
    with (
        through(bind, sender={**longer, "on_state": told[0]}, receiver={**longer, "on_state": told[1]}) as (
            proxy,
            tx,
            rx,
        ),
        streaming(tx, rx) as stream,
    ):
        stream.goes_on()
        poller: Any = rx._waiter._poller
        wait, over = poller.wait, threading.Event()

        def held_up(*how_long: float) -> int:
            count: int = wait(*how_long)
            if not over.is_set():
                time.sleep(1.6 * SETTLE_S)  # a busy machine
            return count

        poller.wait = held_up
        proxy.drop()
        wait_until(lambda: all(map(broke, told)), "both know that it broke")
        over.set()
        proxy.resume()
        wait_until(lambda: all(states.names[-1] != "reconnecting" for states in told), "it is over")
        stream.goes_on(100)
        came_back_unharmed(tx, rx)


@BINDS
def test_who_has_given_up_connecting_is_not_waited_for(bind: str) -> None:
    """Its `connect` has raised, so it will not come back, though the bound side had it connected for a moment."""
    told = States()
    options = {"sender": {"lease_s": 3.0}, "receiver": {"lease_s": 3.0}}
    options[bind]["on_state"] = told  # type: ignore[assignment]
    with apart(bind, **options) as (proxy, _, _, bound, connecting):
        proxy.lose("started")
        with pytest.raises(rdmaxfer.ConnectTimeout):
            connecting.connect(proxy.endpoint, timeout=1.5)
        wait_until(lambda: told.names[:1] == ["connected"], "the bound side had it connected")
        wait_until(lambda: bound.statistics().reconnecting == bound.statistics().peers == 0, "it is given up", 10)


@BINDS
def test_a_flood_of_handshakes_breaks_no_lease(bind: str, route: Route) -> None:
    both = {"lease_s": 3.0, "slots": 4}
    small = {**both, "slot_bytes": 16384}  # of the 300, each gets a ring
    with through(bind, sender=both, receiver=small) as (_, tx, rx), streaming(tx, rx) as stream:
        bound: Any = rx if bind == "receiver" else tx
        role = "sender" if bind == "receiver" else "receiver"
        Knocking(bound._servers[0].endpoint, route, role, 300).thread.result()
        stream.goes_on()
        assert bound.statistics().reconnects == 0
