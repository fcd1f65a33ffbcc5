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

The message says what happened, with the values; the hint says what to do about it.  The command line prints them as
`pybackup: error: MESSAGE` and `pybackup: hint: HINT`.  The code that finds a fault raises the error, and one place
catches all of them: `backup.cli.app.main`.  Any other exception is a bug; its traceback is shown with --debug.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

WARNINGS_EXIT_CODE = 3
"""Exit code of a run that made all its points, but with warnings (a fallback to a rescan, for example)."""


class BackupError(Exception):
    """Base class of all errors that a user can meet."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Failed(BackupError):
    """The command failed for a reason that has no exit code of its own (a full disk, for example)."""


class UsageError(BackupError):
    """
    The command line or the configuration is wrong.

    `listed` is true where the message lists several problems, one on each line.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str, listed: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.listed = listed


class NoIdentity(UsageError):
    """The repository is sealed, and no identity that the user named opens it: the fault of no machine or point."""


class NotFound(BackupError):
    """The repository, machine, point or disk does not exist."""

    exit_code = 10


class Locked(BackupError):
    """Another run holds the lock of the machine."""

    exit_code = 11


class Damaged(BackupError):
    """
    The content of a chain, a manifest, a digest file or a data file is not what was written.

    `ranges` lists the parts of the disk (start and end in bytes) that the damage makes doubtful.  The list is empty
    where these parts are not known.
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
    """No bitmap can be continued, and the user did not allow a rescan or a full point instead."""

    exit_code = 14


class Interrupted(BaseException):
    """
    A signal stopped the run.

    This exception can occur between any two lines, so it derives from BaseException, like KeyboardInterrupt: code that
    catches errors and continues (with the next manifest, or the next machine) must not catch a signal.  The hint is
    true of every command; commands that change the repository replace it with a more exact one.
    """

    def __init__(self, signal_number: int) -> None:
        self.message = f"stopped by {signal.Signals(signal_number).name}"
        self.hint = "no point was damaged; run the command again"
        self.exit_code = 128 + signal_number
        super().__init__(self.message)


@contextmanager
def os_errors_as(what: str, *, hint: str, kind: type[BackupError] = Failed) -> Iterator[None]:
    """
    Turn an OSError in the block into an error for the user: "WHAT: the system's reason".

    Raises
    ------
    BackupError
        The error that replaces the OSError, of the class `kind`.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}", hint=hint) from None


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
