"""`rdmaxfer doctor`: each of its findings is provoked for real, and mended by the command that it gives."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import TIMEOUT_S
from soft_roce import ADDRESS, SoftRoCE, run
from test_cli_device import running

from rdmaxfer.cli.counters import device_parent
from rdmaxfer.fabric.devices import Route

pytestmark = pytest.mark.verbs

Findings = list[dict[str, str]]
PORT = "rxtest port 1"


@pytest.fixture
def device(route: Route) -> Iterator[SoftRoCE]:
    if device_parent(route.device) is None:
        pytest.skip("a network card is tested here, and it is not ours to ruin; Soft-RoCE may not be there")
    made = SoftRoCE()
    made.make()
    run("ip", "link", "set", made.netdev, "mtu", "4200")
    yield made
    made.unmake()


def doctor(*arguments: str) -> Findings:
    return doctor_by([sys.executable, "-m", "rdmaxfer", "doctor", "--json", *arguments])


def doctor_by(command: list[str]) -> Findings:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode in (0, 1), done.stderr
    found: Findings = json.loads(done.stdout)
    assert done.returncode == any(each["status"] == "failed" for each in found), found
    assert all(each["fix"] for each in found if each["status"] in ("warning", "failed")), found
    return found


def of(found: Findings, name: str, status: str) -> dict[str, str]:
    """The one finding of this name that is not fine."""
    (bad,) = [each for each in found if each["name"] == name and each["status"] != "ok"]
    assert bad["status"] == status, bad
    return bad


def fine(found: Findings, *names: str) -> None:
    assert {each["name"] for each in found}.issuperset(names)
    assert [each for each in found if each["name"] in names and each["status"] != "ok"] == []


def do(command: str) -> None:
    """What it says is to be done. These tests are run by root, who may have no sudo."""
    run("bash", "-c", command.replace("sudo ", ""))


def command_in(fix: str, begin: str) -> str:
    """The command that begins so, up to the end of the phrase."""
    rest = fix[fix.index(begin) :]
    return rest.partition(",")[0].partition("; ")[0].rstrip(".")


def test_a_port_that_is_down(device: SoftRoCE) -> None:
    run("ip", "link", "set", device.netdev, "down")
    bad = of(doctor("--device", device.name), PORT, "failed")
    assert "not ACTIVE" in bad["detail"]
    do(command_in(bad["fix"], "sudo ip link set rxnet up"))
    assert "not ACTIVE" not in json.dumps(doctor("--device", device.name))


def test_another_port_that_is_down_is_no_failure(device: SoftRoCE) -> None:
    run("ip", "link", "set", device.netdev, "down")
    bad = of(doctor(), PORT, "note")
    assert "another port is" in bad["detail"]
    do(bad["fix"].partition(": ")[2].rstrip("."))
    fine(doctor("--device", device.name), PORT)


def test_an_iwarp_device(device: SoftRoCE) -> None:
    device.delete()
    run("rdma", "link", "add", "siwtest", "type", "siw", "netdev", device.netdev)
    try:
        found = doctor()
        fine(found, "a frame to ourselves")
        assert "siwtest is an iWARP device" in of(found, "device", "note")["detail"]
        bad = of(doctor("--device", "siwtest"), "device", "failed")
        assert "`rdmaxfer devices`" in bad["fix"]
    finally:
        run("rdma", "link", "delete", "siwtest")


def test_a_name_that_no_device_has(route: Route) -> None:
    bad = of(doctor("--device", "mlx5_9"), "device", "failed")
    assert f"there is no device 'mlx5_9', but {route.device}" in bad["detail"]


def test_packets_that_are_small(device: SoftRoCE) -> None:
    run("ip", "link", "set", device.netdev, "mtu", "1500")
    bad = of(doctor("--device", device.name), PORT, "warning")
    assert "packets of only 1024 bytes" in bad["detail"]
    assert "rxnet has 1500 now" in bad["fix"]
    do(command_in(bad["fix"], "sudo ip link set rxnet mtu"))
    fine(doctor("--device", device.name), PORT)


def test_a_port_without_an_address(device: SoftRoCE) -> None:
    run("ip", "address", "del", f"{ADDRESS}/24", "dev", device.netdev)
    bad = of(doctor("--device", device.name), PORT, "warning")
    assert "no GID with an address" in bad["detail"]
    # The address that it proposes is that of another device here.
    do(command_in(bad["fix"], "sudo ip addr add").replace("192.168.77.1", ADDRESS))
    fine(doctor("--device", device.name), PORT, "choice", "a frame to ourselves")


def without(capability: str, shell: str = ":", *options: str) -> Findings:
    """What it finds where root may not do everything, after `shell` in the same shell."""
    command = shlex.join([sys.executable, "-m", "rdmaxfer", "doctor", "--json", *options])
    return doctor_by(["setpriv", "--bounding-set", capability, "bash", "-c", f"{shell}; {command}"])


def test_a_limit_on_locked_memory() -> None:
    found = without("-ipc_lock", "ulimit -S -l 8192")
    bad = of(found, "locked memory", "failed")
    assert "limit 8 MiB" in bad["detail"]
    assert of(found, "memory registration", "failed")
    found = without("-ipc_lock", f"ulimit -S -l 8192; {bad['fix'].split('`')[1]}")
    fine(found, "locked memory", "memory registration", "a frame to ourselves")


def test_a_ring_that_needs_more_than_the_limit() -> None:
    fine(without("-ipc_lock", "ulimit -l 131072"), "locked memory")
    found = without("-ipc_lock", "ulimit -l 131072", "--slots", "32", "--slot-bytes", "8M")
    assert of(found, "locked memory", "failed")


def test_a_user_who_may_not_open_the_device() -> None:
    (node,) = sorted(Path("/dev/infiniband").glob("uverbs*"))[:1]
    mode = node.stat().st_mode & 0o777
    try:
        node.chmod(0)
        bad = of(without("-dac_override,-dac_read_search"), "kernel", "failed")
        assert str(node) in bad["detail"]
        do(command_in(bad["fix"], "sudo chmod 666"))
        fine(without("-dac_override,-dac_read_search"), "kernel", "device")
    finally:
        node.chmod(mode)


def test_a_provider_library_that_is_not_installed() -> None:
    """As if the package that holds it were not there: what it installs is hidden."""
    command = shlex.join([sys.executable, "-m", "rdmaxfer", "doctor", "--json"])
    hide = f"mount -t tmpfs none /etc/libibverbs.d && {command}"
    found = doctor_by(["unshare", "--mount", "bash", "-c", hide])
    missing = [each for each in found if "no provider library" in each["detail"]]
    assert missing, found
    assert "ibverbs-providers" in missing[0]["fix"] or "libibverbs" in missing[0]["fix"]


def hidden(path: str) -> Findings:
    """What it finds where this is not there."""
    hide = f"mount -t tmpfs none {path}" if Path(path).is_dir() else f"mount --bind /dev/null {path}"
    command = shlex.join([sys.executable, "-m", "rdmaxfer", "doctor", "--json"])
    found = doctor_by(["unshare", "--mount", "bash", "-c", f"{hide} && {command}"])
    assert not {"choice", "a frame to ourselves"}.intersection(each["name"] for each in found)
    return found


def test_device_files_that_a_container_was_not_given() -> None:
    bad = of(hidden("/dev/infiniband"), "kernel", "failed")
    assert "/dev/infiniband is not there" in bad["detail"]
    assert "--device=/dev/infiniband" in bad["fix"]


@pytest.mark.parametrize(
    ("module", "name", "fix"),
    [
        ("pyverbs", "pyverbs", "install the distribution's python3-pyverbs"),
        ("rdmaxfer._verbs", "native core", "libibverbs-dev python3-dev"),
        ("libibverbs.so.1", "libibverbs", "apt install libibverbs1"),
    ],
)
def test_a_library_that_is_missing(module: str, name: str, fix: str) -> None:
    if module.startswith("lib"):
        import pyverbs.device  # noqa: F401 - it loads the library

        path = re.findall(rf"\S+/{module}\S*$", Path("/proc/self/maps").read_text(), re.MULTILINE)[0]
    else:
        path = importlib.import_module(module).__file__ or ""
    if path.endswith("__init__.py"):
        path = str(Path(path).parent)
    bad = of(hidden(path), name, "failed")
    assert fix in bad["fix"], bad


@pytest.mark.smoke
def test_huge_pages_and_what_is_known_of_the_kernel() -> None:
    found = doctor()
    fine(found, "libibverbs", "kernel", "device", "choice", "memory registration", "a frame to ourselves", "fork")
    notes = [each for each in found if each["name"] == "huge pages" and each["status"] == "note" and each["fix"]]
    if notes:  # this kernel has them, and too few
        settings = Path("/proc/sys/vm/nr_hugepages")
        before = settings.read_text()
        try:
            do(command_in(notes[0]["fix"], "sudo sysctl").partition(" (")[0])
            fine(doctor(), "huge pages")
        finally:
            settings.write_text(before)


def test_the_way_to_a_receiver() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"tcp://127.0.0.1:{port}"
    found = doctor("--peer", endpoint)
    bad = of(found, "TCP", "failed")
    assert f"nothing listens at port {port}" in bad["detail"]
    assert "frames" not in {each["name"] for each in found}
    recv = shlex.split(bad["fix"].split("`")[1])
    assert recv[:2] == ["rdmaxfer", "recv"]
    with running(*recv[1:]) as receiver:
        receiver.says("listening")
        found = doctor("--peer", endpoint, "--fabric", "verbs")
        fine(found, "address", "choice", "TCP", "meeting", "frames")
        (meeting,) = [each for each in found if each["name"] == "meeting"]
        assert "over verbs" in meeting["detail"]
        receiver.interrupt()
        assert "verified: 2 right, 0 wrong, 0 missing" in receiver.text


@pytest.mark.parametrize(
    ("other", "name", "says"),
    [
        (["send", "ENDPOINT", "--bind", "--pattern", "4x4"], "meeting", "a sender is bound"),
        (["recv", "ENDPOINT", "--fabric", "tcp"], "meeting", "over TCP only"),
    ],
    ids=["a sender", "another fabric"],
)
def test_a_peer_that_does_not_fit(other: list[str], name: str, says: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with running(*[endpoint if each == "ENDPOINT" else each for each in other]) as peer:
        peer.says("listening")
        found = doctor("--peer", endpoint, "--fabric", "verbs")
        bad = of(found, name, "failed")
        assert says in bad["detail"]


def test_something_else_listens_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = doctor("--peer", f"tcp://127.0.0.1:{server.getsockname()[1]}")
    assert "does not answer as an rdmaxfer does" in of(found, "meeting", "failed")["detail"]


def test_names_that_are_not_known() -> None:
    found = doctor("--peer", "tcp://no-such-host.invalid:7471")
    assert "is not known" in of(found, "address", "failed")["detail"]


def test_an_address_to_which_no_way_leads(device: SoftRoCE) -> None:
    endpoint = "tcp://203.0.113.9:7471"  # a network for documentation, RFC 5737
    bad = of(doctor("--peer", endpoint), "address", "failed")
    assert "no route to 203.0.113.9" in bad["detail"]
    assert "`ip route get 203.0.113.9`" in bad["fix"]
    run("ip", "route", "add", "203.0.113.0/24", "dev", device.netdev)
    found = doctor("--peer", endpoint)
    fine(found, "address")
    assert "no answer from port 7471" in of(found, "TCP", "failed")["detail"]


# --- firewalls, in a network of their own -----------------------------------------------------------------------------

CHAIN = "nft add table inet guard; nft add chain inet guard input '{ type filter hook input priority 0; policy %s; }'"
RULE = "nft add rule inet guard input %s"
# ufw keeps its rules in files, which are this machine's own
UFW = "mkdir -p /tmp/ufw && cp -r /etc/ufw/. /tmp/ufw && mount --bind /tmp/ufw /etc/ufw && ufw --force enable"
LOOK_MEND_LOOK = """
import json, subprocess
from rdmaxfer.cli.checks import firewall
for look in (firewall.firewall, lambda: firewall._iptables(firewall.run)):
    found = look()
    print(json.dumps(found._asdict()))
    if found.status == "warning":
        subprocess.run(found.fix.rstrip(".").replace("sudo ", ""), shell=True, check=True, stdout=subprocess.DEVNULL)
        print(json.dumps(look()._asdict()))
"""


@pytest.mark.parametrize(
    ("rules", "by"),
    [
        (f"{CHAIN % 'accept'}; {RULE % 'udp dport 4791 drop'}", "nftables"),
        (f"{CHAIN % 'accept'}; {RULE % 'udp dport 4000-5000 reject'}", "nftables"),
        (f"{CHAIN % 'accept'}; {RULE % 'udp dport { 53, 4791 } counter log drop'}", "nftables"),
        (f"{CHAIN % 'accept'}; {RULE % 'meta l4proto udp drop'}", "nftables"),
        (f"{CHAIN % 'drop'}; {RULE % 'ct state established accept'}; {RULE % 'tcp dport 22 accept'}", "nftables"),
        ("iptables -A INPUT -p udp --dport 4791 -j DROP", "iptables"),
        ("iptables -A INPUT -p udp -m comment --comment 'no RoCE' -j REJECT", "iptables"),
        ("iptables -A INPUT -i lo -j ACCEPT; iptables -A INPUT -j REJECT", "iptables"),
        ("iptables -P INPUT DROP; iptables -A INPUT -p tcp --dport 22 -j ACCEPT", "iptables"),
        (UFW, "ufw"),
        (f"{UFW}; ufw allow 22/tcp; ufw deny 4791/udp", "ufw"),
        (f"{UFW}; ufw deny 4000:5000/udp", "ufw"),
    ],
)
def test_a_firewall_that_drops_roce(rules: str, by: str) -> None:
    before, after, *by_iptables = looks(rules)
    assert (before["status"], after["status"]) == ("warning", "ok"), (before, after)
    assert before["fix"].startswith(f"sudo {'nft' if by == 'iptables' else by.removesuffix('tables')}"), before
    if by == "iptables":  # both see it, and the first one has mended it
        assert [each["status"] for each in by_iptables] == ["ok"]


@pytest.mark.parametrize(
    "rules",
    [
        f"{CHAIN % 'accept'}; {RULE % 'ct state invalid drop'}; {RULE % 'tcp dport 4791 drop'}",
        f"{CHAIN % 'accept'}; {RULE % 'udp dport 4791 accept'}; {RULE % 'drop'}",
        "iptables -A INPUT -m conntrack --ctstate INVALID -j DROP; iptables -A INPUT -p tcp -m multiport --dports 1,2 -j DROP",
        "iptables -A INPUT -s 10.1.1.1 -j DROP; iptables -A INPUT -p udp --dport 53 -j DROP",
        f"{UFW}; ufw allow 4791/udp",
        f"{UFW}; ufw allow from 10.0.0.0/24",
    ],
)
def test_a_firewall_that_lets_roce_in(rules: str) -> None:
    first = looks(rules)[0]
    assert first["status"] == "ok", first


def looks(rules: str) -> Findings:
    script = f"set -e; ({rules}) >/dev/null; {shlex.join([sys.executable, '-c', LOOK_MEND_LOOK])}"
    done = subprocess.run(
        ["unshare", "--net", "--mount", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
