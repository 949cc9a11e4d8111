"""The `rdmaxfer` command as two processes: files from one to the other, in any order, and how it ends."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, Background, wait_until

pytestmark = pytest.mark.verbs

Image = pytest.importorskip("PIL.Image")

PROMPTLY_S = 10.0


class Command:
    """A running `rdmaxfer` command, whose output is read as it comes."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rdmaxfer", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reading = [
            Background(lambda stream=s: self._read(stream)) for s in (self.process.stdout, self.process.stderr)
        ]

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def says(self, text: str) -> None:
        wait_until(lambda: text in self.text or self.process.poll() is not None, f"{text!r} was said")
        wait_until(lambda: text in self.text, f"{text!r} was said, but {self.text}", 5)

    def end(self) -> int:
        code = self.process.wait(TIMEOUT_S)
        for each in self._reading:
            each.result()
        return code

    def interrupt(self) -> None:
        """Ctrl-C, and a prompt end."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        assert self.end() == 130, self.text
        assert time.monotonic() - began < PROMPTLY_S
        assert "stopped by Ctrl-C" in self.text
        assert "Traceback" not in self.text


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Command]:
    command = Command(*arguments)
    try:
        yield command
    finally:
        command.process.kill()
        command.end()


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Pictures of several sizes and modes."""
    noise = np.random.default_rng(7)
    paths = []
    for index, shape in enumerate([(40, 60, 3), (33, 47), (20, 20, 4), (300, 500, 3), (1, 1, 3)]):
        path = tmp_path / f"photo-{index}.png"
        Image.fromarray(noise.integers(0, 256, shape, np.uint8)).save(path)
        paths.append(path)
    return paths


@pytest.fixture
def endpoint() -> str:
    """A port that is free now, for both sides to know before either is there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.smoke
@pytest.mark.parametrize("first", ["recv", "send"])
@pytest.mark.parametrize("binding", ["recv", "send"])
def test_photos_from_process_to_process(
    first: str, binding: str, photos: list[Path], endpoint: str, tmp_path: Path
) -> None:
    out = tmp_path / "received"
    ways = {
        "recv": ["recv", endpoint, "--verify", "--out", str(out), "--once"] + ["--connect"] * (binding == "send"),
        "send": ["send", endpoint, *map(str, photos)] + ["--bind"] * (binding == "send"),
    }
    second = "send" if first == "recv" else "recv"
    with running(*ways[first]) as one:
        if first == binding:
            one.says("listening at")
        with running(*ways[second]) as other:
            codes = {first: one.end(), second: other.end()}
            texts = {first: one.text, second: other.text}
    assert codes == {"recv": 0, "send": 0}, texts
    assert "sent 5 frames" in texts["send"]
    assert "received 5 frames" in texts["recv"]
    assert "verified: 5 right, 0 wrong, 0 missing" in texts["recv"]
    saved = sorted(out.iterdir())
    assert [path.name for path in saved] == [f"frame-{index:08}.png" for index in range(5)]
    for there, here in zip(saved, photos, strict=True):
        with Image.open(there) as received, Image.open(here) as sent:
            assert np.array_equal(np.asarray(received), np.asarray(sent))


def test_arrays_come_as_arrays(tmp_path: Path, endpoint: str) -> None:
    stack = np.random.default_rng(3).random((6, 5, 4))
    np.save(tmp_path / "stack.npy", stack)
    out = tmp_path / "received"
    with running("recv", endpoint, "--out", str(out), "--count", "6", "--verify") as recv:
        with running("send", endpoint, str(tmp_path / "*.npy"), "--split") as send:
            assert send.end() == 0, send.text
        assert recv.end() == 0, recv.text
    assert np.array_equal(np.stack([np.load(path) for path in sorted(out.iterdir())]), stack)


def test_ctrl_c_while_nobody_is_there(endpoint: str, photos: list[Path]) -> None:
    for arguments in (["recv", endpoint], ["send", endpoint, str(photos[0]), "--bind"]):
        with running(*arguments) as command:
            command.says("listening at")
            command.interrupt()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(TIMEOUT_S)
        with running("recv", f"tcp://127.0.0.1:{silent.getsockname()[1]}", "--connect", "--timeout", "60") as command:
            connection, _ = silent.accept()
            with connection:
                command.interrupt()


@pytest.mark.parametrize("who", ["recv", "send"])
@pytest.mark.parametrize("binding", ["recv", "send"])
def test_ctrl_c_in_mid_stream(who: str, binding: str, endpoint: str) -> None:
    with running("recv", endpoint, "--verify", "--once", *["--connect"] * (binding == "send")) as recv:
        arguments = ["--pattern", "100x100", "--count", "1000000", *["--bind"] * (binding == "send")]
        with running("send", endpoint, *arguments) as send:
            recv.says("now")
            stopped, other = (recv, send) if who == "recv" else (send, recv)
            stopped.interrupt()
            code = other.end()
            assert "Traceback" not in other.text
            if who == "recv":
                assert code == 1, other.text
                assert "left before it had released" in other.text or "closed the connection" in other.text
            else:
                assert code == 0, other.text
                assert " 0 wrong, 0 missing" in other.text


def test_a_sender_that_finds_nobody(endpoint: str, photos: list[Path]) -> None:
    with running("send", endpoint, str(photos[0]), "--timeout", "0.5") as send:
        assert send.end() == 4
        assert "did not connect within" in send.text
        assert "Fix: " in send.text


def test_a_receiver_that_nobody_finds(endpoint: str) -> None:
    with running("recv", endpoint, "--timeout", "0.5") as recv:
        assert recv.end() == 4
        assert "no sender connected within 0.5 s" in recv.text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["send", "nonsense", "--pattern", "4x4"], 2, "does not begin with tcp://"),
        (["recv", "tcp://127.0.0.1"], 2, "has no port"),
        (["send", "tcp://127.0.0.1:9", "--pattern", "4x4:object"], 1, "can't be sent"),
        (["send", "tcp://127.0.0.1:9", "/no/such/file.png"], 2, "there is no file"),
        (["send", "tcp://127.0.0.1:9"], 2, "nothing to send"),
        (["send", "tcp://127.0.0.1:9", "--pattern", "4x4", "--device", "mlx5_77"], 3, "no RDMA device 'mlx5_77'"),
        (["recv", "tcp://127.0.0.1:9", "--connect", "--gid-index", "250"], 3, "250"),
        (["recv", "tcp://203.0.113.7:7471"], 2, "no such address"),
        (["demo", "--device", "mlx5_77"], 3, "no RDMA device 'mlx5_77'"),
        (["doctor", "--device", "mlx5_77"], 1, "no device 'mlx5_77'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_with_one_sentence_and_their_exit_code(arguments: list[str], code: int, says: str) -> None:
    with running(*arguments) as command:
        assert command.end() == code, command.text
        assert says in command.text
        assert "Fix: " in command.text
        assert "Traceback" not in command.text


def test_a_frame_beyond_the_receivers_limit(endpoint: str) -> None:
    with running("recv", endpoint, "--max-frame-bytes", "64K", "--slot-bytes", "4K", "--once", "--verify") as recv:
        with running("send", endpoint, "--pattern", "65537", "--count", "3") as send:
            assert send.end() == 1, send.text
            assert "above the limit of 65536 bytes" in send.text
            assert "Fix: " in send.text
        with running("send", endpoint, "--pattern", "65536", "--count", "3") as send:
            assert send.end() == 0, send.text
        assert recv.end() == 0, recv.text
        assert "verified: 3 right" in recv.text


def test_doctor_is_green() -> None:
    with running("doctor") as doctor:
        assert doctor.end() == 0, doctor.text
        assert "Everything that rdmaxfer needs is there." in doctor.text
        assert "1 MiB was written by RDMA and arrived byte for byte" in doctor.text
    with running("doctor", "--json") as doctor:
        assert doctor.end() == 0, doctor.text
        assert {check["status"] for check in json.loads(doctor.text)} <= {"ok", "note", "warning"}


def test_a_video_arrives_in_its_colours(endpoint: str, tmp_path: Path) -> None:
    import cv2

    blue_first = np.zeros((48, 64, 3), np.uint8)
    blue_first[:, :, 2] = 250  # red
    writer = cv2.VideoWriter(str(tmp_path / "red.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for _ in range(5):
        writer.write(blue_first)
    writer.release()
    with running("recv", endpoint, "--once", "--verify", "--out", str(tmp_path / "out")) as recv:
        with running("send", endpoint, str(tmp_path / "red.avi")) as send:
            assert send.end() == 0, send.text
        assert recv.end() == 0, recv.text
        assert "verified: 5 right" in recv.text
    saved = sorted((tmp_path / "out").iterdir())
    assert len(saved) == 5
    with Image.open(saved[0]) as image:
        red, green, blue = np.asarray(image).reshape(-1, 3).mean(axis=0)
    assert red > 200 > 50 > green
    assert blue < 50


def test_bench_measures_what_it_says() -> None:
    seconds = 0.2
    with running("recv", "tcp://127.0.0.1:*", "--fabric", "verbs") as receiver:
        receiver.says("listening at ")
        endpoint = receiver.text.partition("listening at ")[2].split()[0]
        with running(
            "bench", endpoint, "--fabric", "verbs", "--seconds", str(seconds), "--sizes", "64", "64K", "--json"
        ) as bench:
            assert bench.end() == 0, bench.text
            found = json.loads(bench.text)
        receiver.interrupt()
        (received,) = re.findall(r"received (\d+) frames", receiver.text)
    assert found["fabric"] == "verbs"
    assert [row["nbytes"] for row in found["rows"]] == [64, 65536]
    for row in found["rows"]:
        assert row["mb_per_s"] == pytest.approx(row["frames_per_s"] * row["nbytes"] / 1e6)
        assert 0 < row["median_us"] <= row["p99_us"] < 1e6
    assert int(received) >= sum(row["frames_per_s"] for row in found["rows"]) * seconds, "fewer arrived than it says"
    with running("bench", "--fabric", "verbs", "--seconds", "0.1", "--sizes", "4K", "--copy") as bench:
        assert bench.end() == 0, bench.text
        assert "over verbs" in bench.text
        assert "MB/s" in bench.text


def test_devices_are_listed() -> None:
    with running("devices", "--json") as devices:
        assert devices.end() == 0, devices.text
        found = json.loads(devices.text)
        assert any(port["gids"] for device in found for port in device["ports"])
    with running("devices") as devices:
        assert devices.end() == 0, devices.text
        assert all(device["name"] in devices.text for device in found)


def test_demo_runs(tmp_path: Path) -> None:
    picture = tmp_path / "received.png"
    with running("demo", "--count", "4", "--save", str(picture)) as demo:
        assert demo.end() == 0, demo.text
        assert "4 of 4 arrived byte for byte" in demo.text
        assert "WRITE_WITH_IMM completions" in demo.text
        assert "fabric:    verbs; rxe0 port 1 GID" in demo.text
    with Image.open(picture) as image:
        assert image.size == (1920, 1080)
