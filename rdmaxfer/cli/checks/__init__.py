"""What `rdmaxfer doctor` looks at, in this order. What can't work without what failed before is not tried."""

from __future__ import annotations

import itertools
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import rdmaxfer
from rdmaxfer.cli.devices import interface
from rdmaxfer.cli.distribution import Distribution
from rdmaxfer.errors import MemlockError, NoDevice, RdmaxferError
from rdmaxfer.fabric import bridge, native
from rdmaxfer.fabric.devices import ETHERNET, Device, Port, choose_gid, list_devices
from rdmaxfer.fabric.route import local_ip_towards
from rdmaxfer.fabric.verbs import Domain
from rdmaxfer.memory import Buffer

RING_BYTES = 16 * ((1 << 20) + 8192)
"""What a Receiver registers for each sender by default: 16 slots of 1 MiB, and their headers."""

FULL_MTU = 4096
LOOPBACK_S = 20.0
_CAP_IPC_LOCK = 14  # linux/capability.h


class Check(NamedTuple):
    """`status` is "ok", "warning" or "failed"."""

    name: str
    status: str
    detail: str
    fix: str = ""


def examine(wanted: dict[str, Any]) -> Iterator[Check]:
    """All checks; `wanted` are the device, port and gid_index that the user names, or None."""
    here = Distribution.of_this_machine()
    basics = []
    for check in itertools.chain(libraries(), kernel(here), [memlock()]):
        basics.append(check)
        yield check
    if any(check.status == "failed" for check in basics if check.name != "locked memory"):
        return
    devices = list_devices()
    named = [device for device in devices if wanted["device"] in (None, device.name)]
    yield from presence(devices, named, wanted["device"], here)
    for device in named:
        for port in device.ports:
            yield from port_checks(device, port)
    if any(port.active for device in named for port in device.ports):
        yield from practice(devices, wanted)


# --- software ---------------------------------------------------------------------------------------------------------


def libraries() -> Iterator[Check]:
    for name, load, good in (
        ("pyverbs", bridge.pyverbs, "Python's interface to libibverbs imports"),
        ("native core", native.extension, "rdmaxfer's compiled part loads"),
        ("libibverbs", native.library, "the library that speaks to RDMA devices opens"),
    ):
        try:
            load()
        except RdmaxferError as error:
            yield _failed(name, error)
            if name == "native core":  # it is what opens libibverbs
                return
        else:
            yield Check(name, "ok", f"{good}; version {bridge.version()}" if name == "pyverbs" else good)


def kernel(here: Distribution) -> Iterator[Check]:
    if Path("/dev/infiniband").is_dir() and any(Path("/dev/infiniband").glob("uverbs*")):
        blocked = [
            str(path) for path in Path("/dev/infiniband").glob("uverbs*") if not os.access(path, os.R_OK | os.W_OK)
        ]
        if blocked:
            yield Check(
                "kernel",
                "failed",
                f"this user may not open {', '.join(blocked)}",
                "let the group `rdma` or all users read and write it (a udev rule of rdma-core does), or run as root.",
            )
        else:
            yield Check("kernel", "ok", "the kernel offers RDMA devices to programs (/dev/infiniband/uverbs*)")
        return
    release = platform.release()
    if Path("/sys/class/infiniband_verbs").is_dir() and any(Path("/sys/class/infiniband_verbs").glob("uverbs*")):
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
            "scripts/setup_softroce.sh up, or by hand: modprobe rdma_rxe && rdma link add rxe0 type rxe netdev DEV.",
        )
    else:
        yield Check(
            "kernel", "failed", f"kernel {release} has no RDMA device, and no Soft-RoCE module", here.rxe_fix(release)
        )


def memlock() -> Check:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    need = f"the default ring of a receiver locks {RING_BYTES >> 20} MiB for each sender"
    if limit == resource.RLIM_INFINITY:
        return Check("locked memory", "ok", f"no limit ({need})")
    if may_lock_any_amount():
        return Check("locked memory", "ok", f"limit {limit >> 10} KiB, which does not hold for this user ({need})")
    if limit >= 4 * RING_BYTES:
        return Check("locked memory", "ok", f"limit {limit >> 20} MiB ({need})")
    return Check(
        "locked memory",
        "failed" if limit < RING_BYTES else "warning",
        f"limit {limit >> 10} KiB (`ulimit -l`), but {need}",
        "a line '* - memlock unlimited' in /etc/security/limits.d/rdma.conf and a new login; LimitMEMLOCK=infinity in "
        "a systemd unit; --ulimit memlock=-1 for docker and podman; or fewer and smaller slots.",
    )


def may_lock_any_amount(status: Path = Path("/proc/self/status")) -> bool:
    """Whether this process has CAP_IPC_LOCK."""
    for line in status.read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


# --- devices ----------------------------------------------------------------------------------------------------------


def presence(devices: tuple[Device, ...], named: list[Device], name: str | None, here: Distribution) -> Iterator[Check]:
    if not devices:
        fix = "scripts/setup_softroce.sh up makes one in software (Soft-RoCE) on any network interface."
        yield Check("device", "failed", "there is no RDMA device", fix)
    elif not named:
        there = ", ".join(device.name for device in devices)
        yield Check("device", "failed", f"there is no device {name!r}, but {there}", "name one of these, or none.")
    for device in named:
        if device.error:
            yield Check(
                "device",
                "failed",
                f"{device.name} can't be opened: {device.error}",
                f"check the rights on /dev/infiniband, and get the provider libraries: {here.providers_fix()}",
            )
        elif device.transport == "IWARP":
            yield Check("device", "failed", f"{device.name} is an iWARP device", "rdmaxfer needs RoCE or InfiniBand.")
        else:
            yield Check("device", "ok", f"{device.name} opens, transport {device.transport}")


def port_checks(device: Device, port: Port) -> Iterator[Check]:
    name = f"{device.name} port {port.number}"
    interfaces = sorted({interface(gid) for gid in port.gids} - {""})
    dev = interfaces[0] if interfaces else "DEV"
    if not port.active:
        fix = (
            f"ip link set {dev} up."
            if port.link_layer == ETHERNET
            else "plug the cable in, and run a subnet manager (opensm)."
        )
        yield Check(name, "failed", f"its state is {port.state}, not ACTIVE", fix)
        return
    yield Check(name, "ok", f"ACTIVE, {port.link_layer}")
    if port.link_layer == ETHERNET:
        routable = [gid for gid in port.gids if gid.type == "ROCE_V2" and not gid.ip.is_link_local]
        if routable:
            yield Check(name, "ok", "GIDs for RoCE v2: " + ", ".join(f"{gid.index} ({gid.ip})" for gid in routable))
        else:
            yield Check(
                name,
                "warning" if port.gids else "failed",
                "it has no GID with an address that other machines can reach",
                f"give {dev} an address: ip addr add 192.168.77.1/24 dev {dev}.",
            )
    if port.active_mtu >= FULL_MTU:
        yield Check(name, "ok", f"packets of {port.active_mtu} bytes")
    else:
        yield Check(
            name,
            "warning",
            f"packets of only {port.active_mtu} bytes; {FULL_MTU} are faster",
            f"ip link set {dev} mtu 4200 or more, on both machines and on the switch between them, if they can."
            if port.link_layer == ETHERNET
            else "raise the MTU in the subnet manager's partition.",
        )


# --- practice ---------------------------------------------------------------------------------------------------------


def practice(devices: tuple[Device, ...], wanted: dict[str, Any]) -> Iterator[Check]:
    """Use what was found: our own way to the device, as much memory as a receiver needs, and a frame to ourselves."""
    ip = local_ip_towards("127.0.0.1")
    try:
        route = choose_gid(devices, **wanted, local_ip=ip, peer_ip=ip)
    except NoDevice as error:
        yield _failed("choice", error)
        return
    yield Check("choice", "ok", f"for peers on this machine: {route.reason}")
    try:
        with Domain(route) as domain, domain.protection_domain() as pd:
            yield Check(
                "pyverbs and native core", "ok", f"they fit together: both use one protection domain of {route.device}"
            )
            try:
                with pd.register(Buffer(RING_BYTES), remote_write=True):
                    yield Check("memory registration", "ok", f"{RING_BYTES >> 20} MiB can be registered")
            except MemlockError as error:
                yield _failed("memory registration", error)
                return
    except RdmaxferError as error:
        yield _failed("pyverbs and native core", error)
        return
    yield loopback(wanted)


def loopback(wanted: dict[str, Any]) -> Check:
    """A frame by RDMA WRITE from this process to itself."""
    name = "a frame to ourselves"
    picture = np.arange(1 << 18, dtype=np.uint32).reshape(512, 512)
    try:
        with (
            rdmaxfer.Receiver(**wanted, fabric="verbs") as receiver,
            rdmaxfer.Sender(**wanted, fabric="verbs") as sender,
        ):
            sender.connect(receiver.bind("tcp://127.0.0.1:*"), timeout=LOOPBACK_S)
            sender.push(picture, timeout=LOOPBACK_S)
            with receiver.recv(timeout=LOOPBACK_S) as frame:
                same = np.array_equal(frame.array, picture)
    except RdmaxferError as error:
        return _failed(name, error)
    if same:
        return Check(name, "ok", "1 MiB was written by RDMA and arrived byte for byte")
    return Check(
        name, "failed", "1 MiB was written by RDMA, but other bytes arrived", "the device or its driver damages data."
    )


def _failed(name: str, error: RdmaxferError) -> Check:
    message = str(error).removesuffix(f" Fix: {error.fix}") if error.fix else str(error)
    return Check(name, "failed", message.rstrip("."), error.fix)
