"""Turn an OSError of a storage into an error for the user, with a hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backup.errors import BackupError, Damaged, Failed, NotFound
from backup.runtime.shortage import NOT_DAMAGE
from backup.storage.base import Files, RangeReader, Unavailable
from backup.storage.plain_file import HINT, NotPlainError


class NoAnswer(Failed):
    """A storage elsewhere does not answer, or refuses: nothing is known about its files, and no other call may help."""


def require_answer(error: OSError) -> None:
    """
    Pass on an error of the storage that tells nothing about a file; callers take others for damage.

    Raises
    ------
    NoAnswer
        The storage did not answer, or refused.
    """
    if isinstance(error, Unavailable):
        raise NoAnswer(f"{error.filename}: {error.strerror}", hint=error.hint) from None


def open_file(files: Files, name: str, *, once: int = 0) -> RangeReader:
    """
    Open a file of the repository for reading, as `Files.open`.

    Raises
    ------
    NotFound, Damaged, Failed
        As `opening`.
    """
    with opening(files.location):
        return files.open(name, once=once)


@contextmanager
def opening(location: str) -> Iterator[None]:
    """
    Explain why a file that a manifest names cannot be opened.  `location` is named where the error names no file.

    Raises
    ------
    NotFound
        The file does not exist.
    Failed
        This process has no permission, or too many open files: nothing is known to be damaged.
    Damaged
        The name is not that of a plain file, or the storage fails.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(
            f"{error.filename or location} is missing", hint="bring the file back from a copy of the repository"
        ) from None
    except OSError as error:
        require_answer(error)
        raise _not_opened(error, location) from None


def _not_opened(error: OSError, location: str) -> BackupError:
    message = f"{error.filename or location} cannot be opened: {error.strerror}"
    if error.errno in NOT_DAMAGE:
        return Failed(
            message,
            hint="run as the repository's owner; a chain needs as many open files as it has points (ulimit -n)",
        )
    return Damaged(message, hint=HINT)


@contextmanager
def explained(location: str) -> Iterator[None]:
    """
    Explain why the repository cannot be changed or listed.  `location` is named where the error names no file.

    Raises
    ------
    Failed
        The block raised an OSError.
    """
    try:
        yield
    except NotPlainError as error:
        raise Failed(f"{error.filename} cannot be opened: {error.strerror}", hint=HINT) from None
    except OSError as error:
        require_answer(error)
        raise Failed(
            f"{error.filename or location}: {error.strerror}",
            hint="check the repository's space and permissions; nothing published before was changed",
        ) from None
