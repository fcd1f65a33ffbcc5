"""
Merge several links of a chain into one: the newest link gets the data of all, and restores to the same content.

    before    N ---- R2 ---- R1 ---- K ---- ...        N, R2 and R1 are merged: depth 3
    after     N' ------------------- K ---- ...        a full if there is no K

Compressed clusters are copied as they are stored: frames keep their bytes and get new places.  Every block is compared
with its digest before its bytes are used.

A merged link that was shorter than an older one hides the end of the older one (FORMAT.md, "What a chain means").  When
the shorter link disappears, zero clusters must hide data of the parent in its place.  A cluster in which such a link
ends is compressed anew; there is at most one for each link.  A full needs no zero clusters.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from backup import qcow2
from backup.engine.block_jobs import BlockJob, block_jobs
from backup.errors import UsageError
from backup.model import digests
from backup.model.chain import Chain, Link
from backup.model.compression import Compression
from backup.model.digests import BLOCK
from backup.model.extents import Offsets, edges, windows
from backup.model.manifest import NEW, DataFile, DiskEntry, Parent, digest_name, generation
from backup.qcow2 import COMPRESSED, PART, RAW, Codec, Image, Writer
from backup.repository import data_file
from backup.repository.cluster_index import NOBODY, ZERO, Index
from backup.repository.data_file import OpenDataFile, PeekedDataFile
from backup.repository.data_file_writer import PartFile, write_digests
from backup.repository.machine import Machine
from backup.runtime.ignoring import ignoring
from backup.runtime.progress import Progress
from backup.runtime.threads import in_threads

_log = logging.getLogger(__name__)

Holders = npt.NDArray[np.int16]
U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]

_MERGED = "; merged with older points by prune"
"""The end of a merged point's reason."""
_WINDOW = 1 << 19
"""
Clusters of the disk that are merged together, about 80 bytes of memory each; whole L2 tables for any cluster size.
"""


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge of the newest `depth` links (at least two) of a chain."""

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
        """The link on which the newest one builds after the merge; None if it becomes a full."""
        return self.chain.links[self.depth] if self.depth < len(self.chain.links) else None

    @property
    def file(self) -> str:
        """The name of the data file that is written."""
        return self.newest.entry.data.file + NEW

    @property
    def digests(self) -> str:
        """The name of the digest file that is written."""
        entry = self.newest.entry
        return digest_name(entry.name, self.newest.point, generation(entry.data.digests) + 1)

    @property
    def hides_from(self) -> int | None:
        """
        The offset (bytes) from which only a merged link hides data of the parent; None if there is no such data.

        Nothing must be hidden beyond the end of the newest link.
        """
        end = self.merged.limits[-1]
        return None if end >= min(self.parent_size, self.newest.entry.size) else end

    @property
    def parent_size(self) -> int:
        """The size of the disk (bytes) at the parent; 0 without a parent."""
        return 0 if self.parent is None else self.parent.entry.size


@dataclass(frozen=True, slots=True)
class Estimate:
    """The bytes that a merge reads, and the approximate size of its file in bytes; computed from the tables."""

    reads: int
    writes: int


def estimate(machine: Machine, merge: Merge) -> Estimate:
    """
    Estimate the cost of a merge from the tables of its links.

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
            used = np.flatnonzero(holders != NOBODY) + first
            tables += len(np.unique(used // (cluster // 8)))
    covered = cluster * (cluster // 8)
    hidden = 0 if merge.hides_from is None else -(-(merge.parent_size - merge.hides_from) // covered) + 1
    # Header, L1 table, refcounts, clusters that are compressed anew, and the unused end of the last run of frames.
    clusters = 4 + tables + hidden + merge.depth + 8 * merge.chain.size // covered // cluster
    return Estimate(data, data + clusters * cluster + data // (cluster // 2) + min(PART, data // 8))


def consolidate(machine: Machine, merge: Merge, *, workers: int, progress: Progress) -> DiskEntry:
    """
    Write the merged data file and its digest file.  The data file waits, fsynced, under its name with `.new`.

    Returns
    -------
    DiskEntry
        The newest link's entry with the new file, for `exchange`.  Size, identity and content are unchanged.

    Raises
    ------
    BackupError
        A file of the chain is damaged, or the disk is full.  Everything that was written is removed again.
    """
    try:
        entry = _entry(merge, _write(machine, merge, workers, progress))
        # The structure of the new file is checked now, because the files that it replaces will be removed soon.
        waiting = replace(entry, data=replace(entry.data, file=merge.file))
        with closing(PeekedDataFile(machine.files, waiting)) as peeked:
            qcow2.check(peeked.reader)
    except BaseException:
        discard(machine, merge)
        raise
    return entry


def discard(machine: Machine, merge: Merge) -> None:
    """Remove the files of a merge that failed or is not needed.  The next run removes what cannot be removed now."""
    with ignoring(_log, f"removal of {merge.file}", OSError):
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


def _reason(old: DiskEntry) -> str:
    return old.reason if old.reason.endswith(_MERGED) else f"{old.kind}: {old.reason}{_MERGED}"


def _write(machine: Machine, merge: Merge, workers: int, progress: Progress) -> DataFile:
    """Write both files; return their description, with their final names."""
    parent = merge.parent
    with data_file.open_files(machine.files, merge.chain) as files:
        compression = _compression(merge, files)
        image = Image(
            size=merge.chain.size,
            cluster_size=merge.chain.cluster_size,
            backing=None if parent is None else parent.entry.data.file,
            zstd=compression.level is not None,
        )
        with closing(PartFile(machine.files, merge.file)) as part:
            writer = Writer(image, part, level=compression.level)
            _MergeRun(merge, files, writer, Codec(image.cluster_size, compression.level)).run(workers, progress)
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
    """Return the compression of the newest link with frames, for the clusters that are compressed anew."""
    for link, file in zip(merge.merged.links, files, strict=False):
        if file.reader.image.zstd:
            try:
                return Compression.parse(link.entry.data.compression)
            except UsageError:
                return Compression(1)  # a level that this version does not support
    return Compression(None)


def _windows(chain: Chain) -> Iterator[tuple[int, int]]:
    """Yield first cluster and number of clusters for each window of the disk."""
    cluster = chain.cluster_size
    for start, end in windows(0, chain.size, _WINDOW * cluster):
        yield start // cluster, -(-(end - start) // cluster)


class _MergeRun:
    """The state that the threads of one merge share."""

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
        """Write the zero clusters that hide data of the parent; a merge without a parent needs none."""
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
        """Write the clusters of a window in which a link ends, and remove them from `entries`."""
        ends = {limit // self._cluster for limit in self._limits[: self.merge.depth] if limit % self._cluster}
        for cluster in sorted(ends):
            at = cluster - first
            if 0 <= at < len(holders) and self._encode_cut(cluster, int(holders[at]), entries[at : at + 1]):
                entries[at] = 0

    def _encode_cut(self, cluster: int, holder: int, entry: U64) -> bool:
        """Write a cluster if the end of a link hides the rest of its data; return whether the cluster was written."""
        if holder == NOBODY:
            below = self._below_cut(cluster)
            if below is None:
                return False
            holder, entry = below
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
        """Return the link below the merged ones that holds a cluster in which one of them ends, and its L2 entry."""
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

    def _jobs(self, first: int, holders: Holders, entries: U64) -> Iterator[BlockJob]:
        """Yield the jobs for the clusters of a window that are copied unchanged."""
        with_data = np.flatnonzero((holders != NOBODY) & (entries > ZERO))
        used = entries[with_data]
        reader = self.files[0].reader
        offsets, lengths = (column.astype(np.int64) for column in reader.spans(used))
        links = holders[with_data].astype(np.int64)
        return block_jobs(
            links=links,
            clusters=with_data + first,
            offsets=offsets,
            lengths=lengths,
            packed=reader.kinds(used) == COMPRESSED,
            order=np.lexsort((offsets, links)),
        )

    def _copy(self, job: BlockJob) -> None:
        """Copy the clusters of a block, which is compared with its digest first."""
        block = np.frombuffer(self.files[job.link].file.block(job.block), np.uint8)
        self._copy_raw(job, block)
        self._copy_frames(job, block)
        with self._lock:
            self.done += len(job.clusters) * self._cluster

    def _copy_raw(self, job: BlockJob, block: U8) -> None:
        raw = np.flatnonzero(~job.packed)
        indices = ((job.offsets[raw] - job.block * BLOCK) // self._cluster).tolist()
        # In two calls, since a whole part would be written without a copy, from memory that O_DIRECT does not accept.
        half = len(raw) // 2 if len(raw) * self._cluster == PART else 0
        for part in (slice(0, half), slice(half, None)):
            self.writer.copy_raw(job.clusters[raw[part]], indices[part], block)

    def _copy_frames(self, job: BlockJob, block: U8) -> None:
        packed = np.flatnonzero(job.packed)
        clusters, spans = job.clusters[packed], job.lengths[packed]
        begins = job.offsets[packed] - job.block * BLOCK
        inside = begins + spans <= len(block)  # the last one may end in the next block
        lengths = qcow2.frame_lengths(block, begins[inside].astype(np.uint64), self._cluster)
        runs = list(_joined(block, begins[inside], lengths.astype(np.int64)))
        for offset, span in zip(job.offsets[packed][~inside].tolist(), spans[~inside].tolist(), strict=True):
            stored = self.files[job.link].file.read_at(offset, span)
            length = qcow2.frame_length(stored)
            lengths = np.append(lengths, np.uint64(length))
            runs.append(np.frombuffer(stored, np.uint8)[:length])
        self.writer.copy_frames(clusters, lengths, runs)


def _joined(block: U8, begins: Offsets, lengths: Offsets) -> Iterator[U8]:
    """Yield pieces of a block; neighbouring ones are joined."""
    ends = begins + lengths
    breaks = np.flatnonzero(ends[:-1] != begins[1:]) + 1
    for low, high in pairwise([0, *breaks.tolist(), len(begins)]):
        if low < high:
            yield block[begins[low] : ends[high - 1]]
