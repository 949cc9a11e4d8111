"""`rdmaxfer recv`: receive frames, verify and save them."""

from __future__ import annotations

import argparse

import rdmaxfer
from rdmaxfer.cli import digest, options
from rdmaxfer.cli.failure import CommandError, Exit, printable
from rdmaxfer.cli.progress import Progress, count
from rdmaxfer.cli.reception import Reception, add_stream_arguments
from rdmaxfer.cli.sink import Sink

HELP = "receive frames, show, verify and save them"
DESCRIPTION = """\
Receive frames from `rdmaxfer send`, or from any program with an rdmaxfer.Sender.

The network card writes the frames into this process's memory; this command then counts them, and on request verifies
and saves them. The two sides may be started in either order. Normally this side listens and the senders connect; with
--connect here and --bind there it is the other way round.

It ends after --count frames, with --once when the senders have left, when the sender that it connected to has finished,
or by Ctrl-C.
"""
EXAMPLES = """\
examples:
  rdmaxfer recv tcp://0.0.0.0:7471
      listen, count frames, show the rate
  rdmaxfer recv tcp://0.0.0.0:7471 --verify --out received --once
      check and save what the next sender sends, then end
  rdmaxfer recv tcp://0.0.0.0:7471 --view
      look at them, at http://127.0.0.1:8470/ on this machine
  rdmaxfer recv tcp://10.0.0.1:7471 --connect
      the sender listens there: rdmaxfer send tcp://0.0.0.0:7471 --bind ...
"""
SHOWN_PROBLEMS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("endpoint", metavar="ENDPOINT", help=options.ENDPOINT_HELP)
    parser.add_argument("--out", metavar="DIR", help="save frames there: pictures as .png, everything else as .npy")
    parser.add_argument(
        "--verify", action="store_true", help="compare each frame with its hash, and check that no number is missing"
    )
    add_stream_arguments(parser)


def run(args: argparse.Namespace) -> int:
    sink = Sink(args.out) if args.out is not None else None
    if sink is not None:
        sink.prepare()
    checker = Checker() if args.verify else None
    progress = Progress("received")
    with Reception(args) as reception:
        try:
            for frame in reception.frames(progress):
                with frame:
                    _use(frame, progress, sink, checker)
        finally:
            progress.clear()
            print(progress)
            if sink is not None:
                print(f"saved {count(sink.saved, 'file')} in {sink.directory}")
            if checker is not None:
                print(checker)
        if checker is not None and not checker.passed:
            raise CommandError("the frames received are not the frames sent (see above).", code=Exit.NOT_VERIFIED)
        reception.check()
    return Exit.OK


def _use(frame: rdmaxfer.Frame, progress: Progress, sink: Sink | None, checker: Checker | None) -> None:
    if checker is not None:
        problem = checker.check(frame)
        if problem:
            progress.clear()
            options.say(problem)
    if sink is not None:
        sink.save(frame)


class Checker:
    """Compares frames with their hashes, and looks for gaps in each sender's numbers."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}
        self.good = 0
        self.bad = 0
        self.missing = 0

    @property
    def passed(self) -> bool:
        return self.bad == 0 and self.missing == 0

    def check(self, frame: rdmaxfer.Frame) -> str:
        """What is wrong, for people; empty when all is well, or when enough was said."""
        problems = []
        expected = self._next.get(frame.peer, frame.seq)  # who joins late does not begin with 0
        if frame.seq != expected:
            self.missing += max(1, frame.seq - expected)
            problems.append(f"it was expected to be frame {expected}")
        self._next[frame.peer] = frame.seq + 1
        wrong = digest.check(frame.array, frame.metadata)
        if wrong:
            self.bad += 1
            problems.append(wrong)
        else:
            self.good += 1
        if not problems or self.bad + self.missing > SHOWN_PROBLEMS:
            return ""
        return f"frame {frame.seq} of {printable(frame.peer)}: {'; '.join(problems)}"

    def __str__(self) -> str:
        return f"verified: {self.good} right, {self.bad} wrong, {self.missing} missing"
