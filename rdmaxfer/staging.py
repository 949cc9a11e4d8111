"""Memory that a sender's work requests read from: its own staging slots, and arrays that the user registered.

Each is registered once for each protection domain (that is, for each device) it is used on. Whoever uses it has its `Holder`, or
something that refers to it: who fills it, the frame that lies in it, work requests whose completions were not polled. When the last
of them lets go, in whatever way, the memory may be reused or unregistered. Tracebacks of errors refer to it, too, but don't use it:
so a pool that finds nothing free is told which memory is really in use.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rdmaxfer.errors import FrameError
from rdmaxfer.memory import Buffer

if TYPE_CHECKING:
    from typing_extensions import Self

    from rdmaxfer.fabric.base import ProtectionDomain, Region


PAGE = 4096
ARENA_SLOTS = 8
ARENA_UP_TO = 16 << 20
"""Larger slots have shared memory of their own: the kernel might not promise eight times as much."""


class Holder:
    """Stands for the use of a piece of memory."""

    __slots__ = ("__weakref__", "keeps", "sent")

    def __init__(self) -> None:
        self.sent = False
        """Whether there is a frame that has it."""
        self.keeps: object = None
        """What has to stay as long."""


class Use(weakref.ref[Holder]):
    """Tells when a Holder is gone; knows of which staging slot it was."""

    __slots__ = ("slot",)

    slot: StagingSlot


class Source:
    """Registered memory."""

    __slots__ = ("_regions", "address", "keepalive", "lent", "nbytes")

    def __init__(self, address: int, nbytes: int, keepalive: object) -> None:
        self.address = address
        self.nbytes = nbytes
        self.keepalive = keepalive
        self.lent = False
        """Whether a peer may go on to read it: it is never to be used again."""
        self._regions: dict[ProtectionDomain, Region] = {}

    def lkey(self, pd: ProtectionDomain) -> int:
        """The local key of this memory in `pd`; registers it there at the first call. Raises MemlockError, VerbsError."""
        region = self._regions.get(pd)
        if region is None:
            region = self._regions[pd] = pd.register_memory(
                self.address, self.nbytes, self.keepalive, remote_write=False
            )
        return region.lkey

    def unregister(self) -> None:
        """End every registration. Only when nobody holds the memory."""
        regions, self._regions = self._regions, {}
        for region in regions.values():
            region.close()


class StagingSlot(Source):
    """One staging slot: `nbytes` of a buffer. It is free when its holder is gone."""

    __slots__ = ("_use", "buffer", "offset")

    def __init__(self, buffer: Buffer, offset: int, nbytes: int) -> None:
        super().__init__(buffer.address + offset, nbytes, buffer)
        self.buffer = buffer
        self.offset = offset
        self._use: Use | None = None

    def array(self, shape: Sequence[int], dtype: npt.DTypeLike, offset: int = 0) -> np.ndarray[Any, Any]:
        """A writable array, at its beginning or `offset` bytes behind."""
        return self.buffer.array(self.offset + offset, shape, dtype, writable=True)

    def unregister(self) -> None:
        super().unregister()
        self._use = None  # which refers to this slot: its memory would wait for the garbage collector

    @property
    def free(self) -> bool:
        return self._use is None or self._use() is None

    def hold(self, holder: Holder, gone: Callable[[weakref.ref[Holder]], object]) -> None:
        """`gone` is called when the holder is; it has to be of C, as Ctrl-C in it would be lost."""
        use = Use(holder, gone)
        use.slot = self
        self._use = use

    def reclaim(self, used: set[Source]) -> None:
        holder = self._use() if self._use is not None else None
        if holder is not None and holder.sent and self not in used:
            self._use = None

    def let_go(self, holder: Holder) -> None:
        """Its holder is done with it, unless it is a frame's by now. The holder itself can be kept by the traceback of an error."""
        if not holder.sent and self._use is not None and self._use() is holder:
            self._use = None


class StagingPool:
    """At most `limit` staging slots, made when first needed and grown when a larger frame comes. Latest freed, first reused: it
    is still in the cache."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """May be changed at any time; slots that are there already stay."""
        self.shared = False
        """Whether slots have to be such that other processes can map them."""
        self._arena: tuple[Buffer | None, int] = (None, 0)
        """The latest shared memory, and how much of it is in slots. Nothing of it is there before it is used."""
        self._all: list[StagingSlot] = []
        self._gone: list[weakref.ref[Holder]] = []
        """Uses that have ended. Their slots may be in use again, and not all slots that are free are here."""

    def __repr__(self) -> str:
        return f"<StagingPool {sum(not slot.free for slot in self._all)} of {self.limit} in use>"

    def take(self, nbytes: int, holder: Holder) -> StagingSlot | None:
        """A slot of at least `nbytes`, held by `holder`; None while all are in use."""
        slot = self._pop()
        if slot is None and len(self._all) >= self.limit:
            self.forget_lent()
            slot = next((slot for slot in self._all if slot.free), None)  # Ctrl-C behind a _pop lost it
            if slot is None and len(self._all) >= self.limit:
                return None
        if slot is None or slot.nbytes < nbytes or (self.shared and slot.buffer.fd is None):
            # Registering takes longer than copying: leave room, so that frames which grow little by little don't need it each time.
            grown = slot is not None and slot.nbytes < nbytes
            fresh = self._new_slot(_rounded(nbytes * 5 // 4 if grown else nbytes))
            if slot is None:
                self._all.append(fresh)
            else:
                slot.unregister()
                self._all[self._all.index(slot)] = fresh
            slot = fresh
        slot.hold(holder, self._gone.append)
        return slot

    def _new_slot(self, nbytes: int) -> StagingSlot:
        if not self.shared:
            return StagingSlot(Buffer(nbytes), 0, nbytes)
        # Each piece of shared memory takes two file descriptors here and in every process that maps it: so several slots have one.
        arena, used = self._arena
        if arena is None or arena.nbytes - used < nbytes:
            arena, used = Buffer(ARENA_SLOTS * nbytes if nbytes <= ARENA_UP_TO else nbytes, shared=True), 0
        self._arena = (arena, used + nbytes)
        return StagingSlot(arena, used, nbytes)

    def reclaim(self, used: set[Source]) -> None:
        """Free what frames had that are not in `used` any more."""
        for slot in self._all:
            slot.reclaim(used)

    def _pop(self) -> StagingSlot | None:
        while self._gone:
            use = self._gone.pop()
            if isinstance(use, Use) and use.slot.free and use.slot in self._all:
                if not use.slot.lent:
                    return use.slot
                self.forget(use.slot)
        return None

    def forget_lent(self) -> None:
        """Let go of what may still be read by a peer, and by nobody else."""
        for lent in [slot for slot in self._all if slot.lent and slot.free]:
            self.forget(lent)

    def forget(self, slot: Source) -> None:
        """This slot can't be registered: make another one next time."""
        if slot in self._all:
            self._all.remove(slot)
            slot.unregister()

    def close(self) -> None:
        """Unregister all slots; nothing may read from them any more."""
        self._gone.clear()
        self._arena = (None, 0)
        while self._all:
            self._all.pop().unregister()


def _rounded(nbytes: int) -> int:
    return max(1, -(-nbytes // PAGE)) * PAGE


def bounds(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """The addresses of an array's first byte, and behind its last."""
    module: Any = np.lib.array_utils if hasattr(np.lib, "array_utils") else np  # moved in numpy 2
    low, high = module.byte_bounds(array)
    return low, high


class UserMemory(Source):
    """Memory that the user filled, and that is read where it lies."""

    __slots__ = ("_uses",)

    def __init__(self, address: int, nbytes: int, keepalive: object) -> None:
        super().__init__(address, nbytes, keepalive)
        self._uses: deque[weakref.ref[Holder]] = deque()

    def covers(self, address: int, nbytes: int) -> bool:
        return self.address <= address and address + nbytes <= self.address + self.nbytes

    def hold(self, holder: Holder) -> None:
        """Keep it registered as long as `holder` is there."""
        while self._uses and self._uses[0]() is None:
            self._uses.popleft()
        self._uses.append(weakref.ref(holder))

    def let_go(self, holder: Holder) -> None:
        """As that of a StagingSlot."""
        if not holder.sent:
            self._uses = deque(use for use in self._uses if use() is not holder)

    @property
    def awaited(self) -> bool:
        """Whether a push of it has not come to its frame."""
        return any(not holder.sent for use in self._uses if (holder := use()) is not None)


class Registration(UserMemory):
    """An array's memory, registered by `Sender.register`: pushes of any C-contiguous view of it copy nothing.

    After a push the memory must stay as it is until `flush()` returns. `close()` ends the registration; the array itself is
    the caller's and stays.
    """

    __slots__ = ("_close",)

    def __init__(self, array: np.ndarray[Any, Any], close: Callable[[Registration], None]) -> None:
        low, high = bounds(array)
        if high <= low or array.size == 0:
            raise FrameError(
                "an array without any bytes can't be registered.", fix="register an array that is not empty."
            )
        super().__init__(low, high - low, array)
        self._close = close

    def __repr__(self) -> str:
        return f"<Registration {self.nbytes} bytes at {self.address:#x}>"

    def close(self) -> None:
        """Wait until no push reads from the memory, then unregister it. Doing it twice is harmless."""
        self._close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
