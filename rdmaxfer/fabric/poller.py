"""Taking completions of many endpoints, without the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rdmaxfer.fabric import native
from rdmaxfer.fabric.owner import Owner
from rdmaxfer.fabric.verbs import Endpoint


class Poller(Owner):
    """Polls the endpoints it watches, or sleeps until one has a completion, somebody calls `wake`, or time is up.

    After `poll` or `wait`, `completions[0]` to `completions[count - 1]` have the fields of `rx_wc` (verbs.h), until the next call.
    Call `clear` when they are handled: until then they stay, also if an exception from a signal handler (Ctrl-C) ended the call.

    While one thread is in `wait`, nobody may call `poll`. And an endpoint is drained or closed only when no thread waits for it:
    `watch` the others, `wake`, and go on when the waiting thread is out.
    """

    def __init__(self, max_completions: int = 128) -> None:
        super().__init__()
        module = native.extension()
        self._ffi, self._lib = module.ffi, module.lib
        self._max = max_completions
        self.turn = 0
        """Number of the latest `poll` or `wait`."""
        self._set: tuple[tuple[Endpoint, ...], Any] = ((), self._ffi.new("rx_ep *[]", 0))
        self._array = self._ffi.new("rx_wc[]", max_completions)
        self._taken = self._ffi.new("int *")
        self._error = self._ffi.new("rx_error *")
        self.completions: list[Any] = [self._array[i] for i in range(max_completions)]
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._opened()

    def __repr__(self) -> str:
        return f"<Poller of {len(self._set[0])} endpoints>"

    def watch(self, endpoints: Sequence[Endpoint]) -> None:
        """Watch these, and no others, from the next `poll` or `wait` on."""
        self._check_open()
        for endpoint in endpoints:
            endpoint._check_open()
        watched = tuple(endpoints)
        self._set = (watched, self._ffi.new("rx_ep *[]", [endpoint._ep for endpoint in watched]))

    @property
    def count(self) -> int:
        """Completions taken and not cleared."""
        return int(self._taken[0])

    def clear(self) -> None:
        self._taken[0] = 0

    def found(self) -> list[tuple[Endpoint, Any]]:
        """The completions taken, each with its endpoint."""
        return [(self._set[0][wc.index], wc) for wc in self.completions[: self.count]]

    def poll(self) -> int:
        """Take what has completed; returns the count."""
        if self._state != "open":
            self._check_open()
        endpoints, eps = self._set
        self.turn += 1  # each endpoint is the first one in its turn, so that a busy one does not starve the others
        count: int = self._lib.rx_poll(
            eps, len(endpoints), self.turn & 0xFFFF, self._array, self._max, self._taken, self._error
        )
        if count < 0:
            native.check(count, self._error)
        return count

    def wait(self, spin_s: float, timeout_s: float | None) -> int:
        """Take what has completed; if nothing, what completes next. 0 after a timeout, `wake` or a signal."""
        if self._state != "open":
            self._check_open()
        endpoints, eps = self._set
        self.turn += 1
        count: int = self._lib.rx_wait(
            eps,
            len(endpoints),
            self.turn & 0xFFFF,
            self._wake_fd,
            int(spin_s * 1e9),
            -1 if timeout_s is None else max(0, int(timeout_s * 1e9)),
            self._array,
            self._max,
            self._taken,
            self._error,
        )
        if count < 0:
            native.check(count, self._error)
        return count

    def wake(self) -> None:
        """End a running `wait`, or the next one, at once. From any thread."""
        if self._state == "open":
            os.eventfd_write(self._wake_fd, 1)

    def _destroy(self) -> None:
        os.close(self._wake_fd)
