"""Where `rdmaxfer recv --out` puts frames. Names come from numbers: what a peer calls a file is never a path here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rdmaxfer.cli.failure import CommandError, Exit

if TYPE_CHECKING:
    from rdmaxfer import Frame


PICTURES = ("image", "video", "camera")
"""What `rdmaxfer send` says that it took them from."""


class Sink:
    """Saves frames into a directory: pictures as .png if Pillow is there, all else as .npy. Overwrites nothing."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self._peers: dict[str, int] = {}
        self.saved = 0

    def prepare(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise CommandError(
                f"{self.directory} is not a directory.", fix="give --out another name.", code=Exit.USAGE
            ) from None

    def save(self, frame: Frame) -> Path:
        number = self._peers.setdefault(frame.peer, len(self._peers))
        stem = f"frame-{frame.seq:08}" if number == 0 else f"sender{number + 1}-frame-{frame.seq:08}"
        pictured = frame.metadata.get("source") in PICTURES
        image = _as_image(frame.array, frame.metadata.get("pixel_format")) if pictured else None
        path = self.directory / f"{stem}{'.npy' if image is None else '.png'}"
        try:
            with path.open("xb") as file:
                if image is None:
                    np.save(file, frame.array, allow_pickle=False)
                else:
                    image.save(file, "PNG", compress_level=1)
        except FileExistsError:
            raise CommandError(f"{path} is there already.", fix="let --out name a new or an empty directory.") from None
        self.saved += 1
        return path


def _as_image(array: np.ndarray[Any, Any], pixel_format: object) -> Any:
    """A Pillow image, or None if it can't be one."""
    if (
        array.dtype != np.uint8
        or array.size == 0
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
    ):
        return None
    try:
        from PIL import Image
    except ImportError:
        return None
    blue_first = pixel_format == "BGR8" and array.ndim == 3
    return Image.fromarray(np.ascontiguousarray(array[:, :, ::-1]) if blue_first else array)
