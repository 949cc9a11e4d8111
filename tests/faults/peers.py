"""Other processes that take part in a stream, for tests that stop them: they check what passes, and say what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

from helpers import TIMEOUT_S, spawn

SENDER = """
import json, sys, threading, numpy as np, rdmaxfer
from helpers import picture
how, endpoint, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tx = rdmaxfer.Sender(**options)
if how == "connect":
    tx.connect(endpoint, timeout=60)
else:
    print(tx.bind("tcp://127.0.0.1:*"), flush=True)
    tx.wait_for_peers(1, timeout=60)
enough = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), enough.set()), daemon=True).start()
pushed, error = 0, None
try:
    while not enough.wait(0.002):
        tx.push(picture(pushed), timeout=25)
        pushed += 1
        if pushed == 20:
            print("going", flush=True)
    tx.flush(timeout=60)
except rdmaxfer.RdmaxferError as caught:
    error = caught
try:
    tx.close(timeout=5)
except rdmaxfer.PeerLost:
    pass
print(json.dumps({
    "frames": pushed, "error": type(error).__name__, "text": str(error), "reconnects": tx.statistics().reconnects,
    "unreleased": list(getattr(error, "unreleased", ())),
}), flush=True)
"""
RECEIVER = """
import json, sys, threading, rdmaxfer
from helpers import picture
how, endpoint, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
lost = threading.Event()
def told(change):
    if change.state == "lost":
        lost.set()
rx = rdmaxfer.Receiver(**options, on_state=told)
if how == "connect":
    rx.connect(endpoint, timeout=60)
else:
    print(rx.bind("tcp://127.0.0.1:*"), flush=True)
    rx.wait_for_peers(1, timeout=60)
enough = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), enough.set()), daemon=True).start()
taken, error = 0, None
try:
    while not lost.is_set():
        try:
            frame = rx.recv(timeout=0.1)
        except rdmaxfer.TimeoutExpired:
            if enough.is_set():
                break
            continue
        with frame:
            assert frame.seq == taken and frame.gap is None, (frame.seq, taken, frame.gap)
            assert frame.array.tobytes() == picture(taken).tobytes()
            taken += 1
        if taken == 20:
            print("going", flush=True)
except rdmaxfer.RdmaxferError as caught:
    error = caught
rx.close(timeout=5)
print(json.dumps({
    "frames": taken, "error": type(error).__name__ if error or not lost.is_set() else "PeerLost", "text": str(error),
    "reconnects": rx.statistics().reconnects,
}), flush=True)
"""


class Peer:
    """Another process, with a stream to or from `node`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise AssertionError(self.process.stderr.read())
        return line.strip()

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        pid, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert pid == self.process.pid
        assert os.WIFSTOPPED(status)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def enough(self) -> None:
        """Come to an end: a sender flushes, a receiver takes what is on its way."""
        assert self.process.stdin is not None
        self.process.stdin.write("enough\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """What became of it, once it has ended."""
        result: dict[str, Any] = json.loads(self.line())
        assert self.process.wait(TIMEOUT_S) == 0
        return result


@contextlib.contextmanager
def peer(kind: str, bind: str, node: Any, options: dict[str, Any]) -> Iterator[Peer]:
    """A process that is a `kind` ("sender" or "receiver"), connected with `node`; the `bind` side is bound. Frames pass."""
    how = "bind" if bind == kind else "connect"
    endpoint = "" if how == "bind" else node.bind("tcp://127.0.0.1:*")
    process = spawn(SENDER if kind == "sender" else RECEIVER, how, endpoint, json.dumps(options))
    try:
        other = Peer(process)
        if how == "bind":
            node.connect(other.line(), timeout=TIMEOUT_S)
        node.wait_for_peers(1, timeout=TIMEOUT_S)
        yield other
    finally:
        process.kill()  # also a stopped one
        process.communicate()
