"""Which devices, ports and GIDs there are, and which of them fits a peer.

`list_devices` looks (through pyverbs); `choose_gid` only thinks: it is a pure function of what was found.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from rdmaxfer.errors import NoDevice
from rdmaxfer.fabric import bridge
from rdmaxfer.fabric.route import IPAddress, gid_to_ip, ip_to_gid

ETHERNET = "ETHERNET"
INFINIBAND = "INFINIBAND"

# Numbers of verbs.h, written out because pyverbs scopes its enums differently in different versions.
_PORT_STATES = ("NOP", "DOWN", "INIT", "ARMED", "ACTIVE", "ACTIVE_DEFER")
_LINK_LAYERS = {0: INFINIBAND, 1: INFINIBAND, 2: ETHERNET}
_GID_TYPES = {0: "IB", 1: "ROCE_V1", 2: "ROCE_V2"}
_TRANSPORTS = {0: "IB", 1: "IWARP", 2: "USNIC", 3: "USNIC_UDP", 4: "UNSPECIFIED"}
_LARGEST_SGID_INDEX = 255  # struct ibv_global_route has 8 bits for it


@dataclass(frozen=True)
class Gid:
    """An entry of a port's GID table."""

    index: int
    raw: bytes
    type: str
    ifindex: int = 0

    @property
    def ip(self) -> IPAddress:
        return gid_to_ip(self.raw)

    def __str__(self) -> str:
        return f"{self.index}: {self.ip} {self.type}"


@dataclass(frozen=True)
class Port:
    """A port of a device. `active_mtu` is in bytes."""

    number: int
    state: str
    link_layer: str
    active_mtu: int
    max_msg_sz: int
    lid: int = 0
    gids: tuple[Gid, ...] = ()

    @property
    def active(self) -> bool:
        return self.state == "ACTIVE"


@dataclass(frozen=True)
class Device:
    """An RDMA device. `error` says why it could not be opened, then it has no ports."""

    name: str
    transport: str = "IB"
    ports: tuple[Port, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Route:
    """The device, port and GID to reach a peer from, and why these."""

    fabric: ClassVar[str] = "verbs"
    device: str
    port: int
    gid_index: int
    gid: bytes
    gid_type: str
    lid: int
    link_layer: str
    active_mtu: int
    max_msg_sz: int
    reason: str = field(compare=False, default="")

    def __str__(self) -> str:
        return f"{self.device} port {self.port} GID {self.gid_index} ({gid_to_ip(self.gid)})"


# --- looking ----------------------------------------------------------------------------------------------------------


def list_devices() -> tuple[Device, ...]:
    """Every RDMA device of this machine. Raises VerbsUnavailable; having none is an empty tuple."""
    verbs = bridge.pyverbs()
    try:
        found = verbs.device.get_device_list()
    except Exception as error:  # pyverbs' own class; no kernel support gives ENOSYS here
        if type(error).__module__.startswith("pyverbs"):
            return ()
        raise
    return tuple(_look_at(verbs, entry) for entry in found)


def _look_at(verbs: Any, entry: Any) -> Device:
    name = entry.name.decode() if isinstance(entry.name, bytes) else str(entry.name)
    transport = _TRANSPORTS.get(int(entry.transport_type), "UNKNOWN")
    try:
        context = verbs.device.Context(name=name)
    except Exception as error:
        if type(error).__module__.startswith("pyverbs"):
            return Device(name, transport, error=str(error))
        raise
    try:
        numbers = range(1, context.query_device().phys_port_cnt + 1)
        attributes = {number: context.query_port(number) for number in numbers}
        table = context.query_gid_table(sum(port.gid_tbl_len for port in attributes.values()))
        gids = [(entry.port_num, _gid(entry)) for entry in table]
        ports = tuple(
            _port(number, port, [gid for at, gid in gids if at == number]) for number, port in attributes.items()
        )
        return Device(name, transport, ports)
    except Exception as error:
        if type(error).__module__.startswith("pyverbs"):
            return Device(name, transport, error=str(error))
        raise
    finally:
        context.close()


def _gid(entry: Any) -> Gid:
    raw = socket.inet_pton(socket.AF_INET6, entry.gid_str())
    return Gid(entry.gid_index, raw, _GID_TYPES.get(int(entry.gid_type), "UNKNOWN"), entry.ndev_ifindex)


def _port(number: int, attributes: Any, gids: Sequence[Gid]) -> Port:
    state, mtu = int(attributes.state), int(attributes.active_mtu)
    return Port(
        number=number,
        state=_PORT_STATES[state] if state < len(_PORT_STATES) else str(state),
        link_layer=_LINK_LAYERS.get(int(attributes.link_layer), "UNKNOWN"),
        active_mtu=128 << mtu,  # enum ibv_mtu: 1 is 256 bytes, 5 is 4096
        max_msg_sz=attributes.max_msg_sz,
        lid=attributes.lid,
        gids=tuple(gids),
    )


# --- choosing ---------------------------------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    device: Device
    port: Port
    gid: Gid


def choose_gid(
    devices: Sequence[Device],
    *,
    device: str | None = None,
    port: int | None = None,
    gid_index: int | None = None,
    local_ip: IPAddress | None = None,
    peer_ip: IPAddress | None = None,
    peer_gid: bytes | None = None,
) -> Route:
    """The entry to reach a peer from.

    `local_ip` is the address that the route to the peer leaves from (`route.local_ip_towards`), `peer_ip` the peer's
    address and `peer_gid` its GID, each if known. What the caller names (`device`, `port`, `gid_index`) is taken or
    refused, never replaced. In this order:

    1. the entry that the caller named by its index;
    2. the RoCE entry whose address is `local_ip`: two hosts on one IP network reach each other from there;
    3. an InfiniBand port, which has its own network and no IP addresses to compare;
    4. if the peer is on this host, or the caller named the device: the best entry, of the peer's kind if there is one.
    """
    candidates = list(_candidates(devices, device, port, gid_index))
    roce = [candidate for candidate in candidates if candidate.port.link_layer == ETHERNET]
    infiniband = [
        each
        for each in candidates
        if each.port.link_layer == INFINIBAND and (each.gid.index == 0 or gid_index is not None)
    ]

    if gid_index is not None and (device is not None or len(candidates) == 1):
        return _route(min(candidates, key=_preference), "named by the caller")
    if local_ip is not None:
        wanted = ip_to_gid(local_ip)
        exact = [candidate for candidate in roce if candidate.gid.raw == wanted]
        if exact:
            return _route(min(exact, key=_preference), f"the route to the peer leaves from its address {local_ip}")
    if infiniband:
        return _route(infiniband[0], "the first active InfiniBand port")

    same_host = local_ip is not None and (local_ip.is_loopback or local_ip == peer_ip)
    if roce and (same_host or device is not None):
        model = peer_gid
        if model is None and local_ip is not None and not local_ip.is_loopback:
            model = ip_to_gid(local_ip)
        kind = _kind(model) if model is not None else None
        best = min(roce, key=lambda c: (_kind(c.gid.raw) != kind if kind is not None else False, *_preference(c)))
        why = "the peer is on this host" if same_host else f"the best entry of {device}, which the caller named"
        return _route(best, why)
    raise _no_match(devices, local_ip)


def _candidates(
    devices: Sequence[Device], device: str | None, port: int | None, gid_index: int | None
) -> Iterator[_Candidate]:
    """Entries of active ports that the caller's names allow. Raises NoDevice, saying what is wrong, if none are."""
    if not devices:
        raise NoDevice(
            "this machine has no RDMA device.",
            fix="for Soft-RoCE over a network interface: scripts/setup_softroce.sh up --netdev DEV.",
        )
    named = [each for each in devices if device is None or each.name == device]
    if not named:
        raise NoDevice(f"there is no RDMA device {device!r}; there is {_listing(devices)}.", fix="name one of these.")
    usable = [each for each in named if not each.error and each.transport != "IWARP"]
    if not usable:
        raise NoDevice(f"no usable RDMA device: {_listing(named)}.", fix=_why_unusable(named))
    ports = [(each, one) for each in usable for one in each.ports if port is None or one.number == port]
    if not ports:
        raise NoDevice(f"there is no port {port} on {_listing(usable)}.", fix="leave port= out, or name one of these.")
    active = [(each, one) for each, one in ports if one.active]
    if not active:
        raise NoDevice(
            f"no port is active: {_listing(usable)}.",
            fix="bring the network interface up (`ip link set DEV up`), or start InfiniBand's subnet manager.",
        )
    found = False
    for each, one in active:
        for gid in one.gids:
            if gid_index is None or gid.index == gid_index:
                if gid.index > _LARGEST_SGID_INDEX or (one.link_layer == INFINIBAND and not one.lid):
                    continue
                found = True
                yield _Candidate(each, one, gid)
    if not found:
        raise NoDevice(
            f"there is no {'GID' if gid_index is None else f'GID index {gid_index}'} to use on {_listing(usable)}.",
            fix="give the network interface an address, or name one of these indices."
            if any(one.link_layer == ETHERNET for _, one in active)
            else "start the subnet manager of the InfiniBand network: the port has no LID.",
        )


def _kind(gid: bytes) -> int:
    """0: IPv4-mapped, 1: global (or unique local) IPv6, 2: link-local. Also the order of preference."""
    ip = gid_to_ip(gid)
    return 0 if ip.version == 4 else 2 if ip.is_link_local else 1


def _preference(candidate: _Candidate) -> tuple[bool, int]:
    """RoCE v2 before v1 (which routers don't forward); `min` keeps the table's order among equals."""
    return candidate.gid.type == "ROCE_V1", _kind(candidate.gid.raw)


def _route(candidate: _Candidate, reason: str) -> Route:
    device, port, gid = candidate
    return Route(
        device=device.name,
        port=port.number,
        gid_index=gid.index,
        gid=gid.raw,
        gid_type=gid.type,
        lid=port.lid,
        link_layer=port.link_layer,
        active_mtu=port.active_mtu,
        max_msg_sz=port.max_msg_sz,
        reason=f"{device.name} port {port.number} GID {gid.index} ({gid.ip}, {gid.type}): {reason}",
    )


def _no_match(devices: Sequence[Device], local_ip: IPAddress | None) -> NoDevice:
    where = f"has the address {local_ip}, from which the route to the peer leaves" if local_ip else "leads to the peer"
    return NoDevice(
        f"no RDMA device {where}; there is {_listing(devices)}.",
        fix="put Soft-RoCE on the network interface with that address (scripts/setup_softroce.sh up --netdev DEV), "
        "connect by an address of the RDMA network, or name the device (device=...).",
    )


def _listing(devices: Sequence[Device]) -> str:
    return "; ".join(map(_describe, devices))


def _describe(device: Device) -> str:
    if device.error:
        return f"{device.name} ({device.error})"
    if device.transport == "IWARP":
        return f"{device.name} (iWARP)"
    ports = [
        f"port {port.number} {port.state} {', '.join(map(str, port.gids)) or 'without GIDs'}"
        if port.link_layer == ETHERNET
        else f"port {port.number} {port.state} {port.link_layer} LID {port.lid}"
        for port in device.ports
    ]
    return f"{device.name} ({'; '.join(ports) or 'no ports'})"


def _why_unusable(devices: Sequence[Device]) -> str:
    if any(device.error for device in devices):
        return "check the rights on /dev/infiniband, and in a container that its devices are passed in."
    return "iWARP needs connections by librdmacm, which rdmaxfer does not make; use RoCE or InfiniBand."
