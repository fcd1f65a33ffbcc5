"""
Scratch storage: where QEMU keeps the old data that the guest overwrites while its disk is read.

If a copy of old data cannot be stored, the backup must fail, and the guest's write must not.  So the storage of an
overlay is a quorum of two nodes, and one of them is enough (`vote-threshold` 1):

    overlay (qcow2) -> quorum -> file       the scratch file, which answers reads (`read-pattern` fifo)
                              -> null-co    accepts every write, and reads as zeroes

If the file fails, the null device accepts the write, and the guest continues.  The lost copy then reads as zeroes,
without an error.  Two witnesses report the loss: QEMU's event QUORUM_REPORT_BAD (`Witness`), and the kernel's error of
a write that failed after QEMU had passed it on (`write_back_error`).  QEMU's query-blockstats is no witness: it counts
failures of devices, not of nodes.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from backup.errors import Failed, SourceError
from backup.qemu.programs import DEVNULL, Process, has_ended, popen
from backup.qmp.monitor import Event, Monitor
from backup.runtime.ignoring import ignoring

_log = logging.getLogger(__name__)

_SPARE = 64 << 20
"""Bytes that a scratch file may have beyond the size of the disk and a thousandth of it, for tables."""
_UNIT = 64 << 10
"""Cluster size (bytes) of a scratch image."""
_LITTLE = 1 << 20
"""Bytes by which a scratch file is extended if the file system refuses the full length."""
_UNUSED = _UNIT - 1
"""An unused offset in the first cluster of a qcow2 image, whose header has some hundred bytes."""
_WAIT_BEFORE = 1
"""SYNC_FILE_RANGE_WAIT_BEFORE."""
_FAR = 1 << 60
"""An offset beyond the end of any scratch file, where no page waits to be written."""
_FAILURES = {"QUORUM_REPORT_BAD", "QUORUM_FAILURE"}
"""Events of a quorum: one of its nodes failed, or all did."""
_MOST_SHOWN = 300
"""Characters of QEMU's text that a message shows."""


@dataclass(frozen=True, slots=True)
class LostCopy:
    """The first failed access to a scratch file: the number of its overlay, the kind of access, QEMU's error."""

    number: int
    access: str
    error: str


class Witness:
    """
    Collects what QEMU's events report about the scratch files of a run.  Safe to use from several threads.

    QEMU sends the first event of a node before it answers a command that was sent after the failure, and further events
    of that node once a second.
    """

    def __init__(self, monitor: Monitor, own: str) -> None:
        self._monitor = monitor
        self._own = own
        self._hearing = threading.Lock()
        self._names: set[str] = set()
        self._lost: LostCopy | None = None

    def events(self) -> set[str]:
        """Return the names of all events since the beginning."""
        self._hear()
        return set(self._names)

    def lost(self) -> LostCopy | None:
        """Return the first failed access that QEMU has reported so far; None if there is none."""
        self._hear()
        return self._lost

    def _hear(self) -> None:
        # The lock is held until the events are noted, so that events taken by another thread count here as well.
        with self._hearing:
            for event in self._monitor.events():
                self._names.add(event.name)
                self._lost = self._lost or _lost_copy(event, self._own)


def file_node(own: str, number: int, fdset: int) -> dict[str, object]:
    """Return the scratch file as a QEMU node.  It is never flushed, because nothing needs it after a crash."""
    return {
        "driver": "file",
        "node-name": f"{own}s{number}",
        "filename": f"/dev/fdset/{fdset}",
        "cache": {"no-flush": True},
    }


def guarded(own: str, number: int, storage: dict[str, object], length: int) -> dict[str, object]:
    """Return `storage` below a quorum that never fails; `length` is the length of its file in bytes."""
    null = {"driver": "null-co", "node-name": f"{own}n{number}", "size": length, "read-zeroes": True}
    return {
        "driver": "quorum",
        "node-name": f"{own}q{number}",
        "vote-threshold": 1,
        "read-pattern": "fifo",
        "children": [storage, null],
    }


def lengthen(fd: int, size: int) -> int:
    """
    Extend a scratch file, without allocating space, to the length that copies of a whole disk of `size` bytes need.

    Returns the length in bytes.  On a file system that has no such long files (ext4: 16 TiB) the length is short: the
    file grows with QEMU's writes, and a write beyond the longest file is a lost copy like any other.
    """
    length = _whole(size + size // 1000 + _SPARE)
    try:
        os.ftruncate(fd, length)
    except OSError:
        length = _whole(os.fstat(fd).st_size + _LITTLE)
        os.ftruncate(fd, length)
    return length


def _whole(length: int) -> int:
    return -(-length // _UNIT) * _UNIT


class StorageHangs(SourceError):
    """The storage of a scratch folder does not answer."""

    def __init__(self, folders: Iterable[str], seconds: float) -> None:
        super().__init__(
            f"the storage of {', '.join(folders)} does not answer within {seconds:g} s; nothing of the backup was "
            "removed from QEMU, since the whole machine would have waited for that storage",
            hint="repair the storage; then the next run, or `pybackup clean`, removes what is left in QEMU",
        )


def require_answering(files: Mapping[int, str], seconds: float) -> None:
    """
    Write a byte that QEMU does not use to each open scratch file; `files` maps descriptors to folders.

    QEMU's main loop, and with it the machine, hangs when something is removed whose storage hangs.  The bytes are
    written by a program and not by a thread: a process keeps its locks after its end while a thread of it waits for
    storage.

    Raises
    ------
    StorageHangs
        A write did not return in time.
    """
    with ignoring(_log, "the storage is not tested", Failed):  # no program can be started; removal goes on without it
        probes = [(folder, _write(f"/proc/self/fd/{fd}", [fd])) for fd, folder in files.items()]
        _require_ended(probes, seconds)


def require_folders_answering(folders: Iterable[str], seconds: float) -> None:
    """
    Make an unnamed file in each folder that contains scratch files of an interrupted run.

    Raises
    ------
    StorageHangs
        A folder did not answer in time.
    """
    make = "import sys, tempfile; tempfile.TemporaryFile(dir=sys.argv[1]).write(b'0')"
    with ignoring(_log, "the storage is not tested", Failed):
        _require_ended([(folder, popen([sys.executable, "-c", make, folder], DEVNULL)) for folder in folders], seconds)


def _write(file: str, fds: Sequence[int]) -> Process:
    operands = ["if=/dev/zero", f"of={file}", "bs=1", "count=1", f"seek={_UNUSED}", "conv=notrunc"]
    return popen(["dd", *operands], DEVNULL, fds)


def _require_ended(probes: Sequence[tuple[str, Process]], seconds: float) -> None:
    """Refuse storage whose probe has not ended in time.  A probe that failed is an answer, too."""
    deadline = time.monotonic() + seconds
    hanging = [folder for folder, probe in probes if not has_ended(probe, deadline - time.monotonic())]
    if hanging:
        raise StorageHangs(dict.fromkeys(hanging), seconds)


def write_back_error(fd: int) -> OSError | None:
    """
    Return the error of a write to an open file that failed after the kernel had accepted it; None if there was none.

    NFS and thin storage can be full although a write succeeds, because the page is written later.  This call waits for
    no page.
    """
    if _libc().sync_file_range(fd, ctypes.c_int64(_FAR), ctypes.c_int64(1), _WAIT_BEFORE) == 0:
        return None
    number = ctypes.get_errno()
    # These three mean that the system lacks the call, or that the call has no meaning for the storage.
    return None if number in {errno.ENOSYS, errno.EINVAL, errno.ESPIPE} else OSError(number, os.strerror(number))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _lost_copy(event: Event, own: str) -> LostCopy | None:
    """
    Return what an event reports about a scratch file whose node names begin with `own`; None if it reports nothing.
    """
    if event.name not in _FAILURES:
        return None
    node = str(event.data.get("node-name") or event.data.get("reference") or "")
    digits = node.removeprefix(own)[1:]
    if not node.startswith(own) or re.fullmatch("[0-9]{1,6}", digits) is None:
        return None
    access, error = str(event.data.get("type", "access")), str(event.data.get("error", "no reason given"))
    return LostCopy(int(digits), access[:_MOST_SHOWN], error[:_MOST_SHOWN])
