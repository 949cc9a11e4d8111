"""`rdmaxfer doctor`: is everything there, and if not, how to get it."""

from __future__ import annotations

import argparse
import json
import sys

from rdmaxfer.cli import checks, options
from rdmaxfer.cli.failure import Exit

HELP = "check this machine, and say how to repair it"
DESCRIPTION = """\
Check all that rdmaxfer needs on this machine, from the libraries up to a frame sent through the device to itself.

Each line begins with a mark: \u2713 is fine; ! works, but is slow or limited; \u2717 does not work, and the line below
it says what to do. Run it on both machines when a connection does not come about. It changes nothing.
"""
EXAMPLES = """\
examples:
  rdmaxfer doctor
  rdmaxfer doctor --device rxe0
  rdmaxfer doctor --json           for programs
"""
MARKS = {"ok": "\u2713", "warning": "!", "failed": "\u2717"}
PLAIN_MARKS = {"ok": "+", "warning": "!", "failed": "x"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    options.add_device_options(parser)


def run(args: argparse.Namespace) -> int:
    found: list[checks.Check] = []
    for check in checks.examine(options.device_arguments(args)):
        found.append(check)
        if not args.json:  # at once: one of them may take seconds
            print(describe(check, _marks()), flush=True)
    if args.json:
        print(json.dumps([check._asdict() for check in found], indent=2))
    failed = sum(check.status == "failed" for check in found)
    if not args.json:
        print(
            "\nEverything that rdmaxfer needs is there."
            if not failed
            else "\nRepair what is marked, from the top down."
        )
    return Exit.FAILED if failed else Exit.OK


def describe(check: checks.Check, marks: dict[str, str]) -> str:
    line = f"{marks[check.status]} {check.name}: {check.detail}"
    return f"{line}\n    Fix: {check.fix}" if check.fix else line


def _marks() -> dict[str, str]:
    try:
        "".join(MARKS.values()).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return PLAIN_MARKS
    return MARKS
