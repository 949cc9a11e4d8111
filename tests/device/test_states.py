"""`on_state`: who came, who went, and why."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

import pytest
from helpers import FABRIC, TIMEOUT_S, pair, picture, spawn, wait_until

import rdmaxfer

VICTIM = """
import sys, rdmaxfer
tx = rdmaxfer.Sender(lease_s=2.0)
tx.connect(sys.argv[1], timeout=60)
print("connected", flush=True)
sys.stdin.read()
"""


class Log:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.changes: list[rdmaxfer.StateChange] = []
        self.threads: set[str] = set()

    def __call__(self, change: rdmaxfer.StateChange) -> None:
        self.changes.append(change)
        self.threads.add(threading.current_thread().name)

    @property
    def states(self) -> list[str]:
        return [change.state for change in self.changes]


@pytest.mark.parametrize("bind", ["sender", "receiver"])
def test_both_sides_hear_of_each_other(bind: str) -> None:
    tx_log, rx_log = Log(), Log()
    with rdmaxfer.Receiver(on_state=rx_log) as rx:
        with rdmaxfer.Sender(on_state=tx_log) as tx:
            bound, connecting = (rx, tx) if bind == "receiver" else (tx, rx)
            connecting.connect(bound.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
            wait_until(lambda: tx_log.states == rx_log.states == ["connected"], "both were told")
            assert tx_log.changes[0].peer == rx.name
            assert rx_log.changes[0].peer == tx.name
            assert tx_log.changes[0].fabric == FABRIC
            assert {"verbs": "GID", "tcp": "TCP", "shm": "memory"}[FABRIC] in tx_log.changes[0].reason
            tx.push(picture(1), timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.peer == rx_log.changes[0].peer
            tx.flush(timeout=TIMEOUT_S)
        with contextlib.suppress(rdmaxfer.RdmaxferError):
            rx.recv(timeout=0.5)
        wait_until(lambda: rx_log.states == ["connected", "ended"], "the receiver was told of the goodbye")
        assert rx_log.changes[1].error is None
    assert tx_log.states == ["connected"], "closing oneself is no news"
    assert tx_log.threads == rx_log.threads == {"rdmaxfer-control"}


def test_a_peer_that_was_killed_is_lost_although_nobody_polls() -> None:
    log = Log()
    with rdmaxfer.Receiver(on_state=log, lease_s=2.0, reconnect_s=1.0) as rx:
        victim = spawn(VICTIM, rx.bind("tcp://127.0.0.1:*"))
        try:
            wait_until(lambda: log.states == ["connected"], "it connected")
        finally:
            victim.kill()
            victim.communicate()
        wait_until(lambda: log.states == ["connected", "reconnecting", "lost"], "its loss was told")
        for change in log.changes[1:]:
            assert isinstance(change.error, rdmaxfer.PeerLost)
            assert change.reason == str(change.error)
            assert f"/{victim.pid}" in change.peer
        assert "not come back within 1 s" in log.changes[2].reason


def test_a_callback_that_fails_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fails(change: Any) -> None:
        raise RuntimeError("a mistake of the user's")

    with caplog.at_level(logging.ERROR, "rdmaxfer"), pair(receiver={"on_state": fails}) as (tx, rx):
        wait_until(lambda: "a mistake of the user's" in caplog.text, "it was logged")
        tx.push(picture(3), timeout=TIMEOUT_S)
        rx.recv(timeout=TIMEOUT_S).release()
        tx.flush(timeout=TIMEOUT_S)


def test_a_callback_may_ask_for_statistics() -> None:
    seen: list[int] = []
    with rdmaxfer.Receiver(on_state=lambda _: seen.append(rx.statistics().peers)) as rx, rdmaxfer.Sender() as tx:
        tx.connect(rx.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        wait_until(lambda: seen == [1], "the callback ran")
