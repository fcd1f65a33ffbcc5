"""
The repository: folders, the lock, and publishing a point whole or not at all.

Rules of order (FORMAT.md, "Order of writing"); breaking one of them loses data:

1. every data file and digest file is written under its own name and fsynced,
2. the machine's folder is fsynced,
3. the manifest is written under a temporary name, fsynced, and renamed: from here on the point exists,
4. the machine's folder is fsynced again, and the repository's folder when the machine is new.

A data file that no manifest names is a leftover of a run that was cut off; readers never see it.

While prune exchanges a data file, its manifest names both (see `exchange`); readers get the entry of the one that has
the name.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from backup.errors import BackupError, Damaged, Failed, Locked, NotFound, UsageError
from backup.model import documents
from backup.model import manifest as manifests
from backup.model.documents import RANDOM, BadDocument, Fields
from backup.model.manifest import DiskEntry, Manifest
from backup.model.names import MARKER, RECOVERY, check_name, name_problem
from backup.repository.checked_file import open_plain
from backup.runtime.shortage import NOT_DAMAGE
from backup.storage.plain_file import HINT, NotPlainError, allow, create_file, open_file

FORMAT = "pybackup repository"
VERSION = 1
SEQUENCE = "sequence"
"""File of a machine whose newest point was removed: the highest sequence that there was."""
_TEMPORARY = ".tmp"
_MAX_MARKER = 64 << 10
_T = TypeVar("_T")
_TRIES = 20
"""How often a folder is read that a prune changes meanwhile."""
IN_USE = "in use"
UNTOLD = "no telling whether it is in use"
"""Why a point stays that would go: somebody serves it or looks into it; the file system does not say (and why)."""
_PATIENCE = 0.5
"""Seconds to wait for a machine's lock: another machine's run may only be looking whether anybody has it."""
_UNFINISHED_MARKER = re.compile(re.escape(MARKER) + r"\.[0-9a-f]{8}" + re.escape(_TEMPORARY))


@dataclass(frozen=True, slots=True)
class Modes:
    """Permissions of what is made: a backup holds everything the machine held."""

    file: int = 0o600
    folder: int = 0o700


@dataclass(frozen=True, slots=True)
class Contents:
    """
    A machine's readable manifests by point id, and what is wrong with the others, by file name.

    `exchanged` has the names of all files of exchanges that are not over; none of them is a leftover.
    """

    manifests: Mapping[str, Manifest]
    damaged: Mapping[str, BackupError]
    exchanged: frozenset[str] = frozenset()


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
            content = _read(marker, _MAX_MARKER)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(
                f"there is no repository at {path} (no {MARKER} in it)",
                hint=f"mount its disk if that is missing, or name another folder; `pybackup init {path}` makes a "
                "repository in a new or empty folder",
            ) from None
        except OSError as error:
            raise Failed(f"{marker} cannot be read: {error.strerror}", hint="run as the repository's owner") from None
        return cls(path, _identity(content, marker), modes)

    @classmethod
    def create(cls, path: Path, modes: Modes = Modes(), identity: str | None = None) -> Repository:
        """
        Make a repository in a new or empty folder, with `identity` or a random id.  Only `pybackup init` does.

        Raises
        ------
        UsageError
            There is a repository already, the folder holds other things, or it lies in a repository.
        Failed
            It cannot be made.
        """
        require_outside(path)
        with explained(path):
            _require_free(path)
            _make(path, modes, identity or os.urandom(16).hex())
        made = cls.open(path, modes)
        made.tidy()
        return made

    def tidy(self) -> None:
        """
        Remove what a killed `init` left beside the marker, and write the recovery instructions where they are missing.

        Only writers call this.  What cannot be done is done by the next one.
        """
        with suppress(OSError):
            for name in os.listdir(self.path):
                if _UNFINISHED_MARKER.fullmatch(name):
                    os.unlink(self.path / name)
            if not os.path.lexists(self.path / RECOVERY):
                text = Path(__file__).parent.with_name(RECOVERY).read_bytes()
                write_whole(self.path / RECOVERY, text, self.modes.file)

    def machine_names(self) -> list[str]:
        """Names of the machines' folders, sorted; a folder that can be no machine's (lost+found) is none."""
        with explained(self.path), os.scandir(self.path) as entries:
            folders = [entry.name for entry in entries if _is_folder(entry)]
        return sorted(name for name in folders if name_problem("machine", name) is None)

    def machine(self, name: str) -> Machine:
        """The folder of a machine, which need not exist yet."""
        return Machine(self.path / check_name("machine", name), self.modes)

    def ownership(self, machine: str | None) -> Ownership:
        """What is this repository's in a running QEMU; `machine` is the one whose lock is held, if any is."""
        return Ownership(self, machine)


@dataclass(frozen=True, slots=True)
class Ownership:
    """
    Tells what a running QEMU has of this repository, so that what a run left can be told from what one needs.

    `machine` is the one whose lock is held; None: none is.
    """

    repository: Repository
    machine: str | None

    @property
    def short_id(self) -> str:
        """Eight hex digits of the repository's id."""
        return self.repository.identity[:8]

    def has_point(self, point: str) -> bool:
        """Is it a point of any machine?  A damaged manifest counts."""
        names = self.repository.machine_names()
        return any(os.path.lexists(self.repository.path / name / f"{point}.json") for name in names)

    def require_alone(self) -> None:
        """
        Make sure that no other machine's run is under way.

        Raises
        ------
        Locked
            One is.
        """
        for name in self.repository.machine_names():
            if name != self.machine:
                self.repository.machine(name).require_free()


class Machine:
    """One machine's folder."""

    def __init__(self, path: Path, modes: Modes = Modes()) -> None:
        self.path = path
        self.name = path.name
        self.modes = modes

    def exists(self) -> bool:
        """
        Is the folder there?

        Raises
        ------
        Damaged
            A link has its name, which would lead out of the repository.
        UsageError
            Its name is another: the file system does not tell upper from lower case, for example.  Two machines would
            share one folder.
        Failed
            The folder cannot be looked at.
        """
        with explained(self.path):
            try:
                mode = os.lstat(self.path).st_mode
            except (FileNotFoundError, NotADirectoryError):
                return False
            if stat.S_ISLNK(mode):
                raise Damaged(f"the folder {self.path} of machine {self.name} is a link", hint=_NO_LINKS)
            if not stat.S_ISDIR(mode):
                return False
            self._require_exact_name()
        return True

    def _require_exact_name(self) -> None:
        try:
            names = os.listdir(self.path.parent)
        except PermissionError:  # a folder of others', in which a manifest was named by its path
            return
        if self.name in names or not os.path.lexists(self.path):
            return
        ours = os.lstat(self.path)
        real = next((name for name in names if os.path.samestat(ours, os.lstat(self.path.parent / name))), "another")
        raise UsageError(
            f"machine {self.name} has no folder of its own: on this file system, {self.path} is the folder {real}",
            hint=f"if it is the same machine, name it {real}; else choose a name that differs in more than upper and "
            "lower case",
        )

    def contents(self, *, raw: bool = False) -> Contents:
        """
        Read all manifests; empty where the folder does not exist.

        A disk whose data file is being exchanged has the entry of the file that has the name now; with `raw`, as its
        manifest says.

        Raises
        ------
        Failed
            The folder cannot be read.
        """
        contents = self._read_manifests(raw=raw)
        for _ in range(_TRIES):
            # One that vanished was pruned after the folder was listed; what was read before may still build on it.
            if not any(isinstance(error, NotFound) for error in contents.damaged.values()):
                break
            contents = self._read_manifests(raw=raw)
        return contents

    def seen(self, look: Callable[[Contents], _T], *, doubtful: Callable[[_T], bool] = lambda _: False) -> _T:
        """
        What a look at the machine shows, without its lock.

        Where the look fails, or what it shows is `doubtful`, and a prune changed the manifests meanwhile, it is taken
        again: damage counts only where it repeats.
        """
        contents = self.contents()
        while True:
            try:
                found = look(contents)
            except BackupError:
                later = self._changed(contents)
                if later is None:
                    raise
            else:
                later = self._changed(contents) if doubtful(found) else None
                if later is None:
                    return found
            contents = later

    def _changed(self, before: Contents) -> Contents | None:
        contents = self.contents()
        return None if contents.manifests == before.manifests else contents

    def _read_manifests(self, *, raw: bool) -> Contents:
        found: dict[str, Manifest] = {}
        damaged: dict[str, BackupError] = {}
        exchanged: set[str] = set()
        if not self.exists():
            return Contents(found, damaged)
        with explained(self.path):
            names = sorted(os.listdir(self.path))
        for name in names:
            point = name.removesuffix(".json")
            if point == name or not manifests.is_point_id(point):
                continue
            try:
                read = read_raw(self.path / name)
                found[point] = read if raw else as_stored(self.path, read)
                exchanged.update(_exchanged(read))
            except BackupError as error:
                damaged[name] = error
        return Contents(found, damaged, frozenset(exchanged))

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
        fd = self._take_lock()
        for _ in range(_TRIES):  # a file system may number one file differently each time
            if _has_name(fd, self.path / "lock"):
                break
            os.close(fd)  # its holder removed the machine, and the lock with it
            fd = self._take_lock()
        try:
            yield
        finally:
            os.close(fd)

    def _take_lock(self) -> int:
        with explained(self.path):
            if not self.exists():
                make_folder(self.path, self.modes.folder)
                sync_folder(self.path.parent)
            fd = open_file(self.path / "lock", os.O_RDWR | os.O_CREAT, self.modes.file, sole=True)
        try:
            allow(fd, self.modes.file)
            with explained(self.path / "lock"):
                _flock(fd, self.name)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def require_free(self) -> None:
        """
        Make sure that no run has the machine's lock, and leave what it says as it is.

        Raises
        ------
        Locked
            One has it.
        """
        with explained(self.path / "lock"):
            try:
                fd = open_file(self.path / "lock", os.O_RDONLY)
            except FileNotFoundError:
                return
            try:
                _flock(fd, self.name, shared=True)
            finally:
                os.close(fd)

    def points_in_use(self) -> dict[str, str]:
        """
        The points that must stay as they are, and why: somebody needs their files for longer (`pybackup serve`), which
        is IN_USE, or there is no telling: UNTOLD, and the reason.

        Who needs a chain holds a shared flock on each of its digest files, and then reads the manifests again; older
        programs hold the data files.
        """
        if not self.exists():
            return {}
        with explained(self.path):
            names = sorted(os.listdir(self.path))  # digest files first
        used: dict[str, str] = {}
        for name in names:
            point = manifests.point_of(name)
            if point is not None and point not in used:
                with _alone([self.path / name]) as why_not:
                    if why_not is not None:
                        used[point] = why_not
        return used

    @contextmanager
    def unused(self, *disks: DiskEntry) -> Iterator[str | None]:
        """
        Keep readers from the files of these disks' points until the block ends, in which they may be removed or
        replaced; where it yields a reason, as in `points_in_use`, they must stay.

        A reader either had them before, and is seen, or gets them afterwards, and sees by the manifests what changed.
        """
        # The digest file first: once it is ours, no reader starts a QEMU, whom a lock on the data file might disturb.
        names = [name for disk in disks for name in (disk.data.digests, disk.data.file)]
        with _alone([self.path / name for name in names]) as why_not:
            yield why_not

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
        } | contents.exchanged
        with explained(self.path):
            leftovers = [
                name
                for name in sorted(os.listdir(self.path))
                if (name not in named and manifests.is_data_name(name))
                or name == SEQUENCE + _TEMPORARY
                or (name.endswith(_TEMPORARY) and manifests.is_point_id(name.removesuffix(".json" + _TEMPORARY)))
            ]
            for name in leftovers:
                os.unlink(self.path / name)
        return leftovers

    def next_sequence(self, contents: Contents) -> int:
        """
        One more than the highest; a damaged manifest may have had one above what can be read.

        Raises
        ------
        Damaged
            There is no higher one, which no number of backups can have led to.
        """
        highest = max((point.sequence for point in contents.manifests.values()), default=0)
        highest = max(highest, self._highest_removed())
        found = highest + 1 + len(contents.damaged)
        if found > documents.MAX_NUMBER:
            raise Damaged(
                f"machine {self.name} has a point of sequence {highest}, after which none can follow",
                hint="back the machine up under another name (--machine); pybackup has not written that manifest",
            )
        return found

    def note_removed(self, sequence: int) -> None:
        """
        Note the sequence of a newest point that is removed next, so that no later point gets it again.

        A second place may still hold the removed point, and the later one must be its latest.
        """
        with explained(self.path):
            write_whole(self.path / SEQUENCE, f"{sequence}\n".encode(), self.modes.file)

    def _highest_removed(self) -> int:
        """What `note_removed` noted; 0 where it did not, or something else has the name."""
        try:
            found = re.fullmatch(rb"[1-9][0-9]{0,19}\n", _read(self.path / SEQUENCE, 32))
        except OSError:
            return 0
        sequence = int(found[0]) if found else 0
        return sequence if sequence <= documents.MAX_NUMBER else 0

    def publish(self, manifest: Manifest, content: bytes | None = None) -> Path:
        """
        Make a point exist; its data files are written and fsynced already.

        `content` are the manifest's bytes where it is a copy of one: they may have fields that this program does not
        know.

        Returns
        -------
        Path
            The manifest's path.

        Raises
        ------
        BackupError
            Nothing was published: the disk is full, for example.
        """
        path = self.path / f"{manifest.point}.json"
        content = manifests.encode(manifest) if content is None else content
        # A point that no reader would take (a sequence beyond the largest) must not pass for a backup.
        manifests.decode(content, path.name)
        try:
            with explained(self.path):
                sync_folder(self.path)
                write_whole(path, content, self.modes.file)
                sync_folder(self.path.parent)
        except BaseException:
            # It may have its name already; the caller removes the data files, so the manifest must go first.
            self.withdraw(manifest.point)
            raise
        return path

    def rewrite(self, manifest: Manifest) -> None:
        """
        Put another manifest in the place of a point's own, at once and to last; call it under the lock.

        Raises
        ------
        Failed
            It cannot be written; the one or the other is there.
        """
        path = self.path / f"{manifest.point}.json"
        content = manifests.encode(manifest)
        manifests.decode(content, path.name)
        with explained(self.path):
            write_whole(path, content, stat.S_IMODE(os.stat(path).st_mode))

    def remove_point(self, manifest: Manifest) -> None:
        """
        Remove a point on which no other builds: its manifest first, which ends it, then its files.

        Raises
        ------
        Failed
            Something could not be removed; what is left without a manifest, the next run removes.
        """
        with explained(self.path):
            os.unlink(self.path / f"{manifest.point}.json")
            sync_folder(self.path)
            for disk in manifest.disks:
                for name in (disk.data.file, disk.data.digests):
                    (self.path / name).unlink(missing_ok=True)
            sync_folder(self.path)

    def withdraw(self, point: str) -> None:
        """Take back a point that was just published, or not yet: its run failed, and its data files go next."""
        with suppress(OSError):
            os.unlink(self.path / f"{point}.json")
            sync_folder(self.path)


def read_manifest(path: Path) -> Manifest:
    """Read one manifest, with the entries of the data files that have their names now; otherwise as `read_raw`."""
    return as_stored(path.parent, read_raw(path))


def as_stored(folder: Path, manifest: Manifest) -> Manifest:
    """A manifest with each disk's entry as the data file that has the name now is."""
    for disk in manifest.disks:
        if disk.replaces is not None:
            stored = replace(disk, replaces=None) if is_exchanged(folder, disk) else disk.restored()
            manifest = manifest.with_disk(stored)
    return manifest


def is_exchanged(folder: Path, disk: DiskEntry) -> bool:
    """
    Has the rewritten data file taken the former one's name?  Its backing file, which is never the former's, tells.

    Of a file that cannot be read it is said by whether the rewritten one still waits; readers find what is wrong.
    """
    from backup.qcow2 import read_header  # noqa: PLC0415 - brings numpy, which a list of points need not import

    path = folder / disk.data.file
    backing = None if disk.parent is None else manifests.data_name(disk.name, disk.parent.point)
    try:
        with open(open_file(path, os.O_RDONLY), "rb", buffering=0) as file:
            return read_header(file, str(path)).image.backing == backing
    except (BackupError, OSError):
        return not os.path.lexists(folder / (disk.data.file + manifests.NEW))


def _exchanged(manifest: Manifest) -> Iterator[str]:
    """Names of the files of a point that are being exchanged."""
    for disk in manifest.disks:
        if disk.replaces is not None:
            yield disk.data.file
            yield disk.data.file + manifests.NEW
            yield disk.data.digests
            yield disk.replaces.data.digests


def read_raw(path: Path) -> Manifest:
    """
    Read one manifest as it is; its name must be its point's id.

    Raises
    ------
    NotFound, Damaged, Failed
        It is missing, damaged, or of a newer program.
    """
    return read_manifest_whole(path)[0]


def read_manifest_whole(path: Path) -> tuple[Manifest, bytes]:
    """Read one manifest (see `read_raw`), and its bytes."""
    try:
        content = _read(path, documents.MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(
            f"there is no manifest {path}", hint="see `pybackup list` for the points that there are"
        ) from None
    except OSError as error:
        if error.errno in NOT_DAMAGE:
            raise Failed(
                f"manifest {path} cannot be read: {error.strerror}", hint="run as the repository's owner"
            ) from None
        raise Damaged(
            f"manifest {path} cannot be read: {error.strerror}",
            hint="a manifest is a plain file, no link, folder or pipe; bring it back from a copy of the repository",
        ) from None
    found = manifests.decode(content, str(path))
    if path.name != f"{found.point}.json":
        raise Damaged(
            f"manifest {path} describes point {found.point}",
            hint=f"a manifest is named for its point; rename it to {found.point}.json if it was renamed by hand",
        )
    return found, content


def write_whole(path: Path, content: bytes, mode: int) -> None:
    """Write a file that appears under its name whole or not at all, and lasts: fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        _write_temporary(temporary, content, mode)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Is it a folder, or a link to one?  A link that leads in a circle is none, and hides none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def make_folder(path: Path, mode: int) -> None:
    """Make a folder of this mode, whatever the umask; another first run may have been faster."""
    path.mkdir(mode=mode, exist_ok=True)
    allow(path, mode)


def _write_temporary(path: Path, content: bytes, mode: int) -> None:
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


def require_outside(path: Path) -> None:
    """
    Refuse a folder for a repository that lies in another repository.

    Raises
    ------
    UsageError
        It does.
    """
    for folder in Path(os.path.realpath(path)).parents:
        if os.path.lexists(folder / MARKER):
            raise UsageError(f"{path} lies in the repository {folder}", hint="name a folder outside of it")


def _require_free(path: Path) -> None:
    """Accept a path where nothing is, and an empty folder; the root of a fresh file system is empty too."""
    if os.path.lexists(path / MARKER):
        raise _exists_already(path)
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UsageError(f"{path} is no folder", hint=_NEW_FOLDER)
    other = sorted(name for name in os.listdir(path) if name != "lost+found" and not _UNFINISHED_MARKER.fullmatch(name))
    if other:
        raise UsageError(f"{path} is not empty: it holds {other[0]}", hint=_NEW_FOLDER)


def _exists_already(path: Path) -> UsageError:
    return UsageError(
        f"there is a repository at {path} already; nothing was changed",
        hint="use it as it is, or name a new or empty folder",
    )


_NEW_FOLDER = "name a new or empty folder; pybackup mixes its files with no others"


def _make(path: Path, modes: Modes, identity: str) -> None:
    """Make a repository where there is none, and the folders that lead to it; all their names last."""
    # The repository's folder counts as new where it is there: a first `init` may have been cut off before it lasted.
    new = [folder for folder in path.absolute().parents if not os.path.lexists(folder)]
    for folder in (*reversed(new), path):
        if not os.path.lexists(folder):
            make_folder(folder, modes.folder)
    document = {"format": FORMAT, "version": VERSION, "id": identity}
    _write_marker(path / MARKER, (json.dumps(document, indent=2) + "\n").encode(), modes.file)
    for folder in (path, *new):
        with suppress(PermissionError):  # a folder of others', which we may write to and not read
            sync_folder(folder.parent)


def _write_marker(path: Path, content: bytes, mode: int) -> None:
    """Write the marker, unless another `init` was faster: its id may be in bitmaps' names already."""
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}{_TEMPORARY}")
    try:
        _write_temporary(temporary, content, mode)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise _exists_already(path.parent) from None
        except OSError:  # a file system without links, or a run of the other's repository that tidied up
            if os.path.lexists(path):
                raise _exists_already(path.parent) from None
            os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _read(path: Path, limit: int) -> bytes:
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


def _identity(content: bytes, marker: Path) -> str:
    try:
        document = documents.parse(content)
        if document.get("format") != FORMAT:
            raise BadDocument(f'its "format" is not "{FORMAT}"')
        version = Fields(document, "marker").number("version", low=1)
        if version > VERSION:
            raise Failed(
                f"{marker} has format version {version}; this program reads {VERSION}", hint="upgrade pybackup"
            )
        return Fields(document, "marker").matching("id", RANDOM)
    except BadDocument as error:
        raise Damaged(f"{marker} is not a repository's marker: {error}", hint=_MARKER_HINT) from None


_NO_LINKS = (
    "nothing was changed; move the real folder into the repository, or mount it there if it has its own disk "
    "(mount --bind)"
)
_MARKER_HINT = 'bring it back from a copy; every manifest beside it names the id as "repository"'


@contextmanager
def _alone(paths: Sequence[Path]) -> Iterator[str | None]:
    """Have files to ourselves until the block ends, those that there are; yields why we have not, if so."""
    with ExitStack() as stack:
        found = (_why_held(path, stack) for path in paths)
        yield next((why for why in found if why is not None), None)


def _why_held(path: Path, stack: ExitStack) -> str | None:
    """Lock a file until the stack ends; why not, where somebody else has a lock on it, or there is no telling."""
    try:
        fd = _open_to_lock(path)
    except NotFound:
        return None
    stack.callback(os.close, fd)
    try:
        return None if _try_flock(fd, fcntl.LOCK_EX) else IN_USE
    except OSError as error:
        return f"{UNTOLD}: {error.strerror}"


def _open_to_lock(path: Path) -> int:
    """Open a file for writing if we may: on NFS, only so it can be locked exclusively (flock(2))."""
    try:
        return open_file(path, os.O_RDWR)
    except OSError:
        return open_plain(path)


def _has_name(fd: int, path: Path) -> bool:
    """Is it this file that has the name?"""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _flock(fd: int, machine: str, *, shared: bool = False) -> None:
    """Take a machine's lock, and say in it who has it; `shared`: only for a look, which writes nothing."""
    until = time.monotonic() + _PATIENCE
    while not _try_flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
        if time.monotonic() > until:
            holder = os.pread(fd, 200, 0).decode("ascii", "replace").strip() or "an unknown process"
            raise Locked(
                f"machine {machine} is locked by another run ({holder})",
                hint="wait for that run to end; the lock is freed by itself when the process ends",
            )
        time.sleep(_PATIENCE / 20)
    if not shared:
        with suppress(OSError):  # a full disk: the lock holds all the same, only its holder is not named
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"host {socket.gethostname()} pid {os.getpid()}\n".encode("ascii", "replace"), 0)


def _try_flock(fd: int, kind: int) -> bool:
    """Take an flock at once; False where somebody else's is in the way."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter, where the file system has fcntl's locks for it (NFS)
        return False
    return True


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
