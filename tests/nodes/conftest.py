"""These tests run on node 1 of two virtual machines (scripts/softroce_vm.sh --nodes 2, run.sh), when asked for: -m nodes."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import agent
import pytest
from traffic import WIRE, End, Sending

TIMEOUT_S = 60.0
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.nodes)
    expression = re.sub(r"\bnot\s+nodes\b", "", str(config.option.markexpr or ""))
    if mine and not re.search(r"\bnodes\b", expression):
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


class Wire:
    """The wire between both nodes, and what is done to the packets on it."""

    def __init__(self, ends: tuple[Any, Any]) -> None:
        self.ends = ends
        self.mend()
        self._before = self._counters()

    def netem(self, *what: str) -> None:
        """Do this to all packets, in both directions, from now on: arguments of tc-netem(8)."""
        for end in self.ends:
            end.run("tc", "qdisc", "replace", "dev", WIRE, "root", "netem", "limit", "10000", *what)

    def mtu(self, size: int) -> None:
        for end in self.ends:
            end.run("ip", "link", "set", WIRE, "mtu", str(size))

    def down(self, node: int) -> None:
        self.ends[node - 1].run("ip", "link", "set", WIRE, "down")

    def up(self, node: int) -> None:
        """Up again, with the address that the kernel forgets meanwhile."""
        end = self.ends[node - 1]
        end.run("ip", "link", "set", WIRE, "up")
        end.run("ip", "address", "replace", f"fd78::{node}/64", "dev", WIRE, "nodad")

    def mend(self) -> None:
        for node, end in enumerate(self.ends, 1):
            end.run("tc", "qdisc", "replace", "dev", WIRE, "root", "pfifo")
            self.up(node)
        self.mtu(1500)

    def counted(self) -> tuple[dict[str, int], dict[str, int]]:
        """What rxe and netem counted at node 1 and 2 since the beginning of the test."""
        here, there = (
            {name: value - old[name] for name, value in new.items()}
            for old, new in zip(self._before, self._counters(), strict=True)
        )
        return here, there

    def _counters(self) -> list[dict[str, int]]:
        return [end.counters() for end in self.ends]


class Stream:
    """A sender on node 1 and a receiver on node 2. `bind` says which of the two is the bound one."""

    def __init__(self, remote: Any, wire: Wire, bind: str, count: int, ipv6: bool, options: dict[str, Any]) -> None:
        self.wire = wire
        self.count = count
        with contextlib.ExitStack() as stack:
            self.rx = remote.Receiving(options)
            stack.callback(self.rx.close)
            self.tx = Sending(count, options)
            stack.callback(self.tx.close)
            self._connect(bind, ipv6)
            self._stack = stack.pop_all()

    def __enter__(self) -> Stream:  # noqa: PYI034 (Self is not in Python 3.10)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _connect(self, bind: str, ipv6: bool) -> None:
        bound, connecting, node = (self.rx, self.tx, 2) if bind == "receiver" else (self.tx, self.rx, 1)
        host = f"[fd78::{node}]" if ipv6 else f"192.168.78.{node}"
        connecting.connect(bound.bind(f"tcp://{host}:*"), TIMEOUT_S)
        for side in (self.tx, self.rx):
            side.wait_for_peer(TIMEOUT_S)
        for side in (self.rx, self.tx):
            side.start()

    def arrived(self, count: int, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until so many frames have arrived in all."""
        assert self.rx.wait_for(count, timeout_s), self.report()

    def arrives_whole(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait for the end of the stream: every frame once, in order, byte for byte, and both sides know."""
        self.arrived(self.count, timeout_s)
        self.tx.flush(timeout_s)
        sent, received = self.tx.log(), self.rx.log()
        assert [seq for seq, _ in sent] == list(range(self.count))
        assert received == sent
        assert (self.tx.errors(), self.rx.errors()) == ([], [])
        tx, rx = self.tx.statistics(), self.rx.statistics()
        assert tx["peers_lost"] == rx["peers_lost"] == tx["dropped"] == rx["missed"] == 0

    def report(self) -> str:
        lines = []
        sides = ("sender", self.tx), ("receiver", self.rx)
        for (name, side), end, counted in zip(sides, self.wire.ends, self.wire.counted(), strict=True):
            moved = {counter: value for counter, value in counted.items() if value}
            lines.append(f"{name}: {len(side.log())} frames, {side.errors()}, {side.statistics()}; {moved}")
            lines.append(end.run("rdma", "resource", "show", "qp"))
        return "\n".join(lines)


@pytest.fixture(scope="session")
def remote() -> agent.Agent:
    peer = os.environ.get("RDMAXFER_ADMIN_PEER")
    if not peer:
        return pytest.fail("these tests need two nodes: scripts/softroce_vm.sh --nodes 2 (docs/testing.md)")
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return agent.connect(peer)
        except OSError:
            if time.monotonic() > deadline:
                return pytest.fail(f"nobody answers at {peer}: see what node 2 printed")
            time.sleep(0.2)


@pytest.fixture(scope="session")
def ends(remote: agent.Agent) -> tuple[Any, Any]:
    return End(), remote.End()


@pytest.fixture
def wire(ends: tuple[Any, Any]) -> Iterator[Wire]:
    wire = Wire(ends)
    yield wire
    wire.mend()


@pytest.fixture
def make_stream(remote: Any, wire: Wire) -> Iterator[Callable[..., Stream]]:
    """They are closed before the wire is mended: what is said at the end meets the same faults."""
    with contextlib.ExitStack() as stack:

        def make(bind: str, count: int, ipv6: bool = False, **options: Any) -> Stream:
            return stack.enter_context(Stream(remote, wire, bind, count, ipv6, options))

        yield make
