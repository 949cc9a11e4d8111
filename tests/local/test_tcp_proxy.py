"""The proxy of tests/faults does to a connection what it is told to, and nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
import zmtp
from helpers import TIMEOUT_S, Background, wait_until
from tcp_proxy import BOTH, TO_BOUND, TO_CONNECTING, TcpProxy

from rdmaxfer.cm.messages import Renew, Started, encode


@contextlib.contextmanager
def between() -> Iterator[tuple[TcpProxy, socket.socket, socket.socket]]:
    """A proxy, and the two ends of a connection through it: who connected, who was bound."""
    before = len(os.listdir("/proc/self/fd"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT_S)
        with TcpProxy(f"tcp://127.0.0.1:{server.getsockname()[1]}") as proxy, dial(proxy) as near:
            far, _ = server.accept()
            with far:
                far.settimeout(TIMEOUT_S)
                yield proxy, near, far
    assert not [each for each in threading.enumerate() if each.name == "tcp-proxy"]
    assert len(os.listdir("/proc/self/fd")) == before


def dial(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(proxy.endpoint.rpartition(":")[2])), TIMEOUT_S)


def take(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := end.recv(count - len(data))):
        data += more
    return data


def silent(end: socket.socket) -> bool:
    """Nothing is there to be read, not even an end."""
    end.setblocking(False)
    try:
        end.recv(1)
    except BlockingIOError:
        return True
    finally:
        end.settimeout(TIMEOUT_S)
    return False


def passes(near: socket.socket, far: socket.socket) -> None:
    for one, other in ((near, far), (far, near)):
        one.sendall(b"hello" * 1000)
        assert take(other, 5000) == b"hello" * 1000


def test_it_passes_on_bytes_and_ends() -> None:
    with between() as (proxy, near, far):
        passes(near, far)
        near.shutdown(socket.SHUT_WR)
        assert far.recv(1) == b""
        far.sendall(b"still here")
        assert take(near, 10) == b"still here"
        far.close()
        assert near.recv(1) == b""
        wait_until(lambda: proxy.counts().open == 0, "it was closed")
        assert proxy.counts().connections == 1
        assert proxy.counts().passed_bytes == 10_010


@pytest.mark.parametrize("direction", BOTH)
def test_it_drops_one_direction(direction: str) -> None:
    with between() as (proxy, near, far):
        ends = {TO_BOUND: (near, far), TO_CONNECTING: (far, near)}
        source, target = ends.pop(direction)
        ((back, home),) = ends.values()
        proxy.drop(direction, after=3)
        source.sendall(b"123456")
        assert take(target, 3) == b"123"
        wait_until(lambda: proxy.counts().dropped_bytes == 3, "the rest was dropped")
        back.sendall(b"back")
        assert take(home, 4) == b"back"
        source.sendall(b"lost")
        wait_until(lambda: proxy.counts().dropped_bytes == 7, "that too")
        assert silent(target)
        proxy.resume()
        passes(near, far)


def test_an_end_is_dropped_too() -> None:
    with between() as (proxy, near, far):
        proxy.drop()
        near.close()
        assert proxy.counts().open == 1
        assert silent(far)
        proxy.resume()
        assert far.recv(1) == b""


@pytest.mark.parametrize("direction", BOTH)
def test_it_stalls_one_direction_and_loses_nothing(direction: str) -> None:
    with between() as (proxy, near, far):
        source, target = (near, far) if direction == TO_BOUND else (far, near)
        proxy.stall(direction, after=2)
        source.sendall(b"123456")
        assert take(target, 2) == b"12"
        source.sendall(b"789")
        wait_until(lambda: proxy.counts().held_bytes == 7, "it waits")
        target.sendall(b"back")
        assert take(source, 4) == b"back"
        assert silent(target)
        source.close()
        assert silent(target)
        proxy.resume()
        assert take(target, 100) == b"3456789"
        assert proxy.counts().dropped_bytes == 0


def test_it_truncates_each_connection() -> None:
    with between() as (proxy, near, far):
        passes(near, far)
        proxy.truncate(4, TO_BOUND)
        far.sendall(b"back")
        assert take(near, 4) == b"back"
        near.sendall(b"123456")
        assert take(far, 100) == b"1234"
        assert near.recv(1) == b""
        assert proxy.counts().truncated == 1
        assert proxy.counts().open == 0


@pytest.mark.parametrize("reset", [True, False])
def test_it_cuts(reset: bool) -> None:
    with between() as (proxy, near, far):
        passes(near, far)
        proxy.cut(reset=reset)
        assert proxy.counts().cut == 1
        for end in (near, far):
            if reset:
                with pytest.raises(ConnectionResetError):
                    end.recv(1)
            else:
                assert end.recv(1) == b""
        dial(proxy).close()
        wait_until(lambda: proxy.counts().connections == 2, "new ones are taken")


def test_it_refuses_or_turns_away_until_it_resumes() -> None:
    with between() as (proxy, near, far):
        proxy.refuse()
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                dial(proxy)
        passes(near, far)
        proxy.resume()
        dial(proxy).close()
        wait_until(lambda: proxy.counts().connections == 2, "it was taken")
        proxy.turn_away()
        with pytest.raises(ConnectionResetError), dial(proxy) as other:  # perhaps before it is connected
            other.recv(1)
        wait_until(lambda: proxy.counts().turned_away == 1, "it was counted")
        passes(near, far)


def test_it_delays_and_keeps_the_order() -> None:
    with between() as (proxy, near, far):
        proxy.delay(0.2, TO_BOUND)
        began = time.monotonic()
        for number in range(50):
            near.sendall(bytes([number]))
        far.sendall(b"at once")
        assert take(near, 7) == b"at once"
        assert take(far, 50) == bytes(range(50))
        assert time.monotonic() - began >= 0.2
        assert proxy.counts().delayed > 0
        proxy.delay(3600.0)
        near.sendall(b"held")
        wait_until(lambda: proxy.counts().held_bytes == 4, "it waits")
        proxy.resume()
        assert take(far, 4) == b"held"


# --- messages ----------------------------------------------------------------------------------------------------------

RENEW = encode(Renew(session=b"1" * 16, request=1))
STARTED = encode(Started(session=b"1" * 16, request=1))
GREETING = b"\xff" + bytes(8) + b"\x7f\x03" + bytes(53)


def message(said: bytes) -> bytes:
    """As REQ sends it: an envelope, then the body, here with a long frame header."""
    return b"\x01\x04abcd\x01\x00" + b"\x02" + struct.pack(">Q", len(said)) + said


def test_messages_are_told_apart_however_they_come() -> None:
    stream = GREETING + b"\x04\x03rdy" + message(RENEW) + message(STARTED) + message(b"rubbish")
    for size in (1, 7, len(stream)):
        splitter = zmtp.Splitter()
        found = [each for at in range(0, len(stream), size) for each in splitter.feed(stream[at : at + size])]
        assert b"".join(found) == stream
        assert [zmtp.kind(each) for each in found if zmtp.kind(each)] == ["renew", "started"]
        assert [zmtp.body(each) for each in found][-1] == b"rubbish"
    assert zmtp.Splitter().feed(b"GET / HTTP/1.0\r\n\r\n") == [b"GET / HTTP/1.0\r\n\r\n"]


def test_it_loses_messages_by_type() -> None:
    with between() as (proxy, near, far):
        near.sendall(GREETING)
        assert take(far, 64) == GREETING
        proxy.lose("renew", times=2)
        for _ in range(3):
            near.sendall(message(RENEW))
        near.sendall(message(STARTED))
        whole = message(RENEW) + message(STARTED)
        assert take(far, len(whole)) == whole
        counts = proxy.counts()
        assert (counts.lost["renew"], counts.passed["renew"], counts.passed["started"]) == (2, 1, 1)
        assert [said for _, _, said in proxy.messages] == [RENEW] * 3 + [STARTED]


def test_a_command_is_met_by_the_message_that_it_waits_for() -> None:
    with between() as (proxy, near, far):
        near.sendall(GREETING)
        take(far, 64)
        proxy.at("started", lambda: proxy.truncate(10))
        near.sendall(message(RENEW) + message(STARTED))
        assert take(far, 1000) == message(RENEW) + message(STARTED)[:10]
        assert near.recv(1) == b""
        assert proxy.counts().truncated == 1
        proxy.resume()
        with dial(proxy) as other:
            assert other.sendall(b"0123456789") is None


def test_it_is_closed_while_others_wait_for_it() -> None:
    with between() as (proxy, near, far):
        proxy.stall()
        near.sendall(b"held")
        reading = Background(lambda: far.recv(1))
        proxy.close()
        with pytest.raises(ConnectionResetError):
            reading.result()
