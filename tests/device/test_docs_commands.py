"""The shell commands in the documentation are true: those of `rdmaxfer` are run here as they stand there, block by block.

What listens is started beside the others, and what connects gets a receiver if its block has started none. Only addresses and ports
are other ones, and long runs shorter. What is about a camera, containers, packages or the scripts is not run, but looked at
(tests/unit/test_docs_commands.py).
"""

from __future__ import annotations

import re
import shlex
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from doc_blocks import PAGES, blocks
from helpers import wait_until
from test_cli_device import Command, running

pytestmark = [pytest.mark.verbs, pytest.mark.timeout(300)]

HERE = "tcp://127.0.0.1"
KEY_OPTIONS = {"--secret-key", "--allowed-keys", "--peer-key"}


class Line(NamedTuple):
    """One `rdmaxfer ...` of a block."""

    words: tuple[str, ...]

    @property
    def command(self) -> str:
        return self.words[0]

    @property
    def listens(self) -> bool:
        return any("0.0.0.0" in word for word in self.words)

    @property
    def connects(self) -> bool:
        return any("10.0.0.2" in word for word in self.words)


def lines(text: str) -> list[Line]:
    found = []
    for line in text.splitlines():
        command = re.match(r"(?:(?:there|here)\$\s+)?(?:\S+/)?rdmaxfer\s(.*)", line)
        words = shlex.split(command[1], comments=True) if command else []
        if words and "camera:0" not in words:
            found.append(Line(tuple(words)))
    return found


def blocks_with_commands() -> list[object]:
    return [
        pytest.param(found, id=f"{page}-{block.line}")
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh" and (found := lines(block.code))
    ]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with all that the commands name."""
    import cv2
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)).save(
            photos / f"{number}.png"
        )
    film = cv2.VideoWriter(str(tmp_path / "film.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25, (64, 48))
    for number in range(5):
        film.write(np.full((48, 64, 3), 40 * number, np.uint8))
    film.release()
    return tmp_path


class Session:
    """What runs while the commands of a block are run one after the other."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._listening: tuple[Command, str] | None = None

    def do(self, line: Line) -> None:
        words = [re.sub(r"^600$", "6", word) for word in line.words]  # frames
        if "--allowed-keys" in words:
            (self._folder / "allowed").mkdir()
            shutil.copy(self._folder / "camera.key", self._folder / "allowed")
        if line.listens:
            self._end_listening()
            self._listen([word.replace("tcp://0.0.0.0:7471", f"{HERE}:*") for word in words])
            return
        if line.connects:
            if self._listening is None:
                self._listen(["recv", f"{HERE}:*"])
            assert self._listening is not None
            words = [word.replace("tcp://10.0.0.2:7471", self._listening[1]) for word in words]
        with running(*words) as command:
            if line.words == ("top",) or "forever" in words:
                wait_until(lambda: len(command.lines) >= 1, f"{words} says something")
                command.interrupt()
            else:
                assert command.end() == 0, command.text
                assert command.lines

    def _listen(self, words: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        if "--view" in words:
            words = [*words, port]  # not 8470, where somebody may be
        command = self._stack.enter_context(running(*words))
        command.says("listening at ")
        (endpoint,) = re.findall(r"listening at (\S+)", command.text)
        self._listening = (command, endpoint)
        if not KEY_OPTIONS.intersection(words):
            with running("send", endpoint, "--pattern", "48x64", "--count", "3") as sender:
                assert sender.end() == 0, sender.text

    def _end_listening(self) -> None:
        if self._listening is not None:
            command, _ = self._listening
            command.interrupt()
            self._listening = None

    close = _end_listening


@contextmanager
def session(folder: Path) -> Iterator[Session]:
    with ExitStack() as stack:
        made = Session(stack, folder)
        yield made
        made.close()


@pytest.mark.parametrize("commands", blocks_with_commands())
def test_block(commands: list[Line], files: Path) -> None:
    with session(files) as run:
        if any("receiver.key_secret" in line.words for line in commands):  # made by an earlier block of the page
            for name in ("receiver", "camera"):
                run.do(Line(("keygen", name)))
        for line in commands:
            run.do(line)


def test_what_is_recorded_and_received_is_kept(files: Path) -> None:
    """The files that the README speaks of."""
    with session(files) as run:
        run.do(Line(("recv", "tcp://0.0.0.0:7471", "--verify", "--out", "received")))
        run.do(Line(("record", "tcp://0.0.0.0:7471", "run42.h5")))
        run.do(Line(("send", "tcp://10.0.0.2:7471", "photos/")))
    assert len(list((files / "received").iterdir())) == 3
    with running("recv", f"{HERE}:*", "--verify") as receiver:
        receiver.says("listening at ")
        (endpoint,) = re.findall(r"listening at (\S+)", receiver.text)
        with running("replay", "run42.h5", endpoint) as replay:
            assert replay.end() == 0, replay.text
        receiver.interrupt()
        assert "6 frames" in receiver.text or "6 right" in receiver.text, receiver.text
