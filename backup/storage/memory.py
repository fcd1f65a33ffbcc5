"""
A storage in memory, with faults on request: for tests, and as the plainest implementation of `base`.

    Memory            what the storage holds, durable or not, and which access has which lock
    MemoryStorage     one writer's or reader's access to a Memory; a `base.Storage`
    Fault             what happens at one call: an error, or a kill after the call succeeded

Several accesses to one Memory behave like several processes that use one folder.  After a kill, each call of the access
raises Killed, and its locks are free.  `Memory.lose_power` drops what was not durable.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from backup.errors import Locked
from backup.model.manifest import UNFINISHED
from backup.storage.base import IN_USE, Names, Stat, Storage, Traits

LOCK = "lock"


class Killed(BaseException):
    """A simulated kill of the process: code that still runs afterwards cannot reach the storage."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a storage: its number within the access, from 1; the method; the folder and the file's name."""

    number: int
    method: str
    folder: str
    name: str


KILL = "kill"
Fault = Callable[[Call], OSError | str | None]
"""Decides about each call: an error to raise instead of the call, KILL after the call succeeded, or None."""


def no_fault(call: Call) -> None:
    """Let every call succeed."""


@dataclass(eq=False, slots=True)
class _File:
    """A file's content and tag; readers keep the object when another file takes its name."""

    content: bytearray
    tag: str


@dataclass(slots=True)
class _Folder:
    """The files by name, now and as they were at the last barrier."""

    files: dict[str, _File] = field(default_factory=dict)
    durable: dict[str, _File] = field(default_factory=dict)


class Memory:
    """
    What a storage in memory holds, and which accesses have which locks.

    Parameters
    ----------
    location : str
        The name of the place in messages.
    """

    def __init__(self, location: str = "memory") -> None:
        self.location = location
        self.folders: dict[str, _Folder] = {"": _Folder()}
        self.durable_folders: set[str] = {""}
        self.exclusive: dict[tuple[str, str], object] = {}
        self.shared: dict[tuple[str, str], list[object]] = {}
        self.mutex = threading.RLock()
        self.freed = threading.Condition(self.mutex)
        self.updating = threading.RLock()
        self.tags = itertools.count(1)

    def lose_power(self) -> None:
        """Undo all new names and removals that no barrier has made durable, and free all locks."""
        with self.mutex:
            self.folders = {
                name: _Folder(dict(folder.durable), dict(folder.durable))
                for name, folder in self.folders.items()
                if name in self.durable_folders
            }
            self.exclusive.clear()
            self.shared.clear()

    def snapshot(self) -> Mapping[str, Mapping[str, bytes]]:
        """Return the content of all files, by folder and name."""
        with self.mutex:
            return {
                folder: {name: bytes(file.content) for name, file in held.files.items()}
                for folder, held in self.folders.items()
            }


class MemoryStorage:
    """One access to a Memory; a `base.Storage`."""

    def __init__(self, memory: Memory | None = None, fault: Fault = no_fault) -> None:
        self.memory = Memory() if memory is None else memory
        self.location = self.memory.location
        self.traits = Traits()
        self.fault = fault
        self.calls = 0
        self.killed = False

    def is_same_place(self, other: Storage) -> bool:
        """Tell whether another storage uses the same Memory."""
        return isinstance(other, MemoryStorage) and other.memory is self.memory

    def machines(self) -> list[str]:
        """Return the names of the folders."""
        with self.call("machines"):
            return [name for name in self.memory.folders if name]

    def files(self, folder: str = "") -> MemoryFiles:
        """Return the files of a folder."""
        return MemoryFiles(self, folder)

    def require_outside(self) -> None:
        """Do nothing: a Memory lies in no other place."""

    def occupants(self) -> list[str]:
        """Return the names of the repository's own files and of the folders."""
        with self.call("occupants"):
            return sorted([*self.memory.folders[""].files, *(name for name in self.memory.folders if name)])

    @contextmanager
    def new(self) -> Iterator[None]:
        """Do nothing: a Memory exists."""
        yield

    def close(self) -> None:
        """Do nothing: nothing is held."""

    @contextmanager
    def call(self, method: str, folder: str = "", name: str = "") -> Iterator[None]:
        """Run one call, with no other call at the same time, and apply its fault."""
        with self.memory.mutex:
            if self.killed:
                raise Killed
            self.calls += 1
            verdict = self.fault(Call(self.calls, method, folder, name))
            if isinstance(verdict, OSError):
                raise verdict
            yield
            if verdict == KILL:
                self._die()

    def _die(self) -> None:
        self.killed = True
        locks = self.memory
        locks.exclusive = {key: owner for key, owner in locks.exclusive.items() if owner is not self}
        for key, owners in locks.shared.items():
            locks.shared[key] = [owner for owner in owners if owner is not self]
        locks.freed.notify_all()
        raise Killed


class MemoryFiles:
    """The files of one folder; a `base.Files`."""

    def __init__(self, storage: MemoryStorage, folder: str) -> None:
        self._storage = storage
        self._folder = folder
        self.location = f"{storage.location}/{folder}" if folder else storage.location

    def path(self, name: str) -> str:
        """Return a file's name for people."""
        return f"{self.location}/{name}"

    def local_folder(self) -> Path | None:
        """Return None: no other program can read the files."""
        return None

    def exists(self) -> bool:
        """Tell whether the folder exists."""
        with self.call("exists"):
            return self._folder in self._storage.memory.folders

    def listing(self) -> Names:
        """List the folder."""
        with self.call("listing"):
            files = self.existing().files
            return Names({name: Stat(len(file.content), file.tag) for name, file in files.items()}, self.location)

    def has(self, name: str) -> bool:
        """Tell whether a file has this name."""
        with self.call("has", name):
            folder = self._storage.memory.folders.get(self._folder)
            return folder is not None and name in folder.files

    def free_bytes(self) -> int | None:
        """Return None: only this host's memory is the limit."""
        with self.call("free_bytes"):
            return None

    def read(self, name: str, limit: int) -> bytes:
        """Return a small file's content, but no more than `limit` + 1 bytes."""
        with self.call("read", name):
            return bytes(self._file(name).content[: limit + 1])

    def open(self, name: str, *, once: int = 0) -> MemoryReader:
        """Open a file for reading ranges."""
        del once
        with self.call("open", name):
            return MemoryReader(self, name, self._file(name))

    def create(self, name: str, part: int) -> MemoryPartWriter:
        """Create a file in parts of `part` bytes."""
        with self.call("create", name):
            return MemoryPartWriter(self, name, part, self._new(name))

    def stream(self, name: str, size: int) -> MemoryStreamWriter:
        """Create a file that is written in order."""
        del size
        with self.call("stream", name):
            return MemoryStreamWriter(self, name, self._new(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a new file."""
        with self.call("write", name):
            if name in self.existing().files:
                raise self._error(errno.EEXIST, name)
            self._put(name, content)

    def publish(self, name: str, content: bytes, *, replace: bool = False) -> None:
        """Write a small file whole, durable."""
        with self.call("publish", name):
            if replace:
                self._file(name)
            self._put(name, content)
            self._make_durable()

    def publish_first(self, name: str, content: bytes) -> None:
        """Publish a file unless another access was faster."""
        with self.call("publish_first", name):
            if name in self.existing().files:
                raise self._error(errno.EEXIST, name)
            self._put(name, content)
            self._make_durable()

    def update(self, name: str, change: Callable[[], bytes]) -> None:
        """Replace a small file, durable, with what `change` returns."""
        with self._storage.memory.updating:
            content = change()
            with self.call("update", name):
                self._put(name, content)
                self._make_durable()

    def take_name(self, waiting: str, name: str) -> None:
        """Rename the file `waiting` to `name`, durable."""
        with self.call("take_name", name):
            file = self._file(waiting)
            folder = self.existing()
            del folder.files[waiting]
            folder.files[name] = file
            self._make_durable()

    def remove(self, name: str) -> None:
        """Remove a file."""
        with self.call("remove", name):
            self._file(name)
            del self.existing().files[name]

    def discard(self, name: str) -> None:
        """Remove a file and its unfinished parts, if they exist."""
        with self.call("discard", name):
            files = self.existing().files
            files.pop(name, None)
            files.pop(name + UNFINISHED, None)

    def barrier(self) -> None:
        """Make the names in the folder durable; in the repository's own folder, these include the machines' folders."""
        with self.call("barrier"):
            self.existing()
            self._make_durable()

    def remove_folder(self) -> list[str]:
        """Remove the folder and its lock.  If there are other files, only return their names."""
        with self.call("remove_folder"):
            others = sorted(name for name in self.existing().files if name != LOCK)
            if not others:
                del self._storage.memory.folders[self._folder]
                self._storage.memory.durable_folders.discard(self._folder)
            return others

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Take the writer's lock of the folder; a missing folder is made.

        Raises
        ------
        Locked
            Another access has the lock.
        """
        memory = self._storage.memory
        with self.call("lock"):
            self._require_unlocked()
            folder = memory.folders.setdefault(self._folder, _Folder())
            memory.durable_folders.add(self._folder)
            if LOCK not in folder.files:
                self._put(LOCK, b"")
            memory.exclusive[self._folder, ""] = self._storage
        try:
            yield
        finally:
            with memory.mutex:
                if memory.exclusive.get((self._folder, "")) is self._storage:
                    del memory.exclusive[self._folder, ""]

    def require_unlocked(self) -> None:
        """
        Make sure that no access has the writer's lock.

        Raises
        ------
        Locked
            An access has the lock.
        """
        with self.call("require_unlocked"):
            self._require_unlocked()

    def _require_unlocked(self) -> None:
        if (self._folder, "") in self._storage.memory.exclusive:
            raise Locked(f"machine {self._folder} is locked by another run", hint="wait for that run to end, or end it")

    @contextmanager
    def hold(self, names: Sequence[str]) -> Iterator[bool]:
        """Hold files as a reader; wait for an access that keeps readers from a file."""
        with ExitStack() as stack:
            for name in names:
                with self.call("hold", name):
                    self._file(name)
                    key, memory = (self._folder, name), self._storage.memory
                    while key in memory.exclusive:
                        memory.freed.wait()
                    stack.enter_context(self._sharing(name))
            yield True

    @contextmanager
    def _sharing(self, name: str) -> Iterator[None]:
        memory = self._storage.memory
        memory.shared.setdefault((self._folder, name), []).append(self._storage)
        try:
            yield
        finally:
            with memory.mutex:
                owners = memory.shared.get((self._folder, name), [])
                if self._storage in owners:
                    owners.remove(self._storage)

    @contextmanager
    def alone(self, names: Sequence[str]) -> Iterator[str | None]:
        """Keep readers from those files that exist; yields IN_USE if one of them is in use."""
        memory = self._storage.memory
        taken: list[tuple[str, str]] = []
        with self.call("alone", names[0] if names else ""):
            folder = memory.folders.get(self._folder, _Folder())
            keys = [(self._folder, name) for name in names if name in folder.files]
            why_not = IN_USE if any(memory.shared.get(key) or key in memory.exclusive for key in keys) else None
            if why_not is None:
                taken = keys
                memory.exclusive.update(dict.fromkeys(keys, self._storage))
        try:
            yield why_not
        finally:
            with memory.mutex:
                for key in taken:
                    if memory.exclusive.get(key) is self._storage:
                        del memory.exclusive[key]
                memory.freed.notify_all()

    # Shared by the methods above, within a call

    @contextmanager
    def call(self, method: str, name: str = "") -> Iterator[None]:
        """Run one call of the access, for a file of this folder."""
        with self._storage.call(method, self._folder, name):
            yield

    def existing(self) -> _Folder:
        """Return the folder, or raise FileNotFoundError."""
        folder = self._storage.memory.folders.get(self._folder)
        if folder is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.location)
        return folder

    def _file(self, name: str) -> _File:
        folder = self._storage.memory.folders.get(self._folder)
        if folder is None or name not in folder.files:
            raise self._error(errno.ENOENT, name)
        return folder.files[name]

    def _put(self, name: str, content: bytes) -> _File:
        made = _File(bytearray(content), str(next(self._storage.memory.tags)))
        self.existing().files[name] = made
        return made

    def _new(self, name: str) -> _File:
        """Return a new file, which has a name of its own until it is finished."""
        folder = self.existing()
        for taken in (name, name + UNFINISHED):
            if taken in folder.files:
                raise self._error(errno.EEXIST, taken)
        return self._put(name + UNFINISHED, b"")

    def _make_durable(self) -> None:
        """Make the folder's names durable; in the repository's own folder, these include the machines' folders."""
        memory, folder = self._storage.memory, self.existing()
        folder.durable = dict(folder.files)
        if not self._folder:
            memory.durable_folders = set(memory.folders)

    def _error(self, number: int, name: str) -> OSError:
        return OSError(number, os.strerror(number), self.path(name))


class MemoryReader:
    """A file that is open for reading; a `base.RangeReader`."""

    def __init__(self, files: MemoryFiles, name: str, file: _File) -> None:
        self._files = files
        self._name = name
        self._file = file
        self.size = len(file.content)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes [offset, offset + length), fewer where the file ends before."""
        with self._files.call("read_at", self._name):
            return bytes(self._file.content[offset : offset + length])

    def close(self) -> None:
        """Close the file."""


class MemoryNewFile:
    """A new file, which gets its name when it is finished."""

    def __init__(self, files: MemoryFiles, name: str, file: _File) -> None:
        self._files = files
        self._name = name
        self._file = file

    def finish(self) -> None:
        """Give the file its name."""
        with self._files.call("finish", self._name):
            files = self._files.existing().files
            del files[self._name + UNFINISHED]
            files[self._name] = self._file

    def close(self) -> None:
        """Stop writing."""


class MemoryPartWriter(MemoryNewFile):
    """A new file that is written in parts; a `base.PartWriter`."""

    def __init__(self, files: MemoryFiles, name: str, part: int, file: _File) -> None:
        super().__init__(files, name, file)
        self._part = part

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """Write part `number`."""
        with self._files.call("put", self._name):
            start = number * self._part
            content = self._file.content
            content.extend(bytes(max(0, start - len(content))))
            content[start : start + len(data)] = data


class MemoryStreamWriter(MemoryNewFile):
    """A new file that is written in order; a `base.StreamWriter`."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        with self._files.call("write_next", self._name):
            self._file.content.extend(data)
