"""
Open the files of a repository: plain files only, and for writing only files that have no other name.

A repository may come back from another place, or lie where others can write.  A link in the place of a file would lead
out of the repository, a pipe would block, and a write to a file with a second hard link would change another file.
Reading a file with several names is safe: copies made with hard links (`cp -al`, `rsync --link-dest`) share their
points, and a point is never written to.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

HINT = "a repository holds plain files and folders, and no links; bring them back from a copy of the repository"


class NotPlainError(OSError):
    """The name is not that of a plain file, or the file has further names; `strerror` says which."""


def open_file(path: Path, flags: int, mode: int = 0o600, *, sole: bool = False) -> int:
    """
    Open a file of the repository and return its descriptor; never follow a link, never wait for a pipe.

    With `sole`, the file must have no other name, because it will be written to in place.

    Raises
    ------
    NotPlainError
        The name is not that of a plain file, or with `sole` the file has several names.
    OSError
        The file cannot be opened.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_plain(path, "it is a link") from None
        if error.errno == errno.ENXIO:
            raise _not_plain(path, "it is not a plain file") from None  # a pipe without a reader, a socket
        raise
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        why = "it is not a plain file"
    elif sole and status.st_nlink > 1:
        why = f"it has {status.st_nlink} names (hard links), and writing would change the others' content"
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
    Add the permissions of `mode` to a new file or folder, because the umask may have removed some.

    Other permissions stay (the set-group-ID bit that a folder inherits, for example).  A file system without modes
    refuses the change; there the mount decides about permissions.
    """
    with suppress(OSError):
        os.chmod(file, stat.S_IMODE(os.stat(file).st_mode) | mode)


def _not_plain(path: Path, why: str) -> NotPlainError:
    return NotPlainError(errno.EINVAL, why, str(path))
