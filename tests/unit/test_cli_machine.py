"""`rdmaxfer devices` and `rdmaxfer doctor`, and what they know of the machine, without a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rdmaxfer.cli import checks, counters, doctor, main
from rdmaxfer.cli.checks import Check, firewall, hardware, memory, software
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
        checks, "examine", lambda wanted, ring: iter([Check("thing", status, "so", "do this."), Check("b", "ok", "c")])
    )
    assert main(["doctor"]) == code
    assert f"{doctor.MARKS[status]} thing: so\n    Fix: do this.\n" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == code
    first = json.loads(capsys.readouterr().out)[0]
    assert first == {"name": "thing", "status": status, "detail": "so", "fix": "do this."}


@pytest.mark.parametrize(("name", "told"), [("kernel", True), ("locked memory", False), ("native core", False)])
def test_doctor_says_what_works_without_a_device(
    name: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "examine", lambda wanted, ring: iter([Check(name, "failed", "so", "do this.")]))
    assert main(["doctor"]) == 1
    assert ("Until then frames go by shared memory" in capsys.readouterr().out) is told


def test_a_missing_library_ends_the_examination_before_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise VerbsUnavailable("pyverbs is not importable.", fix="apt install python3-pyverbs.")

    monkeypatch.setattr("rdmaxfer.fabric.bridge.pyverbs", missing)
    monkeypatch.setattr(checks, "list_devices", lambda: pytest.fail("looked for devices"))
    found = list(checks.examine({"device": None, "port": None, "gid_index": None}, 1 << 24))
    assert found[0] == Check("pyverbs", "failed", "pyverbs is not importable", "apt install python3-pyverbs.")


def test_port_checks() -> None:
    assert statuses(hardware.port_checks(RXE, RXE.ports[0])) == ["ok", "ok", "warning"]
    good = Port(1, "ACTIVE", "ETHERNET", 4096, 1, 0, (gid(1, "10.0.0.1"),))
    assert statuses(hardware.port_checks(RXE, good)) == ["ok", "ok", "ok"]
    local = Port(1, "ACTIVE", "ETHERNET", 4096, 1, 0, (gid(0, "fe80::1"),))
    assert statuses(hardware.port_checks(RXE, local)) == ["ok", "warning", "ok"]
    assert statuses(hardware.port_checks(RXE, Port(1, "ACTIVE", "ETHERNET", 4096, 1))) == ["ok", "failed", "ok"]
    down = Port(1, "DOWN", "INFINIBAND", 4096, 1)
    assert statuses(hardware.port_checks(RXE, down)) == ["failed"]
    assert statuses(hardware.port_checks(RXE, down, needed=False)) == ["note"]


def test_the_address_that_is_proposed_is_of_a_network_that_is_free() -> None:
    local = Port(1, "ACTIVE", "ETHERNET", 4096, 1, 0, (gid(0, "fe80::1"),))
    (check,) = [each for each in hardware.port_checks(RXE, local, (RXE,)) if each.fix]
    assert "192.168.78.1/24" in check.fix


def test_presence_checks() -> None:
    nowhere = Path("/nowhere")
    assert statuses(hardware.presence((), [], None, HERE, nowhere)) == ["failed"]
    assert statuses(hardware.presence((RXE,), [], "mlx5_0", HERE, nowhere)) == ["failed"]
    bad = [Device("a", error="no rights"), Device("b", "IWARP"), RXE]
    assert statuses(hardware.presence(tuple(bad), bad, None, HERE, nowhere)) == ["warning", "note", "ok"]
    assert statuses(hardware.presence(tuple(bad), bad[:2], "a", HERE, nowhere)) == ["failed", "failed"]


def test_a_device_without_a_provider_library(tmp_path: Path) -> None:
    (tmp_path / "infiniband/mlx5_0").mkdir(parents=True)
    missing, _ = hardware.presence((), [], None, HERE, tmp_path)
    assert missing.status == "failed"
    assert "mlx5_0" in missing.detail
    assert missing.fix == "sudo apt install ibverbs-providers rdma-core."
    assert "mlx5_0" not in [each.detail for each in hardware.presence((RXE,), [RXE], "rxe0", HERE, tmp_path)]


def test_provider_libraries_are_those_that_are_loaded(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 0 00:00 1 /usr/lib/libibverbs/librxe-rdmav34.so\n"
        "7f02-7f03 r--p 0 00:00 1 /usr/lib/libibverbs/librxe-rdmav34.so\n"
        "7f04-7f05 r--p 0 00:00 1 /usr/lib/libmlx5.so.1.24.44.0\n7f06-7f07 r--p 0 00:00 1 /usr/lib/libc.so.6\n"
    )
    assert hardware.provider_libraries(maps) == ["libmlx5.so.1.24.44.0", "librxe-rdmav34.so"]


def test_the_provider_of_a_device(tmp_path: Path) -> None:
    loaded = ["libmlx5.so.1.24.44.0", "libmlx4.so.1.0.44.0", "librxe-rdmav34.so", "libirdma-rdmav34.so"]
    for name in ("rocep1s0", "unknown"):
        (tmp_path / "infiniband" / name / "device").mkdir(parents=True)
    (tmp_path / "drivers/mlx5_core").mkdir(parents=True)
    (tmp_path / "infiniband/rocep1s0/device/driver").symlink_to(tmp_path / "drivers/mlx5_core")
    (tmp_path / "infiniband/rxe0").mkdir()
    (tmp_path / "infiniband/rxe0/parent").write_text("eth0\n")
    assert hardware.provider_of(Device("rxe0"), loaded, tmp_path) == ["librxe-rdmav34.so"]
    assert hardware.provider_of(Device("rocep1s0"), loaded, tmp_path) == ["libmlx5.so.1.24.44.0"]
    assert hardware.provider_of(Device("unknown"), loaded, tmp_path) == loaded


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
    monkeypatch.setattr(memory, "may_lock_any_amount", lambda: capable)
    assert memory.memlock(16 << 20).status == status


def test_the_capability_to_lock_memory(tmp_path: Path) -> None:
    status = tmp_path / "status"
    for mask, capable in (("0000000000004000", True), ("0000000000003fff", False)):
        status.write_text(f"Name:\tx\nCapEff:\t{mask}\n")
        assert memory.may_lock_any_amount(status) is capable


def test_a_higher_limit_that_may_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "may_lock_any_amount", lambda: False)
    monkeypatch.setattr("resource.getrlimit", lambda which: (8 << 20, 1 << 30))
    assert memory.memlock(16 << 20).fix.startswith("`ulimit -l 1048576`")
    monkeypatch.setattr("resource.getrlimit", lambda which: (8 << 20, -1))
    assert memory.memlock(16 << 20).fix.startswith("`ulimit -l unlimited`")
    monkeypatch.setattr("resource.getrlimit", lambda which: (8 << 20, 8 << 20))
    assert memory.memlock(16 << 20).fix.startswith("for good:")


@pytest.mark.parametrize(
    ("text", "status", "fix"),
    [
        ("MemFree: 1 kB\n", "note", ""),
        ("HugePages_Total: 0\nHugePages_Free: 0\nHugepagesize: 2048 kB\n", "note", "nr_hugepages=17"),
        ("HugePages_Total: 20\nHugePages_Free: 5\nHugepagesize: 2048 kB\n", "note", "nr_hugepages=32"),
        ("HugePages_Total: 20\nHugePages_Free: 17\nHugepagesize: 2048 kB\n", "ok", ""),
    ],
)
def test_huge_pages(text: str, status: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(text)
    found = memory.huge_pages(memory.ring_bytes(32, 1 << 20), (5, 14), tmp_path / "meminfo")
    assert found.status == status
    assert fix in found.fix
    assert "used from Linux 5.14 on" in memory.huge_pages(1 << 20, (5, 10), tmp_path / "meminfo").detail


@pytest.mark.parametrize(
    ("release", "notes"),
    [("5.4.0-113-generic", 2), ("5.14.20-300.fc35", 2), ("6.1.0-13-amd64", 1), ("7.3.1", 0), ("weird", 0)],
)
def test_what_is_known_of_soft_roce_in_a_kernel(release: str, notes: int) -> None:
    found = list(software.rxe_bugs(release, HERE))
    assert sum(each.status == "note" for each in found) == notes
    assert all("full-upgrade" in each.fix for each in found if each.status == "note")
    assert (statuses(found) == ["ok"]) is (notes == 0)


def test_forking() -> None:
    assert software.fork("5.12.0").status == "ok"
    assert software.fork("5.11.99").status == "warning"


def test_the_clock(tmp_path: Path) -> None:
    assert software.clock(tmp_path).status == "note"
    folder = tmp_path / "sys/devices/system/clocksource/clocksource0"
    folder.mkdir(parents=True)
    for current, others, status, fix in (
        ("tsc", "tsc hpet", "ok", ""),
        ("hpet", "tsc hpet acpi_pm", "warning", "echo tsc | sudo tee"),
        ("acpi_pm", "acpi_pm", "warning", "firmware"),
    ):
        (folder / "current_clocksource").write_text(f"{current}\n")
        (folder / "available_clocksource").write_text(f"{others}\n")
        found = software.clock(tmp_path)
        assert found.status == status
        assert fix in found.fix


# --- firewalls --------------------------------------------------------------------------------------------------------

UDP_4791 = {"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": 4791}}
UDP_RANGE = {
    "match": {
        "op": "==",
        "left": {"payload": {"protocol": "udp", "field": "dport"}},
        "right": {"set": [22, {"range": [4000, 5000]}]},
    }
}
ALL_UDP = {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "udp"}}
NFT_FIX = "sudo nft insert rule inet filter input udp dport 4791 accept."
IPTABLES_FIX = "sudo iptables -I INPUT -p udp --dport 4791 -j ACCEPT."
UFW_DENIES = "Status: active\nDefault: deny (incoming), allow (outgoing)\n\n"
TCP_22 = {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 22}}


def ruleset(policy: str, *rules: list[Any]) -> str:
    chain = {
        "family": "inet",
        "table": "filter",
        "name": "input",
        "handle": 1,
        "type": "filter",
        "hook": "input",
        "policy": policy,
    }
    items: list[dict[str, Any]] = [{"metainfo": {"version": "1.0.6"}}, {"chain": chain}]
    for number, rule in enumerate(rules):
        place = {"family": "inet", "table": "filter", "chain": "input", "handle": 10 + number}
        items.append({"rule": {**place, "expr": rule}})
    return json.dumps({"nftables": items})


def answers(**known: str) -> firewall.Run:
    """`ask`, where only these programs are installed; `_` in their names for `-`."""
    return lambda program, *arguments: known.get(program.replace("-", "_"))


@pytest.mark.parametrize(
    ("known", "status", "fix"),
    [
        ({}, "note", ""),
        ({"firewall_cmd": "not running\n"}, "note", ""),
        ({"ufw": "Status: inactive\n"}, "note", ""),
        ({"ufw": f"{UFW_DENIES}22/tcp  ALLOW IN  Anywhere\n"}, "warning", "sudo ufw allow 4791/udp."),
        ({"ufw": f"{UFW_DENIES}4791/udp  ALLOW IN  Anywhere\n"}, "ok", ""),
        ({"ufw": f"{UFW_DENIES}4000:5000/udp  ALLOW IN  10.0.0.0/24\n"}, "ok", ""),
        ({"ufw": f"{UFW_DENIES}Anywhere  ALLOW IN  10.0.0.0/24\n"}, "ok", ""),
        ({"ufw": f"{UFW_DENIES}4791/udp  DENY IN  Anywhere\n"}, "warning", "sudo ufw allow 4791/udp."),
        ({"ufw": f"{UFW_DENIES}4000:5000/udp  DENY IN  Anywhere\n"}, "warning", "sudo ufw insert 1 allow 4791/udp."),
        ({"ufw": "Status: active\nDefault: allow (incoming), allow (outgoing)\n"}, "ok", ""),
        ({"nft": "not JSON"}, "note", ""),
        ({"nft": ruleset("accept")}, "ok", ""),
        ({"nft": ruleset("accept", [TCP_22, {"drop": None}])}, "ok", ""),
        ({"nft": ruleset("accept", [UDP_4791, {"drop": None}])}, "warning", NFT_FIX),
        ({"nft": ruleset("accept", [UDP_RANGE, {"reject": None}])}, "warning", NFT_FIX),
        ({"nft": ruleset("accept", [ALL_UDP, {"drop": None}])}, "warning", NFT_FIX),
        ({"nft": ruleset("accept", [UDP_4791, {"accept": None}], [UDP_RANGE, {"drop": None}])}, "ok", ""),
        ({"nft": ruleset("drop", [TCP_22, {"accept": None}])}, "warning", NFT_FIX),
        ({"nft": ruleset("drop", [UDP_RANGE, {"accept": None}])}, "ok", ""),
        ({"nft": ruleset("accept", [{"counter": None}, {"drop": None}])}, "warning", NFT_FIX),
        # What iptables has put there, and nft can't show
        ({"nft": ruleset("accept", [{"xt": {"type": "match", "name": "conntrack"}}, {"drop": None}])}, "ok", ""),
        ({"nft": ruleset("accept", [{"xt": {"type": "target", "name": "REJECT"}}])}, "warning", NFT_FIX),
        (
            {"nft": ruleset("accept", [{"xt": {"type": "match", "name": "comment"}}, {"drop": None}])},
            "warning",
            NFT_FIX,
        ),
        ({"nft": ruleset("accept", [{"xt": None}, {"drop": None}])}, "ok", ""),
        ({"nft": ruleset("accept", [{"limit": {"rate": 1}}, {"drop": None}])}, "ok", ""),
        ({"iptables": "-P INPUT ACCEPT\n"}, "ok", ""),
        ({"iptables": "-P INPUT DROP\n"}, "warning", IPTABLES_FIX),
        ({"iptables": "-P INPUT ACCEPT\n-A INPUT -p udp -m udp --dport 4791 -j DROP\n"}, "warning", IPTABLES_FIX),
        (
            {"iptables": "-P INPUT ACCEPT\n-A INPUT -j REJECT --reject-with icmp-host-prohibited\n"},
            "warning",
            IPTABLES_FIX,
        ),
        ({"iptables": "-P INPUT ACCEPT\n-A INPUT -m conntrack --ctstate INVALID -j DROP\n"}, "ok", ""),
        ({"iptables": "-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp --dport 4791 -j DROP\n"}, "ok", ""),
        ({"iptables": "-P INPUT DROP\n-A INPUT -p udp -m udp --dport 4000:5000 -j ACCEPT\n"}, "ok", ""),
    ],
)
def test_firewalls(known: dict[str, str], status: str, fix: str) -> None:
    found = firewall.firewall(answers(**known))
    assert found.status == status, found
    assert fix in found.fix


@pytest.mark.parametrize(
    ("is_open", "target", "status"),
    [("yes", "default", "ok"), ("no", "ACCEPT", "ok"), ("no", "default", "warning"), ("no", "DROP", "warning")],
)
def test_firewalld(is_open: str, target: str, status: str) -> None:
    says = {
        "--state": "running\n",
        "--query-port=4791/udp": f"{is_open}\n",
        "--list-all": f"public (active)\n  target: {target}\n  ports: 22/tcp\n",
    }
    found = firewall.firewall(lambda program, *arguments: says.get(arguments[0]))
    assert found.status == status
    assert ("--add-port=4791/udp" in found.fix) is (status == "warning")


def test_programs_that_are_not_there_or_fail_say_nothing() -> None:
    assert firewall.run("/no/such/program") is None
    assert firewall.run("false") is None
    assert firewall.run("echo", "words") == "words\n"


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
