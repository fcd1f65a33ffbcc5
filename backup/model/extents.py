"""
Extents as columns: what a server reports about a range of a disk, in arrays instead of one object for each extent.

A `Runs` covers one range of bytes without gaps; neighbours always differ in their flags.  A million extents cost a few
numpy operations; as Python objects they cost seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Offsets = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

HOLE = 1
"""base:allocation: no storage behind the range (NBD protocol, NBD_STATE_HOLE)."""
ZERO = 2
"""base:allocation: the range reads as zeroes (NBD protocol, NBD_STATE_ZERO)."""
DIRTY = 1
"""qemu:dirty-bitmap: written since the bitmap began to record (QEMU docs/interop/nbd.txt)."""


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """
    Consecutive runs that cover the bytes [starts[0], end) without a gap.

    `starts` are the first bytes of the runs, ascending.  `flags` has one value for each run; neighbours differ.
    """

    starts: Offsets
    end: int
    flags: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, starts: Offsets, end: int, flags: npt.NDArray[np.uint32]) -> Runs:
        """Return runs in which neighbours with equal flags are merged; a server may report them separately."""
        if len(starts) > 1:
            keep = np.empty(len(starts), dtype=np.bool_)
            keep[0] = True
            np.not_equal(flags[1:], flags[:-1], out=keep[1:])
            if not keep.all():
                starts, flags = starts[keep], flags[keep]
        return cls(starts, end, flags)

    @classmethod
    def uniform(cls, start: int, end: int, flags: int) -> Runs:
        """One run with the same flags from start to end."""
        return cls(np.array([start], dtype=np.int64), end, np.array([flags], dtype=np.uint32))

    @property
    def start(self) -> int:
        """First byte of the range."""
        return int(self.starts[0])

    @property
    def ends(self) -> Offsets:
        """End (exclusive) of each run."""
        return np.append(self.starts[1:], np.int64(self.end))

    def between(self, start: int, end: int) -> Runs:
        """Return the part inside the bytes [start, end), which must overlap the range of the runs."""
        if start <= self.start and end >= self.end:
            return self
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, end))
        starts = np.maximum(self.starts[max(first, 0) : last], start)
        return Runs(starts, min(self.end, end), self.flags[max(first, 0) : last])

    def masked(self, mask: int) -> Runs:
        """Return the runs with only the flag bits in `mask`; the NBD protocol demands that unknown bits are ignored."""
        return Runs.of(self.starts, self.end, self.flags & np.uint32(mask))

    def having(self, bit: int) -> tuple[Offsets, Offsets]:
        """Return the starts and ends of the runs in which the flag `bit` is set; runs that touch are merged."""
        only = self.masked(bit)
        first = 0 if only.flags[0] else 1  # neighbours differ, so every second run has the bit
        return only.starts[first::2], only.ends[first::2]


def joined(parts: list[Runs]) -> Runs:
    """Put consecutive ranges together; each part begins where the one before ends."""
    if len(parts) == 1:
        return parts[0]
    starts = np.concatenate([part.starts for part in parts])
    flags = np.concatenate([part.flags for part in parts])
    return Runs.of(starts, parts[-1].end, flags)


def overlay(first: Runs, second: Runs, shift: int) -> Runs:
    """
    Combine the flags of two views of one range; the flags of `second` are shifted left by `shift` bits.

        first   |0      |1           |
        second  |2   |0      |2      |
        result  |0,2 |0 |1,0 |1,2    |
    """
    starts = np.union1d(first.starts, second.starts)
    flags = first.flags[np.searchsorted(first.starts, starts, side="right") - 1]
    other = second.flags[np.searchsorted(second.starts, starts, side="right") - 1]
    return Runs.of(starts, first.end, flags | (other << np.uint32(shift)))


def with_dirty_from(runs: Runs, offset: int) -> Runs:
    """
    Return the runs with everything from byte `offset` on marked as dirty.

    After a disk has grown, QEMU's bitmap reports the new part as clean, whatever the part contains.
    """
    if offset >= runs.end:
        return runs
    if offset <= runs.start:
        return Runs.uniform(runs.start, runs.end, DIRTY)
    kept = runs.starts < offset
    starts = np.append(runs.starts[kept], np.int64(offset))
    flags = np.append(runs.flags[kept], np.uint32(DIRTY))
    return Runs.of(starts, runs.end, flags)


def edges(mask: Mask) -> tuple[Offsets, Offsets]:
    """Return the starts and ends (exclusive) of the runs of set positions in `mask`."""
    changes = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    first = np.array([0] if mask[:1].any() else [], dtype=np.int64)
    last = np.array([len(mask)] if mask[-1:].any() else [], dtype=np.int64)
    both = np.concatenate([first, changes, last])
    return both[::2], both[1::2]


def distinct(values: Offsets) -> Offsets:
    """Return each of the ascending values once; np.unique would import a part of numpy that takes 17 ms."""
    first = np.append(True, values[1:] != values[:-1])
    once: Offsets = values[first[: len(values)]]
    return once


def windows(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """Divide [start, end) at the multiples of `step`, and yield the start and end of each part."""
    while start < end:
        cut = min(end, start - start % step + step)
        yield start, cut
        start = cut
