"""`rdmaxfer doctor`: is everything there, and if not, how to get it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from rdmaxfer.cli import checks, options
from rdmaxfer.cli.checks import memory, peer
from rdmaxfer.cli.failure import Exit

HELP = "check this machine, and say how to repair it"
DESCRIPTION = """\
Check all that rdmaxfer needs on this machine, from the libraries up to a frame sent through the device to itself.

Each line begins with a mark: \u2713 is fine; i is good to know; ! works, but is slow or limited; \u2717 does not work. The
line below it says what to do. Run it on both machines when a connection does not come about. It changes nothing.

With --peer it then tries the way to another machine: name, route and device, TCP, the handshake, and two frames that a
receiver there has to take (they say "rdmaxfer doctor" in their metadata). Start that receiver first:

  there$  rdmaxfer recv tcp://0.0.0.0:7471 --verify
  here$   rdmaxfer doctor --peer tcp://THERE:7471
"""
EXAMPLES = """\
examples:
  rdmaxfer doctor
  rdmaxfer doctor --peer tcp://10.0.0.2:7471
  rdmaxfer doctor --device rxe0 --slots 64 --slot-bytes 8M
  rdmaxfer doctor --json           for programs
"""
NO_DEVICE = {"pyverbs", "libibverbs", "kernel", "device"}
"""The checks without which there is no RDMA, but all else works."""
MARKS = {"ok": "\u2713", "note": "i", "warning": "!", "failed": "\u2717"}
PLAIN_MARKS = {"ok": "+", "note": "i", "warning": "!", "failed": "x"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--peer", metavar="ENDPOINT", help="also try the way to the receiver at ENDPOINT, as in tcp://10.0.0.2:7471"
    )
    parser.add_argument(
        "--slot-bytes", metavar="SIZE", type=options.size, default=1 << 20, help="size of the frames to come (1M)"
    )
    options.add_slot_option(parser)
    group = parser.add_argument_group("keys", "For --peer, if the receiver there uses them (see `rdmaxfer keygen`).")
    group.add_argument("--secret-key", metavar="FILE", help="this side's own NAME.key_secret")
    group.add_argument("--peer-key", metavar="FILE", help="NAME.key of the receiver")
    options.add_fabric_option(parser)
    options.add_device_options(parser)


def run(args: argparse.Namespace) -> int:
    found: list[checks.Check] = []
    for check in _examine(args):
        found.append(check)
        if not args.json:  # at once: one of them may take seconds
            print(describe(check, _marks()), flush=True)
    if args.json:
        print(json.dumps([check._asdict() for check in found], indent=2))
    failed = sum(check.status == "failed" for check in found)
    if not args.json:
        print(f"\n{_verdict(args, found)}")
    return Exit.FAILED if failed else Exit.OK


def _examine(args: argparse.Namespace) -> Iterator[checks.Check]:
    wanted = options.device_arguments(args)
    yield from checks.examine(wanted, memory.ring_bytes(args.slots, args.slot_bytes))
    if args.peer is not None:
        yield from peer.examine(
            args.peer, wanted, fabric=args.fabric, secret_key=args.secret_key, peer_key=args.peer_key
        )


def _verdict(args: argparse.Namespace, found: list[checks.Check]) -> str:
    bad = {check.name for check in found if check.status == "failed"}
    if bad:
        advice = "Repair what is marked, from the top down."
        if NO_DEVICE & bad and "native core" not in bad and args.device is None and args.peer is None:
            advice += (
                " Until then frames go by shared memory within this machine, and over TCP to others, which is slower."
            )
        return advice
    if args.peer is not None:
        return f"Everything that rdmaxfer needs is there, and frames reach {args.peer}."
    return "Everything that rdmaxfer needs is there."


def describe(check: checks.Check, marks: dict[str, str]) -> str:
    line = f"{marks[check.status]} {check.name}: {check.detail}"
    return f"{line}\n    Fix: {check.fix}" if check.fix else line


def _marks() -> dict[str, str]:
    try:
        "".join(MARKS.values()).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return PLAIN_MARKS
    return MARKS
