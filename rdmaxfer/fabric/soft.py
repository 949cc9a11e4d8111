"""Fabrics without a device: what those in software share.

The threads that post and poll move the bytes themselves. What has happened is counted by the native code below, so that it may be
repeated after Ctrl-C: what was posted, what has arrived, and which of it was taken.
"""

from __future__ import annotations

import ctypes
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

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
    """A queue that counts. Putting something in is one `deque.append`, so that who was interrupted by Ctrl-C can tell whether it
    had."""

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

    def __len__(self) -> int:
        return len(self._items)

    def peek(self, index: int) -> T:
        return self._items[index]

    def take(self) -> T:
        with self._mutex:
            self._taken += 1
            return self._items.popleft()


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
    """One end of a connection of one lane. A fabric's own says how to post and to take what comes."""

    lanes = 1
    in_ring = False
    lends = False
    gathers = False
    holds: object = None

    def __init__(self, pd: ProtectionDomain, *, recv_depth: int) -> None:
        super().__init__(pd)
        self.pd = pd
        self.receives: Mailbox[int] = Mailbox(range(recv_depth))
        self.done: deque[Completion] = deque()
        """Completions not taken yet. `gather` appends, the Poller takes."""
        self.wake: Callable[[], None] = _nobody
        """Tells the Poller."""
        self.asleep = False
        """Whether the Poller is about to sleep, or does."""
        self.changes = 0
        """Of `files`: the Poller has to look at them again."""
        self.error = ""
        """Why it broke."""
        self._messages: dict[int, bytes] = {}
        self._reposted_before = 0

    def wr_count(self, nbytes: int) -> int:
        return 1

    def clear_reposted(self) -> None:
        self._reposted_before = self.receives.total

    @property
    def last_reposted(self) -> int:
        return self.receives.total - self._reposted_before

    def recv_payload(self, wr_id: int, nbytes: int) -> bytes:
        return self._messages[wr_id]

    def cork(self) -> None:
        pass

    def uncork(self) -> None:
        pass

    def start(self) -> None:
        """Both sides are connected."""

    @property
    def files(self) -> dict[int, object]:
        """What to watch for input, and then to call `look`: by descriptor, what it is that of."""
        raise NotImplementedError

    def look(self) -> None:
        """One of `files` has input."""
        raise NotImplementedError

    def gather(self) -> None:
        """Called before `done` is looked at: append to it what has completed."""
        raise NotImplementedError

    @property
    def waiting(self) -> bool:
        """Whether there are completions that nobody has handled."""
        try:
            return not self.done[-1].handled
        except IndexError:
            return False

    def complete(self, completion: Completion) -> None:
        """Something is over."""
        idle = not self.waiting
        self.done.append(completion)
        if idle:
            self.wake()

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
