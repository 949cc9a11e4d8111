"""Arrays of other libraries in and out, without a copy where there need be none."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from helpers import FABRIC, TIMEOUT_S, pair, picture, wait_until

import rdmaxfer
from rdmaxfer.errors import FrameError, FrameReleased


class OnlyDLPack:
    """An array of a library that knows nothing of numpy but DLPack."""

    def __init__(self, array: np.ndarray[Any, Any], device: tuple[int, int] = (1, 0)) -> None:
        self._array = array
        self._device = device

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device


class OnlyInterface:
    """... nothing but the older array interface."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.__array_interface__ = array.__array_interface__
        self.kept = array


def address(array: Any) -> int:
    return int(np.asarray(array).__array_interface__["data"][0])


@pytest.mark.parametrize("wrap", [OnlyDLPack, OnlyInterface, memoryview], ids=lambda wrap: wrap.__name__)
def test_what_is_an_array_elsewhere_is_pushed_as_one(wrap: Any) -> None:
    array = np.arange(60, dtype="f4").reshape(3, 4, 5)
    with pair() as (tx, rx):
        tx.push(wrap(array), timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert (frame.dtype, frame.shape) == (array.dtype, array.shape)
            assert frame.array.tobytes() == array.tobytes()


def test_a_frame_is_pushed_on_as_an_array() -> None:
    with pair() as (tx, rx):
        tx.push(picture(1), timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            tx.push(frame, timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as again:
            assert again.array.tobytes() == picture(1).tobytes()


def test_a_frame_that_dlpack_has_no_type_for_is_pushed_on_and_given_back() -> None:
    rows = np.array([(1.5, 2), (2.5, 3)], dtype=[("x", "f8"), ("n", "i4")])
    gc.collect()
    gc.disable()  # its slot is to come back by itself
    try:
        with pair() as (tx, rx):
            tx.push(rows, timeout=TIMEOUT_S)
            frame = rx.recv(timeout=TIMEOUT_S)
            tx.push(frame, timeout=TIMEOUT_S)
            del frame
            with rx.recv(timeout=TIMEOUT_S) as again:
                assert again.array.tolist() == rows.tolist()
            assert rx.statistics().leased == 0
    finally:
        gc.enable()


def test_memory_of_another_library_is_sent_from_where_it_lies() -> None:
    array = np.arange(1 << 16, dtype="u1")
    view = np.from_dlpack(OnlyDLPack(array))
    with pair() as (tx, rx):
        for _ in range(2):
            tx.push(view, copy=False, timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.array.tobytes() == array.tobytes()
        tx.flush(timeout=TIMEOUT_S)
        # What other processes read where it is has to lie in memory that can be shared.
        assert tx.statistics().copied == (2 if FABRIC == "shm" else 0)


@pytest.mark.parametrize(
    "given", [OnlyDLPack(np.zeros(3), device=(2, 0)), [[1, 2], [3]], object()], ids=["on a GPU", "ragged", "no array"]
)
def test_what_is_no_array_here_says_what_to_do(given: Any) -> None:
    with pair() as (tx, rx):
        with pytest.raises((FrameError, TypeError), match=r"Fix: "):
            tx.push(given, timeout=TIMEOUT_S)
        tx.push(b"x", timeout=TIMEOUT_S)
        rx.recv(timeout=TIMEOUT_S).release()


def test_other_libraries_see_the_slot_itself() -> None:
    with pair() as (tx, rx):
        tx.push(picture(3), captured_ns=1_700_000_000_123_456_789, timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            here = address(frame.array)
            assert address(frame) == here
            assert frame.__array_interface__["data"][0] == here
            assert address(np.from_dlpack(frame)) == here
            assert address(np.asarray(memoryview(frame.array))) == here
            assert np.array(frame, copy=True).__array_interface__["data"][0] != here
            assert np.asarray(frame, np.float64).dtype == np.float64
            assert frame.timestamp == np.datetime64("2023-11-14T22:13:20.123456789")
        for use in (np.asarray, np.from_dlpack, lambda each: each.__array_interface__):
            with pytest.raises(FrameReleased):
                use(frame)


def test_pandas_and_pyarrow() -> None:
    """Their columns and buffers lie in the slot, and what they have made is pushed as an array."""
    import pandas as pd
    import pyarrow as pa

    values = np.arange(24, dtype="f4").reshape(4, 6)
    with pair() as (tx, rx):
        tx.push(values, timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            here = address(frame.array)
            buffer = pa.py_buffer(frame.array)
            assert (buffer.address, buffer.size) == (here, values.nbytes)
            column = pa.Array.from_buffers(pa.float32(), values.size, [None, buffer])
            assert column.buffers()[1].address == here
            assert column.to_numpy().tolist() == values.ravel().tolist()
            assert address(pa.Tensor.from_numpy(frame.array).to_numpy()) == here
            table = pd.DataFrame(frame.array, copy=False)
            assert address(table.to_numpy()) == here
            assert table.iloc[1, 2] == values[1, 2]
            del buffer, column, table
        rows = np.array([(1.5, 2), (2.5, 3)], dtype=[("x", "f8"), ("n", "i4")])
        for made, expected in (
            (pd.Series([1, 2, 3]), [1, 2, 3]),
            (pa.array([1.5, 2.5]), [1.5, 2.5]),
            (rows, [(1.5, 2), (2.5, 3)]),
        ):
            tx.push(made, timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.array.tolist() == expected
                if frame.dtype.names:
                    assert pd.DataFrame(frame.array)["n"].tolist() == [2, 3]


# In a process of its own: JAX has threads that must not meet the forks of other tests.
JAX = """
import gc, sys, time
import jax, jax.numpy as jnp, numpy as np
import rdmaxfer
jax.config.update("jax_platforms", "cpu")
values = np.arange(4096, dtype="f4").reshape(64, 64)
with rdmaxfer.Receiver(slots=4) as rx, rdmaxfer.Sender(slots=4) as tx:
    tx.connect(rx.bind("tcp://127.0.0.1:*"))
    tx.push(values)
    frame = rx.recv(timeout=60)
    here = frame.array.__array_interface__["data"][0]
    by_dlpack = jax.dlpack.from_dlpack(frame)
    print("DLPack:", by_dlpack.unsafe_buffer_pointer() == here, bool((by_dlpack == values).all()))
    del by_dlpack
    array = jax.device_put(frame.array, may_alias=True)
    del frame
    gc.collect()
    print("in place:", array.unsafe_buffer_pointer() == here, "aligned:", here % 64 == 0, "leased:", rx.statistics().leased)
    print("sum:", float(array.sum()) == values.sum())
    del array
    # The threads of XLA may have it for a little longer, and what they let go of JAX drops when it collects garbage.
    deadline = time.monotonic() + 30
    while rx.statistics().leased and time.monotonic() < deadline:
        gc.collect()
    print("leased:", rx.statistics().leased)
    made = jnp.arange(1 << 14, dtype=jnp.int32) * 2
    tx.push(made)
    tx.push(np.asarray(made), copy=False)
    for _ in range(2):
        with rx.recv(timeout=60) as frame:
            print("made:", frame.array.tobytes() == np.asarray(made).tobytes())
    tx.flush(timeout=60)
    print("copied:", tx.statistics().copied)
"""


@pytest.mark.timeout(180)
def test_jax() -> None:
    done = subprocess.run(
        [sys.executable, "-c", JAX], capture_output=True, text=True, timeout=2 * TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    by_dlpack, in_place, *rest = done.stdout.splitlines()
    if "aligned: True" in in_place:  # XLA takes memory where it lies only then
        assert in_place == "in place: True aligned: True leased: 1"
        assert by_dlpack == "DLPack: True True"
    else:
        assert FABRIC == "tcp"
        assert by_dlpack.endswith("True")
    # The first push copies; so does the second one where memory of other processes can't be read.
    copied = 3 if FABRIC == "shm" else 2
    assert rest == ["sum: True", "leased: 0", "made: True", "made: True", f"copied: {copied}"]


def test_a_frame_stays_leased_as_long_as_another_library_has_it() -> None:
    with pair(receiver={"slots": 4}) as (tx, rx):
        tx.push(picture(4), timeout=TIMEOUT_S)
        theirs = np.from_dlpack(rx.recv(timeout=TIMEOUT_S))  # nothing else refers to the frame
        gc.collect()
        for seed in (5, 6, 7):  # the other slots
            tx.push(picture(seed), timeout=TIMEOUT_S)
            rx.recv(timeout=TIMEOUT_S).release()
        assert theirs.tobytes() == picture(4).tobytes()
        assert rx.statistics().leased == 1
        del theirs
        gc.collect()
        wait_until(lambda: rx.statistics().leased == 0, "the slot is given back")


def test_when_a_frame_was_pushed_if_nobody_says_when_it_was_captured() -> None:
    with pair() as (tx, rx):
        tx.push(b"x", timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.timestamp.astype("i8") == frame.pushed_ns


def test_a_callback_never_raises_and_counts_what_it_drops() -> None:
    with pair(sender={"slots": 2}, receiver={"slots": 2}) as (tx, rx):
        callback = tx.as_callback(metadata={"pixel_format": "Mono8"})
        memory = np.zeros((4, 4), np.uint8)
        results = []
        for number in range(4):
            memory[:] = number  # the camera library uses its memory again
            results.append(callback(memory, exposure_ms=number))
        assert results == [0, 1, None, None]
        assert (callback.pushed, callback.dropped, callback.error) == (2, 2, None)
        for number in range(2):
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert (frame.array == number).all()
                assert frame.metadata == {"pixel_format": "Mono8", "exposure_ms": number}
                assert frame.captured_ns > 0
        callback.check()
        assert callback("text") is None
        assert callback(memory) is None
        assert callback.dropped == 4
        with pytest.raises(rdmaxfer.RdmaxferError) as caught:
            callback.check()
        assert caught.value.__cause__ is callback.error
