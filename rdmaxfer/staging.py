"""Memory that a sender's work requests read from: its own staging slots, and arrays that the user registered.

Each is registered once for each protection domain (that is, for each device) it is used on, and counts the work requests that
still read from it: it is neither reused nor unregistered before their completions were polled.
"""

from __future__ import annotations

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

    def finished(self) -> None:
        """One work request less reads from it."""
        self.in_flight -= 1


class StagingSlot(Source):
    """One staging slot; goes back to its pool when nothing reads from it any more."""

    __slots__ = ("_back", "buffer", "leased")

    def __init__(self, nbytes: int, back: Callable[[StagingSlot], None]) -> None:
        buffer = Buffer(nbytes)
        super().__init__(buffer.address, buffer.nbytes, buffer)
        self.buffer = buffer
        self.leased = False
        """Whether a `Slot` or a running `push` holds it."""
        self._back = back

    def finished(self) -> None:
        self.in_flight -= 1
        if not self.in_flight and not self.leased:
            self._back(self)

    def unlease(self) -> None:
        self.leased = False
        if not self.in_flight:
            self._back(self)


class StagingPool:
    """At most `slots` staging slots, made when first needed and grown when a larger frame comes. Latest freed, first reused: it
    is still in the cache."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._made = 0
        self._free: list[StagingSlot] = []

    def __repr__(self) -> str:
        return f"<StagingPool {self._made - len(self._free)} of {self.slots} in use>"

    @property
    def idle(self) -> bool:
        return len(self._free) == self._made

    def take(self, nbytes: int) -> StagingSlot | None:
        """A slot of at least `nbytes`, or None while all are in use."""
        if self._free:
            slot = self._free.pop()
            if slot.nbytes < nbytes:
                slot.unregister()
                slot = StagingSlot(nbytes, self._free.append)
        elif self._made < self.slots:
            slot = StagingSlot(nbytes, self._free.append)
            self._made += 1
        else:
            return None
        slot.leased = True
        return slot

    def close(self) -> None:
        """Unregister the free slots; those in use must have been finished before."""
        while self._free:
            self._free.pop().unregister()


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
