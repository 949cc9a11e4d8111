"""`rdmaxfer recv`: receive frames, verify and save them."""

from __future__ import annotations

import argparse

import rdmaxfer
from rdmaxfer.cli import digest, options
from rdmaxfer.cli.failure import CommandError, Exit, printable
from rdmaxfer.cli.progress import Progress, count
from rdmaxfer.cli.sink import Sink
from rdmaxfer.errors import EndOfStream, TimeoutExpired

HELP = "receive frames, verify and save them"
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
  rdmaxfer recv tcp://10.0.0.1:7471 --connect
      the sender listens there: rdmaxfer send tcp://0.0.0.0:7471 --bind ...
"""
LOOK_EVERY_S = 0.5
SHOWN_PROBLEMS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("endpoint", metavar="ENDPOINT", help=options.ENDPOINT_HELP)
    parser.add_argument(
        "--connect", action="store_true", help="connect to a sender at ENDPOINT rather than listen there"
    )
    parser.add_argument("--out", metavar="DIR", help="save frames there: images as .png, everything else as .npy")
    parser.add_argument("--count", metavar="N", type=options.whole_number(1), help="end after N frames")
    parser.add_argument("--once", action="store_true", help="end when senders were there and all have left")
    parser.add_argument(
        "--verify", action="store_true", help="compare each frame with its hash, and check that no number is missing"
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=options.positive,
        help="longest wait in seconds: for the connection (30; no limit when listening), for each frame (no limit)",
    )
    parser.add_argument(
        "--slot-bytes",
        metavar="SIZE",
        type=options.size,
        default=1 << 20,
        help="memory a frame begins with (1M); it grows",
    )
    parser.add_argument(
        "--max-frame-bytes", metavar="SIZE", type=options.size, default=128 << 20, help="largest frame accepted (128M)"
    )
    options.add_slot_option(parser)
    options.add_key_options(parser)
    options.add_fabric_option(parser)
    options.add_device_options(parser)


def run(args: argparse.Namespace) -> int:
    sink = Sink(args.out) if args.out is not None else None
    if sink is not None:
        sink.prepare()
    checker = Checker() if args.verify else None
    progress = Progress("received")
    limits = {
        "slots": args.slots,
        "slot_bytes": args.slot_bytes,
        "max_frame_bytes": max(args.max_frame_bytes, args.slot_bytes),
    }
    with options.make_receiver(args, **limits) as receiver:
        if args.connect:
            timeout = args.timeout or options.CONNECT_TIMEOUT_S
            receiver.connect(args.endpoint, timeout=timeout, peer_key=args.peer_key)
        else:
            options.say(f"listening at {receiver.bind(args.endpoint)}")
        try:
            _receive_all(receiver, args, progress, sink, checker)
        finally:
            progress.clear()
            print(progress)
            if sink is not None:
                print(f"saved {count(sink.saved, 'file')} in {sink.directory}")
            if checker is not None:
                print(checker)
        lost = receiver.statistics().peers_lost
    if checker is not None and not checker.passed:
        raise CommandError("the frames received are not the frames sent (see above).", code=Exit.NOT_VERIFIED)
    if lost and args.once:
        raise CommandError(f"{count(lost, 'connection')} ended without a goodbye: frames may be missing.")
    return Exit.OK


def _receive_all(
    receiver: rdmaxfer.Receiver,
    args: argparse.Namespace,
    progress: Progress,
    sink: Sink | None,
    checker: Checker | None,
) -> None:
    while args.count is None or progress.frames < args.count:
        frame = _next(receiver, args)
        if frame is None:
            return
        with frame:
            progress.add(frame.nbytes)
            if checker is not None:
                problem = checker.check(frame)
                if problem:
                    progress.clear()
                    options.say(problem)
            if sink is not None:
                sink.save(frame)
    progress.clear()


def _next(receiver: rdmaxfer.Receiver, args: argparse.Namespace) -> rdmaxfer.Frame | None:
    """The next frame, or None when there will be no more."""
    waited = 0.0
    while True:
        patience = LOOK_EVERY_S if args.once else None
        if args.timeout is not None:
            patience = min(args.timeout - waited, patience or args.timeout)
        try:
            return receiver.recv(timeout=patience)
        except EndOfStream:
            return None
        except TimeoutExpired:
            state = receiver.statistics()
            if args.once and not state.peers and (state.frames or state.peers_lost):
                return None
            waited += patience or 0.0
            if args.timeout is not None and waited >= args.timeout:
                raise _nothing_came(args.timeout, reached=bool(state.peers or state.frames)) from None


def _nothing_came(timeout: float, *, reached: bool) -> CommandError:
    if reached:
        return CommandError(f"no frame came for {timeout:g} s.", fix="look at the sender, or give a longer --timeout.")
    return CommandError(
        f"no sender connected within {timeout:g} s.",
        fix="start `rdmaxfer send` with an address of this machine and this port, and check that no firewall blocks "
        "the TCP port.",
        code=Exit.NO_PEER,
    )


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
