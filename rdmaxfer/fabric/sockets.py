"""Waiting for endpoints that are sockets of ZeroMQ, and for all else at the same time. Used by the Poller alone."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Sequence
from typing import Any

from rdmaxfer.fabric.owner import Owner
from rdmaxfer.fabric.tcp import TcpEndpoint


class Sockets(Owner):
    """`fd` is readable when an endpoint may have something to say, or `wake_fd` is: for whoever sleeps on other things, too.

    ZeroMQ's descriptors speak once: then everything has to be taken (`gather`) before one sleeps on them again.
    """

    def __init__(self, parent: Owner, wake_fd: int) -> None:
        super().__init__(parent)
        self._wake_fd = wake_fd
        self._epoll = select.epoll()
        self._epoll.register(wake_fd, select.EPOLLIN)
        self._by_fd: dict[int, tuple[TcpEndpoint, object]] = {}
        self._endpoints: tuple[TcpEndpoint, ...] = ()
        self._changes = 0
        """Of all endpoints, as far as it was seen to."""
        self._opened()

    def __repr__(self) -> str:
        return f"<Sockets of {len(self._endpoints)} endpoints>"

    @property
    def fd(self) -> int:
        return self._epoll.fileno()

    def watch(self, endpoints: Sequence[Any]) -> None:
        self.rest()
        self._endpoints = tuple(each for each in endpoints if isinstance(each, TcpEndpoint))
        self._watch_fds()

    def _watch_fds(self) -> None:
        self._changes = sum(endpoint.changes for endpoint in self._endpoints)
        wanted = {fd: (endpoint, file) for endpoint in self._endpoints for fd, file in endpoint.files.items()}
        for fd, (_, file) in list(self._by_fd.items()):
            if fd not in wanted or wanted[fd][1] is not file:
                del self._by_fd[fd]
                with contextlib.suppress(OSError):  # it was closed, and its number may be another file's by now
                    self._epoll.unregister(fd)
        for fd, watched in wanted.items():
            if fd not in self._by_fd:
                self._epoll.register(fd, select.EPOLLIN)
                self._by_fd[fd] = watched

    def look(self) -> None:
        """Look at everything that says something rarely."""
        for endpoint in self._endpoints:
            endpoint.look()

    def prepare(self) -> None:
        """Somebody is about to sleep: what comes from now on, or is found by others, wakes him. To be followed by `gather`s."""
        if sum(endpoint.changes for endpoint in self._endpoints) != self._changes:
            self._watch_fds()
        for endpoint in self._endpoints:
            endpoint.asleep = True

    @property
    def drained(self) -> bool:
        """Whether a `gather` of any of them would find nothing that its descriptor does not tell."""
        return not [endpoint for endpoint in self._endpoints if not endpoint.drained or endpoint.waiting]

    def limit(self, timeout_s: float | None) -> float | None:
        """How long it may be."""
        for endpoint in self._endpoints:
            patience_s = endpoint.patience_s
            if patience_s is not None:
                timeout_s = patience_s if timeout_s is None else min(timeout_s, patience_s)
        return timeout_s

    def wait(self, timeout_s: float | None) -> None:
        """Sleep until something may have happened."""
        for fd, _ in self._epoll.poll(-1 if timeout_s is None else max(0.0, timeout_s)):
            if fd == self._wake_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            elif fd in self._by_fd:
                self._by_fd[fd][0].look()

    def rest(self) -> None:
        """Nobody sleeps."""
        for endpoint in self._endpoints:
            endpoint.asleep = False

    def _destroy(self) -> None:
        self._epoll.close()
