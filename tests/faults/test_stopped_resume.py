"""Processes that stand still beyond the lease, with reconnecting: when they go on, so does the stream, with every frame."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import wait_until
from streams import States
from test_stopped import both_agree, stream

BINDS = pytest.mark.parametrize("bind", ["sender", "receiver"])
OPTIONS: dict[str, Any] = {"lease_s": 1.0, "slots": 8, "reconnect_s": 60.0}


@BINDS
@pytest.mark.parametrize("kind", ["sender", "receiver"])
def test_a_process_that_stands_still_for_longer_than_the_lease_comes_back(kind: str, bind: str) -> None:
    told = States()
    with stream(kind, bind, OPTIONS, on_state=told) as (node, here, other):
        for turn in range(1, 4):
            other.stop()
            wait_until(lambda turn=turn: told.names.count("reconnecting") >= turn, "this side has missed it")
            other.go_on()
            wait_until(lambda: told.names[-1] == "connected", "it is back")
            here.goes_on()
        statistics = node.statistics()
        assert statistics.reconnects >= 3
        assert statistics.peers_lost == 0
        result = both_agree(here, other, kind)
        assert result["reconnects"] >= 3
