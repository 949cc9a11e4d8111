"""Whatever a peer sends breaks no rule of what decodes it, and makes nothing grow (fuzz_targets.py has the rules).

A failure prints the line that repeats it. The bytes that failed belong into REGRESSIONS.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import re
import resource
import secrets
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import fuzz_sessions as sessions
import pytest
from fuzz_choices import Choices
from fuzz_examples import SLOT_BYTES, WHERE
from fuzz_targets import TARGETS
from packaging.requirements import Requirement
from soak import rounds

from rdmaxfer.cm import messages as m
from rdmaxfer.cm.states import REPLIES, ClientState
from rdmaxfer.errors import RemoteProtocolError
from rdmaxfer.frame import unpack

INPUTS = int(os.environ.get("RDMAXFER_FUZZ") or rounds(ci=100_000, soak=1_000_000))
SEED = os.environ.get("RDMAXFER_FUZZ_SEED") or secrets.token_hex(4)

WARM_INPUTS = 25_000
"""After so many, all caches are full."""
MAX_NEW_OBJECTS = 1500
"""That may be there at the end and were not after the first inputs. Not 0: the caches of dtypes and shapes (frame.py, 256 entries
each) hold other entries then, of up to a dozen objects. With 100,000 inputs, one that stays for every 50 would be seen."""
MAX_NEW_BYTES = 8 << 20
"""The same for the memory of the process: 256 entries of each cache may hold 8 KiB, and as much for what malloc can't give back."""

REGRESSIONS: list[tuple[str, str]] = [
    ("message", "5244"),
    ("message", "52444d4158465201" + "91" * 3000),
    ("message", "52444d41584652ff81a474797065a6726566757365"),
    ("message", "52444d4158465201ddffffffff"),
    ("header", "52584652" + "00" * 60),
    ("in_band", "ffffffff" + "00" * 12),
    ("server", "00"),
    ("client", "96fbf8b86bcfa4bc0afe68f86174604cbf70b2aa"),
]
"""Targets, and inputs that once broke a rule. Until there is one, a few that are likely to."""


def run(name: str, data: bytes, where: str) -> int:
    try:
        return TARGETS[name].run(data)
    except BaseException:
        print(what_to_do(name, data, where))
        raise


def what_to_do(name: str, data: bytes, where: str) -> str:
    return f"{where}; to repeat it, add to REGRESSIONS:\n({name!r}, {data.hex()!r})"


def used() -> tuple[int, int]:
    """Small objects that are allocated, and resident bytes, but for those that malloc keeps of what other tests have freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return sys.getallocatedblocks(), pages * resource.getpagesize()


@pytest.mark.counted
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TARGETS)
def test_changed_input_breaks_no_rule_and_leaves_nothing(name: str) -> None:
    target = TARGETS[name]
    made = done = 0
    before: tuple[int, int] | None = None
    while done < INPUTS:
        if before is None and done >= WARM_INPUTS:
            before = used()
        made += 1
        done += run(name, target.make(Choices(f"{SEED}/{made}")), f"RDMAXFER_FUZZ_SEED={SEED}, input {made}")
    if before is None:
        return  # too few for a word about memory
    blocks, size = (after - first for after, first in zip(used(), before, strict=True))
    print(f"{done} inputs; {blocks:+} objects, {size:+} bytes after the first {WARM_INPUTS}")
    assert blocks <= MAX_NEW_OBJECTS, f"{blocks} more objects (RDMAXFER_FUZZ_SEED={SEED})"
    assert size <= MAX_NEW_BYTES, f"{size} more bytes (RDMAXFER_FUZZ_SEED={SEED})"


def atheris_is_there() -> bool:
    """False where it can't be had. Raises where it was only not installed."""
    wanted = [Requirement(text) for text in importlib.metadata.requires("rdmaxfer") or ()]
    here = [
        each for each in wanted if each.name == "atheris" and each.marker and each.marker.evaluate({"extra": "fuzz"})
    ]
    if here and importlib.util.find_spec("atheris") is None:
        pytest.fail("atheris is missing: pip install '.[fuzz]'")
    return bool(here)


@pytest.mark.counted
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TARGETS)
def test_input_guided_by_coverage_breaks_no_rule(name: str, tmp_path: Path) -> None:
    if not atheris_is_there():
        pytest.skip("there is no atheris for this Python or machine")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    runs = INPUTS // TARGETS[name].inputs_a_run
    seed = int.from_bytes(SEED.encode(), "big") % (1 << 31) or 1  # 0 would be a random one
    done = subprocess.run(
        [
            *(sys.executable, str(Path(__file__).with_name("fuzz_guided.py")), name, str(corpus)),
            *(f"-runs={runs}", f"-seed={seed}", f"-max_len={TARGETS[name].max_bytes}"),
            *(f"-artifact_prefix={tmp_path}/", "-rss_limit_mb=1024", "-timeout=60"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    crashes = [path.read_bytes() for path in tmp_path.glob("*-*")]
    notes = [what_to_do(name, data, f"RDMAXFER_FUZZ_SEED={SEED}, guided") for data in crashes]
    assert done.returncode == 0, "\n".join([done.stdout[-3000:], done.stderr[-3000:], *notes])
    assert f"Done {runs} runs" in done.stderr, done.stderr[-3000:]
    print(re.findall(r"DONE .*", done.stderr)[-1])


@pytest.mark.parametrize(("name", "data"), REGRESSIONS, ids=str)
def test_what_once_failed(name: str, data: str) -> None:
    TARGETS[name].run(bytes.fromhex(data))


# --- that this reaches what it is for ---------------------------------------------------------------------------------


def test_changed_messages_are_of_every_kind_and_many_are_valid() -> None:
    found: Counter[Any] = Counter()
    for number in range(4000):
        try:
            found[type(m.decode(TARGETS["message"].make(Choices(f"reach/{number}"))))] += 1
        except RemoteProtocolError as error:
            found[type(error)] += 1
    assert set(get_args(m.Message)) <= set(found)
    assert found[m.WrongVersion] > 40


def test_changed_headers_are_often_valid() -> None:
    """Else nothing behind the first checks would be tested."""
    target = TARGETS["header"]
    valid = 0
    for number in range(2000):
        data = target.make(Choices(f"reach/{number}"))
        try:
            unpack(data, **WHERE, slot_bytes=SLOT_BYTES)
        except RemoteProtocolError:
            continue
        valid += data not in target.seeds
    assert valid > 200


def test_sessions_get_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reply of the bound side, every reason to refuse, every state of the connecting side."""
    replies: set[Any] = set()
    states: set[ClientState] = set()
    answered, check = sessions.Peers.answered, sessions.check_client

    def note_reply(self: sessions.Peers, reply: m.Message) -> None:
        replies.add(reply.code if isinstance(reply, m.Refuse) else type(reply))
        answered(self, reply)

    def note_state(session: Any, handler: Any) -> None:
        states.add(session.state)
        check(session, handler)

    monkeypatch.setattr(sessions.Peers, "answered", note_reply)
    monkeypatch.setattr(sessions, "check_client", note_state)
    for number in range(100):
        for name in ("server", "client"):
            TARGETS[name].run(TARGETS[name].make(Choices(f"reach/{number}")))
    assert replies == {*REPLIES.values(), *m.RefuseCode}
    assert states == set(ClientState) - {ClientState.IDLE}
