"""Memory that a sender's work requests read from: its own staging slots, and arrays that the user registered.

Each is registered once for each protection domain (that is, for each device) it is used on, and counts the work requests that
still read from it: it is neither reused nor unregistered before their completions were polled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from rdmaxfer.errors import FrameError
from rdmaxfer.memory import Buffer

if TYPE_CHECKING:
    from typing_extensions import Self

    from rdmaxfer.fabric.verbs import ProtectionDomain, Region


class Source:
    """Registered memory with a count of the work requests that read from it."""

    __slots__ = ("_regions", "address", "in_flight", "keepalive", "nbytes")

    def __init__(self, address: int, nbytes: int, keepalive: object) -> None:
        self.address = address
        self.nbytes = nbytes
        self.keepalive = keepalive
        self.in_flight = 0
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
        """End every registration. Only when `in_flight` is 0."""
        regions, self._regions = self._regions, {}
        for region in regions.values():
            region.close()

    def idle(self) -> None:
        """`in_flight` has become 0."""


class StagingSlot(Source):
    """One staging slot. It is free when nobody holds it and no work request reads from it."""

    __slots__ = ("_owner", "_pool", "buffer")

    def __init__(self, nbytes: int, pool: StagingPool) -> None:
        buffer = Buffer(nbytes)
        super().__init__(buffer.address, buffer.nbytes, buffer)
        self.buffer = buffer
        self._pool = pool
        self._owner: weakref.ref[Holder] | None = None

    @property
    def free(self) -> bool:
        return not self.in_flight and (self._owner is None or self._owner() is None)

    def hold(self, holder: Holder) -> None:
        self._owner = holder.reference

    def let_go(self) -> None:
        """Its holder is done with it; harmless to repeat."""
        self._owner = None
        self.idle()

    def idle(self) -> None:
        if self.free:
            self._pool.freed(self)


class Holder:
    """Stands for who holds a staging slot: when it is collected, its slot is free, however its holder came to an end."""

    __slots__ = ("__weakref__", "reference")

    def __init__(self) -> None:
        self.reference = weakref.ref(self)


class StagingPool:
    """At most `slots` staging slots, made when first needed and grown when a larger frame comes. Latest freed, first reused: it
    is still in the cache."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._all: list[StagingSlot] = []
        self._freed: list[StagingSlot] = []
        """Slots that were freed; some of them may be in use again, and not all that are free are here."""

    def __repr__(self) -> str:
        return f"<StagingPool {sum(not slot.free for slot in self._all)} of {self.slots} in use>"

    def freed(self, slot: StagingSlot) -> None:
        self._freed.append(slot)

    def take(self, nbytes: int, holder: Holder) -> StagingSlot | None:
        """A slot of at least `nbytes`, or None while all are in use."""
        slot = self._pop()
        if slot is None and len(self._all) >= self.slots:
            self._freed = [slot for slot in self._all if slot.free]  # those whose holders forgot them
            slot = self._pop()
            if slot is None:
                return None
        if slot is None or slot.nbytes < nbytes:
            fresh = StagingSlot(nbytes, self)
            if slot is None:
                self._all.append(fresh)
            else:
                slot.unregister()
                self._all[self._all.index(slot)] = fresh
            slot = fresh
        slot.hold(holder)
        return slot

    def _pop(self) -> StagingSlot | None:
        while self._freed:
            slot = self._freed.pop()
            if slot.free and slot in self._all:
                return slot
        return None

    def forget(self, slot: Source) -> None:
        """This slot can't be registered: make another one next time."""
        if slot in self._all:
            self._all.remove(slot)
            slot.unregister()

    def close(self) -> None:
        """Unregister all slots; nothing may read from them any more."""
        self._freed.clear()
        while self._all:
            self._all.pop().unregister()


class Registration(Source):
    """An array's memory, registered by `Sender.register`: pushes of any C-contiguous view of it copy nothing.

    After a push the memory must stay as it is until `flush()` returns. `close()` ends the registration; the array itself is
    the caller's and stays.
    """

    __slots__ = ("_close",)

    def __init__(self, array: np.ndarray[Any, Any], close: Callable[[Registration], None]) -> None:
        bounds: Any = np.lib.array_utils if hasattr(np.lib, "array_utils") else np  # moved in numpy 2
        low, high = bounds.byte_bounds(array)
        if high <= low or array.size == 0:
            raise FrameError(
                "an array without any bytes can't be registered.", fix="register an array that is not empty."
            )
        super().__init__(low, high - low, array)
        self._close = close

    def __repr__(self) -> str:
        return f"<Registration {self.nbytes} bytes at {self.address:#x}>"

    def covers(self, address: int, nbytes: int) -> bool:
        return self.address <= address and address + nbytes <= self.address + self.nbytes

    def close(self) -> None:
        """Wait until no push reads from the memory, then unregister it. Doing it twice is harmless."""
        self._close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
