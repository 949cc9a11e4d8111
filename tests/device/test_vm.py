"""What takes a machine with modules and devices of its own: the QEMU VM, which is ruined and mended here."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from soft_roce import run
from test_cli_device import running
from test_doctor import do, doctor, fine, of

pytestmark = [pytest.mark.verbs, pytest.mark.smoke, pytest.mark.vm]

TOP = Path(__file__).parents[2]
CLOCKS = Path("/sys/devices/system/clocksource/clocksource0")


@pytest.fixture
def no_device() -> Iterator[None]:
    """The guest without its rxe0, which comes back in the end."""
    (link,) = json.loads(subprocess.run(["rdma", "--json", "link"], capture_output=True, check=True).stdout)
    run("rdma", "link", "delete", link["ifname"])
    yield
    with contextlib.suppress(subprocess.CalledProcessError):
        run(str(TOP / "scripts/setup_softroce.sh"), "down")
    run("rdma", "link", "add", link["ifname"], "type", "rxe", "netdev", link["netdev"])


def test_no_device_was_made_yet(no_device: None) -> None:
    bad = of(doctor(), "kernel", "failed")
    assert "has Soft-RoCE (rdma_rxe), but no device was made" in bad["detail"]
    script = bad["fix"].partition(",")[0]
    assert script == "sudo scripts/setup_softroce.sh up"
    do(f"cd {TOP} && {script}")
    fine(doctor(), "kernel", "device", "choice", "memory registration", "a frame to ourselves")


def test_no_device_was_made_yet_and_one_is_made_by_hand(no_device: None) -> None:
    bad = of(doctor(), "kernel", "failed")
    by_hand = bad["fix"].partition(": ")[2].removesuffix(".")
    # There is no modprobe for the guest's modules: they are loaded already.
    do(by_hand.replace("sudo modprobe rdma_rxe", "true").replace("DEV", "d0"))
    fine(doctor(), "kernel", "device", "choice", "a frame to ourselves")
    run("rdma", "link", "delete", "rxe0")


def test_a_slow_clock() -> None:
    current = CLOCKS / "current_clocksource"
    before = current.read_text()
    try:
        current.write_text("acpi_pm")
        bad = of(doctor(), "clock", "warning")
        assert "the time comes from acpi_pm" in bad["detail"]
        do(bad["fix"].removesuffix("."))
        fine(doctor(), "clock")
        assert current.read_text() != "acpi_pm\n"
    finally:
        current.write_text(before)


def test_a_camera(tmp_path: Path) -> None:
    """The kernel's virtual camera (vivid): what it sees differs from frame to frame, and comes as it was captured."""
    from PIL import Image

    with running("recv", "tcp://127.0.0.1:*", "--fabric", "verbs", "--verify", "--out", str(tmp_path)) as receiver:
        receiver.says("listening at ")
        (endpoint,) = re.findall(r"listening at (\S+)", receiver.text)
        with running("send", endpoint, "camera:0", "--count", "4") as sender:
            assert sender.end() == 0, sender.text
            assert "sent 4 frames" in sender.text
        receiver.interrupt()
        assert "verified: 4 right, 0 wrong, 0 missing" in receiver.text
    pictures = [np.asarray(Image.open(path)) for path in sorted(tmp_path.iterdir())]
    assert [picture.shape for picture in pictures] == [(480, 640, 3)] * 4
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert all(picture.std() > 10 for picture in pictures)
