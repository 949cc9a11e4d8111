"""Waiting for endpoints in shared memory, and for all else at the same time. Used by the Poller alone."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Sequence
from typing import Any

from rdmaxfer.fabric.owner import Owner
from rdmaxfer.fabric.shm import ShmEndpoint, _native


class Shared(Owner):
    """`fd` is readable when an endpoint has something to say, or `wake_fd` is: for whoever sleeps on other things, too."""

    def __init__(self, parent: Owner, wake_fd: int) -> None:
        super().__init__(parent)
        module = _native()
        self._ffi, self._lib = module.ffi, module.lib
        self._wake_fd = wake_fd
        self._epoll = select.epoll()
        self._epoll.register(wake_fd, select.EPOLLIN)
        self._by_fd: dict[int, tuple[ShmEndpoint, object]] = {}
        self._endpoints: tuple[ShmEndpoint, ...] = ()
        self._eps = self._ffi.new("sx_ep *[]", 0)
        self._changes = 0
        """Of all endpoints, as far as it was seen to."""
        self._fds = self._ffi.new("int[]", 64)
        self._slept = self._ffi.new("int *")
        self._opened()

    def __repr__(self) -> str:
        return f"<Shared of {len(self._endpoints)} endpoints>"

    @property
    def fd(self) -> int:
        return self._epoll.fileno()

    def heed(self, fd: int) -> None:
        """A wait ends when `fd` has input, too."""
        with contextlib.suppress(FileExistsError):
            self._epoll.register(fd, select.EPOLLIN)

    def watch(self, endpoints: Sequence[Any]) -> None:
        for endpoint in self._endpoints:
            endpoint.asleep = False
        self._endpoints = tuple(each for each in endpoints if isinstance(each, ShmEndpoint))
        self._watch_fds()

    def _keep_up(self) -> None:
        """See to it that what the endpoints have now is watched."""
        if sum(endpoint.changes for endpoint in self._endpoints) != self._changes:
            self._watch_fds()

    def _watch_fds(self) -> None:
        self._changes = sum(endpoint.changes for endpoint in self._endpoints)
        wanted = {fd: (endpoint, file) for endpoint in self._endpoints for fd, file in endpoint.files.items()}
        # An eventfd stays in the epoll set after close(2), as the peer has it, too: so it has to be taken out before. A socket that
        # was closed is gone from it, and its number may be another file's by now.
        for fd, (_, file) in list(self._by_fd.items()):
            if fd not in wanted or wanted[fd][1] is not file:
                del self._by_fd[fd]
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)
        for fd, watched in wanted.items():
            if fd not in self._by_fd:
                self._epoll.register(fd, select.EPOLLIN)
                self._by_fd[fd] = watched
        live = [endpoint.ep for endpoint in self._endpoints if endpoint.ep is not None and not endpoint.error]
        self._eps = self._ffi.new("sx_ep *[]", live)

    @property
    def slept(self) -> bool:
        """Whether the latest wait did."""
        return bool(self._slept[0])

    def look(self) -> None:
        """Look at all sockets."""
        for endpoint in self._endpoints:
            endpoint.look()
        self._keep_up()

    def prepare(self, timeout_s: float | None) -> float | None:
        """Somebody is about to sleep on `fd` and other things for so long: how long it may be. Peers wake us from now on."""
        timeout_s = self._limit(timeout_s)
        return 0.0 if self._lib.sx_arm(self._eps, len(self._eps)) else timeout_s

    def _limit(self, timeout_s: float | None) -> float | None:
        self._keep_up()
        for endpoint in self._endpoints:
            endpoint.asleep = True
            if endpoint.ends_s is not None:
                left_s = max(0.0, endpoint.ends_s - time.monotonic())
                timeout_s = left_s if timeout_s is None else min(timeout_s, left_s)
        return timeout_s

    def wait(self, spin_s: float, timeout_s: float | None) -> None:
        """Sleep until something has happened, and take it in."""
        timeout_s = self._limit(
            timeout_s
        )  # not `prepare`: while this spins, nobody has to wake it, which is a system call
        count = self._lib.sx_wait(
            self._eps,
            len(self._eps),
            self._epoll.fileno(),
            self._wake_fd,
            int(spin_s * 1e9),
            -1 if timeout_s is None else max(0, int(timeout_s * 1e9)),
            self._fds,
            len(self._fds),
            self._slept,
        )
        for endpoint in self._endpoints:
            endpoint.asleep = False
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        if count:
            for endpoint in {self._by_fd[fd][0] for fd in self._fds[0:count] if fd in self._by_fd}:
                endpoint.look()
            self._keep_up()

    def _destroy(self) -> None:
        self._epoll.close()
