"""One machine in a repository: its lock, its points, and publishing a point whole or not at all."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from backup.errors import BackupError, Damaged, NotFound, UsageError
from backup.model import documents
from backup.model import manifest as manifests
from backup.model.manifest import DiskEntry, Manifest
from backup.repository.manifests import as_stored, exchanged_files, read_raw
from backup.storage.folder import (
    TEMPORARY,
    Modes,
    explained,
    make_folder,
    read,
    sync_folder,
    write_whole,
)
from backup.storage.locks import alone, flock, has_name
from backup.storage.plain_file import allow, open_file

ATTEMPTS = 50
"""How often a reader starts again while a prune changes what it reads; each step of a prune takes some fsyncs."""
_LOCK_ATTEMPTS = 20
"""How often the lock is taken again because its file lost its name meanwhile."""


@dataclass(frozen=True, slots=True)
class Contents:
    """
    A machine's readable manifests by point id, and what is wrong with the others, by file name.

    `exchanged` has the names of all files of exchanges that are not over; none of them is a leftover.  Two contents are
    equal where their readable manifests are: an error equals no other.
    """

    manifests: Mapping[str, Manifest]
    damaged: Mapping[str, BackupError] = field(compare=False)
    exchanged: frozenset[str] = field(default=frozenset(), compare=False)


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
                raise Damaged(f"the folder {self.path} of machine {self.name} is a link", hint=NO_LINKS)
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
        for _ in range(ATTEMPTS):
            # One that vanished was pruned after the folder was listed; what was read before may still build on it.
            if not any(isinstance(error, NotFound) for error in contents.damaged.values()):
                break
            contents = self._read_manifests(raw=raw)
        return contents

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
                exchanged.update(exchanged_files(read))
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
        for _ in range(_LOCK_ATTEMPTS):  # a file system may number one file differently each time
            if has_name(fd, self.path / "lock"):
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
                flock(fd, self.name)
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
                flock(fd, self.name, shared=True)
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
                with alone([self.path / name]) as why_not:
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
        with alone([self.path / name for name in names]) as why_not:
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
                or name == SEQUENCE + TEMPORARY
                or (name.endswith(TEMPORARY) and manifests.is_point_id(name.removesuffix(".json" + TEMPORARY)))
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
            found = re.fullmatch(rb"[1-9][0-9]{0,19}\n", read(self.path / SEQUENCE, 32))
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


SEQUENCE = "sequence"
"""File of a machine whose newest point was removed: the highest sequence that there was."""
NO_LINKS = (
    "nothing was changed; move the real folder into the repository, or mount it there if it has its own disk "
    "(mount --bind)"
)
