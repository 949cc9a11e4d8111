"""What is released: a source archive, and a wheel made from it, installed where there is nothing of RDMA."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import rdmaxfer

ROOT = Path(__file__).parents[2]
MAX_WHEEL_BYTES = 1_000_000
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}

ROUND_TRIP = """
import sys, numpy as np, rdmaxfer
for fabric in ("shm", "tcp"):
    with rdmaxfer.Receiver(fabric=fabric) as receiver, rdmaxfer.Sender(fabric=fabric) as sender:
        sender.connect(receiver.bind("tcp://127.0.0.1:*"))
        sender.push(np.arange(1000.0))
        with receiver.recv(timeout=20) as frame:
            assert frame.array.sum() == 499500
print(rdmaxfer.__version__, "pyverbs" in sys.modules)
"""


def run(*command: object, timeout: float = 240, code: int = 0) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout, check=False, cwd="/"
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, and the source archive that it was made from."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, ROOT / "scripts/lib/release.py", out)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


@pytest.mark.timeout(300)
def test_the_wheel_is_small_and_has_all_that_it_needs_and_no_more(built: tuple[Path, Path]) -> None:
    wheel, source = built
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    # One for every Python, and for every distribution whose glibc is not older.
    assert re.fullmatch(
        rf"rdmaxfer-{re.escape(rdmaxfer.__version__)}-cp310-abi3-manylinux_\d+_\d+_\w+\.whl", wheel.name
    )
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = [name for name in names if ".so" in name]
        assert not [name for name in names if "ibverbs" in name or name.startswith(("tests", "cm/"))]
        for name in (
            "rdmaxfer/py.typed",
            "rdmaxfer/cli/view/page.html",
            "rdmaxfer/cm/control.py",
            "rdmaxfer/include/rdmaxfer.h",
        ):
            assert name in names
        assert [name for name in names if name.endswith(".data/data/share/man/man1/rdmaxfer.1")]
        brought = {name.rpartition("/")[2] for name in libraries if name.startswith("rdmaxfer.libs/")}
        assert {name.partition("-")[0] for name in brought} == {"libgomp"}
        ours = {name for name in libraries if name.startswith("rdmaxfer/")}
        stems = {name.removeprefix("rdmaxfer/").partition(".")[0] for name in ours}
        assert stems == {"_verbs", "_copy", "_shm", "_wire", "lib/librdmaxfer_shm"}
        for name in libraries:
            path = Path(archive.extract(name, wheel.parent))
            needed = set(re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", path)))
            assert needed <= SYSTEM_LIBRARIES | brought, name  # libibverbs is opened when it is needed
    with tarfile.open(source) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    for name in (
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "rdmaxfer/_native/verbs.c",
        "cm/control.py",
        "CMakeLists.txt",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("build/", ".venv/", ".git/"))]


@pytest.mark.timeout(300)
def test_it_works_where_there_is_nothing_of_rdma(built: tuple[Path, Path], tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv)  # without the system's packages, so without pyverbs
    python = venv / "bin/python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", built[0])
    assert f"{rdmaxfer.__version__} False" in run(python, "-c", ROUND_TRIP)
    assert rdmaxfer.__version__ in run(venv / "bin/rdmaxfer", "--version")
    options = run(venv / "bin/rdmaxfer", "config", "--cflags", "--libs").split()
    run("cc", "-Wall", "-Werror", ROOT / "examples" / "capture.c", *options, "-o", tmp_path / "capture")
    assert "librdmaxfer_shm.so => /" in run("ldd", tmp_path / "capture")
    said = run(venv / "bin/rdmaxfer", "doctor", code=1)
    assert "pyverbs is not importable" in said
    assert "Fix: " in said
    said = run(venv / "bin/rdmaxfer", "top", code=1)
    assert "pip install 'rdmaxfer[top]'" in said
