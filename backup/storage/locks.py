"""Locks on the files of a folder, with flock(2): one writer, many readers."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from backup.errors import Locked
from backup.storage.base import IN_USE, UNTOLD
from backup.storage.plain_file import open_file

_LOCK_SECONDS = 0.5
"""Seconds to wait for a machine's lock, which another run may hold for an instant to test whether it is free."""


@contextmanager
def alone(paths: Sequence[Path]) -> Iterator[str | None]:
    """Hold an exclusive flock on each file that exists, until the block ends.  Yields None, or why not."""
    with ExitStack() as stack:
        reasons = (_why_held(path, stack) for path in paths)
        yield next((why for why in reasons if why is not None), None)


def _why_held(path: Path, stack: ExitStack) -> str | None:
    """Lock a file until the stack ends, and return None; or return why not: IN_USE, or UNTOLD with a reason."""
    try:
        fd = _open_to_lock(path)
    except FileNotFoundError:
        return None
    stack.callback(os.close, fd)
    try:
        return None if _try_flock(fd, fcntl.LOCK_EX) else IN_USE
    except OSError as error:
        return f"{UNTOLD}: {error.strerror}"


def _open_to_lock(path: Path) -> int:
    """Open a file for writing if permitted: NFS allows an exclusive flock only then (flock(2))."""
    try:
        return open_file(path, os.O_RDWR)
    except OSError:
        return open_file(path, os.O_RDONLY)


def has_name(fd: int, path: Path) -> bool:
    """Tell whether `path` still is the name of the open file `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def flock(fd: int, machine: str, *, shared: bool = False) -> None:
    """
    Take a machine's lock, and write this process's id into the lock file.

    With `shared`, the caller only tests whether the lock is free, and nothing is written.

    Raises
    ------
    Locked
        Another process still has the lock after half a second.
    """
    until = time.monotonic() + _LOCK_SECONDS
    while not _try_flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
        if time.monotonic() > until:
            holder = os.pread(fd, 200, 0).decode("ascii", "replace").strip() or "an unknown process"
            raise Locked(
                f"machine {machine} is locked by another run ({holder})",
                hint="wait for that run to end; the lock is freed by itself when the process ends",
            )
        time.sleep(_LOCK_SECONDS / 20)
    if not shared:
        with suppress(OSError):  # a full disk: the lock is held all the same, but its holder is not named
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"host {socket.gethostname()} pid {os.getpid()}\n".encode("ascii", "replace"), 0)


def _try_flock(fd: int, kind: int) -> bool:
    """Take an flock without waiting; return False if another process's lock prevents it."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # PermissionError from a file system that uses fcntl locks (NFS)
        return False
    return True
