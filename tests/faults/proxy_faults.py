"""The faults that the tests of the control plane inject, and how each can be seen to have happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
from helpers import wait_until
from tcp_proxy import TO_BOUND, TO_CONNECTING, Counts, TcpProxy

MIDDLE = 40
"""So many bytes of a message still pass: its envelope and the prefix have passed then, and its end has not."""


class Fault(NamedTuple):
    name: str
    begin: Callable[[TcpProxy], object]
    seen: Callable[[Counts], int]
    """Above what it was before, once it has happened."""

    def inject(self, proxy: TcpProxy) -> None:
        """Begin, and wait until it has hit somebody."""
        before = self.seen(proxy.counts())
        self.begin(proxy)
        wait_until(lambda: self.seen(proxy.counts()) > before, f"{self.name}: it happened")


def _cut(reset: bool) -> Callable[[TcpProxy], object]:
    return lambda proxy: proxy.cut(reset=reset)


def _nobody_there(proxy: TcpProxy) -> None:
    proxy.refuse()
    proxy.cut()


def _turned_away(proxy: TcpProxy) -> None:
    proxy.turn_away()
    proxy.cut(reset=False)


def _dropped(counts: Counts) -> int:
    return counts.dropped_bytes


def _held(counts: Counts) -> int:
    return counts.held_bytes


LASTING = [
    Fault("drop requests", lambda proxy: proxy.drop(TO_BOUND), _dropped),
    Fault("drop replies", lambda proxy: proxy.drop(TO_CONNECTING), _dropped),
    Fault("drop both", lambda proxy: proxy.drop(), _dropped),
    Fault("drop in mid-request", lambda proxy: proxy.drop(TO_BOUND, after=MIDDLE), _dropped),
    Fault("drop in mid-reply", lambda proxy: proxy.drop(TO_CONNECTING, after=MIDDLE), _dropped),
    Fault("stall requests", lambda proxy: proxy.stall(TO_BOUND), _held),
    Fault("stall replies", lambda proxy: proxy.stall(TO_CONNECTING), _held),
    Fault("stall both", lambda proxy: proxy.stall(), _held),
    Fault("stall in mid-request", lambda proxy: proxy.stall(TO_BOUND, after=MIDDLE), _held),
    Fault("stall in mid-reply", lambda proxy: proxy.stall(TO_CONNECTING, after=MIDDLE), _held),
    Fault("truncate requests", lambda proxy: proxy.truncate(MIDDLE, TO_BOUND), lambda counts: counts.truncated),
    Fault("truncate replies", lambda proxy: proxy.truncate(MIDDLE, TO_CONNECTING), lambda counts: counts.truncated),
    Fault("refuse", _nobody_there, lambda counts: counts.cut),
    Fault("turn away", _turned_away, lambda counts: counts.turned_away),
]
"""They last until `resume`, and nothing gets through meanwhile, in one direction at least."""

PASSING = [
    Fault("reset", _cut(reset=True), lambda counts: counts.cut),
    Fault("finish", _cut(reset=False), lambda counts: counts.cut),
    Fault("delay", lambda proxy: proxy.delay(0.1), lambda counts: counts.delayed),
    Fault("lose a request", lambda proxy: proxy.lose("renew", 1), lambda counts: counts.lost["renew"]),
    Fault("lose a reply", lambda proxy: proxy.lose("renewed", 1), lambda counts: counts.lost["renewed"]),
]
"""They are over at once, or do not keep anything from getting through."""


def each(faults: list[Fault]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults, ids=lambda fault: fault.name.replace(" ", "-"))
