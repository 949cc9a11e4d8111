"""What `push` is given, as arrays whose bytes follow each other in the frame. Pure, but for the copying."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from rdmaxfer.copying import copy_into
from rdmaxfer.errors import FrameError
from rdmaxfer.frame import FrameType, frame_type

if TYPE_CHECKING:
    import numpy.typing as npt

    from rdmaxfer.staging import StagingSlot

    AnyArray = np.ndarray[Any, Any]


HOST_MEMORY = {1, 3, 11}
"""DLPack's kinds of devices whose memory the processor reads: CPU, and what CUDA and ROCm have pinned of it (dlpack.h)."""


class Payload:
    """The type of a frame, and its parts in their order: one array, or several of one shape and dtype, which the frame has along
    its first axis."""

    __slots__ = ("kind", "parts")

    def __init__(self, kind: FrameType, parts: tuple[AnyArray, ...]) -> None:
        self.kind = kind
        self.parts = parts

    def copy_into(self, staging: StagingSlot) -> None:
        """Copy all of it to the beginning of `staging`."""
        if len(self.parts) == 1 and self.parts[0].shape == self.kind.shape:
            _copy(self.parts[0], staging, 0)
            return
        each_bytes = self.parts[0].nbytes
        for number, part in enumerate(self.parts):
            _copy(part, staging, number * each_bytes)


def payload_of(array: npt.ArrayLike) -> Payload:
    """What is to be sent for an argument of `push`. Raises FrameError, UnsupportedDtype, FrameTooLarge."""
    if isinstance(array, (list, tuple)) and array and {isinstance(part, np.ndarray) for part in array} == {True}:
        parts: tuple[AnyArray, ...] = tuple(array)
        first = parts[0]
        for number, part in enumerate(parts):
            if part.shape != first.shape:
                raise FrameError(
                    f"the arrays of one frame have to be of one shape: the first has {first.shape}, number {number} (from 0) has "
                    f"{part.shape}.",
                    fix="push_many(arrays) sends each as a frame of its own; np.concatenate(arrays) makes one array of them.",
                )
        if not [part for part in parts if part.dtype != first.dtype]:
            return Payload(frame_type((len(parts), *first.shape), first.dtype), parts)
    data = _as_array(array)
    return Payload(frame_type(data.shape, data.dtype), (data,))


def _as_array(given: Any) -> AnyArray:
    if isinstance(given, np.ndarray):
        array: AnyArray = given
        return array
    if isinstance(given, bytes):  # which numpy takes for text
        text: AnyArray = np.ndarray((len(given),), np.uint8, given)
        return text
    # Of several ways any may be closed: DLPack to structures, `__array__` to a PyTorch that was built for another numpy.
    ways = [way for attribute, way in _WAYS if hasattr(given, attribute)] or [np.asanyarray]
    messages, cause = [], None
    try:
        for way in ways:
            try:
                return way(given)
            except (
                AttributeError,
                TypeError,
                ValueError,
                RuntimeError,
                BufferError,
            ) as error:  # as tensors with a gradient do
                messages.append(str(error))
                cause = error
        raise FrameError(
            f"{type(given).__name__} can't be taken for an array: {'; '.join(messages)}",
            fix="pass a numpy array, or what numpy.asarray takes, in this machine's own memory, like tensor.detach().cpu().",
        ) from cause
    finally:
        cause = None  # its traceback refers to `given`, which may be a frame, and its slot is to come back when it is forgotten


def _by_dlpack(given: Any) -> AnyArray:
    device = getattr(given, "__dlpack_device__", lambda: (1, 0))()
    if device[0] not in HOST_MEMORY:
        raise BufferError("its memory is that of another device")
    return np.from_dlpack(given)


_WAYS: tuple[tuple[str, Callable[[Any], AnyArray]], ...] = (("__dlpack__", _by_dlpack), ("__array__", np.asanyarray))


def _copy(data: AnyArray, staging: StagingSlot, offset: int) -> None:
    if data.flags.c_contiguous:
        # As bytes: numpy leaves out the padding of structures.
        copy_into(staging.array((data.nbytes,), np.uint8, offset), data.reshape(-1).view(np.uint8))
        return
    target = staging.array(data.shape, data.dtype, offset)
    if data.dtype.fields is not None:
        target.reshape(-1).view(np.uint8)[...] = 0  # nothing of an earlier frame is to show through the padding
        np.copyto(target, data, casting="no")
    else:
        copy_into(target, data)


__all__ = ["Payload", "payload_of"]
