"""scripts/setup_softroce.sh: what it would run on each distribution, and what it says where Soft-RoCE can't be had.

The script is run with made-up os-release files and SETUP_SOFTROCE_DRY_RUN=1, which prints commands instead of running them.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup_softroce.sh"

UBUNTU = "ID=ubuntu\nID_LIKE=debian\nVERSION_ID=24.04\nPRETTY_NAME='Ubuntu 24.04 LTS'\n"
MINT = "ID=linuxmint\nID_LIKE='ubuntu debian'\nVERSION_ID=22\nPRETTY_NAME='Linux Mint 22'\n"
DEBIAN = "ID=debian\nVERSION_ID=12\nPRETTY_NAME='Debian GNU/Linux 12 (bookworm)'\n"
STREAM9 = "ID=centos\nID_LIKE='rhel fedora'\nVERSION_ID=9\nPRETTY_NAME='CentOS Stream 9'\n"
RHEL9 = "ID=rhel\nID_LIKE=fedora\nVERSION_ID=9.4\nPRETTY_NAME='Red Hat Enterprise Linux 9.4'\n"
ROCKY9 = "ID=rocky\nID_LIKE='rhel centos fedora'\nVERSION_ID=9.4\nPRETTY_NAME='Rocky Linux 9.4'\n"
ALMA10 = "ID=almalinux\nID_LIKE='rhel centos fedora'\nVERSION_ID=10.0\nPRETTY_NAME='AlmaLinux 10.0'\n"
FEDORA = "ID=fedora\nVERSION_ID=42\nPRETTY_NAME='Fedora Linux 42'\n"
ARCH = "ID=arch\nPRETTY_NAME='Arch Linux'\n"

APT = "+ apt-get install --no-install-recommends "
DNF = "+ dnf install "


def dry_run(
    tmp_path: Path, os_release: str, *arguments: str, kernel: str = "1.2.3"
) -> subprocess.CompletedProcess[str]:
    release = tmp_path / "os-release"
    release.write_text(os_release)
    environment = {
        **os.environ,
        "SETUP_SOFTROCE_OS_RELEASE": str(release),
        "SETUP_SOFTROCE_DRY_RUN": "1",
        "SETUP_SOFTROCE_KERNEL": kernel,
    }
    return subprocess.run(
        ["bash", str(SCRIPT), *(arguments or ["up"])], env=environment, capture_output=True, text=True, timeout=30
    )


def commands(tmp_path: Path, os_release: str, *arguments: str, kernel: str = "1.2.3") -> list[str]:
    done = dry_run(tmp_path, os_release, *arguments, kernel=kernel)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("os_release", [UBUNTU, MINT])
def test_ubuntu_gets_the_driver_from_the_extra_modules_of_its_kernel(tmp_path: Path, os_release: str) -> None:
    lines = commands(tmp_path, os_release, kernel="6.8.0-31-generic")
    assert lines[0] == APT + "rdma-core ibverbs-providers ibverbs-utils perftest iproute2 kmod"
    assert lines[1] == APT + "linux-modules-extra-6.8.0-31-generic"
    assert lines[2] == "+ modprobe rdma_rxe"


def test_debian_has_the_driver_in_its_kernel(tmp_path: Path) -> None:
    lines = commands(tmp_path, DEBIAN, kernel="6.1.0-40-amd64")
    assert lines[:2] == [
        APT + "rdma-core ibverbs-providers ibverbs-utils perftest iproute2 kmod",
        "+ modprobe rdma_rxe",
    ]


@pytest.mark.parametrize("os_release", [STREAM9, RHEL9, ROCKY9, FEDORA])
def test_the_red_hat_family_gets_the_driver_from_the_modules_packages_of_its_kernel(
    tmp_path: Path, os_release: str
) -> None:
    lines = commands(tmp_path, os_release, kernel="5.14.0-400.el9.x86_64")
    assert lines[0] == DNF + "rdma-core libibverbs libibverbs-utils perftest iproute kmod"
    assert lines[1] == DNF + "kernel-modules-5.14.0-400.el9.x86_64 kernel-modules-extra-5.14.0-400.el9.x86_64"
    assert lines[2] == "+ modprobe rdma_rxe"


@pytest.mark.parametrize("os_release", [UBUNTU, DEBIAN, STREAM9, FEDORA])
def test_without_a_network_card_named_a_dummy_one_with_room_for_the_largest_packets_is_made(
    tmp_path: Path, os_release: str
) -> None:
    lines = commands(tmp_path, os_release)
    first = lines.index("+ ip link add rxedummy0 mtu 4200 type dummy")
    assert lines[first + 1 : first + 5] == [
        "+ ip address add 192.168.77.1/24 dev rxedummy0",
        "+ ip -6 address add fd77::1/64 dev rxedummy0 nodad",
        "+ ip link set rxedummy0 up",
        "+ rdma link add rxe0 type rxe netdev rxedummy0",
    ]


def test_a_network_card_named_is_used_as_it_is(tmp_path: Path) -> None:
    lines = commands(tmp_path, DEBIAN, "up", "--netdev", "eth7", "--name", "rxe9")
    assert "+ rdma link add rxe9 type rxe netdev eth7" in lines
    assert not [line for line in lines if line.startswith("+ ip ")]


@pytest.mark.parametrize(
    ("os_release", "firewall"),
    [
        (UBUNTU, "+ if ufw is active: ufw allow 4791/udp"),
        (STREAM9, "+ if firewalld is running: firewall-cmd --add-port=4791/udp"),
    ],
)
def test_limits_and_firewall_are_opened_and_a_write_is_tried(tmp_path: Path, os_release: str, firewall: str) -> None:
    limits, *rest = commands(tmp_path, os_release)[-3:]
    assert limits == "+ write /etc/security/limits.d/60-rdmaxfer-memlock.conf"
    assert rest == [firewall, "+ ib_write_bw -d rxe0 -s 4096 -n 100 (to itself)"]


def test_the_elrepo_kernel_is_tried_on_version_10(tmp_path: Path) -> None:
    assert "+ modprobe rdma_rxe" in commands(tmp_path, ALMA10, kernel="6.15.0-1.el10.elrepo.x86_64")


@pytest.mark.parametrize(
    ("os_release", "kernel", "words"),
    [
        (DEBIAN, "6.1.0-40-cloud-amd64", ["cloud kernel", "apt-get install linux-image-amd64", "reboot"]),
        (ALMA10, "6.12.0-55.el10.x86_64", ["AlmaLinux 10.0", "removed", "kernel-ml", "softroce_vm.sh"]),
        (ARCH, "6.14.1-arch1-1", ["Arch Linux is not supported", "modprobe rdma_rxe"]),
    ],
)
def test_where_soft_roce_can_not_be_had_the_way_out_is_named_and_nothing_is_run(
    tmp_path: Path, os_release: str, kernel: str, words: list[str]
) -> None:
    done = dry_run(tmp_path, os_release, kernel=kernel)
    assert (done.returncode, done.stdout) == (1, "")
    for word in words:
        assert word in done.stderr


def test_status_of_a_device_that_is_not_there_is_3(tmp_path: Path) -> None:
    done = dry_run(tmp_path, DEBIAN, "status", "--name", "no-such-device")
    assert done.returncode == 3
    assert "no-such-device not up" in done.stdout


@pytest.mark.parametrize("arguments", [["sideways"], ["up", "--netdev"], ["up", "--color"]])
def test_what_it_does_not_know_is_refused_with_a_way_to_help(tmp_path: Path, arguments: list[str]) -> None:
    done = dry_run(tmp_path, DEBIAN, *arguments)
    assert done.returncode == 1
    assert "--help" in done.stderr


def test_help_explains_itself(tmp_path: Path) -> None:
    done = dry_run(tmp_path, DEBIAN, "--help")
    assert done.returncode == 0
    for word in ("up", "down", "status", "--netdev", "RDMA moves data"):
        assert word in done.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPT.parent.glob("*.sh")))
def test_every_script_has_help_and_the_run_bit(script: str) -> None:
    path = SCRIPT.parent / script
    assert os.access(path, os.X_OK)
    done = subprocess.run([str(path), "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert f"scripts/{script}" in done.stdout
