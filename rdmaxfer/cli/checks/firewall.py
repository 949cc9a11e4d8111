"""Whether a firewall of this machine drops RoCE, which comes as UDP packets for one port.

What can be read of it without root is little; that a frame arrives (`--peer`) says more. Rules that jump to other chains are not
followed: this finds what commonly is in the way, and does not prove that nothing is.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from rdmaxfer.cli.checks.finding import Check
from rdmaxfer.fabric.route import ROCE_V2_PORT

NAME = "firewall"
TOOL_S = 10.0

Run = Callable[..., "str | None"]


def run(*command: str) -> str | None:
    """What a command prints; None if it is not there, or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def firewall(ask: Run = run) -> Check:
    for each in (_firewalld, _ufw, _nftables, _iptables):
        found = each(ask)
        if found is not None:
            return found
    return Check(NAME, "note", f"none was found that could be read; RoCE comes by UDP port {ROCE_V2_PORT}")


def _firewalld(ask: Run) -> Check | None:
    if (ask("firewall-cmd", "--state") or "").strip() != "running":
        return None
    if (ask("firewall-cmd", f"--query-port={ROCE_V2_PORT}/udp") or "").strip() == "yes":
        return _open("firewalld")
    return Check(
        NAME,
        "warning",
        f"firewalld is running and does not let in UDP port {ROCE_V2_PORT}, by which RoCE comes from other machines",
        f"sudo firewall-cmd --permanent --add-port={ROCE_V2_PORT}/udp && sudo firewall-cmd --reload.",
    )


def _ufw(ask: Run) -> Check | None:
    status = ask("ufw", "status") or ""
    if "Status: active" not in status:
        return None
    if any(
        line.split()[:2] in ([f"{ROCE_V2_PORT}/udp", "ALLOW"], [str(ROCE_V2_PORT), "ALLOW"])
        for line in status.splitlines()
    ):
        return _open("ufw")
    return Check(
        NAME,
        "warning",
        f"ufw is active and has no rule for UDP port {ROCE_V2_PORT}, by which RoCE comes from other machines",
        f"sudo ufw allow {ROCE_V2_PORT}/udp.",
    )


def _nftables(ask: Run) -> Check | None:
    text = ask("nft", "-j", "list", "ruleset")
    if not text:
        return None
    try:
        items = json.loads(text)["nftables"]
    except (ValueError, KeyError):
        return None
    inputs = {}
    for item in items:
        chain = item.get("chain")
        if chain and chain.get("hook") == "input" and chain.get("type") == "filter":
            inputs[chain["family"], chain["table"], chain["name"]] = chain.get("policy", "accept")
    if not inputs:
        return None
    for place, policy in inputs.items():
        verdict, handle = _verdict(item["rule"] for item in items if "rule" in item and _place(item["rule"]) == place)
        family, table, name = place
        if verdict == "drop":
            return Check(
                NAME,
                "warning",
                f"a rule of nftables (table {family} {table}, chain {name}) drops UDP port {ROCE_V2_PORT}, by which RoCE comes",
                f"sudo nft delete rule {family} {table} {name} handle {handle}.",
            )
        if verdict is None and policy == "drop":
            return Check(
                NAME,
                "warning",
                f"nftables (table {family} {table}, chain {name}) drops what comes in, and has no rule for UDP port "
                f"{ROCE_V2_PORT}, by which RoCE comes",
                f"sudo nft insert rule {family} {table} {name} udp dport {ROCE_V2_PORT} accept.",
            )
    return _open("nftables")


def _place(rule: dict[str, Any]) -> tuple[str, str, str]:
    return rule["family"], rule["table"], rule["chain"]


def _verdict(rules: Iterator[dict[str, Any]]) -> tuple[str | None, int]:
    """What the first rule about our port, or about all UDP ports or all packets, does."""
    for rule in rules:
        terms = rule.get("expr", [])
        matches = [term["match"] for term in terms if "match" in term]
        ends = {"accept", "drop", "reject"}.intersection(key for term in terms for key in term)
        if not ends or not all(_matches(match) for match in matches):
            continue
        return ("accept" if "accept" in ends else "drop"), int(rule.get("handle", 0))
    return None, 0


def _matches(match: dict[str, Any]) -> bool:
    payload = match.get("left", {}).get("payload", {}) if isinstance(match.get("left"), dict) else {}
    if (
        match.get("op") not in ("==", "in")
        or payload.get("protocol") not in ("udp", "th")
        or payload.get("field") != "dport"
    ):
        return False
    right = match.get("right")
    values = right.get("set", [right]) if isinstance(right, dict) else [right]
    for value in values:
        if isinstance(value, dict) and "range" in value:
            low, high = value["range"]
            if low <= ROCE_V2_PORT <= high:
                return True
        elif value == ROCE_V2_PORT:
            return True
    return False


def _iptables(ask: Run) -> Check | None:
    text = ask("iptables", "-S", "INPUT")
    if not text:
        return None
    lines = text.splitlines()
    about = [line for line in lines if "-p udp" in line and f"--dport {ROCE_V2_PORT}" in line]
    if about and "-j ACCEPT" not in about[0]:
        return Check(
            NAME,
            "warning",
            f"a rule of iptables drops UDP port {ROCE_V2_PORT}, by which RoCE comes",
            f"sudo iptables {about[0].replace('-A ', '-D ', 1)}.",
        )
    if not about and "-P INPUT DROP" in lines:
        return Check(
            NAME,
            "warning",
            f"iptables drops what comes in, and has no rule for UDP port {ROCE_V2_PORT}, by which RoCE comes",
            f"sudo iptables -I INPUT -p udp --dport {ROCE_V2_PORT} -j ACCEPT.",
        )
    return _open("iptables")


def _open(what: str) -> Check:
    return Check(NAME, "ok", f"{what} has nothing against UDP port {ROCE_V2_PORT}, by which RoCE comes")
