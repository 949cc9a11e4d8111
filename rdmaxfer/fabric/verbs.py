"""Verbs resources: device and protection domain and memory through pyverbs, queue pairs through the native core.

```
with Domain(route) as domain, domain.protection_domain() as pd:
    endpoint = Endpoint(pd, route, send_depth=64, recv_depth=64, remote_write=True)   # INIT, receives posted
    ... endpoint.address goes to the peer, the peer's comes back ...
    endpoint.connect(queue_pairs=..., gid=..., lid=..., path_mtu=...)                 # RTR, RTS
```
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rdmaxfer.errors import MemlockError, NoDevice, VerbsError
from rdmaxfer.fabric import bridge, native
from rdmaxfer.fabric.devices import ETHERNET, Route
from rdmaxfer.fabric.owner import Owner
from rdmaxfer.memory import Buffer, huge_page_bytes

log = logging.getLogger("rdmaxfer")

MAX_SEND = 64
"""Bytes that `send_inline` takes."""

# Attributes of a connection, ibv_modify_qp(3).
TIMEOUT = 14  # 4.096 us * 2**14 = 67 ms until the first retry
RETRY_CNT = 7
RNR_RETRY = 7  # for ever: receives are posted before credit is given, and the application has deadlines
MIN_RNR_TIMER = 12  # 0.64 ms
HOP_LIMIT = 64

_SENTINEL = (1 << 60) - 1
"""wr_id of the work requests that end a drain."""

_CAP_IPC_LOCK = 14  # linux/capability.h


class Domain(Owner):
    """An open device."""

    reports = True
    """Whether it has asynchronous events."""

    def __init__(self, device: Route | str) -> None:
        super().__init__()
        self.lost = False
        """Whether the device failed or was removed, as far as was noticed."""
        self.name = device if isinstance(device, str) else device.device
        verbs = bridge.pyverbs()
        _fork_init()
        try:
            self._context = verbs.device.Context(name=self.name)
        except Exception as error:
            if not _is_pyverbs(error):
                raise
            if "find device" in str(error):
                raise NoDevice(
                    f"there is no RDMA device {self.name!r}.", fix="`rdmaxfer devices` lists those there are."
                ) from error
            raise bridge.verbs_error(error, "ibv_open_device") from error
        self._opened()

    def __repr__(self) -> str:
        return f"<Domain {self.name}>"

    def protection_domain(self) -> ProtectionDomain:
        """A new protection domain: what is registered in one is out of reach of another's queue pairs."""
        return ProtectionDomain(self)

    def _pyverbs_objects(self) -> tuple[Any, ...]:
        return (self._context,)

    def _destroy(self) -> None:
        _close(self._context, "ibv_close_device")


class ProtectionDomain(Owner):
    """Memory regions and queue pairs that may work together."""

    def __init__(self, domain: Domain) -> None:
        super().__init__(domain)
        self.domain = domain
        try:
            self._pd = bridge.pyverbs().pd.PD(domain._context)
        except Exception as error:
            if not _is_pyverbs(error):
                raise
            raise bridge.verbs_error(error, "ibv_alloc_pd") from error
        try:
            self.pointer = bridge.pd_pointer(self._pd, domain._context)
            """Where its `struct ibv_pd` is."""
        except BaseException:
            _close(self._pd, "ibv_dealloc_pd")
            raise
        self._opened()

    def __repr__(self) -> str:
        return f"<ProtectionDomain of {self.domain.name}>"

    def endpoint(
        self,
        route: Route,
        *,
        send_depth: int,
        recv_depth: int,
        recv_bytes: int = 0,
        lanes: int = 1,
        remote_write: bool,
        max_write_bytes: int = 0,
    ) -> Endpoint:
        """One end of a connection. (A device writes no more than what memory was registered: `max_write_bytes` is for others.)"""
        return Endpoint(
            self,
            route,
            send_depth=send_depth,
            recv_depth=recv_depth,
            recv_bytes=recv_bytes,
            lanes=lanes,
            remote_write=remote_write,
        )

    def register(self, buffer: Buffer, *, remote_write: bool) -> Region:
        """Register a buffer. `remote_write` lets the peers of this domain's endpoints write to it."""
        return self.register_memory(buffer.address, buffer.nbytes, buffer, remote_write=remote_write)

    def register_memory(self, address: int, nbytes: int, keepalive: object, *, remote_write: bool) -> Region:
        """Register memory that `keepalive` keeps. Raises MemlockError, VerbsError."""
        return Region(self, address, nbytes, keepalive, remote_write=remote_write)

    def _pyverbs_objects(self) -> tuple[Any, ...]:
        return (self._pd,)

    def _destroy(self) -> None:
        _close(self._pd, "ibv_dealloc_pd")


class Region(Owner):
    """Registered memory. It holds the memory, so that nobody frees what the device may still write to."""

    def __init__(
        self, pd: ProtectionDomain, address: int, nbytes: int, keepalive: object, *, remote_write: bool
    ) -> None:
        super().__init__(pd)
        self.address = address
        self.nbytes = nbytes
        self._keepalive = keepalive
        access = bridge.enum_value("IBV_ACCESS_LOCAL_WRITE")
        if remote_write:
            access |= bridge.enum_value("IBV_ACCESS_REMOTE_WRITE")
        _check_memlock(nbytes)
        try:
            self._mr = bridge.pyverbs().mr.MR(pd._pd, max(nbytes, 1), access, address=address)
        except Exception as error:
            if not _is_pyverbs(error):
                raise
            failed = bridge.verbs_error(error, "ibv_reg_mr")
            raise (_no_memory(nbytes) if failed.errno == errno.ENOMEM else failed) from error
        self.lkey: int = self._mr.lkey
        self.rkey: int = self._mr.rkey
        self._opened()

    def __repr__(self) -> str:
        return f"<Region {self.nbytes} bytes at {self.address:#x}>"

    def _pyverbs_objects(self) -> tuple[Any, ...]:
        return (self._mr,)

    def _destroy(self) -> None:
        _close(self._mr, "ibv_dereg_mr")
        self._keepalive = None


class QueuePair(NamedTuple):
    """What the peer needs to know of one queue pair: its number, and the PSN of the first packet it sends."""

    qp_num: int
    psn: int


@dataclass(frozen=True)
class EndpointAddress:
    """What the peer needs to know of an endpoint. `active_mtu` is in bytes."""

    queue_pairs: tuple[QueuePair, ...]
    gid: bytes
    lid: int
    link_layer: str
    active_mtu: int
    max_msg_sz: int
    device: str


CHAIN = 32
"""Work requests that are posted with one doorbell at the most."""


class _Chain:
    """Work requests of one lane that were written and not posted."""

    __slots__ = ("count", "done", "entries", "wrs")

    def __init__(self, ffi: Any) -> None:
        self.wrs = ffi.new("rx_send_wr[]", CHAIN)
        self.entries = [(wr, wr.addr, wr.length, wr.lkey) for wr in (self.wrs[i] for i in range(CHAIN))]
        self.done = ffi.new("int *")
        """How many of them were posted, by the native core's count."""
        self.count = 0


class Endpoint(Owner):
    """One end of a reliable connection: `lanes` queue pairs with one completion queue and channel.

    A lane is a queue pair and the peer's to which it is connected, numbered from 0. What is posted on one lane is carried out in
    order; between lanes there is no order.

    Posting reuses prepared work requests, so one thread at a time. `remote_write` lets the peer write to this domain's
    memory that was registered so. `send_depth` and `recv_depth` are those of each lane. After the constructor every receive is
    posted, with the wr_ids 0 to `recv_depth` - 1: on all lanes if they are for immediates only (`recv_bytes` 0), otherwise on
    lane 0, where messages come.
    """

    in_ring = True
    lends = False
    gathers = True
    holds: object = None

    def __init__(
        self,
        pd: ProtectionDomain,
        route: Route,
        *,
        send_depth: int,
        recv_depth: int,
        recv_bytes: int = 0,
        lanes: int = 1,
        remote_write: bool,
    ) -> None:
        super().__init__(pd)
        self.pd = pd
        self.route = route
        self.send_depth = send_depth
        self.recv_depth = recv_depth
        self._recv_bytes = recv_bytes
        self.lanes = lanes
        """How many there are; once connected, how many are in use."""
        self._max_msg_sz = route.max_msg_sz
        self._send_turn = 0
        self._chains: list[_Chain] = []
        self._corked = False
        self._chained = 0
        """Kept since `clear_posted`."""
        self._ffi, self._lib = native.extension().ffi, native.extension().lib
        self._error = self._ffi.new("rx_error *")
        self._posted = self._ffi.new("int *")
        self._recv_posted = self._ffi.new("int *")
        with ExitStack() as undo:
            self._scratch = Buffer(recv_depth * recv_bytes + (send_depth + 1) * MAX_SEND)
            self._scratch_view = self._scratch.view(0, self._scratch.nbytes)
            self._region = pd.register(self._scratch, remote_write=False)
            undo.callback(self._region.close)
            self._ep = self._create()
            undo.callback(lambda: self._lib.rx_ep_destroy(self._ep, self._error))
            access = self._lib.RX_REMOTE_WRITE if remote_write else 0
            for lane in range(lanes):
                self._check(self._lib.rx_ep_to_init(self._ep, lane, route.port, access, self._error))
            self._queue_pairs = tuple(
                QueuePair(self._lib.rx_ep_qp_num(self._ep, lane), secrets.randbits(24)) for lane in range(lanes)
            )
            self._prepare()
            # Posted while in INIT: in RESET it fails, and after RTR the peer's first write might find none.
            for lane in range(1 if recv_bytes else lanes):
                self.repost_recv(range(recv_depth), lane)
            undo.pop_all()
        self._opened()

    def __repr__(self) -> str:
        numbers = ", ".join(str(each.qp_num) for each in getattr(self, "_queue_pairs", ()))
        return f"<Endpoint QP {numbers or '-'} on {self.route.device}>"

    @property
    def address(self) -> EndpointAddress:
        """What to tell the peer."""
        route = self.route
        return EndpointAddress(
            queue_pairs=self._queue_pairs,
            gid=route.gid,
            lid=route.lid,
            link_layer=route.link_layer,
            active_mtu=route.active_mtu,
            max_msg_sz=route.max_msg_sz,
            device=route.device,
        )

    def connect(
        self, *, queue_pairs: Sequence[tuple[int, int]], gid: bytes, lid: int, path_mtu: int, max_msg_sz: int = 0
    ) -> None:
        """Connect each lane to one of the peer's `queue_pairs`, (number, PSN). If the peer has fewer, the lanes above are not
        used, and go when this endpoint does. `path_mtu`: the smaller active one; `max_msg_sz`: the peer's, or 0."""
        self._check_open()
        if not 1 <= len(queue_pairs) <= self.lanes:
            raise ValueError(f"{len(queue_pairs)} queue pairs can't be connected with {self.lanes} here")
        if len(gid) != 16:
            raise ValueError(f"a GID has 16 bytes, not {len(gid)}")
        path = self._ffi.new("rx_path *")
        path.path_mtu = path_mtu
        path.port_num = self.route.port
        path.sgid_index = self.route.gid_index
        path.is_global = self.route.link_layer == ETHERNET
        path.dlid = lid
        path.hop_limit = HOP_LIMIT
        path.min_rnr_timer = MIN_RNR_TIMER
        path.max_dest_rd_atomic = 1
        path.dgid = list(gid)
        retry = self._ffi.new("rx_retry *")
        retry.timeout = TIMEOUT
        retry.retry_cnt = RETRY_CNT
        retry.rnr_retry = RNR_RETRY
        retry.max_rd_atomic = 1
        for lane, (qp_num, psn) in enumerate(queue_pairs):
            path.dest_qp_num, path.rq_psn = qp_num, psn
            self._check(self._lib.rx_ep_to_rtr(self._ep, lane, path, self._error))
            retry.sq_psn = self._queue_pairs[lane].psn
            self._check(self._lib.rx_ep_to_rts(self._ep, lane, retry, self._error))
        self.lanes = len(queue_pairs)
        self._max_msg_sz = min(self.route.max_msg_sz, max_msg_sz or self.route.max_msg_sz)

    def start(self) -> None:
        """Nothing is left to be done: receives are posted."""

    # --- posting ---

    def wr_count(self, nbytes: int) -> int:
        """Work requests that a `write` of `nbytes`, header and payload together, takes; one more at most for each further piece."""
        return max(1, -(-nbytes // self._max_msg_sz))

    def write(
        self,
        header_address: int,
        header_bytes: int,
        header_lkey: int,
        address: int,
        nbytes: int,
        lkey: int,
        remote_address: int,
        rkey: int,
        imm: int,
        wr_id: int,
        signaled: bool,
        lane: int = 0,
        more: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """Write header and payload, gathered, to `remote_address`; the peer sees the immediate after all of it.

        One work request, or several with the same wr_id; only the last carries the immediate and the signal.
        """
        if more or header_bytes + nbytes > self._max_msg_sz:
            pieces = [(header_address, header_bytes, header_lkey), (address, nbytes, lkey), *more]
            self._write_split(pieces, remote_address, rkey, imm, wr_id, signaled, lane)
            return
        chain = self._chains[lane] if self._corked else None
        if chain is None:
            wr, addr, length, keys = self._wr, self._wr_addr, self._wr_length, self._wr_lkey
        else:
            if chain.count == CHAIN:
                self._post_chain(lane)
            wr, addr, length, keys = chain.entries[chain.count]
        wr.wr_id = wr_id
        addr[0], length[0], keys[0] = header_address, header_bytes, header_lkey
        if nbytes:
            addr[1], length[1], keys[1] = address, nbytes, lkey
            wr.num_sge = 2
        else:
            wr.num_sge = 1
        wr.opcode = self._write_imm_opcode
        wr.flags = self._signaled if signaled else 0
        wr.imm = imm
        wr.remote_addr = remote_address
        wr.rkey = rkey
        if chain is None:
            self.post_send(wr, 1, lane)
            return
        if not chain.count:
            chain.done[0] = 0
        chain.count += 1
        self._chained += 1

    def cork(self) -> None:
        """Keep what `write` is given, to post many with one doorbell."""
        if not self._chains:
            self._chains = [_Chain(self._ffi) for _ in range(self.lanes)]
        self._corked = True

    def uncork(self) -> None:
        """Post what was kept."""
        self._corked = False
        for lane in range(len(self._chains)):
            self._post_chain(lane)

    def _post_chain(self, lane: int) -> None:
        chain = self._chains[lane]
        if chain.count:
            if self._state != "open":
                self._check_open()
            # Ctrl-C behind this call finds `done` moved on, and nothing is posted twice.
            if self._lib.rx_post_chain(self._ep, lane, chain.wrs, chain.count, chain.done, self._error):
                chain.count = 0  # the rest is lost with the connection
                self._check(-1)
            chain.count = 0

    def _write_split(
        self,
        pieces: Sequence[tuple[int, int, int]],
        remote_address: int,
        rkey: int,
        imm: int,
        wr_id: int,
        signaled: bool,
        lane: int,
    ) -> None:
        """Write pieces of memory (address, length, lkey) one after the other: as many to a work request as it can gather, and no
        more than the largest message has bytes."""
        wrs = self._ffi.new("rx_send_wr[]", self.wr_count(sum(piece[1] for piece in pieces)) + len(pieces) - 2)
        count = filled = 0
        for address, nbytes, lkey in pieces:
            left = nbytes
            while left:
                wr = wrs[count - 1] if count else None
                if wr is None or filled == self._max_msg_sz or wr.num_sge == len(wr.addr):
                    wr = wrs[count]
                    count, filled = count + 1, 0
                    wr.opcode = self._lib.RX_WRITE
                    wr.wr_id, wr.rkey, wr.remote_addr = wr_id, rkey, remote_address
                part = min(left, self._max_msg_sz - filled)
                at = wr.num_sge
                wr.addr[at], wr.length[at], wr.lkey[at] = address + nbytes - left, part, lkey
                wr.num_sge = at + 1
                left, filled, remote_address = left - part, filled + part, remote_address + part
        last = wrs[count - 1]
        last.opcode = self._write_imm_opcode
        last.imm = imm
        last.flags = self._signaled if signaled else 0
        self.post_send(wrs, count, lane)

    def write_empty(self, wr_id: int, lane: int = 0) -> None:
        """A WRITE of nothing, signalled: its completion follows those of all that was posted before on this lane."""
        self._post_empty(self._lib.RX_WRITE, 0, wr_id, lane)

    def write_imm(self, imm: int, wr_id: int, lane: int = 0) -> None:
        """A WRITE_WITH_IMM of nothing, signalled: the peer sees the immediate after all that was posted before on this lane."""
        self._post_empty(self._write_imm_opcode, imm, wr_id, lane)

    def _post_empty(self, opcode: int, imm: int, wr_id: int, lane: int) -> None:
        wr = self._wr
        wr.wr_id = wr_id
        wr.num_sge = 0
        wr.opcode = opcode
        wr.flags = self._signaled
        wr.imm = imm
        wr.remote_addr = 0
        wr.rkey = 0
        self.post_send(wr, 1, lane)

    def send_inline(self, data: bytes, wr_id: int, signaled: bool) -> None:
        """Send a message of at most MAX_SEND bytes, on lane 0. It is copied at once, also where the device has no inline data."""
        size = len(data)
        if size > MAX_SEND:
            raise ValueError(f"a message of {size} bytes is above {MAX_SEND}")
        # A slot for each place in the send queue, used in turn: it is free again before its turn comes.
        offset = self._send_base + self._send_turn * MAX_SEND
        self._send_turn = (self._send_turn + 1) % (self.send_depth + 1)
        self._scratch_view[offset : offset + size] = data
        wr = self._wr
        wr.wr_id = wr_id
        self._wr_addr[0], self._wr_length[0], self._wr_lkey[0] = self._scratch.address + offset, size, self._region.lkey
        wr.num_sge = 1 if size else 0
        wr.opcode = self._lib.RX_SEND
        wr.flags = (self._signaled if signaled else 0) | (self._inline if size else 0)
        self.post_send(wr, 1, 0)

    def post_send(self, wrs: Any, n: int, lane: int = 0) -> None:
        """Post `n` work requests of an `rx_send_wr` array, in order, with one doorbell for each 64."""
        if self._state != "open":
            self._check_open()
        if self._chains:
            self._post_chain(lane)  # in its order
        if self._lib.rx_post_send(self._ep, lane, wrs, n, self._posted, self._error):
            self._check(-1)

    def clear_posted(self) -> None:
        """Forget what `last_posted` says."""
        self._posted[0] = 0
        self._chained = 0

    @property
    def last_posted(self) -> int:
        """Work requests that the device took since `clear_posted`: kept in C, so it holds also if Ctrl-C hid it."""
        return int(self._posted[0]) + self._chained

    def clear_reposted(self) -> None:
        """Forget what `last_reposted` says."""
        self._recv_posted[0] = 0

    @property
    def last_reposted(self) -> int:
        """Receives that the device took since `clear_reposted`: kept in C, so it holds also if Ctrl-C hid it."""
        return int(self._recv_posted[0])

    def repost_recv(self, wr_ids: Iterable[int], lane: int = 0) -> None:
        """Post receives (again), with one doorbell for each 64."""
        n = 0
        for wr_id in wr_ids:
            self._recv_batch[n] = self._recv_wrs[wr_id]
            n += 1
        if n and self._lib.rx_post_recv(self._ep, lane, self._recv_batch, n, self._recv_posted, self._error):
            self._check(-1)

    def recv_payload(self, wr_id: int, nbytes: int) -> bytes:
        """A copy of what the receive `wr_id` took; before it is posted again."""
        if not 0 <= nbytes <= self._recv_bytes:
            raise ValueError(f"{nbytes} bytes are not within a receive buffer of {self._recv_bytes}")
        start = wr_id * self._recv_bytes
        return bytes(self._scratch_view[start : start + nbytes])

    @property
    def max_inline(self) -> int:
        """Bytes that the device takes inline: 0 or at least MAX_SEND."""
        return self._max_inline

    # --- end ---

    def explain(self, status: int, vendor_err: int) -> str:
        """A failed completion in words."""
        return native.completion_error(status, vendor_err)

    def to_error(self) -> None:
        """Cancel everything outstanding: it completes with WC_WR_FLUSH_ERR. The peer's writes will fail."""
        self._check_open()
        for lane in range(len(self._queue_pairs)):
            self._check(self._lib.rx_ep_to_err(self._ep, lane, self._error))

    def drain(self, timeout_s: float) -> bool:
        """Cancel everything outstanding and take its completions. True if all came; errors of the device make it False.

        Unsignalled work requests that succeeded have no completion, so a last one is posted on each lane: queues are flushed in
        order. The completions are dropped: handle what matters before. Nobody else may poll this endpoint meanwhile.
        """
        self._check_open()
        ffi, lib, ep, error = self._ffi, self._lib, self._ep, self._error
        unposted = set(range(len(self._queue_pairs)))
        running = set(unposted)
        failed = [lane for lane in unposted if lib.rx_ep_to_err(ep, lane, error)]
        if failed:
            return False
        sentinel = ffi.new("rx_send_wr *")
        sentinel.wr_id = _SENTINEL
        sentinel.opcode = lib.RX_SEND
        sentinel.flags = lib.RX_SIGNALED
        eps, wcs, taken, slept = ffi.new("rx_ep *[]", [ep]), ffi.new("rx_wc[]", 64), ffi.new("int *"), ffi.new("int *")
        deadline = time.monotonic() + timeout_s
        while True:
            for lane in list(unposted):  # tried again, should the send queue have been full
                if lib.rx_post_send(ep, lane, sentinel, 1, self._posted, error) == 0:
                    unposted.remove(lane)
            left = deadline - time.monotonic()
            count = lib.rx_wait(eps, 1, 0, -1, 0, max(0, int(min(left, 0.01) * 1e9)), wcs, 64, taken, slept, error)
            if count < 0:
                return False
            running -= {wcs[i].lane for i in range(count) if wcs[i].wr_id == _SENTINEL and not wcs[i].is_recv}
            if not running and not lib.rx_ep_receives(ep):
                return True
            if left <= 0:
                return False

    @property
    def cq(self) -> int:
        """Where its `struct ibv_cq` is: by this, events name it."""
        return int(self._lib.rx_ep_cq(self._ep))

    def _destroy(self) -> None:
        self._check(self._lib.rx_ep_destroy(self._ep, self._error))
        self._region.close()

    # --- making ---

    def _create(self) -> Any:
        ffi, lib = self._ffi, self._lib
        out = ffi.new("rx_ep **")
        caps = ffi.new("rx_caps *")
        pd = ffi.cast("void *", self.pd.pointer)
        for inline in (MAX_SEND, 0):  # a device without inline data refuses to create such a queue pair
            caps.send_wr, caps.recv_wr, caps.max_inline = self.send_depth, self.recv_depth, inline
            caps.cqe = self.lanes * (self.send_depth + 1 + self.recv_depth)
            rc = lib.rx_ep_create(native.library(), pd, self.lanes, caps, out, self._error)
            if rc == 0:
                break
        self._check(rc)
        self._max_inline = caps.max_inline if caps.max_inline >= MAX_SEND else 0
        return out[0]

    def _prepare(self) -> None:
        ffi, lib = self._ffi, self._lib
        self._wr = ffi.new("rx_send_wr *")
        self._wr_addr, self._wr_length, self._wr_lkey = self._wr.addr, self._wr.length, self._wr.lkey
        self._write_imm_opcode: int = lib.RX_WRITE_IMM
        self._signaled: int = lib.RX_SIGNALED
        self._inline: int = lib.RX_INLINE if self._max_inline else 0
        self._send_base = self.recv_depth * self._recv_bytes
        self._recv_wrs = ffi.new("rx_recv_wr[]", self.recv_depth)
        self._recv_batch = ffi.new("rx_recv_wr[]", self.recv_depth)
        for i in range(self.recv_depth):
            wr = self._recv_wrs[i]
            wr.wr_id = i
            wr.addr = self._scratch.address + i * self._recv_bytes
            wr.length = self._recv_bytes
            wr.lkey = self._region.lkey

    def _check(self, rc: int) -> None:
        native.check(rc, self._error)


# --- errors of pyverbs, and limits ------------------------------------------------------------------------------------


def _is_pyverbs(error: Exception) -> bool:
    return type(error).__module__.startswith("pyverbs")


def _close(thing: Any, verb: str) -> None:
    try:
        thing.close()
    except Exception as error:
        if not _is_pyverbs(error):
            raise
        raise bridge.verbs_error(error, verb) from error


_fork_initialized = False


def _fork_init() -> None:
    global _fork_initialized
    if _fork_initialized:
        return
    if huge_page_bytes():
        # ibv_fork_init(3): else, on kernels older than 5.12, registering a part of a huge page fails.
        os.environ.setdefault("RDMAV_HUGEPAGES_SAFE", "1")
    error = native.extension().ffi.new("rx_error *")
    try:
        native.check(native.extension().lib.rx_fork_init(native.library(), error), error)
    except VerbsError as failed:
        log.warning("memory may be lost when this process forks: %s", failed)
    _fork_initialized = True


def _may_lock_any_amount() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def _check_memlock(nbytes: int) -> None:
    """Registering locks memory; the kernel's own answer would be a bare ENOMEM."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and nbytes > limit and not _may_lock_any_amount():
        raise _no_memory(nbytes)


def _no_memory(nbytes: int) -> VerbsError:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return native.verbs_error(
            "ibv_reg_mr", errno.ENOMEM, f"{nbytes} bytes; the limit on locked memory is not the cause"
        )
    return MemlockError(
        f"{nbytes} bytes can't be registered: this process may lock {limit} bytes of memory "
        f"(`ulimit -l`: {limit // 1024}).",
        verb="ibv_reg_mr",
        errno=errno.ENOMEM,
        fix="raise the limit: a line '* - memlock unlimited' in /etc/security/limits.d/rdma.conf and a new login, "
        "LimitMEMLOCK=infinity in a systemd unit, --ulimit memlock=-1 for docker and podman; or use fewer or smaller "
        "slots.",
    )
