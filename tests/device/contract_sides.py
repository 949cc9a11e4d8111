"""Two ends of a connection by the words of `rdmaxfer.fabric.base`, over whatever fabric a run is about. As a program: one end,
which says its address, reads that of the other, and says what arrives, until it is killed.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

from rdmaxfer.fabric import shm, tcp, verbs
from rdmaxfer.fabric.devices import choose_gid, list_devices
from rdmaxfer.fabric.poller import Poller
from rdmaxfer.memory import Buffer

FABRIC = os.environ.get("RDMAXFER_FABRIC") or "verbs"
RECVS = 8
NBYTES = 1 << 16
TIMEOUT_S = 60.0


def _route(*, bound: bool) -> Any:
    if FABRIC == "tcp":
        return tcp.TcpRoute("127.0.0.1", bound=bound)
    if FABRIC == "shm":
        return shm.ShmRoute(bound=bound)
    loopback = ipaddress.ip_address("127.0.0.1")
    return choose_gid(list_devices(), device=os.environ.get("RDMAXFER_DEVICE") or None, local_ip=loopback)


def _domain(route: Any) -> Any:
    return {"tcp": tcp.TcpDomain, "shm": shm.ShmDomain}.get(FABRIC, lambda: verbs.Domain(route))()


class Side:
    """An endpoint, memory that it sends from, and memory that its peer may write to."""

    def __init__(self, stack: ExitStack, *, bound: bool, recv_bytes: int = 0) -> None:
        route = _route(bound=bound)
        domain = stack.enter_context(_domain(route))
        self.pd = stack.enter_context(domain.protection_domain())
        self.endpoint = self.pd.endpoint(
            route,
            send_depth=64,
            recv_depth=RECVS,
            recv_bytes=recv_bytes,
            lanes=1,
            remote_write=True,
            max_write_bytes=NBYTES,
        )
        stack.callback(self.endpoint.close)
        self.source, self.target = Buffer(NBYTES, shared=FABRIC == "shm"), Buffer(NBYTES)
        self.source_region = self.pd.register(self.source, remote_write=False)
        stack.callback(self.source_region.close)
        self.region = self.pd.register(self.target, remote_write=True)
        stack.callback(self.region.close)
        self.poller = stack.enter_context(Poller())
        self.poller.watch([self.endpoint])
        self._found: list[dict[str, Any]] = []

    @property
    def address(self) -> dict[str, Any]:
        """What the other side must know, as JSON can carry it."""
        a = self.endpoint.address
        fields = a._asdict() if hasattr(a, "_asdict") else dataclasses.asdict(a)
        fields |= {"ring": [self.target.address, self.region.rkey]}
        return {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}

    def connect(self, there: dict[str, Any]) -> None:
        self.ring = there["ring"]
        if FABRIC == "tcp":
            self.endpoint.connect(port=there["port"], key=bytes.fromhex(there["key"]), peer_key=None)
        elif FABRIC == "shm":
            self.endpoint.connect(host=bytes.fromhex(there["host"]), key=bytes.fromhex(there["key"]))
        else:
            self.endpoint.connect(
                queue_pairs=there["queue_pairs"],
                gid=bytes.fromhex(there["gid"]),
                lid=there["lid"],
                path_mtu=there["active_mtu"],
            )

    def settle(self) -> None:
        """Wait until what is posted goes out at once. By TCP, a bound side that nobody polls waits but a moment for the peer to say
        who it is, and ZeroMQ may take longer to bring that."""
        end_s = time.monotonic() + TIMEOUT_S
        while FABRIC == "tcp" and self.endpoint._peer is None:
            assert time.monotonic() < end_s, "the peer did not say who it is"
            self._wait(0.05)

    def write(
        self, data: bytes, *, imm: int, wr_id: int = 1, signaled: bool = True, at: int = 0, rkey: int = 0
    ) -> None:
        """The first 8 bytes as header, the rest as payload, to the offset `at` of the peer's memory."""
        self.source.view(at, len(data))[:] = data
        address, lkey = self.source.address + at, self.source_region.lkey
        ring_address, ring_rkey = self.ring
        self.endpoint.write(
            *(address, 8, lkey, address + 8, len(data) - 8, lkey),
            *(ring_address + at, rkey or ring_rkey, imm, wr_id, signaled),
        )

    def write_pieces(self, pieces: list[bytes], *, imm: int, wr_id: int = 1) -> None:
        """The first as header, the rest as payload, from where they don't lie side by side."""
        places = []
        at = 0
        for piece in pieces:
            self.source.view(at, len(piece))[:] = piece
            places.append((self.source.address + at, len(piece), self.source_region.lkey))
            at += len(piece) + 8
        ring_address, ring_rkey = self.ring
        self.endpoint.write(*places[0], *places[1], ring_address, ring_rkey, imm, wr_id, True, 0, places[2:])

    def arrived(self, wc: dict[str, Any], at: int = 0) -> bytes:
        """What was written, by its completion."""
        if self.endpoint.in_ring:
            return bytes(self.target.view(at, wc["byte_len"]))
        header, payload = wc["placed"]
        return bytes(header) + bytes(payload)

    def take(self, count: int, timeout_s: float = TIMEOUT_S) -> list[dict[str, Any]]:
        """The next completions."""
        end_s = time.monotonic() + timeout_s
        while len(self._found) < count:
            assert time.monotonic() < end_s, f"{len(self._found)} of {count} completions came: {self._found}"
            self._wait(0.1)
        taken, self._found = self._found[:count], self._found[count:]
        return taken

    def take_some(self, timeout_s: float) -> list[dict[str, Any]]:
        """What there is, or comes within this time."""
        self._wait(timeout_s)
        taken, self._found = self._found, []
        return taken

    def _wait(self, timeout_s: float) -> None:
        self.poller.wait(0, timeout_s)
        self.collect()

    def collect(self) -> None:
        """Keep what the latest wait has found."""
        self._found += [self._fields(wc) for _, wc in self.poller.found()]
        self.poller.clear()

    def _fields(self, wc: Any) -> dict[str, Any]:
        names = ["wr_id", "status", "byte_len", "imm", "has_imm", "is_recv", "vendor_err"]
        return {name: getattr(wc, name) for name in names + ([] if self.endpoint.in_ring else ["placed"])}

    def nothing_comes(self, for_s: float = 0.3) -> None:
        assert not self._found
        end_s = time.monotonic() + for_s
        while time.monotonic() < end_s:
            self.poller.wait(0, 0.05)
            assert self.poller.count == 0, self.poller.found()


def main() -> None:
    with ExitStack() as stack:
        side = Side(stack, bound=False)
        print(json.dumps(side.address), flush=True)
        side.connect(json.loads(sys.stdin.readline()))
        side.write(b"x" * 100, imm=7)
        while True:
            for wc in side.take(1, 600):
                print("took", wc["imm"] if wc["is_recv"] else "own", wc["status"], flush=True)


if __name__ == "__main__":
    main()
