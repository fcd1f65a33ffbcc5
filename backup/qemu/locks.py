"""
QEMU's own locks on image files, taken by pybackup.

The locks have two uses.  While an image is read, no QEMU may write to it, not even where QEMU itself would allow that.
Before a file is replaced or overwritten, no QEMU may have the file open.

A QEMU places read locks on single bytes of a file (locks of the open file description, fcntl(2)).  The locks tell
other QEMUs what this QEMU does with the file, and what they must not do (block/file-posix.c, raw_apply_lock_bytes):

    byte 100 + N   permission N is in use
    byte 200 + N   permission N is denied to all others

Then QEMU looks for locks of others on the opposite bytes.  For a qcow2 image, qemu-nbd does this too.  For a raw image,
and for a raw file below another image, qemu-nbd denies only what its clients deny, which is nothing: a machine could
run on the image and write to it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from backup.qemu.images import ImageLocked, retry_while_locked

_USED, _DENIED = 100, 200
"""First bytes of the two ranges."""
_WRITE, _RESIZE = 1, 3
"""Numbers of permissions (BLK_PERM_...)."""
_PERMISSIONS = 5
"""Number of all permissions.  A guest, a job or a server uses at least one of them on each file it has open."""
_FLOCK = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, length, process (0 for a lock of an open file description)."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
"""Errors of file systems without such locks."""


@contextmanager
def no_writers(files: Iterable[str]) -> Iterator[None]:
    """
    Keep every QEMU from writing to local files and block devices during the block.  Other names are skipped.

    On a file system without such locks nothing is locked; QEMU has no locks there either.

    Raises
    ------
    ImageLocked
        A QEMU writes to one of the files.
    """
    with ExitStack() as locks:
        for file in files:
            fd = _open(file)
            if fd is not None:
                locks.callback(os.close, fd)  # closing the descriptor releases the lock
                retry_while_locked(lambda fd=fd, file=file: _deny_writing(fd, file))  # type: ignore[misc]
        yield


def claim(fd: int, file: str) -> None:
    """
    Refuse a file that any QEMU has open, for reading or writing, and keep every QEMU from opening the file.

    The claim ends when the caller closes `fd`, which is open for reading.  Another call with the same descriptor only
    checks again.  Another pybackup that reads the file as its source, or claims the file, counts as a QEMU.

    Raises
    ------
    ImageLocked
        A QEMU has the file open.
    """
    denied = [(_DENIED, _PERMISSIONS)]
    retry_while_locked(lambda: _lock_and_look(fd, file, denied, [(_USED, _PERMISSIONS), *denied], "a QEMU has it open"))


def _open(file: str) -> int | None:
    """Open a plain file or block device; None for anything else, since QEMU's own message will be more exact."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return fd
    os.close(fd)
    return None


def _deny_writing(fd: int, file: str) -> None:
    own = [(_DENIED + permission, 1) for permission in (_WRITE, _RESIZE)]
    others = [(_USED + permission, 1) for permission in (_WRITE, _RESIZE)]
    _lock_and_look(fd, file, own, others, "a QEMU has it open for writing")


def _lock_and_look(
    fd: int, file: str, own: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]], why: str
) -> None:
    """
    Lock the bytes `own` (start, length), and refuse the file if another program has a lock on the bytes `others`.

    The order is QEMU's: if two programs come at the same time, at least one of them sees the other.
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
    """Tell whether another open file description has a lock on any of these bytes."""
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    answer: tuple[int, ...] = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))
    return answer[0] != fcntl.F_UNLCK
