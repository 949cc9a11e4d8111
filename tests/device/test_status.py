"""What senders and receivers tell of themselves: `rdmaxfer top`, Prometheus, latencies."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FABRIC, TIMEOUT_S, pair, picture, spawn, wait_until
from prometheus_client.parser import text_string_to_metric_families

import rdmaxfer
from rdmaxfer import metrics, status

TOP = Path(__file__).parents[2]


def mine() -> dict[str, dict[str, Any]]:
    """What this process's sender and receiver say."""
    return {each["role"]: each for each in status.find() if each["pid"] == os.getpid()}


def test_both_sides_say_who_they_are_and_what_they_do() -> None:
    with pair(receiver={"slots": 8}) as (tx, rx):
        for seed in range(20):
            tx.push(picture(seed), timeout=TIMEOUT_S)
            rx.recv(timeout=TIMEOUT_S).release()
        tx.push(picture(0), timeout=TIMEOUT_S)
        held = rx.recv(timeout=TIMEOUT_S)
        wait_until(lambda: mine()["sender"]["statistics"]["unreleased"] == 1, "credit came back")
        found = mine()
        assert found["receiver"]["statistics"]["frames"] == found["sender"]["statistics"]["frames"] == 21
        assert found["receiver"]["statistics"]["leased"] == 1
        assert found["receiver"]["slots"] == 8
        assert found["receiver"]["endpoints"][0].startswith("tcp://127.0.0.1:")
        (link,) = found["sender"]["links"]
        assert (link["fabric"], link["peer"]) == (FABRIC, rx.name)
        latency = rdmaxfer.Latency(**found["receiver"]["statistics"]["push_to_recv"])
        assert latency.frames >= 2
        assert 0 < latency.median_s <= latency.p90_s <= latency.p99_s <= latency.most_s < TIMEOUT_S
        assert found["receiver"]["statistics"]["capture_to_recv"] is None
        held.release()
    assert mine() == {}


def test_latency_from_capture() -> None:
    with pair() as (tx, rx):
        assert rx.statistics().push_to_recv is None
        for _ in range(9):
            tx.push(b"x", captured_ns=time.time_ns() - 2_000_000_000, timeout=TIMEOUT_S)
            rx.recv(timeout=TIMEOUT_S).release()
        found = rx.statistics()
        assert found.capture_to_recv is not None
        assert found.push_to_recv is not None
        assert found.capture_to_recv.median_s >= 2 > found.push_to_recv.median_s


def test_nothing_is_left_of_a_process_that_was_killed() -> None:
    code = """
import rdmaxfer, sys
rx = rdmaxfer.Receiver()
print(rx.bind("tcp://127.0.0.1:*"), flush=True)
sys.stdin.read()
"""
    with spawn(code) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process.pid in {each["pid"] for each in status.find()}
        process.kill()
        process.communicate(timeout=TIMEOUT_S)
    assert process.pid not in {each["pid"] for each in status.find()}


def test_a_forked_child_does_not_answer_for_its_parent() -> None:
    with rdmaxfer.Receiver() as rx:
        rx.bind("tcp://127.0.0.1:*")
        code = os.fork()
        if code == 0:
            fd = rx._status.fd if rx._status is not None else 0
            os._exit(0 if fd == -1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(code, 0)[1]) == 0
        assert mine()["receiver"]["pid"] == os.getpid()


class Failing:
    """A socket of a process that has too many files open."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.tries = 0
        self.failing = True

    def accept(self) -> Any:
        self.tries += 1
        if self.failing:
            raise OSError(errno.EMFILE, "Too many open files")
        return self.real.accept()

    def fileno(self) -> int:
        return int(self.real.fileno())

    def close(self) -> None:
        self.real.close()


def test_too_few_descriptors_neither_keep_the_control_thread_busy_nor_end_it() -> None:
    with pair() as (tx, rx):
        assert rx._status is not None
        failing = Failing(rx._status._socket)
        rx._status._socket = failing  # type: ignore[assignment]
        assert "receiver" not in mine()  # which gives up after a second
        assert 1 <= failing.tries <= 3
        failing.failing = False
        wait_until(lambda: "receiver" in mine(), "it answers again")
        tx.push(b"x", timeout=TIMEOUT_S)
        rx.recv(timeout=TIMEOUT_S).release()


def test_top_prints_them() -> None:
    with pair() as (tx, rx):
        tx.push(b"x", timeout=TIMEOUT_S)
        rx.recv(timeout=TIMEOUT_S).release()
        done = subprocess.run(
            [sys.executable, "-m", "rdmaxfer", "top", "--once", "--every", "0.2"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        assert str(os.getpid()) in done.stdout
        assert "sender" in done.stdout
        assert FABRIC in done.stdout
        done = subprocess.run(
            [sys.executable, "-m", "rdmaxfer", "top", "--json"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        assert {each["role"] for each in json.loads(done.stdout) if each["pid"] == os.getpid()} == {
            "sender",
            "receiver",
        }


AS_NOBODY = """
import os, sys, rdmaxfer
from rdmaxfer import status
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with rdmaxfer.Receiver(fabric="tcp") as receiver:
    receiver.bind("tcp://127.0.0.1:*")
    print([each["pid"] for each in status.find()] == [os.getpid()], flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees other users'")
def test_root_sees_all_users_and_others_their_own() -> None:
    with (
        pair(),
        subprocess.Popen(
            [sys.executable, "-c", AS_NOBODY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as nobody,
    ):
        try:
            assert nobody.stdout is not None
            assert nobody.stdout.readline() == "True\n"
            assert {(nobody.pid, 65534), (os.getpid(), 0)} <= {(each["pid"], each["uid"]) for each in status.find()}
        finally:
            nobody.kill()


def test_prometheus_reads_all_counters() -> None:
    port = metrics.serve(0)

    def read() -> dict[tuple[str, str], float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
        return {
            (sample.name, f"{sample.labels['role']} {sample.labels.get('quantile', '')}".strip()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    with pair() as (tx, rx), rdmaxfer.Receiver() as _idle:
        for _ in range(10):
            tx.push(np.zeros(100, np.uint8), timeout=TIMEOUT_S)
            rx.recv(timeout=TIMEOUT_S).release()
        found = read()
        assert found["rdmaxfer_frames_total", "sender"] == 10
        assert found["rdmaxfer_bytes_total", "sender"] == 1000
        assert found["rdmaxfer_peers", "sender"] == 1
        assert found["rdmaxfer_push_to_recv_seconds", "receiver 0.5"] > 0
        with_capture_times = {"rdmaxfer_capture_to_recv_seconds"}
        documented = set(re.findall(r"`(rdmaxfer_\w+)`", (TOP / "docs/howto.md").read_text()))
        assert {name for name, _ in found} | with_capture_times == documented
    assert read() == {}
