"""Reads what will not be read again soon: into the same memory again and again, and past the kernel's page cache."""

from __future__ import annotations

import os
import threading

from backup.pages import pages

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
