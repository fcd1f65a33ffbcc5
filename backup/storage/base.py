"""
The protocols that each kind of storage implements: how a repository's files are listed, read, written and locked.

A storage holds folders of files, one level deep: the repository's own files in the folder "", and the files of each
machine in a folder with the machine's name.  A file name is a plain string of the repository's layout (FORMAT.md), and
not a path.  `folder` keeps the files in a folder of this host, `memory` keeps them in memory.  Every kind of storage
must pass the tests in tests/storage/test_storage.py.

Errors
------
A method raises OSError where the storage refuses or fails: FileNotFoundError where the name does not exist,
FileExistsError where it must not.  `strerror` says why, and `filename` names the file for people.

`Unavailable` means that a storage elsewhere does not answer, or refuses.  Nothing is known about the file then, and no
caller may take the file for missing or damaged.  Every method raises NotFound where the bucket of the place does not
exist.  Where a method raises another BackupError, its docstring says so.

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
"""Suffix of a small file that is not whole yet; a run that is killed can leave such a file behind."""
IN_USE = "in use"
UNTOLD = "cannot determine whether it is in use"
"""Why `Files.alone` could not lock a file: a reader holds the file; or the storage could not tell, and why not."""


class Unavailable(OSError):
    """The storage does not answer, or refuses; nothing is known about the file.  `hint` tells the user what to do."""

    def __init__(self, number: int, text: str, path: str, *, hint: str) -> None:
        super().__init__(number, text, path)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Stat:
    """A file's size in bytes, and a tag that changes when another file takes the name."""

    size: int
    tag: str


class Listing(Protocol):
    """The names in a folder at the time of the listing, sorted, with the size and the tag of each file."""

    def __iter__(self) -> Iterator[str]: ...

    def stat(self, name: str) -> Stat:
        """Return a file's size and tag; raise FileNotFoundError if the file does not exist."""


@dataclass(frozen=True, slots=True)
class Names:
    """A `Listing` that already has the size and the tag of every file."""

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
    """
    A file that is open for reading from several threads.

    It stays readable when its name is removed or replaced.  Where a storage cannot promise that, `read_at` raises
    Unavailable then, and never returns bytes of another file.
    """

    size: int
    """Size of the file in bytes when it was opened."""

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        """Return bytes [offset, offset + length), fewer where the file ends before."""

    def close(self) -> None:
        """Close the file; a second call does nothing."""


class PartWriter(Protocol):
    """A new file that is written in parts of equal size (the last may be shorter), in any order."""

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """Write part `number`.  Any thread may call this; part 0 comes last."""

    def finish(self) -> None:
        """Make the content of the complete file durable, and give the file its name."""

    def close(self) -> None:
        """Stop writing; a file that is not finished never gets its name."""


class StreamWriter(Protocol):
    """A new file that is written from its first byte to its last, by one thread at a time."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes; the caller may overwrite the memory afterwards."""

    def finish(self) -> None:
        """Make the content of the complete file durable, and give the file its name."""

    def close(self) -> None:
        """Stop writing; a file that is not finished never gets its name."""


class Files(Protocol):
    """The files of one folder of a storage; the folder need not exist."""

    location: str
    """The folder's path or URL, for messages."""

    def path(self, name: str) -> str:
        """Return a file's path or URL, for messages."""

    def local_folder(self) -> Path | None:
        """Return the folder's path, for programs that read the files themselves; None where the files are not local."""

    # Queries

    def exists(self) -> bool:
        """
        Tell whether the folder exists.

        Raises
        ------
        Damaged, UsageError, Failed
            The name is not that of a folder of this machine (a link, for example).
        """

    def listing(self) -> Listing:
        """List the folder."""

    def has(self, name: str) -> bool:
        """Tell whether anything has this name."""

    def free_bytes(self) -> int | None:
        """Return how many bytes can still be written to the folder; None if there is no limit, or it is unknown."""

    # Reading

    def read(self, name: str, limit: int) -> bytes:
        """Return a small file's content, at most `limit` + 1 bytes: the last one shows that the file is too large."""

    def open(self, name: str, *, once: int = 0) -> RangeReader:
        """
        Open a file for reading ranges.

        `once` (bytes) is 0, or the length of the longest range, if no range is needed again soon.  Then no cache needs
        to keep the ranges, and a thread's next `read_at` may overwrite the memory that the one before returned.
        """

    # Writing

    def create(self, name: str, part: int) -> PartWriter:
        """
        Create a file in parts of `part` bytes; the file gets its name only when it is finished.

        Raises
        ------
        UsageError
            The storage takes files in order only (`stream`).
        """

    def stream(self, name: str, size: int) -> StreamWriter:
        """Create a file of `size` bytes that is written in order; it gets its name only when it is finished."""

    def write(self, name: str, content: bytes) -> None:
        """Write a new file.  A kill may leave a part of the file behind, so nothing may refer to it yet."""

    def publish(self, name: str, content: bytes, *, replace: bool = False) -> None:
        """
        Write a small file, durable; the file appears under its name whole or not at all.

        With `replace`, the file replaces an existing one in one step, and takes over its permissions.
        """

    def publish_first(self, name: str, content: bytes) -> None:
        """Publish a file; raise FileExistsError if the name exists, because another process was faster, for example."""

    def update(self, name: str, change: Callable[[], bytes]) -> None:
        """
        Replace a small file, durable, with what `change` returns; concurrent updates wait for each other.

        For notes that only save work: where each request costs, the file is kept on this host.
        """

    def take_name(self, waiting: str, name: str) -> None:
        """Rename the file `waiting` to `name`, durable, in one step; a file that had the name is gone then."""

    def remove(self, name: str) -> None:
        """Remove a file."""

    def discard(self, name: str) -> None:
        """Remove a file and its unfinished parts (`create`); no error if neither exists."""

    def barrier(self) -> None:
        """Make all new names and all removals in the folder durable, before anything else is done."""

    def remove_folder(self) -> list[str]:
        """Remove the folder and its lock.  If the folder holds other files, remove nothing and return their names."""

    # Locks; each ends with the block, or with the process that took it

    def lock(self) -> AbstractContextManager[None]:
        """
        Take the writer's exclusive lock of the folder; a missing folder is made.

        Raises
        ------
        Locked
            Another process has the lock.
        """

    def require_unlocked(self) -> None:
        """
        Make sure that no process has the writer's lock; changes nothing.

        Raises
        ------
        Locked
            A process has the lock.
        """

    def hold(self, names: Sequence[str]) -> AbstractContextManager[bool]:
        """Hold files as a reader; a missing file is an error.  Yields False if the storage has no locks."""

    def alone(self, names: Sequence[str]) -> AbstractContextManager[str | None]:
        """Keep readers from those files that exist.  Yields None, or why not: IN_USE, or UNTOLD with a reason."""


@dataclass(frozen=True, slots=True)
class Traits:
    """
    What distinguishes one kind of storage from another for the packages above.

    Attributes
    ----------
    remote : bool
        Each call takes the round trip of a network, so that several calls at once are faster.
    rewritable : bool
        A data file can be replaced by another one (`Files.take_name`), so that points can be merged.
    readable : bool
        The content of files can be read.  Without the identity that opens them, sealed files have only a name and a
        size.
    """

    remote: bool = False
    rewritable: bool = True
    readable: bool = True


class Storage(Protocol):
    """A place for one repository."""

    location: str
    """The path or URL of the place, for messages."""
    traits: Traits

    def is_same_place(self, other: Storage) -> bool:
        """Tell whether another storage is the same place."""

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
            The place lies within another repository.
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
        """Make the place if it does not exist, and make it durable when the block ends."""

    def close(self) -> None:
        """Give back what the place holds for this access (leases); also done when the process ends."""


def require_local_folder(files: Files) -> Path:
    """
    Return the local folder of files, for another program that reads them.

    Raises
    ------
    Failed
        The files are not on this host, or sealed.
    """
    folder = files.local_folder()
    if folder is None:
        raise Failed(
            f"{files.location} is not a folder of this host with plain files, and QEMU reads a point from nothing else",
            hint="copy the point to a repository in a folder first (`pybackup copy`), and use it there",
        )
    return folder
