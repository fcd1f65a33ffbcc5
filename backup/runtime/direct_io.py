"""Writes to a file at the least cost, from several threads: past the kernel's page cache where that is possible."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import nullcontext
from pathlib import Path

_ALIGNED = 4096
"""What O_DIRECT writes begins at and ends with multiples of this (bytes), on every common file system and disk."""
_DIRECT_LEAST = 1 << 20
"""Bytes; smaller writes past the cache would each wait for the disk: 64 KiB at a time took four times as long."""


class Output:
    """
    A file that is written at any offsets; its descriptor stays the caller's.

    O_DIRECT (open(2)) spares the copy into the page cache, a tenth of the processor time, and a host full of running
    machines keeps its cache for them.  Memory that begins on a page goes this way (see `pages`).

    Parameters
    ----------
    fd : int
        The file, open for writing.
    path : Path
        The same file.
    grows : bool
        Whether writes make the file longer.  The kernel lets one such writer in at a time and the others would spin for
        it.
    """

    def __init__(self, fd: int, path: Path, *, grows: bool) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._direct_lock = self._lock if grows else nullcontext()
        self._direct = self._opened = _open_direct(path)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """
        Write data (bytes) at offset.

        Raises
        ------
        OSError
            The disk is full or fails.
        """
        view = memoryview(data)
        done = self._write_direct(offset, view)
        if done < len(view):
            with self._lock:
                write_all(self._fd, offset + done, view[done:])

    def _write_direct(self, offset: int, view: memoryview) -> int:
        """Write as much as goes past the cache; how many bytes that was."""
        direct = self._direct  # another thread may give it up meanwhile
        end = len(view) // _ALIGNED * _ALIGNED
        if direct is None or end < _DIRECT_LEAST or offset % _ALIGNED:
            return 0
        done = 0
        try:
            with self._direct_lock:
                while done < end:
                    done += os.pwrite(direct, view[done:end], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = None  # not here, not of this size, or not from this memory: never again
        return done

    def close(self) -> None:
        """Nothing more is written, and nothing is under way."""
        if self._opened is not None:
            os.close(self._opened)
            self._direct = self._opened = None


def write_all(fd: int, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of data (bytes) at offset, in as many calls as it takes."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _open_direct(path: Path) -> int | None:
    """Open a file once more, for writing past the page cache; None where the file system has no O_DIRECT."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None


def pages(size: int) -> memoryview:
    """`size` bytes of zeroes that begin on a page; given back to the system when nothing refers to them any more."""
    return memoryview(mmap.mmap(-1, size))[:size]


_DONTCACHE = 0x80
"""
RWF_DONTCACHE of preadv2(2), Linux 6.14: what was not in the page cache does not stay there; what was is read from it.
"""


class ReadOnce:
    """
    Reads pieces of a file from several threads; on a host full of running machines their files stay in its page cache.

    Parameters
    ----------
    fd : int
        The file, open for reading; stays the caller's.
    most : int
        Bytes of the largest piece.
    """

    def __init__(self, fd: int, most: int) -> None:
        self._fd = fd
        self._most = most
        self._threads = threading.local()
        self._flags = _DONTCACHE

    def read(self, offset: int, length: int) -> memoryview:
        """
        Bytes [offset, offset + length), fewer where the file ends; this thread's next call overwrites them.

        Raises
        ------
        OSError
            The disk fails.
        """
        room: memoryview | None = getattr(self._threads, "room", None)
        if room is None:
            room = self._threads.room = pages(self._most)
        return room[: self._fill(room[:length], offset)]

    def _fill(self, view: memoryview, offset: int) -> int:
        if self._flags:
            try:
                return os.preadv(self._fd, [view], offset, self._flags)
            except OSError:
                self._flags = 0  # an older kernel, or this file system can't; what else is wrong shows again
        return os.preadv(self._fd, [view], offset)
