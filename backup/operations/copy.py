"""
Copy the points of a machine that another repository lacks, and check every block against its digest.

Each point is published as a whole, in the order of the sequence numbers, so that the second place can be restored from
at every instant.  A copy has the id of the source, and the same manifests byte for byte.  Nothing in the
second place is overwritten.  Only `make_second` (`pybackup init --copy-of`) creates a second place: a disk that is not
mounted must not become one.

In a folder, the manifests of the second place are read and compared with those of the source.  In a place that only
receives copies (a bucket, or a sealed place), a point is there if its manifest's name is there: ids of points are
random, the manifests of a sealed place cannot be read without its identity, and in a bucket each would cost a request.
There a copy with nothing new takes one listing for each machine, and no lock.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass

from backup.age.keys import Recipient
from backup.errors import BackupError, Damaged, Failed, Interrupted, NotFound, UsageError
from backup.model import chain as chains
from backup.model.manifest import DataFile, MachineFile, Manifest, encode
from backup.operations.verify import Problem
from backup.repository import checked_file, machine_files
from backup.repository.checked_file import BlockCache, CheckedFile
from backup.repository.data_file_writer import CopiedFile, write_digests
from backup.repository.machine import Contents, Machine, manifest_name, points_named
from backup.repository.manifests import as_stored, read_manifest_whole
from backup.repository.opened_chain import KeptChanging, open_unchanged
from backup.repository.repository import Repository
from backup.runtime.pace import Pace
from backup.runtime.threads import Turns, in_threads
from backup.storage.base import Files, Listing, Storage
from backup.storage.refusals import explained
from backup.units import counted, show_size

_MARGIN = 4 << 20
"""Bytes that points need besides data files: for digest files, manifests and the file system's own data."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """Ids of copied points and of points that the second place already had, the bytes copied, and the problems."""

    copied: tuple[str, ...]
    present: tuple[str, ...]
    bytes: int
    problems: tuple[Problem, ...]


def make_second(place: Storage, source: Repository, recipients: Sequence[Recipient] = ()) -> Repository:
    """
    Create an empty repository with the id of the source, as a target of copies; with recipients, it is sealed to them.

    Raises
    ------
    UsageError, Failed
        See `Repository.create`.
    """
    return Repository.create(place, source.id, recipients)


def open_second(place: Storage, source: Repository, recipients: Collection[Recipient] = ()) -> Repository:
    """
    Open the repository to copy to.

    Parameters
    ----------
    recipients : collection of Recipient
        The keys to which the configuration says that the place is sealed; empty if it says nothing.

    Raises
    ------
    UsageError
        It is the source itself, lies in a repository, is a repository with another id, or is sealed to other keys.
    NotFound
        There is no repository; only `make_second` creates it.
    """
    if source.storage.is_same_place(place):
        raise UsageError(f"{place.location} is the repository itself", hint="name another place")
    place.require_outside()
    make = f"`pybackup init --copy-of {source.location} {place.location}`"
    try:
        second = Repository.open(place)
    except NotFound as error:
        if place.traits.remote:
            hint = f"{make} creates a second place in an existing bucket"
        else:
            hint = f"mount its disk if that is missing; {make} creates a second place in a new or empty folder"
        raise NotFound(error.message, hint=hint) from None
    if second.id != source.id:
        raise UsageError(
            f"{place.location} is another repository (its id is {second.id[:8]}..., not {source.id[:8]}...)",
            hint="name a copy of this repository; `pybackup init --copy-of` creates a new one",
        )
    if recipients and set(recipients) != set(second.recipients):
        sealed_to = " and ".join(map(str, second.recipients)) or "no key"
        raise UsageError(
            f"{place.location} is sealed to {sealed_to}, and the configuration names other recipients",
            hint="correct `recipients` in the configuration; a place keeps its keys: other keys need a new place",
        )
    return second


def missing(source: Mapping[str, Manifest], second: Mapping[str, Manifest], wanted: Iterable[str]) -> list[Manifest]:
    """
    Return the points that must be copied for the wanted ones, in the order of their sequence numbers.  Pure.

    Raises
    ------
    Damaged
        The second place has a different point of the same id.
    Failed
        The second place has another point with the sequence number of a missing one.
    """
    sequences = {manifest.sequence: manifest.point for manifest in second.values()}
    needed: dict[str, Manifest] = {}
    left = [point for point in wanted if point in source]
    while left:
        manifest = source[left.pop()]
        existing = second.get(manifest.point)
        if existing is not None:
            _require_same(manifest, existing)
        elif manifest.sequence in sequences:
            raise Failed(
                f"point {manifest.point} cannot be copied: point {sequences[manifest.sequence]} of the second place "
                "has its sequence number",
                hint="backups were also made to the second place itself; copy to a new folder",
            )
        elif manifest.point not in needed:
            needed[manifest.point] = manifest
            parents = [disk.parent.point for disk in manifest.disks if disk.parent is not None]
            left += [point for point in parents if point in source]
    return sorted(needed.values(), key=lambda manifest: manifest.sequence)


def _require_same(ours: Manifest, theirs: Manifest) -> None:
    """Refuse a different point of the same id.  A prune changes how a point is stored, not what is compared here."""

    def facts(manifest: Manifest) -> tuple[int, dict[str, str]]:
        return manifest.sequence, {disk.name: disk.identity for disk in manifest.disks}

    if facts(ours) != facts(theirs):
        raise Damaged(
            f"point {ours.point} differs in the second place: its sequence number or its disks' identities do",
            hint="nothing there was changed; copy to a new folder",
        )


def replicate(
    source: Machine,
    second: Machine,
    point: str | None,
    *,
    workers: int,
    begin: Callable[[int], None],
    advance: Callable[[int], None],
    limit: int | None = None,
) -> Replicated:
    """
    Copy a machine's points, or one point and those it builds on, to a machine of another repository, which is locked.

    A point that cannot be read becomes a problem, and so do the points that build on it; the others are copied all the
    same.  A point that a prune removes meanwhile is no problem.

    Parameters
    ----------
    begin, advance : callable
        Called with the number of bytes to copy, and then with the number of bytes copied so far.
    limit : int or None
        The greatest number of bytes that are copied in a second.

    Raises
    ------
    BackupError
        The second place is locked, damaged, has too little space, or cannot be written.
    """
    if not second.storage.traits.rewritable:
        wanted = points_named(source.listing()) if point is None else [point]
        if set(wanted) <= set(points_named(second.listing())):
            return Replicated((), tuple(sorted(wanted)), 0, ())
    with second.lock():
        existing = _existing(source, second)
        planned = _planned(source, second, existing, point)
        _remove_leftovers(second, existing)
        begin(_stored(planned.todo))
        run = _Run(source, second, dict(existing.manifests), workers=workers, advance=advance, pace=Pace(limit))
        problems = list(planned.problems)
        for manifest in planned.todo:
            try:
                run.copy(manifest.point)
            except _Unreadable as error:
                if manifest.point == point or source.has_point(manifest.point):
                    problems.append(Problem(source.name, manifest.point, None, error.reason))
            except Interrupted as stopped:
                stopped.hint = "the points that were copied are complete and stay; run the command again to continue"
                raise
        return Replicated(tuple(run.copied), planned.present, run.done, tuple(problems))


def rehearse(source: Machine, second: Machine, point: str | None) -> Replicated:
    """
    Return what `replicate` would copy if everything can be read; nothing is changed or locked.

    Raises
    ------
    BackupError
        See `replicate`, for what can be known in advance.
    """
    planned = _planned(source, second, _existing(source, second), point)
    copied = tuple(manifest.point for manifest in planned.todo)
    return Replicated(copied, planned.present, _stored(planned.todo), planned.problems)


@dataclass(frozen=True, slots=True)
class _Planned:
    """The points to copy, in order; ids of points that the second place already has; unreadable manifests."""

    todo: Sequence[Manifest]
    present: tuple[str, ...]
    problems: tuple[Problem, ...]


def _existing(source: Machine, second: Machine) -> Contents:
    """Return the points of the second place; see the module's docstring."""
    if second.storage.traits.rewritable:
        return second.contents()
    return _by_names(source, second.listing())


def _by_names(source: Machine, listing: Listing) -> Contents:
    """
    Return the points whose manifests a listing of the second place names, with the manifests of the source.

    Points that the source does not have any more are left out: no point that is copied builds on them.
    """
    present = points_named(listing)
    manifests = source.contents().manifests
    return Contents({point: manifests[point] for point in present if point in manifests}, {})


def _remove_leftovers(second: Machine, existing: Contents) -> None:
    """Remove what killed runs left; the caller holds the lock of the second place."""
    if second.storage.traits.rewritable:
        second.remove_leftovers(existing)
    else:
        second.remove_unnamed()


def _planned(source: Machine, second: Machine, existing: Contents, point: str | None) -> _Planned:
    for error in existing.damaged.values():
        raise error  # a manifest that cannot be read may name any file there, and any point
    contents = source.contents()
    wanted = list(contents.manifests) if point is None else [point]
    todo = missing(contents.manifests, existing.manifests, wanted)
    _require_room(second, todo)
    unreadable = [Problem(source.name, None, None, error) for error in contents.damaged.values() if point is None]
    return _Planned(todo, tuple(sorted(set(wanted) & set(existing.manifests))), tuple(unreadable))


def _stored(points: Iterable[Manifest]) -> int:
    return sum(disk.data.size for manifest in points for disk in manifest.disks)


def _require_room(second: Machine, points: Collection[Manifest]) -> None:
    """Refuse a copy that does not fit, before anything is written."""
    with explained(second.files.location):
        free = second.files.free_bytes()
    small = sum(file.size for manifest in points for file in manifest.machine_files)
    needed = _stored(points) + small + _MARGIN
    if points and free is not None and needed > free:
        raise Failed(
            f"a copy of {counted(len(points), 'point')} needs {needed} bytes ({show_size(needed)}), and {free} "
            f"({show_size(free)}) are free at {second.files.location}",
            hint="add space there, or copy less: MACHINE/POINT copies one point and those it builds on",
        )


def _read(files: Files, point: str) -> tuple[Manifest, bytes]:
    """Read a manifest and its bytes; while prune replaces a data file, return those that match the present file."""
    raw, content = read_manifest_whole(files, manifest_name(point))
    stored = as_stored(files, raw)
    return stored, content if stored == raw else encode(stored)


class _Unreadable(Exception):
    """A point of the source cannot be copied; the others still may be."""

    def __init__(self, reason: BackupError) -> None:
        super().__init__(reason.message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class _Opened:
    """The files of a point: its data files, and the content of the machine's."""

    data: Sequence[tuple[DataFile, CheckedFile]]
    machine: Sequence[tuple[MachineFile, bytes]]


class _Run:
    """The copy of one machine, point by point."""

    def __init__(
        self,
        source: Machine,
        second: Machine,
        existing: dict[str, Manifest],
        *,
        workers: int,
        advance: Callable[[int], None],
        pace: Pace,
    ) -> None:
        self._source, self._second, self._existing = source, second, existing
        self._workers, self._advance, self._pace = workers, advance, pace
        self.copied: list[str] = []
        self.done = 0

    def copy(self, point: str) -> None:
        """Copy one point as a whole, or leave nothing of it."""
        with ExitStack() as stack:
            manifest, content, opened = self._open(stack, point)
            self._require_parents(manifest)
            written: list[str] = []
            try:
                for data, file in opened.data:
                    self._copy_file(data, file, written)
                for described, small in opened.machine:
                    written.append(described.file)
                    with explained(self._second.files.location):
                        self._second.files.write(described.file, small)
                self._second.publish(manifest, content)
            except BaseException:
                # If the signal came after the point was published, the point is complete, and stays.
                if not self._second.has_point(point):
                    for name in written:
                        with suppress(OSError):
                            self._second.files.discard(name)
                raise
        self._existing[point] = manifest
        self.copied.append(point)

    def _open(self, stack: ExitStack, point: str) -> tuple[Manifest, bytes, _Opened]:
        """Open all files of a point; a prune may replace them after the manifest was read."""
        opened = open_unchanged(
            f"point {point}", lambda: _read(self._source.files, point), lambda read: self._opened(read[0])
        )
        try:
            (manifest, content), files = stack.enter_context(opened)
        except (Damaged, NotFound, KeptChanging) as error:
            raise _Unreadable(error) from None
        return manifest, content, files

    @contextmanager
    def _opened(self, manifest: Manifest) -> Iterator[_Opened]:
        with ExitStack() as stack:
            data = [(disk.data, stack.enter_context(self._opened_file(disk.data))) for disk in manifest.disks]
            yield _Opened(
                data, [(file, machine_files.load(self._source.files, file)) for file in manifest.machine_files]
            )

    def _opened_file(self, data: DataFile) -> closing[CheckedFile]:
        return closing(checked_file.open_checked(self._source.files, data, BlockCache(1), once=True))

    def _require_parents(self, manifest: Manifest) -> None:
        """Refuse to publish a point whose chain is not complete in the second place."""
        for disk in manifest.disks:
            if disk.parent is not None and disk.parent.point not in self._existing:
                raise _Unreadable(
                    NotFound(
                        f"it builds on point {disk.parent.point}, which could not be copied either",
                        hint="see what is wrong with that point: `pybackup verify`",
                    )
                )
            try:
                chains.build({**self._existing, manifest.point: manifest}, manifest.point, disk.name)
            except BackupError as error:
                raise _Unreadable(error) from None

    def _copy_file(self, data: DataFile, source: CheckedFile, written: list[str]) -> None:
        files = self._second.files
        stop = threading.Event()
        turns = Turns(stop)
        written.append(data.file)
        with closing(CopiedFile(files, data.file, data.size)) as target:

            def move(number: int) -> None:
                try:
                    content = source.check_block(number)
                except Damaged as error:
                    raise _Unreadable(error) from None
                turns.take(number, functools.partial(self._append, target, content))
                self._pace.keep(len(content), stop)

            # A bucket takes the parts of an object in their order.
            in_threads(range(source.blocks), move, self._workers, lambda: self._advance(self.done), stop)
            target.finish()
        written.append(data.digests)
        write_digests(files, data.digests, source.all_listed)

    def _append(self, target: CopiedFile, content: bytes | memoryview) -> None:
        """Write the next block; only the thread whose turn it is does so."""
        target.write(content)
        self.done += len(content)
