"""What the device tests share: pairs of sender and receiver, frames of every kind, other processes."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import rdmaxfer
from rdmaxfer.fabric.owner import Owner

FABRIC = os.environ.get("RDMAXFER_FABRIC") or "verbs"
"""What carries the frames in this run."""
TIMEOUT_S = 300.0 if os.environ.get("RDMAXFER_GUEST") == "vm" else 60.0
"""Deadline of every wait in the tests: an emulated machine is 50 times slower."""

SETTLED_S = 1.5


@contextlib.contextmanager
def pair(
    *,
    bind: str = "receiver",
    host: str = "127.0.0.1",
    sender: dict[str, Any] | None = None,
    receiver: dict[str, Any] | None = None,
) -> Iterator[tuple[rdmaxfer.Sender, rdmaxfer.Receiver]]:
    """A connected sender and receiver; `bind` says which of the two is the bound one."""
    with rdmaxfer.Receiver(**(receiver or {})) as rx, rdmaxfer.Sender(**(sender or {})) as tx:
        bound, connecting = (rx, tx) if bind == "receiver" else (tx, rx)
        connecting.connect(bound.bind(f"tcp://{host}:*"), timeout=TIMEOUT_S)
        rx.wait_for_peers(1, timeout=TIMEOUT_S)
        tx.wait_for_peers(1, timeout=TIMEOUT_S)
        yield tx, rx


def resources(*, settled: bool = False) -> dict[str, int]:
    """Verbs objects by kind, from `rdma resource show`; on another fabric, what this process has open of it. `settled`: wait until
    connections that have ended are taken down, which they are a moment after nobody counts them any more."""
    if FABRIC != "verbs":
        return _at_rest(_open_owners)
    return _at_rest(_on_devices) if settled else _on_devices()


def _on_devices() -> dict[str, int]:
    out = subprocess.run(
        ["rdma", "resource", "show"], capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    ).stdout
    counts: dict[str, int] = {}
    for kind, number in re.findall(r"(\w+) (\d+)(?=\s)", out):
        counts[kind] = counts.get(kind, 0) + int(number)
    return counts


def _open_owners() -> dict[str, int]:
    return dict(
        collections.Counter(type(owner).__name__ for root in list(Owner._roots) for owner in _and_children(root))
    )


def _at_rest(look: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What `look` finds when it has been the same for longer than the end of a connection may take."""
    found, since = look(), time.monotonic()
    while time.monotonic() - since < SETTLED_S:
        threading.Event().wait(0.05)
        if (now := look()) != found:
            found, since = now, time.monotonic()
    return found


def _and_children(owner: Owner) -> Iterator[Owner]:
    yield owner
    for child in list(owner._children):
        yield from _and_children(child)


class Background(threading.Thread):
    """Runs a function beside the test; `result()` waits for it and raises what it raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error

    def result(self, timeout: float = TIMEOUT_S) -> Any:
        self.join(timeout)
        assert not self.is_alive(), "still running"
        if self._error is not None:
            raise self._error
        return self._value


def wait_until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        tick.wait(0.005)


def picture(seed: int, shape: tuple[int, ...] = (48, 64, 3)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def spawn(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another Python process that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )


def rest(process: subprocess.Popen[str], timeout: float = TIMEOUT_S) -> tuple[str, str]:
    """What the process still prints, to its end. `communicate` would lose what `readline` has read ahead."""
    assert process.stdout is not None
    assert process.stderr is not None
    reading = [Background(process.stdout.read), Background(process.stderr.read)]
    out, err = (each.result(timeout) for each in reading)
    process.wait(timeout)
    return out, err


def check_frames(tx: rdmaxfer.Sender, rx: rdmaxfer.Receiver) -> None:
    """Both sides still pass frames."""
    for seed in range(20):
        seq = tx.push(picture(seed), timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.seq == seq
            assert frame.array.tobytes() == picture(seed).tobytes()
    tx.flush(timeout=TIMEOUT_S)


def warm_up(tx: rdmaxfer.Sender, rx: rdmaxfer.Receiver | None, slots: int) -> int:
    """Make and register all of the sender's staging memory, so that it does not grow later. Returns how many frames that took.

    `rx`: who is to take them; None if another process does."""
    held = [tx.reserve((48, 64, 3), timeout=TIMEOUT_S) for _ in range(2 * slots)]
    for half in (held[:slots], held[slots:]):
        for slot in half:
            slot.commit()
        for _ in half:
            if rx is not None:
                rx.recv(timeout=TIMEOUT_S).release()
        tx.flush(timeout=TIMEOUT_S)
    return len(held)
