"""What either node does for a test: send, receive, look at counters, change its end of the wire.

The test runs on node 1 and makes these objects there itself, and on node 2 through agent.py. So what methods take and return must
be picklable, and exceptions are told as text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import rdmaxfer

WIRE = "wire0"
COUNTERS = Path("/sys/class/infiniband/rxe0/ports/1/hw_counters")

SIZES = (1, 100, 4096, 20_000, 65_536, 150_000)
"""Bytes of the frames, in turns: less than a packet, and up to 150 of them."""

TICK_S = 0.2


class End:
    """This node's end of the wire."""

    def run(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr}"
        return done.stdout

    def counters(self) -> dict[str, int]:
        """rxe's counters since boot, and how many packets netem dropped here since it was put there."""
        counters = {path.name: int(path.read_text()) for path in COUNTERS.iterdir()}
        (qdisc,) = json.loads(self.run("tc", "-s", "-j", "qdisc", "show", "dev", WIRE))
        return {**counters, "dropped": qdisc["drops"] if qdisc["kind"] == "netem" else 0}


def contents(seq: int, noise: Any) -> Any:
    """Frame number `seq`: no two are the same."""
    size = SIZES[seq % len(SIZES)]
    start = seq * 7919 % (len(noise) - size)
    frame = noise[start : start + size].copy()
    number = np.frombuffer(seq.to_bytes(8, "little"), np.uint8)[:size]
    frame[: len(number)] = number
    return frame


def digest(frame: Any) -> str:
    return hashlib.blake2b(frame, digest_size=16).hexdigest()


class Traffic:
    """A sender or receiver with a thread that keeps it busy."""

    def __init__(self, node: Any, name: str) -> None:
        self._node = node
        self._log: list[tuple[int, str]] = []
        self._errors: list[str] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def bind(self, endpoint: str) -> str:
        return str(self._node.bind(endpoint))

    def connect(self, endpoint: str, timeout_s: float) -> None:
        self._node.connect(endpoint, timeout=timeout_s)

    def wait_for_peer(self, timeout_s: float) -> None:
        self._node.wait_for_peers(1, timeout=timeout_s)

    def start(self) -> None:
        self._thread.start()

    def wait_for(self, count: int, timeout_s: float) -> bool:
        """Wait until so many frames were sent or received in all. False if it did not come to that, or there was an error."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._log) >= count or bool(self._errors), timeout_s)
            return len(self._log) >= count and not self._errors

    def log(self) -> list[tuple[int, str]]:
        """Number and hash of every frame so far."""
        with self._changed:
            return list(self._log)

    def errors(self) -> list[str]:
        with self._changed:
            return list(self._errors)

    def statistics(self) -> dict[str, int]:
        statistics = self._node.statistics()
        return {name: getattr(statistics, name) for name in statistics.__dataclass_fields__}

    def close(self) -> None:
        self._closing = True
        if self._thread.ident is not None:
            self._thread.join(60)
        self._node.close()

    def _note(self, seq: int, hash_: str) -> None:
        with self._changed:
            self._log.append((seq, hash_))
            self._changed.notify_all()

    @contextlib.contextmanager
    def _errors_noted(self) -> Iterator[None]:
        try:
            yield
        except rdmaxfer.TimeoutExpired:
            pass
        except Exception as error:
            self._note_error(repr(error))

    def _note_error(self, text: str) -> None:
        with self._changed:
            self._errors.append(f"{time.strftime('%X')} {text}")
            self._changed.notify_all()

    def _run(self) -> None:
        raise NotImplementedError


class Sending(Traffic):
    """Sends `count` frames, one after the other."""

    def __init__(self, count: int, options: dict[str, Any]) -> None:
        super().__init__(rdmaxfer.Sender(**options), "sending")
        self._count = count
        self._noise = np.random.default_rng(1).integers(0, 256, 1 << 20, np.uint8)

    def _run(self) -> None:
        while len(self._log) < self._count and not self._closing and not self._errors:
            frame = contents(len(self._log), self._noise)
            with self._errors_noted():
                self._note(self._node.push(frame, timeout=TICK_S), digest(frame))

    def flush(self, timeout_s: float) -> None:
        self._node.flush(timeout=timeout_s)


class Receiving(Traffic):
    """Receives whatever comes."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(rdmaxfer.Receiver(**options), "receiving")

    def _run(self) -> None:
        while not self._closing and not self._errors:
            with self._errors_noted(), self._node.recv(timeout=TICK_S) as frame:
                if frame.gap is not None:
                    self._note_error(f"before frame {frame.seq}: {frame.gap}")
                self._note(frame.seq, digest(frame.array))
