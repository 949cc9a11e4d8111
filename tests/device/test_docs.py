"""The code in the documentation is true: it is run here, and C is compiled.

A comment before each block says how: `<!-- program: NAME -->` (programs that follow each other run together, as processes of
their own), `<!-- run: pair -->` (with a connected `sender` and `receiver`), `<!-- run: alone -->`, `<!-- run: keys -->` (one after
the other, where that page's commands have made keys), `<!-- run: proxy -->` (`rx` and `tx`, and what tcp_proxy has). Shell
commands: test_docs_commands.py.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import tcp_proxy
from doc_blocks import PAGES, Block, blocks

import rdmaxfer
from rdmaxfer.cli import main

pytestmark = pytest.mark.verbs


def of_language(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def snippets() -> list[object]:
    return [
        pytest.param(block, id=f"{block.page}-{block.line}")
        for block in of_language("python")
        if block.kind == "run" and block.name in ("pair", "alone")
    ]


def pairs() -> list[object]:
    """Programs, two by two: the receiving one and the sending one."""
    found = [block for block in of_language("python") if block.kind == "program"]
    return [
        pytest.param(first, second, id=f"{first.page}-{first.name}")
        for first, second in zip(found[::2], found[1::2], strict=True)
    ]


def test_every_block_says_how_it_is_run() -> None:
    assert len({block.page for block in of_language("python")}) >= 5
    assert [block for block in of_language("python") if block.kind not in ("run", "program")] == []
    assert {block.name for block in of_language("python") if block.kind == "run"} == {"pair", "alone", "keys", "proxy"}
    assert {block.language for page in PAGES for block in blocks(page)} == {"", "python", "sh", "c", "ini"}


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


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "allowed").mkdir()
    port, names = free_port(), {"rdmaxfer": rdmaxfer}
    for name in ("receiver", "camera"):
        assert main(["keygen", name]) == 0
    shutil.copy("camera.key", "allowed")
    with contextlib.ExitStack() as stack:
        for block in of_language("python"):
            if block.name == "keys":
                exec(
                    block.code.replace("0.0.0.0", "127.0.0.1").replace("10.0.0.2", "127.0.0.1").replace("7471", port),
                    names,
                )
        receiver, sender = names["receiver"], names["sender"]
        stack.callback(receiver.close)
        stack.callback(sender.close)
        sender.push(np.arange(3), timeout=helpers.TIMEOUT_S)
        with receiver.recv(timeout=helpers.TIMEOUT_S) as frame:
            assert frame.array.tolist() == [0, 1, 2]


def test_proxy() -> None:
    (block,) = [block for block in of_language("python") if block.name == "proxy"]
    with rdmaxfer.Receiver() as rx, rdmaxfer.Sender() as tx:
        exec(block.code, {**vars(tcp_proxy), "wait_until": helpers.wait_until, "rx": rx, "tx": tx})
        tx.push(b"x", timeout=helpers.TIMEOUT_S)
        rx.recv(timeout=helpers.TIMEOUT_S).release()


def test_c_is_compiled(tmp_path: Path) -> None:
    (block,) = of_language("c")
    source = tmp_path / "block.c"
    source.write_text(
        "#include <rdmaxfer.h>\nvoid read_from_camera(void *data);\nvoid capture(void);\nvoid capture(void)\n{\n"
        + block.code
        + "}\n"
    )
    options = subprocess.run(
        [sys.executable, "-m", "rdmaxfer", "config", "--cflags"], capture_output=True, text=True, check=True, cwd="/"
    )
    done = subprocess.run(
        [
            "cc",
            "-std=c11",
            "-Wall",
            "-Wextra",
            "-Werror",
            *options.stdout.split(),
            "-c",
            source,
            "-o",
            tmp_path / "block.o",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("receiving", "sending"), pairs())
def test_programs(receiving: Block, sending: Block, tmp_path: Path) -> None:
    port = free_port()
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
