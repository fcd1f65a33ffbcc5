"""One machine in a repository: its lock, its points, and publishing a point whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from backup.errors import BackupError, Damaged, NotFound
from backup.model import documents
from backup.model import manifest as manifests
from backup.model.manifest import DiskEntry, Manifest
from backup.repository.manifests import as_stored, exchanged_files, read_raw
from backup.storage.base import NO_FILES, TEMPORARY, Listing, Storage
from backup.storage.refusals import explained, opening

ATTEMPTS = 50
"""How often a reader starts again while a prune changes what it reads; each step of a prune takes some fsyncs."""


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
    """
    One machine of a repository.

    Attributes
    ----------
    files : Files
        The files of the machine's folder, which need not exist.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.name = name
        self.storage = storage
        self.files = storage.files(name)

    def exists(self) -> bool:
        """
        Tell whether the machine has a folder.

        Raises
        ------
        Damaged, UsageError, Failed
            Something else has the folder's name; see `Files.exists`.
        """
        return self.files.exists()

    def listing(self) -> Listing:
        """
        List the machine's files; none where the machine has no folder.

        Raises
        ------
        Failed
            The folder cannot be read.
        """
        if not self.exists():
            return NO_FILES
        with explained(self.files.location):
            return self.files.listing()

    def location(self, point: str) -> str:
        """Return the path or URL of a point's manifest, for people."""
        return self.files.path(manifest_name(point))

    def has_point(self, point: str) -> bool:
        """Tell whether a manifest has this point's name, damaged or not."""
        return self.files.has(manifest_name(point))

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
        for name in self.listing():
            point = name.removesuffix(".json")
            if point == name or not manifests.is_point_id(point):
                continue
            try:
                read = read_raw(self.files, name)
                found[point] = read if raw else as_stored(self.files, read)
                exchanged.update(exchanged_files(read))
            except BackupError as error:
                damaged[name] = error
        return Contents(found, damaged, frozenset(exchanged))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Hold the machine's lock; the machine's folder is made when it is missing.

        Raises
        ------
        Locked
            Another run holds it.
        """
        with self.files.lock():
            yield

    def require_free(self) -> None:
        """
        Make sure that no run has the machine's lock.

        Raises
        ------
        Locked
            A run has it.
        """
        self.files.require_unlocked()

    def points_in_use(self) -> dict[str, str]:
        """
        The points that must stay as they are, and why: somebody needs their files for longer (`pybackup serve`), which
        is IN_USE, or there is no telling: UNTOLD, and the reason.

        Who needs a chain holds a shared flock on each of its digest files, and then reads the manifests again; older
        programs hold the data files.
        """
        used: dict[str, str] = {}
        for name in self.listing():  # sorted: digest files first
            point = manifests.point_of(name)
            if point is not None and point not in used:
                with self._alone([name]) as why_not:
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
        with self._alone(names) as why_not:
            yield why_not

    @contextmanager
    def _alone(self, names: Sequence[str]) -> Iterator[str | None]:
        with ExitStack() as stack:
            with opening(self.files.location):
                why_not = stack.enter_context(self.files.alone(names))
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
        with explained(self.files.location):
            leftovers = [
                name
                for name in self.files.listing()
                if (name not in named and manifests.is_data_name(name))
                or name == SEQUENCE + TEMPORARY
                or (name.endswith(TEMPORARY) and manifests.is_point_id(name.removesuffix(".json" + TEMPORARY)))
            ]
            for name in leftovers:
                self.files.remove(name)
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
        with explained(self.files.location):
            self.files.publish(SEQUENCE, f"{sequence}\n".encode())

    def _highest_removed(self) -> int:
        """What `note_removed` noted; 0 where it did not, or something else has the name."""
        try:
            found = re.fullmatch(rb"[1-9][0-9]{0,19}\n", self.files.read(SEQUENCE, 32))
        except OSError:
            return 0
        sequence = int(found[0]) if found else 0
        return sequence if sequence <= documents.MAX_NUMBER else 0

    def publish(self, manifest: Manifest, content: bytes | None = None) -> str:
        """
        Make a point exist; its data files are written and fsynced already.

        `content` are the manifest's bytes where it is a copy of one: they may have fields that this program does not
        know.

        Returns
        -------
        str
            The manifest's location, for people.

        Raises
        ------
        BackupError
            Nothing was published: the disk is full, for example.
        """
        name = manifest_name(manifest.point)
        content = manifests.encode(manifest) if content is None else content
        # A point that no reader would take (a sequence beyond the largest) must not pass for a backup.
        manifests.decode(content, name)
        try:
            with explained(self.files.location):
                self.files.barrier()
                self.files.publish(name, content)
                self.storage.files().barrier()
        except BaseException:
            # It may have its name already; the caller removes the data files, so the manifest must go first.
            self.withdraw(manifest.point)
            raise
        return self.files.path(name)

    def rewrite(self, manifest: Manifest) -> None:
        """
        Put another manifest in the place of a point's own, at once and to last; call it under the lock.

        Raises
        ------
        Failed
            It cannot be written; the one or the other is there.
        """
        name = manifest_name(manifest.point)
        content = manifests.encode(manifest)
        manifests.decode(content, name)
        with explained(self.files.location):
            self.files.publish(name, content, replace=True)

    def remove_point(self, manifest: Manifest) -> None:
        """
        Remove a point on which no other builds: its manifest first, which ends it, then its files.

        Raises
        ------
        Failed
            Something could not be removed; what is left without a manifest, the next run removes.
        """
        with explained(self.files.location):
            self.files.remove(manifest_name(manifest.point))
            self.files.barrier()
            for disk in manifest.disks:
                for name in (disk.data.file, disk.data.digests):
                    self.files.discard(name)
            self.files.barrier()

    def withdraw(self, point: str) -> None:
        """Take back a point that was just published, or not yet: its run failed, and its data files go next."""
        with suppress(OSError):
            self.files.remove(manifest_name(point))
            self.files.barrier()


SEQUENCE = "sequence"
"""File of a machine whose newest point was removed: the highest sequence that there was."""


def manifest_name(point: str) -> str:
    """Return the name of a point's manifest."""
    return f"{point}.json"
