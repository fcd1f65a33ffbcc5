"""
The files in a guest's disk at a point: listed, and brought back one by one, through libguestfs.

libguestfs mounts the guest's file systems in a small virtual machine: no root, no mount on the host, and a hostile file
system can harm that machine only.  Nor is what comes out of it trusted: names are never a command's words, no link is
followed on the host, and neither devices nor set-user-id bits are made.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, cast

from backup.errors import BackupError, Damaged, Failed, NotFound, UsageError
from backup.guest import guestfish
from backup.guest.guestfish import Guestfish, GuestfishError
from backup.model.manifest import timestamp
from backup.repository import data_file
from backup.repository.machine import Machine
from backup.repository.opened_chain import open_chain
from backup.storage.base import require_local_folder

_NOT_MOUNTED = {"swap", "unknown", "crypto_LUKS"}
_CHUNK = 1 << 16
_ZEROES = bytes(_CHUNK)
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the guest; `size` in bytes, `mode` its permission bits, `modified` UTC, `target` a link's."""

    name: str
    kind: str
    size: int
    mode: int
    modified: str
    target: str | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was brought back: files and their bytes; and what was left out, such as devices and sockets."""

    files: int
    bytes: int
    left_out: tuple[str, ...]


class Readable(Protocol):
    """Bytes as they come."""

    def read(self, size: int, /) -> bytes:
        """At most so many; none at the end."""


class GuestFiles:
    """A guest's mounted file systems; `unmounted` says which of them could not be mounted, and why."""

    def __init__(self, fish: Guestfish, unmounted: Sequence[str] = ()) -> None:
        self._fish = fish
        self.unmounted = unmounted

    def list(self, path: str) -> list[Entry]:
        """
        The entries of a folder, by name; of a file, itself.

        Raises
        ------
        NotFound, Failed
            There is no such path; it cannot be read.
        """
        path = absolute(path)
        try:
            is_folder = stat.S_ISDIR(self._facts(path, follow=True)["mode"])
        except BackupError:
            is_folder = False  # a link that leads nowhere, unless nothing is there at all
        if not is_folder:
            return [self._entry(path, PurePosixPath(path).name)]
        names = [os.fsdecode(name) for name in self._ask("ls0", path, "-").split(b"\0") if name]
        return [self._entry(f"{path.rstrip('/')}/{name}", name) for name in sorted(names)]

    def get(self, path: str, target: Path) -> Fetched:
        """
        Bring a file, or a folder with all that is in it, to `target`, which must not exist.

        Contents, permissions, times and links come back, and owners, by number, where this process is root's.  It
        appears under its name when it is whole.

        Raises
        ------
        NotFound, Failed
            There is no such path; it cannot be read, or the target not be written.
        """
        path = absolute(path)
        facts = self._facts(path, follow=True)
        with _explained(target), _beside(target) as made:
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
        said = self._ask("statns" if follow else "lstatns", path).decode()
        pairs = [line.partition(": ") for line in said.splitlines()]
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


_NOWHERE = ("No such file or directory", "Not a directory", "Too many levels of symbolic links")


@contextmanager
def opened(machine: Machine, point: str, disk: str, filesystem: str | None) -> Iterator[GuestFiles]:
    """
    Mount what a disk holds: the file system that is named, the only one, or those of the only operating system.

    Raises
    ------
    UsageError
        There are several, and none is named, or not one of them.
    BackupError
        The chain is broken; libguestfs is not installed or does not work.
    """
    folder = require_local_folder(machine.files)
    with (
        open_chain(machine, point, disk, lambda chain: data_file.held(machine.files, chain)) as (chain, _),
        guestfish.started(folder / chain.newest.entry.data.file) as fish,
    ):
        fish.ask("run")
        yield GuestFiles(fish, mount(fish, mounts(fish, filesystem)))


def mounts(fish: Guestfish, wanted: str | None) -> list[tuple[str, str]]:
    """What to mount where, in order: (place, device) for each; see `opened`."""
    found = {name: kind for name, kind in _pairs(fish.ask("list-filesystems")) if kind not in _NOT_MOUNTED}
    if wanted is not None:
        if wanted not in found:
            raise UsageError(f"the disk has no file system {wanted}", hint=_choices(found))
        return [("/", wanted)]
    if len(found) == 1:
        return [("/", next(iter(found)))]
    if not found:
        raise UsageError("the disk has no file system that can be mounted", hint=_choices(found))
    roots = fish.ask("inspect-os").decode(errors="surrogateescape").split("\n")[:-1]
    if len(roots) != 1:
        many = f"{len(found)} file systems and {len(roots)} operating systems"
        raise UsageError(f"the disk has {many}", hint=_choices(found))
    places = _pairs(fish.ask("inspect-get-mountpoints", roots[0]))
    # By length, so that each is mounted below what it lies in; of other disks' file systems there is nothing here.
    return sorted(((place, device) for place, device in places if device in found), key=lambda pair: len(pair[0]))


def mount(fish: Guestfish, places: Sequence[tuple[str, str]]) -> list[str]:
    """
    Mount file systems; which of them could not be, and why: a damaged /home keeps nobody from /etc.

    Raises
    ------
    Failed
        The first, which the others lie in, cannot be mounted.
    """
    failed = []
    for number, (place, device) in enumerate(places):
        try:
            fish.ask("mount-ro", device, place)
        except GuestfishError as error:
            if not number:
                raise Failed(
                    f"{device} cannot be mounted: {error.text}",
                    hint="is it damaged, or of a kind that only its guest knows? see `pybackup serve --help`",
                ) from None
            failed.append(f"{device} is not mounted at {place}: {error.text}")
    return failed


def _choices(found: Mapping[str, str]) -> str:
    listed = ", ".join(f"{device} ({kind})" for device, kind in found.items())
    return (
        f"name one with --filesystem: {listed}" if listed else "an encrypted or empty disk? see `pybackup serve --help`"
    )


def _pairs(said: bytes) -> list[tuple[str, str]]:
    lines = (line.rpartition(b": ") for line in said.splitlines())
    return [(os.fsdecode(name), os.fsdecode(value)) for name, _, value in lines]


def target_of(path: str, dest: Path) -> Path:
    """Where a path of the guest is put: in `dest`, where that is a folder, or under that name."""
    name = PurePosixPath(absolute(path)).name
    return dest / name if name not in {"", ".."} and os.path.isdir(dest) else dest


def require_new(target: Path) -> None:
    """
    Make sure that nothing has the target's name, and that it can be made.

    Raises
    ------
    UsageError, Failed
        Something has; its folder is missing, or not to be written.
    """
    if os.path.lexists(target):
        raise UsageError(f"{target} exists", hint="name what does not exist yet, or a folder to put it in")
    if not os.path.isdir(target.parent):
        raise UsageError(f"there is no folder {target.parent}", hint="make it first, or name another")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise Failed(f"{target.parent} cannot be written", hint="check the permissions there, or name another folder")


def absolute(path: str) -> str:
    """
    Check that a path begins at the guest's root.

    Raises
    ------
    UsageError
        It does not.
    """
    if "\0" in path or not path.startswith("/"):
        raise UsageError(f"{path!r} is not a path in the guest", hint="begin with a slash: /etc/fstab")
    return path


def _time(seconds: int) -> str:
    try:
        return timestamp(datetime.fromtimestamp(seconds, UTC))
    except (OverflowError, ValueError, OSError):
        return str(seconds)  # the guest may say anything


def unpack(archive: Readable, target: Path) -> Fetched:
    """
    Unpack a tar archive that nobody vouches for, as it comes, into a new folder.

    Each entry goes into a folder that came out of the archive before it, under a name that nothing has; so no link can
    lead outside.  What is no file, folder or link, and what has no place, is left out.

    Raises
    ------
    Damaged
        It is no archive.
    """
    target.mkdir(0o700)
    folders: dict[PurePosixPath, tarfile.TarInfo | None] = {PurePosixPath(): None}
    files, size, left_out = set(), 0, []
    try:
        stream = cast("IO[bytes]", archive)  # in mode "r|" it is only read
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
    for place, entry in reversed(folders.items()):  # last: a folder may forbid writing, and writing changes its time
        if entry is not None:
            _finish_as(target / place, entry)
    return Fetched(len(files), size, tuple(left_out))


def _place(name: str) -> PurePosixPath:
    return PurePosixPath(*[part for part in name.split("/") if part not in {"", "."}])


def _write(content: Readable, path: Path) -> int:
    """Write a new file, with holes for its zeroes: a guest's sparse file may be larger than our disk.  Its bytes."""
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
    Give a file its owner, as far as we may, its permissions, and its time.

    Of the permissions those that lend another's rights are not among.
    """
    if os.geteuid() == 0:
        with suppress(OSError, OverflowError):  # a file system without owners
            os.chown(path, *owner, follow_symlinks=False)
    with suppress(OSError, OverflowError):
        os.utime(path, (modified, modified), follow_symlinks=False)
    if not path.is_symlink():
        os.chmod(path, stat.S_IMODE(mode) & 0o777)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A name beside a path for what is to get that path's; what has the name at the end is removed."""
    made = target.with_name(f".pybackup-{os.urandom(8).hex()}.part")
    try:
        yield made
    finally:
        if made.is_dir():
            shutil.rmtree(made, ignore_errors=True)
        else:
            made.unlink(missing_ok=True)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except BackupError:
        raise
    except OSError as error:
        raise Failed(
            f"{target} cannot be written: {error.strerror}", hint="check the space and the permissions there"
        ) from None
