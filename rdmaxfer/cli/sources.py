"""What `rdmaxfer send` sends: files, directories, globs, or a made-up pattern, as a sequence of arrays."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rdmaxfer.cli.digest import digest
from rdmaxfer.cli.failure import CommandError, Exit, printable
from rdmaxfer.frame import frame_type

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm"})
PILLOW = "pip install 'rdmaxfer[images]', or pip install pillow"
KEEP_BYTES = 1 << 29

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg"})
OPENCV = "pip install 'rdmaxfer[video]', or pip install opencv-python-headless"
CAMERA = re.compile(r"camera:([0-9]{1,3})", re.ASCII)

Array = np.ndarray[Any, Any]


@dataclass
class Item:
    """A frame to send. `source` is "npy", "image", "video", "camera" or "pattern". `pixel_format`: by the names of GenICam's Pixel
    Format Naming Convention, where it is known."""

    name: str
    source: str
    array: Array
    pixel_format: str = ""
    _digests: dict[str, str] = field(default_factory=dict)

    def digest(self, algorithm: str) -> str:
        """The hash of the array, made once."""
        if algorithm not in self._digests:
            self._digests[algorithm] = digest(self.array, algorithm)
        return self._digests[algorithm]


def expand(arguments: Sequence[str]) -> list[Path]:
    """The files that arguments mean: files, what is in directories (sorted), and globs that the shell left alone."""
    files: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = sorted(each for each in path.iterdir() if each.is_file() and _is_readable(each))
            if not found:
                raise _nothing(f"the directory {printable(argument)!r} holds no .npy and no image files.")
        elif path.exists():
            found = [path]
            if not _is_readable(path):
                raise _nothing(f"{printable(argument)!r} is neither .npy nor an image.")
        else:
            found = [Path(name) for name in sorted(glob.glob(argument, recursive=True))]
            found = [each for each in found if each.is_file() and _is_readable(each)]
            if not found:
                raise _nothing(f"there is no file {printable(argument)!r}.")
        files += found
    return files


def _is_readable(path: Path) -> bool:
    return path.suffix.lower() == ".npy" or path.suffix.lower() in IMAGE_SUFFIXES


def _nothing(message: str) -> CommandError:
    suffixes = " ".join(sorted(IMAGE_SUFFIXES))
    return CommandError(
        message, fix=f"name .npy files, images ({suffixes}), or a directory of them; or use --pattern.", code=Exit.USAGE
    )


def pixel_format(array: Array) -> str:
    """Of what Pillow has read; "" for none of those that have a name."""
    kinds = {(2, "uint8"): "Mono8", (2, "uint16"): "Mono16", (2, "float32"): "Mono32f"}
    if array.ndim == 3 and array.dtype == np.uint8:
        return {3: "RGB8", 4: "RGBa8"}.get(array.shape[2], "")
    return kinds.get((array.ndim, array.dtype.name), "")


class Files:
    """The arrays in files, loaded one at a time; `split` sends each array of a .npy file along its first axis."""

    def __init__(self, paths: Sequence[Path], *, split: bool = False) -> None:
        self._paths = paths
        self._split = split

    def __iter__(self) -> Iterator[Item]:
        for path in self._paths:
            name = os.fsencode(path.name).decode("utf-8", "replace")[:255]
            if path.suffix.lower() != ".npy":
                array = load_image(path)
                yield Item(name, "image", array, pixel_format(array))
                continue
            array = _load_npy(path)
            if not self._split:
                yield Item(name, "npy", array)
                continue
            if array.ndim == 0:
                raise CommandError(
                    f"{printable(path.name)} holds a single value.", fix="leave --split out.", code=Exit.USAGE
                )
            for part in array:
                yield Item(name, "npy", np.asarray(part))


def _load_npy(path: Path) -> Array:
    try:
        # Mapped rather than read: a recording may be larger than the memory. Never unpickled: a file may be anybody's.
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    except (ValueError, EOFError) as error:
        try:
            return np.asarray(np.load(path, allow_pickle=False))  # an empty array can't be mapped
        except (ValueError, EOFError):
            raise CommandError(
                f"{printable(str(path))} can't be read as .npy: {error}.",
                fix="save it again by np.save(), with a fixed-size dtype.",
            ) from None


def load_image(path: Path) -> Array:
    """The pixels of an image file: height x width, or height x width x channels."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise CommandError("reading images needs Pillow, which is not installed.", fix=f"{PILLOW}.") from None
    try:
        with Image.open(path) as image:
            plain = image if image.mode in ("L", "RGB", "RGBA", "I;16", "I", "F") else image.convert("RGB")
            return np.asarray(plain)
    except UnidentifiedImageError:
        raise CommandError(f"{printable(str(path))} is not an image that Pillow can read.") from None


class Video:
    """The frames of a video file, or of a camera ("camera:0"), as OpenCV decodes them: height x width x 3, blue first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._camera = CAMERA.fullmatch(name)

    def __iter__(self) -> Iterator[Item]:
        try:
            import cv2
        except ImportError:
            raise CommandError("videos and cameras need OpenCV, which is not installed.", fix=f"{OPENCV}.") from None
        source = "camera" if self._camera else "video"
        capture = cv2.VideoCapture(int(self._camera[1]) if self._camera else self._name)
        try:
            if not capture.isOpened():
                raise CommandError(
                    f"{printable(self._name)} can't be opened as a {source}.",
                    fix="see `ls /dev/video*`, and whether this user may read it (group `video`)."
                    if self._camera
                    else "check the file; OpenCV reads what its FFmpeg can decode.",
                )
            name = self._name if self._camera else Path(self._name).name
            while True:
                taken, array = capture.read()
                if not taken:
                    return
                yield Item(name, source, array, "BGR8" if array.ndim == 3 else "Mono8")
        finally:
            capture.release()


class Joined:
    """One after the other, each time anew."""

    def __init__(self, parts: Sequence[Iterable[Item]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Item]:
        for part in self._parts:
            yield from part


def is_video(argument: str) -> bool:
    return CAMERA.fullmatch(argument) is not None or Path(argument).suffix.lower() in VIDEO_SUFFIXES


def repeated(items: Iterable[Item], times: int, *, keep_bytes: int = KEEP_BYTES) -> Iterator[Item]:
    """The items again and again, for ever if `times` is 0. From the second time on out of memory, if they fit."""
    kept: list[Item] = []
    fits = times != 1 and not isinstance(items, Pattern)
    for item in items:
        keep_bytes -= item.array.nbytes
        fits = fits and keep_bytes >= 0
        if fits:
            kept.append(item)
        else:
            kept.clear()
        yield item
    done = 1
    while times == 0 or done < times:
        yield from kept or items
        done += 1


class Pattern:
    """`count` made-up frames of one shape and dtype. All differ: each begins with its number."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], count: int) -> None:
        self._shape, self._dtype, self._count = shape, dtype, count

    @classmethod
    def parse(cls, text: str, count: int) -> Pattern:
        """From "1080x1920x3:uint8". Raises CommandError."""
        shape_text, _, dtype_text = text.partition(":")
        if not re.fullmatch(r"[0-9]{1,12}(x[0-9]{1,12}){0,7}", shape_text, re.ASCII):
            raise CommandError(
                f"{text!r} is not a pattern.", fix="write SHAPE:DTYPE, as in 1080x1920x3:uint8.", code=Exit.USAGE
            )
        # Also says what is wrong with an unknown or unsupported dtype.
        kind = frame_type(tuple(int(size) for size in shape_text.split("x")), dtype_text or "uint8")
        return cls(kind.shape, kind.dtype, count)

    def __iter__(self) -> Iterator[Item]:
        array = np.empty(self._shape, self._dtype)
        flat = array.reshape(-1).view(np.uint8)
        step = 2 if self._dtype.kind == "b" else 251
        flat[:] = np.resize(np.arange(step, dtype=np.uint8), flat.size)
        for number in range(self._count):
            stamp = np.frombuffer(number.to_bytes(8, "little"), np.uint8)[: flat.size]
            if self._dtype.kind == "b":
                stamp = np.unpackbits(stamp, bitorder="little")[: flat.size]
            flat[: stamp.size] = stamp
            yield Item(f"pattern-{number}", "pattern", array)
