"""
Status: for each disk its newest point, how old that is, whether its chain is there, and what to do next.

Nothing is read but manifests, the sizes of files, and what `verify` remembers: it may run every minute.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from backup.errors import BackupError, Damaged, NotFound, UsageError, merged_exit_code
from backup.model import chain as chains
from backup.model.chain import Chain
from backup.model.documents import moment_of
from backup.model.manifest import Manifest
from backup.operations.verify import glance
from backup.planning.prune_steps import dated_point
from backup.planning.retention import DISORDER, FUTURE, DatedPoint, doubts
from backup.repository.machine import Contents, Machine
from backup.repository.opened_chain import examine
from backup.repository.verified import Memory, recall, record_of
from backup.storage.base import Files, Listing
from backup.units import counted, show_age

TOLERANCE = 300.0
"""Seconds that a point may lie in the future: two hosts' clocks differ.  Beyond that nothing is known of its age."""
OLD = 1
"""Exit code where something is too old, as Nagios and its kind know a warning."""
_NOTHING = "nothing"
_NO_POINT = "no point yet: run pybackup incremental"


@dataclass(frozen=True, slots=True)
class Trust:
    """
    What is remembered of a chain's data files.

    `last` is the newest time at which one was verified, UTC; `files` so many `of` all were found to be sound since they
    were written; `code` and `problem` tell of the first that was not.
    """

    last: str | None
    files: int
    of: int
    code: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """
    One disk's state; `disk` is None for what concerns its machine as a whole.

    Ages in seconds, sizes in bytes; None where there is no point, no time, or no chain.  `code` is 0, 1 (too old), or
    the exit code of what is wrong; `next` says what to do.
    """

    machine: str
    disk: str | None
    point: str | None
    finished: str | None
    age_seconds: float | None
    chain_points: int | None
    stored_bytes: int | None
    logical_bytes: int | None
    verified: Trust | None
    code: int
    next: str


@dataclass(frozen=True, slots=True)
class Limits:
    """The time that it is, and the greatest age in seconds that is no fault (None: any)."""

    now: datetime
    max_age: float | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """A machine's manifests, what `verify` remembers of it, and a look at the files of a chain: what is wrong there."""

    contents: Contents
    memory: Memory
    files_problem: Callable[[Chain], BackupError | None]


def exit_code(found: Collection[DiskStatus]) -> int:
    """Merge the codes of the disks: damaged (12), missing (10), unreadable (2), too old (1); 10 without any disk."""
    if not found:
        return NotFound.exit_code
    worst = (Damaged.exit_code, NotFound.exit_code, UsageError.exit_code)
    return merged_exit_code((status.code for status in found), worst=worst)


def look(machine: Machine, expected: Collection[str] | None, limits: Limits, *, named: bool = True) -> list[DiskStatus]:
    """
    The state of a machine's disks.

    Parameters
    ----------
    expected : collection of str or None
        The disks that the configuration names: one without a point is at fault, and another one, which is backed up no
        longer, is never too old.  None: those that have points.
    named : bool
        False where the configuration names the repository's machines, and not this one: that is said, and is no fault.
    """

    def look_at(contents: Contents) -> list[DiskStatus]:
        listing = machine.listing()
        evidence = Evidence(contents, recall(machine), lambda chain: files_problem(machine.files, listing, chain))
        return assess(machine.name, evidence, expected, limits, named=named)

    try:
        return examine(machine, look_at, doubtful=lambda found: any(each.code not in {0, OLD} for each in found))
    except BackupError as error:  # of the machine's folder; the other machines are shown all the same
        return [_without_point(machine.name, None, error.exit_code, _fault(error))]


def assess(
    machine: str, evidence: Evidence, expected: Collection[str] | None, limits: Limits, *, named: bool = True
) -> list[DiskStatus]:
    """As `look`, without a file."""
    if not named:
        return _with_remark(assess(machine, evidence, (), limits), machine)
    contents = evidence.contents
    found = [_without_point(machine, None, error.exit_code, _fault(error)) for error in contents.damaged.values()]
    newest = newest_by_disk(contents.manifests)
    doubtful = _doubtful(contents.manifests.values(), limits.now)
    for disk in sorted({*newest, *(expected or ())}):
        point = newest.get(disk)
        if point is None:
            found.append(_without_point(machine, disk, OLD, _NO_POINT))
        else:
            ages = limits if expected is None or disk in expected else Limits(limits.now, None)
            found.append(_with_doubts(_disk_status(point, disk, evidence, ages), doubtful.get(disk, {})))
    return found or [_without_point(machine, None, OLD, _NO_POINT)]


def _with_remark(found: Sequence[DiskStatus], machine: str) -> list[DiskStatus]:
    """Say once, where nothing is wrong, that no configuration names the machine: it may be mistyped, or gone."""
    remark = f"not in the configuration: pybackup remove {machine} removes the machine and its points"
    first, *others = found
    if first.point is None and first.code == OLD:
        return [_without_point(machine, None, 0, f"no point, and {remark}")]
    if not first.code:
        first = replace(first, next=remark if first.next == _NOTHING else f"{first.next}; {remark}")
    return [first, *others]


def _doubtful(manifests: Iterable[Manifest], now: datetime) -> dict[str, dict[str, str]]:
    """For each disk its points whose times cannot be right, oldest first, and why."""
    points: defaultdict[str, list[DatedPoint]] = defaultdict(list)
    for manifest in sorted(manifests, key=lambda manifest: manifest.sequence):
        for disk in manifest.disks:
            points[disk.name].append(dated_point(manifest))
    wrong = (FUTURE, DISORDER)
    return {disk: {p: why for p, why in doubts(held, now).items() if why in wrong} for disk, held in points.items()}


def _with_doubts(status: DiskStatus, doubtful: Mapping[str, str]) -> DiskStatus:
    """Say of a disk that is well which of its points have times that cannot be right."""
    if status.code or not doubtful:
        return status
    point, why = list(doubtful.items())[-1]
    more = f" and of {counted(len(doubtful) - 1, 'other point')}" if len(doubtful) > 1 else ""
    said = (
        f"check the clock: the time of point {point}{more} cannot be right ({why}); prune keeps such points, "
        f"pybackup remove {status.machine}/{point} removes one"
    )
    return replace(status, next=said if status.next == _NOTHING else f"{said}; {status.next}")


def newest_by_disk(manifests: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """The newest point of each disk that has one."""
    found: dict[str, Manifest] = {}
    for manifest in sorted(manifests.values(), key=lambda each: each.sequence):
        found.update({disk.name: manifest for disk in manifest.disks})
    return found


def files_problem(files: Files, listing: Listing, chain: Chain) -> BackupError | None:
    """What is wrong with a chain's files as far as their names and lengths tell; None: nothing."""
    found = (glance(files, listing, link.entry.data) for link in chain.links)
    return next((problem for problem in found if problem is not None), None)


def trust_in(chain: Chain, memory: Memory) -> Trust:
    """What is remembered of a chain's data files."""
    records = [found for link in chain.links if (found := record_of(memory, link.entry.data)) is not None]
    wrong = next((record for record in records if record.code), None)
    return Trust(
        last=max((record.checked for record in records), default=None),
        files=sum(not record.code for record in records),
        of=len(chain.links),
        code=0 if wrong is None else wrong.code,
        problem=None if wrong is None else wrong.problem,
    )


def _disk_status(point: Manifest, disk: str, evidence: Evidence, limits: Limits) -> DiskStatus:
    entry = point.disk(disk)
    assert entry is not None
    age = (limits.now - moment_of(point.finished)).total_seconds()
    chain: Chain | None = None
    try:
        chain = chains.build(evidence.contents.manifests, point.point, disk, evidence.contents.damaged)
        wrong = evidence.files_problem(chain)
    except BackupError as error:
        wrong = error
    trust = None if chain is None else trust_in(chain, evidence.memory)
    code, advice = _verdict(point.machine, wrong, trust, age, limits)
    return DiskStatus(
        machine=point.machine,
        disk=disk,
        point=point.point,
        finished=point.finished,
        age_seconds=max(age, 0.0),
        chain_points=None if chain is None else len(chain.links),
        stored_bytes=None if chain is None else sum(link.entry.data.size for link in chain.links),
        logical_bytes=entry.size,
        verified=trust,
        code=code,
        next=advice,
    )


def _verdict(
    machine: str, wrong: BackupError | None, trust: Trust | None, age: float, limits: Limits
) -> tuple[int, str]:
    """The exit code and what to do: what is broken comes before what is old."""
    if wrong is not None:
        return wrong.exit_code, _fault(wrong)
    assert trust is not None
    if trust.code:
        return trust.code, f"{_word(trust.code)} when verified: {trust.problem}; then run pybackup verify {machine}"
    if limits.max_age is not None:
        if age < -TOLERANCE:
            return OLD, "its time is in the future: check the clock, then run pybackup incremental"
        if age > limits.max_age:
            return OLD, f"too old (limit {show_age(limits.max_age)}): run pybackup incremental"
    return 0, f"never verified: run pybackup verify {machine}" if trust.last is None else _NOTHING


def _fault(error: BackupError) -> str:
    return f"{_word(error.exit_code)}: {error.message}"


def _word(code: int) -> str:
    return {NotFound.exit_code: "missing", Damaged.exit_code: "damaged"}.get(code, "unreadable")


def _without_point(machine: str, disk: str | None, code: int, advice: str) -> DiskStatus:
    return DiskStatus(machine, disk, None, None, None, None, None, None, None, code, advice)


def summary(found: Collection[DiskStatus]) -> str:
    """One line that a monitoring system shows."""
    wrong = [status for status in found if status.code]
    if not wrong:
        machines = counted(len({status.machine for status in found}), "machine")
        oldest = max((status.age_seconds or 0.0 for status in found), default=0.0)
        return f"OK: {counted(len(found), 'disk')} of {machines}, none older than {show_age(oldest)}"
    word = "WARNING" if exit_code(found) == OLD else "CRITICAL"
    shown = "; ".join(_shortly(wrong))
    return f"{word}: {len(wrong)} of {counted(len(found), 'disk')}: {shown}"


def _shortly(wrong: Collection[DiskStatus], most: int = 3) -> Iterator[str]:
    for status in sorted(wrong, key=lambda each: -each.code)[:most]:
        yield f"{status.machine}{'/' if status.disk else ''}{status.disk or ''}: {status.next}"
    if len(wrong) > most:
        yield f"and {len(wrong) - most} more"
