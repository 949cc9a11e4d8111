"""Pages of the site that are made of what lies elsewhere in the repository: README, CHANGELOG and docstrings. A hook of mkdocs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
MEMBERS = {
    "Sender": """bind connect connect_async wait_for_peers wait_for_peers_async push push_async push_many reserve reserve_async
        register forward forward_async as_callback intake
        flush flush_async take_drops statistics links next_seq closed close close_async""",
    "Receiver": """bind connect connect_async wait_for_peers wait_for_peers_async recv recv_async recv_many recv_many_async
        statistics links closed close close_async""",
    "Intake": "name slots slot_bytes frames error attached close",
}
"""What users call of these; the rest is for other modules of the package."""

REFERENCE = """\
# Reference

Everything here is in the package `rdmaxfer`. All times are in seconds and all sizes in bytes, unless a name says otherwise.

"""


def on_files(files: Files, config: Any) -> Files:
    for path, text in (
        ("index.md", _from_root((ROOT / "README.md").read_text())),
        ("changes.md", _from_root((ROOT / "CHANGELOG.md").read_text())),
        ("reference.md", REFERENCE + "".join(_entry(name) for name in _public_names()) + _header()),
    ):
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../README.md", "](index.md").replace("](../CHANGELOG.md", "](changes.md")


def _from_root(text: str) -> str:
    """Links to the documentation lead to its pages; those to other files of the repository are only text here."""

    def link(found: re.Match[str]) -> str:
        label, target = found.groups()
        if target.startswith(("http", "#", "mailto:")):
            return found[0]
        if target.startswith("docs/"):
            return f"[{label}]({target.removeprefix('docs/')})"
        return f"[{label}](changes.md)" if target == "CHANGELOG.md" else str(label)

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def _header() -> str:
    text = (ROOT / "rdmaxfer" / "include" / "rdmaxfer.h").read_text()
    return f"## In C: rdmaxfer.h\n\n```c\n{text}```\n"


def _entry(name: str) -> str:
    members = MEMBERS.get(name, "")
    if not members:
        return f"::: rdmaxfer.{name}\n\n"
    return f"::: rdmaxfer.{name}\n    options:\n      members: [{', '.join(members.split())}]\n\n"


def _public_names() -> list[str]:
    """`__all__`, the two that matter most first."""
    tree = ast.parse((ROOT / "rdmaxfer/__init__.py").read_text())
    (found,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    first = ["Sender", "Receiver", "Frame", "Slot", "attach"]
    return first + [name for name in found if name not in first and not name.startswith("__")]
