"""Asynchronous events of a device: what happens to its ports and to itself, and to queue pairs beside their completions.

`ibv_get_async_event(3)` has the list. pyverbs' own call for them keeps the interpreter lock while it waits.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from rdmaxfer.fabric import native
from rdmaxfer.fabric.owner import Owner
from rdmaxfer.fabric.verbs import Endpoint, ProtectionDomain

# enum ibv_event_type, verbs.h
_NAMES = (
    "CQ_ERR",
    "QP_FATAL",
    "QP_REQ_ERR",
    "QP_ACCESS_ERR",
    "COMM_EST",
    "SQ_DRAINED",
    "PATH_MIG",
    "PATH_MIG_ERR",
    "DEVICE_FATAL",
    "PORT_ACTIVE",
    "PORT_ERR",
    "LID_CHANGE",
    "PKEY_CHANGE",
    "SM_CHANGE",
    "SRQ_ERR",
    "SRQ_LIMIT_REACHED",
    "QP_LAST_WQE_REACHED",
    "CLIENT_REREGISTER",
    "GID_CHANGE",
    "WQ_FATAL",
)


class Scope(enum.IntEnum):
    """What an event is about; the values are those of verbs.h's RX_OF_..."""

    DEVICE = 0
    PORT = 1
    QP = 2
    CQ = 3


class Event(NamedTuple):
    name: str
    """As in `enum ibv_event_type`, without IBV_EVENT_."""
    scope: Scope
    port: int
    qp_num: int
    cq: int

    def concerns(self, endpoint: Endpoint) -> bool:
        """Whether this is about one of the endpoint's queue pairs, or its completion queue."""
        if self.scope is Scope.QP:
            return any(each.qp_num == self.qp_num for each in endpoint.address.queue_pairs)
        return self.scope is Scope.CQ and self.cq == endpoint.cq


class Events(Owner):
    """The events of the device that `pd` is on. `fd` is readable when there are some. They last as long as the Domain."""

    def __init__(self, pd: ProtectionDomain) -> None:
        super().__init__(pd.domain)
        self.domain = pd.domain
        module = native.extension()
        self._ffi, self._lib = module.ffi, module.lib
        self._error = self._ffi.new("rx_error *")
        self._event = self._ffi.new("rx_async *")
        self._context = self._lib.rx_context(self._ffi.cast("void *", pd.pointer))
        self.fd: int = native.check(self._lib.rx_async_fd(self._context, self._error), self._error)
        self._opened()

    def __repr__(self) -> str:
        return f"<Events of {self.domain.name}>"

    def take(self) -> list[Event]:
        """Those that have come. Raises VerbsError when none will ever come: the device has gone."""
        self._check_open()
        found: list[Event] = []
        while True:
            rc = self._lib.rx_async_get(native.library(), self._context, self._event, self._error)
            if rc < 0 and found:
                return found  # the next call fails again
            if native.check(rc, self._error) == 0:
                return found
            event = self._event
            name = _NAMES[event.type] if event.type < len(_NAMES) else f"event {event.type}"
            found.append(Event(name, Scope(event.scope), event.port_num, event.qp_num, event.cq))

    def _destroy(self) -> None:
        """The file descriptor is the Domain's."""
