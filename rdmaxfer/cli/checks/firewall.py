"""Whether a firewall of this machine drops RoCE, which comes as UDP packets for one port.

What can be read of it without root is little; that a frame arrives (`--peer`) says more. Rules that jump to other chains are not
followed: this finds what commonly is in the way, and does not prove that nothing is.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
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
    is_open = (ask("firewall-cmd", f"--query-port={ROCE_V2_PORT}/udp") or "").strip() == "yes"
    if is_open or re.search(r"^\s*target: ACCEPT$", ask("firewall-cmd", "--list-all") or "", re.MULTILINE):
        return _open("firewalld")
    return _shut(
        f"firewalld is running and does not let in UDP port {ROCE_V2_PORT}, by which RoCE comes from other machines",
        f"sudo firewall-cmd --permanent --add-port={ROCE_V2_PORT}/udp && sudo firewall-cmd --reload.",
    )


def _ufw(ask: Run) -> Check | None:
    status = ask("ufw", "status", "verbose") or ""
    if "Status: active" not in status:
        return None
    by_default = re.search(r"^Default: (\w+) \(incoming\)", status, re.MULTILINE)
    verdict, command = (by_default[1].upper() if by_default else "DENY"), "allow"
    for line in status.splitlines():  # the first rule about the port decides
        rule = re.match(r"(?:(\d+)(?::(\d+))?(?:/udp)?|Anywhere)\s+(ALLOW|DENY|REJECT)\b", line)
        if rule and (rule[1] is None or int(rule[1]) <= ROCE_V2_PORT <= int(rule[2] or rule[1])):
            verdict = rule[3]
            if rule[1] != str(ROCE_V2_PORT):  # that one `ufw allow` would change, and this one it would come after
                command = "insert 1 allow"
            break
    if verdict == "ALLOW":
        return _open("ufw")
    return _shut(
        f"ufw is active and does not let in UDP port {ROCE_V2_PORT}, by which RoCE comes from other machines",
        f"sudo ufw {command} {ROCE_V2_PORT}/udp.",
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
        rules = [item["rule"] for item in items if "rule" in item and _place(item["rule"]) == place]
        verdict = next((found for rule in rules if (found := _verdict(rule.get("expr", [])))), policy)
        if verdict != "accept":
            family, table, name = place
            return _shut(
                f"nftables (table {family} {table}, chain {name}) drops UDP port {ROCE_V2_PORT}, by which RoCE comes",
                f"sudo nft insert rule {family} {table} {name} udp dport {ROCE_V2_PORT} accept.",
            )
    return _open("nftables")


def _place(rule: dict[str, Any]) -> tuple[str, str, str]:
    return rule["family"], rule["table"], rule["chain"]


def _verdict(terms: list[Any]) -> str | None:
    """What a rule does with our packets: "accept" or "drop"; None if it is not about them, or it can't be told."""
    verdict = None
    for term in terms:
        if not isinstance(term, dict) or len(term) != 1:
            return None
        (kind,) = term
        if kind == "match":
            if not _matches(term["match"]):
                return None
        elif kind in ("accept", "drop", "reject"):
            verdict = "accept" if kind == "accept" else "drop"
        elif kind == "xt":  # by iptables
            match term["xt"]:
                case {"type": "match", "name": "comment"}:
                    pass
                case {"type": "target", "name": "REJECT" | "DROP"}:
                    verdict = "drop"
                case _:
                    return None
        elif kind not in ("counter", "log"):
            return None
    return verdict


def _matches(match: dict[str, Any]) -> bool:
    """Whether a term is true of our packets whatever else is in them."""
    left = match.get("left")
    if match.get("op") not in ("==", "in") or not isinstance(left, dict):
        return False
    payload = left.get("payload", {})
    right = match.get("right")
    values = right.get("set", [right]) if isinstance(right, dict) else [right]
    if left.get("meta", {}).get("key") == "l4proto" or payload.get("field") in ("protocol", "nexthdr"):
        return "udp" in values or 17 in values
    if payload.get("protocol") not in ("udp", "th") or payload.get("field") != "dport":
        return False
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
    policy = "DROP" if "-P INPUT DROP" in lines else "ACCEPT"
    verdict = next((found for line in lines if (found := _iptables_verdict(line))), policy)
    if verdict == "ACCEPT":
        return _open("iptables")
    return _shut(
        f"iptables drops UDP port {ROCE_V2_PORT}, by which RoCE comes",
        f"sudo iptables -I INPUT -p udp --dport {ROCE_V2_PORT} -j ACCEPT.",
    )


def _iptables_verdict(line: str) -> str | None:
    """As `_verdict`, of a line of iptables(8): ACCEPT, DROP or REJECT."""
    rule = re.fullmatch(
        r"-A INPUT(?: -p udp(?: -m udp(?: --dport (\d+)(?::(\d+))?)?)?)?(?: -m comment --comment (?:\w+|\".*\"))?"
        r" -j (ACCEPT|DROP|REJECT)(?: --reject-with \S+)?",
        line,
    )
    if rule is None or (rule[1] and not int(rule[1]) <= ROCE_V2_PORT <= int(rule[2] or rule[1])):
        return None
    return rule[3]


def _open(what: str) -> Check:
    return Check(NAME, "ok", f"{what} has nothing against UDP port {ROCE_V2_PORT}, by which RoCE comes")


def _shut(detail: str, fix: str) -> Check:
    return Check(NAME, "warning", detail, fix)
