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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from backup.model.chain import Chain
from backup.model.extents import Offsets, distinct
from backup.qcow2 import COMPRESSED, Codec, Reader
from backup.repository import data_file
from backup.repository.checked_file import CACHED
from backup.repository.cluster_index import NOBODY, Found, Index
from backup.storage.base import Files

_MOST_CACHED = 64
"""Checked blocks (4 MiB each) kept at most: of a long chain one for each file that a batch reads from."""
_WINDOWS = 8
"""Windows whose holders are remembered: each worker is in another one."""


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
def checked(files: Files, chain: Chain, size: int) -> Iterator[Content]:
    """
    A chain's content, to be read in the disk's order, with every block held against its digest first.

    Raises
    ------
    NotFound, Damaged
        A file of the chain is not what was written.
    """
    with data_file.opened(files, chain, kept_blocks(chain)) as opened_files:
        yield Content(chain, opened_files, size)


@contextmanager
def glanced(files: Files, chain: Chain, size: int, clusters: Offsets) -> Iterator[Content]:
    """A few clusters (ascending) of a chain's content, for a look: of a difference `checked` must be asked."""
    with data_file.peeked_files(files, chain) as peeked_at:
        yield Content(chain, peeked_at, size, clusters)
