"""`rdmaxfer doctor --peer` between two machines, one of which has a firewall that drops RoCE; mended by what doctor says there."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

import pytest

from rdmaxfer.cli.checks import peer

WANTED = {"device": None, "port": None, "gid_index": None}
TIMEOUT_S = 60.0
LOOK = "import json; from rdmaxfer.cli.checks import firewall; print(json.dumps(firewall.firewall()._asdict()))"
ADD_CHAIN = ("nft", "add", "chain", "inet", "guard", "input")


def probe(endpoint: str) -> Any:
    """The last step that it came to."""
    steps = list(peer.examine(endpoint, WANTED, fabric="verbs"))
    print(*steps, sep="\n")
    return steps[-1]


@pytest.mark.parametrize(
    ("policy", "rules"),
    [
        ("accept", ["udp dport 4791 drop"]),
        ("drop", ["iifname != wire0 accept", "meta l4proto { tcp, icmp, icmpv6 } accept"]),
    ],
)
def test_a_firewall_that_drops_roce(policy: str, rules: list[str], wire: Any, remote: Any) -> None:
    there = wire.ends[1]
    receiving = remote.Receiving({})
    try:
        endpoint = receiving.bind("tcp://192.168.78.2:*")
        receiving.start()
        assert probe(endpoint).status == "ok"
        there.run("nft", "add", "table", "inet", "guard")
        there.run(*ADD_CHAIN, "{ type filter hook input priority 0; policy accept; }")
        for rule in rules:
            there.run("nft", "add", "rule", "inet", "guard", "input", *shlex.split(rule))
        there.run(*ADD_CHAIN, f"{{ policy {policy}; }}")  # not before: what is said to this node would be dropped, too
        found = probe(endpoint)
        assert (found.name, found.status) == ("frames", "failed")
        assert "UDP port 4791" in found.fix
        said = json.loads(there.run(sys.executable, "-c", LOOK))
        assert said["status"] == "warning"
        there.run(*shlex.split(said["fix"].rstrip(".").removeprefix("sudo ")))
        assert json.loads(there.run(sys.executable, "-c", LOOK))["status"] == "ok"
        found = probe(endpoint)
        assert (found.name, found.status) == ("frames", "ok")
    finally:
        there.run("nft", "flush", "ruleset")
        receiving.close()
