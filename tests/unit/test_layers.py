"""Imports go downwards only, and the pure modules stay pure (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rdmaxfer
import rdmaxfer.cm

PACKAGE = Path(rdmaxfer.__file__).parent
CM = Path(rdmaxfer.cm.__file__).parent

LAYERS = [
    ["rdmaxfer.errors"],
    [
        "rdmaxfer.inband",
        "rdmaxfer.credentials",
        "rdmaxfer.memory",
        "rdmaxfer.spinning",
        "rdmaxfer.copying",
        "rdmaxfer.cm.messages",
        "rdmaxfer.cm.endpoint",
        "rdmaxfer.cm.latch",
        "rdmaxfer.cm.curve",
        "rdmaxfer.cm.turns",
    ],
    ["rdmaxfer.ring", "rdmaxfer.frame", "rdmaxfer.cm.states"],
    ["rdmaxfer.cm.client_session", "rdmaxfer.cm.server_sessions"],
    ["rdmaxfer.cm.protocol"],
    ["rdmaxfer.cm.gate"],
    ["rdmaxfer.fabric", "rdmaxfer.cm.client", "rdmaxfer.cm.server", "rdmaxfer.cm.connection"],
    ["rdmaxfer.cm"],
    ["rdmaxfer.lease", "rdmaxfer.staging"],
    ["rdmaxfer.outgoing", "rdmaxfer.payload", "rdmaxfer.published"],
    ["rdmaxfer.link", "rdmaxfer.registrations"],
    ["rdmaxfer.stream"],
    ["rdmaxfer.send_link", "rdmaxfer.recv_link"],
    ["rdmaxfer.send_stream", "rdmaxfer.recv_stream"],
    ["rdmaxfer.handshake", "rdmaxfer.waiting", "rdmaxfer.domains", "rdmaxfer.reconnecting"],
    ["rdmaxfer.statistics", "rdmaxfer.routing", "rdmaxfer.status", "rdmaxfer.callback"],
    ["rdmaxfer.aio", "rdmaxfer.async_sending", "rdmaxfer.intake"],
    ["rdmaxfer.node"],
    ["rdmaxfer.receiver", "rdmaxfer.sender", "rdmaxfer.sharing", "rdmaxfer.metrics"],
    ["rdmaxfer"],
    ["rdmaxfer.cli", "rdmaxfer.__main__"],
]
PURE = [
    *("rdmaxfer.ring", "rdmaxfer.frame", "rdmaxfer.inband", "rdmaxfer.published"),
    *(
        "rdmaxfer.cm." + name
        for name in ("protocol", "messages", "endpoint", "states", "client_session", "server_sessions", "turns")
    ),
]
IMPURE = {"zmq", "socket", "time", "threading", "asyncio", "select", "os", "pyverbs"}


def modules() -> dict[str, Path]:
    found = {}
    for root, prefix in ((PACKAGE, "rdmaxfer"), (CM, "rdmaxfer.cm")):
        for path in root.rglob("*.py"):
            parts = [prefix, *path.relative_to(root).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path, *, at_import: bool) -> set[str]:
    """Modules that a file imports; with `at_import` only those that importing it loads."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                visit(other)
            return
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def layer(name: str) -> int | None:
    best, found = -1, None
    for number, members in enumerate(LAYERS):
        for member in members:
            if (name == member or (member != "rdmaxfer" and name.startswith(member + "."))) and len(member) > best:
                best, found = len(member), number
    return found


def test_every_module_has_a_layer() -> None:
    assert [name for name in modules() if layer(name) is None] == []


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_downwards(name: str) -> None:
    known = modules()
    mine = layer(name)
    assert mine is not None
    upwards = []
    for other in imports(known[name], at_import=False):
        if other in known and known[other].name != "__init__.py":
            theirs = layer(other)
            assert theirs is not None
            if theirs > mine:
                upwards.append(other)
    assert upwards == []


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_do_no_io(name: str) -> None:
    assert {other.partition(".")[0] for other in imports(modules()[name], at_import=False)} & IMPURE == set()


def test_zmq_stays_in_the_connection_manager_and_one_fabric() -> None:
    users = [name for name, path in modules().items() if "zmq" in imports(path, at_import=False)]
    assert all(name.startswith("rdmaxfer.cm.") or name == "rdmaxfer.fabric.tcp" for name in users)


def test_importing_the_package_loads_neither_pyverbs_nor_the_native_core() -> None:
    code = "import sys, rdmaxfer; print([m for m in sys.modules if m.startswith('pyverbs') or m == 'rdmaxfer._verbs'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.strip() == "[]"
