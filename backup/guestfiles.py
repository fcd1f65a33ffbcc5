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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from backup import datafile
from backup.chain import Chain, build
from backup.errors import BackupError, Damaged, Failed, NotFound, UsageError
from backup.manifest import timestamp
from backup.qemu import programs
from backup.qemu.programs import Guestfish, GuestfishError
from backup.repository import Machine

_NOT_MOUNTED = {"swap", "unknown", "crypto_LUKS"}
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


class GuestFiles:
    """A guest's mounted file systems."""

    def __init__(self, fish: Guestfish) -> None:
        self._fish = fish

    def list(self, path: str) -> list[Entry]:
        """
        The entries of a folder, by name; of a file, itself.

        Raises
        ------
        NotFound, Failed
            There is no such path; it cannot be read.
        """
        path = absolute(path)
        if not stat.S_ISDIR(self._facts(path, follow=True)["mode"]):
            return [self._entry(path, PurePosixPath(path).name)]
        names = [os.fsdecode(name) for name in self._ask("ls0", path, "-").split(b"\0") if name]
        return [self._entry(f"{path.rstrip('/')}/{name}", name) for name in sorted(names)]

    def get(self, path: str, target: Path) -> Fetched:
        """
        Bring a file, or a folder with all that is in it, to `target`, which must not exist.

        Contents, permissions and times come back; owners do not.  It appears under its name when it is whole.

        Raises
        ------
        NotFound, Failed
            There is no such path; it cannot be read, or the target not be written.
        """
        path = absolute(path)
        facts = self._facts(path, follow=True)
        require_new(target)
        with _explained(target), _beside(target) as work:
            made = work / "made"
            if stat.S_ISDIR(facts["mode"]):
                self._ask("tar-out", path, str(work / "tar"))
                fetched = unpack(work / "tar", made)
            elif stat.S_ISREG(facts["mode"]):
                self._ask("download", path, str(made))
                fetched = Fetched(1, made.stat().st_size, ())
            else:
                raise Failed(f"{path} is neither a file nor a folder", hint="see: pybackup files")
            _finish(made, facts["mode"], facts["mtime_sec"])
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
            if "No such file or directory" in error.text or "Not a directory" in error.text:
                raise NotFound(f"the guest has no {path}", hint="see: pybackup files MANIFEST /") from None
            raise


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
    chain = _chain(machine, point, disk)
    with datafile.held(machine.path, chain), programs.guestfish(machine.path / chain.newest.entry.data.file) as fish:
        fish.ask("run")
        if _chain(machine, point, disk) != chain:
            raise Failed(f"the chain of point {point} changed while it was opened", hint="run the command again")
        for place, device in mounts(fish, filesystem):
            fish.ask("mount-ro", device, place)
        yield GuestFiles(fish)


def _chain(machine: Machine, point: str, disk: str) -> Chain:
    contents = machine.contents()
    return build(contents.manifests, point, disk, contents.damaged)


def mounts(fish: Guestfish, wanted: str | None) -> list[tuple[str, str]]:
    """What to mount where, in order: (place, device) for each; see `opened`."""
    found = dict(_pairs(fish.ask("list-filesystems")))
    usable = [device for device, kind in found.items() if kind not in _NOT_MOUNTED]
    if wanted is not None:
        if wanted not in usable:
            raise UsageError(f"the disk has no file system {wanted}", hint=_choices(found))
        return [("/", wanted)]
    if len(usable) == 1:
        return [("/", usable[0])]
    roots = fish.ask("inspect-os").decode(errors="surrogateescape").split("\n")[:-1] if usable else []
    if len(roots) != 1:
        many = f"{len(usable)} file systems and {len(roots)} operating systems"
        raise UsageError(f"the disk has {many}" if usable else "the disk has no file system", hint=_choices(found))
    places = _pairs(fish.ask("inspect-get-mountpoints", roots[0]))
    # By length, so that each is mounted below what it lies in; of other disks' file systems there is nothing here.
    return sorted(((place, device) for place, device in places if device in found), key=lambda pair: len(pair[0]))


def _choices(found: Mapping[str, str]) -> str:
    listed = ", ".join(f"{device} ({kind})" for device, kind in found.items())
    return f"name one with --filesystem: {listed}" if listed else "an encrypted or empty disk? see pybackup serve"


def _pairs(said: bytes) -> list[tuple[str, str]]:
    lines = (line.rpartition(b": ") for line in said.splitlines())
    return [(os.fsdecode(name), os.fsdecode(value)) for name, _, value in lines]


def target_of(path: str, dest: Path) -> Path:
    """Where a path of the guest is put: in `dest`, where that is a folder, or under that name."""
    name = PurePosixPath(absolute(path)).name
    return dest / name if name not in {"", ".."} and dest.is_dir() else dest


def require_new(target: Path) -> None:
    """
    Make sure that nothing has the target's name.

    Raises
    ------
    Failed
        Something has.
    """
    if os.path.lexists(target):
        raise Failed(f"{target} exists already", hint="name what does not exist yet")


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


def unpack(archive: Path, target: Path) -> Fetched:
    """
    Unpack a tar archive that nobody vouches for into a new folder.

    Each entry goes into a folder that came out of the archive before it, under a name that nothing has; so no link can
    lead outside.  What is no file, folder or link, and what has no place, is left out.

    Raises
    ------
    Damaged
        It is no archive.
    """
    target.mkdir(0o700)
    folders: dict[PurePosixPath, tarfile.TarInfo | None] = {PurePosixPath(): None}
    files, size, left_out = 0, 0, []
    try:
        with tarfile.open(archive, "r:", errors="surrogateescape") as tar:
            for member in tar:
                place = PurePosixPath(*[part for part in PurePosixPath(member.name).parts if part not in {"/", "."}])
                if place == PurePosixPath():
                    continue
                path = target / place
                if ".." in place.parts or place.parent not in folders or os.path.lexists(path):
                    left_out.append(member.name)
                elif member.isdir():
                    path.mkdir(0o700)
                    folders[place] = member
                elif member.isreg() or member.islnk():
                    size += _write(tar, member, path)
                    files += 1
                elif member.issym():
                    path.symlink_to(member.linkname)
                else:
                    left_out.append(member.name)
    except tarfile.TarError as error:
        raise Damaged(f"libguestfs' archive cannot be read: {error}", hint="run the command again") from None
    for place, entry in reversed(folders.items()):  # last: a folder may forbid writing, and writing changes its time
        if entry is not None:
            _finish(target / place, entry.mode, int(entry.mtime))
    return Fetched(files, size, tuple(left_out))


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    """Write a file's content, also of one that is another's hard link; its bytes."""
    try:
        content = tar.extractfile(member)
    except KeyError:
        raise Damaged(f"libguestfs' archive has no {member.linkname}", hint="run the command again") from None
    if content is None:  # a link to a link
        return 0
    with content, open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
        size = file.tell()
    _finish(path, member.mode, int(member.mtime))
    return size


def _finish(path: Path, mode: int, modified: int) -> None:
    """Give a file its permissions, of which those that lend another's rights are not among, and its time."""
    with suppress(OSError, OverflowError):
        os.utime(path, (modified, modified))
    os.chmod(path, stat.S_IMODE(mode) & 0o777)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Make a folder beside a path to work in, on the same file system; it is removed with what it holds."""
    work = target.parent / f".pybackup-{os.urandom(4).hex()}"
    work.mkdir(0o700)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
