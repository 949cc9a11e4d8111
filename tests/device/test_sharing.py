"""Frames that one process receives and others read, too: `Receiver(share=)`, `attach` and `Sender.forward`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import FABRIC, TIMEOUT_S, Background, picture, wait_until

import rdmaxfer
from rdmaxfer import sharing

SLOTS = 4


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@contextlib.contextmanager
def shared(name: str = "camera") -> Iterator[tuple[rdmaxfer.Sender, rdmaxfer.Receiver]]:
    with rdmaxfer.Receiver(share=name, slots=SLOTS) as rx, rdmaxfer.Sender(slots=SLOTS) as tx:
        tx.connect(rx.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        yield tx, rx


def attached(rx: rdmaxfer.Receiver, count: int = 1) -> None:
    """Wait until so many are."""
    assert rx._sharing is not None
    rx._sharing._sender.wait_for_peers(count, timeout=TIMEOUT_S)


def copied(rx: rdmaxfer.Receiver) -> int:
    assert rx._sharing is not None
    return rx._sharing._sender.statistics().copied


def test_all_read_the_same_memory() -> None:
    with (
        shared() as (tx, rx),
        rdmaxfer.attach("camera", TIMEOUT_S) as one,
        rdmaxfer.attach("camera", TIMEOUT_S) as other,
    ):
        attached(rx, 2)
        for seed in range(10 * SLOTS):
            tx.push(picture(seed), metadata={"seed": seed}, captured_ns=seed, timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.array.tobytes() == picture(seed).tobytes()
            for reader in (one, other):
                with reader.recv(timeout=TIMEOUT_S) as theirs:
                    assert theirs.array.tobytes() == picture(seed).tobytes()
                    assert (theirs.seq, theirs.captured_ns, theirs.metadata) == (seed, seed, {"seed": seed})
        assert copied(rx) == (40 if FABRIC == "tcp" else 0)
        tx.flush(timeout=TIMEOUT_S)
        wait_until(lambda: rx.statistics().leased == 0, "all slots were given back")


def test_a_slot_is_given_back_when_all_have_released_it() -> None:
    with shared() as (tx, rx), rdmaxfer.attach("camera", TIMEOUT_S) as reader:
        attached(rx)
        held = []
        for seed in range(SLOTS):
            tx.push(picture(seed), timeout=TIMEOUT_S)
            rx.recv(timeout=TIMEOUT_S).release()
            held.append(reader.recv(timeout=TIMEOUT_S))
        if FABRIC == "tcp":  # there, what is shared is a copy
            tx.push(picture(8), timeout=TIMEOUT_S)
            assert rx.recv(timeout=TIMEOUT_S).array.tobytes() == picture(8).tobytes()
        else:
            with pytest.raises(rdmaxfer.TimeoutExpired):
                tx.push(picture(8), timeout=0.3)
        for seed, frame in enumerate(held):
            assert frame.array.tobytes() == picture(seed).tobytes()
            frame.release()
        del frame, held
        tx.push(picture(9), timeout=TIMEOUT_S)
        rx.recv(timeout=TIMEOUT_S).release()
        latest = [reader.recv(timeout=TIMEOUT_S).array.tobytes() for _ in range(2 if FABRIC == "tcp" else 1)]
        assert latest[-1] == picture(9).tobytes()


def test_the_first_process_may_hold_a_frame_longest() -> None:
    with shared() as (tx, rx), rdmaxfer.attach("camera", TIMEOUT_S) as reader:
        attached(rx)
        tx.push(picture(0), timeout=TIMEOUT_S)
        frame = rx.recv(timeout=TIMEOUT_S)
        reader.recv(timeout=TIMEOUT_S).release()
        for seed in range(1, SLOTS):
            tx.push(picture(seed), timeout=TIMEOUT_S)
            rx.recv(timeout=TIMEOUT_S).release()
            reader.recv(timeout=TIMEOUT_S).release()
        assert frame.array.tobytes() == picture(0).tobytes()
        with pytest.raises(rdmaxfer.TimeoutExpired):
            tx.flush(timeout=0.3)
        frame.release()
        tx.flush(timeout=TIMEOUT_S)


def test_a_reader_that_is_slow_holds_up_recv_and_nothing_is_lost_or_doubled() -> None:
    with shared() as (tx, rx), rdmaxfer.attach("camera", TIMEOUT_S, slots=2) as reader:
        attached(rx)
        pushing = Background(lambda: [tx.push(picture(seed), timeout=TIMEOUT_S) for seed in range(20)])
        mine: list[int] = []

        def receive() -> None:
            while True:
                with rx.recv(timeout=0.3) as frame:
                    mine.append(frame.seq)

        with pytest.raises(rdmaxfer.TimeoutExpired):
            receive()
        assert mine == [0, 1]  # the reader has room for two
        assert mine == [0, 1]
        theirs: list[int] = []

        def read() -> None:
            while len(theirs) < 20:
                with reader.recv(timeout=TIMEOUT_S) as frame:
                    assert frame.array.tobytes() == picture(frame.seq).tobytes()
                    theirs.append(frame.seq)

        reading = Background(read)
        while len(mine) < 20:
            for frame in rx.recv_many(3, timeout=TIMEOUT_S):
                mine.append(frame.seq)
                frame.release()
        reading.result()
        pushing.result()
        assert mine == theirs == list(range(20))


READER = """
import sys, rdmaxfer
with rdmaxfer.attach("camera") as reader:
    print("attached", flush=True)
    frames = [reader.recv() for _ in range(2)]
    print(*(frame.array.sum() for frame in frames), flush=True)
    sys.stdin.readline()
"""


def test_a_reader_that_is_killed_gives_back_what_it_held() -> None:
    with shared() as (tx, rx):
        with subprocess.Popen(
            [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "attached\n"
            attached(rx)
            for seed in range(2):
                tx.push(picture(seed), timeout=TIMEOUT_S)
                rx.recv(timeout=TIMEOUT_S).release()
            assert reader.stdout.readline().split() == [str(picture(seed).sum()) for seed in range(2)]
            reader.kill()
        for seed in range(3 * SLOTS):
            tx.push(picture(seed), timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.array.tobytes() == picture(seed).tobytes()
        tx.flush(timeout=TIMEOUT_S)


SHARER = """
import rdmaxfer, sys
with rdmaxfer.Receiver(share="camera") as rx:
    print("sharing", flush=True)
    sys.stdin.readline()
"""


def test_names() -> None:
    for bad in ("", "a/b", "..", "x" * 65, "a b"):
        with pytest.raises(rdmaxfer.EndpointError, match="is no name to share by"):
            rdmaxfer.attach(bad)
    with pytest.raises(rdmaxfer.EndpointError, match="nobody shares frames as 'nothing'"):
        rdmaxfer.attach("nothing", timeout=0.1)
    with subprocess.Popen(
        [sys.executable, "-c", SHARER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "sharing\n"
        with pytest.raises(rdmaxfer.EndpointError, match="another process shares frames as 'camera' already"):
            rdmaxfer.Receiver(share="camera")
        other.kill()
    with pytest.raises(rdmaxfer.EndpointError, match="nobody shares"):
        rdmaxfer.attach("camera", timeout=0.1)
    rdmaxfer.Receiver(share="camera").close()
    (file,) = sharing.directory().iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    os.chmod(file.parent, 0o755)
    with pytest.raises(rdmaxfer.EndpointError, match="is not a directory of this user alone"):
        rdmaxfer.attach("camera", timeout=0.1)


def test_frames_are_forwarded_over_the_fabric_of_this_run() -> None:
    with (
        rdmaxfer.Receiver(slots=SLOTS) as first,
        rdmaxfer.Sender(slots=SLOTS) as source,
        rdmaxfer.Sender(slots=SLOTS) as onward,
        rdmaxfer.Receiver(slots=SLOTS) as last,
    ):
        source.connect(first.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        onward.connect(last.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S)
        for seed in range(5 * SLOTS):
            source.push(picture(seed), metadata={"seed": seed}, timeout=TIMEOUT_S)
            with first.recv(timeout=TIMEOUT_S) as frame:
                assert onward.forward(frame, timeout=TIMEOUT_S) == seed
            with last.recv(timeout=TIMEOUT_S) as arrived:
                assert arrived.array.tobytes() == picture(seed).tobytes()
                assert arrived.metadata == {"seed": seed}
        assert onward.statistics().copied == (5 * SLOTS if FABRIC == "tcp" else 0)
        source.flush(timeout=TIMEOUT_S)
        with pytest.raises(rdmaxfer.FrameReleased):
            onward.forward(arrived)
