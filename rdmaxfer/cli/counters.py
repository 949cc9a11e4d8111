"""The counters that RDMA devices keep themselves: evidence, independent of this program, of what went through them."""

from __future__ import annotations

from pathlib import Path

SYSFS = Path("/sys/class/infiniband")

# What counts data, by driver: rxe; ConnectX; the standard ones (data in words of 4 bytes). All that exist are shown.
_INTERESTING = (
    "sent_pkts",
    "rcvd_pkts",
    "rx_write_requests",
    "port_xmit_packets",
    "port_rcv_packets",
    "port_xmit_data",
    "port_rcv_data",
)


def read(device: str, port: int, sysfs: Path = SYSFS) -> dict[str, int]:
    """The counters of a port by name; those that can't be read are left out."""
    values: dict[str, int] = {}
    for folder in ("hw_counters", "counters"):
        for name in _INTERESTING:
            try:
                values[name] = int((sysfs / device / "ports" / str(port) / folder / name).read_text())
            except (OSError, ValueError):
                continue
    return values


def describe(moved: dict[str, int]) -> str:
    """What was counted between two readings, for people."""
    told = []
    for name, value in moved.items():
        if value:  # the standard counters of data are in words of 4 bytes, whatever their name says
            told.append(f"{name} +{value * 4 / 1e6:.1f} MB" if name.endswith("_data") else f"{name} +{value}")
    return ", ".join(told) or "this driver shows none"


def driver(device: str, sysfs: Path = SYSFS) -> str:
    """What is behind a device, in words."""
    if device_parent(device, sysfs) is not None:
        return "Soft-RoCE (rxe), in software"
    link = sysfs / device / "device" / "driver"
    return f"hardware, driver {link.resolve().name}" if link.exists() else "hardware or software unknown"


def device_parent(device: str, sysfs: Path = SYSFS) -> str | None:
    """The network interface below a software device; hardware has none."""
    try:
        return (sysfs / device / "parent").read_text().strip() or None
    except OSError:
        return None
