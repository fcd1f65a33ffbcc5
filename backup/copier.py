"""
The copier: runs a plan, reading from a source and storing into a sink, several requests at a time.

    plan -> batches (ascending) -> lanes: one thread per connection, reads in flight
                                -> queue -> workers: zero test, compression, digests, writing

Every byte is moved, hashed and compressed by code that releases the GIL.  Memory is bounded by the number of buffers,
which are made once and go round, the one that came back last first: it is still in the processor's cache.  The first
error, or a signal in the calling thread, stops all threads promptly.
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

from backup.extents import Offsets
from backup.pace import Pace
from backup.pages import pages
from backup.plan import DATA, Plan, cluster_runs

_TICK = 0.1
"""Seconds between looks at the stop flag: how long a stop may take to be noticed."""
_IDLE = 0.01
"""Seconds between looks of a connection that is not needed at whether it is."""


class Lane(Protocol):
    """One connection to the source; used by one thread."""

    in_flight: int

    def submit(self, offset: int, view: memoryview, token: object) -> None:
        """Start to read len(view) bytes at offset."""

    def wait(self, milliseconds: int) -> list[object]:
        """Tokens of the reads that finished, after at most so long."""


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

    Each of `connections` has at most `requests` reads in flight, each of at most `request_size` bytes; `workers`
    threads hash, compress and write.  Buffers take no more than `buffer_limit` bytes.  The source is read at no more
    than `limit` bytes a second (None: as fast as it can).
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

    def buffers(self, lanes: int, batch: int) -> int:
        """Number of buffers of `batch` bytes: for all reads in flight, and two for each core's worker."""
        wanted = -(-lanes * self.requests * self.request_size // batch) + 2 * self.workers
        return max(2, min(wanted, self.buffer_limit // batch))

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
    """Pieces that share a buffer: one hand-over from a lane to a worker, also for scattered small runs."""

    pieces: list[Piece]
    buffer: memoryview = field(default_factory=lambda: memoryview(b""))
    waiting: int = 0

    @property
    def first(self) -> int:
        """Lowest guest offset."""
        return self.pieces[0].offset


class Depth:
    """
    How many reads are in flight: doubled for as long as that reads faster, halved where it does not.

    Many connections with deep queues hide the latency of a distant server.  With one on this machine they only drive
    its buffers and ours out of the processor's cache, and threads wait for each other: one connection reads fastest.

    Parameters
    ----------
    lanes, requests : int
        Connections, and the most that each may have in flight.
    """

    _FIRST = 8
    """In flight on a connection before another one is used."""
    _BETTER = 1.1
    """Deeper must be faster by this factor; shallower may not be slower by its root."""
    _REST, _LONGEST_REST = 4, 64
    """Measurements between two trials; doubled after each that changed nothing."""

    def __init__(self, lanes: int, requests: int) -> None:
        self._least = self.now = min(self._FIRST, requests)
        self._lanes = lanes
        self._most = lanes * requests
        self._before: tuple[int, float] | None = None  # depth and rate that the one on trial is measured against
        self._rest, self._left = self._REST, 0
        self._deeper = True

    def of(self, lane: int) -> int:
        """Reads that a connection, counted from 0, should have in flight; 0 for one that is not needed."""
        used = min(self._lanes, -(-self.now // self._least))
        return -(-self.now // used) if lane < used else 0

    def measured(self, rate: float) -> None:
        """Take note of the rate (of any unit) at the depth of now, and choose the next."""
        if self._before is None:
            self._left -= 1
            if self._left < 0:
                self._try(rate)
            return
        depth, known = self._before
        if rate >= known * (self._BETTER if self.now > depth else self._BETTER**-0.5):
            self._rest = self._REST
            self._try(rate)  # on in the same direction
            return
        self.now = depth
        self._settle()

    def _try(self, rate: float) -> None:
        wanted = min(self.now * 2, self._most) if self._deeper else max(self.now // 2, self._least)
        if wanted == self.now:
            self._settle()
            return
        self._before = self.now, rate
        self.now = wanted

    def _settle(self) -> None:
        self._before = None
        self._left, self._rest = self._rest, min(self._rest * 2, self._LONGEST_REST)
        self._deeper = not self._deeper or self.now == self._least


class _Meter:
    """Measures how fast reads arrive and steers a Depth by it.  Used under a lock."""

    _SECONDS = 0.04
    """At least so long, and at least so many reads, make one measurement."""
    _READS = 32

    def __init__(self, depth: Depth) -> None:
        self._depth = depth
        self._began = time.perf_counter()
        self._reads = 0

    def arrived(self, reads: int) -> None:
        self._reads += reads
        if self._reads < self._READS:
            return
        now = time.perf_counter()
        if now - self._began >= self._SECONDS:
            self._depth.measured(self._reads / (now - self._began))
            self._began, self._reads = now, 0


def copy(
    plan: Plan,
    lanes: Sequence[Lane],
    sink: Sink,
    settings: Settings,
    *,
    max_request: int,
    progress: Callable[[int], None],
) -> int:
    """
    Read the plan's data through `lanes` and store it, and its zeroes, in `sink`.

    `max_request` is the server's largest read (bytes).  `progress` is called in this thread with the bytes done so far.

    Returns
    -------
    int
        Bytes of clusters that were read as data and turned out to be all zeroes.
    """
    run = _Run(plan, sink, settings, len(lanes), max_request)
    threads = [threading.Thread(target=run.guard, args=(run.read, lane, number)) for number, lane in enumerate(lanes)]
    # One more than there are cores for: while one waits for the disk, the others compress.
    workers = [threading.Thread(target=run.guard, args=(run.work,)) for _ in range(settings.workers + 1)]
    try:
        for thread in threads + workers:
            thread.start()
        _await(threads, run, progress)
        for _ in workers:
            run.ready.put(None)
        _await(workers, run, progress)
    finally:
        run.stop.set()
        for thread in threads + workers:
            if thread.ident is not None:
                thread.join()
    if run.error is not None:
        raise run.error
    progress(run.done)
    return min(run.found_zero * plan.cluster_size, plan.totals.data)  # the disk's last cluster may be partial


def _await(threads: Sequence[threading.Thread], run: _Run, progress: Callable[[int], None]) -> None:
    # join() with a time limit lets this thread notice signals and draw progress.
    for thread in threads:
        while thread.is_alive() and not run.stop.is_set():
            thread.join(_TICK)
            progress(run.done)


class _Run:
    """What the threads of one copy share."""

    def __init__(self, plan: Plan, sink: Sink, settings: Settings, lanes: int, max_request: int) -> None:
        self.plan = plan
        self.sink = sink
        self.request_size = min(settings.request_size, max_request)
        self.stop = threading.Event()
        self._over = threading.Event()  # no batch is left to begin
        self.error: BaseException | None = None
        self.done = 0
        self.found_zero = 0
        self.ready: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._batch = settings.batch(plan.totals.data, plan.cluster_size, sink.batch)
        # No more buffers than there is data for: an idle night needs none.
        count = max(1, min(settings.buffers(lanes, self._batch), -(-plan.totals.data // self._batch)))
        self._free = _Stack([pages(self._batch) for _ in range(count)])
        self._lock = threading.Lock()
        self._batches: Iterator[Batch] | None = self._cut()
        self._outstanding: dict[int, None] = {}
        self._issued = 0
        self._pace = Pace(settings.limit)
        self._depth = Depth(lanes, settings.requests)
        self._meter = _Meter(self._depth)

    def guard(self, work: Callable[..., None], *args: object) -> None:
        """Run `work`; its first error stops the whole copy."""
        try:
            work(*args)
        except BaseException as error:  # noqa: BLE001 - carried to the calling thread, which raises it
            with self._lock:
                self.error = self.error or error
            self.stop.set()

    def read(self, lane: Lane, number: int) -> None:
        """
        Keep reads in flight on one connection until the batches end.

        What was asked for is taken as it comes, whatever else is waited for: a running machine's QEMU that has to stop
        its guest for a moment waits for those answers to be taken.
        """
        waiting: deque[tuple[int, memoryview, Batch]] = deque()
        due: float | None = None  # when the first of these may be read
        while not self.stop.is_set():
            # What was begun is read to its end, also when the connection is not needed any more.
            depth = self._depth.of(number) or bool(waiting)
            while lane.in_flight < depth:
                if not waiting and self._batches is not None:
                    batch = self._next(patient=lane.in_flight == 0)
                    if batch is not None:
                        waiting.extend(_requests(batch, self.request_size))
                if not waiting:
                    break
                due = self._pace.due(len(waiting[0][1])) if due is None else due
                if not self._in_time(due, patient=lane.in_flight == 0):
                    break
                lane.submit(*waiting.popleft())
                due = None
            if lane.in_flight:
                self._arrived(lane.wait(int(_TICK * 1000)))
            elif self._batches is None and not waiting:
                return
            elif not depth:
                self._over.wait(_IDLE)

    def _in_time(self, due: float, *, patient: bool) -> bool:
        """Is it that late, or (`patient`) will it be so before the copy is to stop?"""
        left = due - time.monotonic()
        return left <= 0 or (patient and not self.stop.wait(left))

    def work(self) -> None:
        """Store batches until there are no more."""
        while not self.stop.is_set():
            try:
                batch = self.ready.get(timeout=_TICK)
            except queue.Empty:
                continue
            if batch is None:
                return
            self._store(batch)

    def _next(self, *, patient: bool) -> Batch | None:
        """The next batch with a buffer, or None: no buffer just now, or (then _batches is None) no more batches."""
        buffer = self._free.pop(_TICK if patient else 0)
        if buffer is None:
            return None
        with self._lock:
            batch = next(self._batches, None) if self._batches is not None else None
            if batch is not None:
                batch.buffer = buffer
                self._outstanding[batch.first] = None
                self._issued = batch.pieces[-1].offset + batch.pieces[-1].length
                return batch
            self._batches = None
            self._over.set()
        self._free.push(buffer)
        return None

    def _arrived(self, tokens: list[object]) -> None:
        for batch in tokens:
            assert isinstance(batch, Batch)
            batch.waiting -= 1
            if not batch.waiting:
                self.ready.put(batch)
        with self._lock:
            self._meter.arrived(len(tokens))

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

    def pop(self, seconds: float) -> memoryview | None:
        try:
            self._there.get(block=seconds > 0, timeout=seconds)
        except queue.Empty:
            return None
        return self._buffers.pop()


def _numbers(pieces: Sequence[Piece], cluster_size: int) -> Offsets:
    """Numbers of the clusters that pieces cover, in order."""
    firsts = np.array([piece.offset // cluster_size for piece in pieces], np.int64)
    counts = np.array([-(-piece.length // cluster_size) for piece in pieces], np.int64)
    ends = np.cumsum(counts)
    return np.repeat(firsts - (ends - counts), counts) + np.arange(int(ends[-1]))


def _requests(batch: Batch, size: int) -> list[tuple[int, memoryview, Batch]]:
    """The reads, of at most `size` bytes, that fill a batch."""
    view = batch.buffer
    found = [
        (piece.offset + low, view[piece.at + low : piece.at + min(low + size, piece.length)], batch)
        for piece in batch.pieces
        for low in range(0, piece.length, size)
    ]
    batch.waiting = len(found)
    return found
