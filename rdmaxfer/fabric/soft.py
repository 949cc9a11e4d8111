"""Fabrics without a device: what those in software share.

A *service* thread moves the bytes, as a card does for verbs: it takes what was posted, places what arrives, and appends
completions, whatever the program's own threads do. So Ctrl-C, which only the main thread sees, can't come between a frame's arrival
and its completion; and posting is one `deque.append`, which has happened or has not.
"""

from __future__ import annotations

import ctypes
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

from rdmaxfer.errors import VerbsError
from rdmaxfer.fabric.owner import Owner
from rdmaxfer.memory import Buffer

T = TypeVar("T")

SUCCESS: Final = 0
# Numbers of `enum ibv_wc_status` (verbs.h), for what corresponds to it.
FLUSHED: Final = 5
BROKEN: Final = 12

MAX_SEND: Final = 64
"""Bytes that `send_inline` takes."""


class Completion:
    """What became of something posted, with the fields of `rx_wc` (verbs.h)."""

    __slots__ = (
        *(
            "byte_len",
            "handled",
            "has_imm",
            "imm",
            "index",
            "is_recv",
            "lane",
            "ordinal",
            "placed",
            "status",
            "vendor_err",
            "wr_id",
        ),
    )

    def __init__(
        self,
        wr_id: int,
        *,
        status: int = SUCCESS,
        is_recv: bool = False,
        byte_len: int = 0,
        imm: int | None = None,
        placed: tuple[bytes, memoryview] | None = None,
        ordinal: int = 0,
    ) -> None:
        self.wr_id = wr_id
        self.status = status
        self.byte_len = byte_len
        self.has_imm = imm is not None
        self.imm = imm or 0
        self.is_recv = is_recv
        self.vendor_err = 0
        self.lane = 0
        self.index = 0
        self.handled = False
        self.placed = placed
        """The frame's header, and where its payload is, if it was not put into the ring."""
        self.ordinal = ordinal
        """Its number among those of its direction, if that is told."""


class Mailbox(Generic[T]):
    """What one thread posts and the service takes. Putting something in is one `deque.append`, and counted, so that a thread that
    Ctrl-C has interrupted can tell whether it had."""

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._items = deque(items)
        self._mutex = threading.Lock()
        self._taken = 0
        self.put = self._items.append

    put: Callable[[T], None]

    def __bool__(self) -> bool:
        return bool(self._items)

    @property
    def total(self) -> int:
        """How many were ever put in."""
        with self._mutex:
            return self._taken + len(self._items)

    @property
    def taken(self) -> int:
        return self._taken

    def first(self) -> T:
        return self._items[0]

    def peek(self, index: int) -> T:
        return self._items[index]

    def take(self) -> T:
        with self._mutex:
            self._taken += 1
            return self._items.popleft()


class Posted(NamedTuple):
    """Something to be done by the service."""

    wr_id: int
    signaled: bool
    parts: tuple[Any, ...]
    """What to send; nothing for a mere completion."""


class Region(Owner):
    """Memory that endpoints of its domain may read from, and, with `remote_write`, their peers write to."""

    def __init__(
        self, pd: ProtectionDomain, address: int, nbytes: int, keepalive: object, *, remote_write: bool
    ) -> None:
        super().__init__(pd)
        self.address = address
        self.nbytes = nbytes
        memory: Any = (ctypes.c_char * nbytes).from_address(address)
        memory.keepalive = keepalive  # whoever has a view has the memory
        self.view = memoryview(memory).cast("B")
        self.lkey = pd.new_key()
        self.rkey = self.lkey if remote_write else 0
        pd.regions[self.lkey] = self
        self._opened()

    def __repr__(self) -> str:
        return f"<Region {self.nbytes} bytes at {self.address:#x}>"

    def part(self, address: int, nbytes: int) -> memoryview:
        """A view of some of it. Raises ValueError if that is not within."""
        start = address - self.address
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise ValueError(f"{nbytes} bytes at {address:#x} are not within {self!r}")
        return self.view[start : start + nbytes]

    def _destroy(self) -> None:
        assert isinstance(self._parent, ProtectionDomain)
        self._parent.regions.pop(self.lkey, None)


class Domain(Protocol):
    """Where endpoints are made."""

    name: str
    lost: bool


class ProtectionDomain(Owner):
    """Memory and endpoints that may work together: no peer's keys work on another domain's memory."""

    def __init__(self, domain: Any) -> None:
        super().__init__(domain)
        self.domain = domain
        self.regions: dict[int, Region] = {}
        self._opened()

    def __repr__(self) -> str:
        return f"<ProtectionDomain of {self.domain.name}>"

    def new_key(self) -> int:
        """A number that nobody can guess from others."""
        while True:
            key = secrets.randbits(32)
            if key and key not in self.regions:
                return key

    def register(self, buffer: Buffer, *, remote_write: bool) -> Region:
        return self.register_memory(buffer.address, buffer.nbytes, buffer, remote_write=remote_write)

    def register_memory(self, address: int, nbytes: int, keepalive: object, *, remote_write: bool) -> Region:
        return Region(self, address, nbytes, keepalive, remote_write=remote_write)

    def local(self, lkey: int, address: int, nbytes: int) -> memoryview:
        """Memory of ours, to be read. Raises VerbsError as a device would."""
        region = self.regions.get(lkey)
        if region is None:
            raise VerbsError("memory was to be sent that is not registered.", verb="post_send", errno=22)
        return region.part(address, nbytes)

    def joined(self, first: bytes | memoryview, more: Sequence[tuple[int, int, int]]) -> bytes:
        """A copy of several pieces of memory of ours, one after the other. Raises VerbsError."""
        return b"".join([first, *(self.local(lkey, address, nbytes) for address, nbytes, lkey in more)])

    def remote(self, rkey: int, address: int, nbytes: int) -> memoryview | None:
        """Memory that the peer wants to write to; None if it may not."""
        region = self.regions.get(rkey)
        if region is None or region.rkey != rkey:
            return None
        try:
            return region.part(address, nbytes)
        except ValueError:
            return None

    def _destroy(self) -> None:
        self.regions.clear()


class Endpoint(Owner):
    """One end of a connection of one lane. A fabric's own says how to pack, and serves it from its thread."""

    lanes = 1
    in_ring = False
    lends = False
    gathers = False

    def __init__(self, pd: ProtectionDomain, *, recv_depth: int) -> None:
        super().__init__(pd)
        self.pd = pd
        self.outbox: Mailbox[Posted] = Mailbox()
        self.receives: Mailbox[int] = Mailbox(range(recv_depth))
        self.done: deque[Completion] = deque()
        """Completions not taken yet. The service appends, the Poller takes."""
        self.wake: Callable[[], None] = _nobody
        """Tells the Poller."""
        self.error = ""
        """Why it broke."""
        self._messages: dict[int, bytes] = {}
        self._corked = False
        self._posted_before = 0
        self._reposted_before = 0

    # --- posting -------------------------------------------------------------------------------------------------------

    def wr_count(self, nbytes: int) -> int:
        return 1

    def post(self, posted: Posted) -> None:
        """Give the service something to do."""
        self._check_open()
        if self.error:
            raise VerbsError(f"{self.error}.", verb="post_send", errno=107)
        self.outbox.put(posted)
        if not self._corked:
            self.attend()

    def attend(self) -> None:
        """Have the service look after this endpoint."""
        raise NotImplementedError

    def clear_posted(self) -> None:
        self._posted_before = self.outbox.total

    @property
    def last_posted(self) -> int:
        """How much was posted since `clear_posted`, whatever interrupted it."""
        return self.outbox.total - self._posted_before

    def write_empty(self, wr_id: int, lane: int = 0) -> None:
        self.post(Posted(wr_id, True, ()))

    # --- receives ------------------------------------------------------------------------------------------------------

    def repost_recv(self, wr_ids: Iterable[int], lane: int = 0) -> None:
        for wr_id in wr_ids:
            self.receives.put(wr_id)
        self.attend()

    def clear_reposted(self) -> None:
        self._reposted_before = self.receives.total

    @property
    def last_reposted(self) -> int:
        return self.receives.total - self._reposted_before

    def recv_payload(self, wr_id: int, nbytes: int) -> bytes:
        return self._messages[wr_id]

    def cork(self) -> None:
        """Don't call the service for each."""
        self._corked = True

    def uncork(self) -> None:
        self._corked = False
        self.attend()

    def start(self) -> None:
        """Both sides are connected."""

    def gather(self) -> None:
        """Called before `done` is looked at: append to it what nobody else does."""

    # --- for the service -----------------------------------------------------------------------------------------------

    def complete(self, completion: Completion) -> None:
        """Something is over."""
        empty = not self.done
        self.done.append(completion)
        if empty:
            self.wake()

    def arrived(self, nbytes: int, imm: int, placed: tuple[bytes, memoryview] | None = None) -> None:
        """The peer has written, and tells so. There is a receive for it."""
        self.complete(Completion(self.receives.take(), is_recv=True, byte_len=nbytes, imm=imm, placed=placed))

    def message(self, data: bytes) -> None:
        """The peer has sent a message. There is a receive for it."""
        wr_id = self.receives.take()
        self._messages[wr_id] = data
        self.complete(Completion(wr_id, is_recv=True, byte_len=len(data)))

    def broke(self, why: str) -> None:
        """The connection is of no use any more; the first reason counts."""
        if not self.error:
            self.error = why
            self.complete(Completion(0, status=BROKEN, is_recv=True))

    def explain(self, status: int, vendor_err: int) -> str:
        """A failed completion in words."""
        return self.error


def _nobody() -> None:
    pass
