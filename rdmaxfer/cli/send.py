"""`rdmaxfer send`: push files, or a pattern, to a receiver."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import rdmaxfer
from rdmaxfer.cli import options
from rdmaxfer.cli.digest import ALGORITHMS
from rdmaxfer.cli.failure import CommandError, Exit
from rdmaxfer.cli.progress import Progress
from rdmaxfer.cli.sources import Files, Item, Joined, Pattern, Video, expand, is_video, repeated
from rdmaxfer.errors import PeerLost

HELP = "send images, .npy arrays, a video, a camera or a test pattern"
DESCRIPTION = """\
Send images, .npy arrays, a video, a camera's frames or a made-up test pattern to `rdmaxfer recv`, or to any program with an
rdmaxfer.Receiver.

A hash of every frame travels along, so that the other end can verify what arrived. The two sides may be started in
either order. Normally the receiver listens and the sender connects; with --bind here and --connect there it is the
other way round.
"""
EXAMPLES = """\
examples:
  rdmaxfer send tcp://10.0.0.2:7471 photos/
      every image and .npy of a directory, sorted by name
  rdmaxfer send tcp://10.0.0.2:7471 'scan/*.npy' --split
      each .npy is a stack: send it slice by slice
  rdmaxfer send tcp://10.0.0.2:7471 --pattern 1080x1920x3:uint8 --count 600 --fps 60
      ten seconds of a made-up full HD video
  rdmaxfer send tcp://10.0.0.2:7471 film.mp4 --fps 25 --repeat forever
      a video, again and again (needs OpenCV: pip install 'rdmaxfer[video]')
  rdmaxfer send tcp://10.0.0.2:7471 camera:0 --hash none
      what the first camera of this machine sees
  rdmaxfer send tcp://0.0.0.0:7471 photos/ --bind
      listen, and send to who connects
"""
DEFAULT_COUNT = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("endpoint", metavar="ENDPOINT", help=options.ENDPOINT_HELP)
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="*", help=".npy, image or video files, directories, globs, camera:0"
    )
    parser.add_argument("--pattern", metavar="SHAPE:DTYPE", help="send made-up frames, e.g. 1080x1920x3:uint8")
    parser.add_argument(
        "--count",
        metavar="N",
        type=options.whole_number(1),
        help=f"send only N frames, or N made-up ones ({DEFAULT_COUNT})",
    )
    parser.add_argument("--split", action="store_true", help="send each .npy array along its first axis, part by part")
    parser.add_argument("--repeat", metavar="N", type=_repeat, default=1, help="send everything N times, or `forever`")
    parser.add_argument(
        "--fps", metavar="F", type=options.positive, help="frames per second (default: as fast as it goes)"
    )
    parser.add_argument(
        "--hash",
        choices=[*ALGORITHMS, "none"],
        default="sha256",
        help="hash to attach to each frame (sha256); none is faster",
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
    options.add_metrics_option(parser)
    options.add_slot_option(parser)
    options.add_key_options(parser)
    options.add_fabric_option(parser)
    options.add_device_options(parser)


def _repeat(text: str) -> int:
    return 0 if text == "forever" else options.whole_number(1)(text)


def run(args: argparse.Namespace) -> int:
    items = _items(args)
    with options.make_sender(args, slots=args.slots) as sender:
        options.serve_metrics(args)
        meet(sender, args)
        progress = Progress("sent")
        try:
            _push_all(sender, items, args, progress)
            flush(sender, args.timeout)
            progress.finish()
        finally:
            progress.clear()
            print(progress)
    return Exit.OK


def meet(sender: rdmaxfer.Sender, args: argparse.Namespace) -> None:
    if not args.bind:
        timeout = args.timeout or options.CONNECT_TIMEOUT_S
        sender.connect(args.endpoint, timeout=timeout, peer_key=args.peer_key)
        return
    options.say(f"listening at {sender.bind(args.endpoint)}")
    options.wait_for_peers(sender, args.peers, args.timeout)


def flush(sender: rdmaxfer.Sender, timeout: float | None) -> None:
    try:
        sender.flush(timeout=timeout)
    except PeerLost as error:
        if error.unreleased:
            raise
        # A receiver that has taken everything may leave first: nothing was lost.


def _push_all(sender: rdmaxfer.Sender, items: Iterable[Item], args: argparse.Namespace, progress: Progress) -> None:
    progress.start()
    begun = time.monotonic()
    for index, item in enumerate(items):
        if args.fps is not None:
            time.sleep(max(0.0, begun + index / args.fps - time.monotonic()))
        metadata: dict[str, Any] = {"name": item.name, "index": index, "source": item.source}
        if item.pixel_format:
            metadata["pixel_format"] = item.pixel_format
        if args.hash != "none":
            metadata[args.hash] = item.digest(args.hash)
        sender.push(item.array, metadata=metadata, captured_ns=time.time_ns(), timeout=args.timeout)
        progress.add(item.array.nbytes)


def _items(args: argparse.Namespace) -> Iterator[Item]:
    """What there is to send. Complains about arguments at once, not at the first frame."""
    if args.pattern is not None:
        if args.sources:
            raise CommandError("--pattern and files exclude each other.", fix="give one of the two.", code=Exit.USAGE)
        return repeated(Pattern.parse(args.pattern, args.count or DEFAULT_COUNT), args.repeat)
    if not args.sources:
        raise CommandError(
            "there is nothing to send.",
            fix="name files or a directory, or use --pattern 1080x1920x3:uint8.",
            code=Exit.USAGE,
        )
    parts = [Video(each) if is_video(each) else Files(expand([each]), split=args.split) for each in args.sources]
    return itertools.islice(repeated(Joined(parts), args.repeat), args.count)
