"""
Copy: a machine's points to another repository, only what is missing there, every block held against its digest.

Points are published whole, in the order of their sequence, so that at every instant the second place holds chains that
restore.  A copy has the source's id: its manifests are the same bytes.  What is there already is never overwritten.
Only `make_second` (`pybackup init --copy-of`) makes a second place: a disk that is not mounted must not become one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass

from backup.errors import BackupError, Damaged, Failed, Interrupted, NotFound, UsageError
from backup.model import chain as chains
from backup.model.manifest import DataFile, Manifest, encode
from backup.operations.verify import Problem
from backup.repository import checked_file
from backup.repository.checked_file import BlockCache, CheckedFile
from backup.repository.data_file_writer import PartFile, write_digests
from backup.repository.machine import Contents, Machine, manifest_name
from backup.repository.manifests import as_stored, read_manifest_whole
from backup.repository.opened_chain import KeptChanging, open_unchanged
from backup.repository.repository import Repository
from backup.runtime.pace import Pace
from backup.runtime.threads import in_threads
from backup.storage.base import Files, Storage
from backup.storage.refusals import explained
from backup.units import counted, show_size

_MARGIN = 4 << 20
"""Bytes that the points need besides their data files: digest files, manifests, what the file system keeps itself."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """Ids of the points that were copied and of those that were there; bytes copied; what could not be."""

    copied: tuple[str, ...]
    present: tuple[str, ...]
    bytes: int
    problems: tuple[Problem, ...]


def make_second(place: Storage, source: Repository) -> Repository:
    """
    Make an empty repository with the source's id, to copy to.

    Raises
    ------
    UsageError, Failed
        As `Repository.create`.
    """
    return Repository.create(place, source.identity)


def open_second(place: Storage, source: Repository) -> Repository:
    """
    Open the repository to copy to.

    Raises
    ------
    UsageError
        It is the source itself, another repository, or lies in one.
    NotFound
        There is none: `make_second` makes it, and nothing else does.
    """
    if place.is_same_place(source.storage):
        raise UsageError(f"{place.location} is the repository itself", hint="name another folder")
    place.require_outside()
    make = f"`pybackup init --copy-of {source.location} {place.location}`"
    try:
        second = Repository.open(place)
    except NotFound as error:
        hint = f"mount its disk if that is missing; {make} makes a second place in a new or empty folder"
        raise NotFound(error.message, hint=hint) from None
    if second.identity != source.identity:
        raise UsageError(
            f"{place.location} is another repository "
            f"(its id is {second.identity[:8]}..., not {source.identity[:8]}...)",
            hint="copy to an earlier copy of this repository; `pybackup init --copy-of` makes a new one",
        )
    return second


def missing(source: Mapping[str, Manifest], second: Mapping[str, Manifest], wanted: Iterable[str]) -> list[Manifest]:
    """
    The points that the second place lacks to hold those that are wanted, in the order of their sequence.  Pure.

    Raises
    ------
    Damaged
        A point is there, and is another one.
    Failed
        Another point there has the sequence of one that is missing.
    """
    sequences = {manifest.sequence: manifest.point for manifest in second.values()}
    found: dict[str, Manifest] = {}
    left = [point for point in wanted if point in source]
    while left:
        manifest = source[left.pop()]
        held = second.get(manifest.point)
        if held is not None:
            _require_same(manifest, held)
        elif manifest.sequence in sequences:
            raise Failed(
                f"point {manifest.point} cannot be copied: {sequences[manifest.sequence]} has its sequence there",
                hint="both repositories were backed up to; copy to a new folder instead",
            )
        elif manifest.point not in found:
            found[manifest.point] = manifest
            parents = [disk.parent.point for disk in manifest.disks if disk.parent is not None]
            left += [point for point in parents if point in source]
    return sorted(found.values(), key=lambda manifest: manifest.sequence)


def _require_same(ours: Manifest, theirs: Manifest) -> None:
    """Consolidation changes how a point is stored, and neither its sequence nor what its disks are."""

    def facts(manifest: Manifest) -> tuple[int, dict[str, str]]:
        return manifest.sequence, {disk.name: disk.identity for disk in manifest.disks}

    if facts(ours) != facts(theirs):
        raise Damaged(
            f"point {ours.point} is another one in the second place: its sequence or its disks' identities differ",
            hint="nothing there was changed; copy to a new folder instead",
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
    Copy a machine's points, or one and what it builds on, to another repository's machine, under its lock.

    A point that cannot be read, and those that build on it, become problems; the others are copied all the same.  One
    that a prune removed meanwhile is none any more.

    Parameters
    ----------
    begin, advance : callable
        Told how many bytes there are to copy, and then how many are.
    limit : int or None
        Bytes a second that are copied at the most.

    Raises
    ------
    BackupError
        The second place is locked, damaged, has too little space, or cannot be written.
    """
    with second.lock():
        held = second.contents()
        planned = _planned(source, second, held, point)
        second.remove_leftovers(held)
        begin(_stored(planned.todo))
        run = _Run(source, second, dict(held.manifests), workers=workers, advance=advance, pace=Pace(limit))
        problems = list(planned.problems)
        for manifest in planned.todo:
            try:
                run.copy(manifest.point)
            except _Unreadable as error:
                if manifest.point == point or source.has_point(manifest.point):
                    problems.append(Problem(source.name, manifest.point, None, error.reason))
            except Interrupted as stopped:
                stopped.hint = "the points that were copied are whole and stay; run the command again to go on"
                raise
        return Replicated(tuple(run.copied), planned.present, run.done, tuple(problems))


def rehearse(source: Machine, second: Machine, point: str | None) -> Replicated:
    """
    What `replicate` would copy, and how many bytes, if all of it can be read; nothing is changed, and nothing locked.

    Raises
    ------
    BackupError
        As `replicate`, where that can be seen now.
    """
    planned = _planned(source, second, second.contents(), point)
    copied = tuple(manifest.point for manifest in planned.todo)
    return Replicated(copied, planned.present, _stored(planned.todo), planned.problems)


@dataclass(frozen=True, slots=True)
class _Planned:
    """Points to copy, in their order; ids of those that are there; manifests that cannot be read."""

    todo: Sequence[Manifest]
    present: tuple[str, ...]
    problems: tuple[Problem, ...]


def _planned(source: Machine, second: Machine, held: Contents, point: str | None) -> _Planned:
    for error in held.damaged.values():
        raise error  # it may name any file there, and any point
    contents = source.contents()
    wanted = list(contents.manifests) if point is None else [point]
    todo = missing(contents.manifests, held.manifests, wanted)
    _require_room(second, todo)
    unreadable = [Problem(source.name, None, None, error) for error in contents.damaged.values() if point is None]
    return _Planned(todo, tuple(sorted(set(wanted) & set(held.manifests))), tuple(unreadable))


def _stored(points: Iterable[Manifest]) -> int:
    return sum(disk.data.size for manifest in points for disk in manifest.disks)


def _require_room(second: Machine, points: Collection[Manifest]) -> None:
    """Refuse to begin what cannot end, before anything is written."""
    with explained(second.files.location):
        free = second.files.free_bytes()
    needed = _stored(points) + _MARGIN
    if points and free is not None and needed > free:
        raise Failed(
            f"to copy {counted(len(points), 'point')} takes {needed} bytes ({show_size(needed)}), and {free} "
            f"({show_size(free)}) are free at {second.files.location}",
            hint="free or add space there, or copy less: MACHINE/POINT is one point and what it builds on",
        )


def _read(files: Files, point: str) -> tuple[Manifest, bytes]:
    """A manifest and its bytes; while prune exchanges a data file, as of the file that has the name now."""
    raw, content = read_manifest_whole(files, manifest_name(point))
    stored = as_stored(files, raw)
    return stored, content if stored == raw else encode(stored)


class _Unreadable(Exception):
    """A point of the source cannot be copied; others may be."""

    def __init__(self, reason: BackupError) -> None:
        super().__init__(reason.message)
        self.reason = reason


class _Run:
    """One copy of a machine: what is held in the second place grows with each point."""

    def __init__(
        self,
        source: Machine,
        second: Machine,
        held: dict[str, Manifest],
        *,
        workers: int,
        advance: Callable[[int], None],
        pace: Pace,
    ) -> None:
        self._source, self._second, self._held = source, second, held
        self._workers, self._advance, self._pace = workers, advance, pace
        self._lock = threading.Lock()
        self.copied: list[str] = []
        self.done = 0

    def copy(self, point: str) -> None:
        """Copy one point whole, or nothing of it."""
        with ExitStack() as stack:
            manifest, content, files = self._open(stack, point)
            self._require_parents(manifest)
            written: list[str] = []
            try:
                for data, file in files:
                    self._copy_file(data, file, written)
                self._second.publish(manifest, content)
            except BaseException:
                # A signal may come when the point is published already: then it is whole, and stays.
                if not self._second.has_point(point):
                    for name in written:
                        with suppress(OSError):
                            self._second.files.discard(name)
                raise
        self._held[point] = manifest
        self.copied.append(point)

    def _open(self, stack: ExitStack, point: str) -> tuple[Manifest, bytes, list[tuple[DataFile, CheckedFile]]]:
        """Open all files of a point; a consolidation may swap them between reading the manifest and opening them."""
        opened = open_unchanged(
            f"point {point}", lambda: _read(self._source.files, point), lambda read: self._opened(read[0])
        )
        try:
            (manifest, content), files = stack.enter_context(opened)
        except (Damaged, NotFound, KeptChanging) as error:
            raise _Unreadable(error) from None
        return manifest, content, files

    @contextmanager
    def _opened(self, manifest: Manifest) -> Iterator[list[tuple[DataFile, CheckedFile]]]:
        with ExitStack() as stack:
            yield [(disk.data, stack.enter_context(self._opened_file(disk.data))) for disk in manifest.disks]

    def _opened_file(self, data: DataFile) -> closing[CheckedFile]:
        return closing(checked_file.opened(self._source.files, data, BlockCache(1), once=True))

    def _require_parents(self, manifest: Manifest) -> None:
        """A point must not come into being where its chain is not."""
        for disk in manifest.disks:
            if disk.parent is not None and disk.parent.point not in self._held:
                raise _Unreadable(
                    NotFound(
                        f"it builds on point {disk.parent.point}, which could not be copied either",
                        hint="see what is wrong with that point: `pybackup verify`",
                    )
                )
            try:
                chains.build({**self._held, manifest.point: manifest}, manifest.point, disk.name)
            except BackupError as error:
                raise _Unreadable(error) from None

    def _copy_file(self, data: DataFile, source: CheckedFile, written: list[str]) -> None:
        files = self._second.files
        stop = threading.Event()
        written.append(data.file)
        with closing(PartFile(files, data.file)) as target:

            def move(number: int) -> None:
                try:
                    content = source.check_block(number)
                except Damaged as error:
                    raise _Unreadable(error) from None
                target.put(number, content, source.listed(number))
                with self._lock:
                    self.done += len(content)
                self._pace.keep(len(content), stop)

            in_threads(range(1, source.blocks), move, self._workers, lambda: self._advance(self.done), stop)
            move(0)  # last: a file without its head is nothing
            listed = target.finish()
        written.append(data.digests)
        write_digests(files, data.digests, listed)
