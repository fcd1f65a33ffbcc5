"""
Opens the files of a repository: plain files only, and for writing only files that no other name leads to.

A repository may come back from another place, or lie where others write.  A link under one of our names would lead out
of the repository, a pipe would block, and a hard link would let us overwrite another file's content.  Reading a file
with several names is safe: copies made with hard links (`cp -al`, `rsync --link-dest`) share their points, and no point
is ever written to.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

HINT = "a repository holds plain files and folders, and no links; bring them back from a copy of the repository"


class NotPlainError(OSError):
    """Something else than a plain file of one name is there; `strerror` says what."""


def open_file(path: Path, flags: int, mode: int = 0o600, *, sole: bool = False) -> int:
    """
    Open a file of the repository and return its descriptor; never follow a link, never wait for a pipe.

    With `sole`, the file must have one name only: it will be written to in place.

    Raises
    ------
    NotPlainError, OSError
        It is no plain file, or cannot be opened.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_plain(path, "it is a link") from None
        if error.errno == errno.ENXIO:
            raise _not_plain(path, "it is no plain file") from None  # a pipe without a reader, a socket
        raise
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        why = "it is no plain file"
    elif sole and found.st_nlink > 1:
        why = f"it has {found.st_nlink} names (hard links), and writing would change the others' content"
    else:
        return fd
    os.close(fd)
    raise _not_plain(path, why)


def create_file(path: Path, mode: int) -> int:
    """Make a new file of this mode, whatever the umask, and return its descriptor for writing."""
    fd = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    allow(fd, mode)
    return fd


def allow(file: Path | int, mode: int) -> None:
    """
    Give a new file or folder the bits of its mode that the umask took.

    Bits that it has besides (a set-group-id folder's, which its content inherits) stay.  A file system without modes
    refuses; then the mode is the mount's.
    """
    with suppress(OSError):
        os.chmod(file, stat.S_IMODE(os.stat(file).st_mode) | mode)


def _not_plain(path: Path, why: str) -> NotPlainError:
    return NotPlainError(errno.EINVAL, why, str(path))
