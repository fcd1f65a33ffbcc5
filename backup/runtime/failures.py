"""Turn any exception into an error of pybackup, with two lines for the user: what happened, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TypeVar

from backup.errors import BackupError, Damaged, Failed
from backup.runtime import shortage

_T = TypeVar("_T")


def as_backup_error(error: Exception) -> BackupError:
    """
    Return the error of pybackup that explains `error`, which stays its cause.

    A shortage of the system (open files, memory, processes) gets its own hint; an exception that no code expected is a
    bug.
    """
    explained = _explained(error)
    if explained is not error:
        explained.__cause__ = error
    return explained


def attempt(work: Callable[[], _T]) -> _T | BackupError:
    """Do one machine's work; return any failure, a bug included, so that the other machines are still processed."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - the outcome of the machine, shown and in the exit code
        return as_backup_error(error)


def _explained(error: Exception) -> BackupError:
    if isinstance(error, BackupError):
        return _with_hint_for_shortage(error)
    if isinstance(error, MemoryError):
        return Failed("there is not enough memory", hint=shortage.NO_MEMORY)
    if isinstance(error, OSError) and error.strerror:
        return _of_system(error, error.strerror)
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return Failed("the system gives no more threads", hint=shortage.NO_PROCESS)
    return Failed(
        f"a bug in pybackup: {type(error).__name__}: {error}", hint="run the command again with --debug, and report it"
    )


def _with_hint_for_shortage(error: BackupError) -> BackupError:
    hint = shortage.hint_for(error.message)
    if hint is None:
        return error
    if isinstance(error, Damaged):  # the file could not be read, so that nothing is known about damage
        return Failed(error.message, hint=hint)
    error.hint = hint
    return error


def _of_system(error: OSError, what: str) -> Failed:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    hint = shortage.NO_PROCESS if error.errno == errno.EAGAIN else shortage.hint_for(what)
    otherwise = "check the path, its permissions, and whether the current folder exists; --debug shows where it failed"
    return Failed(f"{where}{what}", hint=hint or otherwise)
