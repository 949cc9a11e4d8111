"""CURVE keys with real frames: who is let in, who is not, and what that costs the others."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TIMEOUT_S, check_frames, picture, resources, wait_until

import rdmaxfer
from rdmaxfer.cm.curve import make_keys


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Pairs for `bound`, `friend` and `stranger`; the directory `allowed` has the friend's."""
    for name in ("bound", "friend", "stranger"):
        make_keys(tmp_path / name)
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "friend.key").write_bytes((tmp_path / "friend.key").read_bytes())
    return tmp_path


def own(keys: Path, name: str) -> dict[str, Any]:
    return {"secret_key": keys / f"{name}.key_secret"}


@pytest.mark.parametrize("bound", [rdmaxfer.Sender, rdmaxfer.Receiver])
def test_frames_between_friends(bound: Any, keys: Path) -> None:
    joining = rdmaxfer.Receiver if bound is rdmaxfer.Sender else rdmaxfer.Sender
    with bound(**own(keys, "bound"), allowed_keys=keys / "allowed") as here, joining(**own(keys, "friend")) as there:
        there.connect(here.bind("tcp://127.0.0.1:*"), timeout=TIMEOUT_S, peer_key=keys / "bound.key")
        tx, rx = (here, there) if bound is rdmaxfer.Sender else (there, here)
        check_frames(tx, rx)
        assert here.statistics().turned_away == 0


@contextlib.contextmanager
def stream(keys: Path) -> Iterator[tuple[rdmaxfer.Sender, rdmaxfer.Receiver, str]]:
    with (
        rdmaxfer.Receiver(**own(keys, "bound"), allowed_keys=keys / "allowed") as rx,
        rdmaxfer.Sender(**own(keys, "friend")) as tx,
    ):
        endpoint = rx.bind("tcp://127.0.0.1:*")
        tx.connect(endpoint, timeout=TIMEOUT_S, peer_key=keys / "bound.key")
        check_frames(tx, rx)
        yield tx, rx, endpoint


@pytest.mark.parametrize(
    ("me", "expected", "text"),
    [
        ("stranger", "bound", "does not let this side's key in"),
        ("friend", "stranger", "does not have the key"),
        (None, None, "wants a CURVE key"),
    ],
)
def test_who_is_not_let_in_hears_why_and_leaves_nothing(
    me: str | None, expected: str | None, text: str, keys: Path
) -> None:
    with stream(keys) as (tx, rx, endpoint), rdmaxfer.Sender(**(own(keys, me) if me else {})) as other:
        before = but_for_memory()
        for turn in range(3):
            began = time.monotonic()
            with pytest.raises(rdmaxfer.Refused, match=text) as caught:
                other.connect(endpoint, timeout=TIMEOUT_S, peer_key=keys / f"{expected}.key" if expected else None)
            assert time.monotonic() - began < 15
            assert caught.value.code == "curve"
            wait_until(lambda want=turn + 1: rx.statistics().turned_away >= want, "it was counted")
            check_frames(tx, rx)
        assert rx.statistics().peers == 1
        other.close()
        assert but_for_memory() == before


def but_for_memory() -> dict[str, int]:
    """Staging slots are registered when they are first needed."""
    return {kind: count for kind, count in resources().items() if kind in ("pd", "cq", "qp", "ctx")}


def test_what_belongs_together_must_be_given_together(keys: Path) -> None:
    for make in (rdmaxfer.Sender, rdmaxfer.Receiver):
        with pytest.raises(rdmaxfer.CurveError, match="no secret_key"):
            make(allowed_keys=keys / "allowed")
        with pytest.raises(rdmaxfer.CurveError, match="can't be used as a key"):
            make(secret_key=keys / "nobody.key_secret")
        with make(**own(keys, "bound")) as node:
            with pytest.raises(rdmaxfer.CurveError, match="whose keys to let in"):
                node.bind("tcp://127.0.0.1:*")
            with pytest.raises(rdmaxfer.CurveError, match="needs both"):
                node.connect("tcp://127.0.0.1:9", timeout=1)
        with make() as node, pytest.raises(rdmaxfer.CurveError, match="needs both"):
            node.connect("tcp://127.0.0.1:9", timeout=1, peer_key=keys / "bound.key")


def test_an_open_door_is_mentioned_once(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rdmaxfer"):
        with rdmaxfer.Receiver() as rx:
            rx.bind("tcp://127.0.0.1:*")
            rx.bind("tcp://[::1]:*")
            assert not caplog.records
            for _ in range(2):
                rx.bind("tcp://0.0.0.0:*")
        assert [record.getMessage()[:16] for record in caplog.records] == ["whoever can reac"]
        caplog.clear()
        with rdmaxfer.Receiver(**own(keys, "bound"), allowed_keys=keys / "allowed") as rx:
            rx.bind("tcp://0.0.0.0:*")
        assert not caplog.records


def test_keys_on_the_command_line(tmp_path: Path) -> None:
    def rdmaxfer_says(*arguments: str, **options: Any) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "rdmaxfer", *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            cwd=tmp_path,
        )
        assert done.returncode == options.get("code", 0), done.stderr
        return done.stdout + done.stderr

    with socket.socket() as probe:  # a port that is free now
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    for name in ("receiver", "camera"):
        assert f"{name}.key is for everybody" in rdmaxfer_says("keygen", name)
    assert "choose another name" in rdmaxfer_says("keygen", "camera", code=2)
    (tmp_path / "allowed").mkdir()
    (tmp_path / "camera.key").rename(tmp_path / "allowed" / "camera.key")
    np.save(tmp_path / "picture.npy", picture(1))
    recv = [sys.executable, "-m", "rdmaxfer", "recv", endpoint, "--secret-key", "receiver.key_secret"]
    recv += ["--allowed-keys", "allowed", "--verify", "--count", "1"]
    receiver = subprocess.Popen(recv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        to = ("send", endpoint, "picture.npy", "--timeout", "30")
        assert "wants a CURVE key" in rdmaxfer_says(*to, code=4)
        rdmaxfer_says(*to, "--secret-key", "camera.key_secret", "--peer-key", "receiver.key")
        out, _ = receiver.communicate(timeout=TIMEOUT_S)
        assert receiver.returncode == 0, out
    finally:
        receiver.kill()
        receiver.wait()
