"""The devices, their drivers and their ports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rdmaxfer.cli import counters
from rdmaxfer.cli.checks.finding import Check
from rdmaxfer.cli.devices import interface
from rdmaxfer.cli.distribution import Distribution
from rdmaxfer.fabric.devices import ETHERNET, Device, Port

FULL_MTU = 4096
FULL_NETDEV_MTU = 4200
"""Packets of 4096 bytes have up to 80 bytes of headers more."""

SYS = Path("/sys/class")


def presence(
    devices: tuple[Device, ...], named: list[Device], name: str | None, here: Distribution, sysfs: Path = SYS
) -> Iterator[Check]:
    for unseen in sorted({each.name for each in (sysfs / "infiniband").glob("*")} - {each.name for each in devices}):
        if name in (None, unseen):
            yield Check(
                "device",
                "failed",
                f"the kernel has the device {unseen}, but libibverbs has no provider library for it",
                here.providers_fix(),
            )
    if not devices:
        fix = "sudo scripts/setup_softroce.sh up makes one in software (Soft-RoCE) on any network interface."
        yield Check("device", "failed", "there is no RDMA device", fix)
    elif not named:
        there = ", ".join(device.name for device in devices)
        yield Check("device", "failed", f"there is no device {name!r}, but {there}", "name one of these, or none.")
    unneeded = "warning" if any(map(usable, named)) else "failed"
    for device in named:
        if device.error:
            yield Check(
                "device",
                unneeded,
                f"{device.name} can't be opened: {device.error}",
                f"check the rights on /dev/infiniband, and get the provider libraries: {here.providers_fix()}",
            )
        elif device.transport == "IWARP":
            yield Check(
                "device",
                "note" if unneeded == "warning" else "failed",
                f"{device.name} is an iWARP device, which rdmaxfer does not use",
                "use one for RoCE or InfiniBand: `rdmaxfer devices` lists all, and sudo scripts/setup_softroce.sh up "
                "makes one.",
            )
        else:
            what = counters.driver(device.name, sysfs / "infiniband")
            providers = ", ".join(provider_of(device, provider_libraries(), sysfs)) or "unknown"
            yield Check(
                "device", "ok", f"{device.name} opens, transport {device.transport}; {what}; provider {providers}"
            )


def usable(device: Device) -> bool:
    return not device.error and device.transport != "IWARP"


def provider_libraries(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """The libraries that libibverbs has loaded for the devices it opened."""
    return sorted(
        set(
            re.findall(
                r"[\w.-]+-rdmav\d+\.so|libmlx[45]\.so[\w.]*|libefa\.so[\w.]*|libmana\.so[\w.]*", maps.read_text()
            )
        )
    )


def provider_of(device: Device, libraries: list[str], sysfs: Path = SYS) -> list[str]:
    """Which of them serves the device, by the name of its driver: old kernels make libibverbs load them all."""
    folder = sysfs / "infiniband"
    link = folder / device.name / "device" / "driver"
    driver = "rxe" if counters.device_parent(device.name, folder) else link.resolve().name if link.exists() else ""
    its = [each for each in libraries if re.split(r"-rdmav|\.so", each.removeprefix("lib"))[0] in driver]
    return its or libraries


def port_checks(
    device: Device, port: Port, devices: tuple[Device, ...] = (), *, needed: bool = True, sysfs: Path = SYS
) -> Iterator[Check]:
    """`needed`: no other port is there instead. `devices`: all of this machine."""
    name = f"{device.name} port {port.number}"
    interfaces = sorted({interface(gid) for gid in port.gids} - {""})
    dev = interfaces[0] if interfaces else counters.device_parent(device.name, sysfs / "infiniband") or "DEV"
    if not port.active:
        fix = (
            f"sudo ip link set {dev} up."
            if port.link_layer == ETHERNET
            else "plug the cable in, and run a subnet manager (opensm)."
        )
        if needed:
            yield Check(name, "failed", f"its state is {port.state}, not ACTIVE", fix)
        else:
            yield Check(
                name,
                "note",
                f"its state is {port.state}, not ACTIVE, but another port is",
                f"if it is to be used: {fix}",
            )
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
                f"give {dev} an address: sudo ip addr add {free_address(devices)}/24 dev {dev}.",
            )
    if port.active_mtu >= FULL_MTU:
        yield Check(name, "ok", f"packets of {port.active_mtu} bytes")
        return
    if port.link_layer != ETHERNET:
        fix = "raise the MTU in the subnet manager's partition."
    else:
        fix = (
            f"sudo ip link set {dev} mtu {FULL_NETDEV_MTU}, on both machines and on the switch between them, if they can"
            f"{_now(dev, sysfs)}."
        )
    yield Check(name, "warning", f"packets of only {port.active_mtu} bytes; {FULL_MTU} are faster", fix)


def free_address(devices: tuple[Device, ...]) -> str:
    """An address of a network that none of the devices is in."""
    taken = {
        str(gid.ip).rpartition(".")[0]
        for device in devices
        for port in device.ports
        for gid in port.gids
        if gid.ip.version == 4
    }
    networks = (f"192.168.{number}" for number in range(77, 256))
    return next((f"{network}.1" for network in networks if network not in taken), "192.168.77.1")


def _now(dev: str, sysfs: Path) -> str:
    try:
        return f"; {dev} has {(sysfs / 'net' / dev / 'mtu').read_text().strip()} now"
    except OSError:
        return ""
