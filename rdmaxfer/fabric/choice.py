"""Which fabric is wanted: the argument, or the environment."""

from __future__ import annotations

import os
from typing import Literal, TypeAlias, get_args

Fabric: TypeAlias = Literal["auto", "verbs", "shm", "tcp"]

NAMES = {"verbs": "verbs", "shm": "shared memory", "tcp": "TCP"}

VARIABLE = "RDMAXFER_FABRIC"
DEVICE_VARIABLE = "RDMAXFER_DEVICE"


def wanted(fabric: Fabric | None, *, names_device: bool) -> Fabric:
    """What `fabric=` says, or RDMAXFER_FABRIC, or "auto". Who names a device wants verbs: by an argument, or by RDMAXFER_DEVICE
    where nothing is said of the fabric. Raises ValueError."""
    said = fabric
    where = f"fabric={fabric!r}"
    if said is None and names_device:
        return "verbs"
    if said is None:
        text = os.environ.get(VARIABLE) or ("verbs" if os.environ.get(DEVICE_VARIABLE) else "auto")
        where = f"{VARIABLE}={text}"
        said = text  # type: ignore[assignment]  # looked at next
    for known in get_args(Fabric):
        if said == known:
            if names_device and known in ("tcp", "shm"):
                raise ValueError(f"{where} does not go with a device, port or GID index: these are of RDMA devices")
            return "verbs" if names_device else known
    raise ValueError(f"{where} is none of {', '.join(map(repr, get_args(Fabric)))}")
