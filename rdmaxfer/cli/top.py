"""`rdmaxfer top`: what all Senders and Receivers on this machine are doing."""

from __future__ import annotations

import argparse
import json
import math
import os
import pwd
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rdmaxfer import status
from rdmaxfer.cli import options
from rdmaxfer.cli.failure import CommandError, Exit, printable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

HELP = "watch all senders and receivers on this machine"
DESCRIPTION = """\
Show all senders and receivers that run on this machine as this user (if that is root, as any): who they are connected with
and by what, frames and megabytes a second, how full their rings are, how old frames are when they are taken, what was dropped.

They say so themselves, when they are asked; nothing has to be switched on. Ctrl-C ends it.
"""
EXAMPLES = """\
examples:
  rdmaxfer top
  rdmaxfer top --once              print it once
  rdmaxfer top --json              for programs; totals since each began
"""

Known = dict[str, Any]

PROGRAM_WIDTH = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="look twice, print once, end")
    parser.add_argument("--json", action="store_true", help="look once, print JSON, end")
    parser.add_argument("--every", metavar="S", type=options.positive, default=1.0, help="seconds between looks (1)")


def run(args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps(list(status.find()), indent=2))
        return Exit.OK
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        raise CommandError("this needs the package rich.", fix="pip install 'rdmaxfer[top]', or --json.") from None
    console = Console(width=None if sys.stdout.isatty() else max(120, shutil.get_terminal_size().columns))
    before = look()
    if args.once or not sys.stdout.isatty():  # into a file or a pipe: one after the other
        while True:
            time.sleep(args.every)
            now = look()
            console.print(screen(rows(now, before)))
            if args.once:
                return Exit.OK
            sys.stdout.flush()
            before = now
    with Live(screen(rows(before, {})), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(args.every)
            now = look()
            live.update(screen(rows(now, before)), refresh=True)
            before = now


def look() -> dict[tuple[Any, ...], Known]:
    """What all say, by process and beginning."""
    return {(each["pid"], each["role"], each["since_s"]): each for each in status.find()}


class Row(NamedTuple):
    """One sender or receiver, as text."""

    pid: str
    user: str
    what: str
    program: str
    peers: str
    frames: str
    rate: str
    ring: str
    latency: str
    lost: str


HEADINGS = Row(
    "PID",
    "user",
    "is a",
    "program",
    "connected with, by",
    "frames/s",
    "MB/s",
    "ring",
    "latency ms: median, 99\u00a0%",
    "dropped, missed",
)


def rows(now: dict[tuple[Any, ...], Known], before: dict[tuple[Any, ...], Known]) -> list[Row]:
    """One for each, with rates since `before`."""
    return [row(known, before.get(key)) for key, known in sorted(now.items())]


def row(known: Known, earlier: Known | None) -> Row:
    found = known.get("statistics")
    begin = (str(known["pid"]), user(known["uid"]), str(known["role"]), printable(program(known["program"])))
    if found is None:
        return Row(*begin, "busy", "", "", "", "", "")
    frames = rate_MBps = math.nan
    if earlier is not None and "statistics" in earlier and known["at_s"] > earlier["at_s"]:
        seconds = known["at_s"] - earlier["at_s"]
        frames = (found["frames"] - earlier["statistics"]["frames"]) / seconds
        rate_MBps = (found["bytes"] - earlier["statistics"]["bytes"]) / seconds / 1e6
    held = found["unreleased"] if known["role"] == "sender" else found["leased"]
    latency = found.get("push_to_recv")
    lost = found["dropped"] + found["unheard"] if known["role"] == "sender" else found["missed"]
    return Row(
        *begin,
        peers(known),
        number(frames),
        number(rate_MBps),
        f"{held} of {known['slots'] * max(1, len(known['links']) if known['role'] == 'receiver' else 1)}",
        f"{latency['median_s'] * 1e3:.3g}, {latency['p99_s'] * 1e3:.3g}" if latency else "",
        str(lost) if lost else "",
    )


def peers(known: Known) -> str:
    links = [printable(f"{link['peer']} {link['fabric']}") for link in known["links"]]
    waiting = known["statistics"]["reconnecting"]
    if waiting:
        links.append(f"{waiting} to come back")
    if not links:
        links = [f"nobody yet, at {endpoint}" for endpoint in known["endpoints"]] or ["nobody"]
    return "\n".join(links[:4]) + (f"\nand {len(links) - 4} more" if len(links) > 4 else "")


def program(arguments: list[str]) -> str:
    if not arguments or not arguments[0]:
        return "python"
    first = Path(arguments[0])
    name = first.parent.name if first.name == "__main__.py" else first.name
    text = " ".join([name, *arguments[1:]])
    return text if len(text) <= PROGRAM_WIDTH else f"{text[: PROGRAM_WIDTH - 1]}\u2026"


def user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def screen(found: list[Row]) -> Table | Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not found:
        return Group(
            Text("No sender or receiver runs on this machine" + (" as this user." if os.geteuid() else ".")),
            Text("Start one, for instance:  rdmaxfer recv tcp://0.0.0.0:7471"),
        )
    table = Table(expand=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in ("PID", "frames/s", "MB/s", "ring") else "left")
    for each in found:
        style = "yellow" if each.lost else ""
        table.add_row(*(Text(cell, style=style if cell is each.lost else "") for cell in each))
    return table
