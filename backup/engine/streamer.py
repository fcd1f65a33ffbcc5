"""
A point's disk as a raw stream, in the disk's order, for a pipe: pybackup restore web1 - | ssh host 'cat >/dev/vg/web1'.

    batches of the disk -> threads read, check and decode several ahead -> written one after the other

Every block is verified against its digest before a byte of it is written, but a stream cannot be taken back: where the
chain turns out to be damaged half-way, the stream ends early, and so does the run, with 12.
"""

from __future__ import annotations

import itertools
import os
import select
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from backup.engine.restorer import Restored
from backup.errors import Damaged, Failed
from backup.model.extents import windows
from backup.qcow2 import PART, Codec
from backup.repository import chain_reader, data_file, salvage
from backup.repository.chain_reader import Content
from backup.repository.machine import Machine
from backup.repository.opened_chain import open_chain
from backup.runtime.direct_io import pages
from backup.runtime.pace import Pace
from backup.runtime.progress import Progress


def stream(
    machine: Machine,
    point: str,
    disk: str,
    fd: int,
    *,
    workers: int,
    progress: Progress,
    limit: int | None = None,
) -> Restored:
    """
    Write one disk of a point to a descriptor, from its first byte to its last, zeroes included.

    Raises
    ------
    Damaged, NotFound
        The chain or a data file is not what was written; what was written so far is right.
    Failed
        The reader is gone, or the descriptor cannot be written.
    """
    try:
        with open_chain(
            machine,
            point,
            disk,
            lambda chain: data_file.opened(machine.files, chain, chain_reader.kept_blocks(chain)),
        ) as (chain, files):
            progress.begin(disk, chain.size)
            held = Content(chain, files, chain.size)
            _write_all(held, fd, workers, progress, Pace(limit))
            return Restored(chain.size, chain.size)
    except Damaged as error:
        raise salvage.located(error, machine, point, disk) from None


def _write_all(held: Content, fd: int, workers: int, progress: Progress, pace: Pace) -> None:
    never = threading.Event()
    done = 0
    for batch in _in_order(_Batches(held), workers + 1):
        pace.keep(len(batch), never)
        _write(fd, batch, done)
        done += len(batch)
        progress.advance(done)
    with suppress(OSError):
        os.fsync(fd)  # a file, where the shell opened one; a pipe refuses


def _in_order(batches: _Batches, ahead: int) -> Iterator[memoryview]:
    """Yield each batch in turn, while some more are read; its memory is used again once the next is asked for."""
    pool = ThreadPoolExecutor(ahead)
    try:
        waiting: deque[Future[memoryview]] = deque()
        starts = iter(batches.starts())
        for start in itertools.islice(starts, ahead):
            waiting.append(pool.submit(batches.read, *start))
        while waiting:
            batch = waiting.popleft().result()
            yield batch
            batches.give_back(batch)
            for start in itertools.islice(starts, 1):
                waiting.append(pool.submit(batches.read, *start))
    finally:
        pool.shutdown(cancel_futures=True)


class _Batches:
    """The disk in pieces of 4 MiB."""

    def __init__(self, held: Content) -> None:
        self._held = held
        self._spare: deque[memoryview] = deque()
        self._threads = threading.local()

    def starts(self) -> Iterator[tuple[int, int]]:
        """Start and end (bytes) of each, in order."""
        yield from windows(0, self._held.size, PART)

    def read(self, start: int, end: int) -> memoryview:
        """One of them, checked; to be given back."""
        size = self._held.cluster_size
        codec = getattr(self._threads, "codec", None)
        if codec is None:
            codec = self._threads.codec = Codec(size, None)
        try:
            room = self._spare.pop()
        except IndexError:
            room = pages(PART)
        clusters = np.arange(start // size, -(-end // size))
        self._held.read(clusters, room[: len(clusters) * size], codec)
        return room[: end - start]

    def give_back(self, batch: memoryview) -> None:
        """Use the memory of a batch again."""
        whole = batch.obj
        self._spare.append(memoryview(whole))


def _write(fd: int, batch: memoryview, done: int) -> None:
    """Write all of it; a reader that does not wait (O_NONBLOCK) is waited for."""
    while batch:
        try:
            written = os.write(fd, batch)
        except BlockingIOError:
            select.select([], [fd], [])
            continue
        except OSError as error:
            why = "its reader has gone" if isinstance(error, BrokenPipeError) else error.strerror
            raise Failed(
                f"standard output cannot be written after {done} bytes: {why}",
                hint="see what the reading program says; what it got so far is not a whole disk",
            ) from None
        done += written
        batch = batch[written:]
