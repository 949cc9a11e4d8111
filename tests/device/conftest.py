"""What the device tests need. tests/conftest.py says when they run, and on which device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from rdmaxfer.fabric.devices import Route
from rdmaxfer.fabric.poller import Poller
from rdmaxfer.fabric.verbs import Domain, Endpoint, ProtectionDomain


def connect(one: Endpoint, other: Endpoint, **options: Any) -> None:
    """Connect `one` to `other`."""
    to = other.address
    one.connect(queue_pairs=to.queue_pairs[: one.lanes], gid=to.gid, lid=to.lid, path_mtu=to.active_mtu, **options)


@dataclass
class Pair:
    """Two connected endpoints in one process, each in a domain of its own: `a` writes, `b` may be written to."""

    a: Endpoint
    b: Endpoint
    poller: Poller

    @property
    def pd_a(self) -> ProtectionDomain:
        return self.a.pd

    @property
    def pd_b(self) -> ProtectionDomain:
        return self.b.pd

    def collect(self, count: int, timeout_s: float = 5) -> list[tuple[Endpoint, dict[str, int]]]:
        """The next completions, at least `count`, as copies."""
        import time

        found: list[tuple[Endpoint, dict[str, int]]] = []
        deadline = time.monotonic() + timeout_s
        while len(found) < count and time.monotonic() < deadline:
            self.poller.wait(0, 0.1)
            for endpoint, wc in self.poller.found():
                fields = (
                    "wr_id",
                    "status",
                    "opcode",
                    "byte_len",
                    "imm",
                    "has_imm",
                    "vendor_err",
                    "index",
                    "is_recv",
                    "lane",
                )
                found.append((endpoint, {name: getattr(wc, name) for name in fields}))
            self.poller.clear()
        assert len(found) >= count, f"{len(found)} of {count} completions came: {found}"
        return found

    def collect_of(self, endpoint: Endpoint, count: int) -> list[dict[str, int]]:
        """The next completions, if all of them are of one endpoint."""
        found = self.collect(count)
        assert all(one is endpoint for one, _ in found), found
        return [wc for _, wc in found]


@pytest.fixture
def make_pair(route: Route) -> Iterator[Callable[..., Pair]]:
    with ExitStack() as stack:

        def make(
            *,
            send_depth: int = 64,
            recv_depth: int = 64,
            recv_bytes: int = 64,
            remote_write: bool = True,
            lanes: tuple[int, int] = (1, 1),
            **options: Any,
        ) -> Pair:
            domain = stack.enter_context(Domain(route))
            ends = [
                Endpoint(
                    domain.protection_domain(),
                    route,
                    send_depth=send_depth,
                    recv_depth=recv_depth,
                    recv_bytes=recv_bytes,
                    lanes=count,
                    remote_write=writable,
                )
                for writable, count in zip((False, remote_write), lanes, strict=True)
            ]
            connect(ends[0], ends[1], **options)
            connect(ends[1], ends[0], **options)
            poller = stack.enter_context(Poller())
            poller.watch(ends)
            return Pair(ends[0], ends[1], poller)

        yield make


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()
