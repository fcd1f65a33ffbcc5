"""
Re-read what the repository holds, and find every changed byte.

Checks of each data file: the digest file against the manifest, every block against its digest, the header against the
manifest and the parent's header, the tables and all refcounts; with `deep`, every cluster is decompressed as well.  The
chain of each point is checked down to the full.  The machine's small files of each point are read as well, always.

The results are saved (`repository.verified`), so that a later run can skip what was read not long ago.

The check of a file's structure needs numpy, which takes long to import: the thread that checks imports it while the
others hash.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from backup.engine.checker import Check, CheckRun
from backup.errors import BackupError, Damaged, DamagedBlock, Failed, NotFound, merged_exit_code
from backup.model import chain as chains
from backup.model.chain import Chain
from backup.model.digests import block_count
from backup.model.manifest import DataFile, DiskEntry, Manifest, timestamp
from backup.repository import machine_files
from backup.repository import verified as memories
from backup.repository.machine import Contents, Machine
from backup.repository.opened_chain import examine
from backup.repository.verified import Memory, Record
from backup.runtime.pace import Pace
from backup.storage.base import Files, Listing
from backup.storage.refusals import NoAnswer, require_answer

_CLOCKS = timedelta(minutes=5)
"""The greatest normal difference between the clocks of two hosts."""
_FROM_COPY = "bring the file back from a copy of the repository"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is damaged or missing: where, and what is wrong."""

    machine: str
    point: str | None
    disk: str | None
    error: BackupError


@dataclass(frozen=True, slots=True)
class Choice:
    """
    Which data files are read, and how much of them.

    Attributes
    ----------
    since : datetime or None
        Files that were found intact at this time or later are skipped; None skips no file.
    share : float
        The probability with which each block of the other files is read; 1 reads all.
    """

    since: datetime | None = None
    share: float = 1.0


ALL = Choice()


@dataclass(frozen=True, slots=True)
class Verified:
    """
    What was verified, and what is wrong.

    Attributes
    ----------
    points, files, bytes : int
        Points that were verified, data files that were read as a whole or in part, and bytes that were read.
    skipped : int
        Data files that were found intact not long ago; only their existence and size were checked.
    sampled : int
        Those of `files` that were read only in part.
    problems : tuple
        What is wrong.
    forgotten : str or None
        Why the results could not be saved; None if they were.
    """

    points: int
    files: int
    bytes: int
    skipped: int
    sampled: int
    problems: tuple[Problem, ...]
    forgotten: str | None


def unverified(machine: Machine, error: BackupError) -> Verified:
    """Return the result for a machine whose folder cannot be read, or is not a machine's."""
    return Verified(0, 0, 0, 0, 0, (Problem(machine.name, None, None, error),), None)


def exit_code(problems: Sequence[Problem]) -> int:
    """Merge the codes of the problems: damaged (12) before missing (10) before all others."""
    worst = (Damaged.exit_code, NotFound.exit_code)
    return merged_exit_code((problem.error.exit_code for problem in problems), worst=worst)


def stored_bytes(machine: Machine, points: Sequence[str] | None, choice: Choice = ALL, *, deep: bool = False) -> int:
    """Estimate how many bytes will be read, of all data files or of those of some points and their chains."""
    contents = machine.contents()
    manifests = contents.manifests
    listing = machine.listing()
    wanted = [manifests[point] for point in points if point in manifests] if points is not None else manifests.values()
    memory = {} if choice.since is None else memories.recall(machine)
    sizes = {}
    for manifest, disk, result in _chains(contents, wanted):
        links = (
            [(manifest.point, disk)]
            if isinstance(result, BackupError)
            else [(link.point, link.entry) for link in result.links]
        )
        due = [link for link in links if is_due(memories.record_of(memory, link[1].data), choice, deep=deep)]
        there = [link for link in due if glance(machine.files, listing, link[1].data) is None]
        sizes.update({(point, entry.name): entry.data.size for point, entry in there})
    return round(sum(sizes.values()) * choice.share)


def is_due(record: Record | None, choice: Choice, *, deep: bool) -> bool:
    """Tell whether a file must be read, given its last result; a result from the future comes from a wrong clock."""
    sound = None if record is None else record.sound_since(deep)
    if choice.since is None or sound is None:
        return True
    return not choice.since <= sound <= datetime.now(UTC) + _CLOCKS


def draw(blocks: Sequence[int], share: float, chance: Callable[[], float]) -> list[list[int] | None]:
    """
    Choose the blocks of each file that are read, each with the probability `share`; at least one block in all.

    None stands for all blocks of a file.  `chance` returns numbers from 0 to below 1.  The probability to find at least
    one of n damaged blocks is 1 - (1 - share) ** n.
    """
    drawn = [[number for number in range(count) if chance() < share] for count in blocks]
    if blocks and not any(drawn):
        file = int(chance() * len(blocks))
        drawn[file] = [int(chance() * blocks[file])]
    return [None if len(some) == count else some for some, count in zip(drawn, blocks, strict=True)]


def glance(files: Files, listing: Listing, data: DataFile) -> BackupError | None:
    """Return what is wrong with a data file, judged by existence and size, or None."""
    try:
        size = listing.stat(data.file).size
        listing.stat(data.digests)
    except (FileNotFoundError, NotADirectoryError) as error:
        return NotFound(f"{error.filename} is missing", hint=_FROM_COPY)
    except OSError as error:
        require_answer(error)
        return Failed(
            f"{error.filename} cannot be examined: {error.strerror}",
            hint="run the command as the owner of the repository",
        )
    if size != data.size:
        path = files.path(data.file)
        return Damaged(f"{path} has {size} bytes, and its manifest says {data.size}", hint=_FROM_COPY)
    return None


def verify_machine(
    machine: Machine,
    *,
    deep: bool,
    workers: int,
    progress: Callable[[int], None],
    points: Sequence[str] | None = None,
    choice: Choice = ALL,
    limit: int | None = None,
) -> Verified:
    """
    Verify a machine's points and their chains, or only some points, and save the results.

    `progress` is called in this thread, with the bytes that were read so far.  At most `limit` bytes a second are read.
    """
    run = functools.partial(_verify, machine, deep=deep, workers=workers, progress=progress, pace=Pace(limit))
    runs: list[Verified] = []

    def check(contents: Contents) -> tuple[Problem, ...]:
        """Verify all points; after a prune changed something, only those with a problem, without a sample."""
        if not runs:
            runs.append(run(contents, points=points, choice=choice))
        else:
            doubtful = {problem.point for problem in runs[-1].problems}
            again = [point for point in contents.manifests if point in doubtful]
            runs.append(run(contents, points=again, choice=replace(choice, share=1.0)))
        return (*_unreadable(machine, contents, points), *runs[-1].problems)

    problems = examine(machine, check, doubtful=bool)
    return replace(runs[0], problems=problems)


def _unreadable(machine: Machine, contents: Contents, points: Sequence[str] | None) -> Iterator[Problem]:
    """Yield manifests that cannot be read, and requested points without a manifest."""
    for name, error in contents.damaged.items():
        if points is None or name.removesuffix(".json") in points:
            yield Problem(machine.name, None, None, error)
    for point in points or ():
        if point not in contents.manifests and f"{point}.json" not in contents.damaged:
            vanished = NotFound("its manifest was removed during the verify", hint="see: `pybackup list`")
            yield Problem(machine.name, point, None, vanished)


def _verify(
    machine: Machine,
    contents: Contents,
    *,
    deep: bool,
    workers: int,
    progress: Callable[[int], None],
    pace: Pace,
    points: Sequence[str] | None,
    choice: Choice,
) -> Verified:
    """Verify points that have a manifest, and their chains, once, and save the results."""
    began = datetime.now(UTC)
    problems: list[Problem] = []
    wanted = [contents.manifests[point] for point in sorted(contents.manifests) if points is None or point in points]
    # Keyed by entry and not by file name: if two entries name one file, both are checked.
    files: dict[tuple[str, str], tuple[Manifest, DiskEntry, DiskEntry | None]] = {}
    for manifest, disk, result in _chains(contents, wanted):
        if isinstance(result, BackupError):
            problems.append(Problem(machine.name, manifest.point, disk.name, result))
            files.setdefault((manifest.point, disk.name), (manifest, disk, None))
        else:
            files.update(_chain_files(contents.manifests, result))
    problems += _damaged_machine_files(machine, wanted)
    memory = memories.recall(machine)
    checks = [Check(manifest.point, disk, parent) for manifest, disk, parent in files.values()]
    for check in checks:
        check.skipped = not is_due(memories.record_of(memory, check.entry.data), choice, deep=deep)
    due = [check for check in checks if not check.skipped]
    listing = machine.listing()
    for check in checks:
        unread = check.skipped or choice.share < 1
        if unread and (problem := glance(machine.files, listing, check.entry.data)) is not None:
            check.wrong[0] = problem
            check.blocks = []
    # A manifest may claim any size; blocks are chosen only of files that have that size.
    _sample([check for check in due if not check.wrong], choice.share)
    run = CheckRun(machine.files, due, deep=deep, progress=progress, pace=pace)
    try:
        run.run(workers)
    finally:  # also if the run was interrupted, so that the next run need not begin again
        records = _records(checks, memory, timestamp(began), deep=deep)
        forgotten = memories.remember(machine, records, _present(contents)) if records else None
    problems += [
        Problem(machine.name, check.point, check.entry.name, _located(machine.files, check))
        for check in checks
        if check.wrong
    ]
    read = [check for check in due if not check.is_unread]
    sampled = sum(check.blocks is not None for check in read)
    skipped = len(checks) - len(due)
    return Verified(len(wanted), len(read), run.done, skipped, sampled, tuple(problems), forgotten)


def _damaged_machine_files(machine: Machine, wanted: Iterable[Manifest]) -> Iterator[Problem]:
    """Read the machine's files of these points, which are small; yield what is damaged or missing."""
    for manifest in wanted:
        for file in manifest.machine_files:
            try:
                machine_files.load(machine.files, file)
            except NoAnswer:
                raise
            except BackupError as error:
                yield Problem(machine.name, manifest.point, None, error)


def _located(files: Files, check: Check) -> BackupError:
    """Return the first fault of a data file, and for damage in it the ranges of the disk that are affected."""
    errors = [check.wrong[number] for number in sorted(check.wrong)]
    if not isinstance(errors[0], DamagedBlock):
        return errors[0]
    from backup.repository import salvage  # noqa: PLC0415 - see the module's docstring

    return salvage.located_in_file(files, check.entry, check.parent, errors)


def _sample(checks: Sequence[Check], share: float) -> None:
    if share >= 1:
        return
    import random  # noqa: PLC0415 - brings OpenSSL with it

    drawn = draw([block_count(check.entry.data.size) for check in checks], share, random.random)
    for check, blocks in zip(checks, drawn, strict=True):
        check.blocks = blocks


def _records(checks: Sequence[Check], memory: Memory, now: str, *, deep: bool) -> dict[str, Record]:
    """Return the results to save: files that were read as a whole, and damage; not failures of this process alone."""
    records: dict[str, Record] = {}
    for check in checks:
        data = check.entry.data
        known = memories.record_of(memory, data)
        if check.wrong:
            error = check.wrong[min(check.wrong)]
            if error.exit_code in {Damaged.exit_code, NotFound.exit_code}:
                records[data.file] = Record(data.digest, now, None, error.exit_code, error.message)
        elif check.is_proven and not (data.file in records and records[data.file].code):
            before = known.deep if known is not None and not known.code else None
            records[data.file] = Record(data.digest, now, now if deep else before, 0, None)
    return records


def _present(contents: Contents) -> Collection[str] | None:
    """Return the names of all data files, or None if a damaged manifest may name others."""
    if contents.damaged:
        return None
    return {disk.data.file for point in contents.manifests.values() for disk in point.disks}


def _chains(
    contents: Contents, wanted: Iterable[Manifest]
) -> Iterator[tuple[Manifest, DiskEntry, Chain | BackupError]]:
    for manifest in wanted:
        for disk in manifest.disks:
            try:
                yield manifest, disk, chains.build(contents.manifests, manifest.point, disk.name, contents.damaged)
            except BackupError as error:
                yield manifest, disk, error


def _chain_files(
    manifests: Mapping[str, Manifest], chain: Chain
) -> Iterator[tuple[tuple[str, str], tuple[Manifest, DiskEntry, DiskEntry | None]]]:
    parents = [*(link.entry for link in chain.links[1:]), None]
    for link, parent in zip(chain.links, parents, strict=True):
        yield (link.point, link.entry.name), (manifests[link.point], link.entry, parent)
