"""A storage in a folder of this host: fsync and rename for durability, flock for locks."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from backup.errors import Damaged, UsageError
from backup.model.manifest import UNFINISHED
from backup.model.names import MARKER
from backup.runtime.direct_io import Output, ReadOnce
from backup.runtime.shortage import free_bytes
from backup.storage import locks
from backup.storage.base import TEMPORARY, Stat, Storage, Traits
from backup.storage.plain_file import allow, create_file, open_file
from backup.storage.refusals import explained

LOCK = "lock"
"""Name of the file whose flock is the writer's lock."""
_LOCK_ATTEMPTS = 20
"""How often the lock is taken again because another run removed the lock's file meanwhile."""
_PAGE = 4096
_ZERO_PAGE = bytes(_PAGE)
_SPARSE_MOST = 512 << 10
"""
Longest part (bytes) in which pages of zeroes become holes.  Such a part is the whole file of a night in which little
was written, and most of the file is unused space in clusters of metadata: 240 of 256 KiB.  In a longer part the holes
save less than the search costs.
"""
NO_LINKS = (
    "nothing was changed; move the real folder into the repository, or mount it there if it has its own disk "
    "(mount --bind)"
)


@dataclass(frozen=True, slots=True)
class Modes:
    """Permissions of new files and folders.  The default is the owner only: a backup holds all data of a machine."""

    file: int = 0o600
    folder: int = 0o700


class FolderStorage:
    """A repository's place in a folder; a `base.Storage`."""

    def __init__(self, path: Path, modes: Modes = Modes()) -> None:
        self.folder = path
        self.modes = modes
        self.location = str(path)
        self.traits = Traits()

    def is_same_place(self, other: Storage) -> bool:
        """Tell whether another storage is this folder, by whatever path."""
        return isinstance(other, FolderStorage) and os.path.realpath(self.folder) == os.path.realpath(other.folder)

    def machines(self) -> list[str]:
        """Return the names of the folders; an entry that cannot be examined (a circle of links) is left out."""
        with os.scandir(self.folder) as entries:
            return [entry.name for entry in entries if _is_folder(entry)]

    def files(self, folder: str = "") -> FolderFiles:
        """Return the files of a folder in this one, or this folder's own."""
        return FolderFiles(self.folder / folder if folder else self.folder, self.modes)

    def require_outside(self) -> None:
        """
        Make sure that the folder does not lie within another repository.

        Raises
        ------
        UsageError
            The folder lies within another repository.
        """
        for folder in Path(os.path.realpath(self.folder)).parents:
            if os.path.lexists(folder / MARKER):
                raise UsageError(
                    f"{self.folder} lies in the repository {folder}", hint="name a folder outside of that repository"
                )

    def occupants(self) -> list[str]:
        """
        Return the names in the folder; the root of a fresh file system counts as empty.

        Raises
        ------
        UsageError
            The name is not that of a folder.
        """
        if not os.path.lexists(self.folder):
            return []
        if not self.folder.is_dir():
            raise UsageError(
                f"{self.folder} is not a folder",
                hint="name a new or empty folder; pybackup mixes its files with no others",
            )
        return sorted(name for name in os.listdir(self.folder) if name != "lost+found")

    @contextmanager
    def new(self) -> Iterator[None]:
        """Make the folder, and the folders that lead to it; all their names are durable when the block ends."""
        # The folder counts as new even if it exists: a first `init` may have been interrupted before it was durable.
        new = [folder for folder in self.folder.absolute().parents if not os.path.lexists(folder)]
        for folder in (*reversed(new), self.folder):
            if not os.path.lexists(folder):
                make_folder(folder, self.modes.folder)
        yield
        for folder in (self.folder, *new):
            with suppress(PermissionError):  # a folder of another user, in which we may write but not read
                sync_folder(folder.parent)

    def close(self) -> None:
        """Do nothing: nothing is held."""


class FolderFiles:
    """The files of one folder; a `base.Files`."""

    def __init__(self, path: Path, modes: Modes) -> None:
        self._path = path
        self._modes = modes
        self.location = str(path)

    def path(self, name: str) -> str:
        """Return a file's path."""
        return str(self._path / name)

    def local_folder(self) -> Path | None:
        """Return the folder."""
        return self._path

    def exists(self) -> bool:
        """
        Tell whether the folder exists.

        Raises
        ------
        Damaged
            The name is that of a link, which would lead out of the repository.
        UsageError
            The folder has another name: the file system ignores the case of letters, for example.  Two machines would
            share one folder.
        Failed
            The folder cannot be examined.
        """
        with explained(self.location):
            try:
                mode = os.lstat(self._path).st_mode
            except (FileNotFoundError, NotADirectoryError):
                return False
            if stat.S_ISLNK(mode):
                raise Damaged(f"the folder {self._path} of machine {self._path.name} is a link", hint=NO_LINKS)
            if not stat.S_ISDIR(mode):
                return False
            self._require_exact_name()
        return True

    def _require_exact_name(self) -> None:
        parent, ours = self._path.parent, self._path.name
        try:
            names = os.listdir(parent)
        except PermissionError:  # a folder of another user, in which a manifest was named by its path
            return
        if ours in names or not os.path.lexists(self._path):
            return
        status = os.lstat(self._path)
        real = next((name for name in names if os.path.samestat(status, os.lstat(parent / name))), "another")
        raise UsageError(
            f"machine {ours} has no folder of its own: on this file system, {self._path} is the folder {real}",
            hint=f"if it is the same machine, name it {real}; else choose a name that differs in more than upper and "
            "lower case",
        )

    def listing(self) -> FolderListing:
        """List the folder."""
        return FolderListing(self._path)

    def has(self, name: str) -> bool:
        """Tell whether anything has this name."""
        return os.path.lexists(self._path / name)

    def free_bytes(self) -> int | None:
        """Return the free space (bytes) of the file system in which the folder lies, or will lie."""
        absolute = self._path.absolute()
        return free_bytes(next(place for place in (absolute, *absolute.parents) if place.exists()))

    def read(self, name: str, limit: int) -> bytes:
        """
        Read a plain file, but no more than `limit` + 1 bytes; never through a link, never waiting for a pipe's writer.

        Every run reads all manifests of a machine.  So no file object is made, and no more memory is requested than the
        file needs: requesting megabytes for a kilobyte takes longer than reading the file.
        """
        fd = open_file(self._path / name, os.O_RDONLY)
        try:
            left = min(os.fstat(fd).st_size, limit + 1)
            parts = []
            while left and (part := os.read(fd, left)):
                parts.append(part)
                left -= len(part)
        finally:
            os.close(fd)
        return b"".join(parts)

    def open(self, name: str, *, once: int = 0) -> FileReader:
        """Open a plain file for reading ranges; with `once`, past the kernel's page cache where that is possible."""
        return FileReader(open_file(self._path / name, os.O_RDONLY), once)

    def create(self, name: str, part: int) -> FilePartWriter:
        """Create a file in parts of `part` bytes, called `name` with `.part` until it is finished."""
        return FilePartWriter(self._path / name, self._modes.file, part)

    def stream(self, name: str, size: int) -> FileStreamWriter:
        """Create a file that is written in order, called `name` with `.part` until it is finished."""
        del size
        return FileStreamWriter(self._path / name, self._modes.file)

    def write(self, name: str, content: bytes) -> None:
        """Write a new file under its own name, and fsync it."""
        _write_new(self._path / name, content, self._modes.file)

    def publish(self, name: str, content: bytes, *, replace: bool = False) -> None:
        """Write a file under a temporary name, fsync and rename it, and fsync the folder."""
        path = self._path / name
        write_whole(path, content, stat.S_IMODE(os.stat(path).st_mode) if replace else self._modes.file)

    def publish_first(self, name: str, content: bytes) -> None:
        """Publish a file through a hard link, which fails if the name exists."""
        path = self._path / name
        temporary = path.with_name(f"{name}.{os.urandom(4).hex()}{TEMPORARY}")
        try:
            write_temporary(temporary, content, self._modes.file)
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:  # no hard links here, or a faster process has removed the temporary file (`tidy`)
                if os.path.lexists(path):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
                os.rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self._path)

    def update(self, name: str, change: Callable[[], bytes]) -> None:
        """Write what `change` returns to a temporary file, under an flock on that file; fsync and rename it."""
        temporary = self._path / f"{name}{TEMPORARY}"
        with _alone_in_update(temporary, self._modes.file) as fd:
            content = change()
            os.ftruncate(fd, 0)
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
            os.fsync(fd)
            os.rename(temporary, self._path / name)
        self.barrier()

    def take_name(self, waiting: str, name: str) -> None:
        """Rename a file, and fsync the folder."""
        os.rename(self._path / waiting, self._path / name)
        self.barrier()

    def remove(self, name: str) -> None:
        """Remove a file."""
        os.unlink(self._path / name)

    def discard(self, name: str) -> None:
        """Remove a file and its unfinished parts, if they exist."""
        for path in (_part_path(self._path / name), self._path / name):
            path.unlink(missing_ok=True)

    def barrier(self) -> None:
        """Fsync the folder."""
        sync_folder(self._path)

    def remove_folder(self) -> list[str]:
        """Remove the lock and the folder, and fsync its parent.  If there are other files, only return their names."""
        others = sorted(name for name in os.listdir(self._path) if name != LOCK)
        if not others:
            os.unlink(self._path / LOCK)
            with suppress(OSError):  # a new file appeared meanwhile: the file stays, and so does the folder
                os.rmdir(self._path)
            sync_folder(self._path.parent)
        return others

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Hold an flock on the folder's lock file; the kernel frees the lock when the process ends, however it ends.

        Raises
        ------
        Locked
            Another process holds the lock.
        """
        fd = self._take_lock()
        for _ in range(_LOCK_ATTEMPTS):  # limited: a file system may report another inode of the same file each time
            if locks.has_name(fd, self._path / LOCK):
                break
            os.close(fd)  # the run that held the lock has removed the machine and its lock file
            fd = self._take_lock()
        try:
            yield
        finally:
            os.close(fd)

    def _take_lock(self) -> int:
        with explained(self.location):
            if not self.exists():
                make_folder(self._path, self._modes.folder)
                sync_folder(self._path.parent)
            fd = open_file(self._path / LOCK, os.O_RDWR | os.O_CREAT, self._modes.file, sole=True)
        try:
            allow(fd, self._modes.file)
            with explained(self.path(LOCK)):
                locks.flock(fd, self._path.name)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def require_unlocked(self) -> None:
        """
        Make sure that no process has the lock, and leave the lock file's content as it is.

        Raises
        ------
        Locked
            A process has the lock.
        """
        with explained(self.path(LOCK)):
            try:
                fd = open_file(self._path / LOCK, os.O_RDONLY)
            except FileNotFoundError:
                return
            try:
                locks.flock(fd, self._path.name, shared=True)
            finally:
                os.close(fd)

    @contextmanager
    def hold(self, names: Sequence[str]) -> Iterator[bool]:
        """Hold a shared flock on each file; wait for a prune that is replacing one of them."""
        with ExitStack() as stack:
            yield all(self._hold(stack, name) for name in names)

    def _hold(self, stack: ExitStack, name: str) -> bool:
        fd = open_file(self._path / name, os.O_RDONLY)
        stack.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
        except OSError:
            return False
        return True

    @contextmanager
    def alone(self, names: Sequence[str]) -> Iterator[str | None]:
        """Hold an exclusive flock on each file that exists; never waits."""
        with locks.alone([self._path / name for name in names]) as why_not:
            yield why_not


class FolderListing:
    """The names in a folder, sorted; the size and tag of a file are read only when they are needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = sorted(os.listdir(path))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def stat(self, name: str) -> Stat:
        """Return a file's size, and its inode and modification time as the tag; a link is not followed."""
        status = os.stat(self._path / name, follow_symlinks=False)
        return Stat(status.st_size, f"{status.st_ino}-{status.st_mtime_ns}")


class FileReader:
    """A file of a folder, open for reading; a `base.RangeReader`."""

    def __init__(self, fd: int, once: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size
        self._once = ReadOnce(fd, once) if once else None

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        """Return bytes [offset, offset + length), fewer where the file ends before."""
        return os.pread(self._fd, length, offset) if self._once is None else self._once.read(offset, length)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class NewFile:
    """
    A file of a folder that is written past the page cache where possible, and has its name only when it is finished.

    Safe to use from several threads.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self._path = path
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        self._fd = create_file(_part_path(path), mode)
        self._output = Output(self._fd, _part_path(path), grows=True)
        self._lock = threading.Lock()
        self._size = 0

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at an offset; pages of zeroes in a short piece become holes of the file."""
        with self._lock:
            self._size = max(self._size, offset + len(data))
        view = memoryview(data)
        pieces = _pages_of_data(view) if len(view) <= _SPARSE_MOST else [(0, len(view))]
        for start, end in pieces:
            self._output.write(offset + start, view[start:end])

    def finish(self) -> None:
        """Fsync the file and give it its name."""
        os.ftruncate(self._fd, self._size)  # the file may end with a hole
        os.fsync(self._fd)
        os.rename(_part_path(self._path), self._path)
        self.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._output.close()


class FilePartWriter(NewFile):
    """A file of a folder that is written in parts, in any order; a `base.PartWriter`."""

    def __init__(self, path: Path, mode: int, part: int) -> None:
        super().__init__(path, mode)
        self._part = part

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """Write part `number`."""
        self.write_at(number * self._part, data)


class FileStreamWriter(NewFile):
    """A file of a folder that is written in order; a `base.StreamWriter`."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        self.write_at(self._size, data)


def _pages_of_data(view: memoryview) -> Iterator[tuple[int, int]]:
    """Yield the runs (start, end in bytes) of pages that are not all zeroes; the last page may be shorter."""
    start = None
    for page in range(0, len(view), _PAGE):
        if view[page : page + _PAGE] == _ZERO_PAGE[: len(view) - page]:
            if start is not None:
                yield start, page
            start = None
        elif start is None:
            start = page
    if start is not None:
        yield start, len(view)


def _part_path(path: Path) -> Path:
    """Return the path of a file until it is complete."""
    return path.with_name(path.name + UNFINISHED)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def write_whole(path: Path, content: bytes, mode: int) -> None:
    """Write a file, durable, that appears under its name whole or not at all: fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write_temporary(temporary, content, mode)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(path: Path, mode: int) -> None:
    """Make a folder of this mode, whatever the umask, unless another process has just made it."""
    path.mkdir(mode=mode, exist_ok=True)
    allow(path, mode)


def write_temporary(path: Path, content: bytes, mode: int) -> None:
    """Write a new file and fsync it; an existing file of this name is a leftover, and is removed."""
    try:
        _write_new(path, content, mode)
    except FileExistsError:
        path.unlink()
        _write_new(path, content, mode)


def _write_new(path: Path, content: bytes, mode: int) -> None:
    fd = create_file(path, mode)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Fsync a folder, so that its names are durable: otherwise a power cut can undo a rename (trap 43)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _alone_in_update(path: Path, mode: int) -> Iterator[int]:
    """
    Open the temporary file of an update when no other process is writing it.

    Two processes that update one file write one after the other, and each sees what the other wrote.
    """
    while True:
        fd = open_file(path, os.O_RDWR | os.O_CREAT, mode, sole=True)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if locks.has_name(fd, path):  # else the process that had the lock before has renamed the file
                try:
                    allow(fd, mode)
                    yield fd
                except BaseException:
                    path.unlink(missing_ok=True)  # still under the lock; a full disk must not keep half a file
                    raise
                return
        finally:
            os.close(fd)
