"""Tests in device/, faults/ and tensors/ need a verbs device, real or software (scripts/setup_softroce.sh, scripts/softroce_vm.sh).

They run when asked for: `pytest -m rdma`, or RDMAXFER_TEST_DEVICE=1 in the environment. Then a missing device is a
failure. RDMAXFER_DEVICE names the device to use. With RDMAXFER_FABRIC=shm or tcp they need none, and run
over that fabric, but for those that are marked `verbs`. Tests marked `soak` run only with RDMAXFER_SOAK=1 (soak.py).
"""

from __future__ import annotations

import ipaddress
import os
import re
import signal
from pathlib import Path

import pytest
from soak import SOAK

from rdmaxfer.errors import RdmaxferError
from rdmaxfer.fabric.devices import Route, choose_gid, list_devices

# Nothing else may take over without being noticed, also in other processes.
FABRIC = os.environ.setdefault("RDMAXFER_FABRIC", "verbs")
SOAK_TIMEOUT_S = 7200
# What a script runs in the background ignores Ctrl-C, and so would what is tested here, and its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

IN_THE_VM = os.environ.get("RDMAXFER_GUEST") == "vm"
NEED_A_DEVICE = frozenset(Path(__file__).parent / name for name in ("device", "faults", "tensors"))


def _asked_for(config: pytest.Config) -> bool:
    if os.environ.get("RDMAXFER_TEST_DEVICE", "") not in ("", "0"):
        return True
    expression = str(config.option.markexpr or "")
    return bool(re.search(r"\brdma\b", re.sub(r"\bnot\s+rdma\b", "", expression)))


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if NEED_A_DEVICE.intersection(item.path.parents)]
    for item in mine:
        item.add_marker(pytest.mark.rdma if FABRIC == "verbs" else pytest.mark.fabric)
    if SOAK:
        for item in items:  # also before a mark of its own, which is meant for the short count
            item.add_marker(pytest.mark.timeout(SOAK_TIMEOUT_S), append=False)
    if FABRIC == "verbs":
        unwanted = [
            item for item in mine if not _asked_for(config) or (item.get_closest_marker("vm") and not IN_THE_VM)
        ]
    else:
        unwanted = [item for item in mine if item.get_closest_marker("verbs")]
    if not SOAK:
        unwanted = unwanted + [item for item in items if item.get_closest_marker("soak") and item not in unwanted]
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [item for item in items if item not in unwanted]


@pytest.fixture(scope="session")
def route() -> Route:
    """Device, port and GID for tests within this host."""
    try:
        loopback = ipaddress.ip_address("127.0.0.1")
        return choose_gid(list_devices(), device=os.environ.get("RDMAXFER_DEVICE") or None, local_ip=loopback)
    except RdmaxferError as error:
        return pytest.fail(f"device tests were asked for, but there is no device to run them on: {error}")
