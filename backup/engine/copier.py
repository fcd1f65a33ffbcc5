"""
The copier: executes a plan, with several requests to the source at a time, and passes the data to a sink.

    plan -> batches (ascending) -> threads, each: read a batch through a connection, with several reads in flight,
                                   then store it: zero test, compression, digests, writing

A thread stores the batch that it has read, while the data is still in the processor's cache, and other threads read in
the meantime.  If there are fewer connections than threads, a thread passes its connection on before it stores, with
the reads of the next batch in flight.

All code that moves, hashes or compresses data releases the GIL.  The number of buffers limits the memory; they are
allocated once and used again, the most recently used one first.  The first error, or a signal in the calling thread,
stops all threads promptly.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from backup.engine.copy_settings import CopySettings
from backup.model.extents import Offsets
from backup.model.open_disk import Lane, OpenDisk
from backup.planning.plan import DATA, Plan, cluster_runs
from backup.runtime.direct_io import pages
from backup.runtime.pace import Pace
from backup.runtime.threads import run_threads

_TICK = 0.1
"""Seconds between two checks of the stop flag; a stop may take as long."""


class Sink(Protocol):
    """The receiver of clusters.  Safe to use from several threads."""

    batch: int
    """The batch size in bytes that the sink handles best."""

    def write(self, clusters: Offsets, data: memoryview) -> int:
        """Store whole clusters with these numbers, ascending; return how many of them are all zeroes."""

    def zero(self, first_cluster: int, count: int) -> None:
        """Record clusters that read as zeroes."""

    def completed_below(self, cluster: int) -> None:
        """Take note that no call for a cluster below this one will follow."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of data in a buffer: its guest offset and length in bytes, and its place in the buffer."""

    offset: int
    length: int
    at: int


@dataclass(slots=True)
class _Batch:
    """
    Pieces that share a buffer, so that small scattered runs are stored together; `waiting` counts reads in flight.
    """

    pieces: list[_Piece]
    buffer: memoryview = field(default_factory=lambda: memoryview(b""))
    waiting: int = 0

    @property
    def first(self) -> int:
        """The lowest guest offset (bytes)."""
        return self.pieces[0].offset


def copy_disk(plan: Plan, disk: OpenDisk, sink: Sink, settings: CopySettings, progress: Callable[[int], None]) -> int:
    """
    Read the plan's data from `disk`, within the limits of the disk; see `copy`.

    Raises
    ------
    SourceError
        The disk cannot be read.
    """
    settings = settings.within(disk.max_in_flight)
    with disk.lanes(settings.connections) as lanes:
        return copy(
            plan,
            lanes,
            sink,
            settings,
            max_request=disk.max_request,
            smallest_request=disk.smallest_request,
            progress=progress,
        )


def copy(
    plan: Plan,
    lanes: Sequence[Lane],
    sink: Sink,
    settings: CopySettings,
    *,
    max_request: int,
    progress: Callable[[int], None],
    smallest_request: int = 1,
) -> int:
    """
    Read the plan's data through `lanes`; store the data, and the plan's zeroes, in `sink`.

    `max_request` is the largest read of the server (bytes), a multiple of `smallest_request`.  The lanes extend each
    read to multiples of `smallest_request`.  `progress` is called in this thread with the number of bytes finished.

    Returns
    -------
    int
        Bytes of the clusters that were read as data and consist of zeroes.
    """
    run = _CopyRun(plan, sink, settings, lanes, max_request=max_request, smallest=smallest_request)
    run_threads(run.work, run.threads, lambda: progress(run.done), run.halt)
    if run.done != plan.totals.data:
        raise RuntimeError(f"{run.done} bytes were stored of {plan.totals.data}")
    progress(run.done)
    return min(run.zero_clusters * plan.cluster_size, plan.totals.data)  # the last cluster of the disk may be partial


@dataclass(slots=True)
class _Channel:
    """
    A connection with the batches and reads that were begun on it.

    `begun` are the batches that wait for answers, oldest first.  `waiting` are the reads that were not submitted yet.
    `due` is the time at which the rate limit allows the first of them; None if it was not computed yet.
    """

    lane: Lane
    begun: deque[_Batch] = field(default_factory=deque)
    waiting: deque[tuple[int, memoryview, _Batch]] = field(default_factory=deque)
    due: float | None = None

    @property
    def enough(self) -> int:
        """Number of answers to wait for, until more reads are worth submitting or a batch is whole."""
        return max(1, self.lane.in_flight // 2) if self.waiting else self.begun[0].waiting

    def arrived(self, tokens: list[object]) -> list[_Batch]:
        """Take note of answers; return the batches that are now whole."""
        for batch in tokens:
            assert isinstance(batch, _Batch)
            batch.waiting -= 1
        whole = [batch for batch in self.begun if not batch.waiting]
        for batch in whole:
            self.begun.remove(batch)
        return whole


class _Jobs:
    """
    The jobs of the threads, first in, first out: read more through a channel, or store a whole batch.

    Safe to use from several threads.  No thread waits here with a time limit, because of a bug in CPython 3.11: of
    several threads in SimpleQueue.get with a timeout, one may be woken for an item that another one took, and then
    waits for ever.  `end` wakes all threads.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._jobs: queue.SimpleQueue[_Channel | _Batch | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.idle = 0
        """Waiting threads minus waiting jobs.  If this is positive, a job that is put is taken at once."""

    def take(self) -> _Channel | _Batch | None:
        """Wait for a job; None means that no more jobs will come."""
        with self._lock:
            self.idle += 1
        return self._jobs.get()

    def put(self, job: _Channel | _Batch) -> None:
        with self._lock:
            self.idle -= 1
            self._jobs.put(job)

    def offer(self, job: _Channel) -> bool:
        """Put a job only if a thread waits for one; return whether it was put."""
        with self._lock:
            if self.idle <= 0:
                return False
            self.idle -= 1
            self._jobs.put(job)
            return True

    def end(self) -> None:
        """Make all threads return."""
        for _ in range(self._threads):
            self._jobs.put(None)


class _CopyRun:
    """The state that the threads of one copy share."""

    def __init__(
        self, plan: Plan, sink: Sink, settings: CopySettings, lanes: Sequence[Lane], *, max_request: int, smallest: int
    ) -> None:
        self.plan = plan
        self.sink = sink
        self.stop = threading.Event()
        self.done = 0
        self.zero_clusters = 0
        self._request_size = min(max(settings.request_size - settings.request_size % smallest, smallest), max_request)
        self._smallest = smallest
        self._requests = settings.requests
        self._batch = settings.batch(plan.totals.data, plan.cluster_size, sink.batch)
        # There are no more buffers than data needs; a night without changes needs none.
        count = max(1, min(settings.buffers(len(lanes), self._batch), -(-plan.totals.data // self._batch)))
        self._free = _Stack([pages(self._batch) for _ in range(count)])
        self.threads = min(count, settings.threads(len(lanes)))
        self._jobs = _Jobs(self.threads)
        channels = [_Channel(lane) for lane in lanes[: self.threads]]
        for channel in channels:
            self._jobs.put(channel)
        self._open = len(channels)
        self._lock = threading.Lock()
        self._batches: Iterator[_Batch] | None = self._cut()
        self._outstanding: dict[int, None] = {}
        self._issued = 0
        self._pace = Pace(settings.limit)

    def work(self) -> None:
        """Read and store batches until there are no more.  Runs in each thread."""
        while (job := self._jobs.take()) is not None and not self.stop.is_set():
            batch = self._read(job) if isinstance(job, _Channel) else job
            if batch is not None:
                self._store(batch)

    def halt(self) -> None:
        """Make all threads return within moments."""
        self.stop.set()
        self._jobs.end()
        self._free.end(self.threads)

    def _read(self, channel: _Channel) -> _Batch | None:
        """
        Read through a channel until a batch is whole, and then leave the channel to other threads.

        Returns None if there is nothing more to read.

        Answers must be received as they come, whatever the threads wait for: a running machine's QEMU that stops its
        guest for a moment waits until all answers are received.  So a thread leaves a channel only if no reads are in
        flight, or if another thread takes the channel.  As long as no other thread would take it, reads for only one
        batch are in flight.
        """
        lane = channel.lane
        whole: list[_Batch] = []
        while not self.stop.is_set():
            if not whole:
                self._ask(channel)
            if lane.in_flight:
                whole += channel.arrived(lane.wait(int(_TICK * 1000), channel.enough))
            if lane.in_flight:
                if whole and self._jobs.offer(channel):
                    break
            elif whole:
                self._jobs.put(channel)
                break
            elif self._batches is None and not channel.begun:
                self._close()
                break
        for batch in whole[1:]:
            self._jobs.put(batch)
        return whole[0] if whole else None

    def _close(self) -> None:
        """Take note that a channel is not needed any more."""
        with self._lock:
            self._open -= 1
            self._end_if_done()

    def _end_if_done(self) -> None:
        """Make all threads return after the last channel is closed and the last batch stored.  Call under the lock."""
        if not self._open and not self._outstanding:
            self._jobs.end()

    def _ask(self, channel: _Channel) -> None:
        """Submit as many reads as the settings allow."""
        while channel.lane.in_flight < self._requests:
            if not (channel.waiting or self._begin(channel)) or not self._in_time(channel):
                return
            channel.lane.submit(*channel.waiting.popleft())

    def _begin(self, channel: _Channel) -> bool:
        """Begin a batch if there is one, and a buffer; a second one only if another thread could continue with it."""
        ahead = bool(channel.begun)
        if self._batches is None or (ahead and self._jobs.idle <= 0):
            return False
        batch = self._next(patient=not ahead)
        if batch is None:
            return False
        channel.begun.append(batch)
        channel.waiting.extend(_requests(batch, self._request_size, self._smallest))
        return True

    def _in_time(self, channel: _Channel) -> bool:
        """
        Tell whether the rate limit allows the next read now; wait for that only if no answer can arrive meanwhile.
        """
        if channel.due is None:
            channel.due = self._pace.due(len(channel.waiting[0][1]))
        left = channel.due - time.monotonic()
        if left > 0 and (channel.lane.in_flight or self.stop.wait(left)):
            return False
        channel.due = None
        return True

    def _next(self, *, patient: bool) -> _Batch | None:
        """
        Return the next batch, with a buffer; None if no buffer is free now, or no batch is left (_batches is None).
        """
        buffer = self._free.pop(wait=patient)
        if buffer is None or self.stop.is_set():
            return None
        with self._lock:
            batch = next(self._batches, None) if self._batches is not None else None
            if batch is not None:
                batch.buffer = buffer
                self._outstanding[batch.first] = None
                self._issued = batch.pieces[-1].offset + batch.pieces[-1].length
                return batch
            self._batches = None
        self._free.push(buffer)
        return None

    def _store(self, batch: _Batch) -> None:
        cluster = self.plan.cluster_size
        last = batch.pieces[-1]
        end = last.at + -(-last.length // cluster) * cluster
        # Only the last cluster of the disk is partial, and it is the last one of its batch.
        batch.buffer[last.at + last.length : end] = bytes(end - last.at - last.length)
        with batch.buffer[:end] as data:
            zeroes = self.sink.write(_numbers(batch.pieces, cluster), data)
        self._free.push(batch.buffer)
        with self._lock:
            del self._outstanding[batch.first]
            # Batches are issued in ascending order, so the oldest outstanding one is the lowest.
            low = next(iter(self._outstanding), self._issued)
            self.zero_clusters += zeroes
            self.done += sum(piece.length for piece in batch.pieces)
            self._end_if_done()
        self.sink.completed_below(low // cluster)

    def _cut(self) -> Iterator[_Batch]:
        """Divide the plan's data into batches that fit a buffer; pass the zeroes between them directly to the sink."""
        cluster = self.plan.cluster_size
        pieces: list[_Piece] = []
        filled = 0
        for first, kinds in self.plan.windows():
            for start, length, kind in cluster_runs(first, kinds, cluster, self.plan.size):
                if kind != DATA:
                    self.sink.zero(start // cluster, -(-length // cluster))
                    continue
                end = start + length
                while start < end:
                    count = min(end - start, self._batch - filled)
                    pieces.append(_Piece(start, count, filled))
                    start += count
                    filled += -(-count // cluster) * cluster
                    if filled == self._batch:
                        yield _Batch(pieces)
                        pieces, filled = [], 0
        if pieces:
            yield _Batch(pieces)


class _Stack:
    """Free buffers, last in, first out.  Safe to use from several threads."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = deque(buffers)
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()  # queue.LifoQueue is Python code, 10 times slower
        for _ in self._buffers:
            self._free.put(None)

    def push(self, buffer: memoryview) -> None:
        self._buffers.append(buffer)
        self._free.put(None)

    def pop(self, *, wait: bool) -> memoryview | None:
        """Take a buffer; None if none is free now or, after a wait, if the copy ends."""
        try:
            self._free.get(block=wait)
            return self._buffers.pop()
        except (queue.Empty, IndexError):
            return None

    def end(self, threads: int) -> None:
        """Wake as many threads as may wait for a buffer, now or later."""
        for _ in range(threads):
            self._free.put(None)


def _numbers(pieces: Sequence[_Piece], cluster_size: int) -> Offsets:
    """Return the numbers of the clusters that the pieces cover, in order."""
    firsts = np.array([piece.offset // cluster_size for piece in pieces], np.int64)
    counts = np.array([-(-piece.length // cluster_size) for piece in pieces], np.int64)
    ends = np.cumsum(counts)
    return np.repeat(firsts - (ends - counts), counts) + np.arange(int(ends[-1]))


def _requests(batch: _Batch, size: int, smallest: int) -> list[tuple[int, memoryview, _Batch]]:
    """Return the reads that fill a batch; extended to multiples of `smallest`, none has more than `size` bytes."""
    view = batch.buffer
    reads = [
        (low, view[piece.at + low - piece.offset : piece.at + high - piece.offset], batch)
        for piece in batch.pieces
        for low, high in _cut(piece.offset, piece.offset + piece.length, size, smallest)
    ]
    batch.waiting = len(reads)
    return reads


def _cut(start: int, end: int, size: int, smallest: int) -> Iterator[tuple[int, int]]:
    """Divide [start, end) into parts of `size` bytes, counted from the last multiple of `smallest` before start."""
    low = start
    for high in (*range(start - start % smallest + size, end, size), end):
        yield low, high
        low = high
