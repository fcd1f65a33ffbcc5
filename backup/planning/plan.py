"""
Plans: what a new point must hold, decided from what the server says.

A plan is a value.  It is made whole before the first byte is copied, so that `--dry-run` shows exactly what a run does,
and it is kept per cluster of the data file: a partly dirty cluster is read whole, a cluster is zero only when all of it
reads as zero.  Windows of clusters are stored as runs where runs are few and as two bits per cluster where they are
many, so that a fragmented disk of 16 TiB still needs only 64 MiB.

The rules (traps 1, 2, 4 and 28):

    full          zero -> ZERO                    else -> DATA
    incremental   dirty and zero -> ZERO          dirty -> DATA
                  clean and zero, chain holds data -> ZERO (the bitmap missed something,
                    and is not to be trusted at all: see Totals.missed)
                  else -> PARENT: no region, the parent's bytes stand
    rescan        zero, chain holds data -> ZERO  else, where not zero -> DATA, to be compared before it is stored
    audit         dirty -> PARENT                 zero, chain holds nothing -> PARENT: equal
                  else -> DATA, to be compared

Only `zero` may be left unread.  A `hole` that is not `zero` has undefined content by the NBD protocol and is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from backup.model import extents
from backup.model.extents import DIRTY, Mask, Offsets, Runs
from backup.model.open_disk import BlockStatus

PARENT, DATA, ZERO = 0, 1, 2
"""Kinds of a cluster in a plan.  PARENT is what no region covers."""

Kinds = npt.NDArray[np.uint8]

_T = TypeVar("_T")

WINDOW = (4 << 30) - (2 << 20)
"""
Bytes asked about at once: below 4 GiB, as lengths have 32 bits in block status (NBD protocol), and a multiple of the
largest cluster.
"""

_SECTOR = 512
"""Bytes; the size of a qcow2 image is a multiple of it."""

_NEAR = 64 << 20
"""
Dirty runs closer than this (bytes) share one question about allocation.  A server reads about one table for it (a table
of 64 KiB clusters covers 512 MiB), so that asking about the gap too costs less than asking twice.
"""

_FEW = 256
"""So many ranges are marked one by one, which a window of an idle disk takes a thousandth of the time for."""


class Sampler(Protocol):
    """What the planner shows the clusters to that a spot check may look at."""

    def offer(self, base: int, mask: Mask) -> None:
        """Have the set positions of `mask`, counted from `base`, pass by."""


class HeldData(Protocol):
    """What the planner asks of the parent chain."""

    def holds_data(self, first: int, count: int) -> Mask:
        """For `count` clusters from `first`: does the chain hold data (anything but zeroes) there?"""


@dataclass(frozen=True, slots=True)
class Totals:
    """
    Sums over a plan, in bytes, clipped at the disk's exact size.

    `dirty` is what the bitmap reports (a full counts the whole disk), before it is rounded out to clusters;
    `data` is what will be read; `zero` is what is recorded as zeroes without reading; of that, `missed` is what the
    bitmap says is clean though the chain holds data there: the bitmap did not see all that happened to the disk.
    """

    dirty: int
    data: int
    zero: int
    missed: int = 0


@dataclass(frozen=True, slots=True)
class _Packed:
    """One window's kinds: runs (starts and kinds), or two bit planes when that is smaller."""

    first: int
    count: int
    starts: npt.NDArray[np.uint32] | None
    kinds: Kinds

    @classmethod
    def of(cls, first: int, kinds: Kinds) -> _Packed:
        starts = _run_starts(kinds)
        if len(starts) * 5 <= len(kinds) // 4 + 64:
            return cls(first, len(kinds), starts.astype(np.uint32), kinds[starts])
        planes = np.concatenate([np.packbits(kinds & 1), np.packbits(kinds >> 1)])
        return cls(first, len(kinds), None, planes)

    def unpacked(self) -> Kinds:
        if self.starts is not None:
            bounds = np.append(self.starts, np.uint32(self.count)).astype(np.int64)
            return np.repeat(self.kinds, bounds[1:] - bounds[:-1])
        low, high = np.split(self.kinds, 2)
        planes = np.unpackbits(low, count=self.count), np.unpackbits(high, count=self.count)
        return (planes[0] | (planes[1] << 1)).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Plan:
    """All regions of one disk for one new point."""

    size: int
    cluster_size: int
    totals: Totals
    _windows: tuple[_Packed, ...]

    def windows(self) -> Iterator[tuple[int, Kinds]]:
        """First cluster and kinds of each window that holds a region, ascending."""
        for window in self._windows:
            yield window.first, window.unpacked()

    def regions(self) -> Iterator[tuple[int, int, int]]:
        """
        Start, length (bytes, clipped at the disk's size) and kind of each region, ascending.

        Cut at windows; neighbours of one kind inside a window are one region.
        """
        for first, kinds in self.windows():
            yield from cluster_runs(first, kinds, self.cluster_size, self.size)


def cluster_runs(first: int, kinds: Kinds, cluster_size: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Start, length (bytes, clipped at size) and kind of each run of clusters that is not PARENT."""
    starts = _run_starts(kinds)
    ends = np.append(starts[1:], len(kinds))
    chosen = kinds[starts] != PARENT
    columns = (starts[chosen] + first, ends[chosen] + first, kinds[starts[chosen]])
    for run_first, run_end, kind in zip(*(column.tolist() for column in columns), strict=True):
        start = run_first * cluster_size
        yield start, min(run_end * cluster_size, size) - start, kind


def plan_full(source: BlockStatus, cluster_size: int) -> Plan:
    """
    Plan a full: everything that does not read as zero is data.

    Raises
    ------
    SourceError
        The server fails, or does not say what it must.
    """
    builder = _Builder(source.size, cluster_size)
    for start, length, zero in _zero_windows(source, cluster_size):
        builder.add(start, length, np.where(zero, np.uint8(ZERO), np.uint8(DATA)))
    return builder.plan()


def plan_incremental(
    source: BlockStatus,
    cluster_size: int,
    bitmap: str,
    *,
    parent_size: int,
    chain: HeldData | None,
    sampler: Sampler | None = None,
) -> Plan:
    """
    Plan an incremental: what is dirty, what grew, and zeroes over data of the chain.

    Parameters
    ----------
    bitmap : str
        Exact name of the bitmap that records since the parent point.
    parent_size : int
        The disk's exact size at the parent point; from there on, rounded down to a cluster, everything is dirty.  So is
        the cluster in which the disk was cut (see `cut_cluster`).
    chain : HeldData or None
        The parent chain, to check zeroes against (trap 4); None leaves that check out, and asks about allocation only
        where something is dirty.
    sampler : Sampler or None
        Is shown the clusters that the bitmap calls clean; with `chain`, those that are not zero: the chain is asked
        about the others anyway.
    """
    builder = _Builder(source.size, cluster_size)
    cut = cut_cluster(source.size, parent_size, cluster_size)
    dirty_from = _grown(source.size, parent_size, cluster_size) if cut is None else cut * cluster_size
    found = _dirty_windows(source, cluster_size, bitmap, dirty_from, everywhere=chain is not None)
    for window in _one_behind(found):
        touched = window.touched
        zero = _zero_where(source, window, cluster_size)
        kinds = np.zeros(len(touched), dtype=np.uint8)
        if window.dirty:
            kinds[touched] = DATA
            kinds[touched & zero] = ZERO
        if sampler is not None:
            sampler.offer(window.start // cluster_size, ~touched if chain is None else ~(touched | zero))
        if chain is not None:
            missed = _held(chain, zero & ~touched, window.start // cluster_size, cluster_size)
            if missed.any():
                kinds[missed] = ZERO
                builder.missed += builder.bytes(window.start, missed)
        builder.add(window.start, window.dirty, kinds)
    return builder.plan()


def plan_rescan(source: BlockStatus, cluster_size: int, chain: HeldData) -> Plan:
    """
    Plan to read a whole disk and hold it against the chain: DATA is what may differ, ZERO what does.

    Raises
    ------
    SourceError
        The server fails, or does not say what it must.
    """
    builder = _Builder(source.size, cluster_size)
    for start, length, zero in _zero_windows(source, cluster_size):
        kinds = np.where(zero, np.uint8(PARENT), np.uint8(DATA))
        kinds[_held(chain, zero, start // cluster_size, cluster_size)] = ZERO
        builder.add(start, length, kinds)
    return builder.plan()


def plan_audit(
    source: BlockStatus, cluster_size: int, bitmap: str | None, *, parent_size: int, chain: HeldData
) -> Plan:
    """
    Plan to compare with the chain what the bitmap calls clean, or (no bitmap) everything; only DATA is in it.

    What is zero and not held by the chain is equal without being read.  `parent_size` and `bitmap` as for an
    incremental; Totals.dirty is what is left out, also for having grown.

    Raises
    ------
    SourceError
        The server fails, or has no such bitmap.
    """
    builder = _Builder(source.size, cluster_size)
    grown = source.size if bitmap is None else _grown(source.size, parent_size, cluster_size)
    for window in _one_behind(_dirty_windows(source, cluster_size, bitmap, grown, everywhere=True)):
        zero = _zero_where(source, window, cluster_size)
        kinds = np.where(window.touched | zero, np.uint8(PARENT), np.uint8(DATA))
        kinds[_held(chain, zero & ~window.touched, window.start // cluster_size, cluster_size)] = DATA
        builder.add(window.start, window.dirty, kinds)
    return builder.plan()


def plan_of(clusters: Offsets, size: int, cluster_size: int) -> Plan:
    """Plan to read these clusters, ascending and inside the disk of `size` bytes, and nothing else."""
    builder = _Builder(size, cluster_size)
    step = WINDOW // cluster_size
    for number in extents.distinct(clusters // step).tolist():
        first = number * step
        kinds = np.zeros(min(step, _clusters(size, cluster_size) - first), dtype=np.uint8)
        kinds[clusters[clusters // step == number] - first] = DATA
        builder.add(first * cluster_size, 0, kinds)
    return builder.plan()


def cut_cluster(size: int, parent_size: int, cluster_size: int) -> int | None:
    """
    Number of the disk's last cluster, where it must be stored whatever it holds; None where it need not.

    A qcow2 file ends at a multiple of 512.  Where a disk was cut elsewhere, QEMU would show the parent's bytes between
    the disk's end and the file's, and again behind that end when the disk has grown later.
    """
    return size // cluster_size if size < parent_size and size % _SECTOR else None


def _grown(size: int, parent_size: int, cluster_size: int) -> int:
    """The byte from which on everything is dirty, since the disk grew; `size` where it did not."""
    return parent_size - parent_size % cluster_size if size > parent_size else size


def _held(chain: HeldData, wanted: Mask, first: int, cluster_size: int) -> Mask:
    """Which of the wanted clusters, counted from `first`, the chain holds data for."""
    held = wanted.copy()
    for low, high in _spans(wanted, _NEAR // cluster_size):
        held[low:high] &= chain.holds_data(first + low, high - low)
    return held


def any_dirty(source: BlockStatus, bitmap: str) -> bool:
    """Does the bitmap have any dirty range?  Asks up to the first."""
    for (start, end), following in _with_following(extents.windows(0, source.size, WINDOW)):
        status = source.dirty(bitmap, start, end)
        if status.flags.any():
            return True
        if following is not None:
            source.expect_dirty(bitmap, *following)
    return False


def _zero_windows(source: BlockStatus, cluster_size: int) -> Iterator[tuple[int, int, Mask]]:
    """Start and length (bytes) of every window, and which of its clusters read wholly as zero."""
    for start, end in _one_behind(_asked_allocation(source)):
        zero = _covered(source.allocation(start, end), extents.ZERO, start, cluster_size, source.size)
        yield start, end - start, zero


def _asked_allocation(source: BlockStatus) -> Iterator[tuple[int, int]]:
    for start, end in extents.windows(0, source.size, WINDOW):
        source.expect_allocation(start, end)
        yield start, end


@dataclass(frozen=True, slots=True)
class _Window:
    """
    What the bitmap says of a window that starts at byte `start`.

    `dirty` bytes of it are; `touched` are the clusters with any of them; `asked` are the ranges (bytes) whose
    allocation matters.
    """

    start: int
    dirty: int
    touched: Mask
    asked: tuple[tuple[int, int], ...]


def _dirty_windows(
    source: BlockStatus, cluster_size: int, bitmap: str | None, dirty_from: int, *, everywhere: bool
) -> Iterator[_Window]:
    """
    Yield every window; each one's allocation and the next one's dirty ranges are asked for by then.

    Allocation matters near what is dirty, or `everywhere`; from `dirty_from` on all is dirty.  Without a bitmap nothing
    else is.
    """
    for (start, end), following in _with_following(extents.windows(0, source.size, WINDOW)):
        status = Runs.uniform(start, end, 0) if bitmap is None else source.dirty(bitmap, start, end)
        if bitmap is not None and following is not None:
            source.expect_dirty(bitmap, *following)
        starts, ends = extents.with_dirty_from(status, dirty_from).having(DIRTY)
        touched = _touched(starts, ends, start, cluster_size, _clusters(end - start, cluster_size))
        asked = ((start, end),) if everywhere else tuple(_near(touched, start, end, cluster_size))
        for low, high in asked:
            source.expect_allocation(low, high)
        yield _Window(start, int((ends - starts).sum()), touched, asked)


def _near(touched: Mask, start: int, end: int, cluster_size: int) -> Iterator[tuple[int, int]]:
    """Ranges, in bytes, that hold the touched clusters of the window [start, end)."""
    for low, high in _spans(touched, _NEAR // cluster_size):
        yield start + low * cluster_size, min(start + high * cluster_size, end)


def _with_following(items: Iterable[_T]) -> Iterator[tuple[_T, _T | None]]:
    """Yield each item with the one after it; a disk of no bytes has none."""
    held = list(items)
    yield from zip_longest(held, held[1:])


def _one_behind(items: Iterable[_T]) -> Iterator[_T]:
    """Yield each item when the next one is there already: the server works on one while we work on the other."""
    held: list[_T] = []
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.pop(0)
    yield from held


class _Builder:
    """Collects windows and sums; the only mutable thing here, and it ends in a frozen Plan."""

    def __init__(self, size: int, cluster_size: int) -> None:
        self.size = size
        self.cluster_size = cluster_size
        self.windows: list[_Packed] = []
        self.dirty = self.data = self.zero = self.missed = 0

    def add(self, start: int, dirty: int, kinds: Kinds) -> None:
        self.dirty += dirty
        if not kinds.any():
            return
        self.data += self.bytes(start, kinds == DATA)
        self.zero += self.bytes(start, kinds == ZERO)
        self.windows.append(_Packed.of(start // self.cluster_size, kinds))

    def bytes(self, start: int, mask: Mask) -> int:
        """Bytes of the set clusters of a window that starts at byte `start`, clipped at the disk's size."""
        total = int(np.count_nonzero(mask)) * self.cluster_size
        beyond = start + len(mask) * self.cluster_size - self.size
        return total - beyond if beyond > 0 and mask[-1] else total

    def plan(self) -> Plan:
        totals = Totals(self.dirty, self.data, self.zero, self.missed)
        return Plan(self.size, self.cluster_size, totals, tuple(self.windows))


def _zero_where(source: BlockStatus, window: _Window, cluster_size: int) -> Mask:
    """Which clusters read wholly as zero; none where that was not to be asked."""
    zero = np.zeros(len(window.touched), dtype=np.bool_)
    for low, high in window.asked:
        first = (low - window.start) // cluster_size
        covered = _covered(source.allocation(low, high), extents.ZERO, low, cluster_size, source.size)
        zero[first : first + len(covered)] = covered
    return zero


def _spans(mask: Mask, near: int) -> Iterator[tuple[int, int]]:
    """Spans of set positions; those between which fewer than `near` are unset are merged."""
    if not mask.any():
        return
    starts, ends = extents.edges(mask)
    far = np.flatnonzero(starts[1:] - ends[:-1] >= near)
    lows = np.concatenate([starts[:1], starts[far + 1]]).tolist()
    highs = np.concatenate([ends[far], ends[-1:]]).tolist()
    yield from zip(lows, highs, strict=True)


def _touched(starts: Offsets, ends: Offsets, base: int, cluster_size: int, count: int) -> Mask:
    """Clusters of which any byte lies in a run: dirty ranges are rounded out."""
    return _fill((starts - base) // cluster_size, -((base - ends) // cluster_size), count)


def _covered(runs: Runs, bit: int, base: int, cluster_size: int, size: int) -> Mask:
    """Clusters of which every byte up to the disk's size lies in runs with `bit`: zeroes are rounded in."""
    starts, ends = runs.having(bit)
    first = -((base - starts) // cluster_size)
    last = (ends - base) // cluster_size
    count = _clusters(runs.end - base, cluster_size)
    if len(ends) and ends[-1] == size:
        last[-1] = count  # the disk's last cluster may be partial; what lies beyond the end is nobody's
    return _fill(first, np.maximum(first, last), count)


def _fill(firsts: Offsets, ends: Offsets, count: int) -> Mask:
    """Mask of `count` positions with the ranges [firsts, ends) set."""
    if len(firsts) <= _FEW:
        filled = np.zeros(count, dtype=np.bool_)
        for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
            filled[first:end] = True
        return filled
    steps = np.bincount(firsts, minlength=count + 1).astype(np.int64)
    steps -= np.bincount(ends, minlength=count + 1)
    return np.cumsum(steps[:count]) > 0


def _clusters(length: int, cluster_size: int) -> int:
    return -(-length // cluster_size)


def _run_starts(kinds: Kinds) -> npt.NDArray[np.int64]:
    changes = np.flatnonzero(kinds[1:] != kinds[:-1]) + 1
    return np.concatenate([np.zeros(1, dtype=np.int64), changes])
