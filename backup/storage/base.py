"""
Where a repository's files lie: the protocols that each kind of storage implements.

A storage holds folders of files, one level deep: the repository's own files in the folder "", and the files of each
machine in a folder with the machine's name.  A file name is a plain string of the repository's layout (FORMAT.md), and
no path.  `folder` keeps the files in a folder of this host, `memory` keeps them in memory.  Both pass the tests in
tests/storage/test_storage.py; so must any other kind.

Errors
------
A method raises OSError where the storage refuses or fails: FileNotFoundError where the name does not exist,
FileExistsError where it must not.  `strerror` says why, and `filename` names the file for people.  Where a method
raises a BackupError, its docstring says so.

Durability
----------
What was written is durable when the method returns; its name is durable after the next `barrier` of the folder.  A
method that says "durable" includes the barrier.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from backup.errors import Failed

TEMPORARY = ".tmp"
"""What a storage may add to the name of a small file until the file is whole; a kill can leave such a file behind."""
IN_USE = "in use"
UNTOLD = "no telling whether it is in use"
"""Why `Files.alone` could not take a file: a reader holds it; or the storage cannot tell (and why not)."""


@dataclass(frozen=True, slots=True)
class Stat:
    """A file's size in bytes, and a tag that changes when another file takes the name."""

    size: int
    tag: str


class Listing(Protocol):
    """The names in a folder when it was listed, sorted, and what each file is."""

    def __iter__(self) -> Iterator[str]: ...

    def stat(self, name: str) -> Stat:
        """Return a file's size and tag; FileNotFoundError where there is no such file."""


@dataclass(frozen=True, slots=True)
class Names:
    """A listing that was made as a whole."""

    files: Mapping[str, Stat]
    location: str = ""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.files))

    def stat(self, name: str) -> Stat:
        """Return a file's size and tag."""
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.location}/{name}")
        return self.files[name]


NO_FILES = Names({})


class RangeReader(Protocol):
    """A file that is open for reading, from several threads; it stays what it was when its name goes."""

    size: int
    """Bytes of the file when it was opened."""

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        """Return bytes [offset, offset + length), fewer where the file ends before."""

    def close(self) -> None:
        """Close the file; a second call does nothing."""


class PartWriter(Protocol):
    """A new file that is written in parts of equal size, the last may be short; the parts come in any order."""

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """Write part `number`, from any thread; part 0 comes last."""

    def finish(self) -> None:
        """Give the complete file its name; its content is durable."""

    def close(self) -> None:
        """Stop writing; a file that is not finished never gets its name."""


class Files(Protocol):
    """The files of one folder of a storage; the folder need not exist."""

    location: str
    """The folder for people: its path or its URL."""

    def path(self, name: str) -> str:
        """Return a file's path or URL, for messages."""

    def local_folder(self) -> Path | None:
        """Return the folder's path, for programs that read the files themselves; None where the files are not local."""

    # Looking

    def exists(self) -> bool:
        """
        Tell whether the folder exists.

        Raises
        ------
        Damaged, UsageError, Failed
            Something else has the folder's name.
        """

    def listing(self) -> Listing:
        """List the folder."""

    def has(self, name: str) -> bool:
        """Tell whether anything has this name."""

    def free_bytes(self) -> int | None:
        """Return the bytes that can still be written there; None where the storage has no limit, or does not know."""

    # Reading

    def read(self, name: str, limit: int) -> bytes:
        """Return a small file's content, at most `limit` bytes and one."""

    def open(self, name: str, *, once: int = 0) -> RangeReader:
        """
        Open a file for reading ranges.

        With `once`, no range is longer than that many bytes and none is needed again soon, so that no cache need keep
        it; a thread's next `read_at` may overwrite the memory that the former one returned.
        """

    # Writing

    def create(self, name: str, part: int) -> PartWriter:
        """Create a file in parts of `part` bytes; until it is finished, it does not have its name."""

    def write(self, name: str, content: bytes) -> None:
        """Write a new file that nothing refers to yet; after a kill, a part of it may be there."""

    def publish(self, name: str, content: bytes, *, replace: bool = False) -> None:
        """
        Write a small file, durable, that has its name whole or not at all.

        With `replace`, a file has the name already: it is replaced at once, and the new one gets its permissions.
        """

    def publish_first(self, name: str, content: bytes) -> None:
        """Publish a file unless another process was faster: FileExistsError then."""

    def update(self, name: str, change: Callable[[], bytes]) -> None:
        """Replace a small file, durable, by what `change` returns; concurrent updates wait for each other."""

    def take_name(self, waiting: str, name: str) -> None:
        """Let a file take the name of another, at once and durable; the other is gone then."""

    def remove(self, name: str) -> None:
        """Remove a file."""

    def discard(self, name: str) -> None:
        """Remove a file, and what `create` left of it unfinished; no error where neither exists."""

    def barrier(self) -> None:
        """Make all names and removals in the folder durable before anything that is done afterwards."""

    def remove_folder(self) -> list[str]:
        """Remove the folder and its lock, unless it holds other files: return their names then."""

    # Locks; each ends with the block, or with the process that took it

    def lock(self) -> AbstractContextManager[None]:
        """
        Take the writer's exclusive lock, and make the folder where it is missing.

        Raises
        ------
        Locked
            Another process has it.
        """

    def require_unlocked(self) -> None:
        """
        Make sure that no process has the writer's lock; changes nothing.

        Raises
        ------
        Locked
            A process has it.
        """

    def hold(self, names: Sequence[str]) -> AbstractContextManager[bool]:
        """Hold files as a reader; yields False where the storage has no locks.  A file that is missing is an error."""

    def alone(self, names: Sequence[str]) -> AbstractContextManager[str | None]:
        """Keep readers from files, those that exist; yields why that was not possible: IN_USE, or UNTOLD and why."""


class Storage(Protocol):
    """A place for one repository."""

    location: str
    """The place for people: its path or its URL."""

    def is_same_place(self, other: Storage) -> bool:
        """Tell whether two storages are one place."""

    def machines(self) -> list[str]:
        """Return the names of the folders, in any order."""

    def files(self, folder: str = "") -> Files:
        """Return the files of a machine's folder, or the repository's own."""

    def require_outside(self) -> None:
        """
        Make sure that the place does not lie within another repository.

        Raises
        ------
        UsageError
            It does.
        """

    def occupants(self) -> list[str]:
        """
        Return the names of what the place holds; none where it does not exist.

        Raises
        ------
        UsageError
            The place can hold nothing: it is a file, for example.
        """

    def new(self) -> AbstractContextManager[None]:
        """Make the place where it does not exist; it is durable when the block ends."""


def require_local_folder(files: Files) -> Path:
    """
    Return the folder of files that another program is to read.

    Raises
    ------
    Failed
        The files are not on this host.
    """
    folder = files.local_folder()
    if folder is None:
        raise Failed(
            f"{files.location} is no folder of this host, and QEMU reads a point's files from a folder only",
            hint="copy the point to a repository in a folder first (`pybackup copy`), and use it there",
        )
    return folder
