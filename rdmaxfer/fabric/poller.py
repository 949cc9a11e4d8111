"""Taking completions of many endpoints, of whatever fabrics."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rdmaxfer.fabric import native, soft
from rdmaxfer.fabric.owner import Owner

if TYPE_CHECKING:
    from rdmaxfer.fabric.shared import Shared
    from rdmaxfer.fabric.sockets import Sockets
    from rdmaxfer.fabric.verbs import Endpoint

LOOK_EVERY = 64
"""Polls after which sockets are looked at that rarely say something, even if nobody ever waits."""


class Poller(Owner):
    """Polls the endpoints it watches, or sleeps until one has a completion, somebody calls `wake`, or time is up.

    After `poll` or `wait`, `completions[0]` to `completions[count - 1]` have the fields of `rx_wc` (verbs.h), until the next call.
    Call `clear` when they are handled: until then they stay, also if an exception from a signal handler (Ctrl-C) ended the call.

    While one thread is in `wait`, nobody may call `poll`. And an endpoint is drained or closed only when no thread waits for it:
    `watch` the others, `wake`, and go on when the waiting thread is out.
    """

    def __init__(self, max_completions: int = 128) -> None:
        super().__init__()
        self.turn = 0
        """Number of the latest `poll` or `wait`."""
        self.slept = False
        """Whether the latest `wait` came to sleeping, after it had spun in vain (if it was to)."""
        self._max = max_completions
        self._native: _Native | None = None
        """As long as no endpoint is a device's, nothing is needed of libibverbs."""
        self._shared: Shared | None = None
        """As long as no endpoint is in shared memory, nothing is needed of that."""
        self._sockets: Sockets | None = None
        """As long as no endpoint is a socket, nothing is needed of ZeroMQ."""
        self._endpoints: tuple[Any, ...] = ()
        self._soft: tuple[tuple[int, soft.Endpoint], ...] = ()
        self._taken: list[soft.Completion] = []
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._sleep = select.poll()
        self._sleep.register(self._wake_fd, select.POLLIN)
        self._opened()

    def __repr__(self) -> str:
        return f"<Poller of {len(self._endpoints)} endpoints>"

    def watch(self, endpoints: Sequence[Any]) -> None:
        """Watch these, and no others, from the next `poll` or `wait` on. Those of devices come first."""
        self._check_open()
        for endpoint in endpoints:
            endpoint._check_open()
        watched = tuple(endpoints)
        hard = [each for each in watched if not isinstance(each, soft.Endpoint)]
        if hard and self._native is None:
            self._native = _Native(self._max)
        if self._native is not None:
            self._native.watch(hard)
        for _, endpoint in self._soft:
            endpoint.wake = _nothing
        self._soft = tuple((index, each) for index, each in enumerate(watched) if isinstance(each, soft.Endpoint))
        assert all(index >= len(hard) for index, _ in self._soft), "endpoints in software come last"
        for _, endpoint in self._soft:
            endpoint.wake = self.wake
        lending = [each for _, each in self._soft if each.lends]
        if lending and self._shared is None:
            from rdmaxfer.fabric.shared import Shared

            self._shared = Shared(self, self._wake_fd)
        if self._shared is not None:
            self._shared.watch(lending)
        sockets = [each for _, each in self._soft if not each.lends]
        if sockets and self._sockets is None:
            from rdmaxfer.fabric.sockets import Sockets

            self._sockets = Sockets(self, self._wake_fd)
        if self._sockets is not None:
            self._sockets.watch(sockets)
            if self._shared is not None:
                self._shared.heed(self._sockets.fd)
        self._endpoints = watched

    @property
    def looking_costs(self) -> bool:
        """Whether a `poll` takes a system call for each endpoint."""
        return self._sockets is not None

    @property
    def count(self) -> int:
        """Completions taken and not cleared."""
        return (self._native.count if self._native is not None else 0) + len(self._taken)

    @property
    def completions(self) -> list[Any]:
        """They, and perhaps void ones behind them. The `index` of each is that of its endpoint in `watch`."""
        if self._native is None:
            return self._taken
        if not self._taken:
            return self._native.completions
        return [*self._native.completions[: self._native.count], *self._taken]

    def clear(self) -> None:
        for each in self._taken:
            each.handled = True
        if self._native is not None:
            self._native.clear()
        self._taken = []

    def found(self) -> list[tuple[Any, Any]]:
        """The completions taken, each with its endpoint."""
        return [(self._endpoints[wc.index], wc) for wc in self.completions[: self.count]]

    def poll(self) -> int:
        """Take what has completed; returns the count."""
        if self._state != "open":
            self._check_open()
        self.turn += 1  # each endpoint is the first one in its turn, so that a busy one does not starve the others
        if self._native is not None:
            self._native.poll(self.turn)
        if self._soft:
            if self.turn % LOOK_EVERY == 0:
                for each in (self._shared, self._sockets):
                    if each is not None:
                        each.look()
            self._take()
        return self.count

    def wait(self, spin_s: float, timeout_s: float | None) -> int:
        """Take what has completed; if nothing, what completes next. 0 after a timeout, `wake` or a signal."""
        if self._state != "open":
            self._check_open()
        self.turn += 1
        sockets = self._sockets
        if sockets is not None:
            sockets.prepare()
        if self._soft and not (self._shared is None and sockets is not None and sockets.drained and not self._taken):
            self._take()
            if self._taken:
                timeout_s = 0.0
        if sockets is not None:
            timeout_s = sockets.limit(timeout_s)
        self._sleep_on(spin_s, timeout_s)
        if sockets is not None:
            sockets.rest()
        return self.count

    def _sleep_on(self, spin_s: float, timeout_s: float | None) -> None:
        """Sleep on what there is: the descriptor of each kind is among those of the next."""
        shared, sockets = self._shared, self._sockets
        self.slept = True
        if self._native is not None and self._native.watched:
            if shared is not None:
                self._native.wait(self.turn, shared.fd, spin_s, shared.prepare(timeout_s))
                shared.wait(0.0, 0.0)
            else:
                fd = sockets.fd if sockets is not None else self._wake_fd
                self._native.wait(self.turn, fd, spin_s, timeout_s)
            if sockets is not None:
                sockets.wait(0.0)
            self.slept = self._native.slept
        elif shared is not None:
            shared.wait(spin_s, timeout_s)
            if sockets is not None:
                sockets.wait(0.0)
            self.slept = shared.slept
        elif sockets is not None:
            sockets.wait(timeout_s)
        elif self._sleep.poll(None if timeout_s is None else max(0.0, timeout_s * 1000)):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        if self._soft:
            self._take()

    def _take(self) -> None:
        """Look at the completions in software. They stay where they are until they are handled."""
        found: list[soft.Completion] = []
        for index, endpoint in self._soft:
            done = endpoint.done
            while done and done[0].handled:
                done.popleft()
            endpoint.gather()
            for number in range(min(len(done), self._max)):
                completion = done[number]
                completion.index = index
                found.append(completion)
        self._taken = found

    def wake(self) -> None:
        """End a running `wait`, or the next one, at once. From any thread."""
        if self._state == "open":
            os.eventfd_write(self._wake_fd, 1)

    def _destroy(self) -> None:
        for _, endpoint in self._soft:
            endpoint.wake = _nothing
        os.close(self._wake_fd)


class _Native:
    """The endpoints of devices, polled without the interpreter lock."""

    def __init__(self, max_completions: int) -> None:
        module = native.extension()
        self._ffi, self._lib = module.ffi, module.lib
        self._max = max_completions
        self._set: tuple[tuple[Endpoint, ...], Any] = ((), self._ffi.new("rx_ep *[]", 0))
        self._array = self._ffi.new("rx_wc[]", max_completions)
        self._taken = self._ffi.new("int *")
        self._slept = self._ffi.new("int *")
        self._error = self._ffi.new("rx_error *")
        self.completions: list[Any] = [self._array[i] for i in range(max_completions)]

    @property
    def watched(self) -> int:
        return len(self._set[0])

    def watch(self, endpoints: list[Endpoint]) -> None:
        self._set = (tuple(endpoints), self._ffi.new("rx_ep *[]", [endpoint._ep for endpoint in endpoints]))

    @property
    def count(self) -> int:
        return int(self._taken[0])

    def clear(self) -> None:
        self._taken[0] = 0

    def poll(self, turn: int) -> None:
        endpoints, eps = self._set
        if not endpoints:
            return
        count = self._lib.rx_poll(eps, len(endpoints), turn & 0xFFFF, self._array, self._max, self._taken, self._error)
        self._found(count)

    def wait(self, turn: int, wake_fd: int, spin_s: float, timeout_s: float | None) -> None:
        endpoints, eps = self._set
        count = self._lib.rx_wait(
            eps,
            len(endpoints),
            turn & 0xFFFF,
            wake_fd,
            int(spin_s * 1e9),
            -1 if timeout_s is None else max(0, int(timeout_s * 1e9)),
            self._array,
            self._max,
            self._taken,
            self._slept,
            self._error,
        )
        self._found(count)

    @property
    def slept(self) -> bool:
        return bool(self._slept[0])

    def _found(self, count: int) -> None:
        if count < 0:
            native.check(count, self._error)


def _nothing() -> None:
    pass
