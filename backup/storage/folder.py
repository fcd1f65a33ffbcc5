"""Files in a folder: small ones written whole or not at all, and folders made durable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backup.errors import Damaged, Failed, NotFound
from backup.runtime.shortage import NOT_DAMAGE
from backup.storage.plain_file import HINT, NotPlainError, allow, create_file, open_file


def open_plain(path: Path) -> int:
    """
    Open a file of the repository for reading and return its descriptor; never a link, a pipe or a device.

    Raises
    ------
    NotFound
        There is no such file.
    Damaged
        Something else than a file has its name, or the disk fails.
    Failed
        This process may not open it, or not so many files: nothing is known to be damaged.
    """
    try:
        return open_file(path, os.O_RDONLY)
    except FileNotFoundError:
        raise NotFound(f"{path} is missing", hint="bring the file back from a copy of the repository") from None
    except OSError as error:
        if error.errno in NOT_DAMAGE:
            raise Failed(
                f"{path} cannot be opened: {error.strerror}",
                hint="run as the repository's owner; a chain needs as many open files as it has points (ulimit -n)",
            ) from None
        raise Damaged(f"{path} cannot be opened: {error.strerror}", hint=HINT) from None


TEMPORARY = ".tmp"


@dataclass(frozen=True, slots=True)
class Modes:
    """Permissions of what is made: a backup holds everything the machine held."""

    file: int = 0o600
    folder: int = 0o700


def write_whole(path: Path, content: bytes, mode: int) -> None:
    """Write a file that appears under its name whole or not at all, and lasts: fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write_temporary(temporary, content, mode)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Is it a folder, or a link to one?  A link that leads in a circle is none, and hides none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def make_folder(path: Path, mode: int) -> None:
    """Make a folder of this mode, whatever the umask; another first run may have been faster."""
    path.mkdir(mode=mode, exist_ok=True)
    allow(path, mode)


def write_temporary(path: Path, content: bytes, mode: int) -> None:
    """Write a new file that lasts; what has its name is a leftover, and goes."""
    try:
        fd = create_file(path, mode)
    except FileExistsError:
        path.unlink()
        fd = create_file(path, mode)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, limit: int) -> bytes:
    """
    Read a plain file, at most `limit` bytes and one; not through a link, and never waiting for a pipe's writer.

    A run reads each manifest of a machine.  So no file object is made for it, and no more memory is asked for than the
    file has: to get megabytes for a kilobyte, and give them back, takes longer than to read it.
    """
    fd = open_file(path, os.O_RDONLY)
    try:
        left = min(os.fstat(fd).st_size, limit + 1)
        parts = []
        while left and (part := os.read(fd, left)):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(fd)
    return b"".join(parts)


def sync_folder(path: Path) -> None:
    """Make the names in a folder last: a rename without it can vanish in a power cut (trap 43)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal into two lines.  `path` is named where the error names none."""
    try:
        yield
    except NotPlainError as error:
        raise Failed(f"{error.filename} cannot be opened: {error.strerror}", hint=HINT) from None
    except OSError as error:
        raise Failed(
            f"{error.filename or path}: {error.strerror}",
            hint="check the repository's space and permissions; nothing published before was changed",
        ) from None
