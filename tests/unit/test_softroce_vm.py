"""Which kernel scripts/softroce_vm.sh boots."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/softroce_vm.sh"


def test_the_newest_kernel_that_is_installed_and_has_soft_roce(tmp_path: Path) -> None:
    for version, module in (
        ("6.1.0-9-amd64", "rdma_rxe.ko"),
        ("6.1.0-56-amd64", "rdma_rxe.ko.xz"),
        ("6.12.0", "dummy.ko"),
    ):
        modules = tmp_path / "lib/modules" / version / "kernel"
        modules.mkdir(parents=True)
        (modules / module).touch()
        (tmp_path / "boot").mkdir(exist_ok=True)
        (tmp_path / "boot" / f"vmlinuz-{version}").touch()
    (function,) = re.findall(r"^kernel_under\(\) \{$.*?^\}$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)

    def found(root: str) -> list[str]:
        script = f'{function}\nread -r image root version <<<"$(kernel_under "$1")"; printf "%s\\n" "$image" "$root" "$version"'
        return subprocess.run(
            ["bash", "-c", script, "bash", root], capture_output=True, text=True, check=True
        ).stdout.splitlines()

    image, root, version = found(str(tmp_path))
    assert (Path(image).name, root, version) == ("vmlinuz-6.1.0-56-amd64", str(tmp_path), "6.1.0-56-amd64")
    assert found(str(tmp_path / "boot")) == ["", "", ""]
    assert 'kernel_under ""' not in SCRIPT.read_text()  # `read` would skip an empty field
