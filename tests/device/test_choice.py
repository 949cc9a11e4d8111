"""Which fabric carries the frames, and that nobody is left to believe another one does."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import pytest
from helpers import TIMEOUT_S, check_frames, picture, wait_until

import rdmaxfer
from rdmaxfer.fabric.shm import ShmEndpoint

pytestmark = pytest.mark.verbs
BINDS = pytest.mark.parametrize("bind", ["sender", "receiver"])


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RDMAXFER_FABRIC")


@contextlib.contextmanager
def connected(bind: str, bound: str | None, connecting: str | None) -> Iterator[list[rdmaxfer.StateChange]]:
    """A pair, of which each side wants a fabric; what the sides were told."""
    told: list[rdmaxfer.StateChange] = []
    wanted = {bind: bound, ("sender" if bind == "receiver" else "receiver"): connecting}
    with (
        rdmaxfer.Receiver(fabric=wanted["receiver"], on_state=told.append) as rx,
        rdmaxfer.Sender(fabric=wanted["sender"], on_state=told.append) as tx,
    ):
        here, there = (rx, tx) if bind == "receiver" else (tx, rx)
        there.connect(here.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        here.wait_for_peers(1, timeout=TIMEOUT_S)
        check_frames(tx, rx)
        wait_until(lambda: len(told) == 2, "both sides were told")
        for node in (rx, tx):
            (link,) = node.links()
            assert (link.peer, link.fabric, link.reason) in [(each.peer, each.fabric, each.reason) for each in told]
        yield told


@BINDS
def test_shared_memory_within_one_machine(bind: str) -> None:
    with connected(bind, None, None) as told:
        assert {change.fabric for change in told} == {"shm"}
        assert any("127.0.0.1 is this machine" in change.reason for change in told)


@BINDS
@pytest.mark.parametrize(("bound", "connecting"), [(None, "verbs"), ("verbs", None)])
def test_verbs_where_one_side_wants_it_and_both_can(bind: str, bound: str | None, connecting: str | None) -> None:
    with connected(bind, bound, connecting) as told:
        assert {change.fabric for change in told} == {"verbs"}
        assert all("GID" in change.reason for change in told)


@BINDS
def test_verbs_where_both_can_and_are_not_one_user_of_one_machine(bind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdmaxfer.fabric.shm.host_id", lambda: os.urandom(16))  # never the same
    with connected(bind, None, None) as told:
        assert {change.fabric for change in told} == {"verbs"}


@BINDS
def test_tcp_if_one_side_wants_it_and_a_line_in_the_log(bind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rdmaxfer"), connected(bind, "tcp", "auto") as told:
        assert {change.fabric for change in told} == {"tcp"}
        assert any("the peer can't take part over verbs" in change.reason for change in told)
    (line,) = [record.getMessage() for record in caplog.records if "over tcp" in record.getMessage()]
    assert "takes part over TCP only" in line


@BINDS
def test_what_is_asked_for_is_not_a_surprise(bind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rdmaxfer"), connected(bind, "auto", "tcp"):
        assert not [record for record in caplog.records if "over tcp" in record.getMessage()]


@BINDS
def test_verbs_where_shared_memory_turns_out_to_fail(bind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(endpoint: ShmEndpoint, **_: object) -> None:
        if not endpoint.route.bound:
            raise rdmaxfer.NoDevice("this machine forbids it.")

    monkeypatch.setattr(ShmEndpoint, "connect", fail)
    with connected(bind, None, None) as told:
        assert {change.fabric for change in told} == {"verbs"}


@BINDS
@pytest.mark.parametrize(
    ("bound", "connecting"),
    [("tcp", "verbs"), ("verbs", "tcp"), ("shm", "verbs"), ("shm", "tcp"), ("verbs", "shm"), ("tcp", "shm")],
)
def test_who_insists_is_refused(bind: str, bound: str, connecting: str) -> None:
    with (
        pytest.raises(rdmaxfer.Refused, match=r"takes part over (TCP|verbs|shared memory) only") as caught,
        connected(bind, bound, connecting),
    ):
        pass
    assert caught.value.code == "fabric"


def test_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDMAXFER_FABRIC", "tcp")
    with connected("receiver", None, None) as told:
        assert {change.fabric for change in told} == {"tcp"}


FABRICS = ("verbs", "tcp", "shm")


def test_one_receiver_takes_frames_by_all() -> None:
    with contextlib.ExitStack() as stack:
        rx = stack.enter_context(rdmaxfer.Receiver())
        endpoint = rx.bind("tcp://127.0.0.1:*")
        senders = [stack.enter_context(rdmaxfer.Sender(fabric=fabric)) for fabric in FABRICS]
        for tx in senders:
            tx.connect(endpoint, timeout=TIMEOUT_S)
            check_frames(tx, rx)
        assert sorted(link.fabric for link in rx.links()) == sorted(FABRICS)
        for tx in [*senders, *senders]:
            check_frames(tx, rx)
            tx.flush(timeout=TIMEOUT_S)


def test_one_sender_reaches_receivers_by_all() -> None:
    with contextlib.ExitStack() as stack:
        tx = stack.enter_context(rdmaxfer.Sender())
        endpoint = tx.bind("tcp://127.0.0.1:*")
        receivers = [stack.enter_context(rdmaxfer.Receiver(fabric=fabric)) for fabric in FABRICS]
        for rx in receivers:
            rx.connect(endpoint, timeout=TIMEOUT_S)
        tx.wait_for_peers(len(FABRICS), timeout=TIMEOUT_S)
        for seed in range(40):
            tx.push(picture(seed), timeout=TIMEOUT_S)
            with tx.reserve(picture(seed).shape, timeout=TIMEOUT_S) as slot:
                slot.array[...] = picture(seed + 1)
            for rx in receivers:
                for each in (seed, seed + 1):
                    with rx.recv(timeout=TIMEOUT_S) as frame:
                        assert frame.array.tobytes() == picture(each).tobytes()
        tx.flush(timeout=TIMEOUT_S)
