"""The devices that a Sender or Receiver has open, and what becomes of its links when one of them reports something.

All methods are called with the node's lock held.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from rdmaxfer.errors import DeviceLost, PeerLost
from rdmaxfer.link import Link

if TYPE_CHECKING:
    from rdmaxfer.cm.control import Control
    from rdmaxfer.cm.curve import Identity
    from rdmaxfer.fabric.base import AnyRoute, Domain
    from rdmaxfer.fabric.events import Event, Events
    from rdmaxfer.fabric.verbs import Endpoint

log = logging.getLogger("rdmaxfer")

BROKEN = {"QP_FATAL", "QP_REQ_ERR", "QP_ACCESS_ERR", "PATH_MIG_ERR", "CQ_ERR"}
"""Asynchronous events after which a queue pair is of no use."""

PORT_STATES = {"PORT_ERR": ("down", logging.WARNING), "PORT_ACTIVE": ("up", logging.INFO)}

L = TypeVar("L", bound=Link)


class Domains(Generic[L]):
    """`links` gives all links of the node, ready or opening."""

    def __init__(self, links: Callable[[], Iterable[L]]) -> None:
        self._links = links
        self._open: dict[str, Domain] = {}
        self._lost: list[Domain] = []
        """Closed at the end, when nothing refers to them any more."""
        self._watched: set[Domain] = set()

    def __len__(self) -> int:
        return len(self._open) + len(self._lost)

    def __iter__(self) -> Iterator[Domain]:
        yield from self._open.values()
        yield from self._lost

    def get(self, route: AnyRoute, identity: Identity | None) -> Domain:
        """The open device of `route`; opens it if need be. `identity`: this side's keys. Raises NoDevice, VerbsError."""
        domain = self._open.get(route.device)
        if domain is None:
            if route.fabric == "tcp":
                from rdmaxfer.fabric.tcp import TcpDomain

                domain = TcpDomain(identity)
            elif route.fabric == "shm":
                from rdmaxfer.fabric.shm import ShmDomain

                domain = ShmDomain()
            else:
                from rdmaxfer.fabric.verbs import Domain

                domain = Domain(route.device)
            self._open[route.device] = domain
        return domain

    def watch(self, link: L, control: Control, heard: Callable[[Events], bool]) -> None:
        """Have `heard` called on the control thread when the device that `link` is on has something to say, until it returns
        False."""
        pd = link.endpoint.pd
        if pd.domain.reports and pd.domain not in self._watched:
            from rdmaxfer.fabric.events import Events

            self._watched.add(pd.domain)
            events = Events(pd)
            control.watch_fd(events.fd, lambda: heard(events))

    def handle(self, domain: Domain, happened: Iterable[Event]) -> None:
        """Take what a device has reported."""
        for event in happened:
            if event.name == "DEVICE_FATAL":
                self.lose(domain)
            elif event.name in BROKEN:
                for link in self._links_on(domain):
                    if event.concerns(cast("Endpoint", link.endpoint)):
                        link.fail(PeerLost(f"the connection with {link.peer} broke: the device reports {event.name}."))
            elif event.name in PORT_STATES:
                state, level = PORT_STATES[event.name]
                log.log(level, "port %d of %s is %s", event.port, domain.name, state)
                if event.name == "PORT_ACTIVE":
                    self._begin_anew(domain, event.port)

    def _begin_anew(self, domain: Domain, port: int) -> None:
        """The port was down: its queue pairs may never send again, as those of Soft-RoCE, and nobody be told. What can be connected
        again is."""
        for link in self._links_on(domain):
            if link.live and link.endpoint.route.port == port and link.stream.reconnect_s:
                link.fail(
                    PeerLost(f"port {port} of {domain.name} was down; the connection with {link.peer} begins anew.")
                )

    def lose(self, domain: Domain) -> None:
        """The device failed or was removed: its links end, and one of that name that comes (back) is another. Again is harmless."""
        if domain.lost:
            return
        domain.lost = True
        log.warning("the device %s can't be used any more: it failed or was removed.", domain.name)
        for link in self._links_on(domain):
            link.fail(
                DeviceLost(
                    f"the connection with {link.peer} ended with this side's device {domain.name}: it failed or was removed.",
                    fix="`rdmaxfer devices` shows what devices there are; connect again when it is back.",
                )
            )
        if self._open.get(domain.name) is domain:
            del self._open[domain.name]
        self._lost.append(domain)

    def _links_on(self, domain: Domain) -> list[L]:
        return [link for link in self._links() if link.endpoint.pd.domain is domain]
