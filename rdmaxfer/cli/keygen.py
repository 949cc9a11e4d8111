"""`rdmaxfer keygen`: make a pair of CURVE keys."""

from __future__ import annotations

import argparse
from pathlib import Path

from rdmaxfer.cli.failure import Exit

HELP = "make a pair of keys, so that only known peers can connect"
DESCRIPTION = """\
Make a pair of keys: NAME.key, which you may give to everybody, and NAME.key_secret, which stays with its owner.

With keys, the two sides know each other when they connect, and what they say then is encrypted. The frames themselves are
not: the network that carries them must be trusted (see docs/security.md). Each side needs a pair of its own.
"""
EXAMPLES = """\
examples: one pair for each machine, then a directory with the key of the camera at the receiver
  receiver$  rdmaxfer keygen receiver
  camera$    rdmaxfer keygen camera
  receiver$  mkdir allowed; scp camera:camera.key allowed/
  camera$    scp receiver:receiver.key .
  receiver$  rdmaxfer recv tcp://0.0.0.0:7471 --secret-key receiver.key_secret --allowed-keys allowed
  camera$    rdmaxfer send tcp://10.0.0.2:7471 photos/ --secret-key camera.key_secret --peer-key receiver.key
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", type=Path, help="of the two files, without their endings; may have a directory"
    )


def run(args: argparse.Namespace) -> int:
    from rdmaxfer.cm.curve import make_keys

    public, secret = make_keys(args.name)
    print(f"{public} is for everybody: give it to your peers, who put it into their directory of allowed keys.")
    print(f"{secret} is yours alone: keep it where it is.")
    return Exit.OK
