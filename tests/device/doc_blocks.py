"""The blocks of code in the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).parents[2]
PAGES: tuple[str, ...] = (
    "README.md",
    "examples/README.md",
    *sorted(str(path.relative_to(TOP)) for path in (TOP / "docs").glob("*.md")),
)
_BLOCK = re.compile(r"(?:^<!-- (\w+): (\S+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """`kind` and `name` are what the comment before it says: how it is run."""

    page: str
    line: int
    kind: str
    name: str
    language: str
    code: str


def blocks(page: str) -> list[Block]:
    text = (TOP / page).read_text()
    return [
        Block(page, text.count("\n", 0, match.start(3)) + 1, *match.groups(default=""))
        for match in _BLOCK.finditer(text)
    ]
