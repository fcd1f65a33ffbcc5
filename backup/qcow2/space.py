"""
The layout of a file under construction: where the next bytes go, and how many references each host cluster has.

Pure arithmetic: no bytes, no threads, no sink.  The Writer calls everything here under its lock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backup.errors import Failed
from backup.qcow2.layout import PART, U16, U64, Image

RUN_GROWTH = 16
"""A new run of packed frames gets up to 1/16 of all bytes packed before, so that small files stay small."""

RUN_CLUSTERS = 64
"""A run grows to at most this many clusters (or a part, if larger); each run wastes half a frame at its end."""

STALE_BYTES = 256 * PART
"""A run or gap this far behind the cursor is closed, because it keeps its refcount block and its part in memory."""

ALIGN_FROM = 16 * PART
"""In files of this size and more, whole parts of raw clusters are aligned; the gaps would make small files larger."""


@dataclass(frozen=True, slots=True)
class Packing:
    """
    Where a batch of frames goes: the first `split` frames into the open run, all others into a new run.

    `offsets` are host offsets in bytes, ascending within each run.  `hole` is the unused end of the first run, as
    (offset, length) in bytes; the length is 0 if there is none.
    """

    offsets: U64
    split: int
    hole: tuple[int, int]


class Space:
    """
    Allocates host clusters in ascending order, and bytes for frames inside runs of clusters.

        |header|frames......|raw raw|L2|frames..............(open)|raw raw raw|
                                        ^packed_at           ^run_end          ^cursor

    The open run grows in place as long as it is the last thing in the file.  Otherwise the run is filled, and then a
    new run begins.

    A part that consists of raw clusters begins at the boundary of a part, so that it needs no copy.  The gap before
    the part is used for smaller things, above all for tables.
    """

    def __init__(self, image: Image) -> None:
        self._size = image.cluster_size
        self._limit = image.max_host_clusters
        self._max_run = max(PART // self._size, RUN_CLUSTERS)
        self.cursor = 1  # cluster 0 is the header
        self._packed_at = self._run_end = 0  # bytes; no room is left if they are equal
        self._packed = 0  # bytes of all frames so far
        self._spare_from = self._spare_end = 0  # free clusters of the last run, for tables, after the run is closed
        self._gap_from = self._gap_end = 0  # free clusters before an aligned part

    @property
    def settled(self) -> int:
        """Host clusters below this number get no further references."""
        open_ends = [self.cursor]
        if self._packed_at < self._run_end:
            open_ends.append(self._packed_at // self._size)
        if self._spare_from < self._spare_end:
            open_ends.append(self._spare_from)
        if self._gap_from < self._gap_end:
            open_ends.append(self._gap_from)
        return min(open_ends)

    def clusters(self, count: int) -> int:
        """
        Reserve `count` consecutive clusters and return the first.

        Raises
        ------
        Failed
            The file would become larger than qcow2 can address with this cluster size.
        """
        if count <= self._gap_end - self._gap_from:
            first, self._gap_from = self._gap_from, self._gap_from + count
            return first
        return self._at_end(count)

    def part(self) -> tuple[int, tuple[int, int]]:
        """
        Reserve the clusters of a whole part, aligned if the file is large enough.

        Returns the first cluster, and the hole, (offset, length) in bytes, of a gap that a new gap replaces.
        """
        per = PART // self._size
        missing = -self.cursor % per
        if missing == 0 or self.cursor * self._size < ALIGN_FROM:
            return self._at_end(per), (0, 0)
        hole = self.close_gap()
        self._gap_from = self._at_end(missing)
        self._gap_end = self._gap_from + missing
        return self._at_end(per), hole

    def close_gap(self) -> tuple[int, int]:
        """Stop using the gap.  Returns the hole that remains, (offset, length) in bytes; length 0 if there is none."""
        hole = (self._gap_from * self._size, (self._gap_end - self._gap_from) * self._size)
        self._gap_from = self._gap_end
        return hole

    def _at_end(self, count: int) -> int:
        first, self.cursor = self.cursor, self.cursor + count
        if self.cursor > self._limit:
            raise Failed(
                f"a data file with clusters of {self._size} bytes cannot be larger than "
                f"{self._limit * self._size} bytes",
                hint="set a larger cluster_size and make a full backup: `pybackup full`",
            )
        return first

    def tables(self, most: int) -> tuple[int, int]:
        """Reserve 1 to `most` consecutive clusters for tables, first from the closed run; return (first, count)."""
        if self._spare_from < self._spare_end:
            first, count = self._spare_from, min(most, self._spare_end - self._spare_from)
            self._spare_from += count
            return first, count
        count = min(most, self._gap_end - self._gap_from) or most
        return self.clusters(count), count

    def frames(self, lengths: U64) -> Packing:
        """Reserve bytes for frames of these lengths (bytes each, at least one frame)."""
        ends = np.cumsum(lengths, dtype=np.uint64)  # explicit: the stubs of numpy 2.5 expect a signed result
        starts = ends - lengths
        total = int(ends[-1])
        self._packed += total
        if self._run_end == self.cursor * self._size:  # the run is the last thing in the file
            self._grow(total)
        room = self._run_end - self._packed_at
        split = int(np.searchsorted(ends, np.uint64(room), side="right"))
        offsets = starts + np.uint64(self._packed_at)
        if split == len(lengths):
            self._packed_at += total
            return Packing(offsets, split, (0, 0))
        fitted = int(starts[split])
        hole = (self._packed_at + fitted, room - fitted)
        self._open_run(total - fitted)
        offsets[split:] = starts[split:] + np.uint64(self._packed_at - fitted)
        self._packed_at += total - fitted
        return Packing(offsets, split, hole)

    def _grow(self, total: int) -> None:
        missing = total - (self._run_end - self._packed_at)
        if missing > 0:
            clusters = -(-missing // self._size)
            self._at_end(clusters)
            self._run_end += clusters * self._size

    def _open_run(self, needed: int) -> None:
        ahead = min(self._packed // RUN_GROWTH // self._size, self._max_run)
        clusters = max(-(-needed // self._size), ahead)
        self._packed_at = self._at_end(clusters) * self._size
        self._run_end = self._packed_at + clusters * self._size

    def close_stale(self) -> list[tuple[int, int]]:
        """Close a run and a gap that are far behind the cursor.  Returns the holes, (offset, length) in bytes."""
        holes = []
        end = self.cursor * self._size
        if self._packed_at < self._run_end and end - self._run_end >= STALE_BYTES:
            holes.append((self._packed_at, self._run_end - self._packed_at))
            self._packed_at = self._run_end
        if self._gap_from < self._gap_end and end - self._gap_end * self._size >= STALE_BYTES:
            holes.append(self.close_gap())
        return holes

    def close(self) -> tuple[int, int]:
        """
        Close the last run.  Its free whole clusters go to `tables`, or are dropped if they are the end of the file.

        Returns the hole, (offset, length) in bytes, up to the next cluster boundary.
        """
        first_free = -(-self._packed_at // self._size)
        hole = (self._packed_at, first_free * self._size - self._packed_at)
        if self._run_end == self.cursor * self._size:
            self.cursor = first_free
        else:
            self._spare_from, self._spare_end = first_free, self._run_end // self._size
        self._packed_at = self._run_end
        return hole

    def spare(self) -> tuple[int, int]:
        """Return the clusters of the closed run that `tables` can still allocate: (first, count)."""
        return self._spare_from, self._spare_end - self._spare_from


class Refcounts:
    """
    The refcounts of all host clusters, in blocks of `block_entries`.  A block leaves memory as soon as it is settled.

    16 bits are enough for a refcount: the smallest frame of a 2 MiB cluster, one repeated byte, takes 77 bytes (16 RLE
    blocks), so that at most 27,237 frames touch one host cluster.
    """

    def __init__(self, image: Image) -> None:
        self._size = image.cluster_size
        self._entries = image.block_entries
        self._blocks: dict[int, U16] = {}
        self.done = 0
        """Number of blocks taken out so far."""

    def _add(self, first: int, counts: npt.NDArray[np.int64]) -> None:
        """Add counts[i] to the refcount of host cluster first + i."""
        done = 0
        while done < len(counts):
            index, at = divmod(first + done, self._entries)
            take = min(self._entries - at, len(counts) - done)
            block = self._blocks.get(index)
            if block is None:
                block = self._blocks[index] = np.zeros(self._entries, np.uint16)
            block[at : at + take] += counts[done : done + take].astype(np.uint16)
            done += take

    def clusters(self, first: int, count: int) -> None:
        """Count one reference to each of `count` consecutive clusters."""
        self._add(first, np.ones(count, np.int64))

    def frames(self, offsets: U64, lengths: U64) -> None:
        """
        Count the references of frames at host offsets (bytes) that lie close together.

        A frame refers to the clusters that its 512-byte sectors touch.  These are one or two clusters, since a frame is
        smaller than a cluster.
        """
        if len(offsets):
            size = np.uint64(self._size)
            first, last = offsets // size, (offsets + lengths - np.uint64(1)) // size
            touched = np.concatenate((first, last[last != first]))
            lowest = int(touched.min())
            self._add(lowest, np.bincount((touched - np.uint64(lowest)).astype(np.int64)))

    def take_settled(self, settled: int) -> U16 | None:
        """Take out the next block if all its clusters lie below `settled`; otherwise return None."""
        if (self.done + 1) * self._entries > settled:
            return None
        return self.take()

    def take(self) -> U16:
        """Take out the next block, settled or not."""
        block = self._blocks.pop(self.done, None)
        self.done += 1
        return np.zeros(self._entries, np.uint16) if block is None else block
