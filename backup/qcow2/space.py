"""
Where things go in a file under construction, and how often each host cluster is referred to.

Values and arithmetic only: no bytes, no threads, no sink.  The Writer calls all of it under its lock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backup.errors import Failed
from backup.qcow2.layout import PART, U16, U64, Image

RUN_GROWTH = 16
"""A new run of packed frames gets up to 1/16 of all that was packed before: small files stay small."""

RUN_CLUSTERS = 64
"""... and no more than this many clusters (a part where that is more): the end of each run is lost, half a frame."""

STALE_BYTES = 256 * PART
"""A run or gap this far behind the cursor is closed; its refcount block and its part could not leave memory."""

ALIGN_FROM = 16 * PART
"""From this file size on, whole parts of raw clusters begin on a part; before, the gap would make small files large."""


@dataclass(frozen=True, slots=True)
class Packing:
    """
    Where a batch of frames goes: the first `split` of them into the run that was open, the others into a new one.

    `offsets` are host bytes, ascending within each of the two.  `hole` is (offset, length) in bytes of what the
    closed run leaves unused; length 0 for none.
    """

    offsets: U64
    split: int
    hole: tuple[int, int]


class Space:
    """
    Hands out host clusters in order, and bytes for frames within runs of clusters.

        |header|frames......|raw raw|L2|frames..............(open)|raw raw raw|
                                        ^packed_at           ^run_end          ^cursor

    The open run grows in place while nothing was handed out after it; else it is used up and a new one begins.

    A whole part of raw clusters begins on a part, so that it needs no copying; the gap that this leaves before it takes
    what is smaller, tables above all.
    """

    def __init__(self, image: Image) -> None:
        self._size = image.cluster_size
        self._limit = image.max_host_clusters
        self._max_run = max(PART // self._size, RUN_CLUSTERS)
        self.cursor = 1  # cluster 0 is the header
        self._packed_at = self._run_end = 0  # bytes; equal: no room
        self._packed = 0  # bytes of all frames so far
        self._spare_from = self._spare_end = 0  # clusters of the last run that tables may use, once it is closed
        self._gap_from = self._gap_end = 0  # clusters left out before a part

    @property
    def settled(self) -> int:
        """Host clusters below this one get no further references."""
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
            The file would outgrow what qcow2 can address with this cluster size.
        """
        if count <= self._gap_end - self._gap_from:
            first, self._gap_from = self._gap_from, self._gap_from + count
            return first
        return self._at_end(count)

    def part(self) -> tuple[int, tuple[int, int]]:
        """
        Reserve as many consecutive clusters as a part has, on a part where the file is large enough for that.

        Returns the first, and the hole, (offset, length) in bytes, of a gap that is given up for a new one.
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
        """Hand out no more of the gap.  Returns the hole, (offset, length) in bytes; length 0: none."""
        hole = (self._gap_from * self._size, (self._gap_end - self._gap_from) * self._size)
        self._gap_from = self._gap_end
        return hole

    def _at_end(self, count: int) -> int:
        first, self.cursor = self.cursor, self.cursor + count
        if self.cursor > self._limit:
            raise Failed(
                f"a data file with clusters of {self._size} bytes ends at {self._limit * self._size} bytes",
                hint="set a larger cluster_size and take a full",
            )
        return first

    def tables(self, most: int) -> tuple[int, int]:
        """Reserve 1 to `most` consecutive clusters for tables: (first, count).  What the last run left goes first."""
        if self._spare_from < self._spare_end:
            first, count = self._spare_from, min(most, self._spare_end - self._spare_from)
            self._spare_from += count
            return first, count
        count = min(most, self._gap_end - self._gap_from) or most
        return self.clusters(count), count

    def frames(self, lengths: U64) -> Packing:
        """Reserve bytes for frames of these lengths (bytes each, at least one frame)."""
        ends = np.cumsum(lengths, dtype=np.uint64)  # named for numpy 2.5, whose stubs take it for signed
        starts = ends - lengths
        total = int(ends[-1])
        self._packed += total
        if self._run_end == self.cursor * self._size:  # nothing lies behind: grow in place
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
        """Close a run and a gap that the cursor left far behind.  Returns the holes, (offset, length) in bytes."""
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
        Close the last run; its whole free clusters are handed out by `tables`, or given back at the file's end.

        Returns the hole (offset, length) in bytes up to the next cluster's boundary.
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
        """Clusters (first, count) that `tables` can still hand out from the closed run."""
        return self._spare_from, self._spare_end - self._spare_from


class Refcounts:
    """
    Refcounts of the host clusters, in blocks of `block_entries` that leave as soon as they are settled.

    A cluster's count cannot pass 65,535, the largest that 16 bits hold: the smallest frame of a 2 MiB cluster, one
    repeated byte, takes 77 bytes (16 RLE blocks), so at most 27,237 of them touch one host cluster.
    """

    def __init__(self, image: Image) -> None:
        self._size = image.cluster_size
        self._entries = image.block_entries
        self._blocks: dict[int, U16] = {}
        self.done = 0
        """Blocks taken so far."""

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
        Count references of frames that lie close together (host bytes).

        A frame refers to the clusters that its 512-byte sectors touch: the one of its first byte and the one of its
        last, as it is smaller than a cluster.
        """
        if len(offsets):
            size = np.uint64(self._size)
            first, last = offsets // size, (offsets + lengths - np.uint64(1)) // size
            touched = np.concatenate((first, last[last != first]))
            lowest = int(touched.min())
            self._add(lowest, np.bincount((touched - np.uint64(lowest)).astype(np.int64)))

    def take_settled(self, settled: int) -> U16 | None:
        """Take out the next block if all its clusters lie below `settled`, else None."""
        if (self.done + 1) * self._entries > settled:
            return None
        return self.take()

    def take(self) -> U16:
        """Take out the next block, settled or not."""
        block = self._blocks.pop(self.done, None)
        self.done += 1
        return np.zeros(self._entries, np.uint16) if block is None else block
