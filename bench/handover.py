#!/usr/bin/env python3
"""How long it takes to hand a frame over to another process, by each fabric that this machine has: microseconds one way.

    .venv/bin/python bench/handover.py [--fabrics shm tcp verbs] [--sizes 64 1048576 67108864] [--rounds 5]

A frame that was filled in place goes there and another one comes back, and the time is halved: so it is that of `reserve`, `commit`
and `recv`, with the waking up of a process that sleeps (--spin 0, the default) or polls busily. "push" is what the call that sends
takes by itself. Rounds of the fabrics alternate; medians of their medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import rdmaxfer

WARM_UP = 16
"""Each slot was used, mapped and registered by then."""


def options(args: argparse.Namespace) -> dict[str, object]:
    return {"fabric": args.fabric, "slots": args.slots, "slot_bytes": args.size, "spin_s": args.spin, "queue_pairs": 1}


def echo(args: argparse.Namespace) -> None:
    """The other process."""
    with rdmaxfer.Receiver(**options(args)) as receiver, rdmaxfer.Sender(**options(args)) as back:
        print(receiver.bind("tcp://127.0.0.1:*"), back.bind("tcp://127.0.0.1:*"), flush=True)
        for _ in range(args.count + WARM_UP):
            with receiver.recv(timeout=60), back.reserve(args.size, timeout=60):
                pass
        back.flush(timeout=60)


def measure(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds there and back, halved, and seconds of the push."""
    command = [sys.executable, __file__, "--echo", "--fabric", args.fabric, "--size", str(args.size)]
    command += ["--count", str(args.count), "--slots", str(args.slots), "--spin", str(args.spin)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        there, here = other.stdout.readline().split()
        with rdmaxfer.Sender(**options(args)) as sender, rdmaxfer.Receiver(**options(args)) as receiver:
            sender.connect(there)
            receiver.connect(here)
            trips, pushes = [], []
            for number in range(args.count + WARM_UP):
                start = time.perf_counter()
                with sender.reserve(args.size, timeout=60):
                    pass
                pushed = time.perf_counter()
                receiver.recv(timeout=60).release()
                if number >= WARM_UP:
                    trips.append((time.perf_counter() - start) / 2)
                    pushes.append(pushed - start)
            sender.flush(timeout=60)
        other.wait(60)
    return statistics.median(trips), statistics.median(pushes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fabrics", nargs="+", default=["shm", "tcp"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 1 << 20, 64 << 20])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--spin", type=float, default=0.0)
    parser.add_argument("--json", metavar="FILE", help="write the medians to FILE, too")
    for name in ("fabric", "size", "count"):
        parser.add_argument(f"--{name}", type=str if name == "fabric" else int, help=argparse.SUPPRESS)
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.echo:
        echo(args)
        return
    rows = []
    for size in args.sizes:
        found: dict[str, list[tuple[float, float]]] = {fabric: [] for fabric in args.fabrics}
        for number in range(args.rounds):
            for fabric in args.fabrics if number % 2 else reversed(args.fabrics):
                args.fabric, args.size = fabric, size
                args.count = 300 if fabric == "shm" or size < 1 << 20 else max(8, (100 << 20) // size)
                found[fabric].append(measure(args))
        for fabric in args.fabrics:
            trip, push = (1e6 * statistics.median(each) for each in zip(*found[fabric], strict=True))
            rows.append({"fabric": fabric, "bytes": size, "one_way_us": trip, "push_us": push})
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file)
    print("| fabric | bytes | one way, µs | of that, push, µs |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['fabric']} | {row['bytes']} | {row['one_way_us']:.1f} | {row['push_us']:.1f} |")


if __name__ == "__main__":
    main()
