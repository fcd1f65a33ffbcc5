"""
Extents as columns: what a server says about a range of a disk, held in arrays instead of an object per extent.

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

    `starts` is ascending and disjoint by construction, `flags` has one value per run, neighbours differ.  Bytes.
    """

    starts: Offsets
    end: int
    flags: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, starts: Offsets, end: int, flags: npt.NDArray[np.uint32]) -> Runs:
        """Merge neighbours with equal flags; servers may send them apart."""
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
        """The part inside [start, end); it has at least one byte there."""
        if start <= self.start and end >= self.end:
            return self
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, end))
        starts = np.maximum(self.starts[max(first, 0) : last], start)
        return Runs(starts, min(self.end, end), self.flags[max(first, 0) : last])

    def masked(self, mask: int) -> Runs:
        """Keep only the flag bits in mask; unknown bits must be ignored, not judged."""
        return Runs.of(self.starts, self.end, self.flags & np.uint32(mask))

    def having(self, bit: int) -> tuple[Offsets, Offsets]:
        """Starts and ends of the runs in which `bit` is set, runs that touch merged."""
        only = self.masked(bit)
        first = 0 if only.flags[0] else 1  # neighbours differ, so that of one bit every second run has it
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
    Lay two views of one range over each other; the second one's flags are shifted left by `shift` bits.

        first   |0      |1           |
        second  |2   |0      |2      |
        result  |0,2 |0 |1,0 |1,2    |
    """
    starts = np.union1d(first.starts, second.starts)
    flags = first.flags[np.searchsorted(first.starts, starts, side="right") - 1]
    other = second.flags[np.searchsorted(second.starts, starts, side="right") - 1]
    return Runs.of(starts, first.end, flags | (other << np.uint32(shift)))


def with_dirty_from(runs: Runs, offset: int) -> Runs:
    """Mark everything from `offset` on as dirty (growth: the grown part of a bitmap is clean, whatever lies there)."""
    if offset >= runs.end:
        return runs
    if offset <= runs.start:
        return Runs.uniform(runs.start, runs.end, DIRTY)
    kept = runs.starts < offset
    starts = np.append(runs.starts[kept], np.int64(offset))
    flags = np.append(runs.flags[kept], np.uint32(DIRTY))
    return Runs.of(starts, runs.end, flags)


def edges(mask: Mask) -> tuple[Offsets, Offsets]:
    """Starts and ends (exclusive) of the runs of set positions."""
    found = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    first = np.array([0] if mask[:1].any() else [], dtype=np.int64)
    last = np.array([len(mask)] if mask[-1:].any() else [], dtype=np.int64)
    both = np.concatenate([first, found, last])
    return both[::2], both[1::2]


def distinct(values: Offsets) -> Offsets:
    """Each of ascending values once; np.unique would import a part of numpy that takes 17 ms."""
    first = np.append(True, values[1:] != values[:-1])
    found: Offsets = values[first[: len(values)]]
    return found


def windows(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) at the multiples of `step`."""
    while start < end:
        cut = min(end, start - start % step + step)
        yield start, cut
        start = cut
