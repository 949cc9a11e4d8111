"""Peers with the wrong CURVE keys, beside a live stream of those with the right ones. (What each hears: test_keys.py.)"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from helpers import TIMEOUT_S, check_frames, wait_until
from streams import Stream, streaming

import rdmaxfer
from rdmaxfer.cm.curve import make_keys
from rdmaxfer.cm.gate import LINES_A_MINUTE

BOUND = pytest.mark.parametrize("bound", ["receiver", "sender"])
PROMPTLY_S = 5.0
"""A second or two, on a machine that has other things to do."""


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Pairs for `bound`, `friend` and `stranger`; the directory `allowed` has the friend's. `forged` is the friend's public key and
    the stranger's secret one."""
    for name in ("bound", "friend", "stranger"):
        make_keys(tmp_path / name)
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "friend.key").write_bytes((tmp_path / "friend.key").read_bytes())
    forged = tmp_path / "forged.key_secret"
    friend, stranger = ((tmp_path / f"{name}.key_secret").read_text() for name in ("friend", "stranger"))
    public = re.search(r'public-key = "(.*)"', friend)
    secret = re.search(r'secret-key = "(.*)"', stranger)
    assert public
    assert secret
    forged.write_text(f'metadata\ncurve\n    public-key = "{public[1]}"\n    secret-key = "{secret[1]}"\n')
    forged.chmod(0o600)
    return tmp_path


def own(keys: Path, name: str) -> dict[str, Any]:
    return {"secret_key": keys / f"{name}.key_secret"} if name else {}


def friends(keys: Path, bound: str) -> tuple[Any, Any]:
    """A bound and a connecting side that belong together."""
    here, there = (rdmaxfer.Receiver, rdmaxfer.Sender) if bound == "receiver" else (rdmaxfer.Sender, rdmaxfer.Receiver)
    return here(**own(keys, "bound"), allowed_keys=keys / "allowed"), there(**own(keys, "friend"))


@contextlib.contextmanager
def living(keys: Path, bound: str) -> Iterator[tuple[Any, Any, str, Stream]]:
    here, there = friends(keys, bound)
    with here, there:
        endpoint = here.bind("tcp://127.0.0.1:*")
        there.connect(endpoint, timeout=TIMEOUT_S, peer_key=keys / "bound.key")
        here.wait_for_peers(1, timeout=TIMEOUT_S)
        tx, rx = (here, there) if bound == "sender" else (there, here)
        with streaming(tx, rx) as stream:
            stream.goes_on()
            yield here, there, endpoint, stream
        for node in (here, there):
            assert node.statistics().peers == 1
            assert node.statistics().reconnects == node.statistics().peers_lost == 0


@BOUND
@pytest.mark.parametrize(
    ("me", "expected"),
    [("stranger", "bound"), ("friend", "stranger"), ("forged", "bound"), ("stranger", "stranger"), ("", "")],
    ids=["unknown key", "another server's key", "forged key", "nothing right", "no key"],
)
def test_who_has_the_wrong_keys_is_refused_at_once_counted_and_harms_nobody(
    bound: str, me: str, expected: str, keys: Path
) -> None:
    with living(keys, bound) as (here, there, endpoint, stream), type(there)(**own(keys, me)) as other:
        assert here.statistics().turned_away == 0
        for turn in range(1, 4):
            began = time.monotonic()
            with pytest.raises(rdmaxfer.Refused) as caught:
                other.connect(endpoint, timeout=TIMEOUT_S, peer_key=keys / f"{expected}.key" if expected else None)
            assert time.monotonic() - began < PROMPTLY_S
            assert caught.value.code == "curve"
            wait_until(lambda turn=turn: here.statistics().turned_away >= turn, "it was counted")
            stream.goes_on()
        assert here.statistics().peers == 1
        assert other.statistics().peers == 0


@BOUND
def test_a_plain_endpoint_takes_nobody_with_keys(bound: str, keys: Path) -> None:
    here_kind, there_kind = (
        (rdmaxfer.Receiver, rdmaxfer.Sender) if bound == "receiver" else (rdmaxfer.Sender, rdmaxfer.Receiver)
    )
    with here_kind() as here, there_kind() as there, there_kind(**own(keys, "friend")) as other:
        endpoint = here.bind("tcp://127.0.0.1:*")
        there.connect(endpoint, timeout=TIMEOUT_S)
        here.wait_for_peers(1, timeout=TIMEOUT_S)
        tx, rx = (here, there) if bound == "sender" else (there, here)
        with streaming(tx, rx) as stream:
            began = time.monotonic()
            with pytest.raises(rdmaxfer.Refused) as caught:
                other.connect(endpoint, timeout=TIMEOUT_S, peer_key=keys / "bound.key")
            assert time.monotonic() - began < PROMPTLY_S
            assert caught.value.code == "curve"
            wait_until(lambda: here.statistics().turned_away >= 1, "it was counted")
            stream.goes_on()
        assert here.statistics().peers == 1


@BOUND
def test_a_flood_of_unknown_keys(bound: str, keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They try again and again, as ZeroMQ does by itself; somebody with a good key gets in beside them, and the log stays short."""
    server_key = (keys / "bound.key").read_text().split('"')[1].encode()
    with (
        caplog.at_level(logging.WARNING, "rdmaxfer"),
        living(keys, bound) as (here, there, endpoint, stream),
        zmq.Context() as context,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(50):
            socket = stack.enter_context(context.socket(zmq.DEALER))
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 10)
            public, secret = zmq.curve_keypair()
            socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = public, secret, server_key
            socket.connect(endpoint)
        wait_until(lambda: here.statistics().turned_away >= 50, "all of them were turned away")
        stream.goes_on()
        stream.finish()
        with type(there)(**own(keys, "friend")) as newcomer:
            newcomer.connect(endpoint, timeout=TIMEOUT_S, peer_key=keys / "bound.key")
            here.wait_for_peers(2, timeout=TIMEOUT_S)
        wait_until(lambda: here.statistics().peers == 1, "the newcomer has left")
        tx, rx = (here, there) if bound == "sender" else (there, here)
        check_frames(tx, rx)
    lines = [record for record in caplog.records if "turned away" in record.getMessage()]
    assert 1 <= len(lines) <= 2 * (LINES_A_MINUTE + 1)
