"""
The writer of a data file: guest clusters in, numbered parts of a qcow2 file out.

    threads    write(): find zeroes, compress                           without the lock
                 place: host offsets, L2 entries, refcounts             with the lock, a few numpy calls per batch
               copy into parts, pass whole parts to the sink            without the lock
    any time   completed_below(): L2 tables leave memory; refcount blocks leave as soon as they are settled
    finish()   the remaining L2 tables, L1 table, refcounts, header; part 0 last

Memory holds the parts that are not whole (about one per thread, and two for the runs), part 0, the L1 table (8 bytes
per L2 table), the L2 tables that are not completed, and the refcount blocks that are not settled.  Nothing else grows
with the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Lock

import numpy as np

from backup.model.extents import Mask, Offsets
from backup.qcow2.codec import Codec
from backup.qcow2.layout import (
    PART,
    READS_AS_ZERO,
    U8,
    U16,
    U64,
    Header,
    Image,
    frame_entries,
    pack_header,
    raw_entries,
    require_writable,
)
from backup.qcow2.parts import Parts, PartSink
from backup.qcow2.space import Refcounts, Space

_PENDING = 1
"""In the L1 table in memory: the L2 table is not written yet.  If it is not in `_live`, all its clusters are zero."""

_PROBES = 8
"""Words of a cluster that are examined first in the search for zeroes."""

_TABLES_SEARCHED = 1 << 16
"""L1 entries searched at a time; a search of a whole L1 table of 32 MiB would be repeated thousands of times."""


@dataclass(slots=True)
class _Encoded:
    """A batch after compression: the indices of raw clusters, and of packed ones with their frames; others are zero."""

    raw: list[int]
    packed: list[int]
    frames: list[bytes]


@dataclass(slots=True)
class _Copies:
    """What to copy into the file and what to clear after the lock is released.  Host offsets in bytes."""

    fills: list[tuple[int, U8]] = field(default_factory=list)
    packs: list[tuple[int, list[bytes]]] = field(default_factory=list)
    holes: list[tuple[int, int]] = field(default_factory=list)


class Writer:
    """
    Makes one data file.

    A guest cluster may be written or zeroed at most once.  A cluster that is neither is read from the backing file, or
    as zeroes if there is none.  After an exception the file is useless, and `finish` refuses it.

    Parameters
    ----------
    image : Image
        The properties of the disk.
    sink : PartSink
        Receives the parts.
    level : int or None
        None: store every cluster uncompressed, whatever level the codec has.  An image without zstd does that as well.

    Raises
    ------
    UsageError
        A qcow2 file cannot hold such an image.
    """

    def __init__(self, image: Image, sink: PartSink, *, level: int | None = 1) -> None:
        require_writable(image)
        self.image = image
        self._compress = image.zstd and level is not None
        self._parts = Parts(sink)
        self._lock = Lock()
        self._space = Space(image)
        self._refcounts = Refcounts(image)
        self._refcounts.clusters(0, 1)
        self._blocks: list[int] = []  # host offsets of the refcount blocks written so far
        self._l1 = np.zeros(image.tables, np.uint64)
        self._live: dict[int, U64] = {}  # L2 tables in memory
        self._completed = 0  # L2 tables with lower numbers are written
        self._tables_per_copy = max(1, PART // image.cluster_size)

    def write(self, first_cluster: int, data: bytearray | memoryview, codec: Codec) -> int:
        """
        Store whole consecutive guest clusters.

        Thread safe.  Compression and calls of sink.put run in the calling thread, without the lock.

        Parameters
        ----------
        first_cluster : int
            Number of the first guest cluster.
        data : bytearray or memoryview
            The clusters; the last one of the disk is padded with zeroes.  A whole part (PART bytes) that is stored raw
            goes to the sink without a copy; everything else is copied.
        codec : Codec
            The calling thread's own codec, which no other thread uses.

        Returns
        -------
        int
            Number of clusters that are all zeroes.  They are stored as zero clusters if there is a backing file, and
            not stored at all otherwise.

        Raises
        ------
        ValueError
            The data is not a number of whole clusters of the disk, or a cluster was written before or lies below the
            value of `completed_below`.
        """
        count = len(data) // self.image.cluster_size
        return self.write_scattered(np.arange(first_cluster, first_cluster + count), data, codec)

    def write_scattered(self, clusters: Offsets, data: bytearray | memoryview, codec: Codec) -> int:
        """Store the guest clusters with these numbers, in ascending order; see `write`."""
        if len(data) != len(clusters) * self.image.cluster_size:
            raise ValueError(f"{len(data)} bytes are not whole clusters, or not {len(clusters)}")
        if len(clusters) == 0:
            return 0
        content = np.frombuffer(data, np.uint8)
        batch = self._encode(content, len(clusters), codec)
        self._store(lambda: self._place(clusters, batch, content))
        return len(clusters) - len(batch.raw) - len(batch.packed)

    def copy_frames(self, clusters: Offsets, lengths: U64, runs: Sequence[U8]) -> None:
        """
        Store frames unchanged.  Thread safe; the copy runs in the calling thread, without the lock.

        Parameters
        ----------
        clusters : array
            Guest clusters, in the order of the frames.
        lengths : array
            Bytes of each frame.
        runs : list of arrays
            The frames, one directly after another, in pieces of any size.

        Raises
        ------
        ValueError
            A cluster occurs twice, was written before, or lies below the value of `completed_below`; or the image
            has no zstd.
        """
        if len(clusters) and not self.image.zstd:
            raise ValueError("frames for an image without compression")
        if len(clusters):
            self._store(lambda: self._place_copies(clusters, lengths, runs))

    def copy_raw(self, clusters: Offsets, indices: list[int], data: U8) -> None:
        """
        Store the clusters of `data` with these ascending indices as raw clusters, without examining them.

        `clusters` are their guest cluster numbers, in the order of `indices`.  See `copy_frames`.
        """
        if len(clusters):
            self._store(lambda: self._place_raw_copies(clusters, indices, data))

    def zero(self, first_cluster: int, count: int) -> None:
        """
        Record that guest clusters read as zeroes.  Thread safe; whole L2 tables cost nothing per cluster.

        Clusters over a backing file get the ZERO flag; without one, an unallocated cluster already reads as zeroes.
        """
        with self._lock:
            self._require_new(first_cluster, count)
            if self.image.backing is None or count == 0:
                return
            per = self.image.table_entries
            end = first_cluster + count
            whole_from, whole_end = -(-first_cluster // per), end // per
            if whole_from >= whole_end:
                self._set_zero(first_cluster, count)
                return
            self._set_zero(first_cluster, whole_from * per - first_cluster)
            if self._l1[whole_from:whole_end].any():
                raise ValueError(f"clusters {first_cluster} to {end} were written before")
            self._l1[whole_from:whole_end] = _PENDING
            self._set_zero(whole_end * per, end - whole_end * per)

    def completed_below(self, cluster: int) -> None:
        """
        Promise that no call will write or zero a cluster below this one, and that no such call is running.

        Whole L2 tables below the cluster are written and leave memory.  Thread safe.
        """
        end = min(cluster, self.image.clusters) // self.image.table_entries
        if cluster >= self.image.clusters:
            end = self.image.tables
        while self._completed < end:
            self._store(lambda: self._place_tables(end))

    def finish(self) -> int:
        """
        Write the remaining tables and the header; part 0 goes to the sink last.  No other call may be running.

        Returns
        -------
        int
            Size of the file in bytes, a multiple of the cluster size.
        """
        self._parts.clear(*self._space.close())
        self.completed_below(self.image.clusters)
        self._parts.clear(*self._space.close_gap())
        l1_offset = self._write_l1()
        table_offset, table_clusters = self._write_refcounts()
        size = self._space.cursor * self.image.cluster_size
        header = Header(self.image, l1_offset, table_offset, table_clusters)
        self._parts.end(size)
        self._parts.fill(0, np.frombuffer(pack_header(header), np.uint8))
        self._parts.require_all_stored()
        return size

    def _encode(self, data: U8, count: int, codec: Codec) -> _Encoded:
        """Divide a batch into zero, raw and compressed clusters."""
        size = self.image.cluster_size
        used = _used(data.reshape(count, size))
        if not self._compress:
            return _Encoded(used, [], [])
        raw, packed, frames = [], [], []
        view = data.data
        for index in used:
            frame = codec.encode(view[index * size : (index + 1) * size])
            if frame is None:
                raw.append(index)
            else:
                packed.append(index)
                frames.append(frame)
        return _Encoded(raw, packed, frames)

    def _store(self, place: Callable[[], _Copies]) -> None:
        """Place data under the lock, then copy it into the parts of the file without the lock."""
        with self._lock:
            copies = place()
            self._settle(copies)
        for offset, data in copies.fills:
            self._parts.fill(offset, data)
        for offset, frames in copies.packs:
            # join() copies the frames once more, but is ten times faster than a call for each frame.
            self._parts.fill(offset, np.frombuffer(b"".join(frames), np.uint8))
        for offset, length in copies.holes:
            self._parts.clear(offset, length)

    def _settle(self, copies: _Copies) -> None:
        """Write the refcount blocks that cannot change any more."""
        copies.holes.extend(self._space.close_stale())
        while (block := self._refcounts.take_settled(self._space.settled)) is not None:
            first, _ = self._space.tables(1)
            self._refcounts.clusters(first, 1)
            self._blocks.append(first * self.image.cluster_size)
            copies.fills.append((self._blocks[-1], _big_endian(block)))

    def _place(self, clusters: Offsets, batch: _Encoded, data: U8) -> _Copies:
        """Assign host clusters, L2 entries and refcounts to a batch."""
        self._require_new(int(clusters[0]), int(clusters[-1]) + 1 - int(clusters[0]))
        copies = _Copies()
        unstored = READS_AS_ZERO if self.image.backing is not None else 0
        entries = np.full(len(clusters), unstored, np.uint64)
        if batch.packed:
            entries[batch.packed] = self._place_frames(batch.frames, copies)
        if batch.raw:
            entries[batch.raw] = self._place_raw(batch.raw, data, copies)
        if entries.any():
            self._set_entries(clusters, entries)
        return copies

    def _place_copies(self, clusters: Offsets, lengths: U64, runs: Sequence[U8]) -> _Copies:
        """Assign host offsets, L2 entries and refcounts to frames that are stored unchanged."""
        copies = _Copies()
        packing = self._space.frames(lengths)
        copies.holes.append(packing.hole)
        places = []
        for frames in (slice(0, packing.split), slice(packing.split, len(lengths))):
            offsets = packing.offsets[frames]
            if len(offsets):
                self._refcounts.frames(offsets, lengths[frames])
                places.append((int(offsets[0]), int(lengths[frames].sum())))
        copies.fills.extend(_distribute(runs, places))
        self._set_any_order(clusters, frame_entries(packing.offsets, lengths, self.image.cluster_size))
        return copies

    def _place_raw_copies(self, clusters: Offsets, indices: list[int], data: U8) -> _Copies:
        copies = _Copies()
        self._set_any_order(clusters, self._place_raw(indices, data, copies))
        return copies

    def _set_any_order(self, clusters: Offsets, entries: U64) -> None:
        order = np.argsort(clusters)
        clusters = clusters[order]
        if (clusters[1:] == clusters[:-1]).any():
            raise ValueError(f"of clusters {clusters[0]} to {clusters[-1]}, some are written twice")
        self._require_new(int(clusters[0]), int(clusters[-1]) + 1 - int(clusters[0]))
        self._set_entries(clusters, entries[order])

    def _place_frames(self, frames: list[bytes], copies: _Copies) -> U64:
        lengths = np.fromiter(map(len, frames), np.uint64, len(frames))
        packing = self._space.frames(lengths)
        copies.holes.append(packing.hole)
        for part in (slice(0, packing.split), slice(packing.split, len(frames))):
            offsets = packing.offsets[part]
            if len(offsets):
                self._refcounts.frames(offsets, lengths[part])
                copies.packs.append((int(offsets[0]), frames[part]))
        return frame_entries(packing.offsets, lengths, self.image.cluster_size)

    def _place_raw(self, raw: list[int], data: U8, copies: _Copies) -> U64:
        size = self.image.cluster_size
        if len(raw) * size == PART:
            first, hole = self._space.part()
            copies.holes.append(hole)
        else:
            first = self._space.clusters(len(raw))
        self._refcounts.clusters(first, len(raw))
        host = first * size
        for index, count in _runs(raw):
            copies.fills.append((host, data[index * size : (index + count) * size]))
            host += count * size
        return raw_entries(np.arange(first, first + len(raw), dtype=np.uint64) * np.uint64(size))

    def _require_new(self, first: int, count: int) -> None:
        if first < 0 or first + count > self.image.clusters:
            raise ValueError(f"clusters {first} to {first + count} of a disk that has {self.image.clusters}")
        if count and first // self.image.table_entries < self._completed:
            raise ValueError(f"cluster {first} is below the value of completed_below")

    def _set_entries(self, clusters: Offsets, entries: U64) -> None:
        """Set L2 entries of guest clusters, ascending.  A second write would leak the clusters of the first."""
        tables, within = np.divmod(clusters, self.image.table_entries)
        edges = np.flatnonzero(np.diff(tables, prepend=-1, append=-1)).tolist()
        for low, high in pairwise(edges):
            index = int(tables[low])
            table = self._live.get(index)
            if table is None and not self._l1[index]:
                table = self._live[index] = np.zeros(self.image.table_entries, np.uint64)
                self._l1[index] = _PENDING
            if table is None or table[within[low:high]].any():
                raise ValueError(f"clusters {clusters[low]} to {clusters[high - 1]} were written before")
            table[within[low:high]] = entries[low:high]

    def _set_zero(self, first: int, count: int) -> None:
        self._set_entries(np.arange(first, first + count), np.full(count, READS_AS_ZERO, np.uint64))

    def _place_tables(self, end: int) -> _Copies:
        """Write L2 tables with numbers below `end`, as many as one run of clusters holds, and drop them from memory."""
        start = self._completed
        end = min(end, start + _TABLES_SEARCHED)
        pending = np.flatnonzero(self._l1[start:end] == _PENDING)[: self._tables_per_copy] + start
        if not len(pending):
            self._completed = max(start, end)
            return _Copies()
        first, count = self._space.tables(len(pending))
        pending = pending[:count]
        self._refcounts.clusters(first, count)
        size = self.image.cluster_size
        offsets = np.arange(first, first + count, dtype=np.uint64) * np.uint64(size)
        self._l1[pending] = raw_entries(offsets)
        content = np.full((count, self.image.table_entries), READS_AS_ZERO, ">u8")
        for row, index in enumerate(pending.tolist()):
            table = self._live.pop(index, None)
            if table is not None:
                content[row] = table
        self._completed = int(pending[-1]) + 1
        return _Copies(fills=[(first * size, content.reshape(-1).view(np.uint8))])

    def _write_l1(self) -> int:
        """Write the L1 table; return its offset in bytes."""
        return self._write_table(self._l1)[0]

    def _write_table(self, entries: U64) -> tuple[int, int]:
        """Write a table of whole consecutive clusters; return (offset in bytes, clusters)."""
        size = self.image.cluster_size
        clusters = max(1, -(-len(entries) * 8 // size))
        first = self._space.clusters(clusters)
        self._refcounts.clusters(first, clusters)
        content = np.zeros(clusters * self.image.table_entries, np.uint64)
        content[: len(entries)] = entries
        self._parts.fill(first * size, _big_endian(content))
        return first * size, clusters

    def _write_refcounts(self) -> tuple[int, int]:
        """Write the last refcount blocks and the refcount table, which count themselves; return (offset, clusters)."""
        size = self.image.cluster_size
        blocks = count_blocks(self.image, self._space.cursor, self._refcounts.done, self._space.spare()[1])
        while len(self._blocks) < blocks:
            first, count = self._space.tables(blocks - len(self._blocks))
            self._refcounts.clusters(first, count)
            self._blocks.extend(range(first * size, (first + count) * size, size))
        spare_from, spare = self._space.spare()
        self._parts.clear(spare_from * size, spare * size)
        table = self._write_table(np.array(self._blocks, np.uint64))
        for offset in self._blocks[self._refcounts.done :]:
            self._parts.fill(offset, _big_endian(self._refcounts.take()))
        return table


def count_blocks(image: Image, clusters: int, written: int, spare: int) -> int:
    """
    Return how many refcount blocks a file needs that has `clusters` host clusters before its last tables are added.

    Only refcount blocks and the refcount table are added to these clusters, and they must be counted as well.
    `written` blocks exist already; `spare` of the others find room inside the file.
    """
    blocks = written
    while True:
        table = max(1, -(-blocks * 8 // image.cluster_size))
        total = clusters + max(0, blocks - written - spare) + table
        needed = max(written, -(-total // image.block_entries))
        if needed <= blocks:
            return blocks
        blocks = needed


def _used(clusters: U8) -> list[int]:
    """
    Return the indices of rows that are not all zeroes.

    A few words of each row decide nearly all of them; only the remaining rows are read completely.
    """
    words = clusters.view(np.uint64)
    used: Mask = np.any(words[:, :: max(1, words.shape[1] // _PROBES)], axis=1, keepdims=True)[:, 0]
    for index in np.flatnonzero(~used).tolist():
        used[index] = words[index].any()
    return np.flatnonzero(used).tolist()


def _distribute(runs: Sequence[U8], places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, U8]]:
    """Yield which bytes of `runs` go to which offset; `places` (offset, length) take all bytes of `runs` in order."""
    places_left = list(places)
    for run in runs:
        done = 0
        while done < len(run):
            offset, room = places_left[0]
            take = min(room, len(run) - done)
            yield offset, run[done : done + take]
            done += take
            places_left[0] = offset + take, room - take
            if take == room:
                del places_left[0]


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Join ascending numbers into runs; yield (first, count)."""
    first = count = 0
    for index in indices:
        if count and index == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = index, 1
    if count:
        yield first, count


def _big_endian(entries: U64 | U16) -> U8:
    """Return the bytes of a table as stored on disk."""
    return entries.astype(entries.dtype.newbyteorder(">")).view(np.uint8)
