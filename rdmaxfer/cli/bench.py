"""`rdmaxfer bench`: how fast is it here?"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import rdmaxfer
from rdmaxfer.cli import options
from rdmaxfer.cli.failure import CommandError, Exit

HELP = "measure rates and latencies, here or to another machine"
DESCRIPTION = """\
Push frames of several sizes to a receiver, which takes each and gives it back, and print a table: frames and megabytes a second
with a ring full of frames on their way, and how long one frame takes by itself, from push until it was given back.

Without ENDPOINT, to a process on this machine. With it, to `rdmaxfer recv` on another one; start that first. Frames are filled
in place, so nothing is copied (and by shared memory, nothing is even moved); with --copy each is copied once, as
`push(array)` does.

Processors that are busy with something else, energy saving and virtual machines change the figures: run it several times. How
rdmaxfer compares with other programs is in docs/performance.md.
"""
EXAMPLES = """\
examples:
  rdmaxfer bench                                 within this machine
  rdmaxfer bench --fabric verbs --plot bench.png
  there$  rdmaxfer recv tcp://0.0.0.0:7471
  here$   rdmaxfer bench tcp://THERE:7471
"""
SIZES = (64, 4096, 65536, 1 << 20, 8 << 20)
WAIT_S = 30.0
WARM_UP = 16
LEAST = 5


class Row(NamedTuple):
    """What was measured of one size."""

    nbytes: int
    frames_per_s: float
    mb_per_s: float
    median_us: float
    p99_us: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "endpoint", metavar="ENDPOINT", nargs="?", help="a receiver, tcp://HOST:PORT (one is started here)"
    )
    parser.add_argument(
        "--sizes",
        metavar="SIZE",
        nargs="+",
        type=options.size,
        default=list(SIZES),
        help="bytes a frame (64 4K 64K 1M 8M)",
    )
    parser.add_argument("--seconds", metavar="S", type=options.positive, default=1.0, help="time for each figure (1)")
    parser.add_argument(
        "--copy", action="store_true", help="push arrays, which are copied, rather than fill slots in place"
    )
    parser.add_argument("--plot", metavar="FILE", help="save a plot there, .png or .svg (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options.add_slot_option(parser)
    options.add_key_options(parser)
    options.add_fabric_option(parser)
    options.add_device_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.plot:
        _pyplot()  # complains before the time is spent
    with contextlib.ExitStack() as stack:
        endpoint = args.endpoint or stack.enter_context(_receiver(args))
        sender = stack.enter_context(options.make_sender(args, slots=args.slots))
        sender.connect(endpoint, timeout=WAIT_S, peer_key=args.peer_key)
        (link,) = sender.links()
        if not args.json:
            print(f"to {link.peer}, over {link.fabric}: {link.reason}")
            print(f"{'bytes':>10} {'frames/s':>10} {'MB/s':>9} {'one frame, µs: median':>22} {'99 %':>9}", flush=True)
        rows = []
        for nbytes in args.sizes:
            rows.append(measure(sender, nbytes, args.seconds, copy=args.copy))
            if not args.json:
                print(line(rows[-1]), flush=True)
    if args.json:
        print(
            json.dumps(
                {"fabric": link.fabric, "reason": link.reason, "rows": [row._asdict() for row in rows]}, indent=2
            )
        )
    if args.plot:
        plot(args.plot, rows, f"rdmaxfer over {link.fabric}")
        options.say(f"wrote {args.plot}")
    return Exit.OK


@contextlib.contextmanager
def _receiver(args: argparse.Namespace) -> Iterator[str]:
    """A receiver in another process of this machine, and its endpoint."""
    command = [sys.executable, "-m", "rdmaxfer", "recv", "tcp://127.0.0.1:*", "--slots", str(args.slots)]
    for name in ("fabric", "device", "device_port", "gid_index"):
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    # Elsewhere than here: with -m, Python would look into the current folder first, and find the sources in a checkout.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/") as child:
        try:
            assert child.stderr is not None
            said = child.stderr.readline()
            found = re.search(r"listening at (\S+)", said)
            if found is None:
                raise CommandError(f"the receiver did not start: {said.strip()}")
            yield found[1]
        finally:
            child.kill()


def measure(sender: rdmaxfer.Sender, nbytes: int, seconds: float, *, copy: bool) -> Row:
    source = np.zeros(nbytes, np.uint8)

    def push() -> None:
        if copy:
            sender.push(source, timeout=WAIT_S)
        else:
            with sender.reserve(nbytes, timeout=WAIT_S):
                pass  # as if a camera had filled it

    for _ in range(WARM_UP):
        push()
    sender.flush(timeout=WAIT_S)
    frames, begun_s = 0, time.perf_counter()
    while time.perf_counter() - begun_s < seconds or frames < LEAST:
        push()
        frames += 1
    sender.flush(timeout=WAIT_S)
    took_s = time.perf_counter() - begun_s
    each_us: list[float] = []
    begun_s = time.perf_counter()
    while time.perf_counter() - begun_s < seconds or len(each_us) < LEAST:
        before_s = time.perf_counter()
        push()
        sender.flush(timeout=WAIT_S)
        each_us.append((time.perf_counter() - before_s) * 1e6)
    each_us.sort()
    return Row(
        nbytes,
        frames / took_s,
        frames * nbytes / took_s / 1e6,
        statistics.median(each_us),
        each_us[min(len(each_us) - 1, int(0.99 * len(each_us)))],
    )


def line(row: Row) -> str:
    return f"{row.nbytes:>10} {row.frames_per_s:>10.0f} {row.mb_per_s:>9.1f} {row.median_us:>22.0f} {row.p99_us:>9.0f}"


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot
    except ImportError:
        raise CommandError("--plot needs the package matplotlib.", fix="pip install 'rdmaxfer[bench]'.") from None
    return matplotlib.pyplot


def plot(path: str, rows: list[Row], title: str) -> None:
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(10, 3.8))
    sizes = [row.nbytes for row in rows]
    left.plot(sizes, [row.mb_per_s for row in rows], "o-")
    left.set(xscale="log", yscale="log", xlabel="bytes a frame", title="MB/s (more is better)")
    right.plot(sizes, [row.median_us for row in rows], "o-", label="median")
    right.plot(sizes, [row.p99_us for row in rows], "o:", label="99 %")
    right.set(xscale="log", yscale="log", xlabel="bytes a frame", title="one frame, µs (less is better)")
    right.legend()
    figure.suptitle(title)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} can't be written: {error}.", fix="a name that ends in .png or .svg.") from None
