"""What a check has found."""

from __future__ import annotations

from typing import NamedTuple

from rdmaxfer.errors import RdmaxferError


class Check(NamedTuple):
    """`status`, from good to bad: "ok"; "note", good to know; "warning", it works, but is slow or limited; "failed"."""

    name: str
    status: str
    detail: str
    fix: str = ""


def failed(name: str, error: RdmaxferError) -> Check:
    message = str(error).removesuffix(f" Fix: {error.fix}") if error.fix else str(error)
    return Check(name, "failed", message.rstrip("."), error.fix)
