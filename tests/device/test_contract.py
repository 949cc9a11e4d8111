"""What `rdmaxfer.fabric.base` promises of every fabric."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from contract_sides import FABRIC, NBYTES, RECVS, TIMEOUT_S, Side

from rdmaxfer.errors import RdmaxferError

MESSAGE_BYTES = 16


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture(params=["bound", "connecting"])
def sides(request: pytest.FixtureRequest, stack: ExitStack) -> tuple[Side, Side]:
    """Two connected ones: who writes, and who is written to. `param`: which of them writes."""
    source = Side(stack, bound=request.param == "bound", recv_bytes=MESSAGE_BYTES)
    target = Side(stack, bound=request.param != "bound")
    there, here = target.address, source.address
    source.connect(there)
    target.connect(here)
    for side in (source, target):
        side.endpoint.start()
    for side in (source, target):
        side.settle()
    return source, target


def test_a_write_arrives_with_its_immediate(sides: tuple[Side, Side]) -> None:
    source, target = sides
    for size in (8, 9, 100, 4096, NBYTES):
        data = os.urandom(size)
        source.write(data, imm=size, wr_id=size)
        (came,) = target.take(1)
        assert (came["is_recv"], came["status"], came["has_imm"], came["imm"]) == (True, 0, True, size)
        assert came["byte_len"] == size
        assert target.arrived(came) == data
        (sent,) = source.take(1)
        assert (sent["is_recv"], sent["status"], sent["wr_id"]) == (False, 0, size)
        target.endpoint.repost_recv([came["wr_id"]])


def test_what_is_posted_arrives_in_its_order(sides: tuple[Side, Side]) -> None:
    source, target = sides
    slot_bytes = NBYTES // RECVS
    taken = 0
    for number in range(10 * RECVS):
        data = number.to_bytes(8, "little") + bytes([number]) * (100 + number)
        source.write(data, imm=number, wr_id=number, at=number % RECVS * slot_bytes, signaled=number % 4 == 3)
        if number % 4 == 3:
            for came in target.take(4):
                at = taken % RECVS * slot_bytes
                assert came["imm"] == taken
                assert target.arrived(came, at) == taken.to_bytes(8, "little") + bytes([taken]) * (100 + taken)
                target.endpoint.repost_recv([came["wr_id"]])
                taken += 1
            assert [wc["wr_id"] for wc in source.take(1)] == [number]


def test_unsignalled_work_is_done_when_a_later_signalled_one_is(sides: tuple[Side, Side]) -> None:
    source, target = sides
    for number in range(3):
        source.write(b"h" * 8 + b"p" * 50, imm=number, wr_id=number, at=number * 64, signaled=False)
    source.endpoint.write_empty(99)
    assert [(wc["wr_id"], wc["status"]) for wc in source.take(1)] == [(99, 0)]
    assert [wc["imm"] for wc in target.take(3)] == [0, 1, 2]


def test_pieces_arrive_one_after_the_other(sides: tuple[Side, Side]) -> None:
    source, target = sides
    for count in (2, 3, 4, 16):
        pieces = [b"h" * 8, *(os.urandom(1 + 997 * number % 3000) for number in range(count))]
        source.write_pieces(pieces, imm=count, wr_id=count)
        (came,) = target.take(1)
        assert (came["status"], came["imm"]) == (0, count)
        whole = b"".join(pieces)
        arrived = bytes(target.target.view(0, len(whole))) if source.endpoint.in_ring else target.arrived(came)
        assert arrived == whole
        assert [(wc["status"], wc["wr_id"]) for wc in source.take(1)] == [(0, count)]
        target.endpoint.repost_recv([came["wr_id"]])


def test_an_immediate_alone_comes_after_the_data_before_it(sides: tuple[Side, Side]) -> None:
    source, target = sides
    source.write(b"h" * 8 + b"p" * 1000, imm=1, signaled=False)
    source.endpoint.write_imm(2, 5)
    first, second = target.take(2)
    assert (first["imm"], target.arrived(first)) == (1, b"h" * 8 + b"p" * 1000)
    assert (second["imm"], second["has_imm"]) == (2, True)
    assert [wc["wr_id"] for wc in source.take(1)] == [5]


def test_no_more_is_taken_than_there_are_receives(sides: tuple[Side, Side]) -> None:
    source, target = sides
    for number in range(RECVS + 2):
        source.write(b"h" * 8 + bytes([number]) * 50, imm=number, wr_id=number, at=number * 64)
    assert [wc["imm"] for wc in target.take(RECVS)] == list(range(RECVS))
    target.nothing_comes()
    target.endpoint.clear_reposted()
    target.endpoint.repost_recv([0, 0])
    assert target.endpoint.last_reposted == 2
    assert [wc["imm"] for wc in target.take(2)] == [RECVS, RECVS + 1]


def test_a_message_goes_the_other_way(sides: tuple[Side, Side]) -> None:
    source, target = sides
    for number in range(2 * RECVS):
        message = bytes([number]) * MESSAGE_BYTES
        target.endpoint.send_inline(message, number, True)
        (came,) = source.take(1)
        assert (came["is_recv"], came["status"], came["byte_len"]) == (True, 0, MESSAGE_BYTES)
        assert source.endpoint.recv_payload(came["wr_id"], came["byte_len"]) == message
        source.endpoint.repost_recv([came["wr_id"]])
        assert [wc["wr_id"] for wc in target.take(1)] == [number]


def test_what_was_posted_is_counted(sides: tuple[Side, Side]) -> None:
    source, _ = sides
    source.endpoint.clear_posted()
    assert source.endpoint.last_posted == 0
    source.write(b"x" * 20, imm=1)
    assert source.endpoint.last_posted == 1
    source.endpoint.clear_posted()
    assert source.endpoint.last_posted == 0
    source.endpoint.write_empty(2)
    assert source.endpoint.last_posted == 1


def test_a_completion_wakes_who_waits_in_another_thread(sides: tuple[Side, Side]) -> None:
    source, target = sides
    waiting = threading.Thread(target=source.poller.wait, args=(0, 2 * TIMEOUT_S))
    waiting.start()
    source.write(b"x" * 20, imm=1, wr_id=3)
    waiting.join(TIMEOUT_S)
    assert not waiting.is_alive()
    source.collect()
    assert [wc["wr_id"] for wc in source.take(1)] == [3]
    assert len(target.take(1)) == 1


def test_wake_ends_a_wait(sides: tuple[Side, Side]) -> None:
    source, _ = sides
    start_s = time.monotonic()
    timer = threading.Timer(0.1, source.poller.wake)
    timer.start()
    assert source.poller.wait(0, TIMEOUT_S) == 0
    timer.join()
    assert time.monotonic() - start_s < TIMEOUT_S / 2


def ends(side: Side, *, poke: bool = False) -> None:
    """A completion says that this side's connection is broken, and why. `poke`: once something is sent, which on some fabrics it
    takes to notice."""
    end_s = time.monotonic() + TIMEOUT_S
    poke_s = 0.0
    while time.monotonic() < end_s:
        if poke and time.monotonic() >= poke_s:
            poke_s = time.monotonic() + 3.0  # not too often: Soft-RoCE begins to wait anew each time
            with contextlib.suppress(RdmaxferError):
                side.endpoint.write_imm(2, 9)
        for wc in side.take_some(0.1):
            if wc["status"]:
                assert side.endpoint.explain(wc["status"], wc["vendor_err"])
                return
    pytest.fail("it goes on")


def test_memory_that_is_not_the_peers_ends_the_connection(sides: tuple[Side, Side]) -> None:
    source, target = sides
    source.write(b"h" * 8 + b"p" * 50, imm=1, rkey=target.region.rkey ^ 0x5A5A00)
    # Who notices first is the fabric's own.
    victim, other = (source, target) if source.endpoint.in_ring else (target, source)
    ends(victim)
    assert bytes(target.target.view(0, 58)) == bytes(58)
    victim.endpoint.to_error()
    ends(other, poke=True)


def test_memory_that_was_registered_once_is_not_written_to(sides: tuple[Side, Side]) -> None:
    source, target = sides
    target.region.close()
    source.write(b"h" * 8 + b"p" * 50, imm=1)
    ends(source if source.endpoint.in_ring else target)
    assert bytes(target.target.view(0, 58)) == bytes(58)


@pytest.mark.parametrize("how", ["to_error", "drain"])
def test_after_the_end_all_that_was_posted_has_completed_and_nothing_can_be_posted(
    sides: tuple[Side, Side], how: str
) -> None:
    source, _ = sides
    count = RECVS + 4  # the last of them wait for receives
    for number in range(count):
        source.write(b"h" * 8 + b"p" * 50, imm=number, wr_id=number, at=number * 64)
    if how == "drain":
        assert source.endpoint.drain(TIMEOUT_S)
        return  # what was cancelled is not told of
    source.endpoint.to_error()
    seen: list[int] = []
    while len(seen) < count:
        seen += [wc["wr_id"] for wc in source.take(1) if not wc["is_recv"]]
    assert seen == list(range(count))
    with contextlib.suppress(RdmaxferError):
        source.endpoint.write_empty(count)
        ends(source)  # a device takes it, and flushes it


def test_the_peer_is_killed(stack: ExitStack) -> None:
    mine = Side(stack, bound=True)
    program = Path(__file__).with_name("contract_sides.py")
    with subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        try:
            there = json.loads(peer.stdout.readline())
            mine.connect(there)
            peer.stdin.write(json.dumps(mine.address) + "\n")
            peer.stdin.flush()
            (came,) = mine.take(1)
            assert mine.arrived(came) == b"x" * 100
            mine.write(b"y" * 50, imm=9)
            assert "took own 0\n" in (peer.stdout.readline(), peer.stdout.readline())
        finally:
            peer.kill()
        peer.wait(TIMEOUT_S)
    if FABRIC != "verbs":  # Soft-RoCE repeats for ever: SendLink.look_after ends that
        ends(mine, poke=True)
    start_s = time.monotonic()
    assert mine.endpoint.drain(TIMEOUT_S)
    assert time.monotonic() - start_s < TIMEOUT_S / 2
