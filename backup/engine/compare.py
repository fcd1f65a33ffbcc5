"""Compare a disk with the content of its chain: to store what differs (a rescan), or to report it (an audit)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from backup.engine import copier
from backup.engine.copier import Sink
from backup.engine.copy_settings import CopySettings
from backup.model.extents import Mask, Offsets, distinct
from backup.model.open_disk import OpenDisk
from backup.planning.plan import Plan, cut_cluster
from backup.qcow2 import PART, Codec
from backup.repository.chain_reader import ChainContent
from backup.runtime.direct_io import pages

_SECTOR = 512
"""Bytes; differences are reported in whole sectors."""
MOST_RANGES = 100_000
"""The largest number of differing ranges that are kept; further ranges are only counted."""


def compare(
    disk: OpenDisk, planned: Plan, content: ChainContent, settings: CopySettings, progress: Callable[[int], None]
) -> Differences:
    """
    Read what is planned of the disk and compare it with the chain's content.

    `progress` is called in this thread with the number of bytes finished.

    Raises
    ------
    NotFound, Damaged
        A file of the chain is missing or damaged.
    SourceError
        The disk cannot be read.
    """
    differences = Differences(content)
    copier.copy_disk(planned, disk, differences, settings, progress)
    return differences


class _Comparison:
    """Compares clusters of the disk with those of the chain; each thread has its own memory."""

    def __init__(self, content: ChainContent) -> None:
        self.content = content
        self._local = threading.local()

    def differing_words(self, clusters: Offsets, data: memoryview) -> Mask:
        """Return which 8-byte words differ, as an array with a row for each cluster."""
        if not hasattr(self._local, "codec"):
            self._local.codec = Codec(self.content.cluster_size, None)
            self._local.room = pages(len(data))
        if len(self._local.room) < len(data):
            self._local.room = pages(len(data))
        with self._local.room[: len(data)] as room:
            self.content.read(clusters, room, self._local.codec)
            differ: Mask = np.frombuffer(data, np.uint64) != np.frombuffer(room, np.uint64)
        return differ.reshape(len(clusters), -1)


class Rescanned:
    """A sink (`copier.Sink`) that passes clusters on to another sink if they differ from the chain, and counts them."""

    batch = PART

    def __init__(self, content: ChainContent, sink: Sink) -> None:
        self._comparison = _Comparison(content)
        self._sink = sink
        self._always = cut_cluster(content.size, content.index.chain.size, content.cluster_size)
        self._lock = threading.Lock()
        self.differing = 0
        """Bytes of the clusters that differ; the last cluster counts only up to the disk's end."""

    def write(self, clusters: Offsets, data: memoryview) -> int:
        """Pass on the clusters that differ; return how many of these are all zeroes."""
        differ = self._comparison.differing_words(clusters, data).any(axis=1)
        numbers = clusters[differ]
        if len(numbers):
            self._count(int(numbers[-1]) + 1, len(numbers))
        stored = differ if self._always is None else differ | (clusters == self._always)
        if not stored.any():
            return 0
        if stored.all():
            return self._sink.write(clusters, data)
        rows = np.frombuffer(data, np.uint8).reshape(len(clusters), -1)[stored]
        return self._sink.write(clusters[stored], rows.reshape(-1).data)

    def zero(self, first_cluster: int, count: int) -> None:
        """Count the zeroes as different and pass them on: a rescan plans zeroes only where the chain holds data."""
        self._count(first_cluster + count, count)
        self._sink.zero(first_cluster, count)

    def completed_below(self, cluster: int) -> None:
        """Pass the call on to the other sink."""
        self._sink.completed_below(cluster)

    def _count(self, end: int, count: int) -> None:
        content = self._comparison.content
        beyond = max(0, end * content.cluster_size - content.size)
        with self._lock:
            self.differing += count * content.cluster_size - beyond


class Differences:
    """A sink (`copier.Sink`) that stores nothing and collects the ranges in which the disk differs from the chain."""

    batch = PART

    def __init__(self, content: ChainContent) -> None:
        self._comparison = _Comparison(content)
        self._lock = threading.Lock()
        self._kept: list[tuple[Offsets, Offsets]] = []
        self._ranges = 0
        self.bytes = 0
        """Bytes that differ, in whole sectors; the last sector counts only up to the disk's end."""

    @property
    def complete(self) -> bool:
        """Whether `ranges` contains all differences."""
        return self._ranges <= MOST_RANGES

    def write(self, clusters: Offsets, data: memoryview) -> int:
        """Compare clusters with the chain; return 0, since nothing is stored."""
        differ = self._comparison.differing_words(clusters, data)
        if differ.any():
            self._add(*_ranges(clusters, differ, self._comparison.content))
        return 0

    def zero(self, first_cluster: int, count: int) -> None:
        """Raise ValueError, since a comparison plans no zeroes: it reads everything."""
        raise ValueError(f"clusters {first_cluster} to {first_cluster + count} were planned as zeroes")

    def completed_below(self, cluster: int) -> None:
        """Do nothing."""

    def ranges(self) -> list[tuple[int, int]]:
        """
        Return start and end (bytes) of the ranges that differ, ascending and merged; incomplete if there are too many.
        """
        if not self._kept:
            return []
        starts = np.concatenate([starts for starts, _ in self._kept])
        ends = np.concatenate([ends for _, ends in self._kept])
        order = np.argsort(starts)
        starts, ends = starts[order], ends[order]
        apart = starts[1:] != ends[:-1]
        lows, highs = starts[np.append(True, apart)], ends[np.append(apart, True)]
        return list(zip(lows.tolist(), highs.tolist(), strict=True))

    def clusters(self) -> Offsets:
        """Return the numbers of the clusters that differ, ascending."""
        size = self._comparison.content.cluster_size
        spans = [np.arange(low // size, -(-high // size)) for low, high in self.ranges()]
        return distinct(np.concatenate(spans)) if spans else np.empty(0, np.int64)

    def _add(self, starts: Offsets, ends: Offsets) -> None:
        with self._lock:
            self.bytes += int((ends - starts).sum())
            if self.complete:
                self._kept.append((starts, ends))
            self._ranges += len(starts)


def _ranges(clusters: Offsets, differ: Mask, content: ChainContent) -> tuple[Offsets, Offsets]:
    """Return starts and ends (bytes) of the sectors that differ; neighbours are merged."""
    per = content.cluster_size // _SECTOR
    sectors = np.flatnonzero(differ.reshape(len(clusters) * per, -1).any(axis=1))
    offsets = clusters[sectors // per] * content.cluster_size + sectors % per * _SECTOR
    apart = np.flatnonzero(np.diff(offsets) != _SECTOR)
    starts = offsets[np.append(0, apart + 1)]
    ends = offsets[np.append(apart, len(offsets) - 1)] + _SECTOR
    return starts, np.minimum(ends, content.size)
