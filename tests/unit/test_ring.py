"""Slots, lanes and credits: both ends of a ring always agree, whatever order leases end in, however late credits are seen, and
however far one lane is ahead of another."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rdmaxfer.errors import LocalProtocolError, RemoteProtocolError
from rdmaxfer.inband import EPOCH_MODULUS
from rdmaxfer.ring import RecvRing, SendRing


class TwoEnds(RuleBasedStateMachine):
    """A sender and a receiver joined by lanes that are each in order, as reliable connections are, and by one way back."""

    @initialize(slots=st.sampled_from([1, 2, 3, 4, 7, 16]), lanes=st.sampled_from([1, 2, 3, 8]))
    def begin(self, slots: int, lanes: int) -> None:
        self.slots = slots
        self.send = SendRing(slots, lanes)
        self.recv = RecvRing(slots, lanes)
        self.wire: list[deque[tuple[int, int, int]]] = [deque() for _ in range(lanes)]
        self.arrived: dict[int, int] = {}
        self.credits: deque[int] = deque()
        self.uncompleted: list[deque[int]] = [deque() for _ in range(lanes)]
        self.memory: dict[int, int] = {}
        self.leased: set[int] = set()
        self.epoch = 0
        self.delivered = 0

    @precondition(lambda self: self.send.can_take())
    @rule()
    def write(self) -> None:
        position = self.send.take()
        slot = position % self.slots
        assert slot not in self.memory, "a slot was written while its frame was held"
        self.memory[slot] = position
        lane = position % self.send.lanes
        self.wire[lane].append((self.epoch % EPOCH_MODULUS, slot, position))
        self.uncompleted[lane].append(position)

    @precondition(lambda self: any(self.uncompleted))
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        queue = data.draw(st.sampled_from([each for each in self.uncompleted if each]))
        for _ in range(data.draw(st.integers(1, len(queue)))):
            last = queue.popleft()
        self.send.on_completed(last)
        first = min((each[0] for each in self.uncompleted if each), default=self.send.position)
        assert self.send.completed <= first, "memory that the device still reads was taken for free"

    @precondition(lambda self: any(self.wire))
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        self._arrive(data.draw(st.sampled_from([lane for lane, wire in enumerate(self.wire) if wire])))

    def _arrive(self, lane: int) -> None:
        epoch, slot, written = self.wire[lane].popleft()
        position = self.recv.check_arrival(lane, slot)
        assert position == written
        self.recv.next_on[lane] = position + self.recv.lanes
        self.arrived[position] = epoch
        while (position := self.recv.received) in self.arrived:
            self.recv.epoch = self.recv.check_epoch(self.arrived.pop(position))
            self.recv.received = position + 1
            assert position == self.delivered
            self.delivered += 1
            self.leased.add(position)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        position = data.draw(st.sampled_from(sorted(self.leased)))
        self.leased.remove(position)
        del self.memory[position % self.slots]
        self.recv.release(position)
        if self.recv.credit_due():
            self.credits.append(self.recv.released)
            self.recv.on_announced(self.recv.released)

    @precondition(lambda self: self.credits)
    @rule()
    def credit(self) -> None:
        self.send.on_credit(self.credits.popleft())

    @precondition(lambda self: self.recv.spare_epoch == self.epoch)
    @rule()
    def resize(self) -> None:
        self.epoch = self.recv.offer()

    @invariant()
    def never_ahead(self) -> None:
        if hasattr(self, "send"):
            assert 0 <= self.send.credit <= self.slots
            assert self.send.released <= self.recv.released <= self.recv.received <= self.send.position

    def teardown(self) -> None:
        if not hasattr(self, "send"):
            return
        for lane, wire in enumerate(self.wire):
            while wire:
                self._arrive(lane)
        assert not self.arrived, "a frame is missing between others"
        for position in sorted(self.leased):
            self.recv.release(position)
            if self.recv.credit_due(asked=True):
                self.credits.append(self.recv.released)
                self.recv.on_announced(self.recv.released)
        if self.recv.credit_due(asked=True):
            self.credits.append(self.recv.released)
        while self.credits:
            self.credit()
        assert self.send.released == self.send.position, "the sender was not told that everything is released"


TwoEnds.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestTwoEnds = TwoEnds.TestCase


@given(slots=st.integers(1, 64), sent=st.integers(0, 64), lie=st.integers(0, 1 << 64))
def test_a_credit_that_goes_back_or_ahead_is_refused(slots: int, sent: int, lie: int) -> None:
    ring = SendRing(slots)
    for _ in range(min(sent, slots)):
        ring.take()
    if lie > ring.position:
        with pytest.raises(RemoteProtocolError):
            ring.on_credit(lie)
    else:
        ring.on_credit(lie)
        if lie:
            with pytest.raises(RemoteProtocolError):
                ring.on_credit(lie - 1)


def test_a_repeated_credit_is_harmless() -> None:
    ring = SendRing(4)
    ring.take()
    ring.on_credit(1)
    ring.on_credit(1)
    assert ring.credit == 4


def test_no_frame_is_written_without_credit() -> None:
    ring = SendRing(2)
    ring.take()
    ring.take()
    with pytest.raises(LocalProtocolError):
        ring.take()


def test_a_slot_is_reused_only_after_its_completion() -> None:
    ring = SendRing(1)
    ring.take()
    ring.on_credit(1)
    assert not ring.can_take()
    ring.on_completed(0)
    assert ring.can_take()


@given(lane=st.integers(0, 2), slot=st.integers(0, 1 << 16))
def test_only_the_next_slot_of_the_lane_is_accepted(lane: int, slot: int) -> None:
    ring = RecvRing(8, lanes=3)
    if slot == lane:
        assert ring.check_arrival(lane, slot) == lane
    else:
        with pytest.raises(RemoteProtocolError):
            ring.check_arrival(lane, slot)


@given(epoch=st.integers(0, EPOCH_MODULUS - 1))
def test_only_a_known_epoch_is_accepted(epoch: int) -> None:
    ring = RecvRing(8)
    ring.offer()
    if epoch < 2:
        assert ring.check_epoch(epoch) == epoch
    else:
        with pytest.raises(RemoteProtocolError):
            ring.check_epoch(epoch)


def test_a_frame_without_credit_is_refused() -> None:
    ring = RecvRing(2, lanes=2)
    for lane in (0, 1):
        ring.next_on[lane] = ring.check_arrival(lane, lane) + 2
    for lane in (0, 1):
        with pytest.raises(RemoteProtocolError, match="without credit"):
            ring.check_arrival(lane, lane)


def test_a_lane_can_not_run_ahead_of_the_credit() -> None:
    ring = RecvRing(4, lanes=2)
    for slot in (1, 3):
        ring.next_on[1] = ring.check_arrival(1, slot) + 2
    with pytest.raises(RemoteProtocolError, match="without credit"):
        ring.check_arrival(1, 1)
    assert ring.check_arrival(0, 0) == 0


def test_there_is_no_way_back_to_an_older_epoch() -> None:
    ring = RecvRing(4)
    ring.offer()
    ring.epoch = ring.check_epoch(1)
    with pytest.raises(RemoteProtocolError, match="epoch"):
        ring.check_epoch(0)


def test_releasing_twice_is_harmless() -> None:
    ring = RecvRing(4)
    ring.received = 3
    for _ in range(2):
        ring.release(1)
        assert ring.released == 0
    for _ in range(2):
        ring.release(0)
        assert ring.released == 2
    with pytest.raises(LocalProtocolError):
        ring.release(3)


def test_credit_is_coalesced_while_frames_are_held() -> None:
    ring = RecvRing(16)
    ring.received = 10
    due = []
    for position in range(9):
        ring.release(position)
        if ring.credit_due():
            due.append(ring.released)
            ring.on_announced(ring.released)
    assert due == [8]
    ring.release(9)
    assert not ring.credit_due()
    assert ring.credit_due(asked=True), "the sender is waiting in flush"


# --- another connection ------------------------------------------------------------------------------------------------


@given(
    slots=st.integers(1, 9),
    lanes=st.integers(1, 4),
    steps=st.lists(st.sampled_from(["write", "arrive", "release", "credit", "break"]), max_size=120),
    choose=st.randoms(use_true_random=False),
)
def test_a_stream_that_goes_on_over_other_connections_loses_and_doubles_nothing(
    slots: int, lanes: int, steps: list[str], choose: Any
) -> None:
    tx, rx = SendRing(slots, lanes), RecvRing(slots, lanes)
    held: list[int] = []
    got: list[int] = []
    for step in [*steps, "break", *["write", "arrive", "release", "credit"] * (slots + 2)]:
        if step == "write" and tx.can_take():
            tx.on_completed(tx.take())
        elif step == "arrive" and rx.received < tx.position:
            lane = rx.received % rx.lanes
            position = rx.check_arrival(lane, rx.received % rx.slots)
            assert position == rx.received
            rx.next_on[lane] += rx.lanes
            rx.received += 1
            got.append(position)
            held.append(position)
        elif step == "release" and held:
            rx.release(held.pop(choose.randrange(len(held))))
        elif step == "credit":
            tx.on_credit(rx.released)
            rx.on_announced(rx.released)
        elif step == "break":
            # What was written and has not arrived is gone; the ring may have other sizes.
            least = max(1, rx.received - rx.released)
            slots, lanes = choose.randint(least, least + 8), choose.randint(1, 4)
            released, received = rx.released, rx.received
            tx.check_resume(released, received, slots)
            tx.resume(slots, lanes, released, received)
            epoch = rx.spare_epoch
            rx.resume(slots, lanes, released)
            assert rx.epoch == rx.spare_epoch == epoch + 1
            assert (tx.position, tx.released) == (received, released)
    assert got == list(range(len(got)))
    assert rx.released == min(held, default=rx.received)


@pytest.mark.parametrize(
    ("released", "received", "slots"),
    [(1, 5, 8), (6, 5, 8), (2, 11, 16), (9, 11, 8), (2, 10, 7)],
    ids=[
        "goes back",
        "more released than received",
        "from the future",
        "both from the future",
        "too many for the ring",
    ],
)
def test_a_receiver_that_can_not_have_what_it_says(released: int, received: int, slots: int) -> None:
    ring = SendRing(8)
    for _ in range(2):
        ring.on_completed(ring.take())
    ring.on_credit(2)
    for _ in range(8):
        ring.on_completed(ring.take())
    ring.check_resume(2, 10, 8)
    with pytest.raises(RemoteProtocolError):
        ring.check_resume(released, received, slots)


def test_more_frames_are_held_than_the_next_ring_has_slots() -> None:
    ring = RecvRing(4)
    for position in range(3):
        ring.next_on[0] = ring.received = position + 1
    ring.resume(3, 1, 0)
    with pytest.raises(RemoteProtocolError):
        ring.resume(2, 1, 0)
