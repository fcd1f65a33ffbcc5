"""
Chains: a disk's points from a full to the newest, proven contiguous, and which of them holds a byte.

A child names its parent's id and identity; `build` refuses gaps, swaps and foreign parents.  `Index` answers, for a run
of clusters, who is the newest holder of each, clipped at every point's size (design.md, "Reading a chain"):

    newest, 4 MiB            |....|....|....|....|
    parent, shrunk to 2.5    |....|.dd.|..|           beyond 2.5 MiB nothing older shows through
    full, 4 MiB              |dddd|dddd|dddd|dddd|
    result                    full  par. cut  zero
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from backup.errors import BackupError, Damaged, NotFound
from backup.extents import Mask
from backup.manifest import DiskEntry, Manifest

NOBODY = -1
"""Holder of a cluster that no file of the chain holds: it reads as zero."""

_NONE: Mapping[str, BackupError] = MappingProxyType({})

UNALLOCATED, ZERO = 0, 1
"""What a data file holds for a cluster, where that is no data (backup.qcow2 has the other codes)."""


@dataclass(frozen=True, slots=True)
class Link:
    """One disk in one point."""

    point: str
    sequence: int
    entry: DiskEntry


@dataclass(frozen=True, slots=True)
class Chain:
    """Links from the newest to the full."""

    disk: str
    links: tuple[Link, ...]

    @property
    def newest(self) -> Link:
        """The link that the chain was built for."""
        return self.links[0]

    @property
    def size(self) -> int:
        """Exact size of the disk at the newest point, in bytes."""
        return self.links[0].entry.size

    @property
    def cluster_size(self) -> int:
        """Bytes; the same in all links."""
        return self.links[0].entry.data.cluster_size

    @property
    def limits(self) -> tuple[int, ...]:
        """For each link: from this byte on it does not show, since it or a point after it was that short."""
        limits: list[int] = []
        for link in self.links:
            limits.append(min(link.entry.size, limits[-1] if limits else link.entry.size))
        return tuple(limits)


def newest_manifest(manifests: Iterable[Manifest], disk: str | None = None) -> Manifest | None:
    """The manifest of the highest sequence, of those that hold `disk`; never by time or name."""
    held = [manifest for manifest in manifests if disk is None or manifest.disk(disk) is not None]
    return max(held, key=lambda manifest: manifest.sequence, default=None)


def build(
    manifests: Mapping[str, Manifest], point: str, disk: str, unreadable: Mapping[str, BackupError] = _NONE
) -> Chain:
    """
    Follow parents from `point` down to a full.

    Parameters
    ----------
    manifests : mapping
        The machine's manifests by point id.
    unreadable : mapping
        What is wrong with the others, by file name: a damaged manifest is there, and not missing.

    Raises
    ------
    NotFound
        The point or the disk is not there, or a parent's manifest is missing.
    BackupError
        A manifest of the chain cannot be read.
    Damaged
        A parent is not the one that the child was made against.
    """
    links = [_link(manifests, point, disk, unreadable)]
    while links[-1].entry.parent is not None:
        links.append(_parent(manifests, links[-1], disk, unreadable))
    return Chain(disk, tuple(links))


def _link(manifests: Mapping[str, Manifest], point: str, disk: str, unreadable: Mapping[str, BackupError]) -> Link:
    manifest = manifests.get(point)
    if manifest is None:
        if f"{point}.json" in unreadable:
            raise unreadable[f"{point}.json"]
        raise NotFound(f"there is no point {point}", hint="see `pybackup list` for the points that there are")
    entry = manifest.disk(disk)
    if entry is None:
        names = ", ".join(held.name for held in manifest.disks)
        raise NotFound(f"point {point} holds no disk {disk!r}", hint=f"it holds: {names}")
    return Link(point, manifest.sequence, entry)


def _parent(manifests: Mapping[str, Manifest], child: Link, disk: str, unreadable: Mapping[str, BackupError]) -> Link:
    wanted = child.entry.parent
    assert wanted is not None
    manifest = manifests.get(wanted.point)
    if manifest is None:
        found = unreadable.get(f"{wanted.point}.json")
        if found is not None:
            why = f"point {child.point} builds on point {wanted.point}: {found.message}"
            raise type(found)(why, hint=found.hint) from None
        raise NotFound(
            f"point {child.point} builds on point {wanted.point}, whose manifest is missing",
            hint="bring the manifest back from a copy of the repository, or use a point before the gap",
        )
    entry = manifest.disk(disk)
    if entry is None:
        raise _mismatch(child, wanted.point, f"that point holds no disk {disk!r}")
    if entry.identity != wanted.identity:
        raise _mismatch(child, wanted.point, f"its identity is {entry.identity}, not {wanted.identity}")
    if manifest.sequence >= child.sequence:
        raise _mismatch(child, wanted.point, f"its sequence {manifest.sequence} is not below {child.sequence}")
    if entry.data.cluster_size != child.entry.data.cluster_size:
        raise _mismatch(child, wanted.point, f"its clusters have {entry.data.cluster_size} bytes")
    return Link(wanted.point, manifest.sequence, entry)


def _mismatch(child: Link, parent: str, why: str) -> BackupError:
    return Damaged(
        f"point {child.point} does not continue point {parent}: {why}",
        hint="a manifest was swapped or is another chain's; bring the right one back from a copy of the repository",
    )


class ClusterFile(Protocol):
    """What the index asks of a data file's reader."""

    def allocated_tables(self) -> Mask:
        """One flag for each L2 table, of `cluster_size // 8` guest clusters: False where all are unallocated."""

    def entries(self, first: int, count: int) -> npt.NDArray[np.uint64]:
        """L2 entries of guest clusters."""

    def kinds(self, entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Codes: 0 unallocated, 1 zero, more: data."""


class Index:
    """
    Who holds what, over the open files of a chain (newest first).

    A link costs something only where it has L2 tables: most points of a long chain hold little of a large disk.
    """

    def __init__(self, chain: Chain, files: Sequence[ClusterFile]) -> None:
        self.chain = chain
        self._files = files
        self._limits = chain.limits
        self._per_table = chain.cluster_size // 8
        self._tables = [file.allocated_tables() for file in files]
        self._all_tables = _as_rows(self._tables)

    def resolve(self, first: int, count: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint64]]:
        """
        For each of `count` clusters from `first`: the number of the link that holds its data and the entry there.

        NOBODY where it reads as zero.  Of the link's cluster only the bytes below the link's limit count.
        """
        holders = np.full(count, NOBODY, dtype=np.int16)
        found = np.zeros(count, dtype=np.uint64)
        open_ = np.ones(count, dtype=np.bool_)
        for number, (file, limit) in enumerate(zip(self._files, self._limits, strict=True)):
            visible = min(-(-limit // self.chain.cluster_size) - first, count)
            if visible <= 0 or not open_[:visible].any():
                break
            for low, high in self._held_by(number, first, first + visible):
                here = slice(low - first, high - first)
                entries = file.entries(low, high - low)
                kinds = file.kinds(entries)
                data = open_[here] & (kinds > ZERO)
                holders[here][data] = number
                found[here][data] = entries[data]
                open_[here] &= kinds == UNALLOCATED
        return holders, found

    def holds_data(self, first: int, count: int) -> Mask:
        """For each of `count` clusters from `first`: does the chain hold data there?"""
        held = np.zeros(count, dtype=np.bool_)
        open_ = np.ones(count, dtype=np.bool_)
        tables = slice(first // self._per_table, -(-(first + count) // self._per_table))
        for number in np.flatnonzero(self._all_tables[:, tables].any(axis=1)).tolist():
            visible = min(-(-self._limits[number] // self.chain.cluster_size) - first, count)
            for low, high in self._held_by(number, first, first + max(visible, 0)):
                here = slice(low - first, high - first)
                if not open_[here].any():
                    continue
                kinds = self._files[number].kinds(self._files[number].entries(low, high - low))
                held[here] |= open_[here] & (kinds > ZERO)
                open_[here] &= kinds == UNALLOCATED
        return held

    def _held_by(self, number: int, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges of clusters in [first, end) for which a link has L2 tables; neighbouring tables are one range."""
        per = self._per_table
        skipped = first // per
        tables = self._tables[number][skipped : -(-end // per)]
        if not tables.any():
            return
        edges = np.flatnonzero(np.diff(tables, prepend=False, append=False)).reshape(-1, 2) + skipped
        for low, high in edges.tolist():
            yield max(first, low * per), min(end, high * per)


def _as_rows(masks: Sequence[Mask]) -> Mask:
    """One row for each mask, the shorter ones filled up with False: links of a chain may differ in size."""
    rows = np.zeros((len(masks), max((len(mask) for mask in masks), default=0)), dtype=np.bool_)
    for row, mask in zip(rows, masks, strict=True):
        row[: len(mask)] = mask
    return rows
