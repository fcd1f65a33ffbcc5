"""
What the system lacks: open files, processes, memory.  It says nothing about a file that could not be opened for it.
"""

from __future__ import annotations

import errno
import os
import resource

NOT_DAMAGE = frozenset({errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors of open(2) that say something about this process or the system, and nothing about the file."""
NO_MEMORY = (
    "free memory or raise its limit (ulimit -v; MemoryMax= of a systemd unit), "
    "or lower connections, requests or request_size"
)
NO_PROCESS = "raise the limit of processes and threads (ulimit -u; TasksMax= of a systemd unit), or lower workers"


def hint_for(text: str) -> str | None:
    """What to do where a message, ours or a program's, says that files or memory ran out; None where it does not."""
    if os.strerror(errno.ENFILE) in text:  # it begins as that of EMFILE does
        return "the whole system has run out of open files: raise fs.file-max with sysctl"
    if os.strerror(errno.EMFILE) in text:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"raise the limit of open files, which is {hard} for pybackup (ulimit -n; LimitNOFILE= of a systemd unit); "
            "a running QEMU has a limit of its own"
        )
    return NO_MEMORY if os.strerror(errno.ENOMEM) in text else None
