"""What coroutines wait by.

A coroutine first tries, on its event loop, without waiting. If there is nothing yet, it leaves a note of what it waits for (a
`Want`) and suspends; a thread of the node polls for all that have, and tells their event loops. That thread takes nothing that
would be lost with a coroutine that is cancelled meanwhile: what it does take, it gives back then. Where nobody waits, it sleeps.

A thread, because what there is to sleep on differs by fabric, and changes with the connections. It costs one switch to it and one
back for each wait, and nothing where there is something already.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rdmaxfer.errors import PeerLost, RdmaxferError, TimeoutExpired
from rdmaxfer.waiting import Deadline

if TYPE_CHECKING:
    from rdmaxfer.node import Node

FAIR_S = 0.001
"""A coroutine that never has to wait lets others run this often."""

T = TypeVar("T")


class Want(Generic[T]):
    """What a coroutine waits for."""

    __slots__ = ("error", "future", "loop", "ready", "value")

    def __init__(self, ready: Callable[[], T | None]) -> None:
        self.ready = ready
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.value: T | None = None
        self.error: RdmaxferError | None = None

    def tell(self) -> None:
        """It is there. From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed, and with it whoever waited
            self.loop.call_soon_threadsafe(_resolve, self.future)


class Alarm:
    """Wakes the coroutines that wait for something of `node`."""

    def __init__(self, node: Node[Any, Any]) -> None:
        self._node = node
        self._lock = node._lock
        self._wants: list[Want[Any]] = []
        self._thread: threading.Thread | None = None
        self._yielded_s = 0.0

    def __repr__(self) -> str:
        return f"<Alarm of {len(self._wants)} coroutines>"

    async def checkpoint(self) -> None:
        """Let others run, if it is time to."""
        if time.monotonic() - self._yielded_s >= FAIR_S:
            await asyncio.sleep(0)
            self._yielded_s = time.monotonic()

    async def until(
        self,
        ready: Callable[[], T | None],
        deadline: Deadline,
        what: str,
        undo: Callable[[T], object] | None = None,
    ) -> T:
        """Wait until `ready()` gives something; it is called with the node's lock held, on another thread. `undo` gives back what
        it gave, if it is not wanted any more. Raises TimeoutExpired, and what `ready` and the node's own check raise."""
        want = Want(ready)
        with self._lock:
            self._node._check_usable()
            self._wants.append(want)
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="rdmaxfer-asyncio", daemon=True)
                self._thread.start()
            else:
                self._node._waiter.wake()
        left_s = deadline.left_s()
        timer = None if math.isinf(left_s) else want.loop.call_later(max(0.0, left_s), _resolve, want.future)
        try:
            await want.future
        except BaseException:
            with self._lock:
                self._forget(want)
                if isinstance(want.error, PeerLost):  # each is told once: the next one who asks is told
                    self._node._losses.appendleft(want.error)
                elif want.value is not None and undo is not None:
                    undo(want.value)
            raise
        finally:
            self._yielded_s = time.monotonic()
            if timer is not None:
                timer.cancel()
        with self._lock:
            self._forget(want)
        if want.error is not None:
            raise want.error
        if want.value is None:
            raise TimeoutExpired(f"{what} took longer than the timeout.")
        return want.value

    async def look_and_wait(self, ready: Callable[[], T | None], deadline: Deadline, what: str) -> T:
        """As `until`, of what may be there already."""
        await self.checkpoint()
        with self._lock:
            self._node._check_usable()
            self._node._waiter.poll()
            value = ready()
        return value if value is not None else await self.until(ready, deadline, what)

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the thread, once the node is closing."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _forget(self, want: Want[Any]) -> None:
        if want in self._wants:
            self._wants.remove(want)

    def _main(self) -> None:
        waiter = self._node._waiter
        try:
            with self._lock:
                while True:
                    waiter.rest(self._wanted, math.inf)
                    waiter.wait_locked(self._look, Deadline(None), "for coroutines")
        except RdmaxferError as error:  # the node is closed, or can't go on
            self._end(error)
        except BaseException as error:
            self._node.control_failed(error)
            self._end(RdmaxferError("the thread that coroutines wait by failed; this object can't go on."))

    def _wanted(self) -> bool:
        self._node._check_usable()
        return bool(self._wants)

    def _look(self) -> bool | None:
        for want in list(self._wants):
            try:
                want.value = want.ready()
            except RdmaxferError as error:
                want.error = error
            if want.value is not None or want.error is not None:
                self._wants.remove(want)
                want.tell()
        return None if self._wants else True

    def _end(self, error: RdmaxferError) -> None:
        with self._lock:
            wants, self._wants = self._wants, []
            for want in wants:
                want.error = type(error)(*error.args)
                want.tell()


async def in_thread(work: Callable[..., T], *arguments: Any, stop: Callable[[], object] | None = None) -> T:
    """Run `work` beside the event loop, to its end also when this is cancelled: what it makes or frees is not left half done.
    `stop` is called then, to hurry it."""
    future = asyncio.get_running_loop().run_in_executor(None, functools.partial(work, *arguments))
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
            if stop is not None:
                stop()
    if cancelled is None:
        return future.result()
    future.exception()
    try:
        raise cancelled
    finally:
        cancelled = None  # no cycle of an error and its traceback


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


__all__ = ["Alarm", "in_thread"]
