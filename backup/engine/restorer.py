"""The threads of a restore: they read each cluster from its newest holder, verify it and write it to the target."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from backup import qcow2
from backup.engine.block_jobs import BlockJob, block_jobs
from backup.engine.targets import Target
from backup.model.chain import Chain
from backup.model.digests import BLOCK
from backup.model.extents import Mask, Offsets, edges, windows
from backup.qcow2 import COMPRESSED, Codec
from backup.repository import salvage
from backup.repository.cluster_index import NOBODY, HoldersAndEntries, Index
from backup.repository.data_file import OpenDataFile
from backup.repository.salvage import Lost, LostRanges, SalvagedFile
from backup.runtime.direct_io import pages
from backup.runtime.pace import Pace
from backup.runtime.progress import Progress
from backup.runtime.threads import run_threads

_WINDOW = 1 << 20
"""
Clusters of the disk that are resolved together, with about 40 bytes of memory each: 64 GiB of a disk with clusters of
64 KiB.  The window is large, so that there are few passes over the tables and the data of each file.  It consists of
whole L2 tables for every cluster size.
"""
_STAGED = BLOCK
"""Bytes of the largest write; a multiple of every cluster size."""
_TICK = 0.1
"""Seconds between two checks of progress and signals."""


_Columns = tuple[Offsets, Offsets, Offsets, Offsets, Mask]
"""Clusters, and for each the link of the chain, the host offset and length (bytes), and whether it is a zstd frame."""


@dataclass(frozen=True, slots=True)
class Restored:
    """
    The result of a restore: the size of the disk, and the bytes that were written as data; all others read as zeroes.

    `lost` are the ranges that a salvage could not verify.
    """

    size: int
    data_bytes: int
    lost: tuple[Lost, ...] = ()


@runtime_checkable
class _Completing(Protocol):
    """A target that keeps data in memory as long as more may be written nearby."""

    def done_below(self, offset: int) -> None:
        """Take note that no write below this offset (bytes) runs or follows."""


def write_out(run: RestoreRun, workers: int) -> Restored:
    """
    Run the threads of a restore until the target holds the whole disk.

    Raises
    ------
    BackupError
        A thread failed: a block is damaged, or the target cannot be written.
    """
    threads = workers + 1  # one more than cores: while one thread waits for the disk, the others decode
    run_threads(run.work, threads, run.show, run.halt, lambda: run.feed(threads))
    return run.restored()


def _abandon(target: Target) -> None:
    """Release the threads that write to a target, if the target can wait for ever (an NBD server)."""
    abandon = getattr(target, "abandon", None)
    if abandon is not None:
        abandon()


class RestoreRun:
    """The state that the threads of one restore share."""

    def __init__(
        self, chain: Chain, files: Sequence[OpenDataFile], target: Target, progress: Progress, pace: Pace
    ) -> None:
        self._begin(chain, Index(chain, [file.reader for file in files]), target, progress, pace)
        self._files = files

    def _begin(self, chain: Chain, index: Index, target: Target, progress: Progress, pace: Pace) -> None:
        self.chain = chain
        self.target = target
        self.progress = progress
        self._pace = pace
        self.index = index
        self.limits = chain.limits
        self.stop = threading.Event()
        self.done = 0
        self.data_bytes = 0
        self._lock = threading.Lock()
        self._jobs: queue.Queue[BlockJob | None] = queue.Queue(maxsize=64)
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each finished job

    def feed(self, workers: int) -> None:
        """Resolve the disk, window by window, and queue the jobs; then tell the workers that no more will come."""
        for start, end in windows(0, self.chain.size, _WINDOW * self.chain.cluster_size):
            jobs = self._queue_jobs(self._resolved(start, end))
            # Other targets do not need the wait, in which some workers are idle.
            if isinstance(self.target, _Completing) and self._wait_for(jobs):
                self.target.done_below(end)
        for _ in range(workers):
            self._put(None)

    def show(self) -> None:
        """Show progress.  Only the calling thread does this."""
        self.progress.advance(min(self.done, self.chain.size))

    def work(self) -> None:
        """Do jobs until there are no more.  Runs in each thread."""
        tools = _Tools(self.chain.cluster_size, self.target, lambda length: self._pace.keep(length, self.stop))
        while not self.stop.is_set():
            try:
                job = self._jobs.get(timeout=_TICK)
            except queue.Empty:
                continue
            if job is None:
                return
            self._do(job, tools)
            self._ended.put(None)

    def halt(self) -> None:
        """Make all threads return soon; the target may be one in which they would wait for ever."""
        self.stop.set()
        _abandon(self.target)

    def _resolved(self, start: int, end: int) -> _Columns:
        """Write the zeroes of a range; return the clusters with data, in the form that `block_jobs` needs."""
        cluster = self.chain.cluster_size
        first = start // cluster
        holders, entries = self._resolve(first, -(-(end - start) // cluster))
        self._write_zeroes(holders == NOBODY, start, end)
        with_data = np.flatnonzero(holders != NOBODY)
        links, used = holders[with_data], entries[with_data]
        offsets, lengths = qcow2.spans(used, cluster)
        return (
            with_data + first,
            links.astype(np.int64),
            offsets.astype(np.int64),
            lengths.astype(np.int64),
            qcow2.Reader.kinds(used) == COMPRESSED,
        )

    def _resolve(self, first: int, count: int) -> HoldersAndEntries:
        """Return which file of the chain holds each of these clusters, and the L2 entries there."""
        return self.index.resolve(first, count)

    def _write_zeroes(self, empty: np.ndarray[tuple[int], np.dtype[np.bool_]], start: int, end: int) -> None:
        cluster = self.chain.cluster_size
        starts, ends = edges(empty)
        for low, high in zip(starts.tolist(), ends.tolist(), strict=True):
            low_byte, high_byte = start + low * cluster, min(start + high * cluster, end)
            if not self.target.reads_zero:
                self.target.zero(low_byte, high_byte - low_byte)
            with self._lock:
                self.done += high_byte - low_byte
            if self.stop.is_set():
                return

    def _queue_jobs(self, columns: _Columns) -> int:
        """Make jobs of a window's clusters and queue them; return how many."""
        clusters, links, offsets, lengths, packed = columns
        # The clusters of a block are in the order of the disk, so that writes are as long as possible.
        order = np.lexsort((clusters, offsets // BLOCK, links))
        jobs = 0
        for job in block_jobs(
            links=links, clusters=clusters, offsets=offsets, lengths=lengths, packed=packed, order=order
        ):
            if self.stop.is_set():
                break
            self._put(job)
            jobs += 1
        return jobs

    def _wait_for(self, jobs: int) -> bool:
        """Wait until the workers have finished this many more jobs; False if an error stops them."""
        while jobs and not self.stop.is_set():
            self.show()
            try:
                self._ended.get(timeout=_TICK)
                jobs -= 1
            except queue.Empty:
                continue
        return not self.stop.is_set()

    def _put(self, job: BlockJob | None) -> None:
        while not self.stop.is_set():
            self.show()
            try:
                self._jobs.put(job, timeout=_TICK)
                return
            except queue.Full:
                continue

    def _do(self, job: BlockJob, tools: _Tools) -> None:
        written = tools.staging.written
        self._place_all(job, tools)
        tools.staging.flush()
        with self._lock:
            self.data_bytes += tools.staging.written - written
            self.done += len(job.clusters) * self.chain.cluster_size

    def _place_all(self, job: BlockJob, tools: _Tools) -> None:
        begins = (job.offsets - job.block * BLOCK).tolist()
        columns = zip(job.clusters.tolist(), begins, job.lengths.tolist(), job.packed.tolist(), strict=True)
        limit = self.limits[job.link]
        file = self._files[job.link].file
        with memoryview(file.block(job.block)) as content:
            for cluster, begin, length, packed in columns:
                stored = content[begin : begin + length]
                if len(stored) < length:  # a frame that ends in the next block
                    stored = memoryview(file.read_at(job.block * BLOCK + begin, length))
                self._place(tools, cluster, stored, packed, limit)
                stored.release()

    def _place(self, tools: _Tools, cluster: int, stored: memoryview, packed: bool, limit: int) -> None:  # noqa: FBT001
        """Place one cluster in the staging memory: cut at the end of the disk, and zero from the link's limit on."""
        size = self.chain.cluster_size
        start = cluster * size
        length = min(size, self.chain.size - start)
        room = tools.staging.room(start, length)
        if packed:
            tools.codec.decode_into(stored, room)
        else:
            room[:] = stored
        visible = limit - start
        if visible < length:
            room[visible:] = bytes(size - visible)

    def restored(self) -> Restored:
        """Return the result."""
        return Restored(self.chain.size, self.data_bytes)


class SalvageRun(RestoreRun):
    """The restore of a damaged chain, which lists the ranges that could not be verified."""

    def __init__(
        self, chain: Chain, files: Sequence[SalvagedFile], target: Target, progress: Progress, pace: Pace
    ) -> None:
        self._begin(chain, Index(chain, files), target, progress, pace)
        self._salvaged = files
        self._lost = LostRanges()

    def _resolve(self, first: int, count: int) -> HoldersAndEntries:
        resolved = self.index.resolve(first, count)
        with self._lock:
            salvage.drop_unknown(self.chain, self._salvaged, first, resolved, self._lost)
        return resolved

    def _place_all(self, job: BlockJob, tools: _Tools) -> None:
        file, limit = self._salvaged[job.link], self.limits[job.link]
        columns = (job.clusters.tolist(), job.offsets.tolist(), job.lengths.tolist(), job.packed.tolist())
        for cluster, offset, length, packed in zip(*columns, strict=True):
            doubt = file.read(offset, length, tools.codec if packed else None, tools.cluster)
            self._place(tools, cluster, tools.cluster, False, limit)  # noqa: FBT003
            if doubt is not None:
                start, (content, why) = cluster * self.chain.cluster_size, doubt
                with self._lock:
                    self._lost.add(start, min(start + self.chain.cluster_size, limit), why, content)

    def restored(self) -> Restored:
        """Return the result, with the lost ranges."""
        return Restored(self.chain.size, self.data_bytes, self._lost.list())


class _Tools:
    """The codec and the memory of one thread; `before` is called with the length (bytes) of each coming write."""

    def __init__(self, cluster_size: int, target: Target, before: Callable[[int], object]) -> None:
        self.codec = Codec(cluster_size, None)
        self.cluster = memoryview(bytearray(cluster_size))
        self.staging = _Staging(target, cluster_size, before)


class _Staging:
    """
    Joins neighbouring clusters into one write, since a system call for each cluster would cost more than the write.

    The memory begins at a page boundary, as O_DIRECT requires, and is used again, since new memory costs a page fault
    for each 4 KiB.
    """

    def __init__(self, target: Target, cluster_size: int, before: Callable[[int], object]) -> None:
        self.written = 0
        self._target = target
        self._before = before
        self._cluster_size = cluster_size
        self._memory = pages(_STAGED)
        self._start = self._length = 0

    def room(self, offset: int, length: int) -> memoryview:
        """Return the memory for a cluster of which `length` bytes will be written at `offset`."""
        if offset != self._start + self._length or self._length + self._cluster_size > _STAGED:
            self.flush()
            self._start = offset
        at = self._length
        self._length += length
        return self._memory[at : at + self._cluster_size]

    def flush(self) -> None:
        """Write the clusters that were gathered."""
        if self._length:
            self._before(self._length)
            self._target.write(self._start, self._memory[: self._length])
            self.written += self._length
            self._length = 0
