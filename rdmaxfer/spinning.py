"""How long to poll busily before a wait sleeps.

Falling asleep and being woken takes longer than many a frame; spinning takes a core. So waits spin as long as that is rewarded:
where what is waited for comes within `SPIN_S` again and again. Once it did not, waits sleep at once, and only now and then one
tries.
"""

from __future__ import annotations

SPIN_S = 0.0003
PATIENCE = 2
"""Tries in vain, one after the other, after which waits sleep."""
PROBE_FIRST, PROBE_LAST = 8, 1024
"""Waits that sleep before one tries again: at first, and at last, when none of the tries was rewarded."""


class Spin:
    """`spin_s`: always so long; None: as seen above."""

    def __init__(self, spin_s: float | None) -> None:
        self._fixed_s = spin_s
        self._failed = PATIENCE
        self._pause = PROBE_FIRST
        self._left = 0

    def next_s(self) -> float:
        """How long the next wait may spin."""
        if self._fixed_s is not None:
            return self._fixed_s
        if self._failed < PATIENCE:
            return SPIN_S
        if self._left > 0:
            self._left -= 1
            return 0.0
        return SPIN_S

    def tell(self, spin_s: float, *, slept: bool) -> None:
        """A wait that was to spin so long had to sleep, or not."""
        if self._fixed_s is not None or not spin_s:
            return
        if not slept:
            self._failed, self._pause = 0, PROBE_FIRST
            return
        self._failed += 1
        if self._failed >= PATIENCE:
            self._left, self._pause = self._pause, min(2 * self._pause, PROBE_LAST)
