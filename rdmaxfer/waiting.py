"""Polling the links of one node, and waiting for what comes of it.

Waiting goes by leader and follower. The one thread that polls (the leader) sleeps in the native core without the lock; nobody
else polls meanwhile, so that completions are handled in their order. The others wait on the condition and look again when the
leader has been woken. Every wait is cut in slices, so that Ctrl-C gets through.

Ctrl-C may come at any call, and everything must still hold after it: see the comments.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from rdmaxfer.errors import TimeoutExpired
from rdmaxfer.link import Link
from rdmaxfer.spinning import Spin

if TYPE_CHECKING:
    from rdmaxfer.fabric.poller import Poller

SLICE_S = 0.1
"""Longest uninterrupted sleep of the main thread: Ctrl-C is noticed within this time even if the signal went to another thread."""

LONG_SLICE_S = 1.0
"""... and of other threads, which Python never interrupts: waking up is what waiting costs."""

PATIENCE_S = 0.05
"""How long the control thread waits for the lock, for work that can wait."""

SETTLE_S = 1.0
"""How long a thread that polls may take to do so."""

L = TypeVar("L", bound=Link)
T = TypeVar("T")


class Deadline:
    """When a call's `timeout` (seconds, None: never) is over. The clock is first read when there is something to wait for."""

    __slots__ = ("_end_s", "_timeout_s")

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"a timeout is a number of seconds of at least 0, or None for no limit, not {timeout!r}")
        self._timeout_s = timeout
        self._end_s: float | None = None

    def left_s(self) -> float:
        """Seconds left; infinite without a timeout."""
        if self._timeout_s is None:
            return math.inf
        now_s = time.monotonic()
        if self._end_s is None:
            self._end_s = now_s + self._timeout_s
        return self._end_s - now_s

    def within(self, timeout_s: float) -> Deadline:
        """A deadline in `timeout_s` seconds, or this one if it is earlier."""
        return Deadline(max(0.0, min(timeout_s, self.left_s())))


def _slice_s() -> float:
    return SLICE_S if threading.current_thread() is threading.main_thread() else LONG_SLICE_S


class Waiter(Generic[L]):
    """`spin_s`: as that of Spin. `lock` guards everything of the node. All methods but `wait` are called with it held, once (it is
    given up to sleep).

    `check` is called first by every wait, and raises if there is no use in waiting. `ended` is called when a link has ended or
    failed, to take it out of `links`.
    """

    def __init__(self, spin_s: float | None, *, check: Callable[[], None], ended: Callable[[], None]) -> None:
        # Taken by `with lock`, in C. Not by `with condition`, which is Python: Ctrl-C in between would leave it locked.
        self.lock = threading.RLock()
        self.links: list[L] = []
        self._spin = Spin(spin_s)
        self._check = check
        self._ended = ended
        self._condition = threading.Condition(self.lock)
        self._followers = 0
        self._leader = False
        self._poller: Poller | None = None
        self._polled: tuple[L, ...] = ()
        """The links that the latest poll looked at; completions refer to them by index."""
        self._watched: tuple[L, ...] = ()
        """The same in the order of `links`."""
        self._polls = 0
        self._turn = 0
        """The poll that `_handled` is about."""
        self._handled = 0
        """How many of its completions were handled."""

    def begin(self) -> None:
        """Get ready to poll. Raises VerbsUnavailable."""
        from rdmaxfer.fabric.poller import Poller

        if self._poller is None:
            self._poller = Poller()

    def close(self) -> None:
        """When nobody waits any more."""
        if self._poller is not None:
            self._poller.close()

    def wake(self) -> None:
        """Something changed: every waiting thread looks again."""
        if self._leader and self._poller is not None:
            self._poller.wake()
        if self._followers:
            self._condition.notify_all()

    def nudge(self) -> None:
        """Have the thread that polls, if there is one, look again. Without the lock, at any time."""
        if self._leader and self._poller is not None:
            self._poller.wake()

    def wait(self, ready: Callable[[], T | None], deadline: Deadline, what: str) -> T:
        """Take the lock, then `wait_locked`."""
        with self.lock:
            return self.wait_locked(ready, deadline, what)

    def wait_locked(self, ready: Callable[[], T | None], deadline: Deadline, what: str) -> T:
        """Poll and wait until `ready()` gives something. Raises TimeoutExpired, and what `check` and `ready` raise."""
        while True:
            self._check()
            self.poll()
            value = ready()
            if value is not None:
                return value
            sleep_s = min(_slice_s(), deadline.left_s())
            if sleep_s <= 0:
                raise TimeoutExpired(f"{what} took longer than the timeout.")
            if self._leader or not self.links or self._poller is None:
                self._follow(sleep_s)
            else:
                self._lead(self._poller, sleep_s)
                if self._poller.count and self._poller.looking_costs:
                    self._dispatch(self._poller)
                    self._look_for_ends()
                    value = ready()
                    if value is not None:
                        return value

    def rest(self, until: Callable[[], bool], timeout_s: float) -> None:
        """Sleep until `until()`, without polling, and without `check`; or until the time is up."""
        deadline = Deadline(timeout_s)
        while not until() and (left_s := deadline.left_s()) > 0:
            self._follow(min(_slice_s(), left_s))

    @property
    def attended(self) -> bool:
        """Whether some thread is polling: then it will notice by itself what happens."""
        return self._leader

    @property
    def unfinished(self) -> bool:
        """Whether completions were taken that were not handled yet."""
        return self._poller is not None and self._poller.count > 0

    def settle(self) -> None:
        """Handle what has arrived by now, also if it is another thread that polls."""
        polls = self._polls
        if self._leader:
            self.wake()
            self.rest(lambda: not self._leader or self._polls != polls, SETTLE_S)
        self.poll()

    def poll(self) -> None:
        """Poll without sleeping, and handle what there is; nothing while a leader polls."""
        poller = self._poller
        if self._leader or poller is None:
            return
        self._dispatch(poller)
        if self.links:
            self._watch(poller)
            poller.poll()
            self._dispatch(poller)
        self._polls += 1
        self._look_for_ends()

    def _look_for_ends(self) -> None:
        for link in self.links:
            if not link.live:
                self._ended()
                break

    def leave_alone(self, link: L) -> None:
        """Wait until nobody polls `link`, which is no longer one of `links`, and everything of it was handled."""
        while self._leader and link in self._polled:
            self.wake()
            self._follow(SLICE_S)
        if self._poller is not None and not self._leader:
            self._dispatch(self._poller)

    def _watch(self, poller: Poller) -> None:
        links = tuple(self.links)
        if self._watched != links:
            # Those of devices first: the native core counts only them.
            polled = tuple(sorted(links, key=lambda link: link.fabric != "verbs"))
            poller.watch([link.endpoint for link in polled])
            self._polled, self._watched = polled, links

    def _dispatch(self, poller: Poller) -> None:
        """Handle what the latest poll brought and was not handled yet. Without a leader."""
        count = poller.count
        if not count:
            return
        if self._turn != poller.turn:
            self._handled, self._turn = 0, poller.turn
        while self._handled < count:
            wc = poller.completions[self._handled]
            self._polled[wc.index].handle(wc, (self._turn, self._handled))
            self._handled += 1
        for link in self._polled:
            link.after_poll()
        poller.clear()

    def _lead(self, poller: Poller, sleep_s: float) -> None:
        """Sleep in the native core, without the lock, until there are completions; then handle them."""
        self._watch(poller)
        self._leader = True
        try:
            self.lock.release()
            spin_s = self._spin.next_s()
            poller.wait(spin_s, sleep_s)
            self._spin.tell(spin_s, slept=poller.slept)
        finally:
            interrupt = None
            while True:  # not in a function of its own: Ctrl-C could come as it is called
                try:
                    if self.lock._is_owned():  # type: ignore[attr-defined]  # what threading.Condition itself uses
                        break
                    self.lock.acquire()
                except KeyboardInterrupt as error:
                    interrupt = error
            self._leader = False
            if self._followers:
                self._condition.notify_all()
            if interrupt is not None:
                try:
                    raise interrupt
                finally:
                    interrupt = None  # no cycle: its traceback has this frame and its callers', with what they hold

    def _follow(self, sleep_s: float) -> None:
        """Wait until somebody else has seen something change."""
        self._followers += 1
        try:
            self._condition.wait(sleep_s)
        finally:
            self._followers -= 1
            interrupt = None
            while True:
                try:
                    if self.lock._is_owned():  # type: ignore[attr-defined]
                        break
                    self.lock.acquire()
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                try:
                    raise interrupt
                finally:
                    interrupt = None  # no cycle: its traceback has this frame and its callers', with what they hold
