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

    A completion has the fields of `rx_wc` (verbs.h) and is valid until the next call of the method that returned it.

    While one thread is in `wait`, nobody may call `poll`: the waiting thread's completions would be the older ones, but
    be handled later. And an endpoint is drained or closed only when no thread waits for it: `watch` the others, `wake`,
    and go on when the waiting thread is out.
    """

    def __init__(self, max_completions: int = 128) -> None:
        super().__init__()
        module = native.extension()
        self._ffi, self._lib = module.ffi, module.lib
        self._max = max_completions
        self._first = 0
        self._set: tuple[tuple[Endpoint, ...], Any] = ((), self._ffi.new("rx_qp *[]", 0))
        self._polled, self._poll_views = self._array()
        self._waited, self._wait_views = self._array()
        self._poll_error = self._ffi.new("rx_error *")
        self._wait_error = self._ffi.new("rx_error *")
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._opened()

    def __repr__(self) -> str:
        return f"<Poller of {len(self._set[0])} endpoints>"

    def _array(self) -> tuple[Any, list[Any]]:
        array = self._ffi.new("rx_wc[]", self._max)
        return array, [array[i] for i in range(self._max)]

    def watch(self, endpoints: Sequence[Endpoint]) -> None:
        """Watch these, and no others, from the next `poll` or `wait` on."""
        self._check_open()
        for endpoint in endpoints:
            endpoint._check_open()
        watched = tuple(endpoints)
        self._set = (watched, self._ffi.new("rx_qp *[]", [endpoint._qp for endpoint in watched]))

    def poll(self) -> list[tuple[Endpoint, Any]]:
        """What has completed."""
        if self._state != "open":
            self._check_open()
        endpoints, qps = self._set
        self._first += 1  # each endpoint is the first one in its turn, so that a busy one does not starve the others
        count = self._lib.rx_poll(qps, len(endpoints), self._first & 0xFFFF, self._polled, self._max, self._poll_error)
        if count < 0:
            native.check(count, self._poll_error)
        return [(endpoints[wc.index], wc) for wc in self._poll_views[:count]]

    def wait(self, spin_s: float, timeout_s: float | None) -> list[tuple[Endpoint, Any]]:
        """What has completed; if nothing, what completes next. Nothing after a timeout, `wake` or a signal."""
        if self._state != "open":
            self._check_open()
        endpoints, qps = self._set
        self._first += 1
        timeout_ns = -1 if timeout_s is None else max(0, int(timeout_s * 1e9))
        count = self._lib.rx_wait(
            qps,
            len(endpoints),
            self._first & 0xFFFF,
            self._wake_fd,
            int(spin_s * 1e9),
            timeout_ns,
            self._waited,
            self._max,
            self._wait_error,
        )
        if count < 0:
            native.check(count, self._wait_error)
        return [(endpoints[wc.index], wc) for wc in self._wait_views[:count]]

    def wake(self) -> None:
        """End a running `wait`, or the next one, at once. From any thread."""
        if self._state == "open":
            os.eventfd_write(self._wake_fd, 1)

    def _destroy(self) -> None:
        os.close(self._wake_fd)
