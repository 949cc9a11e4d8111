"""How a command fails: exit codes, and errors as one paragraph for people."""

from __future__ import annotations

import enum
import os
import sys
import traceback

from rdmaxfer.errors import (
    ConnectTimeout,
    CurveError,
    EndpointError,
    NoDevice,
    RdmaxferError,
    Refused,
    VerbsUnavailable,
)

DEBUG = "RDMAXFER_DEBUG"


class Exit(enum.IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    NO_DEVICE = 3
    NO_PEER = 4
    NOT_VERIFIED = 5
    INTERRUPTED = 130


EXIT_CODES = f"""\
exit codes: 0 all went well; 1 the operation failed; 2 wrong arguments; 3 no usable RDMA device or library; 4 the peer
was not reached, or refused; 5 what arrived is not what was sent; 130 stopped by Ctrl-C.

{DEBUG}=1 in the environment shows tracebacks.
"""


class CommandError(RdmaxferError):
    """A command can't go on; `code` is what it exits with."""

    def __init__(self, message: str, *, fix: str = "", code: Exit = Exit.FAILED) -> None:
        super().__init__(message, fix=fix)
        self.code = code


def exit_code(error: BaseException) -> Exit:
    match error:
        case CommandError(code=code):
            return code
        case KeyboardInterrupt():
            return Exit.INTERRUPTED
        case NoDevice() | VerbsUnavailable():
            return Exit.NO_DEVICE
        case ConnectTimeout() | Refused():
            return Exit.NO_PEER
        case EndpointError() | CurveError():
            return Exit.USAGE
    return Exit.FAILED


def report(error: BaseException) -> Exit:
    """Tell the user what went wrong, on stderr; returns the exit code."""
    debug = os.environ.get(DEBUG, "") not in ("", "0")
    if isinstance(error, BrokenPipeError):  # somebody reads our output only in part, such as `head`: not worth a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        text = "stopped by Ctrl-C."
    elif isinstance(error, RdmaxferError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{printable(str(error.filename))}: {error.strerror}." if error.filename else f"{error.strerror}."
    else:
        text = (
            f"unexpected {type(error).__name__}: {error}. Fix: run it again with {DEBUG}=1 and report what it prints."
        )
    print(f"rdmaxfer: {' '.join(text.split())}", file=sys.stderr)
    return exit_code(error)


def printable(text: str, limit: int = 200) -> str:
    """Text that somebody else chose, fit for a terminal: no control characters, no end of it."""
    return "".join(char if char.isprintable() else "?" for char in text[:limit])
