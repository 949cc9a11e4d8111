#!/usr/bin/env python3
"""rdmaxfer against other transfer engines that pip can install, on one RDMA device, in alternating runs.

    scripts/softroce_uml.sh --rw DIR -- .venv/bin/python bench/vs_peers.py --peers DIR [--rounds 5] [--sizes 65536 1048576]

DIR/NAME/bin/python is a Python in which the engine NAME is installed: dlslime, mooncake or nixl (scripts/bench.sh makes them). Two
processes, each with a ring of 16 slots in registered memory. Throughput: one writes, with up to 16 frames on their way. Latency: a
frame there and another one back, halved.

Not the same is asked of all: with rdmaxfer, the other process takes every frame and gives its slot back before it is written again.
The engines only write: the other process does not know that there is a frame (its memory is compared at the end), and nothing keeps
the next one from being written over it. For latency it watches the last bytes of its memory, or (dlslime) waits for an immediate.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIZES = {64: 1000, 4096: 1000, 65536: 600, 1 << 20: 200, 8 << 20: 48}
SLOTS = 16
NAMES = ("dlslime", "mooncake", "nixl")
PATIENCE_S = 90.0


class Side:
    """One process. Its memory: a ring to write from, and behind it one to be written to."""

    def __init__(self, device: str, size: int) -> None:
        self.device, self.size = device, size
        self.sources = np.zeros((SLOTS, size), np.uint8)
        self.targets = np.zeros((SLOTS, size), np.uint8)
        for number, row in enumerate(self.sources):
            row[:] = number + 1

    def info(self) -> Any:
        """What the other process must know, as JSON."""

    def connect(self, there: Any) -> None: ...

    def start(self, slot: int) -> Any:
        """Begin to write a slot."""

    def done(self, started: Any) -> bool:
        raise NotImplementedError

    def finish(self, started: Any) -> None:
        while not self.done(started):
            pass

    # --- what is measured: by default by what is above ---

    def stream(self, count: int) -> None:
        under_way: collections.deque[Any] = collections.deque()
        for number in range(count):
            if len(under_way) == SLOTS:
                self.finish(under_way.popleft())
            under_way.append(self.start(number % SLOTS))
        while under_way:
            self.finish(under_way.popleft())

    def take(self, count: int) -> None:
        """The other side of `stream`."""

    def arrived(self) -> bool:
        """Whether all that was streamed is where it should be."""
        return all((row == number + 1).all() for number, row in enumerate(self.targets))

    def ping(self, number: int) -> None:
        self.sources[0, -1] = number % 250 + 1
        self.finish(self.start(0))

    def pong(self, number: int) -> None:
        """Wait for what the other side's `ping` has written."""
        target, expected = self.targets[0], number % 250 + 1
        while target[-1] != expected:
            pass


class Dlslime(Side):
    def __init__(self, device: str, size: int) -> None:
        super().__init__(device, size)
        import dlslime

        self.endpoint = dlslime.RDMAEndpoint(device_name=device, ib_port=1, link_type="RoCE", num_qp=2)
        self.source_key = self.endpoint.register_memory_region("s", self.sources.ctypes.data, 0, self.sources.nbytes)
        self.endpoint.register_memory_region("t", self.targets.ctypes.data, 0, self.targets.nbytes)

    def info(self) -> Any:
        return self.endpoint.endpoint_info()

    def connect(self, there: Any) -> None:
        self.endpoint.connect(there)
        self.target_key = self.endpoint.register_remote_memory_region("t", there["mr_info"]["t"])
        self.expected = self.endpoint.imm_recv()

    def assign(self, slot: int) -> list[tuple[int, int, int, int, int]]:
        at = slot * self.size
        return [(self.source_key, self.target_key, at, at, self.size)]

    def start(self, slot: int) -> Any:
        return self.endpoint.write(self.assign(slot), None)

    def finish(self, started: Any) -> None:
        started.wait()

    def ping(self, number: int) -> None:
        self.endpoint.write_with_imm(self.assign(0), number % 1000, None).wait()

    def pong(self, number: int) -> None:
        self.expected.wait()
        self.expected = self.endpoint.imm_recv()


class Mooncake(Side):
    def __init__(self, device: str, size: int) -> None:
        super().__init__(device, size)
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "rdma", device):
            raise SystemExit("mooncake can't be initialized")
        for ring in (self.sources, self.targets):
            if self.engine.register_memory(ring.ctypes.data, ring.nbytes):
                raise SystemExit("mooncake can't register memory")

    def info(self) -> Any:
        return [f"127.0.0.1:{self.engine.get_rpc_port()}", self.targets.ctypes.data]

    def connect(self, there: Any) -> None:
        self.host, self.address = there

    def start(self, slot: int) -> Any:
        at = slot * self.size
        return self.engine.transfer_submit_write(self.host, self.sources.ctypes.data + at, self.address + at, self.size)

    def done(self, started: Any) -> bool:
        status = self.engine.transfer_check_status(started)
        if status < 0:
            raise SystemExit(f"mooncake failed to write: {status}")
        return bool(status)

    def ping(self, number: int) -> None:
        self.sources[0, -1] = number % 250 + 1
        if self.engine.transfer_sync_write(self.host, self.sources.ctypes.data, self.address, self.size):
            raise SystemExit("mooncake failed to write")


class Nixl(Side):
    def __init__(self, device: str, size: int) -> None:
        super().__init__(device, size)
        os.environ |= {"UCX_NET_DEVICES": f"{device}:1", "UCX_TLS": "rc_verbs,ud_verbs", "UCX_LOG_LEVEL": "error"}
        from nixl_cu12._api import nixl_agent, nixl_agent_config

        self.agent = nixl_agent(f"side{os.getpid()}", nixl_agent_config(backends=["UCX"]))
        self.kept = [
            self.agent.register_memory([(ring.ctypes.data, ring.nbytes, 0, "")], "DRAM")
            for ring in (self.sources, self.targets)
        ]

    def info(self) -> Any:
        return [self.agent.get_agent_metadata().hex(), self.targets.ctypes.data]

    def connect(self, there: Any) -> None:
        peer = self.agent.add_remote_agent(bytes.fromhex(there[0]))
        rows = [
            [(start + slot * self.size, self.size, 0) for slot in range(SLOTS)]
            for start in (self.sources.ctypes.data, there[1])
        ]
        local = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", rows[0], "DRAM")
        remote = self.agent.prep_xfer_dlist(peer, rows[1], "DRAM")
        self.handles = [self.agent.make_prepped_xfer("WRITE", local, [slot], remote, [slot]) for slot in range(SLOTS)]

    def start(self, slot: int) -> Any:
        self.agent.transfer(self.handles[slot])
        return slot

    def done(self, started: Any) -> bool:
        state = self.agent.check_xfer_state(self.handles[started])
        if state == "ERR":
            raise SystemExit("nixl failed to write")
        return bool(state == "DONE")


class Rdmaxfer(Side):
    def __init__(self, device: str, size: int) -> None:
        super().__init__(device, size)
        import rdmaxfer

        options: dict[str, Any] = {"device": device, "fabric": "verbs", "slots": SLOTS, "slot_bytes": size}
        self.sender, self.receiver = rdmaxfer.Sender(**options), rdmaxfer.Receiver(**options)
        self.sender.register(self.sources)
        self.good = True

    def info(self) -> Any:
        return self.receiver.bind("tcp://127.0.0.1:*")

    def connect(self, there: Any) -> None:
        self.sender.connect(there)

    def stream(self, count: int) -> None:
        for number in range(count):
            self.sender.push(self.sources[number % SLOTS])
        self.sender.flush(timeout=60)
        assert self.sender.statistics().copied == 0, "frames were copied: not what is to be measured"

    def take(self, count: int) -> None:
        for number in range(count):
            with self.receiver.recv(timeout=60) as frame:
                if number >= count - SLOTS:  # as the engines' are: the last ring
                    self.good = self.good and bool((frame.array == frame.seq % SLOTS + 1).all())

    def arrived(self) -> bool:
        return self.good

    def ping(self, number: int) -> None:
        self.sender.push(self.sources[0])

    def pong(self, number: int) -> None:
        self.receiver.recv(timeout=60).release()


KINDS: dict[str, type[Side]] = {"rdmaxfer": Rdmaxfer, "dlslime": Dlslime, "mooncake": Mooncake, "nixl": Nixl}


ENVIRONMENTS: dict[str, Callable[[str], dict[str, str]]] = {
    # It looks for devices by their NUMA nodes, of which the guest has none, and goes on over TCP if it finds none.
    "mooncake": lambda home: {"MC_CUSTOM_TOPO_JSON": os.path.join(home, "topology.json")},
    # It brings libibverbs, and no driver for Soft-RoCE: scripts/bench.sh puts the distribution's there.
    "nixl": lambda home: {"LD_LIBRARY_PATH": os.path.join(home, "drivers")},
}
"""What the engines need here, by the directory that they are installed in."""


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def side(args: argparse.Namespace) -> None:
    """One process: says what it is, is told of the other one, and does what it is told."""
    out = os.fdopen(os.dup(1), "w")  # engines write to stdout
    os.dup2(2, 1)
    me = KINDS[args.side](args.device, args.size)

    def say(what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    say(me.info())
    me.connect(json.loads(sys.stdin.readline()))
    say("ready")
    first = args.first
    for line in sys.stdin:
        kind, count = json.loads(line)
        cpu, start = cpu_s(), time.perf_counter()
        if kind == "bw":
            (me.stream if first else me.take)(count)
        elif kind == "lat":
            for number in range(count):
                if first:
                    me.ping(number)
                me.pong(number)
                if not first:
                    me.ping(number)
        else:
            say(me.arrived())
            continue
        say([time.perf_counter() - start, cpu_s() - cpu])
    os._exit(0)  # engines may take long, or crash, when they are taken down


class Failed(Exception):
    """An engine did not do what it should."""


class Pair:
    """Two processes."""

    def __init__(self, python: str, name: str, device: str, size: int) -> None:
        command = [python, __file__, "--side", name, "--device", device, "--size", str(size)]
        quiet = None if os.environ.get("VERBOSE") else subprocess.DEVNULL
        environment = {
            **os.environ,
            **ENVIRONMENTS.get(name, lambda home: {})(os.path.dirname(os.path.dirname(python))),
        }
        self.processes = [
            subprocess.Popen(
                [*command, *more],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=quiet,
                text=True,
                env=environment,
            )
            for more in (["--first"], [])
        ]

    def tell(self, *what: Any) -> list[Any]:
        """Tell each, or all the same, something; what they answer."""
        for process, each in zip(self.processes, what * 2 if len(what) == 1 else what, strict=False):
            assert process.stdin is not None
            process.stdin.write(json.dumps(each) + "\n")
            process.stdin.flush()
        return self.hear()

    def hear(self) -> list[Any]:
        heard = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise Failed(f"it ended with {process.wait()}")
            heard.append(json.loads(line))
        return heard

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def measure(python: str, name: str, device: str, size: int, scale: float) -> dict[str, float]:
    """Throughput in MB/s, microseconds one way, and those of CPU for each frame of the throughput, of both processes."""
    import threading

    count = max(2 * SLOTS, int(SIZES.get(size, 200) * scale))
    pair = Pair(python, name, device, size)
    guard = threading.Timer(PATIENCE_S, pair.close)
    guard.start()
    try:
        pair.tell(*reversed(pair.hear()))
        pair.tell(["bw", 2 * SLOTS])
        (took, cpu), (_, peer_cpu) = pair.tell(["bw", count])
        if not pair.tell(["check", 0])[1]:
            raise Failed("what arrived is not what was sent")
        trips = max(10, count // 10)
        pair.tell(["lat", 5])
        (trip, _), _ = pair.tell(["lat", trips])
    except (OSError, ValueError) as error:
        raise Failed(str(error) or "it did not end in time") from None
    finally:
        guard.cancel()
        pair.close()
    return {
        "mb_s": size * count / took / 1e6,
        "us": trip / trips / 2 * 1e6,
        "cpu_us": cpu / count * 1e6,
        "peer_cpu_us": peer_cpu / count * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="directory with the Pythons")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--device", default="rxe0")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of frames")
    parser.add_argument("--json", metavar="FILE", help="write all rounds to FILE, too")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side(args)
        return
    if not args.peers:
        parser.error("--peers DIR is missing: the directory with the engines' Pythons")
    pythons = {"rdmaxfer": sys.executable}
    pythons |= {name: os.path.join(os.path.abspath(args.peers), name, "bin/python") for name in args.names}
    failed: dict[str, str] = {}
    rows = []
    print(
        f"{'bytes':>8} {'':>9} {'MB/s':>9} {'ours/its':>9} {'us':>9} {'ours/its':>9}   CPU us/frame: sender  receiver"
    )
    for size in args.sizes:
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(args.rounds):
            found = {}
            for name in list(pythons) if number % 2 else list(reversed(pythons)):
                if name not in failed:
                    try:
                        found[name] = measure(pythons[name], name, args.device, size, args.scale)
                    except Failed as error:
                        if name == "rdmaxfer":
                            raise
                        failed[name] = f"with {size} bytes: {error}"
            rounds.append(found)
        rows.append({"bytes": size, "rounds": rounds})
        for name in pythons:
            mine = [each["rdmaxfer"] for each in rounds if name in each]
            its = [each[name] for each in rounds if name in each]
            if not its:
                continue
            median = {figure: statistics.median(each[figure] for each in its) for figure in its[0]}
            faster = statistics.median(a["mb_s"] / b["mb_s"] for a, b in zip(mine, its, strict=True))
            slower = statistics.median(a["us"] / b["us"] for a, b in zip(mine, its, strict=True))
            print(
                f"{size:>8} {name:>9} {median['mb_s']:>9.1f} {faster:>9.2f} {median['us']:>9.1f} {slower:>9.2f} "
                f"{median['cpu_us']:>23.1f} {median['peer_cpu_us']:>9.1f}",
                flush=True,
            )
    for name, why in failed.items():
        print(f"{name} failed {why}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rows": rows, "failed": failed}, file)


if __name__ == "__main__":
    main()
