"""Receiving frames, as `recv` and `record` do."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

import rdmaxfer
from rdmaxfer.cli import options
from rdmaxfer.cli.failure import CommandError, Exit
from rdmaxfer.cli.progress import Progress, count
from rdmaxfer.errors import EndOfStream, TimeoutExpired

if TYPE_CHECKING:
    from typing_extensions import Self

    from rdmaxfer.cli.view import Viewer

LOOK_EVERY_S = 0.5
VIEW_PORT = 8470


def add_stream_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--connect", action="store_true", help="connect to a sender at ENDPOINT rather than listen there"
    )
    parser.add_argument("--count", metavar="N", type=options.whole_number(1), help="end after N frames")
    parser.add_argument("--once", action="store_true", help="end when senders were there and all have left")
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
    parser.add_argument(
        "--view",
        metavar="PORT",
        type=options.whole_number(0),
        nargs="?",
        const=VIEW_PORT,
        help=f"show the latest frame, rates, latencies and the ring on a web page of this machine ({VIEW_PORT})",
    )
    options.add_metrics_option(parser)
    options.add_slot_option(parser)
    options.add_key_options(parser)
    options.add_fabric_option(parser)
    options.add_device_options(parser)


class Reception:
    """A Receiver that listens or connects as the arguments say, with its web page and metrics if they are wanted."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._viewer: Viewer | None = None
        with ExitStack() as stack:
            self.receiver = stack.enter_context(
                options.make_receiver(
                    args,
                    slots=args.slots,
                    slot_bytes=args.slot_bytes,
                    max_frame_bytes=max(args.max_frame_bytes, args.slot_bytes),
                )
            )
            options.serve_metrics(args)
            if args.view is not None:
                from rdmaxfer.cli.view import Viewer

                self._viewer = Viewer(self.receiver, args.view)
                stack.callback(self._viewer.close)
                options.say(f"look at {self._viewer.url}")
            if args.connect:
                timeout = args.timeout or options.CONNECT_TIMEOUT_S
                self.receiver.connect(args.endpoint, timeout=timeout, peer_key=args.peer_key)
            else:
                options.say(f"listening at {self.receiver.bind(args.endpoint)}")
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def frames(self, progress: Progress) -> Iterator[rdmaxfer.Frame]:
        """All that come, each shown on the page; who takes them releases them."""
        while self._args.count is None or progress.frames < self._args.count:
            frame = _next(self.receiver, self._args)
            if frame is None:
                return
            progress.add(frame.nbytes)
            if self._viewer is not None:
                self._viewer.offer(frame)
            yield frame

    def check(self) -> None:
        """Raise CommandError if frames may be missing."""
        lost = self.receiver.statistics().peers_lost
        if lost and self._args.once:
            raise CommandError(f"{count(lost, 'connection')} ended without a goodbye: frames may be missing.")


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
