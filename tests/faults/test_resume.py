"""Connections that break under a stream: the next one goes on where it was, or both sides are told what is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import FABRIC, TIMEOUT_S, Background, pair, picture, wait_until

import rdmaxfer
from rdmaxfer.handshake import Connector

SLOTS = 8
OPTIONS = {"slots": SLOTS, "lease_s": 1.0}
BINDS = pytest.mark.parametrize("bind", ["sender", "receiver"])


def break_link(node: Any) -> None:
    """Its queue pairs fail, as after too many retries."""
    with node._lock:
        for link in node._links:
            link.endpoint.to_error()


def push(tx: rdmaxfer.Sender, count: int, timeout: float = TIMEOUT_S) -> None:
    for _ in range(count):
        seq = tx.statistics().frames
        assert tx.push(picture(seq), timeout=timeout) == seq


def take(rx: rdmaxfer.Receiver, first: int, end: int) -> None:
    """Frames `first` to `end`, without a gap."""
    for seq in range(first, end):
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.seq == seq
            assert frame.gap is None
            assert frame.array.tobytes() == picture(seq).tobytes()


def crash(node: Any) -> None:
    """As a process that is killed: not a word to anybody. (Killed processes: test_killed.py.)"""
    break_link(node)
    with node._lock:
        node._links.clear()
    node._say_goodbye = lambda deadline: None
    control = node._control
    assert control is not None
    control.run(lambda: [channel.close_socket() or channel.sessions._sessions.clear() for channel in control._servers])
    control.run(control._servers.clear)
    control.run(lambda: [client.session.abort(None) for client in control._clients])
    node.close()


@contextlib.contextmanager
def resuming(bind: str, **options: Any) -> Iterator[tuple[rdmaxfer.Sender, rdmaxfer.Receiver]]:
    with pair(bind=bind, sender={**OPTIONS, **options}, receiver={**OPTIONS, **options}) as (tx, rx):
        yield tx, rx


@BINDS
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_stream_goes_on_over_another_connection(bind: str, side: str) -> None:
    with resuming(bind) as (tx, rx):
        for turn in range(5):
            pushing = Background(lambda: push(tx, 100))
            take(rx, 100 * turn, 100 * turn + 40)
            break_link(tx if side == "sender" else rx)
            take(rx, 100 * turn + 40, 100 * turn + 100)
            pushing.result()
            tx.flush(timeout=TIMEOUT_S)
        assert tx.statistics().reconnects >= 5
        assert rx.statistics().missed == 0
        assert rx.statistics().frames == 500
        assert tx.statistics().peers_lost == rx.statistics().peers_lost == 0


@pytest.fixture
def breaks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first connection breaks before the thread that connects has noticed that there is one: it was held up."""
    notice = Connector.outcome
    broken: list[Any] = []

    def outcome(connector: Any) -> bool | None:
        if not broken and connector.link.live:
            connector.link.fail(rdmaxfer.PeerLost("the test broke it"))
            broken.append(connector.link)
            return None
        return notice(connector)

    monkeypatch.setattr(Connector, "outcome", outcome)


@BINDS
@pytest.mark.usefixtures("breaks_at_once")
def test_a_connection_that_breaks_before_connect_has_noticed_it_is_made_again(bind: str) -> None:
    with resuming(bind) as (tx, rx):
        push(tx, 4)
        take(rx, 0, 4)
        tx.flush(timeout=TIMEOUT_S)
        assert tx.statistics().peers_lost == rx.statistics().peers_lost == 0
        assert (tx if bind == "receiver" else rx).statistics().reconnects == 1


@BINDS
@pytest.mark.usefixtures("breaks_at_once")
def test_connect_tells_of_a_connection_that_broke_and_is_not_made_again(bind: str) -> None:
    with pytest.raises(rdmaxfer.PeerLost, match="the test broke it"), resuming(bind, reconnect=False):
        pass


@BINDS
def test_what_is_released_while_the_connection_is_being_made_again_gives_room(
    bind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the message that says what was released and the moment from which on credit can be given."""
    with resuming(bind) as (tx, rx):
        push(tx, SLOTS)
        held = [rx.recv(timeout=TIMEOUT_S) for _ in range(SLOTS)]
        activate = rx.activate

        def late(link: Any) -> None:
            while held:
                held.pop().release()
            activate(link)

        monkeypatch.setattr(rx, "activate", late)
        break_link(tx)
        push(tx, 1, timeout=10)
        take(rx, SLOTS, SLOTS + 1)
        assert not held


@BINDS
def test_frames_that_are_held_meanwhile_stay_and_count(bind: str) -> None:
    with resuming(bind) as (tx, rx):
        push(tx, SLOTS - 2)
        held = [rx.recv(timeout=TIMEOUT_S) for _ in range(4)]
        held[2].release()
        break_link(tx)
        push(tx, 2)  # as many as there are slots
        with pytest.raises(rdmaxfer.TimeoutExpired):
            tx.push(picture(0), timeout=0.2)
        take(rx, 4, SLOTS)
        assert [frame.seq for frame in held] == [0, 1, 2, 3]
        for frame in (held[0], held[1], held[3]):
            assert frame.array.tobytes() == picture(frame.seq).tobytes()
        with pytest.raises(rdmaxfer.TimeoutExpired, match="not released 8 frames, the first is 0"):
            tx.flush(timeout=0.2)
        held[0].release()
        held[3].release()
        with pytest.raises(rdmaxfer.TimeoutExpired, match="the first is 1"):
            tx.flush(timeout=0.2)
        held[1].release()
        tx.flush(timeout=TIMEOUT_S)
        push(tx, 3)
        take(rx, SLOTS, SLOTS + 3)


@BINDS
def test_larger_frames_wait_for_larger_slots_of_the_next_connection(bind: str) -> None:
    with pair(bind=bind, sender=OPTIONS, receiver={**OPTIONS, "slot_bytes": 1024}) as (tx, rx):
        tx.push(picture(0, (500,)), timeout=TIMEOUT_S)
        rx.recv(timeout=TIMEOUT_S).release()
        break_link(tx)
        tx.push(picture(1, (5000,)), timeout=TIMEOUT_S)
        tx.push(picture(2, (50_000,)), timeout=TIMEOUT_S)
        for seq, size in ((1, 5000), (2, 50_000)):
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.array.tobytes() == picture(seq, (size,)).tobytes()
        tx.flush(timeout=TIMEOUT_S)


@BINDS
def test_registered_arrays_are_sent_again_from_where_they_are(bind: str) -> None:
    with resuming(bind) as (tx, rx):
        frames = [picture(seq) for seq in range(SLOTS)]
        with contextlib.ExitStack() as stack:
            for frame in frames:
                stack.enter_context(tx.register(frame))
            for frame in frames[:3]:
                tx.push(frame, timeout=TIMEOUT_S)
            break_link(tx)
            for frame in frames[3:]:
                tx.push(frame, timeout=TIMEOUT_S)
            take(rx, 0, SLOTS)
            tx.flush(timeout=TIMEOUT_S)
        assert tx.statistics().copied == (SLOTS if FABRIC == "shm" else 0)  # it can share only memory of its own


@BINDS
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_without_reconnect_both_sides_are_told_at_once(bind: str, side: str) -> None:
    with resuming(bind, reconnect=False) as (tx, rx):
        push(tx, 5)
        first = rx.recv(timeout=TIMEOUT_S)
        first.release()
        break_link(tx if side == "sender" else rx)
        if side == "receiver":  # nobody else knows of it
            wait_until(lambda: _drained(rx), "the receiver learned it")
        with pytest.raises(rdmaxfer.PeerLost) as caught:
            tx.flush(timeout=TIMEOUT_S)
        unreleased = caught.value.unreleased
        assert unreleased == tuple(range(unreleased[0], 5))
        assert side == "receiver" or unreleased[0] in (0, 1), "the credit for the first may have been on its way"
        wait_until(lambda: _drained(rx), "the receiver learned it")
        assert rx.statistics().peers_lost == tx.statistics().peers_lost == 1
        assert rx.statistics().reconnecting == tx.statistics().reconnecting == 0


def _drained(rx: rdmaxfer.Receiver) -> bool:
    with contextlib.suppress(rdmaxfer.PeerLost, rdmaxfer.NotConnected, rdmaxfer.TimeoutExpired):
        rx.recv(timeout=0.05).release()
    return rx.statistics().peers == 0


@BINDS
def test_a_peer_that_does_not_come_back_is_given_up_with_the_numbers(bind: str) -> None:
    """Both sides only wait for so long."""
    changes: list[rdmaxfer.StateChange] = []
    with rdmaxfer.Sender(**OPTIONS, reconnect_s=2.0, on_state=changes.append) as tx:
        rx = rdmaxfer.Receiver(**OPTIONS)
        bound, connecting = (rx, tx) if bind == "receiver" else (tx, rx)
        connecting.connect(bound.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        tx.wait_for_peers(1, timeout=TIMEOUT_S)
        push(tx, 3)
        held = rx.recv(timeout=TIMEOUT_S)
        crash(rx)
        with pytest.raises(rdmaxfer.PeerLost) as caught:
            tx.flush(timeout=TIMEOUT_S)
        assert caught.value.unreleased == (0, 1, 2)
        del held
        wait_until(lambda: [change.state for change in changes] == ["connected", "reconnecting", "lost"], "on_state")
        assert tx.statistics().reconnecting == 0


@BINDS
def test_close_tells_which_frames_a_peer_that_is_away_has_not_got(bind: str) -> None:
    with rdmaxfer.Receiver(**OPTIONS, reconnect=False) as rx:
        tx = rdmaxfer.Sender(**OPTIONS)
        bound, connecting = (rx, tx) if bind == "receiver" else (tx, rx)
        connecting.connect(bound.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        tx.wait_for_peers(1, timeout=TIMEOUT_S)
        push(tx, 2)
        crash(rx)
        push(tx, 1)
        with pytest.raises(rdmaxfer.PeerLost) as caught:
            tx.close(timeout=3)
        assert caught.value.unreleased == (0, 1, 2)
        assert tx.closed


def test_a_restarted_bound_receiver_gets_what_was_not_released() -> None:
    with rdmaxfer.Sender(**OPTIONS) as tx:
        first = rdmaxfer.Receiver(**OPTIONS, reconnect=False)
        endpoint = first.bind("tcp://127.0.0.1:*")
        tx.connect(endpoint, timeout=TIMEOUT_S)
        push(tx, 5)
        for _ in range(2):
            first.recv(timeout=TIMEOUT_S).release()
        wait_until(lambda: bool(_flushes(tx) or tx.statistics().unreleased == 3), "two are released")
        crash(first)
        with rdmaxfer.Receiver(**OPTIONS) as second:
            second.bind(endpoint)
            take(second, 2, 5)
            push(tx, 3)
            take(second, 5, 8)
            tx.flush(timeout=TIMEOUT_S)


def _flushes(tx: rdmaxfer.Sender) -> bool:
    with contextlib.suppress(rdmaxfer.TimeoutExpired):
        tx.flush(timeout=0.05)
        return True
    return False


def test_a_named_receiver_goes_on_where_its_predecessor_was() -> None:
    with rdmaxfer.Sender(**OPTIONS) as tx:
        endpoint = tx.bind("tcp://127.0.0.1:*")
        first = rdmaxfer.Receiver(**OPTIONS, name="worker", reconnect=False)
        first.connect(endpoint, timeout=TIMEOUT_S)
        tx.wait_for_peers(1, timeout=TIMEOUT_S)
        push(tx, 5)
        for _ in range(2):
            first.recv(timeout=TIMEOUT_S).release()
        wait_until(lambda: bool(_flushes(tx) or tx.statistics().unreleased == 3), "two are released")
        crash(first)
        with rdmaxfer.Receiver(**OPTIONS, name="worker") as second, rdmaxfer.Receiver(**OPTIONS) as other:
            second.connect(endpoint, timeout=TIMEOUT_S)
            other.connect(endpoint, timeout=TIMEOUT_S)
            tx.wait_for_peers(2, timeout=TIMEOUT_S)
            take(second, 2, 5)
            push(tx, 3)
            take(second, 5, 8)
            take(other, 5, 8)
            tx.flush(timeout=TIMEOUT_S)


def test_two_receivers_of_one_name_are_told_so() -> None:
    with rdmaxfer.Sender(**OPTIONS) as tx, rdmaxfer.Receiver(**OPTIONS, name="worker") as first:
        endpoint = tx.bind("tcp://127.0.0.1:*")
        first.connect(endpoint, timeout=TIMEOUT_S)
        tx.wait_for_peers(1, timeout=TIMEOUT_S)
        push(tx, 2)
        with rdmaxfer.Receiver(**OPTIONS, name="worker") as second:
            second.connect(endpoint, timeout=TIMEOUT_S)
            held = [first.recv(timeout=TIMEOUT_S) for _ in range(2)]
            with pytest.raises(rdmaxfer.PeerLost, match="replaced"):
                first.recv(timeout=TIMEOUT_S)
            del held
            take(second, 0, 2)
            push(tx, 2)
            take(second, 2, 4)
            assert first.statistics().reconnecting == 0


def test_a_restarted_sender_is_another_one() -> None:
    with rdmaxfer.Receiver(**OPTIONS) as rx:
        first = rdmaxfer.Sender(**OPTIONS, reconnect=False)
        endpoint = first.bind("tcp://127.0.0.1:*")
        rx.connect(endpoint, timeout=TIMEOUT_S)
        first.wait_for_peers(1, timeout=TIMEOUT_S)
        push(first, 5)
        take(rx, 0, 3)
        crash(first)
        with rdmaxfer.Sender(**OPTIONS) as second:
            second.bind(endpoint)
            second.wait_for_peers(1, timeout=TIMEOUT_S)
            push(second, 3)
            seqs = [frame.seq for _ in range(5) if (frame := rx.recv(timeout=TIMEOUT_S)).release() is None]
            assert seqs in ([3, 4, 0, 1, 2], [0, 1, 2]), seqs


def test_a_sender_that_gave_up_a_receiver_tells_it_what_it_missed() -> None:
    with rdmaxfer.Sender(**OPTIONS, reconnect=False) as tx, rdmaxfer.Receiver(**OPTIONS) as rx:
        rx.connect(tx.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        tx.wait_for_peers(1, timeout=TIMEOUT_S)
        push(tx, 2)
        take(rx, 0, 2)
        tx.flush(timeout=TIMEOUT_S)
        break_link(tx)
        tx.push(picture(2), timeout=TIMEOUT_S)  # not noticed yet, or the loss of this frame is told
        with contextlib.suppress(rdmaxfer.PeerLost):
            tx.flush(timeout=0.5)
        wait_until(lambda: rx.statistics().reconnects == 1, "the receiver came back")
        wait_until(lambda: tx.statistics().peers == 1, "the sender saw it")
        seq = tx.push(picture(9), timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.seq == seq
            assert frame.gap == (rdmaxfer.Gap(2, seq - 1, ("not_connected",)) if seq > 2 else None)
