from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdmaxfer import copying

GUARD = 64
KINDS = ["u1", "<u2", ">i2", "f4", "c8", "f8", "c16", "c32", "S3", "V5", "M8[us]", "?"]


def numbered(shape: tuple[int, ...], kind: str) -> np.ndarray[Any, Any]:
    """Every byte differs from its neighbours. As bytes: some kinds have no arithmetic."""
    size = int(np.prod(shape, dtype=int)) * np.dtype(kind).itemsize
    raw = (np.arange(size, dtype=np.uint64) * 2654435761 >> np.uint64(7)).astype(np.uint8)
    return raw.view(kind).reshape(shape)


def natively(data: np.ndarray[Any, Any], threads: int = 1) -> bytes | None:
    """What the native copy makes of it, or None if it leaves it to numpy; nothing else was written."""
    memory = np.full(data.nbytes + 2 * GUARD, 0xA5, np.uint8)
    target = np.ndarray(data.shape, data.dtype, memory, GUARD)
    copied = copying.copy_natively(target, data, threads)
    assert (memory[:GUARD] == 0xA5).all()
    assert (memory[len(memory) - GUARD :] == 0xA5).all()
    if not copied:
        assert (memory == 0xA5).all()
        return None
    assert copied <= max(threads, 1)
    return memory[GUARD : len(memory) - GUARD].tobytes()


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Of any layout that numpy can make of one block of memory."""
    ndim = draw(st.integers(1, 5))
    longest = {1: 3000, 2: 90, 3: 30, 4: 12, 5: 7}[ndim]
    data = numbered(
        tuple(draw(st.lists(st.integers(1, longest), min_size=ndim, max_size=ndim))), draw(st.sampled_from(KINDS))
    )
    if draw(st.booleans()):
        data = data.transpose(draw(st.permutations(range(ndim))))
    steps = st.sampled_from([1, 1, 1, -1, 2, -3])
    data = data[tuple(slice(None, None, draw(steps)) for _ in range(ndim))]
    data = data[tuple(slice(draw(st.integers(0, extent - 1)), None) for extent in data.shape)]
    if draw(st.integers(0, 5)) == 0:
        data = np.broadcast_to(data, (draw(st.integers(1, 9)), *data.shape))
    if draw(st.integers(0, 5)) == 0:
        data = np.broadcast_to(data[..., :1], data.shape)
    return data


@settings(max_examples=400)
@given(arrays())
def test_whatever_the_layout(data: np.ndarray[Any, Any]) -> None:
    found = natively(data)
    assert found is None or found == data.tobytes()
    target = np.empty(data.shape, data.dtype)
    copying.copy_into(target, data)
    assert target.tobytes() == data.tobytes()


GAINS = {
    "transposed": lambda kind: numbered((301, 517), kind).T,
    "turned": lambda kind: np.rot90(numbered((301, 517), kind)),
    "turned the other way": lambda kind: np.rot90(numbered((301, 517), kind), -1),
    "every other line of it": lambda kind: numbered((301, 517), kind).T[::2],
    "Fortran order": lambda kind: numbered((41, 52, 63), kind).transpose(),
    "planes to pixels": lambda kind: numbered((3, 201, 317), kind).transpose(1, 2, 0),
    "three channels of four": lambda kind: numbered((201, 317, 4), kind)[..., :3],
    "channels the other way round": lambda kind: numbered((201, 317, 3), kind)[..., ::-1],
}


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
@pytest.mark.parametrize("layout", GAINS)
def test_where_numpy_is_slow(layout: str, kind: str) -> None:
    data = GAINS[layout](kind)
    assert natively(data) == data.tobytes()


@pytest.mark.parametrize(
    "data",
    [
        numbered((300, 500), "u2"),
        numbered((300, 500), "u2")[:, 7:400],
        numbered((300, 500), "u2")[::-1, ::-1],
        numbered((500, 300), "f8").T,
        numbered((0, 4), "u1"),
        np.array(3.5),
    ],
    ids=["contiguous", "cut out", "rotated", "wide items", "none", "no dimension"],
)
def test_where_numpy_is_as_fast(data: np.ndarray[Any, Any]) -> None:
    assert natively(data) is None
    target = np.empty(data.shape, data.dtype)
    copying.copy_into(target, data)
    assert target.tobytes() == data.tobytes()


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "wide", "wider", "pixels"])
def test_several_threads(layout: str, threads: int) -> None:
    data = {
        "contiguous": numbered((2100, 1100), "u2"),
        "transposed": numbered((2111, 1013), "u2").T,
        "wide": numbered((811, 907), "f8").T,
        "wider": numbered((607, 701), "c16").T[::-1],
        "pixels": numbered((1201, 1303, 4), "u1")[..., :3],
    }[layout]
    found = natively(data, threads)
    assert found == (None if layout == "contiguous" and threads == 1 else data.tobytes())


def test_a_forked_child_copies_with_one_thread() -> None:
    """The threads of OpenMP are the parent's: gcc's would be waited for for ever."""
    program = """
import os, sys
import numpy as np
from rdmaxfer import copying
data = np.ones((2048, 2048), np.uint16)
target = np.empty_like(data)
assert copying.copy_natively(target, data, 2) in (0, 2)
child = os.fork()
if not child:
    os._exit(copying.copy_natively(target, data, 2) not in (0, 1))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=30)


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "native", lambda: None)
    data = numbered((300, 500), "u2").T
    target = np.empty(data.shape, data.dtype)
    copying.copy_into(target, data)
    assert target.tobytes() == data.tobytes()


def test_it_is_built_here() -> None:
    assert copying.native() is not None
