"""
A few of many: a uniform sample of what passes by once, in windows, whose number nobody knows before.

Li's "Algorithm L" (ACM TOMS 20, 1994): how many to pass over until the next one enters the sample is drawn at once, so
that a disk of n clusters costs about k * log(n / k) draws, and no list of them is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from backup.model.extents import Mask, Offsets

_NEVER = 1 << 62
_ALMOST_ONE = 1 - 2**-53


class Reservoir:
    """
    Keeps a uniform sample, without replacement, of the positions that are set in the masks offered to it.

    Parameters
    ----------
    size : int
        How many to keep; of fewer, all.
    draw : callable
        Gives a number from [0, 1), another one each time: `random.Random(seed).random`, or one that nobody foresees.
    """

    def __init__(self, size: int, draw: Callable[[], float]) -> None:
        self._size = size
        self._draw = draw
        self._kept: list[int] = []
        self._weight = 1.0
        self._seen = 0
        self._next = 0 if size > 0 else _NEVER
        """The number, counted over all that are offered, of the next that enters."""

    def offer(self, base: int, mask: Mask) -> None:
        """Have the set positions of `mask`, counted from `base`, pass by; each position once, in whatever order."""
        count = int(np.count_nonzero(mask))
        first, self._seen = self._seen, self._seen + count
        if self._next >= self._seen:
            return
        positions = np.flatnonzero(mask)
        while self._next < self._seen:
            self._take(base + int(positions[self._next - first]))

    def chosen(self) -> Offsets:
        """The sample so far, ascending."""
        return np.array(sorted(self._kept), dtype=np.int64)

    @property
    def seen(self) -> int:
        """How many it is a sample of."""
        return self._seen

    def _take(self, position: int) -> None:
        if len(self._kept) < self._size:
            self._kept.append(position)
        else:
            self._kept[int(self._draw() * self._size)] = position
        self._next += 1
        if len(self._kept) == self._size:
            self._next += self._passed_over()

    def _passed_over(self) -> int:
        # A weight of 1, of which nothing would ever be passed over, is as unlikely as a draw of exactly 0.
        self._weight = min(self._weight * (1 - self._draw()) ** (1 / self._size), _ALMOST_ONE)
        if self._weight <= 0:
            return _NEVER
        return min(int(math.log(1 - self._draw()) / math.log1p(-self._weight)), _NEVER)
