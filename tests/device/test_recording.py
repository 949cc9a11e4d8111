"""`rdmaxfer record` and `replay`: what comes back out of the file is what was sent, and the file is plain HDF5."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import TIMEOUT_S, Background
from test_cli_device import running

import rdmaxfer
from rdmaxfer.cli import recording

ENDPOINT = "tcp://127.0.0.1:*"
KINDS: list[Any] = [
    np.arange(12, dtype="u1").reshape(3, 4),
    np.arange(12, dtype=">i2").reshape(3, 4),
    np.linspace(0, 1, 30).reshape(2, 3, 5) + 2j,
    np.array([True, False, True]),
    np.float32(7.5),
    np.zeros((0, 5), "f4"),
    np.array(["2026-01-02", "NaT"], "M8[s]"),
    np.array([(1, 2.5), (3, -1)], [("a", "<i4"), ("b", "<f8")]),
    np.zeros(3, {"names": ["a", "b"], "formats": ["u1", ("<f8", (2, 3))], "offsets": [3, 8], "itemsize": 64}),
    np.zeros(2, [("outer", [("inner", "<i4"), ("z", "<c8")]), ("flag", "?")]),
]


def test_all_kinds_of_frames_with_all_that_belongs_to_them(tmp_path: Path) -> None:
    path = str(tmp_path / "all.h5")
    metadata = {"exposure_ms": 4, "name": "grün", "raw": b"\0\xff", "deep": {"list": [1, 2.5, None]}}
    recorder = recording.Recorder(path)
    with rdmaxfer.Receiver() as rx, rdmaxfer.Sender() as tx:
        tx.connect(rx.bind(ENDPOINT), timeout=TIMEOUT_S)
        for number, array in enumerate(KINDS * 2):
            tx.push(array, metadata=metadata, captured_ns=1000 + number, timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                recorder.add(frame)
        name = tx.name
    recorder.close()
    found = list(recording.read(path))
    assert [each.seq for each in found] == list(range(len(KINDS) * 2))
    for number, (each, array) in enumerate(zip(found, KINDS * 2, strict=True)):
        array = np.asarray(array)
        assert (each.array.dtype, each.array.shape) == (array.dtype, array.shape), number
        assert each.array.tobytes() == array.tobytes()
        assert (each.metadata, each.captured_ns) == (metadata, 1000 + number)
    with h5py.File(path) as file:  # as any other program sees it
        stream = file["streams/0"]
        assert stream["frames"].shape == (1, 3, 4)
        assert (stream["frames"][0] == KINDS[0]).all()
        assert stream.attrs["peer"] == name
        assert json.loads(stream["metadata"][0])["name"] == "grün"


def test_a_stream_goes_into_a_file_and_out_again(tmp_path: Path) -> None:
    path, again = tmp_path / "run.h5", tmp_path / "again.h5"
    with running("record", ENDPOINT, str(path), "--once") as record:
        record.says("listening at ")
        endpoint = record.text.split("listening at ")[1].split()[0]
        with running("send", endpoint, "--pattern", "48x64x3", "--count", "150", "--fps", "300") as send:
            assert send.end() == 0, send.text
        assert record.end() == 0, record.text
        assert "150 frames in 1 stream" in record.text
        assert "kept up" in record.text or "keep up" in record.text
    with running("record", ENDPOINT, str(again), "--once") as record:
        record.says("listening at ")
        endpoint = record.text.split("listening at ")[1].split()[0]
        began_s = time.monotonic()
        with running("replay", str(path), endpoint, "--speed", "0.5") as replay:
            assert replay.end() == 0, replay.text
        assert time.monotonic() - began_s > 149 / 300 / 0.5
        assert record.end() == 0, record.text
    with h5py.File(path) as one, h5py.File(again) as other:
        assert (one["streams/0/frames"][:] == other["streams/0/frames"][:]).all()
        assert (one["streams/0/metadata"][:] == other["streams/0/metadata"][:]).all()
        assert one["streams/0/frames"].shape == (150, 48, 64, 3)


def test_what_was_written_is_there_also_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "killed.h5"
    with running("record", ENDPOINT, str(path)) as record, rdmaxfer.Sender(reconnect=False) as tx:
        record.says("listening at ")
        tx.connect(record.text.split("listening at ")[1].split()[0], timeout=TIMEOUT_S)
        stop_s = time.monotonic() + 2 * recording.FLUSH_S + 1
        while time.monotonic() < stop_s:
            tx.push(np.zeros((8, 8), np.uint8), timeout=TIMEOUT_S)
            tx.flush(timeout=TIMEOUT_S)
            time.sleep(0.01)  # the pace of a camera
        record.process.kill()
        record.end()
        with pytest.raises(rdmaxfer.PeerLost):
            Background(lambda: [tx.push(b"x", timeout=TIMEOUT_S) for _ in range(100_000)]).result()
    found = list(recording.read(str(path)))
    assert len(found) > 50


def test_a_broken_or_foreign_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("hello")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    for name, says in (("text.h5", "can't be read"), ("other.h5", "is no recording"), ("none.h5", "can't be read")):
        with running("replay", str(tmp_path / name), "tcp://127.0.0.1:9") as replay:
            assert replay.end() == 2, replay.text
            assert says in replay.text
            assert "Traceback" not in replay.text
    with running("record", ENDPOINT, str(tmp_path / "other.h5")) as record:
        assert record.end() == 2
        assert "is there already" in record.text
