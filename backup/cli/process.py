"""
Makes a process that may write files out of whatever cron, ssh or a script left us, and ends it.
"""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from typing import NoReturn

from backup.cli import streams
from backup.runtime import signals


def prepare() -> None:
    """Standard streams, the limit of open files, signals, and threads that nobody needs."""
    streams.prepare()
    # numpy's OpenBLAS starts a thread for each core when it is imported; we multiply no matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # a chain is opened whole, a file for each point
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signals.catch()


def end(code: int) -> NoReturn:
    """
    End the process at once, all being written and every thread joined by now.

    Else Python takes apart every module first, 0.02 s with numpy among them, for a kernel that frees all memory anyway.
    """
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)
