"""
The check of a data file's structure: each host cluster has as many references as its refcount says.

The check finds what `qemu-img check` finds, and is stricter: only packed frames may share a host cluster.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from backup.errors import Damaged
from backup.qcow2.codec import Codec
from backup.qcow2.layout import COMPRESSED, RAW, READS_AS_ZERO, U16, U64
from backup.qcow2.reader import Reader, Table

WINDOW = 1 << 24
"""Host clusters counted in one pass over the tables, 5 bytes of memory each: 1 TiB of a file with 64 KiB clusters."""

_READ_BYTES = 1 << 20


def check(reader: Reader, codec: Codec | None = None, *, window: int = WINDOW) -> None:
    """
    Check the structure of a whole file.

    Parameters
    ----------
    reader : Reader
        The file.
    codec : Codec, optional
        If given, every frame is decoded as well.
    window : int
        Host clusters counted in one pass.  Memory is 5 bytes for each; each window takes one pass over all L2 tables.

    Raises
    ------
    Damaged
        The first fault; the message tells where it is.
    """
    clusters = reader.file_size // reader.image.cluster_size
    per = reader.image.block_entries
    blocks = reader.refcount_table()
    if blocks[-(-clusters // per) :].any():
        raise reader.damaged(f"refcount blocks for clusters beyond the file's {clusters}")
    window = max(1, window // per) * per
    for start in range(0, clusters, window):
        _check_window(reader, blocks, _Uses(reader, start, min(window, clusters - start)))
    if codec is not None:
        for table in reader.tables():
            _decode_table(reader, codec, table)


class _Uses:
    """The references to host clusters [start, start + count): by frames, which share clusters, and by all others."""

    def __init__(self, reader: Reader, start: int, count: int) -> None:
        self._reader = reader
        self.start = start
        self.count = count
        self._whole = np.zeros(count, np.bool_)
        self._frames = np.zeros(count, np.uint32)

    def add_whole(self, clusters: U64, what: str) -> None:
        """Count references that must each be the only one to their host cluster."""
        inside = self._inside(clusters)
        values, counts = np.unique(inside, return_counts=True)
        taken = values[(counts > 1) | self._whole[values]]
        if len(taken):
            raise self._at(int(taken[0]), f"used twice, the second time by {what}")
        self._whole[inside] = True

    def add_frames(self, clusters: U64) -> None:
        """Count references of packed frames."""
        values, counts = np.unique(self._inside(clusters), return_counts=True)
        self._frames[values] += counts.astype(np.uint32)

    def require(self, at: int, stored: U16) -> None:
        """Compare stored refcounts, from host cluster start + at, with the counted references."""
        whole, frames = self._whole[at : at + len(stored)], self._frames[at : at + len(stored)]
        both = whole & (frames > 0)
        if both.any():
            raise self._at(at + int(np.argmax(both)), "holds frames and something else")
        expected = frames + whole
        wrong = stored != expected
        if wrong.any():
            index = int(np.argmax(wrong))
            raise self._at(at + index, f"refcount is {stored[index]}, references are {expected[index]}")

    def _inside(self, clusters: U64) -> npt.NDArray[np.int64]:
        low, high = np.uint64(self.start), np.uint64(self.start + self.count)
        return (clusters[(clusters >= low) & (clusters < high)] - low).astype(np.int64)

    def _at(self, index: int, what: str) -> Damaged:
        return self._reader.damaged(f"host cluster at {(self.start + index) * self._reader.image.cluster_size}: {what}")


def _check_window(reader: Reader, blocks: U64, uses: _Uses) -> None:
    """Count all references into one window of host clusters and compare them with the stored refcounts."""
    size = np.uint64(reader.image.cluster_size)
    header = reader.header
    l1_clusters = -(-reader.image.tables * 8 // reader.image.cluster_size)
    uses.add_whole(np.zeros(1, np.uint64), "the header")
    uses.add_whole(_clusters(header.l1_offset // int(size), l1_clusters), "the L1 table")
    counts = _clusters(header.refcount_table_offset // int(size), header.refcount_table_clusters)
    uses.add_whole(counts, "the refcount table")
    uses.add_whole(blocks[blocks != 0] // size, "a refcount block")
    for table in reader.tables():
        uses.add_whole(np.full(1, table.offset, np.uint64) // size, f"L2 table {table.index}")
        stored = table.entries[table.entries > READS_AS_ZERO]
        codes = reader.kinds(stored)
        offsets, lengths = reader.spans(stored)
        uses.add_whole(offsets[codes == RAW] // size, f"a guest cluster of L2 table {table.index}")
        packed = codes == COMPRESSED
        first = offsets[packed] // size
        # A well-formed frame touches no third cluster between its first and its last.
        last = (offsets + lengths - np.uint64(1))[packed] // size
        uses.add_frames(first)
        uses.add_frames(last[last > first])
    for at in range(0, uses.count, reader.image.block_entries):
        uses.require(at, _stored(reader, blocks, uses.start + at, uses.count - at))


def _clusters(first: int, count: int) -> U64:
    return np.arange(first, first + count, dtype=np.uint64)


def _stored(reader: Reader, blocks: U64, start: int, count: int) -> U16:
    """Return `count` refcounts, or one block of them, from cluster `start`; the rest of the block must be zero."""
    index = start // reader.image.block_entries
    offset = int(blocks[index]) if index < len(blocks) else 0
    if not offset:
        return np.zeros(min(count, reader.image.block_entries), np.uint16)
    counts = reader.refcount_block(offset)
    if counts[count:].any():
        raise reader.damaged(f"refcounts of clusters beyond the file's end in refcount block {index}")
    return counts[:count]


def _decode_table(reader: Reader, codec: Codec, table: Table) -> None:
    """Decode every frame of an L2 table; neighbouring frames are read together."""
    is_packed = reader.kinds(table.entries) == COMPRESSED
    guests = table.index * reader.image.table_entries + table.places[is_packed]
    offsets, lengths = reader.spans(table.entries[is_packed])
    order = np.argsort(offsets)
    buffer, start = b"", 0
    cluster = memoryview(bytearray(reader.image.cluster_size))
    for guest, offset, length in zip(
        guests[order].tolist(), offsets[order].tolist(), lengths[order].tolist(), strict=True
    ):
        if offset + length > start + len(buffer):
            start = offset
            buffer = reader.read(offset, max(length, min(_READ_BYTES, reader.file_size - offset)))
        try:
            codec.decode_into(memoryview(buffer)[offset - start : offset - start + length], cluster)
        except Damaged as error:
            raise reader.damaged(f"guest cluster {guest}, at {offset}: {error.message}") from error
