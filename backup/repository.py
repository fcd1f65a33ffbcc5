"""
The repository: folders, the lock, and publishing a point whole or not at all.

Rules of order (FORMAT.md, "Order of writing"); breaking one of them loses data:

1. every data file and digest file is written under its own name and fsynced,
2. the machine's folder is fsynced,
3. the manifest is written under a temporary name, fsynced, and renamed: from here on the point exists,
4. the machine's folder is fsynced again, and the repository's folder when the machine is new.

A data file that no manifest names is a leftover of a run that was cut off; readers never see it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backup import manifest as manifests
from backup.errors import BackupError, Damaged, Failed, Locked, NotFound
from backup.manifest import Manifest
from backup.names import check_name

MARKER = "pybackup.json"
FORMAT = "pybackup repository"
VERSION = 1
_TEMPORARY = ".tmp"
_MAX_MANIFEST = 64 << 20
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Modes:
    """Permissions of what is made: a backup holds everything the machine held."""

    file: int = 0o600
    folder: int = 0o700


@dataclass(frozen=True, slots=True)
class Contents:
    """A machine's readable manifests by point id, and what is wrong with the others, by file name."""

    manifests: Mapping[str, Manifest]
    damaged: Mapping[str, BackupError]


class Repository:
    """A folder of machines, with a marker that names it."""

    def __init__(self, path: Path, identity: str, modes: Modes) -> None:
        self.path = path
        self.identity = identity
        self.modes = modes

    @classmethod
    def open(cls, path: Path, modes: Modes = Modes()) -> Repository:
        """
        Open an existing repository.

        Raises
        ------
        NotFound
            There is none.
        Damaged, Failed
            The marker cannot be understood, or a newer program wrote it.
        """
        marker = path / MARKER
        try:
            content = marker.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(
                f"there is no repository at {path} (no {MARKER} in it)",
                hint="check --repo and `repository:`; `pybackup full` makes a repository in a new or empty folder",
            ) from None
        except OSError as error:
            raise Failed(f"{marker} cannot be read: {error.strerror}", hint="run as the repository's owner") from None
        return cls(path, _identity(content, marker), modes)

    @classmethod
    def open_or_create(cls, path: Path, modes: Modes = Modes()) -> Repository:
        """
        Open a repository, or make one where the folder is missing or empty.

        Raises
        ------
        NotFound
            The folder holds other things and no marker.
        """
        if not (path / MARKER).exists() and (not path.exists() or (path.is_dir() and not os.listdir(path))):
            with _explained(path):
                path.mkdir(mode=modes.folder, parents=True, exist_ok=True)
                document = {"format": FORMAT, "version": VERSION, "id": secrets.token_hex(16)}
                write_whole(path / MARKER, (json.dumps(document, indent=2) + "\n").encode(), modes.file)
        return cls.open(path, modes)

    @property
    def short_id(self) -> str:
        """Eight hex digits that stand for this repository in bitmaps' names."""
        return self.identity[:8]

    def machine_names(self) -> list[str]:
        """Names of the machines' folders, sorted."""
        with _explained(self.path):
            return sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir(follow_symlinks=False))

    def machine(self, name: str) -> Machine:
        """The folder of a machine, which need not exist yet."""
        return Machine(self.path / check_name("machine", name), self.modes)


class Machine:
    """One machine's folder."""

    def __init__(self, path: Path, modes: Modes = Modes()) -> None:
        self.path = path
        self.name = path.name
        self.modes = modes

    def exists(self) -> bool:
        """Is the folder there?"""
        return self.path.is_dir()

    def contents(self) -> Contents:
        """
        Read all manifests; empty where the folder does not exist.

        Raises
        ------
        Failed
            The folder cannot be read.
        """
        found: dict[str, Manifest] = {}
        damaged: dict[str, BackupError] = {}
        if not self.path.is_dir():
            return Contents(found, damaged)
        with _explained(self.path):
            names = sorted(os.listdir(self.path))
        for name in names:
            stem, dot, suffix = name.rpartition(".")
            if dot and suffix == "json" and manifests.is_point_id(stem):
                try:
                    found[stem] = read_manifest(self.path / name)
                except BackupError as error:
                    damaged[name] = error
        return Contents(found, damaged)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Hold the machine's lock; its folder is made when it is missing.

        The kernel frees an flock when its holder dies, however it dies.

        Raises
        ------
        Locked
            Another run holds it.
        """
        with _explained(self.path):
            if not self.path.is_dir():
                self.path.mkdir(mode=self.modes.folder)
                sync_folder(self.path.parent)
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, self.modes.file)
        try:
            _flock(fd, self.name)
            yield
        finally:
            os.close(fd)

    def remove_leftovers(self, contents: Contents) -> list[str]:
        """
        Remove data files that no manifest names, and temporary files; call it under the lock.

        Nothing is removed while a manifest is damaged, since that manifest may name any of them.
        """
        if contents.damaged:
            return []
        named = {
            name
            for point in contents.manifests.values()
            for disk in point.disks
            for name in (disk.data.file, disk.data.digests)
        }
        leftovers = [
            name
            for name in sorted(os.listdir(self.path))
            if (manifests.is_data_name(name) and name not in named)
            or (name.endswith(_TEMPORARY) and manifests.is_point_id(name.removesuffix(".json" + _TEMPORARY)))
        ]
        with _explained(self.path):
            for name in leftovers:
                os.unlink(self.path / name)
        return leftovers

    def next_sequence(self, contents: Contents) -> int:
        """One more than the highest; a damaged manifest may have had one above what can be read."""
        highest = max((point.sequence for point in contents.manifests.values()), default=0)
        return highest + 1 + len(contents.damaged)

    def publish(self, manifest: Manifest) -> Path:
        """
        Make a point exist; its data files are written and fsynced already.

        Returns
        -------
        Path
            The manifest's path.

        Raises
        ------
        Failed
            Nothing was published: the disk is full, for example.
        """
        path = self.path / f"{manifest.point}.json"
        with _explained(self.path):
            sync_folder(self.path)
            write_whole(path, manifests.encode(manifest), self.modes.file)
            sync_folder(self.path.parent)
        return path


def read_manifest(path: Path) -> Manifest:
    """
    Read one manifest; its name must be its point's id.

    Raises
    ------
    NotFound, Damaged, Failed
        It is missing, damaged, or of a newer program.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            content = file.read(_MAX_MANIFEST + 1)
    except FileNotFoundError:
        raise NotFound(
            f"there is no manifest {path}", hint="see `pybackup list` for the points that there are"
        ) from None
    except OSError as error:
        raise Damaged(
            f"manifest {path} cannot be read: {error.strerror}",
            hint="a manifest is a plain file, no link or folder; run as the repository's owner",
        ) from None
    found = manifests.decode(content, str(path))
    if path.name != f"{found.point}.json":
        raise Damaged(
            f"manifest {path} describes point {found.point}",
            hint=f"a manifest is named for its point; rename it to {found.point}.json if it was renamed by hand",
        )
    return found


def write_whole(path: Path, content: bytes, mode: int) -> None:
    """Write a file that appears under its name whole or not at all, and lasts: fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder last: a rename without it can vanish in a power cut (trap 43)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _identity(content: bytes, marker: Path) -> str:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    version = document.get("version") if isinstance(document, dict) else None
    if type(version) is int and version > VERSION:
        raise Failed(f"{marker} has format version {version}; this program reads {VERSION}", hint="upgrade pybackup")
    if not isinstance(document, dict) or document.get("format") != FORMAT or version != VERSION:
        raise Damaged(f"{marker} is not a repository's marker", hint=_MARKER_HINT)
    identity = document.get("id")
    if not isinstance(identity, str) or not _ID.fullmatch(identity):
        raise Damaged(f"{marker} has no valid id", hint=_MARKER_HINT)
    return identity


_MARKER_HINT = 'bring it back from a copy; every manifest beside it names the id as "repository"'


def _flock(fd: int, machine: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 200, 0).decode("ascii", "replace").strip() or "an unknown process"
        raise Locked(
            f"machine {machine} is locked by another run ({holder})",
            hint="wait for that run to end; the lock is freed by itself when the process ends",
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"host {socket.gethostname()} pid {os.getpid()}\n".encode("ascii", "replace"), 0)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal into two lines."""
    try:
        yield
    except OSError as error:
        raise Failed(
            f"{error.filename or path}: {error.strerror}",
            hint="check the repository's space and permissions; nothing published before was changed",
        ) from None
