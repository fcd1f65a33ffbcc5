"""The map of a disk, for `pybackup map`: its extents, each with the state of the bitmap and the kind of content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from backup.model import extents
from backup.model.extents import HOLE, ZERO, Runs
from backup.model.open_disk import BlockStatus
from backup.planning.plan import WINDOW

_DIRTY_SHIFT = 2
_DIRTY = extents.DIRTY << _DIRTY_SHIFT


@dataclass(frozen=True, slots=True)
class Extent:
    """
    A run of bytes in one state.  `dirty` is None where no bitmap was named.

    `data` is true where zeroes are not certain: a hole that is not zero has undefined content (NBD protocol).  Bytes.
    """

    start: int
    length: int
    dirty: bool | None
    data: bool
    zero: bool
    hole: bool


@dataclass(frozen=True, slots=True)
class MapTotals:
    """The totals of a map, in bytes; those of dirty bytes are None where no bitmap was named."""

    size: int
    data: int
    zero: int
    hole: int
    dirty: int | None
    dirty_data: int | None
    dirty_zero: int | None


def read_map(source: BlockStatus, bitmap: str | None) -> Iterator[Extent]:
    """
    Yield the extents of a whole disk, ascending and without gaps; neighbours differ in their state.

    Raises
    ------
    SourceError
        The disk cannot be queried, or has no such bitmap.
    """
    last: Extent | None = None
    for runs in _views(source, bitmap):
        columns = (runs.starts.tolist(), (runs.ends - runs.starts).tolist(), runs.flags.tolist())
        for start, length, flags in zip(*columns, strict=True):
            extent = _extent(start, length, flags, asked=bitmap is not None)
            if last is not None and _same(last, extent):
                last = Extent(last.start, last.length + length, last.dirty, last.data, last.zero, last.hole)
                continue
            if last is not None:
                yield last
            last = extent
    if last is not None:
        yield last


def map_totals(source: BlockStatus, bitmap: str | None) -> MapTotals:
    """Return the totals of a whole disk, without making an object for each extent; raises as `read_map`."""
    sums = dict.fromkeys(range(_DIRTY << 1), 0)
    for runs in _views(source, bitmap):
        lengths = runs.ends - runs.starts
        for flags in np.unique(runs.flags).tolist():
            sums[flags] += int(lengths[runs.flags == flags].sum())

    def total(*, having: int = 0, lacking: int = 0) -> int:
        return sum(size for flags, size in sums.items() if flags & having == having and not flags & lacking)

    asked = bitmap is not None
    return MapTotals(
        size=source.size,
        data=total(lacking=ZERO),
        zero=total(having=ZERO),
        hole=total(having=HOLE),
        dirty=total(having=_DIRTY) if asked else None,
        dirty_data=total(having=_DIRTY, lacking=ZERO) if asked else None,
        dirty_zero=total(having=_DIRTY | ZERO) if asked else None,
    )


def _views(source: BlockStatus, bitmap: str | None) -> Iterator[Runs]:
    for start, end in extents.windows(0, source.size, WINDOW):
        allocation = source.allocation(start, end)
        yield (
            allocation
            if bitmap is None
            else extents.overlay(allocation, source.dirty(bitmap, start, end), _DIRTY_SHIFT)
        )


def _extent(start: int, length: int, flags: int, *, asked: bool) -> Extent:
    zero = bool(flags & ZERO)
    return Extent(start, length, bool(flags & _DIRTY) if asked else None, not zero, zero, bool(flags & HOLE))


def _same(one: Extent, other: Extent) -> bool:
    return (one.dirty, one.zero, one.hole) == (other.dirty, other.zero, other.hole)
