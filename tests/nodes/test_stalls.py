"""Connections whose data plane has stopped for good while the control plane lives: leases are renewed, but no frame moves.

rxe of Linux 6.1 repeats for ever when retry_cnt is 7; a queue pair that couldn't send one packet because the card
was down does not send any more, without a completion or an event for it; one whose packets have become too large for the card tries
to send the first of them for ever, in a softirq that leaves next to nothing of its CPU to programs: the nodes need two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

MakeStream = Callable[..., Any]

BINDS = pytest.mark.parametrize("bind", ["sender", "receiver"])

FRAMES = 300


@BINDS
@pytest.mark.parametrize("node", [1, 2])
def test_a_card_that_is_down(bind: str, node: int, wire: Any, make_stream: MakeStream) -> None:
    """The port of one side's device is down for less than a lease."""
    stream = make_stream(bind, FRAMES)
    stream.arrived(FRAMES // 3)
    wire.down(node)
    time.sleep(3)  # the outage, not a wait
    assert len(stream.rx.log()) < FRAMES, "the stream was over when the card went down"
    wire.up(node)
    stream.arrives_whole()


@BINDS
def test_a_smaller_mtu_in_mid_stream(bind: str, wire: Any, make_stream: MakeStream) -> None:
    wire.mtu(4200)
    stream = make_stream(bind, FRAMES)
    stream.arrived(FRAMES // 3)
    wire.mtu(1500)
    assert len(stream.rx.log()) < FRAMES, "the stream was over when the MTU changed"
    stream.arrives_whole()
    assert stream.tx.statistics()["reconnects"] >= 1
