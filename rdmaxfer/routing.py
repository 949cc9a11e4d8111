"""By which fabric, device and GID to reach a peer, or to serve one that comes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rdmaxfer.cm import messages
from rdmaxfer.errors import EndpointError, NoDevice, VerbsUnavailable
from rdmaxfer.fabric.choice import NAMES, Fabric, wanted
from rdmaxfer.fabric.route import gid_to_ip, local_ip_towards, resolve

if TYPE_CHECKING:
    from rdmaxfer.fabric.base import AnyRoute
    from rdmaxfer.fabric.devices import Route


class Routing:
    """What the user asked for; None: whatever fits."""

    def __init__(self, fabric: Fabric | None, device: str | None, port: int | None, gid_index: int | None) -> None:
        self._device = device if device is not None else os.environ.get("RDMAXFER_DEVICE") or None
        self._port = port
        self._gid_index = gid_index
        self.fabric = wanted(fabric, names_device=(device, port, gid_index) != (None, None, None))

    def towards(self, host: str) -> AnyRoute:
        """How to reach `host`, by which fabric. Raises NoDevice, VerbsUnavailable."""
        if self.fabric == "tcp":
            return self.tcp(host, "TCP was asked for")
        try:
            return self.by_verbs(host)
        except (NoDevice, VerbsUnavailable) as error:
            if self.fabric != "auto":
                raise
            return self.tcp(host, f"this side can't take part over verbs: {error}", instead=True)

    def shm_towards(self, host: str) -> AnyRoute | None:
        """By shared memory, if that was asked for, or if `host` is this machine and nothing was. Raises NoDevice."""
        if self.fabric not in ("auto", "shm"):
            return None
        from rdmaxfer.fabric import shm

        if self.fabric == "shm":
            return shm.ShmRoute(bound=False, reason="shared memory was asked for")
        ip = resolve(host)
        if ip is None or local_ip_towards(host) != ip or shm.problem():
            return None
        return shm.ShmRoute(bound=False, reason=f"{ip} is this machine, and the peer belongs to the same user")

    def _shm_back(self, theirs: messages.ShmAddress) -> AnyRoute:
        from rdmaxfer.fabric import shm

        if self.fabric in ("verbs", "tcp"):
            raise NoDevice(
                f"the side that connects offers shared memory, and this one takes part over {NAMES[self.fabric]} only.",
                fix=f'fabric="{self.fabric}" or "auto" on both sides.',
            )
        why = shm.problem()
        if not why and theirs.host != shm.host_id():
            why = "the peer is on another machine, in another container, or belongs to another user"
        if why:
            raise NoDevice(f"frames can't go by shared memory: {why}.", fix='fabric="auto", "verbs" or "tcp".')
        return shm.ShmRoute(bound=True, reason="the side that connects offers shared memory, and is this user's")

    def tcp(self, host: str, reason: str, *, instead: bool = False) -> AnyRoute:
        from rdmaxfer.fabric.tcp import TcpRoute

        return TcpRoute(host, bound=False, reason=reason, instead=instead)

    def back(self, theirs: messages.Fabric, host: str) -> AnyRoute:
        """How to serve a peer that offers `theirs`, at an endpoint that is bound to `host`. Raises NoDevice, VerbsUnavailable."""
        if isinstance(theirs, messages.ShmAddress):
            return self._shm_back(theirs)
        if isinstance(theirs, messages.TcpAddress):
            if self.fabric == "verbs":
                raise NoDevice(
                    "the side that connects offers TCP, and this one takes part over verbs only.",
                    fix='give the side that connects an RDMA device, or fabric="auto" to this one.',
                )
            if self.fabric == "shm":
                raise NoDevice(
                    "the side that connects offers TCP, and this one takes part over shared memory only.",
                    fix='fabric="auto" to this one.',
                )
            from rdmaxfer.fabric.tcp import TcpRoute

            return TcpRoute(host, bound=True, reason="the side that connects asked for TCP")
        if self.fabric in ("tcp", "shm"):
            raise NoDevice(
                f"the side that connects offers verbs, and this one takes part over {NAMES[self.fabric]} only.",
                fix=f'fabric="{self.fabric}" or "auto" on both sides.',
            )
        peer = str(gid_to_ip(theirs.gid)) if theirs.link_layer == "ethernet" else None
        route = self.by_verbs(peer, peer_gid=theirs.gid)
        if route.link_layer.lower() != theirs.link_layer:
            raise NoDevice(
                f"the link layers differ: {route.device} here is {route.link_layer.lower()}, {theirs.device} there is "
                f"{theirs.link_layer}.",
                fix="choose devices on the same network with device=...",
            )
        return route

    def by_verbs(self, host: str | None, peer_gid: bytes | None = None) -> Route:
        """The device, port and GID that lead to `host` (a name or address; None: unknown). Raises NoDevice, VerbsUnavailable."""
        from rdmaxfer.fabric import devices

        peer_ip = resolve(host) if host is not None else None
        if host is not None and peer_ip is None:
            raise EndpointError(
                f"the host name {host!r} is not known.",
                fix="check its spelling, /etc/hosts and the name server, or use an address.",
            )
        return devices.choose_gid(
            devices.list_devices(),
            device=self._device,
            port=self._port,
            gid_index=self._gid_index,
            local_ip=local_ip_towards(host) if host is not None else None,
            peer_ip=peer_ip,
            peer_gid=peer_gid,
        )


__all__ = ["Routing"]
