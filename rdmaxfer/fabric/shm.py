"""Frames between processes of one user on one machine: nothing is copied, whatever the size, as both map the sender's memory.

The side that connects makes two queues in shared memory (shm.h), and hands them over through a Unix socket, whose name only the
peer was told, over the control plane. What a frame's payload lies in, a *segment*, goes through that socket once, by its
descriptor; then an item in the queue says where in it the payload is. Nothing has a name in a file system: what is left by a
process that was killed, the kernel frees.

The receiver reads a frame where the sender has it. So the sender may use that memory again when the frame was released, and not
when its work requests have completed. If the connection ends before, it never does (`Source.lent`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import importlib
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

from rdmaxfer import credentials
from rdmaxfer.errors import NoDevice, VerbsError
from rdmaxfer.fabric import soft
from rdmaxfer.fabric.owner import Owner
from rdmaxfer.fabric.soft import FLUSHED, Completion
from rdmaxfer.memory import Buffer, ForeignMemory, map_foreign

log = logging.getLogger("rdmaxfer")

KEY_BYTES: Final = 16
HOST_BYTES: Final = 16
VERSION: Final = 1

_HELLO: Final = struct.Struct("<16sII")
"""key, version, capacity; with the descriptors of the queues, and of the eventfds that wake this side, and the other."""
_SEGMENT: Final = struct.Struct("<BxxxIQ")
"""What is to be done, the segment's number, its bytes; with its descriptor if it is new."""
_ADD, _ADD_FOR_ONE_FRAME, _FORGET = range(1, 4)

MAX_CAPACITY: Final = 256
"""Items in a queue. More that were posted wait in a list."""
MAX_SEGMENTS: Final = 1 << 14
MAX_GUESTS: Final = 4
"""Who has connected to the socket and not said the key yet; one more, and the first has to go."""
AT_A_TIME: Final = 128
GRACE_S: Final = 0.2
"""So long a connection that has ended is not told of: its goodbye, by the control plane, may be on its way."""


@functools.cache
def host_id() -> bytes:
    """What two processes have in common that can hand memory to each other: machine, network namespace and user."""
    parts = [
        Path("/proc/sys/kernel/random/boot_id").read_text(),
        str(os.stat("/proc/self/ns/net").st_ino),
        str(os.stat("/proc/self/ns/user").st_ino),
        str(os.geteuid()),
    ]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=HOST_BYTES, person=b"rdmaxfer shm").digest()


def problem() -> str:
    """Why this installation can't take part; "" if it can."""
    try:
        _native()
        host_id()
    except ImportError as error:
        return f"rdmaxfer was installed without its native core ({error})"
    except OSError as error:
        return f"this machine does not say which one it is: {error}"
    return "" if hasattr(os, "memfd_create") else "this system has no memfd_create"


@functools.cache
def _native() -> Any:
    return importlib.import_module("rdmaxfer._shm")


@dataclass(frozen=True)
class ShmRoute:
    """How to reach a peer on this machine. `bound`: whether it comes to us."""

    bound: bool
    reason: str = field(compare=False, default="")
    fabric: ClassVar[str] = "shm"
    device: ClassVar[str] = "shm"

    def __str__(self) -> str:
        return "shared memory of this machine"


class ShmDomain(Owner):
    """Nothing but the parent of what is made from it."""

    name = "shm"
    reports = False

    def __init__(self) -> None:
        super().__init__()
        self.lost = False
        why = problem()
        if why:
            raise NoDevice(f"frames can't go by shared memory: {why}.", fix='fabric="verbs" or "tcp".')
        self._opened()

    def __repr__(self) -> str:
        return "<ShmDomain>"

    def protection_domain(self) -> ShmProtectionDomain:
        return ShmProtectionDomain(self)

    def _destroy(self) -> None:
        pass


class ShmRegion(soft.Region):
    """Memory to send from. `segment`: the shared memory in which it lies, if it does; `number`: by which peers know that."""

    def __init__(
        self, pd: ShmProtectionDomain, address: int, nbytes: int, keepalive: object, *, remote_write: bool
    ) -> None:
        self.segment: Buffer | ForeignMemory | None = None
        self.number = 0
        if isinstance(keepalive, Buffer | ForeignMemory) and _is_shared_part(keepalive, address, nbytes):
            self.segment = keepalive
            self.number = pd.use_segment(keepalive)
        super().__init__(pd, address, nbytes, keepalive, remote_write=remote_write)

    def _destroy(self) -> None:
        assert isinstance(self._parent, ShmProtectionDomain)
        segment, self.segment = self.segment, None  # once, also if this is interrupted and begins anew
        if segment is not None:
            self._parent.leave_segment(segment)
        super()._destroy()


class ShmProtectionDomain(soft.ProtectionDomain):
    """... whose endpoints are connected by shared memory."""

    def __init__(self, domain: ShmDomain) -> None:
        self._numbers: dict[int, tuple[int, int]] = {}
        """Of segments, by their address: number, and in how many regions they are."""
        super().__init__(domain)

    def use_segment(self, segment: Buffer | ForeignMemory) -> int:
        """Its number."""
        number, uses = self._numbers.get(segment.address, (0, 0))
        number = number or self.new_key()
        self._numbers[segment.address] = (number, uses + 1)
        return number

    def leave_segment(self, segment: Buffer | ForeignMemory) -> None:
        """A region in it was closed. After the last, no peer keeps it."""
        number, uses = self._numbers[segment.address]
        if uses > 1:
            self._numbers[segment.address] = (number, uses - 1)
            return
        del self._numbers[segment.address]
        for child in list(self._children):  # other threads make endpoints and register memory meanwhile
            if isinstance(child, ShmEndpoint):
                child.forget(number)

    def endpoint(
        self,
        route: ShmRoute,
        *,
        send_depth: int,
        recv_depth: int,
        recv_bytes: int = 0,
        lanes: int = 1,
        remote_write: bool,
        max_write_bytes: int = 0,
    ) -> ShmEndpoint:
        return ShmEndpoint(self, route, send_depth=send_depth, recv_depth=recv_depth)

    def register_memory(self, address: int, nbytes: int, keepalive: object, *, remote_write: bool) -> ShmRegion:
        return ShmRegion(self, address, nbytes, keepalive, remote_write=remote_write)


class EndpointAddress(NamedTuple):
    """What the peer must know: where this is, and the key of the socket that the bound side listens at."""

    host: bytes
    key: bytes


class _Waiting(NamedTuple):
    """Posted, and not put into the queue yet."""

    ordinal: int
    item: dict[str, int]
    data: bytes
    wr_id: int
    signaled: bool
    region: ShmRegion | None
    copy: Buffer | None
    """Of the payload, if its own memory can't be shared."""


class _Lie(Exception):
    """The peer did what it would not do by this protocol."""


class ShmEndpoint(soft.Endpoint):
    """One end of a connection."""

    lends = True

    def __init__(self, pd: ShmProtectionDomain, route: ShmRoute, *, send_depth: int, recv_depth: int) -> None:
        super().__init__(pd, recv_depth=recv_depth)
        self.route = route
        module = _native()
        self._ffi, self._lib = module.ffi, module.lib
        self._capacity = min(MAX_CAPACITY, 1 << (max(send_depth, recv_depth) - 1).bit_length())
        self._key = secrets.token_bytes(KEY_BYTES)
        self.ep: Any = None
        """The native end, once there is a peer. `changes` is of it, too."""
        self._queues: Any = None
        self._eventfds: list[int] = []
        self._listener: socket.socket | None = None
        self._guests: list[socket.socket] = []
        self._socket: socket.socket | None = None
        self._backlog: deque[_Waiting] = deque()
        self._pumping = threading.Lock()
        """Whoever posts, and whoever polls, may find room for what waits."""
        self._posted_before = 0
        self._announced: set[int] = set()
        """Segments that the peer was told of."""
        self._segments: dict[int, memoryview] = {}
        """The peer's, by number."""
        self._for_one_frame: set[int] = set()
        self._gathering = False
        self.ends_s: float | None = None
        """When to say that the connection has ended."""
        self._item = self._ffi.new("sx_item *")
        self._items = self._ffi.new("sx_item[]", AT_A_TIME)
        self._wr_ids = self._ffi.new("uint64_t[]", AT_A_TIME)
        if route.bound:
            self._listen()
        self._opened()

    def __repr__(self) -> str:
        connected = "" if self.ep is None else ", connected"
        return f"<ShmEndpoint {'bound' if self.route.bound else 'connecting'}{connected}>"

    @property
    def address(self) -> EndpointAddress:
        return EndpointAddress(host_id(), self._key)

    # --- connecting ----------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        listener = _new_socket()
        try:
            listener.bind(_name(self._key))
            listener.listen(MAX_GUESTS)
        except OSError as error:
            listener.close()
            raise NoDevice(f"no Unix socket could be bound: {error.strerror}.") from None
        self._listener = listener

    def connect(self, *, host: bytes, key: bytes) -> None:
        """Connect to the bound peer. (The bound side waits for it.) Raises NoDevice."""
        self._check_open()
        if host != host_id():
            raise NoDevice("the peer is not on this machine, or belongs to another user.", fix='fabric="auto".')
        if self.route.bound:
            return
        queues = Buffer(self._lib.sx_bytes(self._capacity), shared=True)
        link = _new_socket()
        try:
            for _ in range(2):
                self._eventfds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            own_fd, peer_fd = self._eventfds
            link.connect(_name(key))
            _check_user(link)
            assert queues.fd is not None
            socket.send_fds(link, [_HELLO.pack(key, VERSION, self._capacity)], [queues.fd, own_fd, peer_fd])
        except (OSError, _Lie) as error:
            link.close()
            raise NoDevice(f"the peer can't be reached by shared memory: {error}.", fix='fabric="auto".') from None
        self._begin(link, queues.view(0, queues.nbytes), self._capacity, first=True)

    def _begin(self, link: socket.socket, queues: memoryview, capacity: int, *, first: bool) -> None:
        self._socket = link
        self._queues = self._ffi.from_buffer(queues)
        ep = self._lib.sx_new(self._queues, capacity, first, *self._eventfds)
        if ep == self._ffi.NULL:
            raise MemoryError
        self._lib.sx_set_receives(ep, self.receives.total)
        self.ep = ep
        self.changes += 1
        self._pump()

    def start(self) -> None:
        self.look()

    # --- what comes by the socket; the Poller calls this ------------------------------------------------------------------

    @property
    def files(self) -> dict[int, object]:
        """What to watch for input, and then to call `look`: by descriptor, what it is that of."""
        if self.error or self.ends_s is not None:
            return {}
        sockets = (self._listener, self._socket, *self._guests)
        watched: dict[int, object] = {each.fileno(): each for each in sockets if each is not None}
        return watched if self.ep is None else watched | {self._eventfds[0]: self._eventfds}

    def look(self) -> None:
        """Take what has come by the sockets."""
        try:
            if self._listener is not None:
                self._accept()
            elif self._socket is not None and self.ends_s is None and not self.error:
                self._read()
        except _Lie as error:
            self.broke(f"the peer broke the rules of shared memory: {error}")

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):  # nobody is there (any more), or there are no more descriptors: later, then
            while True:
                guest, _ = self._listener.accept()
                guest.setblocking(False)
                self._guests.append(guest)
                self.changes += 1
                if len(self._guests) > MAX_GUESTS:
                    self._guests.pop(0).close()
        for guest in list(self._guests):
            try:
                data, fds, _, _ = socket.recv_fds(guest, _HELLO.size + 1, 3, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                continue
            except OSError:
                data, fds = b"", []
            self._guests.remove(guest)
            if self._welcome(guest, data, fds):
                self._listener.close()
                self._listener = None
                while self._guests:
                    self._guests.pop().close()
                return

    def _welcome(self, guest: socket.socket, data: bytes, fds: list[int]) -> bool:
        """Whether this is the peer."""
        try:
            _check_user(guest)
            if len(data) != _HELLO.size or len(fds) != 3:
                raise _Lie("it did not begin as the peer does")
            key, version, capacity = _HELLO.unpack(data)
            if not hmac.compare_digest(key, self._key) or version != VERSION:
                raise _Lie("it does not know the key")
            if not 0 < capacity <= MAX_CAPACITY or capacity & (capacity - 1):
                raise _Lie(f"it wants a queue of {capacity} items")
            queues = map_foreign(fds[0], self._lib.sx_bytes(capacity), writable=True)
        except (OSError, ValueError, _Lie) as error:
            log.info("somebody was turned away at the socket for shared memory: %s", error)
            guest.close()
            for fd in fds:
                os.close(fd)
            return False
        os.close(fds[0])
        for fd in fds[1:]:
            os.set_blocking(fd, False)
        self._eventfds = [fds[2], fds[1]]
        self._begin(guest, memoryview(queues), capacity, first=False)
        return True

    def _read(self) -> None:
        """Take what the peer says of its segments. Raises _Lie."""
        link = self._socket
        while link is not None:
            try:
                data, fds, flags, _ = socket.recv_fds(link, _SEGMENT.size + 1, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                data, fds, flags = b"", [], 0
            if flags & socket.MSG_CTRUNC and not fds:
                self.broke("this process may not open more files, of which each segment takes two: raise `ulimit -n`")
                return
            if not data:
                self._ended()
                return
            try:
                self._on_segment(data, fds)
            except (OSError, ValueError) as error:
                raise _Lie(f"a segment can't be used: {error}") from None
            finally:
                for fd in fds:
                    os.close(fd)

    def _notice_end(self) -> None:
        """Look whether the peer is there, without taking anything."""
        if self._socket is None or self.ends_s is not None:
            return
        try:
            gone = not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            self._ended()

    def _ended(self) -> None:
        self.ends_s = time.monotonic() + GRACE_S
        self.changes += 1

    def _on_segment(self, data: bytes, fds: list[int]) -> None:
        if len(data) != _SEGMENT.size:
            raise _Lie("it sent what is no message about a segment")
        kind, number, nbytes = _SEGMENT.unpack(data)
        if kind == _FORGET and not fds:
            self._segments.pop(number, None)
            return
        if kind not in (_ADD, _ADD_FOR_ONE_FRAME) or len(fds) != 1 or len(self._segments) >= MAX_SEGMENTS:
            raise _Lie("it sent a segment in a way that is not agreed on, or too many")
        self._segments[number] = memoryview(map_foreign(fds[0], nbytes, keep_fd=kind == _ADD))
        if kind == _ADD_FOR_ONE_FRAME:
            self._for_one_frame.add(number)

    # --- posting -------------------------------------------------------------------------------------------------------

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
        item = self._item
        item.kind, item.imm, item.rkey, item.data_bytes = self._lib.SX_WRITE, imm, rkey, header_bytes
        item.address, item.nbytes = remote_address, nbytes
        region: ShmRegion | None = None
        if nbytes:
            found = self.pd.regions.get(lkey)
            if not isinstance(found, ShmRegion):
                raise VerbsError("memory was to be sent that is not registered.", verb="post_send", errno=22)
            region = found
            region.part(address, nbytes)
            start = region.segment.address if region.segment is not None else region.address
            item.segment, item.offset = region.number, address - start
        joined: Buffer | None = None
        if more:  # an item names one piece
            joined = _copy_of(memoryview(self.pd.joined(self.pd.local(lkey, address, nbytes), more)))
            item.nbytes = joined.nbytes
        self._post(header_address, wr_id, signaled, region, address, joined)

    def write_imm(self, imm: int, wr_id: int, lane: int = 0) -> None:
        self._clear_item(self._lib.SX_IMM)
        self._item.imm = imm
        self._post(0, wr_id, True, None, 0)

    def write_empty(self, wr_id: int, lane: int = 0) -> None:
        self._notice_end()  # who asks for this completion means to rely on it
        self._clear_item(self._lib.SX_EMPTY)
        self._post(0, wr_id, True, None, 0)

    def send_inline(self, data: bytes, wr_id: int, signaled: bool) -> None:
        if len(data) > soft.MAX_SEND:
            raise ValueError(f"a message of {len(data)} bytes is above {soft.MAX_SEND}")
        self._clear_item(self._lib.SX_SEND)
        self._item.data_bytes = len(data)
        memory = self._ffi.from_buffer(data)
        self._post(int(self._ffi.cast("uintptr_t", memory)), wr_id, signaled, None, 0)

    def _clear_item(self, kind: int) -> None:
        item = self._item
        item.kind, item.imm, item.rkey, item.data_bytes = kind, 0, 0, 0
        item.address = item.nbytes = item.offset = item.segment = 0

    def _post(
        self,
        data_address: int,
        wr_id: int,
        signaled: bool,
        region: ShmRegion | None,
        address: int,
        copy: Buffer | None = None,
    ) -> None:
        if self._state != "open":
            self._check_open()
        if self.error:
            raise VerbsError(f"{self.error}.", verb="post_send", errno=107)
        item = self._item
        if self.ep is not None and not self._backlog and copy is None and self._known(region):
            data = self._ffi.cast("void *", data_address)
            rc = self._lib.sx_post(self.ep, item, data, wr_id, signaled)
            if rc == 1:
                if signaled and self.asleep:
                    self.wake()
                return
            if rc < 0:
                self._impossible()
        if copy is None and region is not None and region.segment is None:
            copy = _copy_of(region.part(address, item.nbytes))
        self._backlog.append(
            _Waiting(
                self._accepted,
                {name: getattr(item, name) for name in _FIELDS},
                bytes(self._ffi.buffer(self._ffi.cast("char *", data_address), item.data_bytes)),
                wr_id,
                signaled,
                region,
                copy,
            )
        )
        self._pump()

    def _impossible(self) -> None:
        self.broke("the peer broke the rules of shared memory: its index is impossible")
        raise VerbsError(f"{self.error}.", verb="post_send", errno=71)

    def _known(self, region: ShmRegion | None) -> bool:
        """Whether the peer has been told of a segment; tells it."""
        if region is None or region.number in self._announced:
            return True
        told = region.segment is not None and self._tell(_ADD, region.number, region.segment)
        if told:
            self._announced.add(region.number)
        return told

    def _tell(self, kind: int, number: int, segment: Buffer | ForeignMemory | None) -> bool:
        """Say something of a segment; False if the socket is full just now."""
        link = self._socket
        if link is None:
            return False
        nbytes = segment.nbytes if segment is not None else 0
        fds = [segment.fd] if segment is not None and segment.fd is not None else []
        try:
            socket.send_fds(link, [_SEGMENT.pack(kind, number, nbytes)], fds)
        except BlockingIOError:
            return False
        except OSError as error:
            return error.errno != _ETOOMANYREFS  # with any other, the peer is gone, and `look` will say so
        return True

    def forget(self, number: int) -> None:
        """A segment is not used any more. With the socket full, the peer keeps it until the end."""
        if number in self._announced:
            self._announced.discard(number)
            self._tell(_FORGET, number, None)

    def _pump(self) -> None:
        """Put into the queue what waits."""
        if self._backlog and self.ep is not None:
            with self._pumping:
                self._pump_all()

    def _pump_all(self) -> None:
        while self._backlog and self.ep is not None and not self.error:
            waiting = self._backlog[0]
            if waiting.ordinal >= self._lib.sx_posted(self.ep):  # else it was, and Ctrl-C came
                item = self._ffi.new("sx_item *", waiting.item)
                if waiting.copy is not None:
                    item.segment, item.offset = self.pd.new_key(), 0
                    if not self._tell(_ADD_FOR_ONE_FRAME, item.segment, waiting.copy):
                        return
                elif not self._known(waiting.region):
                    return
                data = self._ffi.from_buffer(waiting.data)
                rc = self._lib.sx_post(self.ep, item, data, waiting.wr_id, waiting.signaled)
                if rc < 0:
                    self.broke("the peer broke the rules of shared memory: its index is impossible")
                if rc != 1:
                    return
                if waiting.signaled and self.asleep:
                    self.wake()
            self._backlog.popleft()

    @property
    def _accepted(self) -> int:
        """How much was posted, in all."""
        if self._backlog:
            return self._backlog[-1].ordinal + 1
        return int(self._lib.sx_posted(self.ep)) if self.ep is not None else 0

    def clear_posted(self) -> None:
        self._posted_before = self._accepted

    @property
    def last_posted(self) -> int:
        return self._accepted - self._posted_before

    def repost_recv(self, wr_ids: Iterable[int], lane: int = 0) -> None:
        for wr_id in wr_ids:
            self.receives.put(wr_id)
        if self.ep is not None:
            self._lib.sx_set_receives(self.ep, self.receives.total)
            if self.asleep and self._lib.sx_ready(self.ep):
                self.wake()

    # --- completions ---------------------------------------------------------------------------------------------------

    def gather(self) -> None:
        if self.ends_s is not None and not self.error:
            self._end()
        if self._backlog:
            self._pump()
        ep, lib = self.ep, self._lib
        if ep is None or not lib.sx_ready(ep):
            return
        if self._gathering:
            self._settle()
        self._gathering = True
        sent, came = lib.sx_completed_before(ep), lib.sx_arrived_before(ep)
        # Once the peer has gone, who knows what it has seen?
        count = lib.sx_completed(ep, self._wr_ids, AT_A_TIME) if self.ends_s is None else 0
        new = [Completion(self._wr_ids[i], ordinal=sent + i + 1) for i in range(count)]
        arrived = lib.sx_arrived(ep, self._items, AT_A_TIME) if not self.error else 0
        lie = "its index is impossible" if arrived < 0 else ""
        for i in range(arrived):
            try:
                new.append(self._take(self._items[i], lib.sx_data(ep, i), self.receives.peek(i), came + i + 1))
            except _Lie as error:
                lie = str(error)
                break
        self.done.extend(new)
        self._settle()
        self._gathering = False
        if lie:
            self.broke(f"the peer broke the rules of shared memory: {lie}")

    def _settle(self) -> None:
        """Take out of the queues what is in `done`. Ctrl-C may have kept an earlier call from it."""
        sent, came = self._lib.sx_completed_before(self.ep), self._lib.sx_arrived_before(self.ep)
        for each in self.done:
            if each.is_recv:
                came = max(came, each.ordinal)
            else:
                sent = max(sent, each.ordinal)
        while self.receives.taken < came:
            self.receives.take()
        self._lib.sx_consume(self.ep, sent, came)

    def _take(self, item: Any, data: Any, wr_id: int, ordinal: int) -> Completion:
        kind, lib = item.kind, self._lib
        if kind == lib.SX_WRITE:
            nbytes = item.nbytes
            header = self._ffi.buffer(data, item.data_bytes)[:]
            total = item.data_bytes + nbytes
            if self.pd.remote(item.rkey, item.address, total) is None:
                raise _Lie("it wrote to memory that is not its")
            payload = self._payload(item.segment, item.offset, nbytes) if nbytes else memoryview(b"")
            return Completion(
                wr_id, is_recv=True, byte_len=total, imm=item.imm, placed=(header, payload), ordinal=ordinal
            )
        if kind == lib.SX_IMM:
            return Completion(wr_id, is_recv=True, imm=item.imm, ordinal=ordinal)
        if kind == lib.SX_SEND and item.data_bytes <= soft.MAX_SEND:
            self._messages[wr_id] = self._ffi.buffer(data, item.data_bytes)[:]
            return Completion(wr_id, is_recv=True, byte_len=item.data_bytes, ordinal=ordinal)
        raise _Lie(f"it sent an item of kind {kind}")

    def _payload(self, number: int, offset: int, nbytes: int) -> memoryview:
        segment = self._segments.get(number)
        if segment is None:
            self._read()  # it was told of before the item was put in
            segment = self._segments.get(number)
        if segment is None or offset + nbytes > len(segment):
            raise _Lie("it named memory that it has not handed over")
        if number in self._for_one_frame:
            self._for_one_frame.discard(number)
            del self._segments[number]
        return segment[offset : offset + nbytes]

    def _end(self) -> None:
        """The peer has closed its socket. What it had put in comes first."""
        assert self.ends_s is not None
        if self.ep is not None and self._lib.sx_ready(self.ep):
            return
        if time.monotonic() >= self.ends_s:
            self.broke("the process at the other end of the shared memory has closed it, or has died")

    def broke(self, why: str) -> None:
        super().broke(why)
        self.changes += 1

    # --- the end -------------------------------------------------------------------------------------------------------

    def to_error(self) -> None:
        """Give up the connection; everything outstanding completes, with a status."""
        self._check_open()
        self._hang_up()
        self.broke("it was given up")

    def drain(self, timeout_s: float) -> bool:
        self._check_open()
        self._hang_up()
        self.broke("it was drained")
        return True

    def _hang_up(self) -> None:
        self._pump()
        while self._backlog:
            self.complete(Completion(self._backlog.popleft().wr_id, status=FLUSHED))
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _destroy(self) -> None:
        for each in (self._socket, self._listener, *self._guests):
            if each is not None:
                each.close()
        ep, self.ep = self.ep, None
        if ep is not None:
            self._lib.sx_free(ep)
        for fd in self._eventfds:
            os.close(fd)
        self._eventfds = []
        self._queues = None
        self._segments.clear()
        self.done.clear()  # they refer to segments, too


_ETOOMANYREFS: Final = 109
_FIELDS: Final = ("kind", "imm", "rkey", "data_bytes", "address", "nbytes", "offset", "segment")


def _is_shared_part(memory: Buffer | ForeignMemory, address: int, nbytes: int) -> bool:
    end = memory.address + memory.nbytes
    return memory.fd is not None and memory.address <= address and address + nbytes <= end


def _new_socket() -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise NoDevice(f"no Unix socket could be made: {error.strerror}.", fix="raise `ulimit -n`.") from None


def _name(key: bytes) -> str:
    """The socket's name, in the abstract name space. /proc/net/unix shows it to everybody, so it is not the key itself."""
    return "\0rdmaxfer-" + hashlib.blake2b(key, digest_size=16, person=b"rdmaxfer socket").hexdigest()


def _check_user(link: socket.socket) -> None:
    """Raise _Lie if another user is at the other end."""
    uid = credentials.peer(link).uid
    if uid != os.geteuid():
        raise _Lie(f"it belongs to user {uid}")


def _copy_of(payload: memoryview) -> Buffer:
    """Memory that can't be shared, in some that can."""
    copy = Buffer(len(payload), shared=True)
    copy.view(0, len(payload))[:] = payload
    return copy


__all__ = ["EndpointAddress", "ShmDomain", "ShmEndpoint", "ShmProtectionDomain", "ShmRoute", "host_id", "problem"]
