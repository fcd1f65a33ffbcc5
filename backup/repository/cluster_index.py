"""
For each cluster of a disk, the newest link of its chain that holds it, clipped at every point's size (design.md,
"Reading a chain"):

    newest, 4 MiB            |....|....|....|....|
    parent, shrunk to 2.5    |....|.dd.|..|           beyond 2.5 MiB nothing older shows through
    full, 4 MiB              |dddd|dddd|dddd|dddd|
    result                    full  par. cut  zero
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from backup.model.chain import Chain
from backup.model.extents import Mask, Offsets, distinct, edges

HoldersAndEntries = tuple[npt.NDArray[np.int16], npt.NDArray[np.uint64]]
"""For each cluster the number of the link that holds it (or NOBODY), and the L2 entry there."""

NOBODY = -1
"""The holder of a cluster that no file of the chain holds: the cluster reads as zero."""

_NEAR_TABLES = 4
"""Gaps of up to this many missing L2 tables are read through: one longer read is faster than two short ones."""

ZERO = 1
"""The code of a cluster that reads as zeroes; higher codes are data (see backup.qcow2)."""


class ClusterFile(Protocol):
    """The part of a data file's reader that the index needs."""

    def allocated_tables(self) -> Mask:
        """Return a flag for each L2 table (`cluster_size // 8` guest clusters): False if all are unallocated."""

    def allocated(self, first: int, count: int) -> tuple[Offsets, npt.NDArray[np.uint64]]:
        """Return those of `count` guest clusters with entries other than 0, counted from `first`, and the entries."""

    def kinds(self, entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return the codes of entries other than 0: 1 is zero, higher is data."""


class Index:
    """
    Finds the holders of clusters in the open files of a chain, newest first.

    A link costs time only where it has L2 tables: most points of a long chain hold little of a large disk.
    """

    def __init__(self, chain: Chain, files: Sequence[ClusterFile]) -> None:
        self.chain = chain
        self._files = files
        self._limits = chain.limits
        self._per_table = chain.cluster_size // 8
        self._tables = _as_rows([file.allocated_tables() for file in files])

    def resolve(
        self, first: int, count: int, *, zeroes: bool = False
    ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint64]]:
        """
        Return, for each of `count` clusters from `first`, the number of the link that holds its data, and the L2 entry.

        The holder of a cluster that reads as zero is NOBODY; with `zeroes`, it is the link that has a zero cluster
        there.  Only the bytes of the cluster below the link's limit count.
        """
        least = ZERO if zeroes else ZERO + 1
        holders = np.full(count, NOBODY, dtype=np.int16)
        found = np.zeros(count, dtype=np.uint64)
        for number, places, entries, kinds in self._visible(first, count):
            some = kinds >= least
            holders[places[some]] = number
            found[places[some]] = entries[some]
        return holders, found

    def resolve_some(self, clusters: Offsets) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint64]]:
        """
        Return the same as `resolve` for a few clusters (ascending) that are scattered over the disk.

        Each link is searched once for all clusters that it may hold: a chain may have far more links than there are
        clusters.
        """
        holders = np.full(len(clusters), NOBODY, dtype=np.int16)
        found = np.zeros(len(clusters), dtype=np.uint64)
        tables = np.minimum(clusters // self._per_table, self._tables.shape[1])
        there = np.column_stack((self._tables, np.zeros(len(self._files), dtype=np.bool_)))[:, tables]
        open_ = np.ones(len(clusters), dtype=np.bool_)
        for number in np.flatnonzero(there.any(axis=1)).tolist():
            shown = clusters * self.chain.cluster_size < self._limits[number]
            for table in distinct(tables[there[number] & shown & open_]).tolist():
                places = np.flatnonzero((tables == table) & shown & open_)
                low, high = int(clusters[places[0]]), int(clusters[places[-1]])
                entries = _picked(*self._files[number].allocated(low, high - low + 1), clusters[places] - low)
                kinds = self._files[number].kinds(entries)
                data = kinds > ZERO
                holders[places[data]] = number
                found[places[data]] = entries[data]
                open_[places] = entries == 0
        return holders, found

    def holds_data(self, first: int, count: int) -> Mask:
        """Return a flag for each of `count` clusters from `first`: whether the chain holds data there."""
        held = np.zeros(count, dtype=np.bool_)
        for _, places, _, kinds in self._visible(first, count):
            held[places] = kinds > ZERO
        return held

    def _visible(
        self, first: int, count: int
    ) -> Iterator[tuple[int, Offsets, npt.NDArray[np.uint64], npt.NDArray[np.uint8]]]:
        """
        Find the allocated clusters of each link, among `count` clusters from `first`, that no newer link hides.

        Yields a link's number, the clusters counted from `first`, their entries and their codes; a link may come again.
        """
        hidden = np.zeros(count, dtype=np.bool_)
        tables = slice(first // self._per_table, -(-(first + count) // self._per_table))
        for number in np.flatnonzero(self._tables[:, tables].any(axis=1)).tolist():
            file = self._files[number]
            for low, high in self._held_by(number, first, first + count):
                if hidden[low - first : high - first].all():
                    continue
                places, entries = file.allocated(low, high - low)
                places = places + (low - first)
                shown = ~hidden[places]
                hidden[places] = True
                places, entries = places[shown], entries[shown]
                yield number, places, entries, file.kinds(entries)

    def _held_by(self, number: int, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of clusters in [first, end), below the link's limit, in which the link has L2 tables."""
        per = self._per_table
        end = min(end, -(-self._limits[number] // self.chain.cluster_size))
        if end <= first:
            return
        skipped = first // per
        lows, highs = edges(self._tables[number, skipped : -(-end // per)])
        far = lows[1:] - highs[:-1] > _NEAR_TABLES
        lows, highs = lows[np.append(True, far)[: len(lows)]], highs[np.append(far, True)[: len(highs)]]
        for low, high in zip((lows + skipped).tolist(), (highs + skipped).tolist(), strict=True):
            yield max(first, low * per), min(end, high * per)


def _picked(places: Offsets, entries: npt.NDArray[np.uint64], wanted: Offsets) -> npt.NDArray[np.uint64]:
    """Return the entries of the wanted places, 0 for those that are not among `places`; both are ascending."""
    at = np.searchsorted(places, wanted)
    there = np.append(places, -1)[at] == wanted
    picked = np.zeros(len(wanted), dtype=np.uint64)
    picked[there] = entries[at[there]]
    return picked


def _as_rows(masks: Sequence[Mask]) -> Mask:
    """Return the masks as rows, the shorter ones filled up with False: links of a chain may differ in size."""
    rows = np.zeros((len(masks), max((len(mask) for mask in masks), default=0)), dtype=np.bool_)
    for row, mask in zip(rows, masks, strict=True):
        row[: len(mask)] = mask
    return rows
