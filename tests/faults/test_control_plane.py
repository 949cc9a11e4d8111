"""Faults of the control plane, by a TCP proxy between the two sides, without reconnecting. (With it: test_control_resume.py.)

The lease is the line: what is over before it ends does not matter, and after it both sides know of the loss, with the numbers.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
from helpers import TIMEOUT_S, Background, check_frames, picture, resources, wait_until
from proxy_faults import LASTING, PASSING, Fault, each
from streams import States, apart, streaming, through
from tcp_proxy import TcpProxy

import rdmaxfer

BINDS = pytest.mark.parametrize("bind", ["sender", "receiver"])
STEPS = pytest.mark.parametrize("step", ["hello", "accept", "ready", "started"])

LONG_LEASE_S = 6.0
"""For faults that are over before it is: a renewal comes every third of it."""
LEASE_S = 2.0
"""For faults that end it. Longer than what a busy machine may hold up a program that shares a processor with the tests."""
MARGIN_S = 5.0
"""How much later than the lease a busy machine may learn it."""

SLOTS = 8


def options(lease_s: float, **more: Any) -> dict[str, Any]:
    return {"lease_s": lease_s, "slots": SLOTS, "reconnect": False, **more}


# --- in mid-stream -----------------------------------------------------------------------------------------------------


@BINDS
@each(LASTING + PASSING)
def test_a_fault_that_is_shorter_than_the_lease_does_not_matter(bind: str, fault: Fault) -> None:
    both = options(LONG_LEASE_S)
    with through(bind, sender=both, receiver=both) as (proxy, tx, rx), streaming(tx, rx) as stream:
        stream.goes_on()
        fault.inject(proxy)
        stream.goes_on()
        proxy.resume()
        before = proxy.counts().passed["renewed"]
        wait_until(
            lambda: proxy.counts().passed["renewed"] > before or tx.statistics().peers == 0,
            "the lease is renewed again",
        )
        stream.goes_on()
        for node in (tx, rx):
            statistics = node.statistics()
            assert (statistics.peers, statistics.peers_lost, statistics.reconnects) == (1, 0, 0)


@BINDS
@each(LASTING)
def test_a_fault_that_is_longer_than_the_lease_is_known_to_both_with_the_numbers(bind: str, fault: Fault) -> None:
    told: dict[str, Any] = {"sender": States(), "receiver": States()}
    with through(
        bind,
        sender=options(LEASE_S, on_state=told["sender"]),
        receiver=options(LEASE_S, on_state=told["receiver"]),
    ) as (proxy, tx, rx):
        for seq in range(3):
            tx.push(picture(seq), timeout=TIMEOUT_S)
            rx.recv(timeout=TIMEOUT_S).release()
        tx.flush(timeout=TIMEOUT_S)
        for seq in range(3, 7):
            tx.push(picture(seq), timeout=TIMEOUT_S)
        held = [rx.recv(timeout=TIMEOUT_S) for _ in range(4)]
        receiving = Background(lambda: rx.recv(timeout=TIMEOUT_S))
        flushing = Background(lambda: tx.flush(timeout=TIMEOUT_S))
        began = time.monotonic()
        fault.inject(proxy)
        wait_until(lambda: all(states.when("lost") for states in told.values()), "both were told")
        for states in told.values():
            assert states.names == ["connected", "lost"]
            assert states.when("lost") - began < LEASE_S + MARGIN_S
            assert isinstance(states.changes[-1][1].error, rdmaxfer.PeerLost)
        with pytest.raises(rdmaxfer.PeerLost) as caught:
            flushing.result()
        assert caught.value.unreleased == (3, 4, 5, 6)
        if bind == "sender":
            with pytest.raises(rdmaxfer.PeerLost):
                receiving.result()
        for node in (tx, rx):
            assert (node.statistics().peers, node.statistics().peers_lost) == (0, 1)
        for frame in held:
            assert frame.array.tobytes() == picture(frame.seq).tobytes()
        _closes_in_time(tx, rx)
        if bind == "receiver":
            with pytest.raises(rdmaxfer.ClosedError):
                receiving.result()


@BINDS
@each(LASTING)
def test_close_returns_in_time_while_nothing_gets_through(bind: str, fault: Fault) -> None:
    both = options(LONG_LEASE_S)
    with through(bind, sender=both, receiver=both) as (proxy, tx, rx):
        check_frames(tx, rx)
        fault.inject(proxy)
        _closes_in_time(tx, rx)


def _closes_in_time(tx: rdmaxfer.Sender, rx: rdmaxfer.Receiver) -> None:
    for node in (tx, rx):
        began = time.monotonic()
        with contextlib.suppress(rdmaxfer.PeerLost):
            node.close(timeout=2)
        assert time.monotonic() - began < 2 + MARGIN_S
        assert node.closed
    assert not [each for each in threading.enumerate() if each.name.startswith("rdmaxfer")]


# --- during the handshake ----------------------------------------------------------------------------------------------


def _works(proxy: TcpProxy, tx: rdmaxfer.Sender, rx: rdmaxfer.Receiver) -> None:
    """One connection, and no more."""
    rx.wait_for_peers(1, timeout=TIMEOUT_S)
    tx.wait_for_peers(1, timeout=TIMEOUT_S)
    check_frames(tx, rx)
    for node in (tx, rx):
        statistics = node.statistics()
        assert (statistics.peers, statistics.peers_lost, statistics.reconnecting) == (1, 0, 0)
    sessions = {said[said.index(b"session") :][:25] for _, kind, said in proxy.messages if kind == "hello"}
    assert len(sessions) == 1


@BINDS
@STEPS
def test_a_handshake_that_loses_a_message_is_made_all_the_same(bind: str, step: str) -> None:
    both = options(LONG_LEASE_S)
    with apart(bind, sender=both, receiver=both) as (proxy, tx, rx, _, connecting):
        proxy.lose(step, 1)
        connecting.connect(proxy.endpoint, timeout=TIMEOUT_S)
        assert proxy.counts().lost == {step: 1}
        _works(proxy, tx, rx)


COMMANDS = {
    "reset": lambda proxy: proxy.cut(),
    "finish": lambda proxy: proxy.cut(reset=False),
    "truncate": lambda proxy: proxy.truncate(MIDDLE),
    "drop": lambda proxy: proxy.drop(after=MIDDLE),
    "stall": lambda proxy: proxy.stall(after=MIDDLE),
    "go-away": lambda proxy: (proxy.refuse(), proxy.cut()),
}
MIDDLE = 40


@BINDS
@STEPS
@pytest.mark.parametrize("command", COMMANDS)
def test_a_handshake_that_is_broken_at_a_message_is_made_later(bind: str, step: str, command: str) -> None:
    both = options(LONG_LEASE_S)
    with apart(bind, sender=both, receiver=both) as (proxy, tx, rx, _, connecting):
        hit = threading.Event()
        proxy.at(step, lambda: (COMMANDS[command](proxy), hit.set()))
        connected = Background(lambda: connecting.connect(proxy.endpoint, timeout=TIMEOUT_S))
        assert hit.wait(TIMEOUT_S)
        if command in ("drop", "stall", "go-away"):  # the others are over when a repeat comes
            assert not [kind for _, kind, _ in proxy.messages if kind == "renew"]
        proxy.resume()
        connected.result()
        _works(proxy, tx, rx)


@BINDS
@STEPS
def test_a_handshake_that_loses_a_message_for_good_ends_and_leaves_nothing(bind: str, step: str) -> None:
    both = options(LONG_LEASE_S)
    with apart(bind, sender=both, receiver=both) as (proxy, tx, rx, bound, connecting):
        connecting.connect(proxy.endpoint, timeout=TIMEOUT_S)  # what is made once is there
        check_frames(tx, rx)
        before = resources()
        proxy.lose(step)
        began = time.monotonic()
        with pytest.raises(rdmaxfer.ConnectTimeout):
            connecting.connect(proxy.endpoint, timeout=1.5)
        assert time.monotonic() - began < 1.5 + MARGIN_S
        assert proxy.counts().lost[step] >= 2
        # What was started at the bound side only, ends there by BYE.
        wait_until(lambda: bound.statistics().peers == 1, "the bound side has forgotten it")
        assert connecting.statistics().peers == 1
        wait_until(lambda: resources() == before, f"resources are back to {before}, not {resources()}")
        proxy.resume()
        with contextlib.suppress(rdmaxfer.PeerLost):  # of the half that the bound side had
            check_frames(tx, rx)
        connecting.connect(proxy.endpoint, timeout=TIMEOUT_S)
        wait_until(lambda: bound.statistics().peers == 2, "a later one is made")


@BINDS
def test_a_handshake_waits_for_a_bound_side_that_comes_late(bind: str) -> None:
    both = options(LONG_LEASE_S)
    with apart(bind, sender=both, receiver=both) as (proxy, tx, rx, _, connecting):
        proxy.refuse()
        connected = Background(lambda: connecting.connect(proxy.endpoint, timeout=TIMEOUT_S))
        connected.join(0.5)
        assert connected.is_alive(), "it must go on trying"
        proxy.resume()
        connected.result()
        _works(proxy, tx, rx)


@BINDS
@pytest.mark.parametrize("after", [0, 1, 10, 11, 63, 64, 70])
def test_a_handshake_whose_greeting_is_cut_short_is_made_later(bind: str, after: int) -> None:
    both = options(LONG_LEASE_S)
    with apart(bind, sender=both, receiver=both) as (proxy, tx, rx, _, connecting):
        proxy.truncate(after)
        connected = Background(lambda: connecting.connect(proxy.endpoint, timeout=TIMEOUT_S))
        wait_until(lambda: proxy.counts().truncated >= 3, "it was cut short")
        proxy.resume()
        connected.result()
        _works(proxy, tx, rx)
