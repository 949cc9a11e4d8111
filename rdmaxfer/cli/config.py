"""`rdmaxfer config`: what a compiler needs to know to build C and C++ programs that fill frames."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rdmaxfer.cli.failure import Exit

HELP = "what a C or C++ compiler needs to know"
DESCRIPTION = """\
Print options for a C or C++ compiler, to build programs that fill frames for a Python process (rdmaxfer.h, Sender.intake).
"""
EXAMPLES = """\
examples: linked; and opened late, so that the program also runs where there is no rdmaxfer
  cc capture.c $(rdmaxfer config --cflags --libs) -o capture
  c++ capture.cpp $(rdmaxfer config --cflags) -ldl -o capture
  ./capture "$(rdmaxfer config --library)"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cflags", action="store_true", help="where rdmaxfer.h is")
    parser.add_argument("--libs", action="store_true", help="how to link librdmaxfer_shm, and find it at run time")
    parser.add_argument("--library", action="store_true", help="the path of librdmaxfer_shm, for dlopen(3)")


def run(args: argparse.Namespace) -> int:
    package = Path(__file__).parents[1]
    library = package / "lib" / "librdmaxfer_shm.so"
    if not library.is_file():
        raise FileNotFoundError(
            f"{library} is not there: rdmaxfer was installed without a C compiler. Fix: install one (apt: gcc python3-dev; "
            "dnf: gcc python3-devel), then reinstall rdmaxfer."
        )
    if not (args.cflags or args.libs or args.library):
        print(f"header    {package / 'include' / 'rdmaxfer.h'}\nlibrary   {library}")
        return Exit.OK
    words: list[str] = []
    if args.cflags:
        words += [f"-I{package / 'include'}"]
    if args.libs:
        words += [f"-L{library.parent}", f"-Wl,-rpath,{library.parent}", "-lrdmaxfer_shm"]
    if args.library:
        words += [str(library)]
    print(shlex.join(words))
    return Exit.OK
