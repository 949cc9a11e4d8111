"""The parser of the `rdmaxfer` command, and `main`."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

import rdmaxfer
from rdmaxfer.cli import bench, config, demo, devices, doctor, keygen, record, recv, replay, send, top
from rdmaxfer.cli.failure import EXIT_CODES, report

DESCRIPTION = """\
Send images and other numpy arrays from one process to another, on the same machine or over the network, by RDMA: the
network card (or Linux's software one, Soft-RoCE) places each frame straight into the receiver's memory.

New here? Begin with these, in this order:

  rdmaxfer doctor     is all there that this machine needs? If not, how to get it?
  rdmaxfer demo       move real photographs between two processes on this machine
"""

EXAMPLES = """\
examples: photos from one machine to another, whose address is 10.0.0.2
  receiver$  rdmaxfer recv tcp://0.0.0.0:7471 --out received --verify
  sender$    rdmaxfer send tcp://10.0.0.2:7471 photos/*.jpg
"""
WIDEST = 100


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rdmaxfer",
        description=layout(DESCRIPTION),
        epilog=layout(f"{EXAMPLES}\n{EXIT_CODES}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rdmaxfer {rdmaxfer.__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=["bash", "zsh"],
        help='print what makes this shell complete rdmaxfer\'s arguments, as in: eval "$(rdmaxfer --print-completion bash)"',
    )
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (doctor, devices, demo, send, recv, top, record, replay, bench, keygen, config):
        sub = subcommands.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.HELP,
            description=layout(command.DESCRIPTION),
            epilog=layout(f"{command.EXAMPLES}\n{EXIT_CODES}"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("-v", "--verbose", action="store_true", help="also say what is going on, on stderr")
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


class PrintCompletion(argparse.Action):
    """As `--version` does, but prints a script for a shell. Needs shtab, and only then."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any, **_: Any) -> NoReturn:
        try:
            import shtab
        except ImportError:
            print(
                "rdmaxfer: completion needs the package shtab. Fix: pip install 'rdmaxfer[completion]'.",
                file=sys.stderr,
            )
            parser.exit(1)
        print(shtab.complete(parser, arguments[1]))
        parser.exit(0)


def layout(text: str) -> str:
    """Fill paragraphs to the width of the terminal, and leave those with indented lines as they are."""
    width = min(WIDEST, shutil.get_terminal_size().columns - 2)
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(each if "\n  " in f"\n{each}" else textwrap.fill(each, width) for each in paragraphs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        parser = make_parser()
        args, rest = parser.parse_known_args(argv)
        # argparse takes no sources at all where an option stands between the endpoint and them.
        if rest and (not hasattr(args, "sources") or any(each.startswith("-") for each in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            args.sources += rest
    except SystemExit as stop:  # --help, or argparse has explained what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="rdmaxfer: %(message)s")
    try:
        code: int = args.run(args)
        return code
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
