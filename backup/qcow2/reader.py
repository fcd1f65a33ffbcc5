"""
Reads one data file: which guest clusters it holds, and where their bytes are.

Everything in the file is taken for hostile: each field is checked against the file's size before it is used, and no
allocation is larger than the 32 MiB that QEMU allows for an L1 table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import RawIOBase

import numpy as np
import numpy.typing as npt

from backup.errors import Damaged
from backup.model.extents import Offsets
from backup.qcow2 import layout
from backup.qcow2.layout import COPIED, DAMAGED_HINT, HEADER_BYTES, U8, U16, U64, Header, Image

_TOGETHER = 512 << 10
"""
Bytes of L2 tables read and checked at a time: most on a large disk hold little, so that numpy's calls cost more than
their work.
"""


def read_header(file: RawIOBase, name: str) -> Header:
    """
    Read the header of an open file that is called `name`, unchecked by any digest.

    Raises
    ------
    Damaged
        Not a file of the kind that pybackup writes.
    OSError
        It cannot be read.
    """
    return layout.parse_header(file.read(HEADER_BYTES) or b"", os.fstat(file.fileno()).st_size, name)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """
    An L2 table: its number, its host offset in bytes, and its entries other than 0.

    `places` says which of the table's entries those are, ascending; `entries` are native-endian and well-formed.
    """

    index: int
    offset: int
    places: Offsets
    entries: U64


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
        self._latest: Table | None = None

    @property
    def image(self) -> Image:
        """What the file is of; its size is the header's, a multiple of 512."""
        return self.header.image

    @staticmethod
    def kinds(entries: U64) -> U8:
        """Codes (UNALLOCATED, ZERO, RAW, COMPRESSED) of entries that `allocated` returned."""
        return layout.kinds(entries)

    def spans(self, entries: U64) -> tuple[U64, U64]:
        """
        Host offset and length in bytes to read for each of the entries that `allocated` returned.

        A frame's range ends with its last sector, behind the frame itself; (0, 0) where nothing is stored.
        """
        return layout.spans(entries, self.image.cluster_size)

    def allocated_tables(self) -> npt.NDArray[np.bool_]:
        """One flag for each L2 table, of `image.table_entries` guest clusters: False where all are unallocated."""
        return np.not_equal(self._l1, 0)

    def allocated(self, first: int, count: int) -> tuple[Offsets, U64]:
        """
        Return which of the guest clusters [first, first + count) have L2 entries other than 0, and these entries.

        The clusters are counted from `first`, ascending; the entries are native-endian.

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
        start, end = first // per, -(-(first + count) // per)
        tables = list(self._cached_tables((np.flatnonzero(self._l1[start:end]) + start).tolist()))
        if not tables:
            return np.zeros(0, np.int64), np.zeros(0, np.uint64)
        places = np.concatenate([table.places + (table.index * per - first) for table in tables])
        entries = np.concatenate([table.entries for table in tables])
        inside = slice(*np.searchsorted(places, (0, count)).tolist())
        return places[inside], entries[inside]

    def tables(self) -> Iterator[Table]:
        """Yield every L2 table, ascending; nothing is kept."""
        for some in self._together(np.flatnonzero(self._l1).tolist()):
            yield from self._read_tables(some)

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

    def _cached_tables(self, indices: Sequence[int]) -> Iterator[Table]:
        """Yield the L2 tables with these numbers, ascending; the latest of all is kept."""
        latest = self._latest  # another thread may replace it
        if latest is not None and latest.index in indices[:1]:
            yield latest
            indices = indices[1:]
        for some in self._together(indices):
            tables = self._read_tables(some)
            yield from tables
            self._latest = tables[-1]

    def _together(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        """Cut the numbers of L2 tables into those that are read at a time."""
        count = max(1, _TOGETHER // self.image.cluster_size)
        for low in range(0, len(indices), count):
            yield indices[low : low + count]

    def _read_tables(self, indices: Sequence[int]) -> list[Table]:
        """Read and check the L2 tables with these numbers, ascending."""
        offsets = (self._l1[indices] & ~np.uint64(COPIED)).tolist()
        tables = list(map(self._read_table, indices, offsets))
        entries = np.concatenate([table.entries for table in tables])
        bad = layout.find_malformed(entries, self.image, self.file_size)
        if bad is not None:
            guest = np.concatenate([table.index * self.image.table_entries + table.places for table in tables])[bad]
            raise self.damaged(f"guest cluster {guest}: not a valid entry ({int(entries[bad]):#018x})")
        last = tables[-1]
        if len(last.places) and last.index * self.image.table_entries + last.places[-1] >= self.image.clusters:
            raise self.damaged(f"L2 table {last.index} maps clusters beyond the disk's {self.image.clusters}")
        return tables

    def _read_table(self, index: int, offset: int) -> Table:
        # Few entries of most tables are not 0, which is 0 in any order of bytes: only those are looked at any further.
        stored = np.frombuffer(self._read(offset, self.image.cluster_size), np.uint64)
        places = np.flatnonzero(stored != 0)  # numpy finds True five times as fast
        return Table(index, offset, places, stored[places].astype(">u8").view(np.uint64))
