"""Where a fuzzer's decisions come from: a seed, or a string of bytes that another fuzzer makes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Decisions by a seed. They never run out."""

    done = False

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self._float = self._random.random

    def below(self, end: int) -> int:
        return int(self._float() * end)  # randrange takes four times as long

    def one_in(self, count: int) -> bool:
        return self.below(count) == 0

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def some_bytes(self, count: int) -> bytes:
        return bytes(self.below(256) for _ in range(count))


class Script(Choices):
    """Decisions by a string of bytes. Once it has run out, `done` is true, and all decisions are 0."""

    def __init__(self, script: bytes) -> None:
        self._script = script
        self._at = 0

    @property
    def done(self) -> bool:  # type: ignore[override]
        return self._at >= len(self._script)

    def below(self, end: int) -> int:
        width = (end.bit_length() + 7) // 8
        at, self._at = self._at, self._at + width
        return int.from_bytes(self._script[at : at + width], "little") % end
