"""Reading and writing files without filling the kernel's page cache, from several threads."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import nullcontext
from pathlib import Path

_ALIGNED = 4096
"""O_DIRECT needs offsets and lengths that are multiples of this (bytes), on every common file system and disk."""
_DIRECT_LEAST = 1 << 20
"""
Smallest write (bytes) that goes past the cache.  Each such write waits for the disk: writes of 64 KiB took four times
as long as with the cache.
"""
_DONTCACHE = 0x80
"""RWF_DONTCACHE of preadv2(2), Linux 6.14: the kernel drops pages after the read that were not cached before it."""


class Output:
    """
    Writes to a file at any offset, past the page cache where possible.  Safe to use from several threads.

    O_DIRECT (open(2)) saves the copy into the page cache, which is a tenth of the processor time, and leaves the cache
    to the running machines of the host.  Only memory that begins at a page boundary can be written that way (`pages`).

    Parameters
    ----------
    fd : int
        The file, open for writing.  The caller closes it.
    path : Path
        The path of the same file.
    grows : bool
        Whether writes make the file longer.  The kernel runs such writes one at a time, and other threads would spin
        while they wait.
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
        """Write as much of `view` as can go past the cache; return how many bytes were written."""
        direct = self._direct  # read once: another thread may set the attribute to None at any moment
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
            # Direct writes do not work here, or not for this length or memory: use the cache from now on.
            self._direct = None
        return done

    def close(self) -> None:
        """Close the descriptor for direct writes.  Call this when no write is running and none will follow."""
        if self._opened is not None:
            os.close(self._opened)
            self._direct = self._opened = None


def write_all(fd: int, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of data (bytes) at offset, with as many system calls as needed."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _open_direct(path: Path) -> int | None:
    """Open a file a second time, for writing past the page cache; None where the file system has no O_DIRECT."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None


def pages(size: int) -> memoryview:
    """Return `size` bytes of zeroes that begin at a page boundary.  The memory is freed with its last reference."""
    return memoryview(mmap.mmap(-1, size))[:size]


class ReadOnce:
    """
    Reads pieces of a file without keeping them in the page cache.  Safe to use from several threads.

    The cache of the host is left to its running machines.  Kernels and file systems without RWF_DONTCACHE read through
    the cache as usual.

    Parameters
    ----------
    fd : int
        The file, open for reading.  The caller closes it.
    most : int
        Length of the largest piece (bytes).
    """

    def __init__(self, fd: int, most: int) -> None:
        self._fd = fd
        self._most = most
        self._threads = threading.local()
        self._flags = _DONTCACHE

    def read(self, offset: int, length: int) -> memoryview:
        """
        Return the bytes [offset, offset + length), fewer at the end of the file.

        The memory belongs to the calling thread: its next call overwrites it.

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
                self._flags = 0  # the kernel or the file system lacks the flag; a real error occurs again below
        return os.preadv(self._fd, [view], offset)
