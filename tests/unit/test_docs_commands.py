"""The shell commands in the documentation, as far as can be seen without running them (tests/device/test_docs_commands.py)."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from doc_blocks import PAGES, TOP, Block, blocks

from rdmaxfer.cli.app import make_parser

SHELL = [block for page in PAGES for block in blocks(page) if block.language == "sh"]


def words_of(block: Block) -> list[list[str]]:
    """Of each line, without prompts and comments; quotes that go over several lines are left out."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        line = re.sub(r"^(there|here)\$\s+", "", line)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            words = shlex.split(line.replace("'", " ").partition(";")[0], comments=True)
        if words:
            found.append(words)
    return found


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}-{block.line}")
def test_bash_can_read_it(block: Block) -> None:
    text = re.sub(r"^(there|here)\$\s+", "", block.code, flags=re.MULTILINE)
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def commands() -> list[object]:
    return [
        pytest.param(words, id=f"{block.page}-{block.line}-{' '.join(words)[:60]}")
        for block in SHELL
        for words in words_of(block)
    ]


@pytest.mark.parametrize("words", commands())
def test_options_and_files_are_there(words: list[str]) -> None:
    for word in words:
        if re.match(r"(\./)?(scripts|tests|bench|examples)/", word):
            assert (TOP / word.partition("::")[0]).exists(), word
    script = next((word for word in words if re.match(r"(\./)?scripts/\w+\.sh$", word)), None)
    if script is not None:
        says = subprocess.run(["bash", TOP / script, "--help"], capture_output=True, text=True, check=True).stdout
        mine = words[words.index(script) + 1 :]
        mine = mine[: mine.index("--")] if "--" in mine else mine
        for option in (word for word in mine if word.startswith("--")):
            assert option in says, f"{script} {option}"
    names = [number for number, word in enumerate(words) if word.rpartition("/")[2] == "rdmaxfer" and number < 3]
    if names and not (len(words) > 1 and words[1] == "-h"):
        try:
            make_parser().parse_args(words[names[0] + 1 :])
        except SystemExit:
            pytest.fail(f"not a command: {shlex.join(words)}")
