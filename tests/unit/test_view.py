"""The page of `recv --view`: pictures of any array, and who may look."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rdmaxfer.cli.view import picture

RNG = np.random.default_rng(5)


def pixels(array: np.ndarray[Any, Any], pixel_format: str = "") -> np.ndarray[Any, Any]:
    """What a browser makes of it."""
    data, kind = picture.encoded(picture.thinned(array, pixel_format))
    with Image.open(io.BytesIO(data)) as image:
        assert kind == f"image/{(image.format or '').lower()}"
        return np.asarray(image)


@pytest.mark.parametrize(
    "dtype", ["u1", "<u2", ">i2", "i4", "u8", "f2", "<f4", ">f8", "c8", "?", "M8[ns]", "m8[s]"], ids=str
)
@pytest.mark.parametrize(
    "shape", [(40, 60), (40, 60, 1), (3, 40, 60), (2, 5, 40, 60), (40, 60, 3), (40, 60, 4)], ids=str
)
def test_planes_of_any_kind(shape: tuple[int, ...], dtype: str) -> None:
    values = RNG.integers(0, 2 if dtype == "?" else 200, shape)
    seen = pixels(values.astype("i8").astype(dtype) if dtype[0] in "Mm" else values.astype(dtype))
    assert seen.shape == ((40, 60, 3) if shape[-1] in (3, 4) else (40, 60))
    if shape[-1] not in (3, 4) or dtype != "u1":  # which stay what they are
        assert (seen.min(), seen.max()) == (0, 255)


def test_colours_of_8_bits_are_shown_as_they_are() -> None:
    colours = RNG.integers(20, 100, (30, 30, 3), np.uint8)
    assert (pixels(colours) == colours).all()
    assert (pixels(colours, "BGR8") == colours[:, :, ::-1]).all()


def test_a_plane_is_stretched_to_what_is_in_it() -> None:
    plane = np.zeros((100, 100), np.uint16)
    plane[50:] = 1000
    plane[0, 0] = 65535  # one hot pixel does not darken all others
    seen = pixels(plane)
    assert (seen[10, 10], seen[60, 60]) == (0, 255)


@pytest.mark.parametrize(
    "array",
    [
        np.float32(3),
        np.zeros(0),
        np.zeros((0, 7)),
        np.zeros((3, 0, 2)),
        np.full((5, 5), np.nan),
        np.full((5, 5), np.inf),
        np.full((5, 5), 7),
        np.arange(5000.0),
        np.zeros((4, 4), [("a", [("b", "f4")]), ("c", "u1")]),
    ],
    ids=lambda array: f"{array.shape} {array.dtype}",
)
def test_whatever_comes_there_is_a_picture(array: Any) -> None:
    assert pixels(np.asarray(array)).ndim == 2


def test_nothing_that_is_not_finite_spoils_the_rest() -> None:
    plane = np.linspace(0, 1, 10_000).reshape(100, 100)
    plane[0, :3] = np.nan, np.inf, -np.inf
    seen = pixels(plane)
    assert seen[0, 0] == 0
    assert seen[0, 1] == 255
    assert abs(int(seen[50, 50]) - 128) < 4


def test_large_pictures_are_thinned() -> None:
    plane = np.zeros((3000, 5000), np.uint8)
    thin = picture.thinned(plane)
    assert thin.shape == (600, 1000)
    assert thin.base is None or not np.shares_memory(thin, plane)
    assert not np.shares_memory(picture.thinned(np.zeros((4, 4), np.uint8)), plane)
    row = np.arange(5000.0)
    assert picture.thinned(row).shape[1] <= picture.MOST_PIXELS
