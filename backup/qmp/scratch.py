"""
Scratch storage: where QEMU keeps what the guest overwrites while its disk is read.

A copy that cannot be kept must break the backup and never the guest's write.  So the storage of an overlay is a quorum
of two nodes, one of which is enough (`vote-threshold` 1):

    overlay (qcow2) -> quorum -> file       the scratch file, which answers reads (`read-pattern` fifo)
                              -> null-co    accepts every write, and reads as zeroes

Where the file fails, the null device accepts the write, and the guest goes on.  A copy that was lost in this way reads
as zeroes, with success.  Two witnesses tell of it: QEMU's event QUORUM_REPORT_BAD (`Witness`), and the kernel's error
of a write that failed only after QEMU had handed it over (`write_back_error`).  QEMU's query-blockstats counts failures
of devices only, not of nodes.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from backup.errors import Failed, SourceError
from backup.qemu.programs import DEVNULL, Process, has_ended, popen
from backup.qmp.monitor import Event, Monitor

_SPARE = 64 << 20
_UNIT = 64 << 10
_LITTLE = 1 << 20
_UNUSED = _UNIT - 1
"""An offset in a qcow2 image's first cluster, in which the header takes some hundred bytes."""
_WAIT_BEFORE = 1
"""SYNC_FILE_RANGE_WAIT_BEFORE."""
_FAR = 1 << 60
"""An offset beyond the end of any scratch file, where no page waits to be written."""
_LOST = {"QUORUM_REPORT_BAD", "QUORUM_FAILURE"}
"""Events of a quorum one node of which failed, or all."""


@dataclass(frozen=True, slots=True)
class Lost:
    """What QEMU said of the first access to a scratch file that failed: the overlay's number, the access, the error."""

    number: int
    access: str
    error: str


class Witness:
    """
    What QEMU's events say of a run's scratch files.  Safe to use from several threads.

    QEMU sends the first event of a node before it answers the command that was sent after the failure, and further ones
    of that node once a second.
    """

    def __init__(self, monitor: Monitor, own: str) -> None:
        self._monitor = monitor
        self._own = own
        self._hearing = threading.Lock()
        self._names: set[str] = set()
        self._lost: Lost | None = None

    def events(self) -> set[str]:
        """Names of all events since the beginning."""
        self._hear()
        return set(self._names)

    def lost(self) -> Lost | None:
        """The first access that failed, of those that QEMU has told by now; None where it has told of none."""
        self._hear()
        return self._lost

    def _hear(self) -> None:
        # The lock is held until the events are noted: events that another thread takes at this moment must count too.
        with self._hearing:
            for event in self._monitor.events():
                self._names.add(event.name)
                self._lost = self._lost or _lost(event, self._own)


def file_node(own: str, number: int, fdset: int) -> dict[str, object]:
    """The scratch file of a number as a node of QEMU's; nothing of it is needed after a crash, so that no flush is."""
    return {
        "driver": "file",
        "node-name": f"{own}s{number}",
        "filename": f"/dev/fdset/{fdset}",
        "cache": {"no-flush": True},
    }


def guarded(own: str, number: int, storage: dict[str, object], length: int) -> dict[str, object]:
    """The storage below a quorum that never fails; `length` (bytes) must be that of the storage's file."""
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
    Give a scratch file, without taking space, the length that copies of a whole disk of `size` bytes need.

    Returns the length.  It is short where the file system has no larger files (ext4: 16 TiB): the file then grows with
    what QEMU writes, and a write beyond the largest size is a lost copy as any other.
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


class Silent(SourceError):
    """The storage of a scratch folder does not answer."""

    def __init__(self, folders: Iterable[str], seconds: float) -> None:
        super().__init__(
            f"the storage of {', '.join(folders)} does not answer within {seconds:g} s; nothing of the backup was "
            "removed from QEMU, since the whole machine would have waited for that storage",
            hint="restore the storage; after that the next run, or `pybackup clean`, removes what is left in QEMU",
        )


def require_answering(files: Mapping[int, str], seconds: float) -> None:
    """
    Write a byte, which QEMU does not use, to each open scratch file; `files` has descriptors and folders.

    Each removal of something that uses hanging storage hangs QEMU's main loop, and with it the machine.  A program
    writes, and no thread: a process with a thread that waits for storage keeps its locks after its end.

    Raises
    ------
    Silent
        A write did not return in time.
    """
    with suppress(Failed):  # no program can be started: nobody can ask, and removal must not wait for that
        probes = [(folder, _write(f"/proc/self/fd/{fd}", [fd])) for fd, folder in files.items()]
        _require_ended(probes, seconds)


def require_folders_answering(folders: Iterable[str], seconds: float) -> None:
    """
    Make a nameless file in each folder, for scratch files that a run which was cut off left to QEMU.

    Raises
    ------
    Silent
        A folder did not answer in time.
    """
    make = "import sys, tempfile; tempfile.TemporaryFile(dir=sys.argv[1]).write(b'0')"
    with suppress(Failed):
        _require_ended([(folder, popen([sys.executable, "-c", make, folder], DEVNULL)) for folder in folders], seconds)


def _write(file: str, fds: Sequence[int]) -> Process:
    given = ["if=/dev/zero", f"of={file}", "bs=1", "count=1", f"seek={_UNUSED}", "conv=notrunc"]
    return popen(["dd", *given], DEVNULL, fds)


def _require_ended(probes: Sequence[tuple[str, Process]], seconds: float) -> None:
    """An error is an answer, too; a program that waits for storage is left behind."""
    deadline = time.monotonic() + seconds
    silent = [folder for folder, probe in probes if not has_ended(probe, deadline - time.monotonic())]
    if silent:
        raise Silent(dict.fromkeys(silent), seconds)


def write_back_error(fd: int) -> OSError | None:
    """
    The error of a write to an open file that failed after the kernel had accepted it; None where there is none.

    NFS and thin storage can be full without a write's failing: the page is written later.  This waits for no page.
    """
    if _libc().sync_file_range(fd, ctypes.c_int64(_FAR), ctypes.c_int64(1), _WAIT_BEFORE) == 0:
        return None
    number = ctypes.get_errno()
    # Not a system that lacks the call, or storage for which it has no meaning.
    return None if number in {errno.ENOSYS, errno.EINVAL, errno.ESPIPE} else OSError(number, os.strerror(number))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


_MOST_SHOWN = 300
"""Characters of QEMU's own words in an error."""


def _lost(event: Event, own: str) -> Lost | None:
    """What an event says of a scratch file whose names begin with `own`; None where it is of something else."""
    if event.name not in _LOST:
        return None
    node = str(event.data.get("node-name") or event.data.get("reference") or "")
    digits = node.removeprefix(own)[1:]
    if not node.startswith(own) or re.fullmatch("[0-9]{1,6}", digits) is None:
        return None
    what, why = str(event.data.get("type", "access")), str(event.data.get("error", "no error told"))
    return Lost(int(digits), what[:_MOST_SHOWN], why[:_MOST_SHOWN])
