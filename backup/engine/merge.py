"""
Several links of a chain as one: the newest of them gets what all of them hold, and restores to what it did.

    before    N ---- R2 ---- R1 ---- K ---- ...        N, R2 and R1 are merged: depth 3
    after     N' ------------------- K ---- ...        without K, a full

Compressed clusters are copied as they are stored: frames keep their bytes and get other places.  Every byte that is
read is held against its digest first.

A link between that was shorter than an older one hides the older one's tail (FORMAT.md, "What a chain means").  When it
goes, zero clusters take the tail's place over a parent that may hold one, and a cluster that such an end cuts is
encoded anew: at most one for each link.  A full needs no zero clusters.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from backup import qcow2
from backup.errors import UsageError
from backup.model import digests
from backup.model.chain import Chain, Link
from backup.model.compression import Compression
from backup.model.digests import BLOCK
from backup.model.extents import Mask, Offsets, edges, windows
from backup.model.manifest import NEW, DataFile, DiskEntry, Parent, digest_name, generation
from backup.qcow2 import COMPRESSED, PART, RAW, Codec, Image, Writer
from backup.repository import data_file
from backup.repository.cluster_index import NOBODY, ZERO, Index
from backup.repository.data_file import OpenDataFile, PeekedDataFile
from backup.repository.data_file_writer import PartFile, write_digests
from backup.repository.machine import Machine
from backup.runtime.progress import Progress
from backup.runtime.threads import in_threads

Holders = npt.NDArray[np.int16]
U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]

_WINDOW = 1 << 19
"""Clusters of the disk merged at once, about 80 bytes of memory each; whole L2 tables for every size of cluster."""


@dataclass(frozen=True, slots=True)
class Merge:
    """The newest `depth` links (at least two) of a chain, to become its newest one."""

    chain: Chain
    depth: int

    @property
    def newest(self) -> Link:
        """The link that is rewritten."""
        return self.chain.newest

    @property
    def merged(self) -> Chain:
        """The links that become one."""
        return self.chain.part(0, self.depth)

    @property
    def parent(self) -> Link | None:
        """What the newest link builds on afterwards; None: it becomes a full."""
        return self.chain.links[self.depth] if self.depth < len(self.chain.links) else None

    @property
    def file(self) -> str:
        """Name of the data file that is written."""
        return self.newest.entry.data.file + NEW

    @property
    def digests(self) -> str:
        """Name of its digest file."""
        entry = self.newest.entry
        return digest_name(entry.name, self.newest.point, generation(entry.data.digests) + 1)

    @property
    def hides_from(self) -> int | None:
        """
        From this byte on a link that goes hides what the parent holds, where only it did; None: from nowhere.

        Beyond the newest link's own end nothing has to be hidden.
        """
        end = self.merged.limits[-1]
        return None if end >= min(self.parent_size, self.newest.entry.size) else end

    @property
    def parent_size(self) -> int:
        """Bytes of the disk at the parent; 0 without one."""
        return 0 if self.parent is None else self.parent.entry.size


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a merge reads, and that its file will have, at most by a few clusters more; from tables alone."""

    reads: int
    writes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Clusters that are copied as they are, whose stored bytes begin in one block of one file, in the file's order."""

    number: int
    block: int
    clusters: Offsets
    offsets: Offsets
    lengths: Offsets
    packed: Mask


def estimate(machine: Machine, merge: Merge) -> Estimate:
    """
    Look at the tables of the links to be merged.

    Raises
    ------
    BackupError
        A file of the chain is missing or damaged.
    """
    with data_file.peeked(machine.files, merge.merged, whole=False) as index:
        cluster = merge.chain.cluster_size
        data = tables = 0
        for first, count in _windows(merge.chain):
            holders, entries = index.resolve(first, count, zeroes=True)
            data += int(qcow2.spans(entries, cluster)[1].sum())
            held = np.flatnonzero(holders != NOBODY) + first
            tables += len(np.unique(held // (cluster // 8)))
    covered = cluster * (cluster // 8)
    hidden = 0 if merge.hides_from is None else -(-(merge.parent_size - merge.hides_from) // covered) + 1
    # Header, L1 table, refcounts, what is encoded anew; and what the last run of frames leaves free.
    clusters = 4 + tables + hidden + merge.depth + 8 * merge.chain.size // covered // cluster
    return Estimate(data, data + clusters * cluster + data // (cluster // 2) + min(PART, data // 8))


def consolidate(machine: Machine, merge: Merge, *, workers: int, progress: Progress) -> DiskEntry:
    """
    Write the merged data file and its digest file; it waits under its name with `.new`, fsynced.

    Returns
    -------
    DiskEntry
        The newest link's entry with that file, for `exchange`.  Size, identity and content are what they were.

    Raises
    ------
    BackupError
        A file of the chain is damaged, or the disk is full: what was written is removed again.
    """
    try:
        entry = _entry(merge, _write(machine, merge, workers, progress))
        # What it replaces goes soon, so our own mistakes are looked for now; metadata only.
        waiting = replace(entry, data=replace(entry.data, file=merge.file))
        with closing(PeekedDataFile(machine.files, waiting)) as peeked:
            qcow2.check(peeked.reader)
    except BaseException:
        discard(machine, merge)
        raise
    return entry


def discard(machine: Machine, merge: Merge) -> None:
    """Remove the files of a merge that did not come to its end, or is not needed; what stays, the next run removes."""
    with suppress(OSError):
        for name in (merge.file, merge.digests):
            machine.files.discard(name)


def _entry(merge: Merge, data: DataFile) -> DiskEntry:
    old, parent = merge.newest.entry, merge.parent
    return replace(
        old,
        kind="full" if parent is None else "incremental",
        reason=_reason(old),
        parent=None if parent is None else Parent(parent.point, parent.entry.identity),
        data=data,
        bytes=replace(old.bytes, stored=data.size),
    )


_MERGED = "; merged with older points by prune"


def _reason(old: DiskEntry) -> str:
    return old.reason if old.reason.endswith(_MERGED) else f"{old.kind}: {old.reason}{_MERGED}"


def _write(machine: Machine, merge: Merge, workers: int, progress: Progress) -> DataFile:
    """Write both files, and describe them under the names that they will have."""
    parent = merge.parent
    with data_file.opened(machine.files, merge.chain) as files:
        compression = _compression(merge, files)
        image = Image(
            size=merge.chain.size,
            cluster_size=merge.chain.cluster_size,
            backing=None if parent is None else parent.entry.data.file,
            zstd=compression.level is not None,
        )
        with closing(PartFile(machine.files, merge.file)) as part:
            writer = Writer(image, part, level=compression.level)
            _Run(merge, files, writer, Codec(image.cluster_size, compression.level)).run(workers, progress)
            size = writer.finish()
            content = part.finish()
    write_digests(machine.files, merge.digests, content)
    return DataFile(
        file=merge.newest.entry.data.file,
        size=size,
        digests=merge.digests,
        digest=digests.digest(content).hex(),
        cluster_size=image.cluster_size,
        compression=str(compression),
    )


def _compression(merge: Merge, files: Sequence[OpenDataFile]) -> Compression:
    """The newest link's that may have frames: what is encoded anew is encoded as these were."""
    for link, file in zip(merge.merged.links, files, strict=False):
        if file.reader.image.zstd:
            try:
                return Compression.parse(link.entry.data.compression)
            except UsageError:
                return Compression(1)  # a level that this program does not offer
    return Compression(None)


def _windows(chain: Chain) -> Iterator[tuple[int, int]]:
    """First cluster and number of clusters of each window of the disk."""
    cluster = chain.cluster_size
    for start, end in windows(0, chain.size, _WINDOW * cluster):
        yield start // cluster, -(-(end - start) // cluster)


class _Run:
    """What the threads of one merge share."""

    def __init__(self, merge: Merge, files: list[OpenDataFile], writer: Writer, codec: Codec) -> None:
        self.merge = merge
        self.files = files
        self.writer = writer
        self.done = 0
        self._codec = codec
        self._cluster = merge.chain.cluster_size
        self._limits = merge.chain.limits
        self._index = Index(merge.merged, [file.reader for file in files[: merge.depth]])
        self._lock = threading.Lock()

    def run(self, workers: int, progress: Progress) -> None:
        """Merge the disk window by window."""
        size = self.merge.chain.size
        progress.begin(self.merge.chain.disk, size)
        for first, count in _windows(self.merge.chain):
            holders, entries = self._index.resolve(first, count, zeroes=True)
            self._record_zeroes(first, holders, entries)
            self._encode_cuts(first, holders, entries)
            jobs = self._jobs(first, holders, entries)
            in_threads(jobs, self._copy, workers + 1, lambda: progress.advance(min(self.done, size)))
            self.writer.completed_below(first + count)
            self.done = (first + count) * self._cluster

    def _record_zeroes(self, first: int, holders: Holders, entries: U64) -> None:
        """Over a parent, zero clusters stay zero clusters, and hide what was hidden before."""
        if self.merge.parent is None:
            return
        zero = (holders != NOBODY) & (entries == ZERO)
        hides_from = self.merge.hides_from
        if hides_from is not None:
            whole = max(0, -(-hides_from // self._cluster) - first)
            end = max(0, -(-self.merge.parent_size // self._cluster) - first)
            zero[whole:end] |= holders[whole:end] == NOBODY
        for low, high in zip(*(side.tolist() for side in edges(zero)), strict=True):
            self.writer.zero(first + low, high - low)

    def _encode_cuts(self, first: int, holders: Holders, entries: U64) -> None:
        """Write the clusters of a window of which a link's end hides the rest, and take them off the others."""
        ends = {limit // self._cluster for limit in self._limits[: self.merge.depth] if limit % self._cluster}
        for cluster in sorted(ends):
            at = cluster - first
            if 0 <= at < len(holders) and self._encode_cut(cluster, int(holders[at]), entries[at : at + 1]):
                entries[at] = 0

    def _encode_cut(self, cluster: int, holder: int, entry: U64) -> bool:
        """Write a cluster of which a limit hides the rest, if one does; whether it was written."""
        if holder == NOBODY:
            found = self._below_cut(cluster)
            if found is None:
                return False
            holder, entry = found
        limit = self._limits[holder] - cluster * self._cluster
        stored = self.merge.chain.links[holder].entry.size - cluster * self._cluster
        if int(entry[0]) <= ZERO or limit >= min(stored, self._cluster):
            return False
        content = bytearray(self._cluster)
        self._decode(holder, entry, memoryview(content))
        content[limit:] = bytes(self._cluster - limit)
        self.writer.write(cluster, content, self._codec)
        return True

    def _below_cut(self, cluster: int) -> tuple[int, U64] | None:
        """The link below the merged ones whose cluster is cut by one of those, and its entry there."""
        hides_from = self.merge.hides_from
        if hides_from is None or hides_from // self._cluster != cluster:
            return None
        index = Index(self.merge.chain, [file.reader for file in self.files])
        holders, entries = index.resolve(cluster, 1)
        return None if holders[0] == NOBODY else (int(holders[0]), entries)

    def _decode(self, holder: int, entry: U64, content: memoryview) -> None:
        reader, file = self.files[holder].reader, self.files[holder].file
        offset, length = (int(value[0]) for value in reader.spans(entry))
        stored = file.read_at(offset, length)
        if reader.kinds(entry)[0] == RAW:
            content[:] = stored
        else:
            self._codec.decode_into(memoryview(stored), content)

    def _jobs(self, first: int, holders: Holders, entries: U64) -> Iterator[_Job]:
        """The clusters of a window that are copied as they are, a job for each block in which some begin."""
        held = np.flatnonzero((holders != NOBODY) & (entries > ZERO))
        found = entries[held]
        reader = self.files[0].reader
        offsets, lengths = (column.astype(np.int64) for column in reader.spans(found))
        links = holders[held].astype(np.int64)
        packed = reader.kinds(found) == COMPRESSED
        order = np.lexsort((offsets, links))
        clusters = held[order] + first
        links, offsets, lengths, packed = links[order], offsets[order], lengths[order], packed[order]
        blocks = offsets // BLOCK
        changes = np.flatnonzero((np.diff(links) != 0) | (np.diff(blocks) != 0)) + 1
        for low, high in pairwise([0, *changes.tolist(), len(order)]):
            if low < high:
                here = slice(low, high)
                yield _Job(
                    int(links[low]), int(blocks[low]), clusters[here], offsets[here], lengths[here], packed[here]
                )

    def _copy(self, job: _Job) -> None:
        """Copy a block's clusters; every byte of the block is held against its digest first."""
        block = np.frombuffer(self.files[job.number].file.block(job.block), np.uint8)
        self._copy_raw(job, block)
        self._copy_frames(job, block)
        with self._lock:
            self.done += len(job.clusters) * self._cluster

    def _copy_raw(self, job: _Job, block: U8) -> None:
        raw = np.flatnonzero(~job.packed)
        indices = ((job.offsets[raw] - job.block * BLOCK) // self._cluster).tolist()
        # A whole part at once would go to the disk from where it is, which is no memory for writes past the cache.
        half = len(raw) // 2 if len(raw) * self._cluster == PART else 0
        for some in (slice(0, half), slice(half, None)):
            self.writer.copy_raw(job.clusters[raw[some]], indices[some], block)

    def _copy_frames(self, job: _Job, block: U8) -> None:
        packed = np.flatnonzero(job.packed)
        clusters, spans = job.clusters[packed], job.lengths[packed]
        begins = job.offsets[packed] - job.block * BLOCK
        inside = begins + spans <= len(block)  # all but the last, perhaps
        lengths = qcow2.frame_lengths(block, begins[inside].astype(np.uint64), self._cluster)
        runs = list(_joined(block, begins[inside], lengths.astype(np.int64)))
        for offset, span in zip(job.offsets[packed][~inside].tolist(), spans[~inside].tolist(), strict=True):
            stored = self.files[job.number].file.read_at(offset, span)
            length = qcow2.frame_length(stored)
            lengths = np.append(lengths, np.uint64(length))
            runs.append(np.frombuffer(stored, np.uint8)[:length])
        self.writer.copy_frames(clusters, lengths, runs)


def _joined(block: U8, begins: Offsets, lengths: Offsets) -> Iterator[U8]:
    """Pieces of a block, neighbours in one."""
    ends = begins + lengths
    breaks = np.flatnonzero(ends[:-1] != begins[1:]) + 1
    for low, high in pairwise([0, *breaks.tolist(), len(begins)]):
        if low < high:
            yield block[begins[low] : ends[high - 1]]
