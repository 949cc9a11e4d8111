"""Peers that lie: they speak the handshake properly, with rdmaxfer's own parts, and then break every rule of the data plane.

Each is dropped with a reason, the streams of the others go on, and nothing of it stays behind.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from helpers import TIMEOUT_S, Background, picture, resources, wait_until, warm_up

import rdmaxfer
from rdmaxfer import frame as framing
from rdmaxfer import inband
from rdmaxfer.cm import messages
from rdmaxfer.cm.messages import (
    Accept,
    Bye,
    Gone,
    Hello,
    Progress,
    Ready,
    Renew,
    Renewed,
    Resized,
    RingAddress,
    Started,
)
from rdmaxfer.fabric.devices import Route
from rdmaxfer.fabric.poller import Poller
from rdmaxfer.fabric.verbs import Domain, Endpoint
from rdmaxfer.handshake import address_of
from rdmaxfer.memory import Buffer

pytestmark = pytest.mark.verbs

SLOTS = 4
SLOT_BYTES = 8192
LARGEST = messages.MAX_SLOT_BYTES


class Rogue:
    """What a hostile sender and a hostile receiver share: queue pairs, memory, a REQ or REP socket."""

    role: Any = "sender"

    def __init__(self, route: Route, *, recv_depth: int = 64, lanes: int = 1) -> None:
        self.session = secrets.token_bytes(16)
        self.node = secrets.token_bytes(16)
        self.request = 0
        self._at = 0
        self.lease_s = 5.0
        self._stack = contextlib.ExitStack()
        domain = self._stack.enter_context(Domain(route))
        pd = domain.protection_domain()
        self.endpoint = Endpoint(
            pd,
            route,
            send_depth=256,
            recv_depth=recv_depth,
            recv_bytes=64,
            lanes=lanes,
            remote_write=self.role == "receiver",
        )
        self.buffer = Buffer(1 << 20)
        self.region = pd.register(self.buffer, remote_write=True)
        self.poller = self._stack.enter_context(Poller())
        self.poller.watch([self.endpoint])
        context = self._stack.enter_context(zmq.Context())
        self.socket = self._stack.enter_context(context.socket(zmq.REP if self.role == "receiver" else zmq.REQ))
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.endpoint.drain(5)
        self._stack.close()

    def join(self, theirs: messages.VerbsAddress, path_mtu: int) -> None:
        pairs = [(each.qp_num, each.psn) for each in theirs.queue_pairs]
        self.endpoint.connect(
            queue_pairs=pairs[: self.endpoint.lanes], gid=theirs.gid, lid=theirs.lid, path_mtu=path_mtu
        )

    def completions(self, count: int) -> list[Any]:
        """The next completions, at least `count`, as (status, is_recv, wr_id, byte_len)."""
        found: list[Any] = []
        deadline = time.monotonic() + TIMEOUT_S
        while len(found) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count} completions came"
            self.poller.wait(0, 0.1)
            found += [(wc.status, bool(wc.is_recv), wc.wr_id, wc.byte_len) for _, wc in self.poller.found()]
            self.poller.clear()
        return found


class RogueSender(Rogue):
    """Connects to a Receiver."""

    role = "sender"
    ring: RingAddress

    def ask(self, kind: Any, **fields: Any) -> Any:
        self.request += 1
        self.socket.send(messages.encode(kind(session=self.session, request=self.request, **fields)))
        return messages.decode(self.socket.recv())

    def hello(self, endpoint: str, **fields: Any) -> Any:
        self.socket.connect(endpoint)
        wishes = {
            "role": self.role,
            "node": secrets.token_bytes(16),
            "stream": secrets.token_bytes(16),
            "attempt": 1,
            "identity": "",
            "resume": None,
            "fabrics": (address_of(self.endpoint),),
            "slots": SLOTS,
            "slot_bytes": SLOT_BYTES,
            "max_slot_bytes": 1 << 30,
            "lease_s": self.lease_s,
            "reconnect_s": 0.0,
            "name": "rogue",
        }
        return self.ask(Hello, **{**wishes, **fields})

    def meet(self, endpoint: str) -> RogueSender:
        """The whole handshake, as it should be."""
        accept = self.hello(endpoint)
        assert isinstance(accept, Accept), accept
        self.join(accept.fabric, accept.path_mtu)
        assert accept.ring is not None
        self.ring = accept.ring
        assert isinstance(self.ask(Ready, ring=None), Started)
        return self

    def header(
        self, *, position: int = 0, slot: int | None = None, shape: tuple[int, ...] = (16,), epoch: int = 0
    ) -> bytes:
        """The header block of a good frame of bytes."""
        kind = framing.frame_type(shape, np.uint8)
        block = bytearray(framing.HEADER_ROOM)
        size = kind.pack_into(
            memoryview(block),
            framing.HEADER_ROOM,
            epoch=epoch,
            slot=position % self.ring.slots if slot is None else slot,
            seq=position,
            position=position,
            captured_ns=0,
            pushed_ns=0,
            metadata=b"",
        )
        return bytes(block[-size:])

    def write(
        self, header: bytes, *, payload: bytes = bytes(16), slot: int = 0, imm: int | None = None, lane: int = 0
    ) -> None:
        """Write a frame into a slot of the receiver's ring."""
        data = header + payload
        self._at = (self._at + 4096) % (1 << 19)  # the device may read what was written before only later
        start = self.buffer.address + self._at
        self.buffer.view(self._at, len(data))[:] = data
        if imm is None:
            imm = inband.pack_frame_imm(0, len(header), slot)
        self.endpoint.write(
            start,
            len(header),
            self.region.lkey,
            start + len(header),
            len(payload),
            self.region.lkey,
            self.ring.address + slot * self.ring.slot_stride + self.ring.payload_offset - len(header),
            self.ring.rkey,
            imm,
            1,
            True,
            lane,
        )

    def good_frame(self, position: int) -> None:
        lane = position % self.endpoint.lanes
        self.write(self.header(position=position), slot=position % self.ring.slots, lane=lane)


class RogueReceiver(Rogue):
    """A Sender connects to it. `serve` answers the handshake, and renewals from then on, in a thread of its own."""

    role = "receiver"

    def __init__(self, route: Route, **options: Any) -> None:
        super().__init__(route, **options)
        self.socket.setsockopt(zmq.RCVTIMEO, 50)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.where = f"tcp://127.0.0.1:{port}"
        self.ring_changes: dict[str, int] = {}
        self.answer: Callable[[Any], Any] = self.honest
        self._over = False
        self.ended = False
        self._thread = Background(self._serve)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._over = True
        try:
            self._thread.result()
        finally:
            super().__exit__(kind, value, tb)

    def ring(self, epoch: int = 0, slot_bytes: int = SLOT_BYTES) -> RingAddress:
        stride = framing.HEADER_ROOM + -(-slot_bytes // 4096) * 4096
        fields = {
            "address": self.buffer.address,
            "rkey": self.region.rkey,
            "slots": SLOTS,
            "slot_bytes": slot_bytes,
            "slot_stride": stride,
            "payload_offset": framing.HEADER_ROOM,
            "epoch": epoch,
        }
        return RingAddress(**{**fields, **self.ring_changes})

    def honest(self, request: Any) -> Any:
        envelope = {"session": request.session, "request": request.request}
        if isinstance(request, Hello):
            theirs = request.fabrics[0]
            mine = address_of(self.endpoint)
            self.join(theirs, min(mine.active_mtu, theirs.active_mtu))
            return Accept(
                **envelope,
                role="receiver",
                node=self.node,
                start=Progress(released=0, received=0),
                fabric=mine,
                reason="",
                path_mtu=min(mine.active_mtu, theirs.active_mtu),
                max_msg_sz=min(mine.max_msg_sz, theirs.max_msg_sz),
                slots=SLOTS,
                slot_bytes=SLOT_BYTES,
                max_slot_bytes=1 << 30,
                lease_s=request.lease_s,
                name="rogue",
                ring=self.ring(),
            )
        if isinstance(request, Ready):
            return Started(**envelope)
        if isinstance(request, Renew):
            return Renewed(**envelope, wanted_bytes=0)
        if isinstance(request, Bye):
            self.ended = True
            return Gone(**envelope)
        return Resized(**envelope, ring=self.ring(1, request.wanted_bytes))

    def _serve(self) -> None:
        last = None
        reply = b""
        while not self._over:
            try:
                data = self.socket.recv()
            except zmq.Again:
                continue
            if data != last:
                last, answer = data, self.answer(messages.decode(data))
                reply = answer if isinstance(answer, bytes) else messages.encode(answer)
            self.socket.send(reply)

    def say(self, data: bytes) -> None:
        self.endpoint.send_inline(data, 1, True)


def settles(before: dict[str, int]) -> None:
    now: dict[str, int] = {}

    def same() -> bool:
        now.clear()
        now.update(resources())
        return now == before

    wait_until(same, f"the resources are {before} again")


# --- hostile senders ---------------------------------------------------------------------------------------------------


class Stream:
    """A receiver with a well-behaved sender, whose frames must go on arriving."""

    def __init__(self, stack: contextlib.ExitStack, **options: Any) -> None:
        self.rx = stack.enter_context(rdmaxfer.Receiver(slots=SLOTS, slot_bytes=SLOT_BYTES, **options))
        self.endpoint = self.rx.bind("tcp://127.0.0.1:*")
        self.tx = stack.enter_context(rdmaxfer.Sender(slots=SLOTS, **options_for_sender(options)))
        self.tx.connect(self.endpoint, timeout=TIMEOUT_S)
        self.rx.wait_for_peers(1, timeout=TIMEOUT_S)
        self._sent = warm_up(self.tx, self.rx, SLOTS)

    def check(self) -> None:
        """The good stream is unharmed."""
        for _ in range(2 * SLOTS):
            assert self.tx.push(picture(self._sent), timeout=TIMEOUT_S) == self._sent
            with self.rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.seq == self._sent
                assert frame.peer != "rogue"
                assert frame.array.tobytes() == picture(self._sent).tobytes()
            self._sent += 1
        self.tx.flush(timeout=TIMEOUT_S)


def options_for_sender(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in ("lease_s", "device")}


@pytest.fixture
def stream() -> Iterator[Stream]:
    with contextlib.ExitStack() as stack:
        made = Stream(stack)
        made.check()
        yield made


def patched(header: bytes, form: str, at: int, *values: Any) -> bytes:
    block = bytearray(header)
    struct.pack_into(form, block, at, *values)
    return bytes(block)


LIES: dict[str, tuple[Callable[[RogueSender], None], str]] = {
    "wrong slot in the immediate": (lambda r: r.write(r.header(), slot=2), "wrote slot 2, but slot 0"),
    "slot beyond the ring": (
        lambda r: r.write(r.header(), imm=inband.pack_frame_imm(0, 128, 65535)),
        "wrote slot 65535",
    ),
    "wrong slot in the header": (lambda r: r.write(r.header(slot=3)), "expected frame 0"),
    "wrong position": (lambda r: r.write(patched(r.header(), "<Q", 32, 1 << 60)), "expected frame 0"),
    "wrong epoch in the immediate": (
        lambda r: r.write(r.header(), imm=inband.pack_frame_imm(5, 128, 0)),
        "epoch 5",
    ),
    "wrong epoch in the header": (lambda r: r.write(r.header(epoch=7)), "ring 7"),
    "garbage for a header": (lambda r: r.write(b"\xa5" * 128), "no frame header"),
    "header of length 0": (lambda r: r.write(r.header(), imm=inband.pack_frame_imm(0, 0, 0)), "header of 0 bytes"),
    "header longer than its room": (
        lambda r: r.write(r.header(), imm=inband.pack_frame_imm(0, 255 * 64, 0)),
        "announced a frame header of",
    ),
    "header of another version": (lambda r: r.write(patched(r.header(), "<B", 4, 9)), "version 9"),
    "payload beyond the slot": (lambda r: r.write(r.header(shape=(SLOT_BYTES + 1,))), "the slot has 8192"),
    "payload and shape that differ": (lambda r: r.write(patched(r.header(), "<Q", 40, 15)), "the header says 15"),
    "more bytes than the header says": (
        lambda r: r.write(r.header(), payload=bytes(17)),
        "wrote 145 bytes for a frame of 144",
    ),
    "a shape that overflows": (
        lambda r: r.write(patched(r.header(shape=(4, 4)), "<QQ", 64, 1 << 63, 2)),
        "not allowed",
    ),
    "more dimensions than there can be": (lambda r: r.write(patched(r.header(), "<B", 5, 200)), "200 dimensions"),
    "an unknown dtype": (lambda r: r.write(r.header().replace(b"|u1", b"|O8")), "not allowed"),
    "an immediate of no kind": (lambda r: r.write(r.header(), imm=0x1234), "no known kind"),
    "an immediate out of nowhere": (
        lambda r: r.endpoint.write_imm(inband.pack_frame_imm(0, 128, 0), 1),
        "no frame header",
    ),
    "a resize in the wrong way": (lambda r: r.endpoint.write_imm(inband.pack_resize_imm(1 << 20), 1), "RESIZE"),
    "a message": (lambda r: r.endpoint.send_inline(bytes(16), 1, True), "broke"),
    "an empty message": (lambda r: r.endpoint.send_inline(b"", 1, True), "only frames"),
    "frames without credit": (lambda r: [r.good_frame(i) for i in range(SLOTS)] and None, "without credit"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_sender_is_dropped_with_a_reason_and_harms_nobody(
    lie: str, stream: Stream, route: Route, caplog: pytest.LogCaptureFixture
) -> None:
    act, reason = LIES[lie]
    before = resources()
    with caplog.at_level(logging.WARNING, "rdmaxfer"), RogueSender(route) as rogue:
        rogue.meet(stream.endpoint)
        stream.rx.wait_for_peers(2, timeout=TIMEOUT_S)
        act(rogue)
        held: list[rdmaxfer.Frame] = []
        if lie == "frames without credit":
            held += [stream.rx.recv(timeout=TIMEOUT_S) for _ in range(SLOTS)]
            rogue.good_frame(SLOTS)

        def dropped() -> bool:
            with contextlib.suppress(rdmaxfer.TimeoutExpired):
                held.append(stream.rx.recv(timeout=0.01))
            return stream.rx.statistics().peers_lost == 1

        wait_until(dropped, "the liar was dropped")
        while stream.rx.statistics().leased > len(held):  # what came before the lie is good
            held.append(stream.rx.recv(timeout=TIMEOUT_S))
        assert len(held) == (SLOTS if lie == "frames without credit" else 0)
        assert re.search(re.escape(reason), caplog.text), caplog.text
        assert "rogue" in caplog.text
        stream.check()
        # The control thread ends the session; a renewal that comes just before is still answered.
        wait_until(lambda: isinstance(rogue.ask(Renew), messages.Refuse), "the session has ended")
        for frame in held:
            frame.release()
    assert stream.rx.statistics().peers == 1
    settles(before)
    stream.check()


def _bye(rogue: RogueSender, *lanes: int) -> None:
    for lane in lanes:
        rogue.endpoint.write_imm(inband.pack_bye_imm(), 1, lane)


def _frames(rogue: RogueSender, *positions: int) -> None:
    for position in positions:
        rogue.good_frame(position)


def _bad_behind_a_gap(rogue: RogueSender) -> None:
    rogue.write(rogue.header(position=1, slot=3), slot=1, lane=1)
    _frames(rogue, 3, 0)


LANE_LIES: dict[str, tuple[list[Callable[[RogueSender], None]], list[int], str]] = {
    "a frame on the wrong lane": ([lambda r: r.write(r.header(), lane=1)], [], "wrote slot 0, but slot 1"),
    "one lane far ahead": ([lambda r: _frames(r, 1, 3, 5)], [], "without credit"),
    "a goodbye that leaves out a frame": (
        [lambda r: _frames(r, 0, 1, 3), lambda r: _bye(r, 0, 1)],
        [0, 1],
        "left out frames",
    ),
    "a bad frame behind a gap": ([_bad_behind_a_gap], [0], "expected frame 1"),
}


@pytest.mark.parametrize("lie", LANE_LIES)
def test_a_sender_that_lies_about_its_lanes_is_dropped_and_harms_nobody(
    lie: str, stream: Stream, route: Route, caplog: pytest.LogCaptureFixture
) -> None:
    acts, good, reason = LANE_LIES[lie]
    before = resources()
    with caplog.at_level(logging.WARNING, "rdmaxfer"), RogueSender(route, lanes=2) as rogue:
        rogue.meet(stream.endpoint)
        assert rogue.endpoint.lanes == 2
        stream.rx.wait_for_peers(2, timeout=TIMEOUT_S)
        for act in acts:
            act(rogue)
        held: list[rdmaxfer.Frame] = []

        def dropped() -> bool:
            with contextlib.suppress(rdmaxfer.TimeoutExpired):
                held.append(stream.rx.recv(timeout=0.01))
            return stream.rx.statistics().peers_lost == 1 and len(held) == len(good)

        wait_until(dropped, "the liar was dropped, and what came before was not lost")
        assert [frame.seq for frame in held] == good
        assert re.search(re.escape(reason), caplog.text), caplog.text
        for frame in held:
            frame.release()
        stream.check()
    settles(before)


def test_a_goodbye_counts_when_it_came_on_every_lane(stream: Stream, route: Route) -> None:
    with RogueSender(route, lanes=2) as rogue:
        rogue.meet(stream.endpoint)
        rogue.good_frame(0)
        _bye(rogue, 0, 0)
        for position in range(2):
            with stream.rx.recv(timeout=TIMEOUT_S) as frame:
                assert (frame.peer, frame.seq) == ("rogue", position)
            if position == 0:  # the other lane goes on
                assert not poll(stream.rx)
                assert stream.rx.statistics().peers == 2
                rogue.good_frame(1)
        _bye(rogue, 1)
        wait_until(lambda: not poll(stream.rx) and stream.rx.statistics().peers == 1, "the goodbye was seen")
        assert stream.rx.statistics().peers_lost == 0
        stream.check()


def test_a_sender_that_says_bye_twice_is_gone_once(stream: Stream, route: Route) -> None:
    before = resources()
    with RogueSender(route) as rogue:
        rogue.meet(stream.endpoint)
        rogue.good_frame(0)
        for _ in range(2):
            rogue.endpoint.write_imm(inband.pack_bye_imm(), 1)
        with stream.rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.peer == "rogue"
        wait_until(lambda: not poll(stream.rx) and stream.rx.statistics().peers == 1, "the goodbye was seen")
        first = rogue.ask(Bye, end="goodbye", reason="once")
        second = rogue.ask(Bye, end="goodbye", reason="twice")
        assert isinstance(first, Gone | messages.Refuse)
        assert isinstance(second, messages.Refuse)
        stream.check()
    settles(before)
    assert stream.rx.statistics().peers_lost == 0


def poll(rx: rdmaxfer.Receiver) -> bool:
    """Whether there is a frame; takes it."""
    try:
        rx.recv(timeout=0.01).release()
    except rdmaxfer.TimeoutExpired:
        return False
    return True


@pytest.mark.parametrize("stage", ["hello", "ready", "frames"])
def test_a_sender_that_dies_during_the_handshake_or_after_leaves_nothing(stage: str, route: Route) -> None:
    with contextlib.ExitStack() as stack:
        stream = Stream(stack)
        before = resources()
        with RogueSender(route) as rogue:
            rogue.lease_s = 1.0
            if stage == "hello":
                assert isinstance(rogue.hello(stream.endpoint), Accept)
            else:
                rogue.meet(stream.endpoint)
                if stage == "frames":
                    for position in range(SLOTS):
                        rogue.good_frame(position)
                    rogue.completions(SLOTS)
        kept = [stream.rx.recv(timeout=TIMEOUT_S) for _ in range(SLOTS if stage == "frames" else 0)]
        assert [frame.seq for frame in kept] == list(range(len(kept)))
        # While its lease, or the 10 s for a handshake, run out, the other stream goes on.
        deadline = time.monotonic() + TIMEOUT_S
        stream.check()
        while resources() != before:
            assert time.monotonic() < deadline, f"{resources()} is not {before}"
        for frame in kept:
            assert frame.array.tobytes() == bytes(16), "memory was taken away under a view"
            frame.release()
        stream.check()


def test_a_sender_that_never_polls_and_posts_no_receives_does_not_hold_up_anybody(stream: Stream, route: Route) -> None:
    before = resources()
    with RogueSender(route, recv_depth=1) as rogue:
        rogue.meet(stream.endpoint)
        for position in range(10 * SLOTS):  # takes the credit for granted, which it does not read
            if position >= SLOTS:
                wait_until(lambda want=position - SLOTS + 1: released(stream.rx) >= want, "room")
            rogue.good_frame(position)
            with stream.rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.peer == "rogue"
        stream.check()
        began = time.monotonic()
        stream.rx.close()
        assert time.monotonic() - began < 10
    assert before


def released(rx: rdmaxfer.Receiver) -> int:
    with rx._lock:
        return max(link.ring.announced for link in rx._links if link.peer == "rogue")


def test_many_senders_that_say_goodbye_only_on_the_control_plane_do_not_cost_others_their_lease(route: Route) -> None:
    with contextlib.ExitStack() as stack:
        stream = Stream(stack, lease_s=1.0)
        rogues = [stack.enter_context(RogueSender(route)).meet(stream.endpoint) for _ in range(4)]
        stream.rx.wait_for_peers(5, timeout=TIMEOUT_S)
        for rogue in rogues:
            rogue.socket.send(
                messages.encode(
                    Bye(
                        session=rogue.session,
                        request=rogue.request + 1,
                        end="goodbye",
                        reason="I never say it in band",
                    )
                )
            )
        wait_until(lambda: not poll(stream.rx) and stream.rx.statistics().peers == 1, "the rogues are gone")
        stream.check()
        assert stream.tx.statistics().peers_lost == 0
        assert stream.rx.statistics().peers_lost == 0


# --- hostile receivers -------------------------------------------------------------------------------------------------


def credit(value: int) -> bytes:
    return inband.pack_message(inband.MessageKind.CREDIT, value)


TALES: dict[str, tuple[list[bytes], str]] = {
    "credit from the future": ([credit(3)], "gave credit for 3 frames, after 0, when 2 were written"),
    "all the credit there is": ([credit((1 << 64) - 1)], "gave credit for"),
    "credit that goes back": ([credit(2), credit(1)], "gave credit for 1 frames, after 2"),
    "a message of no kind": ([b"\x09" + bytes(15)], "unknown kind 9"),
    "a short message": ([b"\x01"], "of 1 bytes"),
    "an empty message": ([b""], "of 0 bytes"),
    "a message that is too long": ([bytes(64)], "broke"),
    "a goodbye with credit from the future": (
        [inband.pack_message(inband.MessageKind.BYE, 1 << 40)],
        "gave credit for",
    ),
}


@pytest.mark.parametrize("tale", TALES)
def test_a_lying_receiver_is_dropped_with_a_reason_and_harms_nobody(tale: str, route: Route) -> None:
    messages_sent, reason = TALES[tale]
    with rdmaxfer.Sender(slots=SLOTS, reconnect=False) as tx, rdmaxfer.Receiver(slots=SLOTS) as rx:
        tx.connect(rx.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        warm_up(tx, rx, SLOTS)
        before = resources()
        with RogueReceiver(route) as rogue:
            tx.connect(rogue.where, timeout=TIMEOUT_S)
            for seed in range(2):
                assert tx.push(picture(seed), timeout=TIMEOUT_S) == 2 * SLOTS + seed
                with rx.recv(timeout=TIMEOUT_S) as frame:
                    assert frame.array.tobytes() == picture(seed).tobytes()
            for message in messages_sent:
                rogue.say(message)
            with pytest.raises(rdmaxfer.PeerLost, match=re.escape(reason)):  # noqa: PT012
                for _ in range(SLOTS):  # it is reported by the next call, or by one soon after
                    tx.flush(timeout=TIMEOUT_S)
                    tx.push(picture(0), timeout=TIMEOUT_S)
                    rx.recv(timeout=TIMEOUT_S).release()
            for seed in range(10):
                sent = tx.push(picture(seed), timeout=TIMEOUT_S)
                with rx.recv(timeout=TIMEOUT_S) as frame:
                    assert frame.seq == sent
                    assert frame.array.tobytes() == picture(seed).tobytes()
            tx.flush(timeout=TIMEOUT_S)
            wait_until(lambda: rogue.ended, "the rogue was told")
        settles(before)


@pytest.mark.parametrize(
    "change",
    [{"rkey": 0xDEAD}, {"address": 4096}, {"payload_offset": 0}, {"slots": 2}, {"epoch": 9}],
    ids=str,
)
def test_a_ring_that_is_not_there_ends_that_connection_only(change: dict[str, int], route: Route) -> None:
    with rdmaxfer.Sender(slots=SLOTS, reconnect=False) as tx, rdmaxfer.Receiver(slots=SLOTS) as rx:
        tx.connect(rx.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        warm_up(tx, rx, SLOTS)
        before = resources()
        with RogueReceiver(route) as rogue:
            rogue.ring_changes = change
            rogue.answer = lambda request: unchecked(rogue.honest(request))
            try:
                tx.connect(rogue.where, timeout=5)
                tx.push(picture(0), timeout=TIMEOUT_S)
                rx.recv(timeout=TIMEOUT_S).release()
                tx.flush(timeout=TIMEOUT_S)
            except (rdmaxfer.PeerError, rdmaxfer.ConnectTimeout) as error:
                assert "rogue" in str(error) or "ring" in str(error) or rogue.where in str(error), error  # noqa: PT017
            else:
                assert "epoch" in change, "nobody noticed"  # only the numbers that follow count
            for seed in range(5):
                sent = tx.push(picture(seed), timeout=TIMEOUT_S) if "epoch" not in change else None
                if sent is not None:
                    with rx.recv(timeout=TIMEOUT_S) as frame:
                        assert frame.seq == sent
        if "epoch" not in change:
            settles(before)


@pytest.mark.parametrize(
    ("released", "received"), [(3, 3), (0, 3), (1 << 52, 1 << 53 - 1)], ids=["released", "received", "far off"]
)
def test_a_receiver_that_says_it_has_frames_which_were_never_written(
    released: int, received: int, route: Route
) -> None:
    """... when a stream is to go on over another connection."""
    with rdmaxfer.Sender(slots=SLOTS) as tx, RogueReceiver(route) as rogue:
        accepted: list[Accept] = []

        def answer(request: Any) -> Any:
            if isinstance(request, Hello) and accepted:
                start = Progress(released=min(released, received), received=received)
                return msgspec.structs.replace(
                    accepted[0], session=request.session, request=request.request, start=start
                )
            reply = rogue.honest(request)
            if isinstance(reply, Accept):
                accepted.append(reply)
            return reply

        rogue.answer = answer
        tx.connect(rogue.where, timeout=TIMEOUT_S)
        for seed in range(2):
            tx.push(picture(seed), timeout=TIMEOUT_S)
        with tx._lock:
            tx._links[0].endpoint.to_error()
        with pytest.raises(rdmaxfer.PeerLost, match="2 were written") as caught:
            tx.flush(timeout=TIMEOUT_S)
        assert caught.value.unreleased == (0, 1)
        assert tx.statistics().reconnecting == 0


def unchecked(message: Any) -> bytes:
    """The bytes of a message that `encode` would refuse to send."""
    return messages._PREFIX + messages._encoder.encode(message)


def test_a_larger_ring_that_is_too_small_does_not_hold_the_sender_for_ever(route: Route) -> None:
    with rdmaxfer.Sender(slots=SLOTS, lease_s=1.0) as tx, RogueReceiver(route) as rogue:

        def answer(request: Any) -> Any:
            reply = rogue.honest(request)
            if isinstance(reply, Resized):
                return Resized(session=reply.session, request=reply.request, ring=rogue.ring(1, 8192))
            return reply

        rogue.answer = answer
        tx.connect(rogue.where, timeout=TIMEOUT_S)
        with pytest.raises(rdmaxfer.PeerLost, match=r"ring|slots of 8192 bytes"):
            tx.push(np.zeros(20_000, np.uint8), timeout=10)


def test_a_receiver_that_dies_before_it_is_started_fails_the_connect_in_time(route: Route) -> None:
    with rdmaxfer.Sender(slots=SLOTS, lease_s=1.0) as tx, RogueReceiver(route) as rogue:
        rogue.answer = lambda request: b"" if isinstance(request, Ready) else rogue.honest(request)
        began = time.monotonic()
        with pytest.raises(rdmaxfer.PeerError):
            tx.connect(rogue.where, timeout=3)
        assert time.monotonic() - began < 15


def test_memory_that_can_not_be_had_fails_the_one_connection_that_asked_for_it(route: Route) -> None:
    """A ring so large that not even its address space can be had."""
    with contextlib.ExitStack() as stack:
        stream = Stream(stack, max_frame_bytes=LARGEST)
        with RogueSender(route) as rogue:
            answer = rogue.hello(stream.endpoint, slot_bytes=LARGEST, max_slot_bytes=LARGEST)
            if isinstance(answer, Accept):  # with less than it asked for
                assert answer.slot_bytes < LARGEST
            else:
                assert answer.fix
        stream.check()
        with pytest.raises(rdmaxfer.RdmaxferError, match="Fix:"), stream.tx.reserve((LARGEST,), timeout=5):
            pass
        with RogueSender(route) as rogue:
            rogue.meet(stream.endpoint)
            answer = rogue.ask(messages.Resize, wanted_bytes=LARGEST, ring=None)
            assert isinstance(answer, messages.Refuse), answer
            assert answer.code == messages.RefuseCode.FRAME_TOO_LARGE
        stream.check()
