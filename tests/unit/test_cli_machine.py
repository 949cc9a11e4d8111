"""`rdmaxfer devices` and `rdmaxfer doctor`, and what they know of the machine, without a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rdmaxfer.cli import checks, counters, doctor, main
from rdmaxfer.cli.checks import Check
from rdmaxfer.cli.distribution import Distribution
from rdmaxfer.cli.failure import Exit
from rdmaxfer.errors import VerbsUnavailable
from rdmaxfer.fabric.devices import Device, Gid, Port
from rdmaxfer.fabric.route import ip_to_gid

HERE = Distribution("debian", "Debian")


def gid(index: int, text: str, kind: str = "ROCE_V2") -> Gid:
    import ipaddress

    return Gid(index, ip_to_gid(ipaddress.ip_address(text)), kind)


RXE = Device(
    "rxe0", "IB", (Port(1, "ACTIVE", "ETHERNET", 1024, 1 << 30, 0, (gid(0, "fe80::1"), gid(1, "192.168.77.1"))),)
)


def statuses(found: Any) -> list[str]:
    return [check.status for check in found]


# --- devices ----------------------------------------------------------------------------------------------------------


def test_devices_are_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Device("mlx5_0", "IB", error="Permission denied")
    monkeypatch.setattr(
        "rdmaxfer.fabric.devices.list_devices",
        lambda: (RXE, broken, Device("x", "IB", (Port(1, "DOWN", "IB", 256, 1),))),
    )
    assert main(["devices"]) == 0
    out = capsys.readouterr().out
    for text in ("rxe0", "ACTIVE", "MTU 1024", "1    192.168.77.1  ROCE_V2", "Permission denied", "no GIDs"):
        assert text in out


def test_devices_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("rdmaxfer.fabric.devices.list_devices", lambda: (RXE,))
    assert main(["devices", "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)
    assert device["ports"][0]["gids"][1] == {"index": 1, "address": "192.168.77.1", "type": "ROCE_V2", "interface": ""}


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_no_device_exits_with_3(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdmaxfer.fabric.devices.list_devices", lambda: ())
    assert main(["devices", *arguments]) == Exit.NO_DEVICE


# --- doctor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("failed", 1)])
def test_doctor_fails_if_a_check_does(
    status: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        checks, "examine", lambda wanted: iter([Check("thing", status, "so", "do this."), Check("b", "ok", "c")])
    )
    assert main(["doctor"]) == code
    assert f"{doctor.MARKS[status]} thing: so\n    Fix: do this.\n" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == code
    first = json.loads(capsys.readouterr().out)[0]
    assert first == {"name": "thing", "status": status, "detail": "so", "fix": "do this."}


def test_a_missing_library_ends_the_examination_before_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise VerbsUnavailable("pyverbs is not importable.", fix="apt install python3-pyverbs.")

    monkeypatch.setattr("rdmaxfer.fabric.bridge.pyverbs", missing)
    monkeypatch.setattr(checks, "list_devices", lambda: pytest.fail("looked for devices"))
    found = list(checks.examine({"device": None, "port": None, "gid_index": None}))
    assert found[0] == Check("pyverbs", "failed", "pyverbs is not importable", "apt install python3-pyverbs.")


def test_port_checks() -> None:
    assert statuses(checks.port_checks(RXE, RXE.ports[0])) == ["ok", "ok", "warning"]
    good = Port(1, "ACTIVE", "ETHERNET", 4096, 1, 0, (gid(1, "10.0.0.1"),))
    assert statuses(checks.port_checks(RXE, good)) == ["ok", "ok", "ok"]
    local = Port(1, "ACTIVE", "ETHERNET", 4096, 1, 0, (gid(0, "fe80::1"),))
    assert statuses(checks.port_checks(RXE, local)) == ["ok", "warning", "ok"]
    assert statuses(checks.port_checks(RXE, Port(1, "ACTIVE", "ETHERNET", 4096, 1))) == ["ok", "failed", "ok"]
    assert statuses(checks.port_checks(RXE, Port(1, "DOWN", "INFINIBAND", 4096, 1))) == ["failed"]


def test_presence_checks() -> None:
    assert statuses(checks.presence((), [], None, HERE)) == ["failed"]
    assert statuses(checks.presence((RXE,), [], "mlx5_0", HERE)) == ["failed"]
    bad = [Device("a", error="no rights"), Device("b", "IWARP"), RXE]
    assert statuses(checks.presence(tuple(bad), bad, None, HERE)) == ["failed", "failed", "ok"]


@pytest.mark.parametrize(
    ("limit", "capable", "status"),
    [
        (-1, False, "ok"),
        (64 << 10, True, "ok"),
        (64 << 10, False, "failed"),
        (32 << 20, False, "warning"),
        (1 << 30, False, "ok"),
    ],
)
def test_locked_memory(limit: int, capable: bool, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (limit, limit))
    monkeypatch.setattr(checks, "may_lock_any_amount", lambda: capable)
    assert checks.memlock().status == status


def test_the_capability_to_lock_memory(tmp_path: Path) -> None:
    status = tmp_path / "status"
    for mask, capable in (("0000000000004000", True), ("0000000000003fff", False)):
        status.write_text(f"Name:\tx\nCapEff:\t{mask}\n")
        assert checks.may_lock_any_amount(status) is capable


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "family", "command"),
    [
        ('ID=ubuntu\nID_LIKE=debian\nPRETTY_NAME="Ubuntu 24.04"', "ubuntu", "apt install linux-modules-extra-6.1"),
        ("ID=debian", "debian", "apt install linux-image-amd64"),
        ("ID=linuxmint\nID_LIKE='ubuntu debian'", "ubuntu", "apt install linux-modules-extra-6.1"),
        ('ID="centos"\nID_LIKE="rhel fedora"', "redhat", "dnf install kernel-modules-extra-6.1"),
        ("ID=fedora", "redhat", "dnf install kernel-modules-extra-6.1"),
        ("ID=arch", "", "dnf install"),
        (None, "", "apt install"),
    ],
)
def test_the_distribution_names_its_packages(release: str | None, family: str, command: str, tmp_path: Path) -> None:
    if release is not None:
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/os-release").write_text(release)
    here = Distribution.of_this_machine(tmp_path)
    assert here.family == family
    assert command in here.rxe_fix("6.1")


def test_modules_are_found_loadable_built_in_or_loaded(tmp_path: Path) -> None:
    here = Distribution("", "", tmp_path)
    assert not here.has_module("rdma_rxe", "6.1")
    folder = tmp_path / "lib/modules/6.1"
    folder.mkdir(parents=True)
    (folder / "modules.dep").write_text("kernel/drivers/infiniband/sw/rxe/rdma_rxe.ko.xz: kernel/x.ko\n")
    assert here.has_module("rdma_rxe", "6.1")
    assert not here.has_module("siw", "6.1")
    (tmp_path / "sys/module/siw").mkdir(parents=True)
    assert here.has_module("siw", "6.1")


def test_counters_of_devices(tmp_path: Path) -> None:
    folder = tmp_path / "rxe0/ports/1/hw_counters"
    folder.mkdir(parents=True)
    (folder / "sent_pkts").write_text("12\n")
    (folder / "rcvd_pkts").write_text("nonsense\n")
    (tmp_path / "rxe0/parent").write_text("eth0\n")
    assert counters.read("rxe0", 1, tmp_path) == {"sent_pkts": 12}
    assert counters.read("gone", 1, tmp_path) == {}
    assert (
        counters.describe({"sent_pkts": 3, "rcvd_pkts": 0, "port_xmit_data": 500_000})
        == "sent_pkts +3, port_xmit_data +2.0 MB"
    )
    assert "none" in counters.describe({"sent_pkts": 0})
    assert "Soft-RoCE" in counters.driver("rxe0", tmp_path)
    assert "unknown" in counters.driver("gone", tmp_path)
