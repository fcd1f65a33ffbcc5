"""Folders for sockets: only this user can enter them, and the next run removes folders that a killed run left."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from backup.errors import Failed
from backup.runtime.ignoring import ignoring

_log = logging.getLogger(__name__)

_LONGEST_FOLDER = 80
"""Longest path of a temporary folder (bytes) that leaves room for our folder and a socket in it."""
_PRIVATE = "pybackup-own-"
_SHARED = "pybackup-live-"
_CONNECTED = b"03"
"""The state SS_CONNECTED in /proc/net/unix."""
_YOUNG = 60.0
"""Seconds.  A younger folder is left alone, because the run that made it may not have locked it yet."""


@contextmanager
def private_folder() -> Iterator[Path]:
    """
    Make a folder for a socket that only this user can reach.  The block's end removes the folder with its content.

    The folder is locked with flock, which the kernel releases however this process ends.  A folder that can be locked
    was therefore left by a killed run, and is removed by the next one.
    """
    folder, lock = _locked_folder(_PRIVATE)
    try:
        yield folder
    finally:
        os.close(lock)
        remove_folder(folder)


def shared_folder() -> tuple[Path, int]:
    """
    Make a folder for a socket on which a running QEMU will listen.  Returns the folder, and a descriptor to close when
    the folder is removed.

    QEMU keeps listening when a run is killed, and recovery looks for the socket there.  The folder is a leftover only
    when no process listens in it any more.
    """
    return _locked_folder(_SHARED)


def remove_folder(folder: Path) -> None:
    """Remove a folder with the sockets in it.  This needs one descriptor; rmtree needs two, which may not be left."""
    with ignoring(_log, f"removal of {folder}", OSError):
        for name in os.listdir(folder):
            os.unlink(folder / name)
        os.rmdir(folder)
    shutil.rmtree(folder, ignore_errors=True)  # in case the folder contains more than we put there


def _locked_folder(prefix: str) -> tuple[Path, int]:
    folder = Path(_socket_folder(prefix))
    with ExitStack() as undo:
        undo.callback(os.rmdir, folder)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, lock)
        with ignoring(_log, f"lock of {folder}", OSError):  # a file system without locks: no run removes the folder
            fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_orphans(folder.parent)
        undo.pop_all()
    return folder, lock


def _remove_orphans(parent: Path) -> None:
    for folder in (*parent.glob(f"{_PRIVATE}*"), *parent.glob(f"{_SHARED}*")):
        with ignoring(_log, f"{folder} is not removed", OSError):  # another user's, in use, or already removed
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if status.st_uid == os.geteuid() and time.time() - status.st_mtime > _YOUNG:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if folder.name.startswith(_PRIVATE) or not _has_socket(folder):
                        remove_folder(folder)
            finally:
                os.close(fd)


def _has_socket(folder: Path) -> bool:
    """
    Tell whether a process listens on a socket in the folder.

    The kernel's table answers this; connecting would not be safe, since a QEMU 7.2 may crash when the client leaves.
    """
    sockets = Path("/proc/net/unix").read_bytes()
    return os.fsencode(folder) + b"/" in sockets


def has_connection(path: str) -> bool:
    """Tell whether a client is connected to the server that listens at `path`, or waits for the server to accept."""
    with ignoring(_log, "reading /proc/net/unix", OSError):
        sockets = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_bytes().splitlines()]
        return any(fields[5] == _CONNECTED and fields[7] == os.fsencode(path) for fields in sockets if len(fields) == 8)
    return False


def _socket_folder(prefix: str) -> str:
    """
    Make a folder of mode 0700 for a socket.

    The path of a socket has at most 107 bytes (unix(7)).  If the temporary folder's path leaves no room, /tmp is used.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise Failed(
            str(error.strerror),
            hint="free some space there, or name another folder with TMPDIR=DIR; "
            "the error also occurs when a process may open too few files (ulimit -n)",
        ) from None
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        folder = "/tmp"  # noqa: S108 - mkdtemp makes a folder in it that only we can enter
    return tempfile.mkdtemp(prefix=prefix, dir=folder)
