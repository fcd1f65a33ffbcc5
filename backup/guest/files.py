"""
The files on a guest's disk at a point: list them, and copy a file or folder out, with libguestfs.

libguestfs mounts the guest's file systems in a small virtual machine.  This needs no root and no mount on the host, and
a hostile file system can harm only that machine.  Its output is not trusted either: no name becomes part of a command,
no link is followed on the host, and no devices and set-user-ID bits are created.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, cast

from backup.errors import BackupError, Damaged, Failed, NotFound, UsageError, os_errors_as
from backup.guest import guestfish
from backup.guest.guestfish import Guestfish, GuestfishError
from backup.model.manifest import timestamp
from backup.repository import data_file
from backup.repository.machine import Machine
from backup.repository.opened_chain import open_chain
from backup.runtime.ignoring import ignoring
from backup.storage.base import require_local_folder

_log = logging.getLogger(__name__)

_NOT_WRITTEN_HINT = "check the space and the permissions there"
_NOT_MOUNTED = {"swap", "unknown", "crypto_LUKS"}
_CHUNK = 1 << 16
_ZEROES = bytes(_CHUNK)
_NOWHERE = ("No such file or directory", "Not a directory", "Too many levels of symbolic links")
"""Messages of the guest's kernel that mean that a path does not exist."""
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the guest: size in bytes, permission bits, time of modification in UTC; `target` only for a link."""

    name: str
    kind: str
    size: int
    mode: int
    modified: str
    target: str | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """
    What was copied: the number of files and their bytes; `left_out` names what was not copied, such as devices.
    """

    files: int
    bytes: int
    left_out: tuple[str, ...]


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, and b"" at the end."""


class GuestFiles:
    """The mounted file systems of a guest; `unmounted` has a line for each that could not be mounted."""

    def __init__(self, fish: Guestfish, unmounted: Sequence[str] = ()) -> None:
        self._fish = fish
        self.unmounted = unmounted

    def list(self, path: str) -> list[Entry]:
        """
        Return the entries of a folder, sorted by name; for a file, its own entry.

        Raises
        ------
        NotFound, Failed
            The path does not exist, or cannot be read.
        """
        path = absolute(path)
        try:
            is_folder = stat.S_ISDIR(self._facts(path, follow=True)["mode"])
        except BackupError:
            is_folder = False  # a link to a missing file, or nothing at all
        if not is_folder:
            return [self._entry(path, PurePosixPath(path).name)]
        names = [os.fsdecode(name) for name in self._ask("ls0", path, "-").split(b"\0") if name]
        return [self._entry(f"{path.rstrip('/')}/{name}", name) for name in sorted(names)]

    def get(self, path: str, target: Path) -> Fetched:
        """
        Copy a file, or a folder with everything in it, to `target`, which must not exist.

        Content, permissions, times and links are kept, and so are numeric owners if this process is root.  The target
        gets its name when the copy is complete.

        Raises
        ------
        NotFound, Failed
            The path does not exist or cannot be read, or the target cannot be written.
        """
        path = absolute(path)
        facts = self._facts(path, follow=True)
        with os_errors_as(f"{target} cannot be written", hint=_NOT_WRITTEN_HINT), _beside(target) as made:
            if stat.S_ISDIR(facts["mode"]):
                with self._fish.stream("tar-out", path) as archive:
                    fetched = unpack(archive, made)
            elif stat.S_ISREG(facts["mode"]):
                with self._fish.stream("download", path) as content:
                    fetched = Fetched(1, _write(content, made), ())
            else:
                raise Failed(f"{path} is neither a file nor a folder", hint="see: `pybackup files --help`")
            _finish(made, facts["mode"], facts["mtime_sec"], (facts["uid"], facts["gid"]))
            require_new(target)
            os.rename(made, target)
        return fetched

    def _entry(self, path: str, name: str) -> Entry:
        facts = self._facts(path, follow=False)
        kind = _KINDS.get(stat.S_IFMT(facts["mode"]), "other")
        target = os.fsdecode(self._ask("readlink", path).removesuffix(b"\n")) if kind == "link" else None
        modified = _time(facts["mtime_sec"])
        return Entry(name, kind, facts["size"], stat.S_IMODE(facts["mode"]), modified, target)

    def _facts(self, path: str, *, follow: bool) -> Mapping[str, int]:
        text = self._ask("statns" if follow else "lstatns", path).decode()
        pairs = [line.partition(": ") for line in text.splitlines()]
        return {name.removeprefix("st_"): int(value) for name, _, value in pairs}

    def _ask(self, command: str, path: str, *more: str) -> bytes:
        try:
            return self._fish.ask(command, path, *more)
        except GuestfishError as error:
            if any(why in error.text for why in _NOWHERE):
                raise NotFound(
                    f"the guest has no {path}, or a link there leads nowhere", hint="see: `pybackup files MANIFEST /`"
                ) from None
            raise


@contextmanager
def open_files(machine: Machine, point: str, disk: str, filesystem: str | None) -> Iterator[GuestFiles]:
    """
    Mount the file systems of a disk: the named one, the only one, or those of the only operating system.

    Raises
    ------
    UsageError
        There are several file systems, and `filesystem` names none of them.
    BackupError
        The chain is broken; libguestfs is not installed or does not work.
    """
    folder = require_local_folder(machine.files)
    with (
        open_chain(machine, point, disk, lambda chain: data_file.hold(machine.files, chain)) as (chain, _),
        guestfish.started(folder / chain.newest.entry.data.file) as fish,
    ):
        fish.ask("run")
        yield GuestFiles(fish, mount(fish, mounts(fish, filesystem)))


def mounts(fish: Guestfish, wanted: str | None) -> list[tuple[str, str]]:
    """Return what to mount, in order: (mount point, device) for each file system; see `open_files`."""
    kinds = {name: kind for name, kind in _pairs(fish.ask("list-filesystems")) if kind not in _NOT_MOUNTED}
    if wanted is not None:
        if wanted not in kinds:
            raise UsageError(f"the disk has no file system {wanted}", hint=_choices(kinds))
        return [("/", wanted)]
    if len(kinds) == 1:
        return [("/", next(iter(kinds)))]
    if not kinds:
        raise UsageError("the disk has no file system that can be mounted", hint=_choices(kinds))
    roots = fish.ask("inspect-os").decode(errors="surrogateescape").split("\n")[:-1]
    if len(roots) != 1:
        many = f"{len(kinds)} file systems and {len(roots)} operating systems"
        raise UsageError(f"the disk has {many}", hint=_choices(kinds))
    places = _pairs(fish.ask("inspect-get-mountpoints", roots[0]))
    # Sorted by length, so that each is mounted after the one that contains its mount point.  File systems of other
    # disks are not available here.
    return sorted(((place, device) for place, device in places if device in kinds), key=lambda pair: len(pair[0]))


def mount(fish: Guestfish, places: Sequence[tuple[str, str]]) -> list[str]:
    """
    Mount file systems; return a line for each that cannot be mounted, since a damaged /home should not hide /etc.

    Raises
    ------
    Failed
        The first one, which contains the others, cannot be mounted.
    """
    failed = []
    for number, (place, device) in enumerate(places):
        try:
            fish.ask("mount-ro", device, place)
        except GuestfishError as error:
            if not number:
                raise Failed(
                    f"{device} cannot be mounted: {error.text}",
                    hint="is it damaged, or of a type that only its guest supports? see `pybackup serve --help`",
                ) from None
            failed.append(f"{device} is not mounted at {place}: {error.text}")
    return failed


def _choices(kinds: Mapping[str, str]) -> str:
    listed = ", ".join(f"{device} ({kind})" for device, kind in kinds.items())
    return (
        f"name one with --filesystem: {listed}" if listed else "an encrypted or empty disk? see `pybackup serve --help`"
    )


def _pairs(output: bytes) -> list[tuple[str, str]]:
    lines = (line.rpartition(b": ") for line in output.splitlines())
    return [(os.fsdecode(name), os.fsdecode(value)) for name, _, value in lines]


def target_of(path: str, dest: Path) -> Path:
    """Return the target of a path in the guest: inside `dest` if that is a folder, otherwise `dest` itself."""
    name = PurePosixPath(absolute(path)).name
    return dest / name if name not in {"", ".."} and os.path.isdir(dest) else dest


def require_new(target: Path) -> None:
    """
    Make sure that the target does not exist and can be made.

    Raises
    ------
    UsageError, Failed
        The target exists, or its folder is missing or cannot be written.
    """
    if os.path.lexists(target):
        raise UsageError(f"{target} exists", hint="name a path that does not exist, or an existing folder")
    if not os.path.isdir(target.parent):
        raise UsageError(f"there is no folder {target.parent}", hint="make the folder first, or name another one")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise Failed(f"{target.parent} cannot be written", hint="check the permissions there, or name another folder")


def absolute(path: str) -> str:
    """
    Return a path of the guest if it begins at the root.

    Raises
    ------
    UsageError
        The path is relative, or contains a null character.
    """
    if "\0" in path or not path.startswith("/"):
        raise UsageError(f"{path!r} is not a path in the guest", hint="begin with a slash: /etc/fstab")
    return path


def _time(seconds: int) -> str:
    try:
        return timestamp(datetime.fromtimestamp(seconds, UTC))
    except (OverflowError, ValueError, OSError):
        return str(seconds)  # the guest can set any number


def unpack(archive: Readable, target: Path) -> Fetched:
    """
    Unpack an untrusted tar archive, as it arrives, into a new folder.

    Each entry must lie in a folder that the archive contained before, and must have a new name; so no link can lead out
    of the target.  All other entries are left out, and so is everything except files, folders and links.

    Raises
    ------
    Damaged
        The stream is not a valid archive.
    """
    target.mkdir(0o700)
    folders: dict[PurePosixPath, tarfile.TarInfo | None] = {PurePosixPath(): None}
    files, size, left_out = set(), 0, []
    try:
        stream = cast("IO[bytes]", archive)  # mode "r|" only reads it
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK, errors="surrogateescape") as tar:
            for member in tar:
                place = _place(member.name)
                if place == PurePosixPath():
                    continue
                path = target / place
                if ".." in place.parts or place.parent not in folders or os.path.lexists(path):
                    left_out.append(member.name)
                elif member.isdir():
                    path.mkdir(0o700)
                    folders[place] = member
                elif member.isreg() and (content := tar.extractfile(member)) is not None:
                    size += _write(content, path)
                    _finish_as(path, member)
                    files.add(place)
                elif member.islnk() and _place(member.linkname) in files:
                    _link(target / _place(member.linkname), path)
                    files.add(place)
                elif member.issym():
                    path.symlink_to(member.linkname)
                    _finish_as(path, member)
                else:
                    left_out.append(member.name)
    except tarfile.TarError as error:
        raise Damaged(f"libguestfs' archive cannot be read: {error}", hint="run the command again") from None
    for place, entry in reversed(folders.items()):  # last: writing changes a folder's time, and its mode may forbid it
        if entry is not None:
            _finish_as(target / place, entry)
    return Fetched(len(files), size, tuple(left_out))


def _place(name: str) -> PurePosixPath:
    return PurePosixPath(*[part for part in name.split("/") if part not in {"", "."}])


def _write(content: Readable, path: Path) -> int:
    """Write a new file, with holes for zeroes, since a sparse file may be larger than our disk; return its size."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        while chunk := content.read(_CHUNK):
            if chunk == _ZEROES[: len(chunk)]:
                file.seek(len(chunk), os.SEEK_CUR)
            else:
                file.write(chunk)
        return file.truncate()


def _link(file: Path, path: Path) -> None:
    try:
        os.link(file, path)
    except OSError:  # a file system without hard links
        shutil.copy2(file, path)


def _finish_as(path: Path, member: tarfile.TarInfo) -> None:
    _finish(path, member.mode, int(member.mtime), (member.uid, member.gid))


def _finish(path: Path, mode: int, modified: int, owner: tuple[int, int]) -> None:
    """
    Set the owner of a file if this process is root, its permissions, and its time.

    Set-user-ID, set-group-ID and sticky bits are dropped.
    """
    if os.geteuid() == 0:
        with ignoring(_log, f"owner of {path}", OSError, OverflowError):  # a file system without owners
            os.chown(path, *owner, follow_symlinks=False)
    with ignoring(_log, f"time of {path}", OSError, OverflowError):
        os.utime(path, (modified, modified), follow_symlinks=False)
    if not path.is_symlink():
        os.chmod(path, stat.S_IMODE(mode) & 0o777)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; whatever has this name at the end of the block is removed."""
    made = target.with_name(f".pybackup-{os.urandom(8).hex()}.part")
    try:
        yield made
    finally:
        if made.is_dir():
            shutil.rmtree(made, ignore_errors=True)
        else:
            made.unlink(missing_ok=True)
