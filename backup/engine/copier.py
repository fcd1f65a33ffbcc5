"""
The copier: runs a plan, reading from a source and storing into a sink, several requests at a time.

    plan -> batches (ascending) -> threads, each: read a batch through a connection, reads in flight,
                                   then store it: zero test, compression, digests, writing

A thread stores what it has read, which is in the processor's cache still, and others read meanwhile.  Where there are
fewer connections than threads, one is handed on with the next batch under way.

Every byte is moved, hashed and compressed by code that releases the GIL.  Memory is bounded by the number of buffers,
which are made once and go round, the one that came back last first.  The first error, or a signal in the calling
thread, stops all threads promptly.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from backup.model.extents import Offsets
from backup.model.open_disk import Lane, OpenDisk
from backup.planning.plan import DATA, Plan, cluster_runs
from backup.runtime.direct_io import pages
from backup.runtime.pace import Pace
from backup.runtime.threads import run_threads

_TICK = 0.1
"""Seconds between looks at the stop flag: how long a stop may take to be noticed."""


class Sink(Protocol):
    """Where clusters go; safe to call from several threads."""

    batch: int
    """Bytes that it takes best at once."""

    def write(self, clusters: Offsets, data: memoryview) -> int:
        """Store whole clusters with these numbers, ascending; returns how many of them are all zeroes."""

    def zero(self, first_cluster: int, count: int) -> None:
        """Record clusters that read as zero."""

    def completed_below(self, cluster: int) -> None:
        """Nothing will come for clusters below this one any more."""


@dataclass(frozen=True, slots=True)
class Settings:
    """
    How much happens at once.

    Each of `connections` has at most `requests` reads in flight, each of at most `request_size` bytes; `workers` is the
    number of cores to keep busy.  Buffers take no more than `buffer_limit` bytes.  The source is read at no more than
    `limit` bytes a second (None: as fast as it can).
    """

    connections: int = 4
    requests: int = 16
    request_size: int = 1 << 19
    workers: int = 2
    buffer_limit: int = 64 << 20
    limit: int | None = None

    def within(self, most: int | None) -> Settings:
        """The same with no more than `most` reads in flight on a connection (None: as many as there are)."""
        return self if most is None else replace(self, requests=min(self.requests, most))

    def threads(self, lanes: int) -> int:
        """One for each connection, and one more than there are cores: while one waits for the disk, others go on."""
        return max(self.workers + 1, lanes)

    def buffers(self, lanes: int, batch: int) -> int:
        """Number of buffers of `batch` bytes: one for each thread, and for reads ahead of them."""
        wanted = self.threads(lanes) + -(-lanes * self.requests * self.request_size // batch)
        return max(1, min(wanted, self.buffer_limit // batch))

    def batch(self, data: int, cluster_size: int, most: int) -> int:
        """
        Bytes of a buffer for `data` bytes in all: `most`, what the sink takes best, but less where that would leave
        workers idle, and never less than one read.
        """
        share = data // (_BATCHES_EACH * self.workers)
        size = max(self.request_size, min(most, share))
        return max(cluster_size, size // cluster_size * cluster_size)


_BATCHES_EACH = 4
"""Batches that each worker should get at the least: the last ones are done by some while others have none."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of data that lies in one buffer: guest offset and length in bytes, place in the buffer."""

    offset: int
    length: int
    at: int


@dataclass(slots=True)
class Batch:
    """Pieces that share a buffer, so that scattered small runs are read and stored together."""

    pieces: list[Piece]
    buffer: memoryview = field(default_factory=lambda: memoryview(b""))
    waiting: int = 0

    @property
    def first(self) -> int:
        """Lowest guest offset."""
        return self.pieces[0].offset


def copy_disk(plan: Plan, disk: OpenDisk, sink: Sink, settings: Settings, progress: Callable[[int], None]) -> int:
    """
    Read the plan's data from `disk`, as far as the disk's limits allow `settings`; see `copy`.

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
    settings: Settings,
    *,
    max_request: int,
    progress: Callable[[int], None],
    smallest_request: int = 1,
) -> int:
    """
    Read the plan's data through `lanes` and store it, and its zeroes, in `sink`.

    `max_request` is the server's largest read (bytes), a multiple of `smallest_request`, to whose multiples the lanes
    round each read out.  `progress` is called in this thread with the bytes done so far.

    Returns
    -------
    int
        Bytes of clusters that were read as data and turned out to be all zeroes.
    """
    run = _Run(plan, sink, settings, lanes, max_request=max_request, smallest=smallest_request)
    run_threads(run.work, run.threads, lambda: progress(run.done), run.halt)
    if run.done != plan.totals.data:
        raise RuntimeError(f"{run.done} bytes were stored of {plan.totals.data}")
    progress(run.done)
    return min(run.found_zero * plan.cluster_size, plan.totals.data)  # the disk's last cluster may be partial


@dataclass(slots=True)
class _Channel:
    """
    A connection and what was begun on it.

    `begun` are batches of which answers are missing, the oldest first; `waiting` are reads not asked for yet, and `due`
    is when the first of them may be (None: that was not found out yet).
    """

    lane: Lane
    begun: deque[Batch] = field(default_factory=deque)
    waiting: deque[tuple[int, memoryview, Batch]] = field(default_factory=deque)
    due: float | None = None

    @property
    def enough(self) -> int:
        """Answers to wait for: until it pays to ask for more, or a batch is whole.  A look at each would cost more."""
        return max(1, self.lane.in_flight // 2) if self.waiting else self.begun[0].waiting

    def arrived(self, tokens: list[object]) -> list[Batch]:
        """Take note of answers; the batches that are whole now."""
        for batch in tokens:
            assert isinstance(batch, Batch)
            batch.waiting -= 1
        whole = [batch for batch in self.begun if not batch.waiting]
        for batch in whole:
            self.begun.remove(batch)
        return whole


class _Jobs:
    """
    What threads do next, first in, first out: read on through a channel, or store a batch that is whole.

    Safe to use from several threads.  Nothing waits here with a time limit: of several threads in SimpleQueue.get with
    a timeout, one may be woken for what another one took, and then waits for ever (CPython 3.11).  `end` wakes all.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._jobs: queue.SimpleQueue[_Channel | Batch | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.idle = 0
        """Threads that wait, less what waits for them: above 0, what is put is taken at once."""

    def take(self) -> _Channel | Batch | None:
        """Wait for a job; None: there will be no more."""
        with self._lock:
            self.idle += 1
        return self._jobs.get()

    def put(self, job: _Channel | Batch) -> None:
        with self._lock:
            self.idle -= 1
            self._jobs.put(job)

    def offer(self, job: _Channel) -> bool:
        """Put a job if a thread waits for it."""
        with self._lock:
            if self.idle <= 0:
                return False
            self.idle -= 1
            self._jobs.put(job)
            return True

    def end(self) -> None:
        """Let all threads go."""
        for _ in range(self._threads):
            self._jobs.put(None)


class _Run:
    """What the threads of one copy share."""

    def __init__(
        self, plan: Plan, sink: Sink, settings: Settings, lanes: Sequence[Lane], *, max_request: int, smallest: int
    ) -> None:
        self.plan = plan
        self.sink = sink
        self.stop = threading.Event()
        self.done = 0
        self.found_zero = 0
        self._request_size = min(max(settings.request_size - settings.request_size % smallest, smallest), max_request)
        self._smallest = smallest
        self._requests = settings.requests
        self._batch = settings.batch(plan.totals.data, plan.cluster_size, sink.batch)
        # No more buffers than there is data for: an idle night needs none.
        count = max(1, min(settings.buffers(len(lanes), self._batch), -(-plan.totals.data // self._batch)))
        self._free = _Stack([pages(self._batch) for _ in range(count)])
        self.threads = min(count, settings.threads(len(lanes)))
        self._jobs = _Jobs(self.threads)
        channels = [_Channel(lane) for lane in lanes[: self.threads]]
        for channel in channels:
            self._jobs.put(channel)
        self._open = len(channels)
        self._lock = threading.Lock()
        self._batches: Iterator[Batch] | None = self._cut()
        self._outstanding: dict[int, None] = {}
        self._issued = 0
        self._pace = Pace(settings.limit)

    def work(self) -> None:
        """Read batches and store them until there are no more; the first error stops the whole copy."""
        while (job := self._jobs.take()) is not None and not self.stop.is_set():
            batch = self._read(job) if isinstance(job, _Channel) else job
            if batch is not None:
                self._store(batch)

    def halt(self) -> None:
        """Have all threads end within moments."""
        self.stop.set()
        self._jobs.end()
        self._free.end(self.threads)

    def _read(self, channel: _Channel) -> Batch | None:
        """
        Read through a channel until a batch is whole, and leave the channel to others; None: there is no more.

        What was asked for is taken as it comes, whatever else is waited for: a running machine's QEMU that has to stop
        its guest for a moment waits for those answers to be taken.  So the channel is left only when it has none under
        way or another thread takes it, and no more than a batch is asked for while none would.
        """
        lane = channel.lane
        whole: list[Batch] = []
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
        """A channel is needed no more."""
        with self._lock:
            self._open -= 1
            self._end_if_done()

    def _end_if_done(self) -> None:
        """Let all threads go when the last channel is closed and the last batch stored; under the lock."""
        if not self._open and not self._outstanding:
            self._jobs.end()

    def _ask(self, channel: _Channel) -> None:
        """Have as many reads in flight as may be."""
        while channel.lane.in_flight < self._requests:
            if not (channel.waiting or self._begin(channel)) or not self._in_time(channel):
                return
            channel.lane.submit(*channel.waiting.popleft())

    def _begin(self, channel: _Channel) -> bool:
        """Begin a batch, if there is one and a buffer for it; ahead of another only if a thread could go on with it."""
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
        """May the next read be asked for already?  Waits for that where no answer is to come meanwhile."""
        if channel.due is None:
            channel.due = self._pace.due(len(channel.waiting[0][1]))
        left = channel.due - time.monotonic()
        if left > 0 and (channel.lane.in_flight or self.stop.wait(left)):
            return False
        channel.due = None
        return True

    def _next(self, *, patient: bool) -> Batch | None:
        """The next batch with a buffer, or None: no buffer just now, or (then _batches is None) no more batches."""
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

    def _store(self, batch: Batch) -> None:
        cluster = self.plan.cluster_size
        last = batch.pieces[-1]
        end = last.at + -(-last.length // cluster) * cluster
        # Only the disk's last cluster is partial, and it is the last of its batch.
        batch.buffer[last.at + last.length : end] = bytes(end - last.at - last.length)
        with batch.buffer[:end] as data:
            zeroes = self.sink.write(_numbers(batch.pieces, cluster), data)
        self._free.push(batch.buffer)
        with self._lock:
            del self._outstanding[batch.first]
            # Batches are handed out in ascending order, so the oldest outstanding one is the lowest.
            low = next(iter(self._outstanding), self._issued)
            self.found_zero += zeroes
            self.done += sum(piece.length for piece in batch.pieces)
            self._end_if_done()
        self.sink.completed_below(low // cluster)

    def _cut(self) -> Iterator[Batch]:
        """Cut the plan's data into batches that fit a buffer; zeroes go straight to the sink, in passing."""
        cluster = self.plan.cluster_size
        pieces: list[Piece] = []
        filled = 0
        for first, kinds in self.plan.windows():
            for start, length, kind in cluster_runs(first, kinds, cluster, self.plan.size):
                if kind != DATA:
                    self.sink.zero(start // cluster, -(-length // cluster))
                    continue
                end = start + length
                while start < end:
                    count = min(end - start, self._batch - filled)
                    pieces.append(Piece(start, count, filled))
                    start += count
                    filled += -(-count // cluster) * cluster
                    if filled == self._batch:
                        yield Batch(pieces)
                        pieces, filled = [], 0
        if pieces:
            yield Batch(pieces)


class _Stack:
    """Buffers that are free, last in, first out; safe to use from several threads."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = deque(buffers)
        self._there: queue.SimpleQueue[None] = queue.SimpleQueue()  # queue.LifoQueue is Python, and 10 times slower
        for _ in self._buffers:
            self._there.put(None)

    def push(self, buffer: memoryview) -> None:
        self._buffers.append(buffer)
        self._there.put(None)

    def pop(self, *, wait: bool) -> memoryview | None:
        """Take a buffer; None: there is none just now, or (having waited) there will be no more."""
        try:
            self._there.get(block=wait)
            return self._buffers.pop()
        except (queue.Empty, IndexError):
            return None

    def end(self, threads: int) -> None:
        """Let so many threads go that wait for a buffer, or will."""
        for _ in range(threads):
            self._there.put(None)


def _numbers(pieces: Sequence[Piece], cluster_size: int) -> Offsets:
    """Numbers of the clusters that pieces cover, in order."""
    firsts = np.array([piece.offset // cluster_size for piece in pieces], np.int64)
    counts = np.array([-(-piece.length // cluster_size) for piece in pieces], np.int64)
    ends = np.cumsum(counts)
    return np.repeat(firsts - (ends - counts), counts) + np.arange(int(ends[-1]))


def _requests(batch: Batch, size: int, smallest: int) -> list[tuple[int, memoryview, Batch]]:
    """The reads that fill a batch, none above `size` bytes when it is rounded out to multiples of `smallest`."""
    view = batch.buffer
    found = [
        (low, view[piece.at + low - piece.offset : piece.at + high - piece.offset], batch)
        for piece in batch.pieces
        for low, high in _cut(piece.offset, piece.offset + piece.length, size, smallest)
    ]
    batch.waiting = len(found)
    return found


def _cut(start: int, end: int, size: int, smallest: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) into `size` bytes each, counted from the multiple of `smallest` that start lies behind."""
    low = start
    for high in (*range(start - start % smallest + size, end, size), end):
        yield low, high
        low = high
