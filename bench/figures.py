#!/usr/bin/env python3
"""What else rdmaxfer's goals are about, on one machine over verbs: one to many, the handshake, an idle receiver, memory, importing.

scripts/softroce_uml.sh -- .venv/bin/python bench/figures.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import rdmaxfer

RECEIVE = """
import sys, rdmaxfer
count = int(sys.argv[1])
receivers = [rdmaxfer.Receiver(fabric="verbs", slots=16, slot_bytes=4096, queue_pairs=1) for _ in range(count)]
print(*(rx.bind("tcp://127.0.0.1:*") for rx in receivers), flush=True)
open_ones = list(receivers)
while open_ones:
    for rx in list(open_ones):
        try:
            frames = rx.recv_many(8, timeout=None if len(open_ones) == 1 else 0.002)
        except rdmaxfer.TimeoutExpired:  # the others may have some, and nobody waits for them here meanwhile
            continue
        for frame in frames:
            if frame.nbytes == 1:
                open_ones.remove(rx)
            frame.release()
sys.stdin.readline()
for rx in receivers:
    rx.close()
"""
IDLE = """
import sys, rdmaxfer
with rdmaxfer.Receiver(fabric="verbs") as rx:
    print(rx.bind("tcp://127.0.0.1:*"), flush=True)
    rx.recv()
    rx.recv()
"""


def sending_us(receivers: int, frames: int = 2000) -> float:
    """What a push of a registered frame of 4 KiB takes its caller, with so many receivers in one other process."""
    command = [sys.executable, "-c", RECEIVE, str(receivers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        with rdmaxfer.Sender(fabric="verbs", slots=16, queue_pairs=1) as sender:
            for endpoint in other.stdout.readline().split():
                sender.connect(endpoint)
            array = np.zeros(4096, np.uint8)
            sender.register(array)
            for _ in range(frames // 10):
                sender.push(array)
            sender.flush(timeout=60)
            start = time.perf_counter()
            for _ in range(frames):
                sender.push(array)
            sender.flush(timeout=60)
            took = time.perf_counter() - start
            sender.push(np.zeros(1, np.uint8))
            sender.flush(timeout=60)
        other.stdin.close()
        other.wait(60)
    return took / frames * 1e6


def handshake_ms(fabric: str) -> float:
    """From no Sender at all to the first frame handed over, to a receiver that waits."""
    with rdmaxfer.Receiver(fabric=fabric) as receiver:
        endpoint = receiver.bind("tcp://127.0.0.1:*")
        start = time.perf_counter()
        with rdmaxfer.Sender(fabric=fabric) as sender:
            sender.connect(endpoint)
            took = time.perf_counter() - start
    return took * 1e3


def idle_percent(seconds: float = 5.0) -> float:
    """Share of a core that a receiver takes which waits for frames that don't come."""
    with subprocess.Popen([sys.executable, "-c", IDLE], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        with rdmaxfer.Sender(fabric="verbs") as sender:
            sender.connect(other.stdout.readline().strip())
            sender.push(np.zeros(10))
            sender.flush(timeout=60)
            before = cpu_s(other.pid)
            time.sleep(seconds)
            used = cpu_s(other.pid) - before
            sender.push(np.zeros(10))
            sender.flush(timeout=60)
        other.wait(60)
    return used / seconds * 100


PINNED = """
import sys, rdmaxfer
with rdmaxfer.Receiver(fabric="verbs", slots=16, slot_bytes=1 << 20) as rx:
    print(rx.bind("tcp://127.0.0.1:*"), flush=True)
    for _ in range(16):
        rx.recv().release()
    sys.stdin.readline()
"""
SEND = """
import sys, time, numpy as np, rdmaxfer
with rdmaxfer.Sender(fabric="verbs", slots=16) as tx:
    tx.connect(sys.argv[1])
    array = np.zeros((16, 1 << 20), np.uint8)
    tx.register(array)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(sys.argv[2])):
        tx.push(array[number % 16])
    tx.flush(timeout=60)
    print("done", flush=True)
    sys.stdin.readline()
"""


def pinned_mib() -> tuple[float, float]:
    """Memory that a sender and a receiver have registered, with 16 slots of 1 MiB, the sender's all in use."""

    def pinned(pid: int | str) -> float:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmPin")) / 1024

    with subprocess.Popen(
        [sys.executable, "-c", PINNED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        before = pinned("self")
        with rdmaxfer.Sender(fabric="verbs", slots=16) as sender:
            sender.connect(other.stdout.readline().strip())
            slots = [sender.reserve(1 << 20) for _ in range(16)]
            for slot in slots:
                slot.commit()
            sender.flush(timeout=60)
            found = pinned("self") - before, pinned(other.pid)
        other.stdin.close()
        other.wait(60)
    return found


def connections_mb_s(connections: int, frames: int = 400) -> float:
    """Frames of 1 MiB from so many processes to one receiver, all together."""
    with rdmaxfer.Receiver(fabric="verbs", slots=16, slot_bytes=1 << 20) as receiver:
        endpoint = receiver.bind("tcp://127.0.0.1:*")
        command = [sys.executable, "-c", SEND, endpoint, str(frames // connections)]
        processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(connections)
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdin is not None
                process.stdout.readline()
            start = time.perf_counter()
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            for _ in range(frames // connections * connections):
                receiver.recv(timeout=60).release()
            took = time.perf_counter() - start
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()
                process.wait(60)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return (frames // connections * connections << 20) / took / 1e6


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def import_ms(rounds: int) -> float:
    """`import rdmaxfer` above numpy and zmq."""

    def took(code: str) -> float:
        timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
        done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True, cwd="/")
        return float(done.stdout) * 1e3

    pairs = [(took("import numpy, zmq, rdmaxfer"), took("import numpy, zmq")) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs) - statistics.median(b for _, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument(
        "--no-device", action="store_true", help="only what takes none: importing, the other handshakes"
    )
    args = parser.parse_args()
    if args.no_device:
        found = {"import_ms": import_ms(args.rounds)}
        for fabric in ("shm", "tcp"):
            found[f"handshake_{fabric}_ms"] = statistics.median(handshake_ms(fabric) for _ in range(args.rounds))
        save(found, args.json)
        return
    one, eight = [], []
    for number in range(args.rounds):
        for count, found in ((1, one), (8, eight)) if number % 2 else ((8, eight), (1, one)):
            found.append(sending_us(count))
    result: dict[str, float] = {
        "one_us": statistics.median(one),
        "eight_us": statistics.median(eight),
        "idle_percent": statistics.median(idle_percent() for _ in range(3)),
    }
    result["pinned_sender_mib"], result["pinned_receiver_mib"] = pinned_mib()
    for connections in (1, 4):
        found = [connections_mb_s(connections) for _ in range(args.rounds)]
        result[f"connections_{connections}_mb_s"] = statistics.median(found)
    for fabric in ("verbs", "shm", "tcp"):
        result[f"handshake_{fabric}_ms"] = statistics.median(handshake_ms(fabric) for _ in range(args.rounds))
    save(result, args.json)


def save(result: dict[str, float], file: str | None) -> None:
    for name, value in result.items():
        print(f"{name:>20} {value:10.2f}")
    if file:
        Path(file).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
