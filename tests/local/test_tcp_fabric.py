"""The tcp fabric by itself: what strangers and liars at a data port can do (nothing), and what its completions promise
beyond what all fabrics do (tests/device/test_contract.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import zmq
from helpers import wait_until

from rdmaxfer.errors import VerbsError
from rdmaxfer.fabric import tcp
from rdmaxfer.fabric.poller import Poller
from rdmaxfer.fabric.soft import BROKEN, FLUSHED, Region
from rdmaxfer.memory import Buffer

RECVS = 4
HEAD = tcp._HEAD
HELLO, WRITE, IMM, SEND = range(1, 5)
NBYTES = 4096


class Side:
    """An endpoint with memory that its peer may write to."""

    def __init__(self, stack: ExitStack, *, bound: bool, recv_bytes: int = 0) -> None:
        domain = stack.enter_context(tcp.TcpDomain())
        self.pd = stack.enter_context(domain.protection_domain())
        route = tcp.TcpRoute("127.0.0.1", bound=bound)
        self.endpoint = self.pd.endpoint(
            route, send_depth=64, recv_depth=RECVS, recv_bytes=recv_bytes, remote_write=True, max_write_bytes=1 << 20
        )
        stack.callback(self.endpoint.close)
        self.buffer = Buffer(NBYTES)
        self.region: Region = self.pd.register(self.buffer, remote_write=True)
        stack.callback(self.region.close)
        self.poller = stack.enter_context(Poller())
        self.poller.watch([self.endpoint])

    def take(self, count: int) -> list[Any]:
        """The next completions."""
        found: list[Any] = []

        def enough() -> bool:
            self.poller.wait(0, 0.05)
            found.extend(wc for _, wc in self.poller.found())
            self.poller.clear()
            return len(found) >= count

        wait_until(enough, f"{count} completions")
        return found

    def nothing_comes(self) -> None:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            self.poller.wait(0, 0.05)
            assert self.poller.count == 0, self.poller.found()

    def write(self, to: Side, data: bytes, imm: int = 7, wr_id: int = 1) -> None:
        self.buffer.view(0, len(data))[:] = data
        address, lkey = self.buffer.address, self.region.lkey
        self.endpoint.write(
            address, 8, lkey, address + 8, len(data) - 8, lkey, to.buffer.address, to.region.rkey, imm, wr_id, True
        )


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def sides(stack: ExitStack) -> tuple[Side, Side]:
    """Two connected ones: the bound, and the other."""
    bound, other = Side(stack, bound=True), Side(stack, bound=False)
    there = bound.endpoint.address
    other.endpoint.connect(port=there.port, key=there.key, peer_key=None)
    return bound, other


def frame(wc: Any) -> bytes:
    header, payload = wc.placed
    return bytes(header) + bytes(payload)


def test_what_is_posted_before_the_peer_is_there_waits_for_it(stack: ExitStack) -> None:
    bound, other = Side(stack, bound=True), Side(stack, bound=False)
    bound.write(other, b"x" * 100)
    bound.nothing_comes()
    there = bound.endpoint.address
    other.endpoint.connect(port=there.port, key=there.key, peer_key=None)
    assert [wc.wr_id for wc in bound.take(1)] == [1]
    assert frame(other.take(1)[0]) == b"x" * 100


def lies(target: Side) -> dict[str, list[bytes]]:
    address, rkey = target.buffer.address, target.region.rkey
    body = b"h" * 8
    return {
        "no head": [b"abc"],
        "nothing": [b""],
        "an unknown kind": [HEAD.pack(9, 0, 0, 0, 0, 0)],
        "a wrong key": [HEAD.pack(WRITE, 0, rkey ^ 1, 8, address, 4) + body, b"1234"],
        "key 0": [HEAD.pack(WRITE, 0, 0, 8, address, 4) + body, b"1234"],
        "before the ring": [HEAD.pack(WRITE, 0, rkey, 8, address - 1, 4) + body, b"1234"],
        "beyond the ring": [HEAD.pack(WRITE, 0, rkey, 8, address + NBYTES - 11, 4) + body, b"1234"],
        "at the end of all addresses": [HEAD.pack(WRITE, 0, rkey, 8, (1 << 64) - 4, 4) + body, b"1234"],
        "a longer header than said": [HEAD.pack(WRITE, 0, rkey, 7, address, 4) + body, b"1234"],
        "a longer payload than said": [HEAD.pack(WRITE, 0, rkey, 8, address, 4) + body, b"12345"],
        "no payload": [HEAD.pack(WRITE, 0, rkey, 8, address, 4) + body],
        "three parts": [HEAD.pack(WRITE, 0, rkey, 8, address, 4) + body, b"1234", b""],
        "an immediate with more": [HEAD.pack(IMM, 1, 0, 0, 0, 0) + b"more"],
        "a message that is too long": [HEAD.pack(SEND, 0, 0, 0, 0, 0) + b"m" * 65],
        "the key again": [HEAD.pack(HELLO, 0, 0, 0, 0, 0) + target.endpoint.address.key],
    }


LIES = (
    *("no head", "nothing", "an unknown kind", "a wrong key", "key 0", "before the ring", "beyond the ring"),
    *("at the end of all addresses", "a longer header than said", "a longer payload than said", "no payload"),
    *("three parts", "an immediate with more", "a message that is too long", "the key again"),
)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_of_the_peer_ends_the_connection(stack: ExitStack, lie: str) -> None:
    target = Side(stack, bound=True)
    context = stack.enter_context(zmq.Context())
    liar = stack.enter_context(context.socket(zmq.DEALER))
    liar.setsockopt(zmq.LINGER, 0)
    there = target.endpoint.address
    liar.connect(f"tcp://127.0.0.1:{there.port}")
    liar.send(HEAD.pack(HELLO, 0, 0, 0, 0, 0) + there.key)
    liar.send(HEAD.pack(IMM, 5, 0, 0, 0, 0))
    assert target.take(1)[0].imm == 5, "it is listened to"
    liar.send_multipart(lies(target)[lie])
    (wc,) = target.take(1)
    assert wc.status == BROKEN
    assert "no write of this version, or one to memory that is not its" in target.endpoint.explain(wc.status, 0)
    with pytest.raises(VerbsError):
        target.endpoint.write_empty(1)


def test_strangers_are_not_listened_to(stack: ExitStack) -> None:
    target, peer = Side(stack, bound=True), Side(stack, bound=False)
    there = target.endpoint.address
    context = stack.enter_context(zmq.Context())

    def stranger(*says: bytes) -> None:
        socket = stack.enter_context(context.socket(zmq.DEALER))
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"tcp://127.0.0.1:{there.port}")
        for each in says:
            socket.send(each)

    hello = HEAD.pack(HELLO, 0, 0, 0, 0, 0)
    write = HEAD.pack(WRITE, 0, target.region.rkey, 4, target.buffer.address, 0) + b"mine"
    stranger(write)
    stranger(hello + os.urandom(16), write)
    stranger(hello + there.key[:15], write)
    stranger(hello, write)
    peer.endpoint.connect(port=there.port, key=there.key, peer_key=None)
    peer.write(target, b"y" * 64)
    assert frame(target.take(1)[0]) == b"y" * 64
    stranger(hello + there.key, write)  # overheard, and too late
    target.nothing_comes()
    target.endpoint.repost_recv([0])
    peer.write(target, b"z" * 64)
    assert frame(target.take(1)[0]) == b"z" * 64


def test_a_flood_of_a_stranger_holds_nobody_up(stack: ExitStack) -> None:
    target, peer = Side(stack, bound=True), Side(stack, bound=False)
    there = target.endpoint.address
    context = stack.enter_context(zmq.Context())
    stranger = stack.enter_context(context.socket(zmq.DEALER))
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.setsockopt(zmq.SNDHWM, 0)
    stranger.connect(f"tcp://127.0.0.1:{there.port}")
    for _ in range(20_000):
        stranger.send(b"let me in")
    peer.endpoint.connect(port=there.port, key=there.key, peer_key=None)
    for number in range(3 * RECVS):
        peer.write(target, b"y" * 64, imm=number)
        (wc,) = target.take(1)
        assert (wc.imm, frame(wc)) == (number, b"y" * 64)
        target.endpoint.repost_recv([wc.wr_id])


def end_by_to_error(side: Side) -> None:
    side.endpoint.to_error()


def end_by_drain(side: Side) -> None:
    assert side.endpoint.drain(5.0)


@pytest.mark.parametrize("end", [end_by_to_error, end_by_drain])
def test_what_was_not_sent_is_flushed_at_the_end(stack: ExitStack, end: Callable[[Side], None]) -> None:
    side, other = Side(stack, bound=True), Side(stack, bound=True)
    for number in range(3):
        side.write(other, b"w" * 20, wr_id=number)
    end(side)
    flushed = [wc for wc in side.take(3) if not wc.is_recv]
    assert [(wc.wr_id, wc.status) for wc in flushed] == [(number, FLUSHED) for number in range(3)]


def test_the_connecting_side_notices_that_the_other_has_gone(sides: tuple[Side, Side]) -> None:
    bound, other = sides
    other.write(bound, b"q" * 30)
    bound.take(1)
    other.take(1)
    bound.endpoint.to_error()
    (wc,) = other.take(1)
    assert wc.status == BROKEN
    assert "has ended or could not be made" in other.endpoint.error


def test_nobody_is_at_that_port(stack: ExitStack) -> None:
    gone, other = Side(stack, bound=True), Side(stack, bound=False)
    there = gone.endpoint.address
    gone.endpoint.close()
    other.endpoint.connect(port=there.port, key=there.key, peer_key=None)
    (wc,) = other.take(1)
    assert wc.status == BROKEN
    assert "a firewall must let it through" in other.endpoint.error
