"""Frames from camera libraries that call back, on a thread of theirs, whenever they have one."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rdmaxfer.errors import RdmaxferError, TimeoutExpired

if TYPE_CHECKING:
    import numpy.typing as npt

    from rdmaxfer.sender import Sender

log = logging.getLogger("rdmaxfer")


class Callback:
    """What `Sender.as_callback` gives: call it with a frame.

    It raises nothing, since what a camera library would make of an exception is not known. A frame for which there is no room in
    time is dropped, and counted. After any other error, which is logged, all frames are dropped; `error` has it, `check` raises it.
    """

    __slots__ = ("_metadata", "_sender", "_timeout", "dropped", "error", "pushed")

    def __init__(self, sender: Sender, metadata: Mapping[str, Any] | None, timeout: float) -> None:
        self._sender = sender
        self._metadata = dict(metadata) if metadata else {}
        self._timeout = timeout
        self.pushed = 0
        """Frames that were accepted."""
        self.dropped = 0
        """Frames for which there was no room, or that came after an error."""
        self.error: Exception | None = None
        """Why it drops all frames, if it does."""

    def __call__(self, array: npt.ArrayLike, *, captured_ns: int | None = None, **metadata: Any) -> int | None:
        """Push a frame; its memory may be used again when this returns. Further keywords go along as metadata. Returns the sequence
        number, or None if the frame was dropped. `captured_ns`: by default, now."""
        if self.error is not None:
            self.dropped += 1
            return None
        try:
            seq = self._sender.push(
                array,
                metadata={**self._metadata, **metadata},
                captured_ns=time.time_ns() if captured_ns is None else captured_ns,
                timeout=self._timeout,
            )
        except TimeoutExpired:
            self.dropped += 1
            return None
        except Exception as error:
            self.dropped += 1
            self.error = error
            log.error("frames of a callback are dropped from now on: %s", error)
            return None
        self.pushed += 1
        return seq

    def check(self) -> None:
        """Raise the error after which it drops all frames, if there was one."""
        if self.error is not None:
            raise RdmaxferError("the callback drops all frames, because of an error.") from self.error


__all__ = ["Callback"]
