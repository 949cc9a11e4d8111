"""How often a test repeats what it does: as often as fits in the usual run, or as long as it takes to be sure.

`scripts/test.sh --soak` sets RDMAXFER_SOAK=1. It runs the tests marked `counted`, whose counts come from `rounds`, and those
marked `soak`, which have no short version and are deselected otherwise.
"""

from __future__ import annotations

import os

SOAK = os.environ.get("RDMAXFER_SOAK", "") not in ("", "0")


def rounds(*, ci: int, soak: int) -> int:
    """The count of the usual run, or that of the long one."""
    return soak if SOAK else ci
