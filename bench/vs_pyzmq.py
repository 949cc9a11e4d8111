"""Frames over TCP against plain pyzmq, on this machine: megabytes a second, in alternating rounds.

Both push from a ring of buffers that exist already, without a copy on the sending side, with as many frames on their way; ours also
gives credit back.

    .venv/bin/python bench/vs_pyzmq.py [--sizes 65536 1048576] [--rounds 5] [--seconds 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

DEPTH = 16
WARM_UP = 4 * DEPTH
"""Frames until all memory was used once, on both sides."""

OURS = """
import sys, time, numpy as np, rdmaxfer
endpoint, size, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with rdmaxfer.Sender(fabric="tcp", slots=16) as tx:
    tx.connect(endpoint, timeout=30)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with tx.reserve(size) as slot:
            pass
    tx.flush(timeout=60)
"""
PLAIN = """
import sys, time, collections, numpy as np, zmq
endpoint, size, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with zmq.Context() as context, context.socket(zmq.PUSH) as push:
    push.setsockopt(zmq.SNDHWM, 16)
    push.connect(endpoint)
    ring = [np.zeros(size, np.uint8) for _ in range(16)]
    trackers = collections.deque()
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        if len(trackers) == 16:
            trackers.popleft().wait()
        trackers.append(push.send(ring[number % 16], copy=False, track=True))
        number += 1
    push.send(b"over")
    push.close(linger=10000)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])


def ours(size: int, seconds: float) -> float:
    import rdmaxfer

    with rdmaxfer.Receiver(fabric="tcp", slots=DEPTH, slot_bytes=size) as rx:
        child = start(OURS, rx.bind("tcp://127.0.0.1:*"), size, seconds)
        for _ in range(WARM_UP):
            rx.recv(timeout=60).release()
        began, count, last = time.monotonic(), 0, 0.0
        while True:
            try:
                rx.recv(timeout=1.0).release()
            except rdmaxfer.TimeoutExpired:
                break
            count += 1
            last = time.monotonic()
        child.wait(60)
    return count * size / (last - began) / 1e6


def plain(size: int, seconds: float) -> float:
    import zmq

    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        pull.setsockopt(zmq.RCVHWM, DEPTH)
        child = start(PLAIN, f"tcp://127.0.0.1:{pull.bind_to_random_port('tcp://127.0.0.1')}", size, seconds)
        for _ in range(WARM_UP):
            pull.recv(copy=False)
        began, count = time.monotonic(), 0
        while len(pull.recv(copy=False)) == size:
            count += 1
        last = time.monotonic()
        child.wait(60)
    return count * size / (last - began) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[65536, 1 << 20, 8 << 20], help="payloads in bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each run")
    parser.add_argument("--json", metavar="FILE", help="write all rounds to FILE, too")
    args = parser.parse_args()
    rows = []
    print(f"{'bytes':>10} {'rdmaxfer':>10} {'pyzmq':>10} {'ratio':>6}   MB/s, medians of {args.rounds}")
    for size in args.sizes:
        pairs = [(ours(size, args.seconds), plain(size, args.seconds)) for _ in range(args.rounds)]
        mine, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        rows.append({"bytes": size, "rdmaxfer": [a for a, _ in pairs], "pyzmq": [b for _, b in pairs]})
        print(f"{size:>10} {mine:>10.1f} {theirs:>10.1f} {ratio:>6.2f}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main()
