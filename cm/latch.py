"""Waiting for another thread in a way that Ctrl-C can't break.

`threading.Condition`, and what is built on it (Event, Future, Queue), is written in Python: KeyboardInterrupt can come between
its taking a lock and giving it back, and then the other thread waits for ever. The bare lock used here is taken and given back
within C calls; whether it is set is told by a plain attribute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Latch:
    """Something that happens once. `set` it from any thread; any number of threads may wait."""

    def __init__(self) -> None:
        self.is_set = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def set(self) -> None:
        if not self.is_set:
            self.is_set = True
            self._gate.release()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is set, after at most `timeout_s` seconds."""
        if not self.is_set and self._gate.acquire(timeout=timeout_s):
            self._gate.release()  # for the next one; should Ctrl-C come before it, the others see `is_set` after their slice
        return self.is_set


class Call(Generic[T]):
    """A call that another thread is asked to make."""

    def __init__(self, fn: Callable[[], T]) -> None:
        self._fn = fn
        self._done = Latch()
        self._value: T | None = None
        self._error: BaseException | None = None
        self.cancelled = False

    def run(self) -> None:
        """Make the call, unless it was cancelled, and keep what comes of it."""
        try:
            if not self.cancelled:
                self._value = self._fn()
        except Exception as error:
            self._error = error
        finally:
            self._done.set()

    def fail(self, error: BaseException) -> None:
        """It won't be made."""
        self._error = error
        self._done.set()

    def cancel(self) -> None:
        """Nobody waits for it any more: if it has not begun, it need not be made."""
        self.cancelled = True

    def wait(self, timeout_s: float) -> bool:
        """Whether it is done, after at most `timeout_s` seconds."""
        return self._done.wait(timeout_s)

    def result(self) -> T:
        """What the call returned or raised, once it is done."""
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # done without an error: it is what `fn` returned
