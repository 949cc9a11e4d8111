"""A picture of any array, to be looked at: small enough for a page, in 8 bits."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MOST_PIXELS = 1024
"""Along either side: of larger pictures, only every second, third, ... row and column is shown."""
STRIP_ROWS = 24
QUALITY = 85
LOW, HIGH = 0.5, 99.5
"""Percentiles of the values that become black and white."""


def thinned(array: Array, pixel_format: object = "") -> Array:
    """A copy of what is to be seen of it: a plane, or a plane of 3 or 4 colours, red first."""
    plane = _plane(array)
    step = max(1, -(-max(plane.shape[:2]) // MOST_PIXELS))
    plane = plane[::step, ::step]
    if plane.ndim == 3 and str(pixel_format).upper().startswith("BGR"):
        plane = plane[:, :, [2, 1, 0]]
    return np.array(plane, order="C")


def _plane(array: Array) -> Array:
    while array.dtype.fields:
        array = array[next(iter(array.dtype.fields))]
    if array.ndim < 2:
        row = array.reshape(1, -1)
        row = row[:, :: max(1, -(-row.shape[1] // MOST_PIXELS))]
        return np.broadcast_to(row, (STRIP_ROWS, row.shape[1]))
    while array.ndim > 3 or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        if not array.shape[0]:
            return np.zeros((1, 1), array.dtype)
        array = array[0]
    return array if array.ndim == 2 or array.shape[2] != 1 else array[:, :, 0]


def eight_bits(plane: Array) -> Array:
    """Its values as uint8. Colours of 8 bits stay what they are; everything else is stretched to the range that it has."""
    if plane.dtype == np.uint8 and plane.ndim == 3:
        return plane
    if plane.dtype == np.bool_:
        black_and_white: Array = plane.astype(np.uint8) * np.uint8(255)
        return black_and_white
    if np.issubdtype(plane.dtype, np.complexfloating):
        values = np.abs(plane).astype(np.float64)
    elif plane.dtype.kind in "mM":
        values = plane.astype(np.int64).astype(np.float64)
    else:
        values = plane.astype(np.float64)
    if plane.ndim == 3 and plane.shape[2] == 4:
        values = values[:, :, :3]
    good = values[np.isfinite(values)]
    if not good.size:
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(good, (LOW, HIGH))
    if high <= low:
        low, high = float(good.min()), float(good.max())
    scaled = (values - low) * (255.0 / (high - low)) if high > low else np.full(values.shape, 128.0)
    bits: Array = np.nan_to_num(np.clip(scaled, 0, 255), nan=0.0).astype(np.uint8)
    return bits


def encoded(plane: Array) -> tuple[bytes, str]:
    """It as a file for a browser, and that file's type. Raises ImportError without Pillow."""
    from PIL import Image

    if not plane.size:
        plane = np.zeros((1, 1), np.uint8)
    pixels = eight_bits(plane)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels = np.ascontiguousarray(pixels[:, :, :3])
    image, out = Image.fromarray(pixels), io.BytesIO()
    if max(pixels.shape[:2]) <= 256:  # where single pixels are seen, they are to be right
        image.save(out, "PNG")
        return out.getvalue(), "image/png"
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue(), "image/jpeg"
