"""The examples, as a user would run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TIMEOUT_S

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def test_streaming_images() -> None:
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "stream_images.py"), "receive", "tcp://127.0.0.1:*"],
        stdout=subprocess.PIPE,
        text=True,
    ) as receiver:
        try:
            assert receiver.stdout is not None
            endpoint = receiver.stdout.readline().split()[-1]
            assert "sent 30 images" in run("stream_images.py", "send", endpoint, "--count", "30")
            said = receiver.communicate(timeout=TIMEOUT_S)[0]
        finally:
            receiver.kill()
    assert said.count("brightness") == 30
    assert "median" in said


@pytest.mark.timeout(180)
def test_frames_for_workers() -> None:
    said = run("fan_out.py", "--workers", "2", "--count", "60")
    taken = [int(each) for each in re.findall(r"took (\d+) frames", said)]
    assert sum(taken) == 60
    assert all(taken)
    assert "all together: 60 of 60" in said


@pytest.mark.timeout(180)
def test_many_readers_of_one_stream() -> None:
    said = run("many_readers.py", "--readers", "2", "--count", "20")
    assert said.count("saw 20 frames, the right ones: True") == 2


@pytest.mark.timeout(180)
def test_a_detector() -> None:
    said = run("detector.py", "--rate", "50", "--seconds", "2")
    received, missed = map(int, re.findall(r"received (\d+) frames, missed (\d+)", said)[0])
    assert received + missed == 100
    assert "detector: 100 frames" in said


def test_all_examples_are_listed() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f"[{path.name}]" not in text] == []
