"""The command line. `main` is what the `rdmaxfer` script calls; each subcommand is one file here."""

from rdmaxfer.cli.app import main

__all__ = ["main"]
