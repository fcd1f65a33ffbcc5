"""
A uniform sample of clusters that are offered once, window by window, in a number that is not known beforehand.

Li's "Algorithm L" (ACM TOMS 20, 1994) draws at once how many clusters are skipped until the next one enters the sample.
So a sample of k out of n clusters costs about k * log(n / k) draws, and no list of all clusters is ever made.
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
        Number of positions to keep; all of them where fewer are offered.
    draw : callable
        Returns another number from [0, 1) each time: `random.Random(seed).random`, or an unpredictable one.
    """

    def __init__(self, size: int, draw: Callable[[], float]) -> None:
        self._size = size
        self._draw = draw
        self._kept: list[int] = []
        self._weight = 1.0
        self._seen = 0
        self._next = 0 if size > 0 else _NEVER
        """The number of the next position that enters the sample, counted over all that are offered."""

    def offer(self, base: int, mask: Mask) -> None:
        """Offer the set positions of `mask`, counted from `base`; each position only once, windows in any order."""
        count = int(np.count_nonzero(mask))
        first, self._seen = self._seen, self._seen + count
        if self._next >= self._seen:
            return
        positions = np.flatnonzero(mask)
        while self._next < self._seen:
            self._take(base + int(positions[self._next - first]))

    def chosen(self) -> Offsets:
        """Return the sample so far, ascending."""
        return np.array(sorted(self._kept), dtype=np.int64)

    @property
    def seen(self) -> int:
        """Number of positions that were offered so far."""
        return self._seen

    def _take(self, position: int) -> None:
        if len(self._kept) < self._size:
            self._kept.append(position)
        else:
            self._kept[int(self._draw() * self._size)] = position
        self._next += 1
        if len(self._kept) == self._size:
            self._next += self._skipped()

    def _skipped(self) -> int:
        # A weight of exactly 1, with which no position would ever be skipped, comes from a draw of exactly 0.
        self._weight = min(self._weight * (1 - self._draw()) ** (1 / self._size), _ALMOST_ONE)
        if self._weight <= 0:
            return _NEVER
        return min(int(math.log(1 - self._draw()) / math.log1p(-self._weight)), _NEVER)
