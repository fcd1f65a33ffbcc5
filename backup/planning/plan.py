"""
Plans: what a new point must hold, decided from the disk's allocation and its dirty bitmap.

A plan is a value.  The whole plan is made before the first byte is copied, so that `--dry-run` shows exactly what a run
does.  It decides for each cluster of the data file: a cluster that is dirty in part is read as a whole, and a cluster
is zero only if all of it reads as zero.  A window of clusters is stored as runs where the runs are few, and as two bits
for each cluster where they are many, so that a fragmented disk of 16 TiB needs only 64 MiB.

The rules (traps 1, 2, 4 and 28):

    full          zero -> ZERO                    else -> DATA
    incremental   dirty and zero -> ZERO          dirty -> DATA
                  clean and zero, chain holds data -> ZERO (the bitmap missed something,
                    and must not be trusted at all: see Totals.missed)
                  else -> PARENT: nothing is stored, the parent's bytes remain
    rescan        zero, chain holds data -> ZERO  else, where not zero -> DATA, compared before it is stored
    audit         dirty -> PARENT                 zero, chain holds no data -> PARENT: equal
                  else -> DATA, compared

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
"""Kinds of a cluster in a plan.  For a PARENT cluster nothing is stored."""

Kinds = npt.NDArray[np.uint8]

_T = TypeVar("_T")

WINDOW = (4 << 30) - (2 << 20)
"""
Bytes that one query covers: below 4 GiB, since lengths have 32 bits in block status (NBD protocol), and a multiple of
the largest cluster.
"""

_SECTOR = 512
"""Bytes; the size of a qcow2 image is a multiple of it."""

_NEAR = 64 << 20
"""
Dirty runs closer than this (bytes) share one query for allocation.  A server reads about one table for a query (a table
of 64 KiB clusters covers 512 MiB), so it costs less to include the gap than to send a second query.
"""

_FEW = 256
"""Up to this many ranges are marked one by one: for a window of an idle disk, that takes a thousandth of the time."""


class Sampler(Protocol):
    """Receives the clusters that a spot check may read, and chooses some of them."""

    def offer(self, base: int, mask: Mask) -> None:
        """Offer the clusters `base + i`, for every set position `i` of `mask`."""


class ChainData(Protocol):
    """The part of the parent chain that planning needs."""

    def holds_data(self, first: int, count: int) -> Mask:
        """Tell for each of `count` clusters from `first` whether the chain holds data (anything but zeroes) there."""


@dataclass(frozen=True, slots=True)
class Totals:
    """
    Sums over a plan, in bytes, clipped at the disk's exact size.

    `dirty` is what the bitmap reports (for a full, the whole disk), before it is rounded out to clusters.  `data` will
    be read.  `zero` is recorded as zeroes without being read.  `missed` is the part of `zero` that the bitmap reports
    as clean although the chain holds data there: the bitmap has not recorded every change of the disk.
    """

    dirty: int
    data: int
    zero: int
    missed: int = 0


@dataclass(frozen=True, slots=True)
class _Packed:
    """The kinds of one window: runs (starts and kinds), or two bit planes where these are smaller."""

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
    """What one new point must hold of one disk."""

    size: int
    cluster_size: int
    totals: Totals
    _windows: tuple[_Packed, ...]

    def windows(self) -> Iterator[tuple[int, Kinds]]:
        """Yield the first cluster and the kinds of each window that is not all PARENT, ascending."""
        for window in self._windows:
            yield window.first, window.unpacked()


def cluster_runs(first: int, kinds: Kinds, cluster_size: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield start, length (bytes, clipped at `size`) and kind of each run of clusters that is not PARENT."""
    starts = _run_starts(kinds)
    ends = np.append(starts[1:], len(kinds))
    chosen = kinds[starts] != PARENT
    columns = (starts[chosen] + first, ends[chosen] + first, kinds[starts[chosen]])
    for run_first, run_end, kind in zip(*(column.tolist() for column in columns), strict=True):
        start = run_first * cluster_size
        yield start, min(run_end * cluster_size, size) - start, kind


def plan_full(source: BlockStatus, cluster_size: int) -> Plan:
    """
    Plan a full: every cluster that does not read as zero is data.

    Raises
    ------
    SourceError
        The disk cannot be queried.
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
    chain: ChainData | None,
    sampler: Sampler | None = None,
) -> Plan:
    """
    Plan an incremental: what is dirty, what the disk has grown by, and zeroes where the chain holds data.

    Parameters
    ----------
    bitmap : str
        Exact name of the bitmap that records since the parent point.
    parent_size : int
        The disk's exact size at the parent point.  Everything from that size on, rounded down to a cluster, is dirty.
        The cluster at the end of a disk that was shrunk is dirty as well (see `cut_cluster`).
    chain : ChainData or None
        The parent chain, to compare zeroes with (trap 4).  None: zeroes are not compared, and allocation is queried
        only where something is dirty.
    sampler : Sampler or None
        Receives the clusters that the bitmap reports as clean; with `chain`, only those that are not zero, since the
        zeroes are compared with the chain anyway.

    Raises
    ------
    SourceError
        The disk cannot be queried, or has no such bitmap.
    """
    builder = _Builder(source.size, cluster_size)
    cut = cut_cluster(source.size, parent_size, cluster_size)
    dirty_from = _grown(source.size, parent_size, cluster_size) if cut is None else cut * cluster_size
    windows = _dirty_windows(source, cluster_size, bitmap, dirty_from, everywhere=chain is not None)
    for window in _one_behind(windows):
        touched = window.touched
        zero = _zero_where(source, window, cluster_size)
        kinds = np.zeros(len(touched), dtype=np.uint8)
        if window.dirty:
            kinds[touched] = DATA
            kinds[touched & zero] = ZERO
        if sampler is not None:
            sampler.offer(window.start // cluster_size, ~touched if chain is None else ~(touched | zero))
        if chain is not None:
            missed = _with_data(chain, zero & ~touched, window.start // cluster_size, cluster_size)
            if missed.any():
                kinds[missed] = ZERO
                builder.missed += builder.bytes(window.start, missed)
        builder.add(window.start, window.dirty, kinds)
    return builder.plan()


def plan_rescan(source: BlockStatus, cluster_size: int, chain: ChainData) -> Plan:
    """
    Plan to read a whole disk and compare it with the chain: DATA may differ from the chain, ZERO does differ.

    Raises
    ------
    SourceError
        The disk cannot be queried.
    """
    builder = _Builder(source.size, cluster_size)
    for start, length, zero in _zero_windows(source, cluster_size):
        kinds = np.where(zero, np.uint8(PARENT), np.uint8(DATA))
        kinds[_with_data(chain, zero, start // cluster_size, cluster_size)] = ZERO
        builder.add(start, length, kinds)
    return builder.plan()


def plan_audit(
    source: BlockStatus, cluster_size: int, bitmap: str | None, *, parent_size: int, chain: ChainData
) -> Plan:
    """
    Plan an audit: to compare what the bitmap reports as clean with the chain; without a bitmap, everything.

    Only DATA and PARENT are planned.

    Where the disk is zero and the chain holds no data, the two are equal and need no reading.  `parent_size` and
    `bitmap` are those of `plan_incremental`.  Totals.dirty counts the bytes that are not compared: the dirty ranges and
    what the disk has grown by.

    Raises
    ------
    SourceError
        The disk cannot be asked, or has no such bitmap.
    """
    builder = _Builder(source.size, cluster_size)
    grown = source.size if bitmap is None else _grown(source.size, parent_size, cluster_size)
    for window in _one_behind(_dirty_windows(source, cluster_size, bitmap, grown, everywhere=True)):
        zero = _zero_where(source, window, cluster_size)
        kinds = np.where(window.touched | zero, np.uint8(PARENT), np.uint8(DATA))
        kinds[_with_data(chain, zero & ~window.touched, window.start // cluster_size, cluster_size)] = DATA
        builder.add(window.start, window.dirty, kinds)
    return builder.plan()


def plan_of(clusters: Offsets, size: int, cluster_size: int) -> Plan:
    """Plan to read only these clusters, which are ascending and lie inside the disk of `size` bytes."""
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
    Return the number of a shrunk disk's last cluster if the cluster must be stored, whatever it contains; else None.

    The size in a qcow2 header is a multiple of 512.  If the disk was shrunk to any other size, QEMU would show the
    parent's bytes between the end of the disk and that multiple, and would show them again when the disk grows later.
    """
    return size // cluster_size if size < parent_size and size % _SECTOR else None


def _grown(size: int, parent_size: int, cluster_size: int) -> int:
    """Return the offset from which everything is dirty because the disk has grown; `size` if it has not grown."""
    return parent_size - parent_size % cluster_size if size > parent_size else size


def _with_data(chain: ChainData, wanted: Mask, first: int, cluster_size: int) -> Mask:
    """Return which of the wanted clusters, counted from `first`, hold data in the chain."""
    data = wanted.copy()
    for low, high in _spans(wanted, _NEAR // cluster_size):
        data[low:high] &= chain.holds_data(first + low, high - low)
    return data


def any_dirty(source: BlockStatus, bitmap: str) -> bool:
    """Tell whether the bitmap has a dirty range; the search ends at the first one."""
    for (start, end), following in _with_following(extents.windows(0, source.size, WINDOW)):
        status = source.dirty(bitmap, start, end)
        if status.flags.any():
            return True
        if following is not None:
            source.expect_dirty(bitmap, *following)
    return False


def _zero_windows(source: BlockStatus, cluster_size: int) -> Iterator[tuple[int, int, Mask]]:
    """Yield start and length (bytes) of every window, and a mask of the clusters that read as zero completely."""
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
    What the bitmap reports about the window that starts at byte `start`.

    `dirty` is the number of dirty bytes, `touched` marks the clusters that contain some, and `asked` are the ranges
    (bytes) whose allocation matters.
    """

    start: int
    dirty: int
    touched: Mask
    asked: tuple[tuple[int, int], ...]


def _dirty_windows(
    source: BlockStatus, cluster_size: int, bitmap: str | None, dirty_from: int, *, everywhere: bool
) -> Iterator[_Window]:
    """
    Yield every window, after announcing the queries for its allocation and for the next window's dirty ranges.

    Allocation matters near dirty ranges, or `everywhere`.  Everything from `dirty_from` on is dirty; without a bitmap
    nothing else is.
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
    """Yield ranges (bytes) that contain the touched clusters of the window [start, end)."""
    for low, high in _spans(touched, _NEAR // cluster_size):
        yield start + low * cluster_size, min(start + high * cluster_size, end)


def _with_following(items: Iterable[_T]) -> Iterator[tuple[_T, _T | None]]:
    """Yield each item with the next one, the last item with None."""
    listed = list(items)
    yield from zip_longest(listed, listed[1:])


def _one_behind(items: Iterable[_T]) -> Iterator[_T]:
    """Yield each item only when the next one is known: the server answers for one while the other is planned."""
    waiting: list[_T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


class _Builder:
    """Collects windows and totals, and makes the frozen Plan from them."""

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
        """Number of bytes in the set clusters of the window that starts at byte `start`, clipped at the disk's size."""
        total = int(np.count_nonzero(mask)) * self.cluster_size
        beyond = start + len(mask) * self.cluster_size - self.size
        return total - beyond if beyond > 0 and mask[-1] else total

    def plan(self) -> Plan:
        totals = Totals(self.dirty, self.data, self.zero, self.missed)
        return Plan(self.size, self.cluster_size, totals, tuple(self.windows))


def _zero_where(source: BlockStatus, window: _Window, cluster_size: int) -> Mask:
    """Return the clusters that read as zero completely, as far as their allocation was queried."""
    zero = np.zeros(len(window.touched), dtype=np.bool_)
    for low, high in window.asked:
        first = (low - window.start) // cluster_size
        covered = _covered(source.allocation(low, high), extents.ZERO, low, cluster_size, source.size)
        zero[first : first + len(covered)] = covered
    return zero


def _spans(mask: Mask, near: int) -> Iterator[tuple[int, int]]:
    """Yield the spans of set positions; spans are merged where fewer than `near` unset positions lie between them."""
    if not mask.any():
        return
    starts, ends = extents.edges(mask)
    far = np.flatnonzero(starts[1:] - ends[:-1] >= near)
    lows = np.concatenate([starts[:1], starts[far + 1]]).tolist()
    highs = np.concatenate([ends[far], ends[-1:]]).tolist()
    yield from zip(lows, highs, strict=True)


def _touched(starts: Offsets, ends: Offsets, base: int, cluster_size: int, count: int) -> Mask:
    """Return the clusters that contain any byte of a run: dirty ranges are rounded out."""
    return _fill((starts - base) // cluster_size, -((base - ends) // cluster_size), count)


def _covered(runs: Runs, bit: int, base: int, cluster_size: int, size: int) -> Mask:
    """Return the clusters that lie completely (up to the disk's size) in runs with `bit`: zeroes are rounded in."""
    starts, ends = runs.having(bit)
    first = -((base - starts) // cluster_size)
    last = (ends - base) // cluster_size
    count = _clusters(runs.end - base, cluster_size)
    if len(ends) and ends[-1] == size:
        last[-1] = count  # the disk's last cluster may be partial; the bytes beyond the end do not count
    return _fill(first, np.maximum(first, last), count)


def _fill(firsts: Offsets, ends: Offsets, count: int) -> Mask:
    """Return a mask of `count` positions with the ranges [firsts, ends) set."""
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
