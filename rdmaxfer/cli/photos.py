"""Full HD frames made of the real photographs that scikit-image carries. Slices are copied, nothing is resampled."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from rdmaxfer.cli.failure import CommandError
from rdmaxfer.cli.sources import load_image

SHAPE = (1080, 1920, 3)

# Only what lies in the package itself: the other pictures of skimage.data are downloads.
NAMES = (
    "astronaut.png",
    "coffee.png",
    "chelsea.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "ihc.png",
    "camera.png",
    "coins.png",
    "moon.png",
    "brick.png",
    "grass.png",
    "gravel.png",
)

Array = np.ndarray[Any, Any]


def find() -> list[Path]:
    """The files of the photographs. scikit-image itself is not imported: that takes seconds on a slow machine."""
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec is not None and spec.origin is not None else None
    paths = [folder / name for name in NAMES if (folder / name).is_file()] if folder is not None else []
    if not paths or importlib.util.find_spec("PIL") is None:
        raise CommandError(
            "the demo's photographs come with scikit-image, and Pillow reads them; one of the two is not installed.",
            fix="pip install 'rdmaxfer[demo]', or pip install scikit-image pillow.",
        )
    return paths


def load(paths: list[Path]) -> list[Array]:
    """The photographs, each height x width x 3."""
    return [_as_rgb(load_image(path)) for path in paths]


def _as_rgb(pixels: Array) -> Array:
    if pixels.ndim == 2:
        pixels = pixels[:, :, np.newaxis]
    return np.ascontiguousarray(np.broadcast_to(pixels[:, :, :3], (*pixels.shape[:2], 3)))


def compose(number: int, photos: list[Array], out: Array) -> None:
    """Fill `out` (height x width x 3) with frame `number`: a photograph, tiled from another point each time round."""
    photo = photos[number % len(photos)]
    turn = number // len(photos)
    height, width = photo.shape[:2]
    first_row, first_column = turn * 97 % height, turn * 151 % width
    for y in range(-first_row, out.shape[0], height):
        for x in range(-first_column, out.shape[1], width):
            tile = out[max(y, 0) : y + height, max(x, 0) : x + width]
            top, left = max(-y, 0), max(-x, 0)
            tile[:] = photo[top : top + tile.shape[0], left : left + tile.shape[1]]
