"""kill -9 at random moments under load, restart, resume: what the one side logged is held against what the other did.

A frame that a sender accepted reaches its receiver, in order, and is told from any other by its number and hash. A receiver that is
restarted may see again what its predecessor had not released; one that stays alive sees each frame once. What a sender that is
killed had accepted dies with it: the receiver has got a beginning of it, without a gap.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, Background, rest, spawn, wait_until
from soak import rounds

import rdmaxfer

SLOTS = 8
LEASE_S = 1.0
LONGEST_LIFE_S = 0.6
SHAPE = (50_000,)

COMMON = """
import hashlib, os, sys, numpy as np, rdmaxfer
how, endpoint, path = sys.argv[1:4]
log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(seq, array):
    os.write(log, f"{seq} {hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()}\\n".encode())
"""
RECEIVER = (
    COMMON
    + """
with rdmaxfer.Receiver(slots=8, lease_s=1.0, name="worker") as rx:
    if how == "connect":
        rx.connect(endpoint, timeout=60)
    else:
        rx.bind(endpoint)
    for frame in rx:
        with frame:
            note(frame.seq, frame.array)  # first what is known, then the release
        if frame.seq >= 0 and not os.environ.get("SAID"):
            os.environ["SAID"] = "1"
            print("receiving", flush=True)
"""
)
SENDER = (
    COMMON
    + """
with rdmaxfer.Sender(slots=8, lease_s=1.0) as tx:
    if how == "connect":
        tx.connect(endpoint, timeout=60)
    else:
        tx.bind(endpoint)
    tx.wait_for_peers(1, timeout=60)
    rng = np.random.default_rng(os.getpid())
    for number in range(1_000_000):
        frame = rng.integers(0, 256, 50_000, np.uint8)
        note(number, frame)
        assert tx.push(frame, timeout=60) == number
        if number == 10:
            print("sending", flush=True)
"""
)


def digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def read_log(path: Path) -> list[tuple[int, str]]:
    text = path.read_text() if path.exists() else ""
    return [(int(seq), each) for seq, each in (line.split() for line in text.splitlines())]


def free_endpoint() -> str:
    with rdmaxfer.Receiver() as rx:
        return rx.bind("tcp://127.0.0.1:*")


@contextlib.contextmanager
def program(code: str, how: str, endpoint: str, log: Path) -> Iterator[subprocess.Popen[str]]:
    process = spawn(code, how, endpoint, str(log))
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def lives_for_a_while(process: subprocess.Popen[str], chance: random.Random) -> None:
    """Wait until it is at work, and then for any moment."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, rest(process)
    threading.Event().wait(chance.uniform(0, LONGEST_LIFE_S))


@pytest.mark.counted
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", ["bind", "connect"])
def test_a_receiver_that_is_killed_and_restarted(how: str, tmp_path: Path) -> None:
    chance = random.Random(f"receiver {how}")
    sent: list[str] = []
    enough = threading.Event()
    with rdmaxfer.Sender(slots=SLOTS, lease_s=LEASE_S) as tx:
        endpoint = tx.bind("tcp://127.0.0.1:*") if how == "connect" else free_endpoint()

        def push() -> None:
            rng = np.random.default_rng(1)
            while not enough.is_set():
                frame = rng.integers(0, 256, SHAPE, np.uint8)
                sent.append(digest(frame))
                assert tx.push(frame, timeout=TIMEOUT_S) == len(sent) - 1
            tx.flush(timeout=TIMEOUT_S)

        pushing = None
        count = rounds(ci=5, soak=50)
        for number in range(count + 1):
            with program(RECEIVER, how, endpoint, tmp_path / f"{number}.log") as process:
                if number == 0 and how == "bind":
                    tx.connect(endpoint, timeout=TIMEOUT_S)
                pushing = pushing or Background(push)
                lives_for_a_while(process, chance)
                if number == count:  # the last one may live
                    enough.set()
                    pushing.result()
        assert tx.statistics().reconnects >= count
        assert tx.statistics().peers_lost == 0
    expected = 0  # the first number that no predecessor had logged
    again = 0
    for number in range(count + 1):
        log = read_log(tmp_path / f"{number}.log")
        assert log, f"the receiver of round {number} has got nothing"
        first = log[0][0]
        assert first <= expected, f"frames {expected} to {first - 1} were lost in round {number}"
        assert [seq for seq, _ in log] == list(range(first, first + len(log)))
        assert all(sent[seq] == each for seq, each in log)
        again += expected - first
        expected = max(expected, first + len(log))
    assert expected == len(sent)
    assert again <= SLOTS * count
    print(f"{count} receivers killed: {len(sent)} frames, 0 lost, {again} seen again by a successor")


@pytest.mark.counted
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", ["bind", "connect"])
def test_a_sender_that_is_killed_and_restarted(how: str, tmp_path: Path) -> None:
    chance = random.Random(f"sender {how}")
    got: dict[str, list[tuple[int, str]]] = {}
    pids = []
    with rdmaxfer.Receiver(slots=SLOTS, lease_s=LEASE_S) as rx:
        endpoint = rx.bind("tcp://127.0.0.1:*") if how == "connect" else free_endpoint()
        over = threading.Event()

        def receive() -> None:
            while not over.is_set():
                with contextlib.suppress(rdmaxfer.TimeoutExpired), rx.recv(timeout=0.2) as frame:
                    assert frame.gap is None
                    got.setdefault(frame.peer, []).append((frame.seq, digest(frame.array)))

        receiving = None
        count = rounds(ci=5, soak=50)
        for number in range(count):
            with program(SENDER, how, endpoint, tmp_path / f"{number}.log") as process:
                if number == 0 and how == "bind":
                    rx.connect(endpoint, timeout=TIMEOUT_S)
                receiving = receiving or Background(receive)
                lives_for_a_while(process, chance)
                pids.append(process.pid)
        wait_until(lambda: rx.statistics().peers == 0, "the last one was missed")
        over.set()
        assert receiving is not None
        receiving.result()
    unreceived = 0
    for number, pid in enumerate(pids):
        sent = read_log(tmp_path / f"{number}.log")
        (received,) = [log for peer, log in got.items() if peer.endswith(f"/{pid}")]
        assert received == sent[: len(received)]
        unreceived += len(sent) - len(received)
        assert len(sent) - len(received) <= 2 * SLOTS + 1
    frames = sum(map(len, got.values()))
    print(f"{count} senders killed: {frames} frames received, none twice; {unreceived} died with their senders")
