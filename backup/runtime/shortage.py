"""
Shortages of the system: open files, processes, memory, free space.

A file that cannot be opened because of a shortage is not damaged, and must not be reported as damaged.
"""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

NOT_DAMAGE = frozenset({errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors of open(2) that concern this process or the system, and tell nothing about the content of the file."""
NO_MEMORY = (
    "free memory or raise its limit (ulimit -v; MemoryMax= of a systemd unit), "
    "or lower connections, requests or request_size"
)
NO_PROCESS = "raise the limit of processes and threads (ulimit -u; TasksMax= of a systemd unit), or lower workers"


def hint_for(text: str) -> str | None:
    """Return the hint for a message, ours or a program's, that reports a lack of files or memory; None for others."""
    if os.strerror(errno.ENFILE) in text:  # tested first: the text of EMFILE is a part of this one
        return "the whole system has run out of open files: raise fs.file-max with sysctl"
    if os.strerror(errno.EMFILE) in text:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"raise the limit of open files, which is {hard} for pybackup (ulimit -n; LimitNOFILE= of a systemd unit); "
            "a running QEMU has its own limit"
        )
    return NO_MEMORY if os.strerror(errno.ENOMEM) in text else None


def free_bytes(place: Path | str | int) -> int:
    """
    Return the free space (bytes) that every user may fill, in the file system of a folder or of an open file.

    Raises
    ------
    OSError
        The folder or the file system cannot be read.
    """
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


def free_bytes_for_us(place: Path | str | int) -> int | None:
    """
    Return the free space (bytes) that this user may fill; root may also fill the blocks reserved for root.

    Returns None where the file system does not know its free space (network file systems, for example).

    Raises
    ------
    OSError
        The folder or the file system cannot be read.
    """
    status = os.statvfs(place)
    blocks = status.f_bfree if os.geteuid() == 0 else status.f_bavail
    return blocks * status.f_frsize if status.f_blocks else None
