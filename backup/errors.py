"""
The tree of errors, with exit codes and hints.

    BackupError
    +-- Failed           1   no code of its own
    +-- UsageError       2   wrong usage or configuration
    +-- NotFound        10   no such repository, machine, point or disk
    +-- Locked          11   another run holds the machine
    +-- Damaged         12   a chain, a manifest or a data file is damaged
    +-- SourceError     13   the source cannot be reached or read
    +-- BitmapUnusable  14   the bitmap cannot be used, and no fallback is allowed

    Interrupted        129   SIGHUP; 130 for SIGINT, 143 for SIGTERM

Every error says what happened, with the values, and what to do about it: `pybackup: error: MESSAGE` and
`pybackup: hint: HINT`.  They are raised where a fault is found and caught in one place, `backup.cli.app.main`;
any other exception is a bug, of which --debug shows the traceback.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence

WARNINGS_EXIT_CODE = 3
"""Exit code of a run that made its points but warned on the way (a fallback to a rescan, for example)."""


class BackupError(Exception):
    """Base of all errors that a user can meet."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Failed(BackupError):
    """Failed for a reason that has no exit code of its own (a full disk, for example)."""


class UsageError(BackupError):
    """The command line or the configuration is wrong; `listed`: the message has a line for each of its problems."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str, listed: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.listed = listed


class NotFound(BackupError):
    """No such repository, machine, point or disk."""

    exit_code = 10


class Locked(BackupError):
    """Another run holds the machine's lock."""

    exit_code = 11


class Damaged(BackupError):
    """
    A chain, a manifest, a digest file or a data file is not what it was when it was written.

    `ranges` are the parts of the disk, start and end in bytes, whose content the damage puts in doubt; empty where that
    is not known.
    """

    exit_code = 12

    def __init__(self, message: str, *, hint: str, ranges: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(message, hint=hint)
        self.ranges = ranges


class DamagedBlock(Damaged):
    """A block of a data file, bytes `start` to `end` of the file at `path`, does not match its digest."""

    def __init__(self, path: str, start: int, end: int, *, message: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.start = start
        self.end = end


class SourceError(BackupError):
    """The source cannot be reached, opened or read."""

    exit_code = 13


class BitmapUnusable(BackupError):
    """The bitmap cannot be continued from, and the user forbade the fallback to a rescan or a full."""

    exit_code = 14


class Interrupted(BaseException):
    """
    The run was stopped by a signal.

    It comes between any two lines, so it is no BackupError and, like KeyboardInterrupt, not even an Exception: whoever
    takes an error for a damaged manifest or a failed machine, and goes on, must not take this for one.  Its hint holds
    for every command; those that change the repository say more.
    """

    def __init__(self, signal_number: int) -> None:
        self.message = f"stopped by {signal.Signals(signal_number).name}"
        self.hint = "no point was harmed by that; run the command again"
        self.exit_code = 128 + signal_number
        super().__init__(self.message)


def merged_exit_code(codes: Iterable[int], *, worst: Sequence[int] = (), warned: bool = False) -> int:
    """
    Merge the exit codes of several machines, disks or files into the exit code of the command.

    The first code of `worst` that occurs wins.  Otherwise failures that all have one code keep that code, and failures
    of different codes become 1.  Without a failure, the code is 3 if there was a warning and 0 if there was none.
    """
    failures = set(codes) - {0}
    for code in worst:
        if code in failures:
            return code
    if failures:
        return failures.pop() if len(failures) == 1 else Failed.exit_code
    return WARNINGS_EXIT_CODE if warned else 0
