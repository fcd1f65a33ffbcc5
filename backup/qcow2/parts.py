"""Puts a file together in memory, part by part, and hands each whole part to its sink."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np

from backup.qcow2.layout import PART, U8
from backup.runtime.direct_io import pages

_KEPT_BUFFERS = 4  # a few, for the threads that fill parts at one time; more would only hold memory


class PartSink(Protocol):
    """Takes a file's parts."""

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """
        Store the bytes [number * PART, number * PART + len(data)) of the file.

        Called in any order and from several threads at once; part 0 comes last.  All but the highest-numbered are
        PART bytes long.  `data` must not be kept: its buffer is used again.
        """


@dataclass(slots=True)
class _Part:
    buffer: U8
    missing: int
    """Bytes that nobody filled yet."""


class Parts:
    """
    The parts of a file that are not whole yet.  Thread safe.

    Every byte of the file is filled exactly once, holes with zeroes; that is what makes a part's end known without
    looking at the others, and lets buffers be used again without clearing them.
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
        Store `data` as the file's bytes at `offset`; copying and storing whole parts happen in this thread.

        What is a whole part goes to the sink without being copied.
        """
        done = 0
        while done < len(data):
            number, at = divmod(offset + done, PART)
            take = min(PART - at, len(data) - done)
            if take == PART:
                self._store(number, data[done : done + take])
                done += take
                continue
            # numpy copies without holding the interpreter's lock; a memoryview would hold it.
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
        """Say that the file has `size` bytes; the last part need not be filled beyond."""
        number, at = divmod(size, PART)
        self._size = size
        if at:
            self._part(number)
            self._filled(number, PART - at)

    def require_all_stored(self) -> None:
        """Raise RuntimeError if a part is not whole: some fill() failed, so the file must not be used."""
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
        with self._lock:  # only now: one whose put() failed does not count, for require_all_stored
            self._stored += 1
