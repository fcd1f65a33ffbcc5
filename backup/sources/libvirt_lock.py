"""
One run of pybackup at a time for each domain, whatever the repository.

libvirt 11.3 crashes, or answers nothing about the domain any more, when a program begins a backup while another one
asks for checkpoints of the same domain.  The kernel frees the lock when a process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backup.errors import Locked
from backup.runtime.ignoring import ignoring

_log = logging.getLogger(__name__)


@contextmanager
def only_run(uuid: str, name: str) -> Iterator[None]:
    """
    Hold the lock of a domain; a host that offers no safe place for locks has none.

    Raises
    ------
    Locked
        Another run has the domain.
    """
    fd = -1
    with ignoring(_log, f"the lock of domain {name}", OSError):
        fd = os.open(_folder() / uuid, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if fd >= 0:
            _lock(fd, name)
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _folder() -> Path:
    """
    Make sure that there is a folder that only this user can write to: in /run for root, whose environment varies.

    Raises
    ------
    OSError
        There is none.  In a folder of another user's, that user could block backups.
    """
    user = os.geteuid()
    base = Path("/run") if user == 0 else Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    folder = base / f"pybackup-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != user or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def _lock(fd: int, name: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Locked(
            f"another run of pybackup uses domain {name} just now",
            hint="wait for its end, and run the command again; the kernel frees the lock when that run ends",
        ) from None
    except OSError as error:
        _log.info("the lock of domain %s: %s", name, error)
