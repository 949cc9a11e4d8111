"""Strangers at a bound endpoint, and how much of the log they get. No device."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import zmq

from rdmaxfer.cm import gate
from rdmaxfer.cm.curve import AllowedKeys, load_public_key, make_keys
from rdmaxfer.cm.gate import LINES_A_MINUTE, MENTION_AGAIN_S, Gate, Mentions


def key(number: int) -> bytes:
    return b"%040d" % number


def test_each_key_is_mentioned_once_in_a_while() -> None:
    mentions = Mentions()
    assert mentions.take(key(1), 0.0) == (True, 0)
    assert mentions.take(key(2), 1.0) == (True, 0)
    for second in range(2, 60):
        assert mentions.take(key(1), second) == (False, 0)
    assert mentions.take(key(1), 60.0) == (False, 58), "the others are counted once a minute"
    assert mentions.take(key(3), 61.0) == (True, 0)
    assert mentions.take(key(1), MENTION_AGAIN_S) == (True, 1)


def test_there_are_only_so_many_lines_a_minute() -> None:
    mentions = Mentions()
    said = [mentions.take(key(number), number / 1000) for number in range(10_000)]
    assert said == [(True, 0)] * LINES_A_MINUTE + [(False, 0)] * (10_000 - LINES_A_MINUTE)
    assert mentions.take(key(10_000), 60.0) == (True, 10_000 - LINES_A_MINUTE)
    assert mentions.take(key(11), 60.0) == (True, 0), "it was never mentioned"
    assert mentions.take(key(10_001), 3 * 60.0) == (True, 0)


def test_what_was_mentioned_is_not_remembered_without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_REMEMBERED", 5)
    mentions = Mentions(lines_a_minute=1_000_000)
    for number in range(100):
        assert mentions.take(key(number), number / 10) == (True, 0)
    assert len(mentions._said_s) == 5
    assert mentions.take(key(99), 10.0) == (False, 0)
    assert mentions.take(key(0), 10.0) == (True, 0), "it was forgotten"


def test_a_flood_of_unknown_keys_leaves_a_few_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_keys(tmp_path / "friend")
    friend = load_public_key(tmp_path / "friend.key")
    with zmq.Context() as context, caplog.at_level(logging.WARNING, "rdmaxfer"):
        bound = Gate(context, AllowedKeys(tmp_path))
        for number in range(1000):
            assert not bound.callback("", key(number))
            assert bound.callback("", friend)
        bound.socket.close(linger=0)
    assert len(caplog.records) == LINES_A_MINUTE
    assert key(0).decode() in caplog.text


def test_a_bad_file_among_the_keys_is_mentioned_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_keys(tmp_path / "friend")
    friend = load_public_key(tmp_path / "friend.key")
    allowed = AllowedKeys(tmp_path)
    with caplog.at_level(logging.WARNING, "rdmaxfer"):
        (tmp_path / "bad.key").write_text("rubbish")
        for _ in range(100):  # the directory has changed just now, so it is read each time
            assert allowed.name_of(friend) == "friend"
        assert len(caplog.records) == 1
        (tmp_path / "bad.key").write_text('public-key = "short"')
        allowed.name_of(friend)
        assert len(caplog.records) == 2, "it is bad for another reason now"
        (tmp_path / "bad.key").unlink()
        allowed.name_of(friend)
        (tmp_path / "bad.key").write_text("rubbish")
        allowed.name_of(friend)
        assert len(caplog.records) == 3
