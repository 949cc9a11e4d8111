"""`rdmaxfer replay`: frames out of a file."""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

from rdmaxfer.cli import options
from rdmaxfer.cli.digest import ALGORITHMS, digest
from rdmaxfer.cli.failure import Exit
from rdmaxfer.cli.progress import Progress
from rdmaxfer.cli.recording import read
from rdmaxfer.cli.send import flush, meet

HELP = "send what was recorded"
DESCRIPTION = """\
Send the frames of a file that `rdmaxfer record` has written, with their metadata and capture times, in the order and at the pace
in which they were pushed. Frames of several senders come from one, then.
"""
EXAMPLES = """\
examples:
  rdmaxfer replay run42.h5 tcp://10.0.0.2:7471
  rdmaxfer replay run42.h5 tcp://10.0.0.2:7471 --speed 10      ten times as fast
  rdmaxfer replay run42.h5 tcp://10.0.0.2:7471 --speed max     as fast as it goes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a recording")
    parser.add_argument("endpoint", metavar="ENDPOINT", help=options.ENDPOINT_HELP)
    parser.add_argument(
        "--speed", metavar="X", type=_speed, default=1.0, help="X times as fast as it was recorded, or `max` (1)"
    )
    parser.add_argument("--count", metavar="N", type=options.whole_number(1), help="only the first N frames")
    parser.add_argument(
        "--hash", choices=[*ALGORITHMS, "none"], default="sha256", help="hash to attach to each frame (sha256)"
    )
    parser.add_argument("--bind", action="store_true", help="listen at ENDPOINT rather than connect to it")
    parser.add_argument(
        "--peers",
        metavar="N",
        type=options.whole_number(1),
        default=1,
        help="with --bind: begin when N receivers are there (1)",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=options.positive,
        help="longest wait in seconds: for the receiver (30; no limit with --bind), for it to take frames (no limit)",
    )
    options.add_slot_option(parser)
    options.add_key_options(parser)
    options.add_fabric_option(parser)
    options.add_device_options(parser)


def _speed(text: str) -> float:
    return 0.0 if text == "max" else options.positive(text)


def run(args: argparse.Namespace) -> int:
    recorded = itertools.islice(read(args.file), args.count)
    first = next(recorded, None)
    progress = Progress("sent")
    with options.make_sender(args, slots=args.slots) as sender:
        meet(sender, args)
        progress.start()
        begun_s = time.monotonic()
        try:
            for each in itertools.chain([first] if first is not None else [], recorded):
                assert first is not None
                if args.speed:
                    due_s = begun_s + (each.pushed_ns - first.pushed_ns) / 1e9 / args.speed
                    time.sleep(max(0.0, due_s - time.monotonic()))
                metadata: dict[str, Any] = {key: value for key, value in each.metadata.items() if key not in ALGORITHMS}
                if args.hash != "none":
                    metadata[args.hash] = digest(each.array, args.hash)
                sender.push(each.array, metadata=metadata, captured_ns=each.captured_ns, timeout=args.timeout)
                progress.add(each.array.nbytes)
            flush(sender, args.timeout)
            progress.finish()
        finally:
            progress.clear()
            print(progress)
    return Exit.OK
