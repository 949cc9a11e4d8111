"""Streams of frames in an HDF5 file (https://www.hdfgroup.org/solutions/hdf5/), which h5py and many other programs read.

/streams/0          a group for each sender, and a new one whenever its shape or dtype changes
    frames          (N, *shape), one chunk a frame; of its dtype, or bytes where HDF5 has none like it (attribute "numpy_dtype")
    seq, captured_ns, pushed_ns     (N,), as in rdmaxfer.Frame
    metadata        (N,), JSON
    attributes: peer
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import rdmaxfer
from rdmaxfer.cli.failure import CommandError, Exit, printable

FORMAT = "rdmaxfer recording 1"
GROWTH = 64
"""By how many frames the tables grow at a time."""
FLUSH_S = 2.0
"""How often what was written is made readable for others, and safe from the end of this program."""


def h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise CommandError("recordings need the package h5py.", fix="pip install 'rdmaxfer[record]'.") from None
    return h5py


class Recorder:
    """Writes frames to a new file at `path`. Raises CommandError."""

    def __init__(self, path: str) -> None:
        library = h5py()
        if Path(path).exists():
            raise CommandError(
                f"{printable(path)} is there already.", fix="another name; nothing is overwritten.", code=Exit.USAGE
            )
        try:
            # Not a newer layout: HDF5 would not open such a file again after its writer was killed.
            self._file = library.File(path, "x", libver=("earliest", "v108"))
        except OSError as error:
            raise CommandError(f"{printable(path)} can't be written: {error}.", code=Exit.USAGE) from None
        self._file.attrs["format"] = FORMAT
        self._file.attrs["created"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._streams: dict[str, _Stream] = {}
        self._flushed_s = time.monotonic()
        self.frames = 0

    @property
    def streams(self) -> int:
        return len(self._file.get("streams", ()))

    def add(self, frame: rdmaxfer.Frame) -> None:
        """Write a frame. It may be released afterwards. Raises CommandError if the disk is full."""
        stream = self._streams.get(frame.peer)
        try:
            if stream is None or stream.kind != (frame.shape, frame.dtype):
                if stream is not None:
                    stream.close()
                group = self._file.create_group(f"streams/{self.streams}")
                stream = self._streams[frame.peer] = _Stream(group, frame)
            stream.add(frame)
            self.frames += 1
            if time.monotonic() - self._flushed_s > FLUSH_S:
                self._file.flush()
                self._flushed_s = time.monotonic()
        except OSError as error:
            raise CommandError(f"the recording can't go on: {error}.", fix="make room on the disk.") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            for stream in self._streams.values():
                stream.close()
        self._file.close()


class _Stream:
    """The frames of one sender, of one shape and dtype."""

    def __init__(self, group: Any, frame: rdmaxfer.Frame) -> None:
        library = h5py()
        self.kind = (frame.shape, frame.dtype)
        self._count = 0
        self._room = 0
        group.attrs["peer"] = frame.peer
        stored, shape = _stored(frame.dtype, frame.shape)
        self._plain = (stored, shape) == (frame.dtype, frame.shape)
        self._frames = group.create_dataset("frames", (0, *shape), stored, maxshape=(None, *shape), chunks=(1, *shape))
        if not self._plain:
            self._frames.attrs["numpy_dtype"] = json.dumps(np.lib.format.dtype_to_descr(frame.dtype))
            self._frames.attrs["frame_shape"] = frame.shape
        self._columns = {
            name: group.create_dataset(name, (0,), kind, maxshape=(None,), chunks=(1024,))
            for name, kind in (
                ("seq", np.int64),
                ("captured_ns", np.int64),
                ("pushed_ns", np.int64),
                ("metadata", library.string_dtype()),
            )
        }

    def add(self, frame: rdmaxfer.Frame) -> None:
        if self._count == self._room:
            self._resize(self._room + GROWTH)
        array = frame.array
        if array.nbytes:
            # The chunk is the frame: it goes from the slot to the file as it is.
            self._frames.id.write_direct_chunk(
                (self._count, *([0] * (self._frames.ndim - 1))), array.reshape(-1).view(np.uint8).data
            )
        for name, column in self._columns.items():
            column[self._count] = as_json(frame.metadata) if name == "metadata" else getattr(frame, name)
        self._count += 1

    def close(self) -> None:
        self._resize(self._count)

    def _resize(self, count: int) -> None:
        self._room = count
        for dataset in (self._frames, *self._columns.values()):
            dataset.resize(count, axis=0)


def _stored(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """As what HDF5 has it: numbers, and structures of numbers; all else as bytes. It has no chunks without any bytes."""
    if 0 in shape:
        return np.dtype(np.uint8), (1,)
    if dtype.kind in "biufc" or (dtype.names and all(dtype[name].kind in "iufc" for name in dtype.names)):
        return dtype, shape
    return np.dtype(np.uint8), (*shape, dtype.itemsize)


class Recorded(NamedTuple):
    """One frame of a recording."""

    array: np.ndarray[Any, Any]
    seq: int
    captured_ns: int
    pushed_ns: int
    metadata: dict[str, Any]


def read(path: str) -> Iterator[Recorded]:
    """The frames of a recording of all its streams, in the order in which they were pushed. Raises CommandError."""
    library = h5py()
    try:
        file = library.File(path, "r")
    except OSError as error:
        raise CommandError(f"{printable(path)} can't be read: {error}.", code=Exit.USAGE) from None
    with file:
        if file.attrs.get("format") != FORMAT:
            raise CommandError(
                f"{printable(path)} is no recording of `rdmaxfer record`.",
                fix="name a file that it has written.",
                code=Exit.USAGE,
            )
        streams = [file["streams"][name] for name in sorted(file.get("streams", ()), key=int)]
        order = sorted(
            (int(pushed_ns), number, index)
            for number, stream in enumerate(streams)
            for index, (pushed_ns, written) in enumerate(
                zip(stream["pushed_ns"][:], stream["metadata"][:], strict=True)
            )
            if written  # the last rows may not have been, if the recorder was killed
        )
        for pushed_ns, number, index in order:
            stream = streams[number]
            yield Recorded(
                _array(stream["frames"], index),
                int(stream["seq"][index]),
                int(stream["captured_ns"][index]),
                pushed_ns,
                from_json(stream["metadata"][index]),
            )


def _array(frames: Any, index: int) -> np.ndarray[Any, Any]:
    array = np.asarray(frames[index])
    descr = frames.attrs.get("numpy_dtype")
    if descr is None:
        return array
    dtype = np.lib.format.descr_to_dtype(_descr(json.loads(descr)))
    shape = tuple(int(size) for size in frames.attrs["frame_shape"])
    return np.ndarray(shape, dtype, np.ascontiguousarray(array)) if 0 not in shape else np.zeros(shape, dtype)


def _descr(found: Any) -> Any:
    """JSON has lists for tuples."""
    if not isinstance(found, list):
        return found
    return [
        tuple(
            _descr(part) if number == 1 else tuple(part) if isinstance(part, list) else part
            for number, part in enumerate(field)
        )
        for field in found
    ]


def as_json(metadata: dict[str, Any]) -> str:
    return json.dumps(
        metadata, default=lambda value: {"base64": base64.b64encode(bytes(value)).decode()}, ensure_ascii=False
    )


def from_json(text: bytes | str) -> dict[str, Any]:
    def back(found: dict[str, Any]) -> Any:
        return (
            base64.b64decode(found["base64"])
            if found.keys() == {"base64"} and isinstance(found["base64"], str)
            else found
        )

    found = json.loads(text, object_hook=back)
    return found if isinstance(found, dict) else {}


__all__ = ["Recorded", "Recorder", "read"]
