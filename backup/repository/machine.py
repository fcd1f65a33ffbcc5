"""One machine of a repository: its points, its lock, and the order of writing that keeps every point whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from backup.errors import BackupError, Damaged, NoIdentity, NotFound
from backup.model import documents
from backup.model import manifest as manifests
from backup.model.manifest import NEW, UNFINISHED, DiskEntry, Manifest
from backup.repository.manifests import as_stored, exchanged_files, read_raw
from backup.runtime.threads import in_threads
from backup.storage.base import NO_FILES, TEMPORARY, Listing, Storage
from backup.storage.refusals import NoAnswer, explained, opening

_READERS = 8
"""Manifests that are read at once where each takes the round trip of a network."""
ATTEMPTS = 50
"""How often a reader starts again while a prune changes the manifests; a step of a prune takes several fsyncs."""


@dataclass(frozen=True, slots=True)
class Contents:
    """
    The manifests of a machine.

    Two contents are equal if their readable manifests are equal.  Errors are not compared.

    Attributes
    ----------
    manifests : mapping
        The readable manifests by point id.
    damaged : mapping
        The errors of the others, by file name.
    exchanged : frozenset
        The names of all files of replacements that are not complete.  These files are not leftovers.
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
            The name is not that of the machine's folder; see `Files.exists`.
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
        Read all manifests; a machine without a folder has none.

        While prune replaces a disk's data file, the disk's entry describes the file that has the name now; with `raw`,
        it is what the manifest says.

        Raises
        ------
        Failed
            The folder cannot be read.
        NoIdentity
            The files are sealed, and no identity opens them.
        """
        contents = self._read_manifests(raw=raw)
        for _ in range(ATTEMPTS):
            # A manifest that vanished was pruned after the listing; points read before it may still build on it.
            if not any(isinstance(error, NotFound) for error in contents.damaged.values()):
                break
            contents = self._read_manifests(raw=raw)
        return contents

    def _read_manifests(self, *, raw: bool) -> Contents:
        read: dict[str, Manifest] = {}
        damaged: dict[str, BackupError] = {}

        def read_one(name: str) -> None:
            try:
                read[name] = read_raw(self.files, name)
            except (NoIdentity, NoAnswer):  # no fault of this manifest: the others have it as well
                raise
            except BackupError as error:
                damaged[name] = error

        names = [manifest_name(point) for point in points_named(self.listing())]
        if self.storage.traits.remote:
            in_threads(names, read_one, _READERS, lambda: None)
        else:
            for name in names:
                read_one(name)
        readable: dict[str, Manifest] = {}
        exchanged: set[str] = set()
        for name in filter(read.__contains__, names):
            try:
                readable[read[name].point] = read[name] if raw else as_stored(self.files, read[name])
                exchanged.update(exchanged_files(read[name]))
            except NoAnswer:
                raise
            except BackupError as error:
                damaged[name] = error
        return Contents(readable, dict(sorted(damaged.items())), frozenset(exchanged))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Hold the machine's lock; a missing folder of the machine is made.

        Raises
        ------
        Locked
            Another run holds the lock.
        """
        with self.files.lock():
            yield

    def require_free(self) -> None:
        """
        Make sure that no run has the machine's lock.

        Raises
        ------
        Locked
            A run has the lock.
        """
        self.files.require_unlocked()

    def points_in_use(self) -> dict[str, str]:
        """
        Return the points that must stay as they are, and why.

        The reason is IN_USE if a reader holds a file of the point (`pybackup serve`), and UNTOLD with an explanation if
        the storage cannot tell.  A reader holds the digest files of its chain and then reads the manifests again; older
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
        Keep readers from files of these disks while the block removes or replaces the files.

        Yields None, or the reason why the files must stay (as `points_in_use`).  A reader that held the files before is
        such a reason; a reader that comes later sees from the manifests what has changed.
        """
        # The digest file is locked first, so that no reader starts a QEMU, which a lock on a data file may disturb.
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
        Remove data files and machine's files that no manifest names, and temporary files.  The caller holds the lock.

        Nothing is removed while a manifest is damaged, because that manifest may name any file.
        """
        if contents.damaged:
            return []
        named = {name for point in contents.manifests.values() for name in point.files} | contents.exchanged
        with explained(self.files.location):
            leftovers = [
                name
                for name in self.files.listing()
                if (name not in named and (manifests.is_data_name(name) or manifests.is_machine_file_name(name)))
                or name == SEQUENCE + TEMPORARY
                or (name.endswith(TEMPORARY) and manifests.is_point_id(name.removesuffix(".json" + TEMPORARY)))
            ]
            for name in leftovers:
                self.files.remove(name)
        return leftovers

    def remove_unnamed(self) -> None:
        """
        Remove files of points without a manifest, and unfinished files, by names alone.  The caller holds the lock.

        A key that may not delete leaves the files where they are; the copy of such a point overwrites them.
        """
        listing = self.listing()
        present = set(points_named(listing))
        for name in listing:
            point = _point_of(name)
            if point is None or (point in present and not name.endswith((TEMPORARY, UNFINISHED))):
                continue
            with explained(self.files.location), suppress(PermissionError):
                self.files.remove(name)

    def next_sequence(self, contents: Contents) -> int:
        """
        Return one more than the highest sequence; damaged manifests may have had higher ones than can be read.

        Raises
        ------
        Damaged
            No higher sequence is possible.  Backups alone never reach the highest: a manifest was forged.
        """
        highest = max((point.sequence for point in contents.manifests.values()), default=0)
        highest = max(highest, self._highest_removed())
        following = highest + 1 + len(contents.damaged)
        if following > documents.MAX_NUMBER:
            raise Damaged(
                f"machine {self.name} has a point of sequence {highest}, after which none can follow",
                hint="back the machine up under another name (--machine); pybackup has not written that manifest",
            )
        return following

    def note_removed(self, sequence: int) -> None:
        """
        Store the sequence of the newest point, which is removed next, so that no later point gets it again.

        A copy of the repository may still hold the removed point, and a later point must count as newer there.
        """
        with explained(self.files.location):
            self.files.publish(SEQUENCE, f"{sequence}\n".encode())

    def _highest_removed(self) -> int:
        """Return the sequence that `note_removed` stored, or 0."""
        try:
            match = re.fullmatch(rb"[1-9][0-9]{0,19}\n", self.files.read(SEQUENCE, 32))
        except OSError:
            return 0
        sequence = int(match[0]) if match else 0
        return sequence if sequence <= documents.MAX_NUMBER else 0

    def publish(self, manifest: Manifest, content: bytes | None = None) -> str:
        """
        Make a point exist; its other files are already written and durable.

        `content` are the bytes of the manifest if it is a copy, which may have fields that this program does not know.

        Returns
        -------
        str
            The path or URL of the manifest, for people.

        Raises
        ------
        BackupError
            Nothing was published: the disk is full, for example.
        """
        name = manifest_name(manifest.point)
        content = manifests.encode(manifest) if content is None else content
        # A manifest that no reader accepts (a sequence beyond the largest) must not pass for a backup.
        manifests.decode(content, name)
        try:
            with explained(self.files.location):
                self.files.barrier()
                self.files.publish(name, content)
                self.storage.files().barrier()
        except BaseException:
            # The manifest may have its name already; the caller removes the data files, so the manifest goes first.
            self.withdraw(manifest.point)
            raise
        return self.files.path(name)

    def rewrite(self, manifest: Manifest) -> None:
        """
        Replace a point's manifest, at once and durable.  The caller holds the lock.

        Raises
        ------
        Failed
            The manifest cannot be written; the point has either the previous or the new one.
        """
        name = manifest_name(manifest.point)
        content = manifests.encode(manifest)
        manifests.decode(content, name)
        with explained(self.files.location):
            self.files.publish(name, content, replace=True)

    def remove_point(self, manifest: Manifest) -> None:
        """
        Remove a point that no other point builds on: first its manifest, so that the point is gone, then its files.

        Raises
        ------
        Failed
            A file could not be removed; the next run removes files that no manifest names.
        """
        with explained(self.files.location):
            self.files.remove(manifest_name(manifest.point))
            self.files.barrier()
            for name in manifest.files:
                self.files.discard(name)
            self.files.barrier()

    def withdraw(self, point: str) -> None:
        """Remove the manifest of a point whose run failed, if it exists; the data files are removed next."""
        with suppress(OSError):
            self.files.remove(manifest_name(point))
            self.files.barrier()


def _point_of(name: str) -> str | None:
    """Return the point that a file belongs to, finished or not; None for a manifest and for other names."""
    if manifests.is_machine_file_name(name):
        return name.partition(".")[0]
    if manifests.is_data_name(name):
        return manifests.point_of(name.removesuffix(UNFINISHED).removesuffix(NEW))
    point = name.removesuffix(".json" + TEMPORARY)
    return point if point != name and manifests.is_point_id(point) else None


def points_named(listing: Listing) -> list[str]:
    """Return the ids of the points whose manifests have a name in a listing, oldest first."""
    ids = (name.removesuffix(".json") for name in listing if name.endswith(".json"))
    return sorted(point for point in ids if manifests.is_point_id(point))


SEQUENCE = "sequence"
"""The file that stores the highest sequence of a machine whose newest point was removed."""


def manifest_name(point: str) -> str:
    """Return the name of a point's manifest."""
    return f"{point}.json"
