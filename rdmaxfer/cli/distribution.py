"""Which Linux distribution this is, and what it calls the packages that may be missing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Distribution(NamedTuple):
    """`family` is "debian", "ubuntu", "redhat" or ""."""

    family: str
    name: str
    root: Path = Path("/")

    @classmethod
    def of_this_machine(cls, root: Path = Path("/")) -> Distribution:
        try:
            lines = (root / "etc/os-release").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        values = {key: value.strip("\"'") for key, _, value in (line.partition("=") for line in lines)}
        names = [values.get("ID", ""), *values.get("ID_LIKE", "").split()]
        family = ""
        for each in names:
            if each in ("debian", "ubuntu"):
                family = each
            elif each in ("rhel", "fedora", "centos"):
                family = "redhat"
            if family:
                break
        return cls(family, values.get("PRETTY_NAME", "Linux"), root)

    def has_module(self, module: str, release: str) -> bool:
        """Whether the running kernel could load a module, or has it built in."""
        folder = self.root / "lib/modules" / release
        for index in ("modules.dep", "modules.builtin"):
            try:
                if f"/{module}.ko" in (folder / index).read_text(errors="replace"):
                    return True
            except OSError:
                continue
        return (self.root / "sys/module" / module).is_dir()

    def install(self, apt: str, dnf: str) -> str:
        """The command that installs a package: this distribution's, or both if it is unknown."""
        if self.family in ("debian", "ubuntu"):
            return f"sudo apt install {apt}"
        if self.family == "redhat":
            return f"sudo dnf install {dnf}"
        return f"sudo apt install {apt} (Debian, Ubuntu), or sudo dnf install {dnf} (CentOS, RHEL, Fedora)"

    def providers_fix(self) -> str:
        return f"{self.install('ibverbs-providers rdma-core', 'rdma-core libibverbs')}."

    def upgrade_kernel(self) -> str:
        """How to get the distribution's latest kernel."""
        if self.family == "redhat":
            return "sudo dnf upgrade kernel, and reboot"
        if self.family in ("debian", "ubuntu"):
            return "sudo apt update && sudo apt full-upgrade, and reboot"
        return "by the distribution's updates, and reboot"

    def rxe_fix(self, release: str) -> str:
        """How to get a kernel with Soft-RoCE."""
        virtual = "Where the kernel can't be changed (containers, CI): scripts/softroce_vm.sh boots one that has it."
        if self.family == "ubuntu":
            return f"sudo apt install linux-modules-extra-{release}. {virtual}"
        if self.family == "debian":
            cloud = " (the -cloud kernel has none)" if "cloud" in release else ""
            return f"sudo apt install linux-image-amd64{cloud}, and reboot into it. {virtual}"
        if self.family == "redhat":
            return (
                f"sudo dnf install kernel-modules-extra-{release}; RHEL 10 and its clones have none: use a kernel of ELRepo "
                f"(kernel-ml). {virtual}"
            )
        return f"{self.install(f'linux-modules-extra-{release}', 'kernel-modules-extra')}. {virtual}"
