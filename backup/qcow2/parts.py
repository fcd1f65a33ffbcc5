"""A file under construction: it is assembled in memory, part by part, and each whole part goes to a sink."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np

from backup.qcow2.layout import PART, U8
from backup.runtime.direct_io import pages

_KEPT_BUFFERS = 4  # enough for the threads that fill parts at the same time; more would only occupy memory


class PartSink(Protocol):
    """Receives the parts of a file."""

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """
        Store the bytes [number * PART, number * PART + len(data)) of the file.

        Called from several threads at once, in any order, except that part 0 comes last.  All parts except the one
        with the highest number have PART bytes.  The sink must not keep `data`: the buffer is used for another part.
        """


@dataclass(slots=True)
class _Part:
    buffer: U8
    missing: int
    """Bytes that were not filled yet."""


class Parts:
    """
    The parts of a file that are not whole yet.  Safe to use from several threads.

    Every byte of the file is filled exactly once; unused ranges are filled with zeroes.  So a count of bytes shows when
    a part is whole, and buffers can be used again without clearing them.
    """

    def __init__(self, sink: PartSink) -> None:
        self._sink = sink
        self._lock = Lock()
        self._open: dict[int, _Part] = {}
        self._spare: list[U8] = []
        self._size: int | None = None
        self._stored = 0

    def fill(self, offset: int, data: U8) -> None:
        """
        Store `data` as the bytes of the file at `offset`.

        Copies `data` and passes whole parts to the sink in the calling thread.  A range of `data` that is a whole part
        goes to the sink without a copy.
        """
        done = 0
        while done < len(data):
            number, at = divmod(offset + done, PART)
            take = min(PART - at, len(data) - done)
            if take == PART:
                self._store(number, data[done : done + take])
                done += take
                continue
            # A copy with numpy releases the interpreter's lock; a copy between memoryviews would not.
            self._part(number).buffer[at : at + take] = data[done : done + take]
            self._filled(number, take)
            done += take

    def clear(self, offset: int, length: int) -> None:
        """Fill `length` bytes at `offset` with zeroes."""
        done = 0
        while done < length:
            number, at = divmod(offset + done, PART)
            take = min(PART - at, length - done)
            self._part(number).buffer[at : at + take] = 0
            self._filled(number, take)
            done += take

    def end(self, size: int) -> None:
        """Set the size of the file (bytes), so that the last part is whole when it is filled up to there."""
        number, at = divmod(size, PART)
        self._size = size
        if at:
            self._part(number)
            self._filled(number, PART - at)

    def require_all_stored(self) -> None:
        """Raise RuntimeError if any part was not stored; the file must not be used then."""
        missing = -(-(self._size or 0) // PART) - self._stored
        if self._size is None or missing:
            raise RuntimeError(f"{missing} parts of the file were not stored")

    def _part(self, number: int) -> _Part:
        with self._lock:
            part = self._open.get(number)
            if part is None:
                buffer = self._spare.pop() if self._spare else np.frombuffer(pages(PART), np.uint8)
                part = self._open[number] = _Part(buffer, PART)
            return part

    def _filled(self, number: int, count: int) -> None:
        with self._lock:
            part = self._open[number]
            part.missing -= count
            if part.missing:
                return
            del self._open[number]
        length = PART if self._size is None else min(PART, self._size - number * PART)
        self._store(number, part.buffer[:length])
        with self._lock:
            if len(self._spare) < _KEPT_BUFFERS:
                self._spare.append(part.buffer)

    def _store(self, number: int, data: U8) -> None:
        self._sink.put(number, data.data)
        with self._lock:  # after put(): a part whose put() failed must not count as stored
            self._stored += 1
