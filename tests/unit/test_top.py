"""What `rdmaxfer top` makes of what processes say of themselves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rdmaxfer import status
from rdmaxfer.cli import main, top

STATISTICS = {"frames": 100, "bytes": 1_000_000, "leased": 3, "missed": 0, "reconnecting": 0, "push_to_recv": None}
RECEIVER: dict[str, Any] = {
    "pid": 7,
    "uid": 2**31,
    "role": "receiver",
    "program": ["/x/venv/bin/rdmaxfer", "recv", "tcp://0.0.0.0:7471"],
    "since_s": 1.0,
    "at_s": 10.0,
    "slots": 16,
    "endpoints": ["tcp://0.0.0.0:7471"],
    "links": [{"peer": "camera/12", "fabric": "verbs", "reason": "so"}],
    "statistics": STATISTICS,
}
SENDER: dict[str, Any] = {
    **RECEIVER,
    "pid": 8,
    "role": "sender",
    "links": [],
    "statistics": {**STATISTICS, "unreleased": 5, "dropped": 2, "unheard": 1},
}


def later(known: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**known, "at_s": known["at_s"] + 2, "statistics": {**known["statistics"], **changes}}


def test_a_long_command_is_visibly_cut() -> None:
    assert top.program(["/usr/bin/rdmaxfer", "send", "tcp://127.0.0.1:7471"]) == "rdmaxfer send tcp://127.0.0.1:7471"
    cut = top.program(["/usr/bin/rdmaxfer", "send", "tcp://127.0.0.1:7471", "--pattern", "1080x1920:uint16"])
    assert len(cut) == top.PROGRAM_WIDTH
    assert cut.endswith("--pattern 10\u2026")


def test_rates_are_those_since_the_look_before() -> None:
    latency = {"median_s": 0.001, "p99_s": 0.0123}
    row = top.row(later(RECEIVER, frames=140, bytes=9_000_000, push_to_recv=latency, missed=4), RECEIVER)
    assert row == top.Row(
        "7",
        str(2**31),
        "receiver",
        "rdmaxfer recv tcp://0.0.0.0:7471",
        "camera/12 verbs",
        "20.0",
        "4.0",
        "3 of 16",
        "1, 12.3",
        "4",
    )
    assert top.row(RECEIVER, None).frames == ""


def test_senders_tell_what_they_hold_and_dropped() -> None:
    row = top.row(SENDER, None)
    assert (row.ring, row.lost, row.peers) == ("5 of 16", "3", "nobody yet, at tcp://0.0.0.0:7471")


def test_who_is_busy_is_shown_all_the_same() -> None:
    busy = {key: value for key, value in RECEIVER.items() if key not in ("statistics", "links", "endpoints")}
    assert top.row({**busy, "busy": True}, RECEIVER).peers == "busy"
    assert top.row(later(RECEIVER), {**busy, "busy": True}).frames == ""


def test_many_peers_are_cut() -> None:
    links = [{"peer": f"p{number}", "fabric": "shm"} for number in range(7)]
    text = top.peers({**RECEIVER, "links": links, "statistics": {**STATISTICS, "reconnecting": 1}})
    assert text.splitlines() == ["p0 shm", "p1 shm", "p2 shm", "p3 shm", "and 4 more"]


def test_text_of_others_can_do_nothing_to_the_terminal() -> None:
    row = top.row({**RECEIVER, "program": ["a\x1b[2J"], "links": [{"peer": "x\x1b]0;evil\x07", "fabric": "shm"}]}, None)
    assert "\x1b" not in "".join(row)


def test_the_screen_is_a_table() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(top.screen([top.row(RECEIVER, None), top.row(SENDER, None)]))
    for text in ("PID", "connected with, by", "camera/12 verbs", "nobody yet"):
        assert text in out.getvalue()
    out = io.StringIO()
    Console(file=out, width=160).print(top.screen([]))
    assert "rdmaxfer recv tcp://0.0.0.0:7471" in out.getvalue()


def test_names_of_others_and_noise_are_passed_over(tmp_path: Path, capsys: Any) -> None:
    another = f"{status.PREFIX}{2**31}/1/x"  # of a user that is not this one
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(f"\0{another}")
        squatter.listen()
        table = tmp_path / "unix"
        table.write_text(
            "Num       RefCount Protocol Flags    Type St Inode Path\n"
            f"0000: 00000002 00000000 00010000 0001 01 1 @{another}\n"
            f"0000: 00000002 00000000 00010000 0001 01 2 @{status.PREFIX}{os.geteuid()}/2/gone\n"
            "0000: 00000002 00000000 00010000 0001 01 3 /run/systemd\n"
        )
        assert list(status.find(table)) == []
    assert main(["top", "--json"]) == 0
    assert capsys.readouterr().out.startswith("[")


@contextlib.contextmanager
def telling(table: Path, tell: Callable[[socket.socket], None]) -> Iterator[None]:
    """Somebody is in `table`, for status.find, and does this with the first who asks."""
    name = f"{status.PREFIX}{os.geteuid()}/1/{os.urandom(4).hex()}"
    table.write_text(f"0000: 00000002 00000000 00010000 0001 01 1 @{name}\n")

    def serve() -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            tell(connection)

    with socket.socket(socket.AF_UNIX) as listening, ThreadPoolExecutor(1) as pool:
        listening.bind(f"\0{name}")
        listening.listen()
        listening.settimeout(10)
        told = pool.submit(serve)
        yield
        told.result()


def test_a_right_answer_is_found_with_its_user(tmp_path: Path) -> None:
    answer = {key: value for key, value in RECEIVER.items() if key != "uid"}
    with telling(tmp_path / "unix", lambda connection: connection.sendall(json.dumps(answer).encode())):
        assert list(status.find(tmp_path / "unix")) == [{**answer, "uid": os.geteuid()}]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"[" * 100_000,
        json.dumps({**RECEIVER, "pid": "1"}).encode(),
        json.dumps({**RECEIVER, "role": "root"}).encode(),
        json.dumps({**RECEIVER, "slots": 10**40}).encode(),
        json.dumps({**RECEIVER, "links": [1]}).encode(),
        json.dumps({**RECEIVER, "statistics": {"frames": 1}}).encode(),
    ],
    ids=range(10),
)
def test_answers_that_are_wrong_are_passed_over(answer: bytes, tmp_path: Path) -> None:
    with telling(tmp_path / "unix", lambda connection: connection.sendall(answer)):
        assert list(status.find(tmp_path / "unix")) == []


def test_who_answers_byte_by_byte_is_not_waited_for(tmp_path: Path) -> None:
    pace = threading.Event()

    def drip(connection: socket.socket) -> None:
        while not pace.wait(0.01):
            connection.sendall(b" ")

    with telling(tmp_path / "unix", drip):
        began_s = time.monotonic()
        assert list(status.find(tmp_path / "unix")) == []
        assert time.monotonic() - began_s < 5 * status.ANSWER_S
