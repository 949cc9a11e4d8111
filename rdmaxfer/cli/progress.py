"""Counting frames and telling the user about it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

EVERY_S = 1.0


class Progress:
    """Counts frames; writes a line each second: over itself on a terminal, one below the other in a file."""

    def __init__(
        self,
        verb: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ) -> None:
        self._verb = verb
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._quiet = quiet
        self._tty = self._stream.isatty()
        self._drawn = False
        self.frames = 0
        self.bytes = 0
        self._begun: float | None = None
        self._ended = 0.0
        self._said_at = 0.0
        self._said = (0, 0)

    def start(self) -> None:
        """The time counts from here, or from the first frame."""
        self._begun = self._said_at = self._ended = self._clock()

    def add(self, nbytes: int) -> None:
        now = self._clock()
        if self._begun is None:
            self._begun = self._said_at = now
        self._ended = now
        self.frames += 1
        self.bytes += nbytes
        if now - self._said_at >= EVERY_S:
            self._say(now)

    def _say(self, now: float) -> None:
        seconds = now - self._said_at
        frames, nbytes = self._said
        rate = f"{(self.frames - frames) / seconds:.1f} frames/s, {megabytes((self.bytes - nbytes) / seconds)}/s"
        self._said_at, self._said = now, (self.frames, self.bytes)
        if self._quiet:
            return
        line = f"{self._verb} {self.frames} frames, {megabytes(self.bytes)}; now {rate}"
        self._stream.write(f"\r{line}\x1b[K" if self._tty else f"{line}\n")
        self._stream.flush()
        self._drawn = self._tty

    def finish(self) -> None:
        """The time counts until here."""
        self._ended = self._clock()

    def clear(self) -> None:
        """End the line on a terminal, before other output."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False

    @property
    def seconds(self) -> float:
        return self._ended - self._begun if self._begun is not None else 0.0

    def __str__(self) -> str:
        """The totals."""
        text = f"{self._verb} {count(self.frames, 'frame')}, {megabytes(self.bytes)}"
        if self.frames > 1 and self.seconds > 0:
            text += f" in {self.seconds:.2f} s: {self.frames / self.seconds:.1f} frames/s, "
            text += f"{megabytes(self.bytes / self.seconds)}/s"
        return text


def megabytes(nbytes: float) -> str:
    if nbytes < 1e4:
        return f"{nbytes:.0f} bytes"
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e10 else f"{nbytes / 1e9:.2f} GB"


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
