"""
QEMU's own lock on an image's file, taken by us: against writers where QEMU would let them in, and before a file is
replaced or overwritten, against every QEMU.

With read locks on single bytes of a file (of its open file description, fcntl(2)) each QEMU tells the others what it
does there and what it lets nobody else do (block/file-posix.c, raw_apply_lock_bytes):

    byte 100 + N   permission N is used here
    byte 200 + N   permission N is granted to nobody else

and then looks whether anybody has a lock on the opposite byte.  A qemu-nbd that serves a qcow2 does so for that file.
To a raw image, and to a raw file below another image, it lets in whom its clients would, and these let in everybody: a
machine may run on it and write.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from backup.qemu.images import ImageLocked, patiently

_USED, _GRANTED_TO_NOBODY = 100, 200
_WRITE, _RESIZE = 1, 3
"""Numbers of the permissions (BLK_PERM_...)."""
_PERMISSIONS = 5
"""All of them: QEMU uses one at least of every file that a guest, a job or a server has open."""
_FLOCK = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, length, process (0 for an open file description's lock)."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


@contextmanager
def no_writers(files: Iterable[str]) -> Iterator[None]:
    """
    Keep every QEMU from writing to local files, or block devices; what else is named is passed over.

    Where the file system knows no such locks, QEMU has none either, and nobody is kept out.

    Raises
    ------
    ImageLocked
        One of them is being written to.
    """
    with ExitStack() as locks:
        for file in files:
            fd = _opened(file)
            if fd is not None:
                locks.callback(os.close, fd)  # which ends the lock
                patiently(lambda fd=fd, file=file: _lock(fd, file))  # type: ignore[misc]
        yield


def _opened(file: str) -> int | None:
    """A descriptor of a plain file or block device; None of anything else: QEMU says best what is wrong."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return fd
    os.close(fd)
    return None


def claim(fd: int, file: str) -> None:
    """
    Refuse a file that any QEMU has open, for reading or writing, and keep every QEMU from opening it.

    The claim ends when the caller closes `fd` (open for reading); to claim again through the same descriptor only looks
    again.  Another pybackup that reads the file as its source, or claims it, counts as a QEMU does.

    Raises
    ------
    ImageLocked
        A QEMU has it open.
    """
    every = [(_GRANTED_TO_NOBODY, _PERMISSIONS)]
    patiently(lambda: _tell_and_look(fd, file, every, [(_USED, _PERMISSIONS), *every], "a QEMU has it open"))


def _lock(fd: int, file: str) -> None:
    own = [(_GRANTED_TO_NOBODY + permission, 1) for permission in (_WRITE, _RESIZE)]
    others = [(_USED + permission, 1) for permission in (_WRITE, _RESIZE)]
    _tell_and_look(fd, file, own, others, "a QEMU has it open for writing")


def _tell_and_look(
    fd: int, file: str, own: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]], why: str
) -> None:
    """
    Lock the bytes `own` (start, length) and refuse the file where another program has a lock on the bytes `others`.

    First tell, then look, as QEMU does: of two that come at once, one at least sees the other.
    """
    try:
        for start, length in own:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, start, length, 0))
        used = any(_is_locked(fd, start, length) for start, length in others)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return
        raise ImageLocked(file, error.strerror or "it is locked") from None
    if used:
        raise ImageLocked(file, why)


def _is_locked(fd: int, start: int, length: int) -> bool:
    """Does another open file description have a lock on any of these bytes?"""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    found: tuple[int, ...] = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return found[0] != fcntl.F_UNLCK
