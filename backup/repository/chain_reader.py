"""
What a chain says that a disk holds, cluster by cluster, and where a disk differs from it.

    copier, reading the disk -> Rescanned -> the chain's clusters beside the disk's -> only what differs is stored
                             -> Differences -> ranges of what differs

The chain is read beside the disk, batch by batch in the disk's order, so that nothing of either is kept.  `checked`
holds every block of a data file against its digest before a byte of it is used; `glanced` reads few clusters without
that: a frame has a checksum of its own, and a cluster that equals the disk's needs no other proof.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from backup.engine import copier
from backup.engine.copier import Sink
from backup.model.chain import Chain
from backup.model.extents import Mask, Offsets, distinct
from backup.nbd.export import Export
from backup.pages import pages
from backup.planning.plan import Plan, cut_cluster
from backup.qcow2 import COMPRESSED, PART, Codec, Reader
from backup.repository import data_file
from backup.repository.checked_file import CACHED
from backup.repository.cluster_index import NOBODY, Found, Index

_MOST_CACHED = 64
"""Checked blocks (4 MiB each) kept at most: of a long chain one for each file that a batch reads from."""
_WINDOWS = 8
"""Windows whose holders are remembered: each worker is in another one."""
_SECTOR = 512
"""Bytes: differences are told as exactly as this."""
MOST_RANGES = 100_000
"""Ranges of differences that are remembered; beyond that they are only counted."""


class StoredFile(Protocol):
    """A data file of a chain, opened."""

    reader: Reader

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length)."""


class Content:
    """
    The clusters of a disk of `size` bytes, as its chain has them.  Safe to use from several threads.

    Parameters
    ----------
    size : int
        Exact size of the disk now: from there on clusters read as zeroes, as from the end of any point.
    files : sequence of StoredFile
        Of the chain's links, newest first.
    chosen : Offsets or None
        The only clusters that will be asked for, ascending; None: any.
    """

    def __init__(self, chain: Chain, files: Sequence[StoredFile], size: int, chosen: Offsets | None = None) -> None:
        self.index = Index(chain, [file.reader for file in files])
        self.cluster_size = chain.cluster_size
        self.size = size
        self._files = files
        self._limits = [min(limit, size) for limit in chain.limits]
        self._who = (
            _InWindows(self.index, -(-size // self.cluster_size)) if chosen is None else _Chosen(self.index, chosen)
        )

    def read(self, clusters: Offsets, room: memoryview, codec: Codec) -> None:
        """
        Fill `room` with the clusters of these numbers, ascending.

        Raises
        ------
        NotFound, Damaged
            The chain is not what was written.
        """
        size = self.cluster_size
        holders, entries = self._who.holders(clusters)
        reader = self._files[0].reader
        offsets, lengths = reader.spans(entries)
        columns = zip(
            clusters.tolist(),
            holders.tolist(),
            offsets.tolist(),
            lengths.tolist(),
            (reader.kinds(entries) == COMPRESSED).tolist(),
            strict=True,
        )
        for place, (cluster, holder, offset, length, packed) in enumerate(columns):
            with room[place * size : (place + 1) * size] as here:
                visible = 0 if holder == NOBODY else self._limits[holder] - cluster * size
                if visible > 0:
                    stored = self._files[holder].read_at(offset, length)
                    if packed:
                        codec.decode_into(memoryview(stored), here)
                    else:
                        here[:] = stored
                if visible < size:
                    here[max(visible, 0) :] = bytes(size - max(visible, 0))


class _InWindows:
    """Who holds what, looked up for all clusters of an L2 table together, in the disk's order.  Thread-safe."""

    def __init__(self, index: Index, clusters: int) -> None:
        self._index = index
        self._clusters = clusters
        self._window = index.chain.cluster_size // 8
        self._resolved: OrderedDict[int, Found] = OrderedDict()
        self._lock = threading.Lock()

    def holders(self, clusters: Offsets) -> Found:
        """For each cluster the number of the link that holds its data, or NOBODY, and the entry there."""
        holders = np.empty(len(clusters), np.int16)
        entries = np.empty(len(clusters), np.uint64)
        windows = clusters // self._window
        for number in distinct(windows).tolist():
            here = windows == number
            found = self._resolve(number)
            at = clusters[here] - number * self._window
            holders[here], entries[here] = found[0][at], found[1][at]
        return holders, entries

    def _resolve(self, number: int) -> Found:
        """Holders and entries of a window."""
        with self._lock:
            found = self._resolved.get(number)
            if found is None:
                first = number * self._window
                found = self._index.resolve(first, min(self._window, self._clusters - first))
                self._resolved[number] = found
                while len(self._resolved) > _WINDOWS:
                    self._resolved.popitem(last=False)
        return found


class _Chosen:
    """Who holds what, looked up at once for the few clusters that will be asked for.  Thread-safe."""

    def __init__(self, index: Index, chosen: Offsets) -> None:
        self._chosen = chosen
        self._found = index.resolve_some(chosen)

    def holders(self, clusters: Offsets) -> Found:
        """As `_InWindows`."""
        at = np.searchsorted(self._chosen, clusters)
        return self._found[0][at], self._found[1][at]


def kept_blocks(chain: Chain) -> int:
    """Checked blocks to be kept while a chain is read in the disk's order."""
    return min(CACHED + len(chain.links), _MOST_CACHED)


@contextmanager
def checked(folder: Path, chain: Chain, size: int) -> Iterator[Content]:
    """
    A chain's content, to be read in the disk's order, with every block held against its digest first.

    Raises
    ------
    NotFound, Damaged
        A file of the chain is not what was written.
    """
    with data_file.opened(folder, chain, kept_blocks(chain)) as files:
        yield Content(chain, files, size)


@contextmanager
def glanced(folder: Path, chain: Chain, size: int, clusters: Offsets) -> Iterator[Content]:
    """A few clusters (ascending) of a chain's content, for a look: of a difference `checked` must be asked."""
    with data_file.peeked_files(folder, chain) as files:
        yield Content(chain, files, size, clusters)


def compare(
    export: Export, planned: Plan, held: Content, settings: copier.Settings, progress: Callable[[int], None]
) -> Differences:
    """
    Read what is planned of the disk and hold it against the chain.

    `progress` is called in this thread with the bytes done so far.

    Raises
    ------
    NotFound, Damaged
        The chain is not what was written.
    SourceError
        The disk cannot be read.
    """
    found = Differences(held)
    settings = settings.within(export.max_in_flight)
    with export.lanes(settings.connections) as lanes:
        copier.copy(
            planned,
            lanes,
            found,
            settings,
            max_request=export.max_request,
            smallest_request=export.smallest_request,
            progress=progress,
        )
    return found


class _Comparison:
    """The disk's clusters beside the chain's; each thread has its own memory."""

    def __init__(self, content: Content) -> None:
        self.content = content
        self._hands = threading.local()

    def beside(self, clusters: Offsets, data: memoryview) -> Mask:
        """Which 8 bytes differ, a row for each cluster."""
        if not hasattr(self._hands, "codec"):
            self._hands.codec = Codec(self.content.cluster_size, None)
            self._hands.room = pages(len(data))
        if len(self._hands.room) < len(data):
            self._hands.room = pages(len(data))
        with self._hands.room[: len(data)] as room:
            self.content.read(clusters, room, self._hands.codec)
            differ: Mask = np.frombuffer(data, np.uint64) != np.frombuffer(room, np.uint64)
        return differ.reshape(len(clusters), -1)


class Rescanned:
    """A sink (`copier.Sink`) that hands on what differs from the chain, and counts it."""

    batch = PART

    def __init__(self, content: Content, sink: Sink) -> None:
        self._comparison = _Comparison(content)
        self._sink = sink
        self._always = cut_cluster(content.size, content.index.chain.size, content.cluster_size)
        self._lock = threading.Lock()
        self.differing = 0
        """Bytes, in whole clusters, clipped at the disk's size."""

    def write(self, clusters: Offsets, data: memoryview) -> int:
        """Hand on the clusters that differ; returns how many of these are all zeroes."""
        differ = self._comparison.beside(clusters, data).any(axis=1)
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
        """Hand on: a rescan's plan has zeroes only where the chain holds data."""
        self._count(first_cluster + count, count)
        self._sink.zero(first_cluster, count)

    def completed_below(self, cluster: int) -> None:
        """Hand on."""
        self._sink.completed_below(cluster)

    def _count(self, end: int, count: int) -> None:
        content = self._comparison.content
        beyond = max(0, end * content.cluster_size - content.size)
        with self._lock:
            self.differing += count * content.cluster_size - beyond


class Differences:
    """A sink (`copier.Sink`) that stores nothing and collects where the disk differs from the chain."""

    batch = PART

    def __init__(self, content: Content) -> None:
        self._comparison = _Comparison(content)
        self._lock = threading.Lock()
        self._found: list[tuple[Offsets, Offsets]] = []
        self._ranges = 0
        self.bytes = 0
        """That differ, in whole sectors, clipped at the disk's size."""

    @property
    def complete(self) -> bool:
        """Are all differences in `ranges`?"""
        return self._ranges <= MOST_RANGES

    def write(self, clusters: Offsets, data: memoryview) -> int:
        """Compare."""
        differ = self._comparison.beside(clusters, data)
        if differ.any():
            self._add(*_ranges(clusters, differ, self._comparison.content))
        return 0

    def zero(self, first_cluster: int, count: int) -> None:
        """Never: what is compared is read."""
        raise ValueError(f"clusters {first_cluster} to {first_cluster + count} were planned as zeroes")

    def completed_below(self, cluster: int) -> None:
        """Nothing to do."""

    def ranges(self) -> list[tuple[int, int]]:
        """Start and end (bytes) of what differs, ascending, merged; the first that were found, of very many."""
        if not self._found:
            return []
        starts = np.concatenate([found[0] for found in self._found])
        ends = np.concatenate([found[1] for found in self._found])
        order = np.argsort(starts)
        starts, ends = starts[order], ends[order]
        apart = starts[1:] != ends[:-1]
        lows, highs = starts[np.append(True, apart)], ends[np.append(apart, True)]
        return list(zip(lows.tolist(), highs.tolist(), strict=True))

    def clusters(self) -> Offsets:
        """Numbers of the clusters that differ, ascending."""
        size = self._comparison.content.cluster_size
        spans = [np.arange(low // size, -(-high // size)) for low, high in self.ranges()]
        return distinct(np.concatenate(spans)) if spans else np.empty(0, np.int64)

    def _add(self, starts: Offsets, ends: Offsets) -> None:
        with self._lock:
            self.bytes += int((ends - starts).sum())
            if self.complete:
                self._found.append((starts, ends))
            self._ranges += len(starts)


def _ranges(clusters: Offsets, differ: Mask, content: Content) -> tuple[Offsets, Offsets]:
    """Starts and ends in bytes of the sectors that differ, neighbours merged."""
    per = content.cluster_size // _SECTOR
    sectors = np.flatnonzero(differ.reshape(len(clusters) * per, -1).any(axis=1))
    offsets = clusters[sectors // per] * content.cluster_size + sectors % per * _SECTOR
    apart = np.flatnonzero(np.diff(offsets) != _SECTOR)
    starts = offsets[np.append(0, apart + 1)]
    ends = offsets[np.append(apart, len(offsets) - 1)] + _SECTOR
    return starts, np.minimum(ends, content.size)
