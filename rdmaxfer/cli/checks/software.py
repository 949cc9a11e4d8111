"""The libraries and the kernel."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rdmaxfer.cli.checks.finding import Check, failed
from rdmaxfer.cli.distribution import Distribution
from rdmaxfer.errors import RdmaxferError
from rdmaxfer.fabric import bridge, native

ROOT = Path("/")
COPIES_ON_FORK = (5, 12)
"""Since this release the kernel gives a child process copies of pages that are registered: ibv_fork_init(3)."""

SLOW_CLOCKS = {
    "hpet": "the HPET chip, which takes a microsecond and more to read",
    "acpi_pm": "the ACPI timer, which takes a microsecond and more to read",
    "jiffies": "the kernel's tick, which counts milliseconds",
    "refined-jiffies": "the kernel's tick, which counts milliseconds",
}


class KernelBug(NamedTuple):
    """Of Soft-RoCE in the releases from `first` up to, and not including, `fixed`. Distributions mend older ones, too: hence a
    note, and no more."""

    first: tuple[int, int]
    fixed: tuple[int, int]
    text: str
    source: str


RXE_BUGS = (
    KernelBug(
        (4, 8),
        (5, 13),
        "a queue pair that could not be made leaves wrong pointers behind",
        "kernel commit 8700e3e7c485 (introduced in 4.8), mended in 5.13 and 5.12.7",
    ),
    KernelBug(
        (5, 14),
        (5, 15),
        "processors may lock up for seconds under load",
        "https://github.com/spdk/spdk/issues/2277",
    ),
    KernelBug(
        (4, 8),
        (7, 0),
        "a connection that ends while packets are repeated may damage the kernel's memory",
        "CVE-2026-45910",
    ),
)


def libraries() -> Iterator[Check]:
    for name, load, good in (
        ("pyverbs", bridge.pyverbs, "Python's interface to libibverbs imports"),
        ("native core", native.extension, "rdmaxfer's compiled part loads"),
        ("libibverbs", native.library, "the library that speaks to RDMA devices opens"),
    ):
        try:
            load()
        except RdmaxferError as error:
            yield failed(name, error)
            if name == "native core":  # it is what opens libibverbs
                return
        else:
            yield Check(name, "ok", f"{good}; version {bridge.version()}" if name == "pyverbs" else good)


def kernel(here: Distribution, root: Path = ROOT) -> Iterator[Check]:
    nodes = sorted((root / "dev/infiniband").glob("uverbs*"))
    release = platform.release()
    if nodes:
        blocked = [str(path) for path in nodes if not os.access(path, os.R_OK | os.W_OK)]
        if blocked:
            yield Check(
                "kernel",
                "failed",
                f"this user may not open {', '.join(blocked)}",
                f"let all users read and write it, as rdma-core's udev rule does: sudo chmod 666 {' '.join(blocked)}; or run as "
                "root.",
            )
        else:
            yield Check("kernel", "ok", "the kernel offers RDMA devices to programs (/dev/infiniband/uverbs*)")
    elif any((root / "sys/class/infiniband_verbs").glob("uverbs*")):
        yield Check(
            "kernel",
            "failed",
            "the kernel has RDMA devices, but /dev/infiniband is not there",
            "in a container, pass the devices in: --device=/dev/infiniband for docker and podman.",
        )
    elif here.has_module("rdma_rxe", release):
        yield Check(
            "kernel",
            "failed",
            f"kernel {release} has Soft-RoCE (rdma_rxe), but no device was made",
            "sudo scripts/setup_softroce.sh up, or by hand, over a network interface DEV: sudo modprobe rdma_rxe && sudo rdma link "
            "add rxe0 type rxe netdev DEV.",
        )
    else:
        yield Check(
            "kernel", "failed", f"kernel {release} has no RDMA device, and no Soft-RoCE module", here.rxe_fix(release)
        )


def version(release: str) -> tuple[int, int]:
    """The first two numbers of `uname -r`; (0, 0) if it has none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def rxe_bugs(release: str, here: Distribution) -> Iterator[Check]:
    """What is known of Soft-RoCE in this kernel."""
    known = [bug for bug in RXE_BUGS if bug.first <= version(release) < bug.fixed]
    if not known:
        yield Check("Soft-RoCE", "ok", f"nothing bad is known of it in kernel {release}")
    for bug in known:
        yield Check(
            "Soft-RoCE",
            "note",
            f"kernels before {'.'.join(map(str, bug.fixed))}, unless the distribution has mended it (this is {release}): "
            f"{bug.text} ({bug.source})",
            f"keep the kernel up to date: {here.upgrade_kernel()}.",
        )


def fork(release: str) -> Check:
    if version(release) >= COPIES_ON_FORK:
        return Check("fork", "ok", "this kernel keeps registered memory apart when a process forks")
    return Check(
        "fork",
        "warning",
        f"on kernels before {'.'.join(map(str, COPIES_ON_FORK))} (this is {release}) a child process made by fork() has no "
        "registered memory, and huge pages need care",
        'start child processes by multiprocessing\'s "spawn" method, and set RDMAV_HUGEPAGES_SAFE=1.',
    )


def clock(root: Path = ROOT) -> Check:
    folder = root / "sys/devices/system/clocksource/clocksource0"
    try:
        current = (folder / "current_clocksource").read_text().strip()
        others = (folder / "available_clocksource").read_text().split()
    except OSError:
        return Check("clock", "note", "the kernel does not say by what it tells the time")
    if current not in SLOW_CLOCKS:
        return Check("clock", "ok", f"the time comes from {current}, which is quick to read")
    better = [name for name in others if name not in SLOW_CLOCKS]
    fix = (
        f"echo {better[0]} | sudo tee {folder / 'current_clocksource'}."
        if better
        else "look in the firmware's and the hypervisor's settings for one that gives the TSC."
    )
    return Check("clock", "warning", f"the time comes from {current}: {SLOW_CLOCKS[current]}", fix)
