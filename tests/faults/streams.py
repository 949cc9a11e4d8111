"""A stream that runs beside a test: what is pushed arrives once, in order, with the same bytes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from helpers import TIMEOUT_S, Background, picture, wait_until
from tcp_proxy import TcpProxy

import rdmaxfer

PAUSE_S = 0.002
"""Between frames: the machine has other things to do, too."""


class Stream:
    """Pushes and takes numbered frames in two threads, until `finish`."""

    def __init__(self, tx: rdmaxfer.Sender, rx: rdmaxfer.Receiver, pause_s: float) -> None:
        self.tx = tx
        self.rx = rx
        self._pause_s = pause_s
        self.first = tx.statistics().frames
        self.pushed = self.taken = 0
        self._enough = threading.Event()
        self._pushing = Background(self._push)
        self._taking = Background(self._take)

    def _push(self) -> None:
        while not self._enough.wait(self._pause_s):
            seq = self.first + self.pushed
            assert self.tx.push(picture(seq), timeout=TIMEOUT_S) == seq
            self.pushed += 1

    def _take(self) -> None:
        while not self._enough.is_set() or self.taken < self.pushed or self._pushing.is_alive():
            try:
                frame = self.rx.recv(timeout=0.1)
            except rdmaxfer.TimeoutExpired:
                continue
            with frame:
                seq = self.first + self.taken
                assert frame.seq == seq, f"frame {frame.seq} came, not {seq}"
                assert frame.gap is None
                assert frame.array.tobytes() == picture(seq).tobytes()
            self.taken += 1

    def goes_on(self, count: int = 20) -> None:
        """So many more frames arrive."""
        want = self.taken + count
        wait_until(lambda: self.taken >= want or not self._taking.is_alive(), "frames arrive")
        if not self._taking.is_alive():
            self._taking.result()

    def finish(self) -> int:
        """All that was pushed arrives, and is released. Returns how many frames that were."""
        self._enough.set()
        self._pushing.result()
        self._taking.result()
        assert self.taken == self.pushed > 0
        self.tx.flush(timeout=TIMEOUT_S)
        assert self.tx.statistics().unreleased == 0
        return self.taken

    def stop(self) -> None:
        """Whatever becomes of it: the test has failed already."""
        self._enough.set()
        for each in (self._pushing, self._taking):
            each.join(1)  # what still waits ends when its node is closed


@contextlib.contextmanager
def streaming(tx: rdmaxfer.Sender, rx: rdmaxfer.Receiver, pause_s: float = PAUSE_S) -> Iterator[Stream]:
    """A Stream that is finished at the end of the block."""
    stream = Stream(tx, rx, pause_s)
    try:
        yield stream
        stream.finish()
    finally:
        stream.stop()


class States:
    """An `on_state` that keeps what it is told, and when."""

    def __init__(self) -> None:
        self.changes: list[tuple[float, rdmaxfer.StateChange]] = []

    def __call__(self, change: rdmaxfer.StateChange) -> None:
        self.changes.append((time.monotonic(), change))

    @property
    def names(self) -> list[str]:
        return [change.state for _, change in self.changes]

    def when(self, state: str) -> float | None:
        return next((when for when, change in self.changes if change.state == state), None)


@contextlib.contextmanager
def apart(
    bind: str, *, sender: dict[str, Any] | None = None, receiver: dict[str, Any] | None = None
) -> Iterator[tuple[TcpProxy, rdmaxfer.Sender, rdmaxfer.Receiver, Any, Any]]:
    """A proxy, a sender and a receiver that can reach each other only through it, and again the bound one and the other one."""
    with rdmaxfer.Receiver(**(receiver or {})) as rx, rdmaxfer.Sender(**(sender or {})) as tx:
        bound, connecting = (rx, tx) if bind == "receiver" else (tx, rx)
        with TcpProxy(bound.bind("tcp://127.0.0.1:*")) as proxy:
            try:
                yield proxy, tx, rx, bound, connecting
            finally:
                proxy.resume()
                for node in (tx, rx):
                    with contextlib.suppress(rdmaxfer.PeerLost):
                        node.close()


@contextlib.contextmanager
def through(
    bind: str, *, sender: dict[str, Any] | None = None, receiver: dict[str, Any] | None = None
) -> Iterator[tuple[TcpProxy, rdmaxfer.Sender, rdmaxfer.Receiver]]:
    """A proxy, and a sender and a receiver that are connected through it."""
    with apart(bind, sender=sender, receiver=receiver) as (proxy, tx, rx, bound, connecting):
        connecting.connect(proxy.endpoint, timeout=TIMEOUT_S)
        bound.wait_for_peers(1, timeout=TIMEOUT_S)
        yield proxy, tx, rx
