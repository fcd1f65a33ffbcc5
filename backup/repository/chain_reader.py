"""
Read the content of a chain, cluster by cluster in the disk's order.

    copier, reading the disk -> Rescanned   -> compares it with the chain -> stores only what differs
                             -> Differences -> compares it with the chain -> ranges of what differs

The chain and the disk are read side by side, batch by batch, so that neither is kept in memory.  `checked` verifies
every block of a data file against its digest before a byte of the block is used.  `glanced` reads a few clusters
without digests: a compressed cluster has a checksum of its own, and a cluster that equals the disk's needs no proof.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from backup.model.chain import Chain
from backup.model.extents import Offsets, distinct
from backup.qcow2 import COMPRESSED, Codec, Reader
from backup.repository import data_file
from backup.repository.checked_file import CACHED
from backup.repository.cluster_index import NOBODY, HoldersAndEntries, Index
from backup.storage.base import Files

_MOST_CACHED = 64
"""Most blocks (4 MiB each) in the cache; a batch of a long chain reads from many files."""
_WINDOWS = 8
"""Windows whose holders are cached: the workers read in different windows."""


class StoredFile(Protocol):
    """An open data file of a chain."""

    reader: Reader

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes [offset, offset + length)."""


class ChainContent:
    """
    The clusters of a disk of `size` bytes, as its chain holds them.  Safe to use from several threads.

    Parameters
    ----------
    chain : Chain
        The chain of the disk.
    size : int
        The exact size of the disk now: bytes beyond it read as zeroes, as do those beyond the end of any point.
    files : sequence of StoredFile
        The data files of the chain's links, newest first.
    chosen : Offsets or None
        The only clusters that will be read, ascending; None: any.
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
        Read clusters, given by ascending numbers, into `room`.

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
    """Finds holders for all clusters of an L2 table together, in the disk's order.  Thread-safe."""

    def __init__(self, index: Index, clusters: int) -> None:
        self._index = index
        self._clusters = clusters
        self._window = index.chain.cluster_size // 8
        self._resolved: OrderedDict[int, HoldersAndEntries] = OrderedDict()
        self._lock = threading.Lock()

    def holders(self, clusters: Offsets) -> HoldersAndEntries:
        """Return, for each cluster, the number of the link that holds its data (or NOBODY), and the L2 entry."""
        holders = np.empty(len(clusters), np.int16)
        entries = np.empty(len(clusters), np.uint64)
        windows = clusters // self._window
        for number in distinct(windows).tolist():
            here = windows == number
            of_window = self._resolve(number)
            at = clusters[here] - number * self._window
            holders[here], entries[here] = of_window[0][at], of_window[1][at]
        return holders, entries

    def _resolve(self, number: int) -> HoldersAndEntries:
        """Return the holders and entries of a window."""
        with self._lock:
            resolved = self._resolved.get(number)
            if resolved is None:
                first = number * self._window
                resolved = self._index.resolve(first, min(self._window, self._clusters - first))
                self._resolved[number] = resolved
                while len(self._resolved) > _WINDOWS:
                    self._resolved.popitem(last=False)
        return resolved


class _Chosen:
    """Finds the holders of a few chosen clusters at once.  Thread-safe."""

    def __init__(self, index: Index, chosen: Offsets) -> None:
        self._chosen = chosen
        self._resolved = index.resolve_some(chosen)

    def holders(self, clusters: Offsets) -> HoldersAndEntries:
        """Return holders and entries, as `_InWindows`."""
        at = np.searchsorted(self._chosen, clusters)
        return self._resolved[0][at], self._resolved[1][at]


def kept_blocks(chain: Chain) -> int:
    """Return the number of blocks to cache while a chain is read in the disk's order."""
    return min(CACHED + len(chain.links), _MOST_CACHED)


@contextmanager
def checked(files: Files, chain: Chain, size: int) -> Iterator[ChainContent]:
    """
    Open a chain to be read in the disk's order; every block is verified against its digest.

    Raises
    ------
    NotFound, Damaged
        A file of the chain is not what was written.
    """
    with data_file.open_files(files, chain, kept_blocks(chain)) as opened_files:
        yield ChainContent(chain, opened_files, size)


@contextmanager
def glanced(files: Files, chain: Chain, size: int, clusters: Offsets) -> Iterator[ChainContent]:
    """Open a chain to read a few clusters (ascending) without digests; `checked` must confirm every difference."""
    with data_file.peeked_files(files, chain) as peeked_at:
        yield ChainContent(chain, peeked_at, size, clusters)
