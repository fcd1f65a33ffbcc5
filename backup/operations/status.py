"""
Status: for each disk its newest point, how old that is, whether its chain is there, and what to do next.

Only manifests, sizes of files and the saved results of `verify` are read, so a monitoring system may ask every minute.
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
from backup.repository.named_files import named_points
from backup.repository.opened_chain import examine
from backup.repository.verified import Memory, recall, record_of
from backup.storage.base import Files, Listing
from backup.units import counted, show_age

TOLERANCE = 300.0
"""Seconds that a point may lie in the future, as the clocks of two hosts differ.  Beyond that, its age is unknown."""
OLD = 1
"""Exit code if a point is too old: a warning for Nagios and its relatives."""
_NOTHING = "nothing"
_NO_POINT = "no point yet: run pybackup incremental"
_FINDS_DISKS = {"libvirt", "qmp"}
"""Kinds of sources that find the machine's disks where the user names none."""
_GONE = "not in the machine's newest point (detached, or left out): the age is not checked"


@dataclass(frozen=True, slots=True)
class Trust:
    """
    What earlier runs of verify found out about a chain's data files.

    `last` is the time, in UTC, of the newest verification of one of the files.  `files` of all `of` files were found
    intact since they were written.  `code` and `problem` describe the first file that was not.
    """

    last: str | None
    files: int
    of: int
    code: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """
    The state of a disk, or of its machine as a whole (`disk` is None).

    Ages are in seconds and sizes in bytes; they are None without a point or a chain.  `code` is 0, 1 (too old), or the
    exit code of the fault; `next` says what to do.
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
    """The present time, and the greatest age of a point in seconds that is no fault (None: any age)."""

    now: datetime
    max_age: float | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """A machine's manifests, the results of earlier verifications, and a check of a chain's files."""

    contents: Contents
    memory: Memory
    files_problem: Callable[[Chain], BackupError | None]


def exit_code(states: Collection[DiskStatus]) -> int:
    """Merge the codes of the disks: damaged (12), missing (10), unreadable (2), too old (1); 10 without any disk."""
    if not states:
        return NotFound.exit_code
    worst = (Damaged.exit_code, NotFound.exit_code, UsageError.exit_code)
    return merged_exit_code((status.code for status in states), worst=worst)


def look(machine: Machine, expected: Collection[str] | None, limits: Limits, *, named: bool = True) -> list[DiskStatus]:
    """
    Return the state of a machine's disks.

    Parameters
    ----------
    expected : collection of str or None
        The disks that the configuration names, or None if it names none: then those of the machine's newest point, and
        all that were read from images or from an NBD server, whose disks the user names in each command.  An expected
        disk without a point is a fault; a disk that is not expected, as it is no longer backed up, is never too old.
    named : bool
        False if the configuration names the repository's machines but not this one: a remark, and no fault.
    """
    if not machine.storage.traits.readable:
        return _by_names(machine, limits)

    def look_at(contents: Contents) -> list[DiskStatus]:
        listing = machine.listing()
        evidence = Evidence(contents, recall(machine), lambda chain: files_problem(machine.files, listing, chain))
        return assess(machine.name, evidence, expected, limits, named=named)

    try:
        return examine(machine, look_at, doubtful=lambda states: any(status.code not in {0, OLD} for status in states))
    except BackupError as error:  # the machine's folder; the other machines are shown all the same
        return [_without_point(machine.name, None, error.exit_code, _fault(error))]


def _by_names(machine: Machine, limits: Limits) -> list[DiskStatus]:
    """Return what the names of the files say of a sealed machine; there is no identity that opens its manifests."""
    try:
        points = named_points(machine)
    except BackupError as error:
        return [_without_point(machine.name, None, error.exit_code, _fault(error))]
    newest = {disk: point for point in points for disk in point.disks}
    states = []
    for disk, point in sorted(newest.items()):
        age = (limits.now - point.began).total_seconds()
        stored = sum(other.disks.get(disk, 0) for other in points)
        old = limits.max_age is not None and age > limits.max_age
        advice = f"too old (limit {show_age(limits.max_age or 0)}): run pybackup copy" if old else _SEALED
        states.append(
            DiskStatus(
                machine=machine.name,
                disk=disk,
                point=point.point,
                finished=None,
                age_seconds=max(age, 0.0),
                chain_points=None,
                stored_bytes=stored,
                logical_bytes=None,
                verified=None,
                code=OLD if old else 0,
                next=advice,
            )
        )
    return states or [_without_point(machine.name, None, OLD, "no point yet: run pybackup copy")]


_SEALED = "sealed: --identity FILE shows the chain and the verifications"


def assess(
    machine: str, evidence: Evidence, expected: Collection[str] | None, limits: Limits, *, named: bool = True
) -> list[DiskStatus]:
    """Return the state of a machine's disks from the evidence, without reading a file; see `look`."""
    if not named:
        return _with_remark(assess(machine, evidence, (), limits), machine)
    contents = evidence.contents
    states = [_without_point(machine, None, error.exit_code, _fault(error)) for error in contents.damaged.values()]
    newest = newest_by_disk(contents.manifests)
    doubtful = _doubtful(contents.manifests.values(), limits.now)
    held_to_age = _present(newest) if expected is None else frozenset(expected)
    for disk in sorted({*newest, *held_to_age}):
        point = newest.get(disk)
        if point is None:
            states.append(_without_point(machine, disk, OLD, _NO_POINT))
            continue
        ages = limits if disk in held_to_age else Limits(limits.now, None)
        status = _with_doubts(_disk_status(point, disk, evidence, ages), doubtful.get(disk, {}))
        states.append(_advised(status, _GONE) if expected is None and disk not in held_to_age else status)
    return states or [_without_point(machine, None, OLD, _NO_POINT)]


def _present(newest: Mapping[str, Manifest]) -> frozenset[str]:
    """
    Return the disks that the machine still has, of those with points, whose newest points these are.

    A run of libvirt's or QEMU's machine finds the disks itself, so that a disk that the newest point lacks was detached
    or left out.
    """
    last = max((point.sequence for point in newest.values()), default=0)
    return frozenset(
        disk
        for disk, point in newest.items()
        if point.sequence == last or ((entry := point.disk(disk)) is not None and entry.source.kind not in _FINDS_DISKS)
    )


def _advised(status: DiskStatus, advice: str) -> DiskStatus:
    """Add advice to the state of a disk without a fault."""
    if status.code:
        return status
    return replace(status, next=advice if status.next == _NOTHING else f"{status.next}; {advice}")


def _with_remark(states: Sequence[DiskStatus], machine: str) -> list[DiskStatus]:
    """Add a remark to the first state, unless it is a fault: the configuration does not name the machine."""
    remark = f"not in the configuration: pybackup remove {machine} removes the machine and its points"
    first, *others = states
    if first.point is None and first.code == OLD:
        return [_without_point(machine, None, 0, f"no point, and {remark}")]
    return [_advised(first, remark), *others]


def _doubtful(manifests: Iterable[Manifest], now: datetime) -> dict[str, dict[str, str]]:
    """Return, for each disk, the points whose times cannot be right, oldest first, and why."""
    points: defaultdict[str, list[DatedPoint]] = defaultdict(list)
    for manifest in sorted(manifests, key=lambda manifest: manifest.sequence):
        for disk in manifest.disks:
            points[disk.name].append(dated_point(manifest))
    wrong = (FUTURE, DISORDER)
    return {disk: {p: why for p, why in doubts(dated, now).items() if why in wrong} for disk, dated in points.items()}


def _with_doubts(status: DiskStatus, doubtful: Mapping[str, str]) -> DiskStatus:
    """Add a warning to the state of a disk without a fault if times of its points cannot be right."""
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
    """Return the newest point of each disk."""
    newest: dict[str, Manifest] = {}
    for manifest in sorted(manifests.values(), key=lambda manifest: manifest.sequence):
        newest.update({disk.name: manifest for disk in manifest.disks})
    return newest


def files_problem(files: Files, listing: Listing, chain: Chain) -> BackupError | None:
    """Return what is wrong with a chain's files, judged by existence and size, or None."""
    problems = (glance(files, listing, link.entry.data) for link in chain.links)
    return next((problem for problem in problems if problem is not None), None)


def trust_in(chain: Chain, memory: Memory) -> Trust:
    """Return what earlier verifications found out about a chain's data files."""
    records = [record for link in chain.links if (record := record_of(memory, link.entry.data)) is not None]
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
    """Return the exit code and what to do; damage comes before age."""
    if wrong is not None:
        return wrong.exit_code, _fault(wrong)
    assert trust is not None
    if trust.code:
        what = f"{_word(trust.code)} when verified: {trust.problem}"
        return trust.code, f"{what}; bring the file back from a copy, then run pybackup verify {machine}"
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


def summary(states: Collection[DiskStatus]) -> str:
    """Return one line for a monitoring system."""
    wrong = [status for status in states if status.code]
    if not wrong:
        machines = counted(len({status.machine for status in states}), "machine")
        oldest = max((status.age_seconds or 0.0 for status in states), default=0.0)
        return f"OK: {counted(len(states), 'disk')} of {machines}, none older than {show_age(oldest)}"
    word = "WARNING" if exit_code(states) == OLD else "CRITICAL"
    shown = "; ".join(_shortly(wrong))
    return f"{word}: {len(wrong)} of {counted(len(states), 'disk')}: {shown}"


def _shortly(wrong: Collection[DiskStatus], most: int = 3) -> Iterator[str]:
    for status in sorted(wrong, key=lambda status: -status.code)[:most]:
        yield f"{status.machine}{'/' if status.disk else ''}{status.disk or ''}: {status.next}"
    if len(wrong) > most:
        yield f"and {len(wrong) - most} more"
