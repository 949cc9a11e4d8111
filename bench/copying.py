"""How fast arrays that are not contiguous get into a slot: rdmaxfer's copy against numpy's, in one run, on this machine.

    .venv/bin/python bench/copying.py [MEGAPIXELS]

Each figure is the best of nine, numpy and rdmaxfer taking turns. "native": who copied, and with how many threads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rdmaxfer.copying import copy_into, copy_natively


def layouts(pixels: int) -> dict[str, np.ndarray[Any, Any]]:
    side = int(pixels**0.5)
    edge = max(1, int(pixels ** (1 / 3)))

    def made(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
        return (np.arange(np.prod(shape)) % 251).astype(dtype).reshape(shape)

    return {
        "contiguous, 16 bit": made((side, side), "u2"),
        "cut out, 16 bit": made((side, 2 * side), "u2")[:, side // 2 : side // 2 + side],
        "upside down, 16 bit": made((side, side), "u2")[::-1],
        "rotated by 180 degrees, 16 bit": made((side, side), "u2")[::-1, ::-1],
        "every other column, 16 bit": made((side, 2 * side), "u2")[:, ::2],
        "transposed, 8 bit": made((side, side), "u1").T,
        "transposed, 16 bit": made((side, side), "u2").T,
        "transposed, float32": made((side, side), "f4").T,
        "transposed, float64": made((side, side), "f8").T,
        "rotated by 90 degrees, 16 bit": np.rot90(made((side, side), "u2")),
        "Fortran order, three axes, float32": np.asfortranarray(made((edge, edge, edge), "f4")),
        "planes to pixels, RGB": made((3, side, side), "u1").transpose(1, 2, 0),
        "pixels to planes, RGB": made((side, side, 3), "u1").transpose(2, 0, 1),
        "RGB of RGBA": made((side, side, 4), "u1")[..., :3],
        "BGR to RGB": made((side, side, 3), "u1")[..., ::-1],
    }


def best_s(copy: Callable[[], object], best: float) -> float:
    start = time.perf_counter()
    copy()
    return min(best, time.perf_counter() - start)


def main() -> None:
    pixels = int(float(sys.argv[1] if len(sys.argv) > 1 else 4) * 1e6)
    print(
        f"| {pixels / 1e6:g} million items | numpy, GB/s | rdmaxfer, GB/s | ratio | native |\n|---|---:|---:|---:|---|"
    )
    for name, data in layouts(pixels).items():
        target = np.empty(data.shape, data.dtype)
        ours = theirs = float("inf")
        for _ in range(9):
            theirs = best_s(lambda: np.copyto(target, data), theirs)  # noqa: B023
            ours = best_s(lambda: copy_into(target, data), ours)  # noqa: B023
        assert np.array_equal(target, data)
        threads = copy_natively(target, data)
        rates = f"{data.nbytes / theirs / 1e9:.2f} | {data.nbytes / ours / 1e9:.2f} | {theirs / ours:.2f}"
        print(f"| {name} | {rates} | {f'{threads} threads' if threads else '-'} |")


if __name__ == "__main__":
    main()
