"""`rdmaxfer record`: frames into a file."""

from __future__ import annotations

import argparse
import contextlib
import time

import rdmaxfer
from rdmaxfer.cli import options
from rdmaxfer.cli.failure import Exit
from rdmaxfer.cli.progress import Progress, count
from rdmaxfer.cli.reception import Reception, add_stream_arguments
from rdmaxfer.cli.recording import Recorder

HELP = "receive frames into a file (HDF5)"
DESCRIPTION = """\
Receive frames, and write them into an HDF5 file: for each sender a table of frames, with their numbers, times and metadata. h5py,
MATLAB and many other programs read it; `rdmaxfer replay` sends it again.

A frame keeps its place in memory until it is written. When the disk is slower than the sender, the sender is held up (or drops
frames, if it was told to): the last lines say how far behind the disk was at most.
"""
EXAMPLES = """\
examples:
  rdmaxfer record tcp://0.0.0.0:7471 run42.h5 --once
  rdmaxfer record tcp://0.0.0.0:7471 run42.h5 --slots 64 --count 1000
  rdmaxfer record tcp://10.0.0.1:7471 run42.h5 --connect
  python -c "import h5py; print(h5py.File('run42.h5')['streams/0/frames'])"
"""
BEHIND_S = 0.1
"""Frames that are older than this when they have been written are behind."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("endpoint", metavar="ENDPOINT", help=options.ENDPOINT_HELP)
    parser.add_argument("file", metavar="FILE", help="the file to write; it must not be there yet")
    add_stream_arguments(parser)


def run(args: argparse.Namespace) -> int:
    progress = Progress("recorded")
    with contextlib.ExitStack() as stack:
        recorder = Recorder(args.file)
        stack.callback(recorder.close)
        reception = stack.enter_context(Reception(args))
        lag = Lag()
        try:
            for frame in reception.frames(progress):
                with frame:
                    recorder.add(frame)
                    lag.note(frame, reception.receiver)
        finally:
            progress.clear()
            print(progress)
            print(f"{args.file}: {count(recorder.frames, 'frame')} in {count(recorder.streams, 'stream')}")
            print(lag)
        reception.check()
    return Exit.OK


class Lag:
    """How far behind the stream the file is."""

    def __init__(self) -> None:
        self.most_s = 0.0
        self.behind = 0
        self.frames = 0
        self._full = 0

    def note(self, frame: rdmaxfer.Frame, receiver: rdmaxfer.Receiver) -> None:
        self.frames += 1
        age_s = (time.time_ns() - frame.pushed_ns) / 1e9
        self.most_s = max(self.most_s, age_s)
        if age_s > BEHIND_S:
            self.behind += 1
        if self.frames % 16 == 0 and receiver.statistics().leased >= receiver.slots:
            self._full += 1

    def __str__(self) -> str:
        if not self.frames:
            return "nothing came"
        text = f"at most {self.most_s * 1e3:.0f} ms behind the sender"
        if not self.behind:
            return f"the file kept up: {text}"
        held = (
            f"; the ring was full {self._full} of {self.frames // 16} times that it was looked at"
            if self.frames >= 16
            else ""
        )
        late = f"{count(self.behind, 'frame')} more than {BEHIND_S * 1e3:.0f} ms late"
        return f"the file did not always keep up: {late}, {text}{held}"
