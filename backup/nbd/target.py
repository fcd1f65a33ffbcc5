"""Write to an NBD export: the target of a restore."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from backup.errors import Failed, SourceError
from backup.model.names import without_password
from backup.nbd.connection import EXTRA_SECONDS, TICK, connect, load_binding, shutdown
from backup.nbd.replies import blocks_of
from backup.runtime.ignoring import ignoring
from backup.runtime.timeouts import TimedOut, Wait

if TYPE_CHECKING:
    import nbd

_log = logging.getLogger(__name__)

MAX_ZERO = 1 << 30
"""Bytes that one request zeroes: well below the 32-bit limit, so that a slow server answers in time."""


class NbdTarget:
    """
    An export opened for writing, for a restore.  Safe to use from several threads.

    A request has a connection to itself until it is answered: polling holds libnbd's lock on the handle, so that two
    threads on one connection would only wait for each other.  There are as many connections as threads that write at
    once, if the server allows several (can_multi_conn, with which one flush covers the writes of all) and accepts them;
    otherwise there is one.

    No method calls back into Python, so that `signals.deferred` is not needed; a worker thread could not use it either.

    Raises
    ------
    Failed
        The server cannot be reached.  This is not a SourceError, whose exit code stands for the source of a backup.
    """

    _ZEROES = memoryview(bytes(1 << 20))  # a server without write-zeroes may announce requests of 4 GiB

    reads_zero = False  # the export still holds its old content

    def __init__(self, uri: str) -> None:
        self.uri = without_password(uri)
        self._address = uri
        self._nbd = load_binding()
        self._abandoned = threading.Event()
        # For threads that write parts of the same block: each must read what the others have written.
        self._mending = threading.Lock()
        try:
            first = connect(self._nbd, uri, ())
        except SourceError as error:
            raise Failed(error.message, hint=error.hint) from None
        try:
            self.size: int = first.get_size()
            self.read_only: bool = first.is_read_only()
            self._can_zero: bool = first.can_zero()
            self._can_flush: bool = first.can_flush()
            self._takes_more: bool = first.can_multi_conn()
            self._blocks = blocks_of(self._nbd, first)
        except self._nbd.Error as error:
            raise self._failed(error) from None
        self._handles: list[nbd.NBD] = [first]
        self._idle: queue.LifoQueue[nbd.NBD] = queue.LifoQueue()  # last in, first out: no more connections than needed
        self._idle.put(first)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """
        Write data (bytes) at offset.

        Raises
        ------
        Failed
            The server cannot write it, or the target was abandoned.
        """
        view, end, largest = memoryview(data), offset + len(data), self._blocks.largest
        first, last = self._whole_blocks(offset, end)
        self._write_part(offset, view[: first - offset])
        for low in range(first, last, largest):
            self._write_once(low, view[low - offset : min(low + largest, last) - offset])
        self._write_part(last, view[last - offset :])

    def zero(self, offset: int, length: int) -> None:
        """
        Make the range read as zeroes.

        Raises
        ------
        Failed
            As for `write`.
        """
        step = MAX_ZERO if self._can_zero else min(self._blocks.largest, len(self._ZEROES))
        first, last = self._whole_blocks(offset, offset + length)
        self._write_part(offset, memoryview(bytes(first - offset)))
        for low in range(first, last, step):
            count = min(step, last - low)
            if self._can_zero:
                self._zero_once(low, count)
            else:
                self._write_once(low, self._ZEROES[:count])
        self._write_part(last, memoryview(bytes(offset + length - last)))

    def flush(self) -> None:
        """Have the server store everything that was written so far, on any connection."""
        if self._can_flush:
            self._answered(lambda handle: handle.aio_flush())

    def abandon(self) -> None:
        """Make every request in flight, in any thread, fail soon: the server may never answer."""
        self._abandoned.set()

    def close(self) -> None:
        """End the connections: in order, or at once if a request never ended."""
        if not self._abandoned.is_set():
            for handle in self._handles:
                shutdown(self._nbd, handle)
        self._handles.clear()
        self._idle = queue.LifoQueue()

    def _whole_blocks(self, start: int, end: int) -> tuple[int, int]:
        """Return the part of [start, end) that consists of whole blocks; an empty part at `end` if there is none."""
        smallest = self._blocks.smallest
        first, last = start + -start % smallest, end if end >= self.size else end - end % smallest
        return (first, last) if first <= last else (end, end)

    def _write_part(self, offset: int, data: memoryview) -> None:
        """Write a part of one block and keep the rest of it, on a server that accepts only whole blocks."""
        if not data:
            return
        start, end = self._blocks.around(offset, offset + len(data))
        block = bytearray(end - start)
        with self._mending:
            self._answered(lambda handle: handle.aio_pread(memoryview(block), start))
            block[offset - start : offset - start + len(data)] = data
            self._write_once(start, memoryview(block))

    def _write_once(self, offset: int, data: memoryview) -> None:
        self._answered(lambda handle: handle.aio_pwrite(data, offset))

    def _zero_once(self, offset: int, count: int) -> None:
        self._answered(lambda handle: handle.aio_zero(count, offset))

    def _answered(self, start: Callable[[nbd.NBD], int]) -> None:
        """Start a request and wait for its answer."""
        try:
            with self._connection() as handle:
                cookie = start(handle)
                wait = Wait(f"{self.uri} to store data")
                while not handle.aio_command_completed(cookie):
                    self._tick(handle)
                    wait.look()
        except self._nbd.Error as error:
            raise self._failed(error) from None
        except TimedOut as timed_out:
            self.abandon()
            raise Failed(timed_out.message, hint=f"the target is incomplete; {timed_out.hint}") from None
        except BaseException:
            # The main thread was interrupted, and no other thread should wait for this server any longer.
            self.abandon()
            raise

    @contextmanager
    def _connection(self) -> Iterator[nbd.NBD]:
        handle = self._idle_one() or self._another() or self._next_idle()
        try:
            yield handle
        finally:
            self._idle.put(handle)

    def _idle_one(self, seconds: float = 0) -> nbd.NBD | None:
        self._require_wanted()
        try:
            return self._idle.get(block=seconds > 0, timeout=seconds)
        except queue.Empty:
            return None

    def _next_idle(self) -> nbd.NBD:
        while True:
            handle = self._idle_one(TICK / 1000)
            if handle is not None:
                return handle

    def _another(self) -> nbd.NBD | None:
        """Open one more connection, or return None: the server does not accept it, and no further one is tried."""
        if not self._takes_more:
            return None
        handle: nbd.NBD = self._nbd.NBD()
        deadline = time.monotonic() + EXTRA_SECONDS
        with ignoring(_log, "one more connection to the target", self._nbd.Error):
            handle.set_uri_allow_local_file(True)
            handle.aio_connect_uri(self._address)
            while handle.aio_is_connecting() and time.monotonic() < deadline:
                self._tick(handle)
            if handle.aio_is_ready():
                self._handles.append(handle)
                return handle
        self._takes_more = False
        return None

    def _tick(self, handle: nbd.NBD) -> None:
        self._require_wanted()
        handle.poll(TICK)

    def _require_wanted(self) -> None:
        if self._abandoned.is_set():
            raise Failed(f"{self.uri}: writing was abandoned", hint="the target is incomplete; restore again")

    def _failed(self, error: Any) -> Failed:
        return Failed(
            without_password(f"{self.uri}: writing failed: {error.string}"),
            hint="the target is incomplete; read the server's log, then restore again",
        )
