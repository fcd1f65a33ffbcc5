"""
The reader of a data file: which guest clusters the file stores, and where their bytes are.

The content of the file is not trusted.  Each field is compared with the size of the file before it is used, and no
allocation is larger than the 32 MiB that QEMU allows for an L1 table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backup.errors import Damaged
from backup.model.extents import Offsets
from backup.qcow2 import layout
from backup.qcow2.layout import COPIED, DAMAGED_HINT, HEADER_BYTES, U8, U16, U64, Header, Image

_READ_TOGETHER = 512 << 10
"""
Bytes of L2 tables that are read and checked together.  Most tables of a large disk have few entries, so that numpy's
overhead for each call would exceed the work.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """
    The used entries of an L2 table, those other than 0.

    `index` is the number of the table and `offset` its host offset in bytes.  `places` are the numbers of the used
    entries in the table, ascending.  `entries` are their values: native-endian and well-formed.
    """

    index: int
    offset: int
    places: Offsets
    entries: U64


class Reader:
    """
    The header and the tables of a data file.  Never opens the backing file.  Thread safe if `read_at` is.

    Parameters
    ----------
    read_at : callable
        read_at(offset, length) returns exactly `length` bytes of the file, or raises.  The function decides whether
        digests are verified.
    file_size : int
        Size of the file in bytes.
    name : str
        The name of the file in messages.

    Raises
    ------
    Damaged
        pybackup does not write such a file, or the file is not well-formed.
    """

    def __init__(self, read_at: Callable[[int, int], bytes], file_size: int, name: str) -> None:
        self._read_at = read_at
        self.file_size = file_size
        self.name = name
        head = read_at(0, min(HEADER_BYTES, max(0, file_size)))
        self.header: Header = layout.parse_header(head, file_size, name)
        self._l1 = self._read_l1()
        # One table is enough, because callers read the tables in order; a long chain has a reader for each file.
        self._latest: Table | None = None

    @property
    def image(self) -> Image:
        """The properties of the disk.  The size is the one in the header, a multiple of 512."""
        return self.header.image

    @staticmethod
    def kinds(entries: U64) -> U8:
        """Return the kinds (UNALLOCATED, ZERO, RAW, COMPRESSED) of entries that `allocated` returned."""
        return layout.kinds(entries)

    def spans(self, entries: U64) -> tuple[U64, U64]:
        """
        Return the host offset and the length to read (bytes) for each of the entries that `allocated` returned.

        The range of a frame ends with its last sector, behind the frame itself.  (0, 0) where nothing is stored.
        """
        return layout.spans(entries, self.image.cluster_size)

    def allocated_tables(self) -> npt.NDArray[np.bool_]:
        """Return a flag for each L2 table: False if no cluster of the table is allocated."""
        return np.not_equal(self._l1, 0)

    def allocated(self, first: int, count: int) -> tuple[Offsets, U64]:
        """
        Return the numbers of allocated guest clusters in [first, first + count), and their L2 entries.

        The numbers count from `first` and ascend.  The entries are native-endian; none is 0.

        Raises
        ------
        Damaged
            pybackup does not write such an entry.
        ValueError
            The disk has fewer clusters.
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
        """Yield every L2 table, in ascending order, without keeping any in memory."""
        for indices in self._groups(np.flatnonzero(self._l1).tolist()):
            yield from self._read_tables(indices)

    def refcount_table(self) -> U64:
        """
        Return the host offsets in bytes of the refcount blocks; 0 for a block that does not exist.

        Raises
        ------
        Damaged
            An offset is not aligned or not inside the file.
        """
        size = self.image.cluster_size
        offset = self.header.refcount_table_offset
        table = np.frombuffer(self._read(offset, self.header.refcount_table_clusters * size), ">u8").astype(np.uint64)
        self._require_clusters(table[table != 0], "refcount table")
        return table

    def refcount_block(self, offset: int) -> U16:
        """Return the refcounts in the block at a host offset (bytes)."""
        return np.frombuffer(self._read(offset, self.image.cluster_size), ">u2").astype(np.uint16)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the file at `offset`."""
        return self._read(offset, length)

    def damaged(self, what: str) -> Damaged:
        """Return the error for a fault in this file."""
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
            raise self.damaged("L1 table: an L2 table has no COPIED flag, so it may have other references")
        self._require_clusters(used ^ np.uint64(COPIED), "L1 table")
        return l1

    def _require_clusters(self, offsets: U64, where: str) -> None:
        """Refuse offsets that are not aligned, refer to cluster 0, or are not inside the file."""
        size = self.image.cluster_size
        bad = (offsets % np.uint64(size) != 0) | (offsets < size) | (offsets >= self.file_size)
        if bad.any():
            raise self.damaged(f"{where}: no cluster inside the file at {int(offsets[bad][0]):#x}")

    def _cached_tables(self, indices: Sequence[int]) -> Iterator[Table]:
        """Yield the L2 tables with these numbers, ascending.  The last table is kept for the next call."""
        latest = self._latest  # read once: another thread may replace the attribute
        if latest is not None and latest.index in indices[:1]:
            yield latest
            indices = indices[1:]
        for group in self._groups(indices):
            tables = self._read_tables(group)
            yield from tables
            self._latest = tables[-1]

    def _groups(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        """Divide the numbers of L2 tables into groups that are read together."""
        count = max(1, _READ_TOGETHER // self.image.cluster_size)
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
        # Only entries other than 0 are converted: they are few in most tables, and 0 is 0 in any byte order.
        stored = np.frombuffer(self._read(offset, self.image.cluster_size), np.uint64)
        places = np.flatnonzero(stored != 0)  # on booleans, numpy's search is five times as fast
        return Table(index, offset, places, stored[places].astype(">u8").view(np.uint64))
