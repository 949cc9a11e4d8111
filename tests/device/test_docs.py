"""The Python code in README.md and docs/tutorial.md is true: it is run here.

A comment before each block says how: `<!-- program: NAME -->` (programs that follow each other run together, as processes of
their own), `<!-- run: pair -->` (with a connected `sender` and `receiver`), or `<!-- run: alone -->`.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import helpers
import numpy as np
import pytest

import rdmaxfer

pytestmark = pytest.mark.verbs

TOP = Path(__file__).parents[2]
PAGES = ("README.md", "docs/tutorial.md", "docs/howto.md")
_BLOCK = re.compile(r"(?:^<!-- (program|run): (\S+) -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    kind: str
    name: str
    code: str


def blocks(page: str) -> list[Block]:
    return [Block(*match.groups(default="")) for match in _BLOCK.finditer((TOP / page).read_text())]


def snippets() -> list[object]:
    return [
        pytest.param(block, id=f"{page}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page))
        if block.kind == "run"
    ]


def pairs() -> list[object]:
    """Programs, two by two: the receiving one and the sending one."""
    found = [(page, block) for page in PAGES for block in blocks(page) if block.kind == "program"]
    return [
        pytest.param(first, second, id=f"{page}-{first.name}")
        for (page, first), (_, second) in zip(found[::2], found[1::2], strict=True)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_how_it_is_run(page: str) -> None:
    assert blocks(page)
    assert [block.code for block in blocks(page) if not block.kind] == []


@pytest.mark.parametrize("block", snippets())
def test_snippet(block: Block) -> None:
    code = compile(block.code, block.name, "exec")
    if block.name == "alone":
        exec(code, {})
        return
    with rdmaxfer.Receiver() as receiver, contextlib.ExitStack() as stack:
        sender = rdmaxfer.Sender()
        stack.callback(sender.close)
        sender.connect(receiver.bind("tcp://127.0.0.1:*"), timeout=helpers.TIMEOUT_S)
        exec(code, {"np": np, "rdmaxfer": rdmaxfer, "sender": sender, "receiver": receiver})


@pytest.mark.parametrize(("receiving", "sending"), pairs())
def test_programs(receiving: Block, sending: Block, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with contextlib.ExitStack() as stack:
        processes = []
        for block in (receiving, sending):
            path = tmp_path / block.name
            path.write_text(block.code.replace("7471", port))
            process = subprocess.Popen([sys.executable, "-u", path], stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        receiver, sender = processes
        assert sender.wait(helpers.TIMEOUT_S) == 0
        if "break" not in receiving.code and "for frame" in receiving.code:
            receiver.send_signal(signal.SIGINT)  # it would wait for the next sender
            receiver.wait(helpers.TIMEOUT_S)
        else:
            assert receiver.wait(helpers.TIMEOUT_S) == 0
        assert receiver.stdout is not None
        assert receiver.stdout.read().strip()
