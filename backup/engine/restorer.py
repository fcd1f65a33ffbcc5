"""The threads of a restore: read the newest holder of each cluster, check it, write it to the target."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np

from backup import qcow2
from backup.engine.targets import Target
from backup.errors import BackupError
from backup.model.chain import Chain
from backup.model.digests import BLOCK
from backup.model.extents import Offsets, edges, windows
from backup.qcow2 import COMPRESSED, Codec
from backup.repository import salvage
from backup.repository.cluster_index import NOBODY, Found, Index
from backup.repository.data_file import OpenDataFile
from backup.repository.salvage import Lost, LostRanges, SalvagedFile
from backup.runtime.direct_io import pages
from backup.runtime.pace import Pace
from backup.runtime.progress import Progress

_WINDOW = 1 << 20
"""
Clusters of the disk resolved at once, about 40 bytes of memory each.  Large, so that each file's tables and data are
passed over few times; 64 GiB of a disk with clusters of 64 KiB.  Whole L2 tables for every size of cluster.
"""
_STAGED = BLOCK
"""Bytes written at once at most; a multiple of every cluster size."""
_TICK = 0.1
"""Seconds between looks at progress and signals."""


@dataclass(frozen=True, slots=True)
class Restored:
    """
    Bytes of the disk, and of these written as data; the others read as zeroes.

    `lost` are the ranges that a salvage could not prove.
    """

    size: int
    data_bytes: int
    lost: tuple[Lost, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Clusters whose stored bytes begin in one block of one file, in the disk's order."""

    number: int
    block: int
    clusters: Offsets
    offsets: Offsets
    lengths: Offsets
    kinds: np.ndarray[tuple[int], np.dtype[np.uint8]]


@runtime_checkable
class _Completing(Protocol):
    """A target that keeps something in memory for what may still be written."""

    def done_below(self, offset: int) -> None:
        """Nothing below this byte comes any more, or is under way."""


def write_out(run: Run, workers: int) -> Restored:
    """
    Run a restore's threads until the target holds the disk.

    Raises
    ------
    BackupError
        A thread failed: a block is damaged, or the target cannot be written.
    """
    # One more than there are cores for: while one waits for the disk, the others decode.
    threads = [threading.Thread(target=run.work) for _ in range(workers + 1)]
    try:
        for thread in threads:
            thread.start()
        run.feed(len(threads))
        for thread in threads:
            while thread.is_alive() and not run.stop.is_set():
                thread.join(_TICK)
                run.show()
    except BackupError:
        # A worker's error ends what this thread waits for with an error that only says so.
        if run.error is None:
            raise
    finally:
        run.stop.set()
        if any(thread.is_alive() for thread in threads):
            _abandon(run.target)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if run.error is not None:
        raise run.error
    return run.restored()


def _abandon(target: Target) -> None:
    """Have a target that can wait for ever (an NBD server) let go of the threads that write to it."""
    abandon = getattr(target, "abandon", None)
    if abandon is not None:
        abandon()


class Run:
    """What the threads of one restore share."""

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
        self.error: BaseException | None = None
        self.done = 0
        self.data_bytes = 0
        self._lock = threading.Lock()
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=64)
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each job done

    def feed(self, workers: int) -> None:
        """Resolve the disk window by window and hand out the work."""
        for start, end in windows(0, self.chain.size, _WINDOW * self.chain.cluster_size):
            jobs = self._hand_out(self._resolved(start, end))
            # Others are spared the wait, in which the workers run dry.
            if isinstance(self.target, _Completing) and self._await(jobs):
                self.target.done_below(end)
        for _ in range(workers):
            self._put(None)

    def show(self) -> None:
        """Show how far it is; in the calling thread only."""
        self.progress.advance(min(self.done, self.chain.size))

    def work(self) -> None:
        """Do jobs until there are no more; the first error stops all."""
        try:
            hand = _Hand(self.chain.cluster_size, self.target, lambda length: self._pace.keep(length, self.stop))
            while not self.stop.is_set():
                try:
                    job = self._jobs.get(timeout=_TICK)
                except queue.Empty:
                    continue
                if job is None:
                    return
                self._do(job, hand)
                self._ended.put(None)
        except BaseException as error:  # noqa: BLE001 - carried to the calling thread, which raises it
            with self._lock:
                self.error = self.error or error
            self.stop.set()
            _abandon(self.target)  # the feeding thread may wait in it for ever

    def _resolved(self, start: int, end: int) -> tuple[Offsets, ...]:
        """Cluster, link, host offset, length and kind of each cluster that holds data; zeroes are written at once."""
        cluster = self.chain.cluster_size
        first = start // cluster
        holders, entries = self._resolve(first, -(-(end - start) // cluster))
        self._write_zeroes(holders == NOBODY, start, end)
        held = np.flatnonzero(holders != NOBODY)
        links, found = holders[held], entries[held]
        offsets, lengths = qcow2.spans(found, cluster)
        return (
            held + first,
            links.astype(np.int64),
            offsets.astype(np.int64),
            lengths.astype(np.int64),
            qcow2.Reader.kinds(found).astype(np.int64),
        )

    def _resolve(self, first: int, count: int) -> Found:
        """Who holds each of these clusters, and the entry there."""
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

    def _hand_out(self, columns: tuple[Offsets, ...]) -> int:
        """Make jobs of a window and queue them; how many."""
        # Of one block in the disk's order: the longest writes.
        order = np.lexsort((columns[0], columns[2] // BLOCK, columns[1]))
        clusters, links, offsets, lengths, kinds = (column[order] for column in columns)
        blocks = offsets // BLOCK
        changes = np.flatnonzero((np.diff(links) != 0) | (np.diff(blocks) != 0)) + 1
        bounds = [0, *changes.tolist(), len(clusters)]
        jobs = 0
        for low, high in pairwise(bounds):
            if low == high or self.stop.is_set():
                break
            here = slice(low, high)
            job = _Job(
                int(links[low]),
                int(blocks[low]),
                clusters[here],
                offsets[here],
                lengths[here],
                kinds[here].astype(np.uint8),
            )
            self._put(job)
            jobs += 1
        return jobs

    def _await(self, jobs: int) -> bool:
        """Wait until the workers have done so many jobs more; False where an error keeps them from it."""
        while jobs and not self.stop.is_set():
            self.show()
            try:
                self._ended.get(timeout=_TICK)
                jobs -= 1
            except queue.Empty:
                continue
        return not self.stop.is_set()

    def _put(self, job: _Job | None) -> None:
        while not self.stop.is_set():
            self.show()
            try:
                self._jobs.put(job, timeout=_TICK)
                return
            except queue.Full:
                continue

    def _do(self, job: _Job, hand: _Hand) -> None:
        written = hand.staging.written
        self._place_all(job, hand)
        hand.staging.flush()
        with self._lock:
            self.data_bytes += hand.staging.written - written
            self.done += len(job.clusters) * self.chain.cluster_size

    def _place_all(self, job: _Job, hand: _Hand) -> None:
        begins = (job.offsets - job.block * BLOCK).tolist()
        columns = zip(job.clusters.tolist(), begins, job.lengths.tolist(), job.kinds.tolist(), strict=True)
        limit = self.limits[job.number]
        file = self._files[job.number].file
        with memoryview(file.block(job.block)) as content:
            for cluster, begin, length, kind in columns:
                stored = content[begin : begin + length]
                if len(stored) < length:  # a frame that crosses into the next block
                    stored = memoryview(file.read_at(job.block * BLOCK + begin, length))
                self._place(hand, cluster, stored, kind == COMPRESSED, limit)
                stored.release()

    def _place(self, hand: _Hand, cluster: int, stored: memoryview, packed: bool, limit: int) -> None:  # noqa: FBT001
        """One cluster to where it is written from: cut at the disk's end, and zero from the link's limit on."""
        size = self.chain.cluster_size
        start = cluster * size
        length = min(size, self.chain.size - start)
        room = hand.staging.room(start, length)
        if packed:
            hand.codec.decode_into(stored, room)
        else:
            room[:] = stored
        visible = limit - start
        if visible < length:
            room[visible:] = bytes(size - visible)

    def restored(self) -> Restored:
        """What came of it."""
        return Restored(self.chain.size, self.data_bytes)


class SalvageRun(Run):
    """The same of a chain that is damaged: what is not proven is listed."""

    def __init__(
        self, chain: Chain, files: Sequence[SalvagedFile], target: Target, progress: Progress, pace: Pace
    ) -> None:
        self._begin(chain, Index(chain, files), target, progress, pace)
        self._salvaged = files
        self._lost = LostRanges()

    def _resolve(self, first: int, count: int) -> Found:
        found = self.index.resolve(first, count)
        with self._lock:
            salvage.drop_unknown(self.chain, self._salvaged, first, found, self._lost)
        return found

    def _place_all(self, job: _Job, hand: _Hand) -> None:
        file, limit = self._salvaged[job.number], self.limits[job.number]
        columns = (job.clusters.tolist(), job.offsets.tolist(), job.lengths.tolist(), job.kinds.tolist())
        for cluster, offset, length, kind in zip(*columns, strict=True):
            doubt = file.read(offset, length, hand.codec if kind == COMPRESSED else None, hand.cluster)
            self._place(hand, cluster, hand.cluster, False, limit)  # noqa: FBT003
            if doubt is not None:
                start, (content, why) = cluster * self.chain.cluster_size, doubt
                with self._lock:
                    self._lost.add(start, min(start + self.chain.cluster_size, limit), why, content)

    def restored(self) -> Restored:
        """What came of it, with what is lost."""
        return Restored(self.chain.size, self.data_bytes, self._lost.list())


class _Hand:
    """What one thread works with; `before` is called with the bytes of each write before it."""

    def __init__(self, cluster_size: int, target: Target, before: Callable[[int], object]) -> None:
        self.codec = Codec(cluster_size, None)
        self.cluster = memoryview(bytearray(cluster_size))
        self.staging = _Staging(target, cluster_size, before)


class _Staging:
    """
    Joins neighbouring clusters into one write; a system call for each would cost more than the write.

    Its memory begins on a page, as O_DIRECT demands, and is used again: fresh memory costs a page fault for each 4 KiB.
    """

    def __init__(self, target: Target, cluster_size: int, before: Callable[[int], object]) -> None:
        self.written = 0
        self._target = target
        self._before = before
        self._cluster_size = cluster_size
        self._memory = pages(_STAGED)
        self._start = self._length = 0

    def room(self, offset: int, length: int) -> memoryview:
        """Where a cluster is to be put of which `length` bytes will be written at `offset`."""
        if offset != self._start + self._length or self._length + self._cluster_size > _STAGED:
            self.flush()
            self._start = offset
        at = self._length
        self._length += length
        return self._memory[at : at + self._cluster_size]

    def flush(self) -> None:
        """Write what was gathered."""
        if self._length:
            self._before(self._length)
            self._target.write(self._start, self._memory[: self._length])
            self.written += self._length
            self._length = 0
