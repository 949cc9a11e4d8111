#!/usr/bin/env python3
"""rdmaxfer against linux-rdma's perftest, on one device, in alternating runs.

    scripts/softroce_uml.sh -- .venv/bin/python bench/vs_perftest.py

Bandwidth: frames pushed in place (from registered memory) to a receiver in another process, against `ib_write_bw`. Latency: a
frame there and another one back, halved, against `ib_write_lat`. Both use the same device, GID, path MTU and depth: --slots frames
in flight. For bandwidth they also have the same working set: a ring of --slots sources on one side, a ring of --slots targets on
the other (perftest by bench/perftest_ring.c).

perftest comes in three kinds: "perftest" is `ib_write_bw` as it is, which has one queue pair; "as many QPs" has as many as
rdmaxfer (--queue-pairs; its frames in flight and its ring are divided between them); "one buffer" is the first without the ring:
by itself perftest writes from one buffer into one buffer. "batches" is rdmaxfer by push_many and recv_many. Every round runs all
of them, in alternating order; medians of the rounds and their ratios are printed. Start-up, handshake and a warm-up are not
timed.

Soft-RoCE does the network card's work in the kernel's worker threads. With the CPUs "shared", these wander between all of them, and
part of what is measured is how soon an idle CPU wakes up for them; perftest, which never lets its CPU idle, is not hurt by that,
whoever sleeps is. With the CPUs "split" (it takes root), the workers have the first CPU and all programs the others, ours and
perftest's alike: that is how to compare frames that take long. For small frames on two CPUs it is not, since sender and receiver
then share one. So bandwidth of frames of 64 KiB to 8 MiB is measured in both ways, others and latency on shared CPUs only: both
sides of perftest poll busily.

A ratio above 1 means that rdmaxfer is faster. Run it on an otherwise idle machine: absolute figures on a shared one mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

import rdmaxfer
from rdmaxfer.fabric.devices import choose_gid, list_devices
from rdmaxfer.fabric.route import local_ip_towards

SIZES = {64: 8000, 4096: 8000, 65536: 3000, 1 << 20: 600, 8 << 20: 80, 64 << 20: 20}
"""Payload bytes -> frames a round."""
RING_BYTES = 512 << 20
"""Larger frames have fewer slots than --slots: Soft-RoCE of the guest's kernel registers no more than 1 GiB at once."""
SPLIT = range(65536, (8 << 20) + 1)
"""Sizes that are measured with the CPUs split, too: `ib_write_bw` with 64 MiB did not end there."""
WARM_UP = 0.1
"""Share of a round's frames that are pushed before the clock starts."""


def cpu_s(who: int = resource.RUSAGE_SELF) -> tuple[float, float]:
    """User time, and the kernel's for it."""
    usage = resource.getrusage(who)
    return usage.ru_utime, usage.ru_stime


def since(before: tuple[float, float], now: tuple[float, float]) -> dict[str, float]:
    return {"user_s": now[0] - before[0], "system_s": now[1] - before[1]}


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 99)}


# --- rdmaxfer ----------------------------------------------------------------------------------------------------------


def receive(args: argparse.Namespace) -> None:
    """The other process: takes frames, and sends each back for latency."""
    with (
        rdmaxfer.Receiver(
            fabric="verbs",
            slots=args.slots,
            slot_bytes=args.size,
            queue_pairs=args.queue_pairs,
            spin_s=args.spin,
        ) as receiver,
        rdmaxfer.Sender(fabric="verbs", slots=args.slots, queue_pairs=args.queue_pairs, spin_s=args.spin) as back,
    ):
        print(receiver.bind("tcp://127.0.0.1:*"), back.bind("tcp://127.0.0.1:*"), flush=True)
        echo = np.zeros(args.size, np.uint8)
        with back.register(echo):
            cpu = cpu_s()
            number = 0
            while number < args.count + args.warm_up:
                if number <= args.warm_up:
                    cpu = cpu_s()
                for frame in receiver.recv_many(args.batch):
                    if args.kind == "lat":
                        back.push(echo)
                    frame.release()
                    number += 1
            print(json.dumps(since(cpu, cpu_s())), flush=True)
            sys.stdin.readline()


def ours(
    args: argparse.Namespace, kind: str, size: int, count: int, *, batch: int = 1, timed: bool = False
) -> dict[str, float]:
    """`timed`: look at the clock for each frame, which takes time itself, for quantiles."""
    warm_up = -(-max(20, int(count * WARM_UP)) // batch) * batch
    count = -(-count // batch) * batch
    command = [sys.executable, __file__, "receive", "--kind", kind, "--size", str(size), "--count", str(count)]
    command += ["--warm-up", str(warm_up), "--slots", str(args.slots), "--queue-pairs", str(args.queue_pairs)]
    command += ["--batch", str(batch)]
    if args.receiver_spin is not None:
        command += ["--spin", str(args.receiver_spin)]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert peer.stdout is not None
    try:
        there, back = peer.stdout.readline().split()
        with (
            rdmaxfer.Sender(
                fabric="verbs", slots=args.slots, queue_pairs=args.queue_pairs, spin_s=args.sender_spin
            ) as sender,
            rdmaxfer.Receiver(
                fabric="verbs",
                slots=args.slots,
                slot_bytes=size,
                queue_pairs=args.queue_pairs,
                spin_s=args.receiver_spin,
            ) as receiver,
        ):
            sender.connect(there)
            sources = np.ones((args.slots, size), np.uint8)  # one region, as perftest has
            registered = sender.register(sources)
            if kind == "lat":
                receiver.connect(back)

                def step(i: int) -> None:
                    sender.push(sources[0])
                    receiver.recv().release()
            elif batch > 1:
                rows = [sources[i : i + batch] for i in range(0, args.slots, batch)]

                def step(i: int) -> None:
                    sender.push_many(rows[i // batch % len(rows)])
            else:

                def step(i: int) -> None:
                    sender.push(sources[i % args.slots])

            for i in range(0, warm_up, batch):
                step(i)
            sender.flush(timeout=60)
            cpu, began = cpu_s(), time.perf_counter()
            marks = []
            for i in range(0, count, batch):
                step(i)
                if timed:
                    marks.append(time.perf_counter())
            sender.flush(timeout=60)
            elapsed, used = time.perf_counter() - began, since(cpu, cpu_s())
            assert sender.statistics().copied == 0, "frames were copied: not what is to be measured"
            peer_used = json.loads(peer.stdout.readline())
            registered.close()
        assert peer.stdin is not None
        peer.stdin.write("\n")
        peer.stdin.close()
        peer.wait(timeout=60)
    finally:
        peer.kill()
        peer.wait()
    result = {"cpu_us": sum(used.values()) / count * 1e6, "peer_cpu_us": sum(peer_used.values()) / count * 1e6}
    result |= {"user_us": used["user_s"] / count * 1e6, "peer_user_us": peer_used["user_s"] / count * 1e6}
    result["value"] = elapsed / count / 2 * 1e6 if kind == "lat" else size * count / elapsed / 1e6
    if timed:
        result |= quantiles([(b - a) / 2 * 1e6 for a, b in itertools.pairwise(marks)])
    return result


# --- perftest ----------------------------------------------------------------------------------------------------------


def build_ring_library(directory: str) -> str:
    """Compile perftest_ring.c there; returns the library's path."""
    library = os.path.join(directory, "perftest_ring.so")
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "perftest_ring.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def perftest(
    args: argparse.Namespace, kind: str, size: int, count: int, *, ring: bool, queue_pairs: int = 1
) -> dict[str, float]:
    tool = "ib_write_lat" if kind == "lat" else "ib_write_bw"
    common = [tool, "-d", args.device, "-x", str(args.gid_index), "-s", str(size), "-F", "-p", str(args.tcp_port)]
    if kind == "lat":
        common += ["-n", str(max(count, 5))]
    else:
        depth = max(1, args.slots // queue_pairs)
        common += ["-q", str(queue_pairs), "-t", str(depth), "-n", str(max(5, count // queue_pairs))]  # -n: of each
    environment = {**os.environ, "LC_ALL": "C"}
    if ring:
        environment |= {"LD_PRELOAD": args.ring_library, "PERFTEST_RING_BYTES": str(max(4096, depth * size))}
    for _ in range(8):  # perftest's clock sampling fails now and then, its port is not always free yet, and it may hang
        args.tcp_port += 1
        common[common.index("-p") + 1] = str(args.tcp_port)
        printed, used = _run_perftest(common, environment)
        rows = re.findall(rf"^ *{size} +(.+)$", printed, re.MULTILINE)
        if rows:
            fields = rows[-1].split()
            # bw: iterations, peak, average [MB/s, of 2**20], rate; lat: iterations, min, max, typical, average, ... [us]
            value = float(fields[4 if kind == "lat" else 2])
            if 0 < value < float("inf"):
                result = {"user_us": used["user_s"] / count * 1e6, "cpu_us": sum(used.values()) / count * 1e6}
                if kind == "lat":
                    return {"value": value, "p50": float(fields[3]), "p99": float(fields[6])} | result
                return {"value": value * (1 << 20) / 1e6} | result
    raise SystemExit(f"{' '.join(common)} gave no figure:\n{printed}")


def _run_perftest(command: list[str], environment: dict[str, str]) -> tuple[str, dict[str, float]]:
    """What the client prints, and the CPU it takes, with all its preparations; a server is started for it."""
    before = cpu_s(resource.RUSAGE_CHILDREN)
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        for _ in range(100):
            client = subprocess.run(
                [*command, "127.0.0.1"], capture_output=True, text=True, timeout=30, env=environment
            )
            if "Couldn't connect" not in client.stderr + client.stdout:
                return client.stdout + client.stderr, since(before, cpu_s(resource.RUSAGE_CHILDREN))
            before = cpu_s(resource.RUSAGE_CHILDREN)
            time.sleep(0.02)
    except subprocess.TimeoutExpired:
        return "it did not end within 30 s", {}
    finally:
        server.kill()
        server.wait()
    return "its server can't be reached", {}


WORKER_CPUS = "/sys/devices/virtual/workqueue/cpumask"


@contextlib.contextmanager
def split_cpus() -> Iterator[None]:
    """The kernel's unbound workers on the first CPU, this process and its children on the others."""
    cpus = os.sched_getaffinity(0)
    first = min(cpus)
    with open(WORKER_CPUS) as file:
        before = file.read().strip()
    os.sched_setaffinity(0, cpus - {first})  # fails where there is one CPU only
    try:
        with open(WORKER_CPUS, "w") as file:
            file.write(f"{1 << first:x}")
        yield
    finally:
        with open(WORKER_CPUS, "w") as file:
            file.write(before)
        os.sched_setaffinity(0, cpus)


# --- both --------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds for each size (default 5)")
    parser.add_argument("--slots", type=int, default=16, help="depth: slots, and perftest's work requests (default 16)")
    parser.add_argument("--queue-pairs", type=int, default=2, help="of each connection of rdmaxfer (default 2)")
    parser.add_argument("--sender-spin", type=float, help="spin_s of the sending process (default: as it sees fit)")
    parser.add_argument("--receiver-spin", type=float, help="spin_s of the receiving process (default: as it sees fit)")
    parser.add_argument(
        "--batch",
        type=int,
        default=8,
        help='frames of a call of push_many and recv_many, for "batches" (default 8)',
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="payload bytes")
    parser.add_argument("--kinds", nargs="+", choices=["bw", "lat"], default=["bw", "lat"])
    parser.add_argument("--cpus", nargs="+", choices=["shared", "split"], default=["shared", "split"], help="see above")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of frames a round")
    parser.add_argument("--json", metavar="FILE", help="write all rounds to FILE, too")
    args = parser.parse_args()
    for name in ("slots", "queue_pairs", "batch"):
        value = getattr(args, name)
        if value < 1 or value & (value - 1):
            parser.error(f"--{name.replace('_', '-')} must be a power of two: perftest aligns its ring to its size")
    if args.queue_pairs > min(8, args.slots):
        parser.error("--queue-pairs is at most 8, and at most --slots")
    if not shutil.which("ib_write_bw"):
        parser.error("ib_write_bw is not installed: it comes with the package perftest")
    if (
        "bw" in args.kinds
        and "split" in args.cpus
        and not (os.access(WORKER_CPUS, os.W_OK) and (os.cpu_count() or 1) > 1)
    ):
        parser.error(
            f"the CPUs can't be split here: that takes two of them, and root to write {WORKER_CPUS}; try --cpus shared"
        )
    route = choose_gid(
        list_devices(), device=os.environ.get("RDMAXFER_DEVICE") or None, local_ip=local_ip_towards("127.0.0.1")
    )
    args.device, args.gid_index, args.tcp_port = route.device, route.gid_index, 18515
    print(
        f"device {route.device}, GID {route.gid_index}, MTU {route.active_mtu}, {os.cpu_count()} CPUs, depth {args.slots}, "
        f"{args.queue_pairs} queue pairs, {args.rounds} rounds, spin_s {args.sender_spin} and {args.receiver_spin}, "
        f"batches of {args.batch}"
    )
    print(
        f"{'':>10} {'CPUs':>6} {'bytes':>8} {'rdmaxfer':>9} {'perftest':>9} {'ratio':>6} "
        f"{'batches':>9} {'ratio':>6} {'as many QPs':>12} {'ratio':>6} {'one buffer':>11} {'ratio':>6} "
        f"{'CPU us/frame: sender':>21} {'receiver':>9}"
    )
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as directory:
        args.ring_library = build_ring_library(directory)
        for kind, cpus in itertools.product(args.kinds, args.cpus):
            if kind == "bw" or cpus == "shared":
                with split_cpus() if cpus == "split" else contextlib.nullcontext():
                    for size in args.sizes:
                        if cpus == "split" and size not in SPLIT:
                            continue
                        results.append(compare(args, kind, cpus, size))  # written below as they come
                        if args.json:
                            about = {
                                "device": route.device,
                                "mtu": route.active_mtu,
                                "slots": args.slots,
                                "rows": results,
                            }
                            with open(args.json, "w") as file:
                                json.dump(about, file)


def compare(args: argparse.Namespace, kind: str, cpus: str, size: int) -> dict[str, object]:
    args = argparse.Namespace(**{**vars(args), "slots": max(args.queue_pairs, min(args.slots, RING_BYTES // size))})
    count = max(20, int(SIZES.get(size, 200) * args.scale))
    if kind == "lat":
        count = min(count, 1000)
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "rdmaxfer": lambda: ours(args, kind, size, count),
        "perftest": lambda: perftest(args, kind, size, count, ring=kind == "bw"),
    }
    if kind == "lat":
        runs["timed"] = lambda: ours(args, kind, size, count, timed=True)
    if kind == "bw":
        runs["batches"] = lambda: ours(args, kind, size, count, batch=args.batch)
        runs["as many QPs"] = lambda: perftest(args, kind, size, count, ring=True, queue_pairs=args.queue_pairs)
        runs["one buffer"] = lambda: perftest(args, kind, size, count, ring=False)
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        order = list(runs) if number % 2 == 0 else list(reversed(runs))
        rounds.append({name: runs[name]() for name in order})

    def median(name: str, figure: str) -> float:
        return statistics.median(each[name][figure] for each in rounds)

    mine = median("rdmaxfer", "value")
    line = f"{'us one way' if kind == 'lat' else 'MB/s':>10} {cpus:>6} {size:>8} {mine:>9.1f}"
    for name, width in (("perftest", 9), ("batches", 9), ("as many QPs", 12), ("one buffer", 11)):
        if name in runs:
            theirs = median(name, "value")
            ratio = theirs / mine if kind == "lat" else mine / theirs
            if name == "batches":
                ratio = theirs / median("perftest", "value")
            line += f" {theirs:>{width}.1f} {ratio:>6.2f}"
        else:
            line += f" {'-':>{width}} {'-':>6}"
    cpu, peer_cpu = (median("rdmaxfer", figure) for figure in ("cpu_us", "peer_cpu_us"))
    print(f"{line} {cpu:>21.1f} {peer_cpu:>9.1f}", flush=True)
    return {"kind": kind, "cpus": cpus, "bytes": size, "slots": args.slots, "count": count, "rounds": rounds}


if __name__ == "__main__":
    if sys.argv[1:2] == ["receive"]:
        child = argparse.ArgumentParser()
        child.add_argument("--kind")
        for name in ("--size", "--count", "--warm-up", "--slots", "--queue-pairs", "--batch"):
            child.add_argument(name, type=int)
        child.add_argument("--spin", type=float)
        receive(child.parse_args(sys.argv[2:]))
    else:
        main()
