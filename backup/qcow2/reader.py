"""
Reads one data file: which guest clusters it holds, and where their bytes are.

Everything in the file is taken for hostile: each field is checked against the file's size before it is used, and no
allocation is larger than the 32 MiB that QEMU allows for an L1 table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from backup.errors import Damaged
from backup.qcow2 import layout
from backup.qcow2.layout import COPIED, DAMAGED_HINT, HEADER_BYTES, U8, U16, U64, Header, Image


class Reader:
    """
    A data file's header and tables.  Never follows the backing name.  Thread safe if `read_at` is.

    Parameters
    ----------
    read_at : callable
        read_at(offset, length) returns exactly `length` bytes of the file or raises; whether it verifies digests is
        its own matter.
    file_size : int
        Bytes of the file.
    name : str
        What messages call the file.

    Raises
    ------
    Damaged
        Not a well-formed file of the kind that pybackup writes.
    """

    def __init__(self, read_at: Callable[[int, int], bytes], file_size: int, name: str) -> None:
        self._read_at = read_at
        self.file_size = file_size
        self.name = name
        head = read_at(0, min(HEADER_BYTES, max(0, file_size)))
        self.header: Header = layout.parse_header(head, file_size, name)
        self._l1 = self._read_l1()
        # Callers pass over the tables in order, so one is enough; every file of a chain of any length keeps its own.
        self._latest: tuple[int, U64] | None = None

    @property
    def image(self) -> Image:
        """What the file is of; its size is the header's, a multiple of 512."""
        return self.header.image

    @staticmethod
    def kinds(entries: U64) -> U8:
        """Codes (UNALLOCATED, ZERO, RAW, COMPRESSED) of entries that `entries` returned."""
        return layout.kinds(entries)

    def spans(self, entries: U64) -> tuple[U64, U64]:
        """
        Host offset and length in bytes to read for each of the entries that `entries` returned.

        A frame's range ends with its last sector, behind the frame itself; (0, 0) where nothing is stored.
        """
        return layout.spans(entries, self.image.cluster_size)

    def allocated_tables(self) -> npt.NDArray[np.bool_]:
        """One flag for each L2 table, of `image.table_entries` guest clusters: False where all are unallocated."""
        return np.not_equal(self._l1, 0)

    def entries(self, first: int, count: int) -> U64:
        """
        Return the L2 entries of guest clusters [first, first + count), native-endian; 0 where there is no L2 table.

        Raises
        ------
        Damaged
            An entry that pybackup does not write.
        ValueError
            Clusters that the disk does not have.
        """
        if first < 0 or count < 0 or first + count > self.image.clusters:
            raise ValueError(f"clusters {first} to {first + count} of a disk that has {self.image.clusters}")
        per = self.image.table_entries
        found = np.zeros(count, np.uint64)
        start, end = first // per, -(-(first + count) // per)
        for index in (np.flatnonzero(self._l1[start:end]) + start).tolist():
            low, high = max(first, index * per), min(first + count, (index + 1) * per)
            found[low - first : high - first] = self._cached_table(index)[low - index * per : high - index * per]
        return found

    def tables(self) -> Iterator[tuple[int, int, U64]]:
        """Yield every L2 table: its number, its host offset in bytes and its entries, ascending; nothing is kept."""
        for index in np.flatnonzero(self._l1).tolist():
            yield index, int(self._l1[index]) & ~COPIED, self._read_table(index)

    def refcount_table(self) -> U64:
        """
        Host offsets in bytes of the refcount blocks; 0 for one that does not exist.

        Raises
        ------
        Damaged
            An offset that is not aligned or not inside the file.
        """
        size = self.image.cluster_size
        offset = self.header.refcount_table_offset
        table = np.frombuffer(self._read(offset, self.header.refcount_table_clusters * size), ">u8").astype(np.uint64)
        self._require_clusters(table[table != 0], "refcount table")
        return table

    def refcount_block(self, offset: int) -> U16:
        """Return the refcounts in the block at a host offset in bytes."""
        return np.frombuffer(self._read(offset, self.image.cluster_size), ">u2").astype(np.uint16)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the file."""
        return self._read(offset, length)

    def damaged(self, what: str) -> Damaged:
        """Make the error for something wrong in this file."""
        return Damaged(f"data file {self.name}: {what}", hint=DAMAGED_HINT)

    def _read(self, offset: int, length: int) -> bytes:
        data = self._read_at(offset, length)
        if len(data) != length:
            raise self.damaged(f"{len(data)} bytes at {offset} instead of {length}")
        return data

    def _read_l1(self) -> U64:
        """Read the L1 table: offsets with the COPIED flag, or 0."""
        l1 = np.frombuffer(self._read(self.header.l1_offset, self.image.tables * 8), ">u8").astype(np.uint64)
        used = l1[l1 != 0]
        if (used < COPIED).any():
            raise self.damaged("L1 table: an L2 table that is not this disk's alone")
        self._require_clusters(used ^ np.uint64(COPIED), "L1 table")
        return l1

    def _require_clusters(self, offsets: U64, where: str) -> None:
        """Refuse offsets of clusters that are not aligned, in cluster 0, or not wholly inside the file."""
        size = self.image.cluster_size
        bad = (offsets % np.uint64(size) != 0) | (offsets < size) | (offsets >= self.file_size)
        if bad.any():
            raise self.damaged(f"{where}: no cluster inside the file at {int(offsets[bad][0]):#x}")

    def _cached_table(self, index: int) -> U64:
        latest = self._latest
        if latest is None or latest[0] != index:
            latest = self._latest = index, self._read_table(index)
        return latest[1]

    def _read_table(self, index: int) -> U64:
        """Read and check the L2 table with this number."""
        image = self.image
        offset = int(self._l1[index]) & ~COPIED
        table = np.frombuffer(self._read(offset, image.cluster_size), ">u8").astype(np.uint64)
        first = index * image.table_entries
        bad = layout.find_malformed(table, image, self.file_size)
        if bad is not None:
            raise self.damaged(f"guest cluster {first + bad}: not a valid entry ({int(table[bad]):#018x})")
        if table[max(0, image.clusters - first) :].any():
            raise self.damaged(f"L2 table {index} maps clusters beyond the disk's {image.clusters}")
        return table
