"""The life of verbs resources: children hold their parents, close in order, and die with the process that made them.

- `close()` closes what was made from this and is still open, latest first, then this. Doing it twice is harmless.
- A parent holds its open children: nothing is destroyed behind anybody's back. `__del__` only warns.
- After fork() the child has the same file descriptors: whatever it destroyed would be destroyed for the parent process.
  So in the child every owner is abandoned: it can't be used (ForkedError), and nothing is ever destroyed, not even when
  the interpreter shuts down and collects pyverbs' objects.
"""

from __future__ import annotations

import ctypes
import errno
import os
import warnings
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from rdmaxfer.errors import ClosedError, ForkedError, RdmaxferError, VerbsError

if TYPE_CHECKING:
    from typing_extensions import Self


class Owner:
    """Base of what has to be closed."""

    _roots: ClassVar[weakref.WeakSet[Owner]] = weakref.WeakSet()
    """Owners without a parent."""

    _state: str = "closed"  # until the constructor has got through; then "open", then "closed" or "abandoned"

    def __init__(self, parent: Owner | None = None) -> None:
        if parent is not None:
            parent._check_open()
        self._parent = parent
        self._children: dict[Owner, None] = {}

    def _opened(self) -> None:
        """To be called last in a constructor."""
        self._state = "open"
        if self._parent is None:
            Owner._roots.add(self)
        else:
            self._parent._children[self] = None

    @property
    def closed(self) -> bool:
        return self._state != "open"

    def _check_open(self) -> None:
        if self._state == "open":
            return
        if self._state == "abandoned":
            raise ForkedError(
                f"{self!r} belongs to the process that this one was forked from.",
                fix="make Sender and Receiver in the process that uses them.",
            )
        raise ClosedError(f"{self!r} is closed.")

    def close(self) -> None:
        """Close this, and before it whatever was made from it. Raises VerbsError, and then may be called again."""
        if self._state != "open":
            return
        failed: RdmaxferError | None = None
        for child in reversed(list(self._children)):
            try:
                child.close()
            except RdmaxferError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        try:
            self._destroy()
        except VerbsError as error:
            if error.errno != errno.EIO:
                raise
            # The device was removed (uverbs says EIO to everything from then on), and the kernel has freed what was on it. Only
            # pyverbs' objects don't know, and would try again.
            self._keep_for_ever()
        self._state = "closed"
        Owner._roots.discard(self)
        if self._parent is not None:
            self._parent._children.pop(self, None)

    def _destroy(self) -> None:
        raise NotImplementedError

    def _pyverbs_objects(self) -> tuple[Any, ...]:
        """Objects whose finalizers destroy something in the kernel."""
        return ()

    def _keep_for_ever(self) -> None:
        for thing in self._pyverbs_objects():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))  # its finalizer will never run

    def _abandon(self) -> None:
        for child in list(self._children):
            child._abandon()
        self._keep_for_ever()
        if self._state == "open":
            self._state = "abandoned"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._state == "open":
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)


def _abandon_all() -> None:
    for owner in list(Owner._roots):
        owner._abandon()


os.register_at_fork(after_in_child=_abandon_all)
