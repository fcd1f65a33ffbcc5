"""
The copier: runs a plan, reading from a source and storing into a sink, several requests at a time.

    plan -> batches (ascending) -> lanes: one thread per connection, reads in flight
                                -> queue -> workers: zero test, compression, digests, writing

Every byte is moved, hashed and compressed by code that releases the GIL.  Memory is bounded by the number of buffers,
which are made once and go round.  The first error, or a signal in the calling thread, stops all threads promptly.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from backup.plan import DATA, Plan, cluster_runs

_TICK = 0.1
"""Seconds between looks at the stop flag: how long a stop may take to be noticed."""


class Lane(Protocol):
    """One connection to the source; used by one thread."""

    in_flight: int

    def submit(self, offset: int, view: memoryview, token: object) -> None:
        """Start to read len(view) bytes at offset."""

    def wait(self, milliseconds: int) -> list[object]:
        """Tokens of the reads that finished, after at most so long."""


class Sink(Protocol):
    """Where clusters go; safe to call from several threads."""

    def write(self, first_cluster: int, data: memoryview) -> int:
        """Store whole clusters; returns how many of them are all zeroes."""

    def zero(self, first_cluster: int, count: int) -> None:
        """Record clusters that read as zero."""

    def completed_below(self, cluster: int) -> None:
        """Nothing will come for clusters below this one any more."""


@dataclass(frozen=True, slots=True)
class Settings:
    """
    How much happens at once.

    Memory for buffers is at most (lanes x requests + 2 x workers) x request_size, and never more than `buffer_limit`.
    """

    connections: int = 4
    requests: int = 16
    request_size: int = 1 << 20
    workers: int = 2
    buffer_limit: int = 64 << 20

    def buffers(self, lanes: int, request_size: int) -> int:
        """Number of buffers of request_size bytes."""
        wanted = lanes * self.requests + 2 * self.workers
        return max(2, min(wanted, self.buffer_limit // request_size))


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
    buffer: bytearray = field(default_factory=bytearray)
    waiting: int = 0

    @property
    def first(self) -> int:
        """Lowest guest offset."""
        return self.pieces[0].offset


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

    `progress` is called in this thread with the bytes done so far.

    Returns
    -------
    int
        Bytes of clusters that were read as data and turned out to be all zeroes.
    """
    request_size = max(
        plan.cluster_size, min(settings.request_size, max_request) // plan.cluster_size * plan.cluster_size
    )
    # No more buffers than there is data for: making 64 MiB of them takes 50 ms, as long as all else of an idle night.
    buffers = max(1, min(settings.buffers(len(lanes), request_size), -(-plan.totals.data // request_size)))
    run = _Run(plan, sink, request_size, buffers)
    threads = [
        threading.Thread(target=run.guard, args=(run.read, lane, settings.requests, max_request)) for lane in lanes
    ]
    workers = [threading.Thread(target=run.guard, args=(run.work,)) for _ in range(settings.workers)]
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

    def __init__(self, plan: Plan, sink: Sink, request_size: int, buffers: int) -> None:
        self.plan = plan
        self.sink = sink
        self.request_size = request_size
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.done = 0
        self.found_zero = 0
        self.ready: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(buffers):
            self._free.put(bytearray(request_size))
        self._lock = threading.Lock()
        self._batches: Iterator[Batch] | None = self._cut()
        self._outstanding: dict[int, None] = {}
        self._issued = 0

    def guard(self, work: Callable[..., None], *args: object) -> None:
        """Run `work`; its first error stops the whole copy."""
        try:
            work(*args)
        except BaseException as error:  # noqa: BLE001 - carried to the calling thread, which raises it
            with self._lock:
                self.error = self.error or error
            self.stop.set()

    def read(self, lane: Lane, requests: int, max_request: int) -> None:
        """Keep reads in flight on one connection until the batches end."""
        waiting: deque[tuple[int, memoryview, Batch]] = deque()
        more = True
        while not self.stop.is_set():
            while lane.in_flight < requests:
                if more and not waiting:
                    batch = self._next(patient=lane.in_flight == 0)
                    if batch is not None:
                        waiting.extend(_requests(batch, max_request))
                    more = self._batches is not None
                if not waiting:
                    break
                lane.submit(*waiting.popleft())
            if lane.in_flight:
                for token in lane.wait(int(_TICK * 1000)):
                    self._arrived(token)
            elif not more and not waiting:
                return

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
        try:
            buffer = self._free.get(timeout=_TICK) if patient else self._free.get_nowait()
        except queue.Empty:
            return None
        with self._lock:
            batch = next(self._batches, None) if self._batches is not None else None
            if batch is not None:
                batch.buffer = buffer
                self._outstanding[batch.first] = None
                self._issued = batch.pieces[-1].offset + batch.pieces[-1].length
                return batch
            self._batches = None
        self._free.put(buffer)
        return None

    def _arrived(self, token: object) -> None:
        assert isinstance(token, Batch)
        token.waiting -= 1
        if not token.waiting:
            self.ready.put(token)

    def _store(self, batch: Batch) -> None:
        cluster = self.plan.cluster_size
        zeroes = 0
        with memoryview(batch.buffer) as view:
            for piece in batch.pieces:
                padded = -(-piece.length // cluster) * cluster
                if padded > piece.length:
                    view[piece.at + piece.length : piece.at + padded] = bytes(padded - piece.length)
                with view[piece.at : piece.at + padded] as data:
                    zeroes += self.sink.write(piece.offset // cluster, data)
        self._free.put(batch.buffer)
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
                    count = min(end - start, self.request_size - filled)
                    pieces.append(Piece(start, count, filled))
                    start += count
                    filled += -(-count // cluster) * cluster
                    if filled == self.request_size:
                        yield Batch(pieces)
                        pieces, filled = [], 0
        if pieces:
            yield Batch(pieces)


def _requests(batch: Batch, max_request: int) -> list[tuple[int, memoryview, Batch]]:
    """The reads that fill a batch; a piece is cut where the server allows only smaller requests than a cluster."""
    view = memoryview(batch.buffer)
    found = [
        (piece.offset + low, view[piece.at + low : piece.at + min(low + max_request, piece.length)], batch)
        for piece in batch.pieces
        for low in range(0, piece.length, max_request)
    ]
    batch.waiting = len(found)
    return found
