"""Addresses: which local one leads to a peer, and GIDs as IP addresses."""

from __future__ import annotations

import functools
import ipaddress
import socket

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

ROCE_V2_PORT = 4791


@functools.lru_cache(1024)
def gid_to_ip(gid: bytes) -> IPAddress:
    """A RoCE GID as the address it stands for: IPv4 where it is an IPv4-mapped one."""
    if len(gid) != 16:
        raise ValueError(f"a GID has 16 bytes, not {len(gid)}")
    address = ipaddress.IPv6Address(gid)
    return address.ipv4_mapped or address


def ip_to_gid(ip: IPAddress) -> bytes:
    """The GID of an address."""
    return b"\0" * 10 + b"\xff\xff" + ip.packed if ip.version == 4 else ip.packed


def local_ip_towards(host: str) -> IPAddress | None:
    """The local address that packets to `host` (a name or an address, IPv6 also with a scope) leave from.

    None if the host is unknown or no route leads there. Nothing is sent: connecting a UDP socket only asks the routing
    table.
    """
    host = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(host, ROCE_V2_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                text = str(probe.getsockname()[0])
        except OSError:
            continue
        return gid_to_ip(ip_to_gid(ipaddress.ip_address(text.partition("%")[0])))
    return None


def resolve(host: str) -> IPAddress | None:
    """The first address of `host` (a name or an address), without scope; None if it is unknown."""
    try:
        found = socket.getaddrinfo(host.removeprefix("[").removesuffix("]"), None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return None
    return gid_to_ip(ip_to_gid(ipaddress.ip_address(str(found[0][4][0]).partition("%")[0])))
