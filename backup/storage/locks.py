"""Locks on files: one writer, many readers."""

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

_PATIENCE = 0.5
"""Seconds to wait for a machine's lock: another machine's run may only be looking whether anybody has it."""


@contextmanager
def alone(paths: Sequence[Path]) -> Iterator[str | None]:
    """Have files to ourselves until the block ends, those that there are; yields why we have not, if so."""
    with ExitStack() as stack:
        found = (_why_held(path, stack) for path in paths)
        yield next((why for why in found if why is not None), None)


def _why_held(path: Path, stack: ExitStack) -> str | None:
    """Lock a file until the stack ends; why not, where somebody else has a lock on it, or there is no telling."""
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
    """Open a file for writing if we may: on NFS, only so it can be locked exclusively (flock(2))."""
    try:
        return open_file(path, os.O_RDWR)
    except OSError:
        return open_file(path, os.O_RDONLY)


def has_name(fd: int, path: Path) -> bool:
    """Is it this file that has the name?"""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def flock(fd: int, machine: str, *, shared: bool = False) -> None:
    """Take a machine's lock, and say in it who has it; `shared`: only for a look, which writes nothing."""
    until = time.monotonic() + _PATIENCE
    while not _try_flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
        if time.monotonic() > until:
            holder = os.pread(fd, 200, 0).decode("ascii", "replace").strip() or "an unknown process"
            raise Locked(
                f"machine {machine} is locked by another run ({holder})",
                hint="wait for that run to end; the lock is freed by itself when the process ends",
            )
        time.sleep(_PATIENCE / 20)
    if not shared:
        with suppress(OSError):  # a full disk: the lock holds all the same, only its holder is not named
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"host {socket.gethostname()} pid {os.getpid()}\n".encode("ascii", "replace"), 0)


def _try_flock(fd: int, kind: int) -> bool:
    """Take an flock at once; False where somebody else's is in the way."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter, where the file system has fcntl's locks for it (NFS)
        return False
    return True
