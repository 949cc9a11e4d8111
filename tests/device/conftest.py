"""Tests here need a verbs device, real or software (scripts/setup_softroce.sh, scripts/softroce_vm.sh).

They run when asked for: `pytest -m rdma`, or RDMAXFER_TEST_DEVICE=1 in the environment. Then a missing device is a
failure. RDMAXFER_DEVICE names the device to use.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rdmaxfer.errors import RdmaxferError
from rdmaxfer.fabric.devices import Route, choose_gid, list_devices
from rdmaxfer.fabric.poller import Poller
from rdmaxfer.fabric.verbs import Domain, Endpoint, ProtectionDomain

HERE = Path(__file__).parent


def _asked_for(config: pytest.Config) -> bool:
    if os.environ.get("RDMAXFER_TEST_DEVICE", "") not in ("", "0"):
        return True
    expression = str(config.option.markexpr or "")
    return bool(re.search(r"\brdma\b", re.sub(r"\bnot\s+rdma\b", "", expression)))


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.rdma)
    if mine and not _asked_for(config):
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


@pytest.fixture(scope="session")
def route() -> Route:
    """Device, port and GID for tests within this host."""
    try:
        loopback = ipaddress.ip_address("127.0.0.1")
        return choose_gid(list_devices(), device=os.environ.get("RDMAXFER_DEVICE") or None, local_ip=loopback)
    except RdmaxferError as error:
        return pytest.fail(f"device tests were asked for, but there is no device to run them on: {error}")


def connect(one: Endpoint, other: Endpoint, **options: Any) -> None:
    """Connect `one` to `other`."""
    to = other.address
    one.connect(qp_num=to.qp_num, psn=to.psn, gid=to.gid, lid=to.lid, path_mtu=to.active_mtu, **options)


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
                fields = ("wr_id", "status", "opcode", "byte_len", "imm", "has_imm", "vendor_err", "index", "is_recv")
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
                    remote_write=writable,
                )
                for writable in (False, remote_write)
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
