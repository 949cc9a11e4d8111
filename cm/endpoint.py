"""Endpoints: `tcp://HOST:PORT`. Pure.

What ZeroMQ would accept or report as "Invalid argument" is checked here first, so that the error can say what is wrong.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from rdmaxfer.errors import EndpointError

FORM = "write tcp://HOST:PORT, as in tcp://10.0.0.2:7471, tcp://[fe80::1%eth0]:7471 or tcp://node7.example.org:7471."
_BIND_FORM = FORM[:-1] + "; to bind, HOST may also be * (every address) and PORT * (any free port)."

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOSTNAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?", re.ASCII)
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_SCOPE = re.compile(r"[A-Za-z0-9_.@:-]{1,32}", re.ASCII)


class Endpoint(NamedTuple):
    """`host` without brackets, with its scope; "*" is every local address. `port` 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port or '*'}"


def parse(text: str, *, bind: bool = False) -> Endpoint:
    """Take an endpoint apart. With `bind`, wildcards are allowed. Raises EndpointError."""
    fix = _BIND_FORM if bind else FORM
    if not isinstance(text, str):
        raise EndpointError(f"an endpoint is a string, not {text!r}.", fix=fix)
    if not text.startswith("tcp://"):
        raise EndpointError(f"{text!r} does not begin with tcp://.", fix=fix)
    rest = text[len("tcp://") :]
    host, colon, port_text = rest.rpartition(":")
    if not colon or "]" in port_text:
        raise EndpointError(f"{text!r} has no port.", fix=fix)
    return Endpoint(_host(text, host, bind, fix), _port(text, port_text, bind, fix))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`, as far as its text says: an address of it, or "localhost" or "lo"."""
    try:
        return ipaddress.ip_address(_unmapped(host).partition("%")[0]).is_loopback
    except ValueError:
        return host in ("localhost", "lo")


def from_zmq(text: str) -> Endpoint:
    """What ZeroMQ reports as bound, with IPv4 addresses in their own form."""
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    return Endpoint(_unmapped(host), int(port))


def plain_address(text: str) -> str:
    """An address as ZeroMQ reports a peer's, an IPv4-mapped one in its IPv4 form."""
    return _unmapped(text.strip("[]"))


def _unmapped(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = getattr(address, "ipv4_mapped", None)
    return host if mapped is None else str(mapped)


def _port(text: str, port: str, bind: bool, fix: str) -> int:
    if port in ("*", "0") and bind:
        return 0
    if not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        what = "a wildcard port, which only a bound side can have" if port in ("*", "0") else f"{port!r} for a port"
        raise EndpointError(f"{text!r} has {what}; a port is a number from 1 to 65535.", fix=fix)
    return int(port)


def _host(text: str, host: str, bind: bool, fix: str) -> str:
    if host == "*":
        if bind:
            return host
        raise EndpointError(f"{text!r} has a wildcard for a host, which only a bound side can have.", fix=fix)
    if host.startswith("[") and host.endswith("]"):
        inner = host[1:-1]
        address, percent, scope = inner.partition("%")
        if not _is_address(address, 6) or (percent and not _SCOPE.fullmatch(scope)):
            raise EndpointError(f"{text!r} has brackets around something that is no IPv6 address.", fix=fix)
        return inner
    if ":" in host:
        raise EndpointError(f"{text!r} has an IPv6 address without brackets, or colons too many.", fix=fix)
    if re.fullmatch(r"[0-9.]+", host, re.ASCII) and not _is_address(host, 4):
        raise EndpointError(f"{text!r} has {host!r} for an IPv4 address.", fix=fix)
    if len(host) > 253 or not _HOSTNAME.fullmatch(host):
        raise EndpointError(f"{text!r} has {host!r} for a host, which is no address and no name.", fix=fix)
    return host


def _is_address(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False
