"""
Write a point's disk as a raw stream, to a pipe for example: pybackup restore web1 - | ssh host 'cat >/dev/vg/web1'.

    batches of the disk, in order -> threads read, verify and decode several of them ahead -> one thread writes

Every block is compared with its digest before any of its bytes are written.  But a stream cannot be undone: if a part
of the chain turns out to be damaged, the stream ends there, and the command exits with 12.
"""

from __future__ import annotations

import itertools
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from backup.engine.restorer import Restored
from backup.errors import Damaged, Failed
from backup.model.extents import windows
from backup.qcow2 import PART, Codec
from backup.repository import chain_reader, data_file, salvage
from backup.repository.chain_reader import ChainContent
from backup.repository.machine import Machine
from backup.repository.opened_chain import open_chain
from backup.runtime.direct_io import pages
from backup.runtime.ignoring import ignoring
from backup.runtime.pace import Pace
from backup.runtime.progress import Progress

_log = logging.getLogger(__name__)


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
    Write a disk of a point to a descriptor, from the first byte to the last, including zeroes.

    Raises
    ------
    Damaged, NotFound
        A file of the chain is missing or damaged.  What was written so far is correct.
    Failed
        The reader has closed the pipe, or the descriptor cannot be written.
    """
    try:
        with open_chain(
            machine,
            point,
            disk,
            lambda chain: data_file.open_files(machine.files, chain, chain_reader.kept_blocks(chain)),
        ) as (chain, files):
            progress.begin(disk, chain.size)
            content = ChainContent(chain, files, chain.size)
            _write_all(content, fd, workers, progress, Pace(limit))
            return Restored(chain.size, chain.size)
    except Damaged as error:
        raise salvage.located(error, machine, point, disk) from None


def _write_all(content: ChainContent, fd: int, workers: int, progress: Progress, pace: Pace) -> None:
    never = threading.Event()
    done = 0
    for batch in _in_order(_Batches(content), workers + 1):
        pace.keep(len(batch), never)
        _write(fd, batch, done)
        done += len(batch)
        progress.advance(done)
    with ignoring(_log, "fsync of standard output", OSError):
        os.fsync(fd)  # works if the descriptor is a file; a pipe has no fsync


def _in_order(batches: _Batches, ahead: int) -> Iterator[memoryview]:
    """
    Yield the batches in order, while threads read the next ones.  A batch is valid until the next one is requested.
    """
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
    """The disk, divided into batches of 4 MiB."""

    def __init__(self, content: ChainContent) -> None:
        self._content = content
        self._spare: deque[memoryview] = deque()
        self._threads = threading.local()

    def starts(self) -> Iterator[tuple[int, int]]:
        """Yield start and end (bytes) of each batch, in order."""
        yield from windows(0, self._content.size, PART)

    def read(self, start: int, end: int) -> memoryview:
        """Read and verify a batch; the caller gives it back."""
        size = self._content.cluster_size
        codec = getattr(self._threads, "codec", None)
        if codec is None:
            codec = self._threads.codec = Codec(size, None)
        try:
            room = self._spare.pop()
        except IndexError:
            room = pages(PART)
        clusters = np.arange(start // size, -(-end // size))
        self._content.read(clusters, room[: len(clusters) * size], codec)
        return room[: end - start]

    def give_back(self, batch: memoryview) -> None:
        """Use the memory of a batch again."""
        whole = batch.obj
        self._spare.append(memoryview(whole))


def _write(fd: int, batch: memoryview, done: int) -> None:
    """Write a whole batch, also to a non-blocking descriptor; `done` is the number of bytes written before."""
    while batch:
        try:
            written = os.write(fd, batch)
        except BlockingIOError:
            select.select([], [fd], [])
            continue
        except OSError as error:
            why = "the reader has closed it" if isinstance(error, BrokenPipeError) else error.strerror
            raise Failed(
                f"standard output cannot be written after {done} bytes: {why}",
                hint="see the messages of the reading program; what it received is not a whole disk",
            ) from None
        done += written
        batch = batch[written:]
