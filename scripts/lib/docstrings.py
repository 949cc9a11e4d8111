"""An extension of griffe, which reads docstrings for the site: lines like `name: what it is`, below one that ends in a colon, are
a list there."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LIST = re.compile(r"^(?P<head>\S.*:)\n(?P<items>(?:  +\S.*\n?)+)", re.MULTILINE)
_ITEM = re.compile(r"^  (?P<names>[\w, ]+): ", re.MULTILINE)


class Parameters(griffe.Extension):
    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _LIST.sub(_as_list, obj.docstring.value)


def _as_list(found: re.Match[str]) -> str:
    if not _ITEM.match(found["items"]):
        return found[0]
    return f"{found['head']}\n\n" + _ITEM.sub(lambda item: f"- **{item['names']}**: ", found["items"])
