"""
Folders for sockets that only this user can reach, and the removal of those that killed runs left.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from backup.errors import Failed

_LONGEST_FOLDER = 80
"""Bytes of a temporary folder's path that leave room for a folder and a socket in it."""
_PRIVATE = "pybackup-own-"
_SHARED = "pybackup-live-"
_CONNECTED = b"03"
"""A socket's state (SS_CONNECTED) in /proc/net/unix."""
_YOUNG = 60.0
"""Seconds: a folder that was just made may not be locked yet."""


@contextmanager
def private_folder() -> Iterator[Path]:
    """
    Make a folder for a socket that only this user can reach; it is removed with what it holds.

    The kernel frees the flock that is held on it however this process ends.  So a folder that gives the lock is what a
    killed run left, and goes too.
    """
    folder, lock = _locked_folder(_PRIVATE)
    try:
        yield folder
    finally:
        os.close(lock)
        remove_folder(folder)


def shared_folder() -> tuple[Path, int]:
    """
    Make a folder for a socket on which a running QEMU will listen; and a descriptor, to be closed with its removal.

    A QEMU goes on to listen for a run that was killed, and recovery looks for it there.  Only when nobody does is the
    folder what both left.
    """
    return _locked_folder(_SHARED)


def remove_folder(folder: Path) -> None:
    """Remove a folder with the sockets in it, with one descriptor: there may be no more, and rmtree takes two."""
    with suppress(OSError):
        for name in os.listdir(folder):
            os.unlink(folder / name)
        os.rmdir(folder)
    shutil.rmtree(folder, ignore_errors=True)  # what holds more than was ever put there


def _locked_folder(prefix: str) -> tuple[Path, int]:
    folder = Path(_socket_folder(prefix))
    with ExitStack() as undo:
        undo.callback(os.rmdir, folder)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, lock)
        with suppress(OSError):  # a file system without locks: then none of these is removed by others
            fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_orphans(folder.parent)
        undo.pop_all()
    return folder, lock


def _remove_orphans(place: Path) -> None:
    for folder in (*place.glob(f"{_PRIVATE}*"), *place.glob(f"{_SHARED}*")):
        with suppress(OSError):  # another user's, in use, or gone
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if status.st_uid == os.geteuid() and time.time() - status.st_mtime > _YOUNG:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if folder.name.startswith(_PRIVATE) or not _is_listened_in(folder):
                        remove_folder(folder)
            finally:
                os.close(fd)


def _is_listened_in(folder: Path) -> bool:
    """Has the kernel a socket there?  Not by asking who listens: a QEMU 7.2 may not survive a client that leaves."""
    bound = Path("/proc/net/unix").read_bytes()
    return os.fsencode(folder) + b"/" in bound


def has_connection(path: str) -> bool:
    """Tell whether a client is connected to the server that listens at `path`, or waits to be accepted."""
    with suppress(OSError):
        bound = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_bytes().splitlines()]
        return any(fields[5] == _CONNECTED and fields[7] == os.fsencode(path) for fields in bound if len(fields) == 8)
    return False


def _socket_folder(prefix: str) -> str:
    """
    Make a folder of mode 0700 for a socket.

    A socket's path has at most 107 bytes (unix(7)); where the temporary folder's leaves no room it is made in /tmp.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise Failed(
            str(error.strerror),
            hint="make room there, or name another folder with TMPDIR=DIR; "
            "where a process may open too few files (ulimit -n), this error comes as well",
        ) from None
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        folder = "/tmp"  # noqa: S108 - what mkdtemp makes in it is ours alone
    return tempfile.mkdtemp(prefix=prefix, dir=folder)
