"""Faults of the control plane beyond the lease, with reconnecting: afterwards the stream goes on, every frame once."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from helpers import TIMEOUT_S, picture, wait_until
from proxy_faults import LASTING, Fault, each
from streams import States, streaming, through

import rdmaxfer

BINDS = pytest.mark.parametrize("bind", ["sender", "receiver"])
OPTIONS: dict[str, Any] = {"lease_s": 1.0, "slots": 8, "reconnect_s": 60.0}


def broke(states: States) -> bool:
    return "reconnecting" in states.names


def came_back_unharmed(tx: rdmaxfer.Sender, rx: rdmaxfer.Receiver) -> None:
    for node in (tx, rx):
        statistics = node.statistics()
        assert statistics.reconnects >= 1
        assert (statistics.peers, statistics.peers_lost, statistics.reconnecting) == (1, 0, 0)


@BINDS
@each(LASTING)
def test_the_stream_goes_on_after_a_fault_that_is_longer_than_the_lease(bind: str, fault: Fault) -> None:
    told = States(), States()
    with (
        through(bind, sender={**OPTIONS, "on_state": told[0]}, receiver={**OPTIONS, "on_state": told[1]}) as (
            proxy,
            tx,
            rx,
        ),
        streaming(tx, rx) as stream,
    ):
        stream.goes_on()
        fault.inject(proxy)
        wait_until(lambda: all(map(broke, told)), "both know that it broke")
        proxy.resume()
        wait_until(lambda: all(states.names[-1] == "connected" for states in told), "they came back")
        stream.goes_on(100)
        came_back_unharmed(tx, rx)


@BINDS
@pytest.mark.parametrize("step", ["hello", "accept", "ready", "started"])
def test_the_stream_goes_on_after_a_handshake_that_failed_at_every_step(bind: str, step: str) -> None:
    """The connection breaks, and the first attempts to come back lose one message, again and again."""
    told = States(), States()
    with (
        through(bind, sender={**OPTIONS, "on_state": told[0]}, receiver={**OPTIONS, "on_state": told[1]}) as (
            proxy,
            tx,
            rx,
        ),
        streaming(tx, rx) as stream,
    ):
        stream.goes_on()
        proxy.lose("renew")
        wait_until(lambda: all(map(broke, told)), "both know that it broke")
        proxy.lose(step)
        wait_until(lambda: proxy.counts().lost[step] >= 3, "messages of the handshake are lost")
        proxy.resume()
        wait_until(lambda: all(states.names[-1] == "connected" for states in told), "they came back")
        stream.goes_on(100)
        came_back_unharmed(tx, rx)


@BINDS
def test_the_connection_may_break_again_and_again(bind: str) -> None:
    told = States(), States()
    with (
        through(bind, sender={**OPTIONS, "on_state": told[0]}, receiver={**OPTIONS, "on_state": told[1]}) as (
            proxy,
            tx,
            rx,
        ),
        streaming(tx, rx) as stream,
    ):
        for turn in range(1, 6):
            stream.goes_on()
            (proxy.stall if turn % 2 else proxy.drop)()
            wait_until(lambda turn=turn: all(s.names.count("reconnecting") >= turn for s in told), "it broke")
            proxy.resume()
            wait_until(lambda: all(states.names[-1] == "connected" for states in told), "they came back")
        stream.goes_on()
        came_back_unharmed(tx, rx)


@BINDS
@pytest.mark.parametrize("who", ["connecting", "bound"])
def test_close_returns_in_time_while_the_other_side_is_out_of_reach(bind: str, who: str) -> None:
    told = States(), States()
    with through(bind, sender={**OPTIONS, "on_state": told[0]}, receiver={**OPTIONS, "on_state": told[1]}) as (
        proxy,
        tx,
        rx,
    ):
        for seq in range(3):
            tx.push(picture(seq), timeout=TIMEOUT_S)
        proxy.drop()
        wait_until(lambda: all(map(broke, told)), "both know that it broke")
        bound, connecting = (rx, tx) if bind == "receiver" else (tx, rx)
        node = bound if who == "bound" else connecting
        if node is tx:
            with pytest.raises(rdmaxfer.PeerLost) as caught:
                node.close(timeout=2)
            assert caught.value.unreleased == (0, 1, 2)
        else:
            node.close(timeout=2)
        assert node.closed
        assert sum(each.name == "rdmaxfer-control" for each in threading.enumerate()) == 1
