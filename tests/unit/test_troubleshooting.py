"""docs/troubleshooting.md mentions everything that can go wrong."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from rdmaxfer import errors
from rdmaxfer.cli.failure import Exit
from rdmaxfer.cm.messages import RefuseCode
from rdmaxfer.fabric import native

PAGE = (Path(__file__).parents[2] / "docs/troubleshooting.md").read_text()
ERRORS = [name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)]


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_there(name: str) -> None:
    assert f"`{name}`" in PAGE or f"rdmaxfer.{name}`" in PAGE


@pytest.mark.parametrize("code", RefuseCode)
def test_every_code_of_refusals_is_there(code: RefuseCode) -> None:
    assert f"| `{code.value}` |" in PAGE


@pytest.mark.parametrize("code", Exit)
def test_every_exit_code_is_there(code: Exit) -> None:
    assert f"| {code.value} |" in PAGE


@pytest.mark.parametrize("verb", sorted({verb for verb, _ in native._FIXES} - {"ibv_fork_init"}))
def test_every_verb_that_has_a_fix_of_its_own_is_there(verb: str) -> None:
    assert f"`{verb} failed with" in PAGE
