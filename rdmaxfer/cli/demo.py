"""`rdmaxfer demo`: photographs from one process to another on this machine, with evidence of how they went."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

import rdmaxfer
from rdmaxfer.cli import counters, options, photos
from rdmaxfer.cli.digest import digest
from rdmaxfer.cli.failure import CommandError, Exit
from rdmaxfer.cli.progress import Progress, megabytes
from rdmaxfer.fabric.devices import Route, choose_gid, list_devices
from rdmaxfer.fabric.route import local_ip_towards

HELP = "move photographs between two processes here, and prove it"
DESCRIPTION = """\
Move real photographs (those that come with scikit-image, as 1080 x 1920 frames, all different) from this process to a
second one, through an RDMA device of this machine, and check at the other end that every byte has arrived.

It then shows how they went: the completions of one-sided writes that the receiver polled, and the packet counters that
the device itself keeps. One received picture is saved for you to look at.
"""
EXAMPLES = """\
examples:
  rdmaxfer demo
  rdmaxfer demo --device rxe0 --count 200 --save received.jpg
"""
HOST = "127.0.0.1"
ALGORITHM = "blake2b"
RECEIVER = "rdmaxfer.cli.demo_receiver"  # by name: a module that is run may not be imported before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--count", metavar="N", type=options.whole_number(1), default=64, help="photographs to move (64)"
    )
    parser.add_argument(
        "--save", metavar="FILE", help="where to save a received picture (a new file in a temporary directory)"
    )
    options.add_slot_option(parser)
    options.add_device_options(parser)


def run(args: argparse.Namespace) -> int:
    files = photos.find()
    ip = local_ip_towards(HOST)
    route = choose_gid(
        list_devices(), device=args.device, port=args.device_port, gid_index=args.gid_index, local_ip=ip, peer_ip=ip
    )
    kind = counters.driver(route.device)
    print(f"device:    {route.device}, {kind}; port {route.port}, {route.link_layer}, {route.gid_type}", flush=True)
    save = (
        str(Path(args.save).resolve())
        if args.save
        else str(Path(tempfile.mkdtemp(prefix="rdmaxfer-demo-")) / "received.jpg")
    )
    with _start_receiver(args, save) as child:
        try:
            code = _run_with(child, args, files, route)
        finally:
            if child.poll() is None:
                child.kill()
    return code


def _run_with(child: subprocess.Popen[str], args: argparse.Namespace, files: list[Path], route: Route) -> int:
    images = photos.load(files)
    print(f"pictures:  {args.count} frames of {_shape()} from {len(images)} photographs")
    endpoint = _answer(child)["endpoint"]
    before = counters.read(route.device, route.port)
    args.fabric = "verbs"  # else it would be shared memory, on one machine
    with options.make_sender(args, slots=args.slots) as sender:
        sender.connect(endpoint)
        for link in sender.links():
            print(f"fabric:    {link.fabric}; {link.reason}", flush=True)
        checked = _send_checked(sender, images, args.count)
        fast = _send_fast(sender, images, args.count)
        result = _answer(child)
    if child.stdin is not None:
        child.stdin.close()
    child.wait()
    after = counters.read(route.device, route.port)
    return _tell(result, args.count, checked, fast, {name: after[name] - before.get(name, 0) for name in after})


def _start_receiver(args: argparse.Namespace, save: str) -> subprocess.Popen[str]:
    wishes = {
        "arguments": {
            **options.device_arguments(args),
            "fabric": "verbs",
            "slots": args.slots,
            "slot_bytes": math.prod(photos.SHAPE),
        },
        "host": HOST,
        "count": args.count,
        "algorithm": ALGORITHM,
        "save": save,
    }
    command = [sys.executable, "-m", RECEIVER, json.dumps(wishes)]
    # Elsewhere than here: with -m, Python would look into the current folder first, and find the sources in a checkout.
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")


def _answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON that the receiving process prints."""
    stdout: IO[str] | None = child.stdout
    line = stdout.readline() if stdout is not None else ""
    if not line:
        code = child.wait()
        known = Exit(code) if code in set(Exit) and code else Exit.FAILED
        raise CommandError("the receiving process has failed (see above).", code=known)
    answer: dict[str, Any] = json.loads(line)
    return answer


def _send_checked(sender: rdmaxfer.Sender, images: list[np.ndarray[Any, Any]], count: int) -> Progress:
    """Each picture is made right in registered memory, hashed there, and pushed from there."""
    progress = Progress("sent")
    progress.start()
    for number in range(count):
        with sender.reserve(photos.SHAPE, np.uint8) as slot:
            photos.compose(number, images, slot.array)
            slot.captured_ns = time.time_ns()
            slot.metadata = {"index": number, ALGORITHM: digest(slot.array, ALGORITHM)}
            progress.add(slot.array.nbytes)
    sender.flush()
    progress.finish()
    progress.clear()
    return progress


def _send_fast(sender: rdmaxfer.Sender, images: list[np.ndarray[Any, Any]], count: int) -> Progress:
    """As many frames again, all the same picture in registered memory: nothing is timed but the transfer."""
    progress = Progress("sent")
    picture = np.empty(photos.SHAPE, np.uint8)
    photos.compose(0, images, picture)
    with sender.register(picture):
        progress.start()
        for _ in range(count):
            sender.push(picture)
            progress.add(picture.nbytes)
        sender.flush()
    progress.finish()
    progress.clear()
    return progress


def _tell(result: dict[str, Any], count: int, checked: Progress, fast: Progress, moved: dict[str, int]) -> int:
    right, distinct = result["right"], result["distinct"]
    writes, pid = result["writes"], result["pid"]
    good = right == distinct == count and writes >= 2 * count and result["frames"] == 2 * count
    print(f"checked:   {right} of {count} arrived byte for byte ({ALGORITHM}); {distinct} different pictures")
    print(f"rate:      {_rate(checked)}, with making and hashing each picture at both ends")
    print(f"           {_rate(fast)}, the transfer alone (zero copy, {count} more frames)")
    print(f"evidence:  process {pid} polled {writes} WRITE_WITH_IMM completions for {2 * count} frames")
    print(f"           the device's own counters: {counters.describe(moved)}")
    if result["saved"]:
        print(f"picture:   {result['saved']}")
    if not good:
        raise CommandError("what arrived is not what was sent (see above).", code=Exit.NOT_VERIFIED)
    return Exit.OK


def _rate(progress: Progress) -> str:
    seconds = max(progress.seconds, 1e-9)
    return f"{progress.frames / seconds:.1f} frames/s, {megabytes(progress.bytes / seconds)}/s"


def _shape() -> str:
    return " x ".join(map(str, photos.SHAPE))
