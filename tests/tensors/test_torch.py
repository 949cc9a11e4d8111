"""Frames as PyTorch's tensors and tensors as frames, without a copy where there need be none (stage torch of test.sh)."""

from __future__ import annotations

import gc
import re
from typing import Any

import numpy as np
import pytest
from helpers import FABRIC, TIMEOUT_S, pair, picture, wait_until
from test_examples import run

import rdmaxfer
from rdmaxfer.errors import FrameError


@pytest.fixture
def torch() -> Any:
    try:
        import torch
    except ImportError as error:
        pytest.fail(f"these tests were asked for, but there is no PyTorch: {error}. Fix: apt install python3-torch")
    return torch


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("dtype", ["u1", "i8", "f4", "f8"])
def test_a_tensor_lies_in_the_slot(dtype: str, torch: Any) -> None:
    values = np.arange(60, dtype=dtype).reshape(3, 4, 5)
    with pair() as (tx, rx):
        tx.push(values, timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            tensor = torch.from_dlpack(frame)
            assert tensor.data_ptr() == address(frame.array)
            assert tuple(tensor.shape) == (3, 4, 5)
            assert tensor.tolist() == values.tolist()
            assert not frame.array.flags.writeable
            del tensor


def test_a_frame_stays_leased_as_long_as_there_is_a_tensor(torch: Any) -> None:
    with pair(receiver={"slots": 4}) as (tx, rx):
        tx.push(picture(4), timeout=TIMEOUT_S)
        tensor = torch.from_dlpack(rx.recv(timeout=TIMEOUT_S))
        gc.collect()
        for seed in (5, 6, 7):  # the other slots
            tx.push(picture(seed), timeout=TIMEOUT_S)
            rx.recv(timeout=TIMEOUT_S).release()
        assert np.from_dlpack(tensor).tobytes() == picture(4).tobytes()
        assert rx.statistics().leased == 1
        part = tensor[0]
        del tensor
        gc.collect()
        assert rx.statistics().leased == 1
        del part
        gc.collect()
        wait_until(lambda: rx.statistics().leased == 0, "the slot is given back")


def test_a_tensor_is_pushed_as_an_array(torch: Any) -> None:
    tensors = [
        torch.arange(12).reshape(3, 4),
        torch.rand(5, 2).T,
        torch.tensor(2.5),
        torch.ones(2, 2, dtype=torch.bool),
    ]
    with pair() as (tx, rx):
        for tensor in tensors:
            tx.push(tensor, timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.shape == tuple(tensor.shape)
                assert frame.array.tolist() == tensor.tolist()


def test_memory_of_a_tensor_is_sent_from_where_it_lies(torch: Any) -> None:
    tensor = torch.arange(1 << 16, dtype=torch.int32)
    view = tensor.numpy()
    assert address(view) == tensor.data_ptr()
    with pair() as (tx, rx):
        for number in range(2):
            tensor[0] = number
            tx.push(view, copy=False, timeout=TIMEOUT_S)
            with rx.recv(timeout=TIMEOUT_S) as frame:
                assert frame.array.tobytes() == view.tobytes()
            tx.flush(timeout=TIMEOUT_S)
        assert tx.statistics().copied == (2 if FABRIC == "shm" else 0)


def test_a_slot_is_filled_by_torch(torch: Any) -> None:
    with pair() as (tx, rx):
        with tx.reserve((64, 64), np.float32, timeout=TIMEOUT_S) as slot:
            tensor = torch.from_dlpack(slot.array)
            assert tensor.data_ptr() == address(slot.array)
            torch.full((64, 64), 3.0, out=tensor)
            del tensor
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert (frame.array == 3).all()
        assert tx.statistics().copied == 0


def test_tensors_that_are_no_arrays_say_why(torch: Any) -> None:
    with pair() as (tx, rx):
        with pytest.raises(FrameError, match=r"grad.*Fix: .*detach"):
            tx.push(torch.ones(3, requires_grad=True), timeout=TIMEOUT_S)
        with pytest.raises(FrameError, match=r"Fix: "):
            tx.push(torch.ones(3, dtype=torch.bfloat16), timeout=TIMEOUT_S)
        tx.push(torch.ones(3, requires_grad=True).detach(), timeout=TIMEOUT_S)
        with rx.recv(timeout=TIMEOUT_S) as frame:
            assert frame.array.tolist() == [1, 1, 1]


@pytest.mark.timeout(180)
def test_inference() -> None:
    said = run("torch_inference.py", "--count", "5")
    assert [int(each) for each in re.findall(r"image (\d+): class \d", said)] == list(range(5))


def test_the_fabric_is_the_one_asked_for() -> None:
    with pair() as (tx, _):
        (link,) = tx.links()
        assert isinstance(link, rdmaxfer.LinkInfo)
        assert link.fabric == FABRIC
