"""What must work, or fail clearly, on a machine without any RDMA device or library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROMPTLY_S = 30.0
"""A fresh interpreter that imports numpy on a busy machine takes most of it."""

NO_PYVERBS = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pyverbs":
            raise ModuleNotFoundError(f"No module named {name!r}", name="pyverbs")
sys.meta_path.insert(0, Blocker())
"""


def run(code: str, *, blocked: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", (NO_PYVERBS if blocked else "") + code],
        capture_output=True,
        text=True,
        timeout=2 * PROMPTLY_S,
        env={**os.environ, **environment},
    )
    assert time.monotonic() - began < PROMPTLY_S
    return done


def command(*arguments: str, blocked: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from rdmaxfer.cli import main; sys.exit(main({list(arguments)!r}))"
    return run(code, blocked=blocked, **environment)


TRY = """
import rdmaxfer
for make in (rdmaxfer.Sender, rdmaxfer.Receiver):
    with make() as node:
        for _ in range(2):
            try:
                node.connect("tcp://127.0.0.1:9", timeout=1)
            except rdmaxfer.RdmaxferError as error:
                print(type(error).__name__, "|", error, "|", error.fix)
"""


def test_the_package_imports_without_pyverbs_and_loads_nothing() -> None:
    done = run(
        "import sys, rdmaxfer, rdmaxfer.cli\n"
        "assert not [name for name in sys.modules if name.startswith('pyverbs') or name == 'rdmaxfer._verbs']\n"
        "rdmaxfer.Sender().close(); rdmaxfer.Receiver().close()\n"
        "import logging; assert not logging.getLogger().handlers\n",
        blocked=True,
        RDMAXFER_LIBIBVERBS="/nowhere/libibverbs.so.1",
    )
    assert done.returncode == 0, done.stderr


def test_without_pyverbs_connect_says_what_to_install() -> None:
    done = run(TRY, blocked=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        name, message, fix = line.split(" | ")
        assert name == "VerbsUnavailable"
        assert "pyverbs is not importable by" in message
        assert "apt install python3-pyverbs" in fix
        assert "--system-site-packages" in fix


def test_without_libibverbs_connect_says_so() -> None:
    done = run(TRY, RDMAXFER_LIBIBVERBS="/nowhere/libibverbs.so.1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        name, _, fix = line.split(" | ")
        assert name in ("VerbsUnavailable", "NoDevice")
        assert fix


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("rdmaxfer.Sender().connect('nonsense')", "EndpointError"),
        ("rdmaxfer.Sender().bind('tcp://127.0.0.1')", "EndpointError"),
        ("rdmaxfer.Sender().push([1])", "NotConnected"),
        ("rdmaxfer.Receiver().recv()", "NotConnected"),
        ("rdmaxfer.Sender().push(np.array([object()]))", "UnsupportedDtype"),
    ],
)
def test_mistakes_that_need_no_device_are_found_without_one(code: str, name: str) -> None:
    done = run(
        "import rdmaxfer, numpy as np, warnings\nwarnings.simplefilter('ignore')\n"
        f"try:\n    {code}\nexcept rdmaxfer.RdmaxferError as error:\n    print(type(error).__name__, bool(error.fix))\n",
        blocked=True,
    )
    assert done.stdout.split() == [name, "True"], done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([each, "--help"] for each in ("send", "recv", "demo"))]
)
def test_help_works_anywhere(arguments: list[str]) -> None:
    done = command(*arguments, blocked=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("broken", ["pyverbs", "libibverbs"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["devices"],
        ["send", "tcp://127.0.0.1:9", "--pattern", "4x4", "--timeout", "1"],
        ["recv", "tcp://127.0.0.1:9", "--connect", "--timeout", "1"],
        ["demo"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_fail_with_one_sentence_and_exit_code_3(arguments: list[str], broken: str) -> None:
    if broken == "pyverbs":
        done = command(*arguments, blocked=True)
    else:
        if Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()):
            pytest.skip("this machine has a device, and pyverbs finds it without rdmaxfer's own libibverbs")
        done = command(*arguments, RDMAXFER_LIBIBVERBS="/nowhere/libibverbs.so.1")
    assert done.returncode == 3, done.stderr
    said = done.stderr.strip().splitlines()
    assert len(said) == 1, done.stderr
    assert said[0].startswith("rdmaxfer: ")
    assert "Fix: " in said[0]


def test_a_bound_receiver_without_device_ends_by_its_own_timeout() -> None:
    done = command("recv", "tcp://127.0.0.1:0", "--timeout", "0.5", blocked=True)
    assert done.returncode in (3, 4), done.stderr
    assert "Fix: " in done.stderr


def test_doctor_finds_what_is_missing() -> None:
    done = command("doctor", "--json", blocked=True)
    assert done.returncode == 1, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["pyverbs"]["status"] == "failed"
    assert "python3-pyverbs" in checks["pyverbs"]["fix"]

    done = command("doctor", RDMAXFER_LIBIBVERBS="/nowhere/libibverbs.so.1")
    assert done.returncode == 1, done.stderr
    assert "libibverbs could not be opened" in done.stdout
    assert "Fix: let RDMAXFER_LIBIBVERBS name" in done.stdout
