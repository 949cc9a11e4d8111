"""What `rdmaxfer doctor` looks at, in this order. What can't work without what failed before is not tried."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterator
from typing import Any

from rdmaxfer.cli import counters
from rdmaxfer.cli.checks import firewall, hardware, memory, practice, software
from rdmaxfer.cli.checks.finding import Check
from rdmaxfer.cli.distribution import Distribution
from rdmaxfer.fabric.devices import ETHERNET, list_devices


def examine(wanted: dict[str, Any], ring_bytes: int) -> Iterator[Check]:
    """All checks of this machine; `wanted` are the device, port and gid_index that the user names, or None."""
    here = Distribution.of_this_machine()
    release = platform.release()
    basics = []
    for check in itertools.chain(software.libraries(), software.kernel(here), [memory.memlock(ring_bytes)]):
        basics.append(check)
        yield check
    yield memory.huge_pages(ring_bytes, software.version(release))
    yield software.fork(release)
    yield software.clock()
    if any(check.status == "failed" for check in basics if check.name != "locked memory"):
        return
    devices = list_devices()
    named = [device for device in devices if wanted["device"] in (None, device.name)]
    yield from hardware.presence(devices, named, wanted["device"], here)
    ports = [
        (device, port)
        for device in named
        if hardware.usable(device)
        for port in device.ports
        if wanted["port"] in (None, port.number)
    ]
    if any(counters.device_parent(device.name) for device, _ in ports):
        yield from software.rxe_bugs(release, here)
    one_is_active = any(port.active for _, port in ports)
    for device, port in ports:
        yield from hardware.port_checks(device, port, devices, needed=not one_is_active)
    if any(port.link_layer == ETHERNET for _, port in ports):
        yield firewall.firewall()
    if one_is_active:
        yield from practice.practice(devices, wanted, ring_bytes)


__all__ = ["Check", "examine"]
