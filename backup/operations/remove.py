"""
Remove a point, or a machine with all its points, because the user names it.

A point is removed as prune removes it: what other points need of it is merged into them first (see `prune`).  The
points of a machine are removed newest first.  So every point that is left is complete at every instant.

A disk's bitmap continues the disk's newest point.  If that point is removed, no bitmap can be continued, and the next
backup reads the whole disk; `Removal.notes` says so before anything is removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from backup.errors import BackupError, Damaged, Failed, Locked, NotFound
from backup.model import chain as chains
from backup.model.manifest import Manifest
from backup.operations.prune import Request, RewriteReport, Thinner, settled
from backup.planning.retention import Batch, Policy
from backup.repository import verified
from backup.repository.machine import SEQUENCE, Contents, Machine
from backup.repository.opened_chain import examine
from backup.runtime.progress import Progress
from backup.storage.base import TEMPORARY, UNTOLD
from backup.storage.refusals import explained

_KEPT = ("not named",)
"""The reason why the other points stay."""


@dataclass(frozen=True, slots=True)
class Removal:
    """
    What is removed of a machine, or would be.

    `point` is None if the whole machine is removed.  `removed` are point ids, oldest first; `rewrites` the data files
    into which other data is merged; `damaged` the manifests that cannot be read and are removed as well.  `freed_bytes`
    counts data files.  `notes` are the consequences.
    """

    machine: str
    point: str | None
    removed: tuple[str, ...]
    rewrites: tuple[RewriteReport, ...]
    damaged: tuple[str, ...]
    freed_bytes: int
    notes: tuple[str, ...]


def plan(machine: Machine, point: str | None, *, workers: int) -> Removal:
    """
    Return what `remove` would do, and change nothing.

    Raises
    ------
    BackupError
        See `remove`.
    """

    def look(contents: Contents) -> Removal:
        if point is None:
            return _machine_removal(machine, contents)
        thinner = _thinner(machine, contents, point, workers)
        if (lacking := thinner.lacking()) is not None:
            raise lacking.error
        report = thinner.report()
        return _point_removal(machine, contents, point, report.rewrites, report.freed_bytes)

    return examine(machine, look)


def remove(machine: Machine, planned: Removal, *, workers: int, progress: Progress) -> Removal:
    """
    Remove what `planned` names.

    Raises
    ------
    NotFound
        The point does not exist.
    Locked
        Another run has locked the machine, or the point is in use.
    Damaged
        A manifest cannot be read, so that it is unknown what builds on the point.  (A whole machine is removed all the
        same.)
    Failed
        A point is pinned, the machine has other points than `planned` says, or there is too little space.  What was
        done before stays done, and every point that is left is complete.
    """
    with settled(machine) as contents:
        if planned.point is None:
            return _remove_machine(machine, contents, planned)
        thinner = _thinner(machine, contents, planned.point, workers)
        newest = chains.newest_manifest(contents.manifests.values())
        if newest is not None and newest.point == planned.point:
            machine.note_removed(newest.sequence)
        report = thinner.run(progress)
        if planned.point in thinner.manifests:
            raise _in_use(machine, planned.point, thinner.reasons[planned.point][-1])
        return _point_removal(machine, contents, planned.point, report.rewrites, report.freed_bytes)


def _thinner(machine: Machine, contents: Contents, point: str, workers: int) -> Thinner:
    """Plan the removal of one point, and refuse it if the point is pinned or in use."""
    if point not in contents.manifests and f"{point}.json" not in contents.damaged:
        raise NotFound(f"machine {machine.name} has no point {point}", hint=f"see: `pybackup list {machine.name}`")
    keep = {name: _KEPT for name in contents.manifests if name != point}
    thinner = Thinner(machine, Request(Policy(), Batch(points=1), workers), contents, keep)
    _require_unpinned(machine, {point: contents.manifests[point]})
    if point in thinner.needed:
        raise Failed(
            f"point {point} of machine {machine.name} cannot be removed: {thinner.reasons[point][-1]}",
            hint="nothing is merged in a place that only receives copies; remove the later points first",
        )
    if point in thinner.reasons:
        raise _in_use(machine, point, thinner.reasons[point][-1])
    return thinner


def _point_removal(
    machine: Machine, contents: Contents, point: str, rewrites: tuple[RewriteReport, ...], freed: int
) -> Removal:
    gone = contents.manifests[point]
    left = [manifest for name, manifest in contents.manifests.items() if name != point]
    notes = []
    for disk in gone.disks:
        older = chains.newest_manifest(left, disk.name)
        if older is None:
            notes.append(f"no other point holds disk {disk.name}: its next backup is a full")
        elif older.sequence < gone.sequence:
            notes.append(
                f"point {point} is the newest of disk {disk.name}, and the disk's bitmap continues no other point: "
                "the next backup of that disk reads everything (a rescan)"
            )
    return Removal(machine.name, point, (point,), rewrites, (), freed, tuple(notes))


def _machine_removal(machine: Machine, contents: Contents) -> Removal:
    _require_unpinned(machine, contents.manifests)
    for error in contents.damaged.values():
        if not isinstance(error, Damaged | NotFound):  # of a newer version, or without permission: it may be pinned
            raise error
    for point, why in machine.points_in_use().items():
        raise _in_use(machine, point, why)
    ordered = sorted(contents.manifests.values(), key=lambda manifest: manifest.sequence)
    freed = sum(disk.data.size for manifest in ordered for disk in manifest.disks)
    notes = [f"the next backup of machine {machine.name} is a full; a copy in a second place keeps its points"]
    return Removal(
        machine.name,
        None,
        tuple(manifest.point for manifest in ordered),
        (),
        tuple(sorted(contents.damaged)),
        freed,
        tuple(notes),
    )


def _remove_machine(machine: Machine, contents: Contents, planned: Removal) -> Removal:
    removal = _machine_removal(machine, contents)
    if (removal.removed, removal.damaged) != (planned.removed, planned.damaged):
        raise Failed(
            f"the points of machine {machine.name} changed meanwhile; nothing was removed",
            hint=f"see: `pybackup list {machine.name}`, and run the command again",
        )
    for point in reversed(removal.removed):
        manifest = contents.manifests[point]
        with machine.unused(*manifest.disks) as why_not:
            if why_not is not None:
                raise _in_use(machine, point, why_not)
            machine.remove_point(manifest)
    with explained(machine.files.location):
        for name in removal.damaged:
            machine.files.remove(name)
        machine.files.barrier()
    machine.remove_leftovers(Contents({}, {}))
    others = _remove_folder(machine)
    if others:
        note = f"the folder {machine.files.location} stays, as it holds what is not pybackup's: {', '.join(others[:5])}"
        removal = replace(removal, notes=(*removal.notes, note))
    return removal


def _remove_folder(machine: Machine) -> list[str]:
    """Remove the folder of a machine without points; return the foreign names in it, for which the folder stays."""
    with explained(machine.files.location):
        for name in (verified.NAME, verified.NAME + TEMPORARY, SEQUENCE):
            machine.files.discard(name)
        return machine.files.remove_folder()


def _require_unpinned(machine: Machine, manifests: Mapping[str, Manifest]) -> None:
    for point, manifest in manifests.items():
        if manifest.pinned:
            raise Failed(
                f"point {point} of machine {machine.name} is pinned; nothing was removed",
                hint=f"if it is not needed any more, run `pybackup unpin {machine.name}/{point}` first",
            )


def _in_use(machine: Machine, point: str, why: str) -> BackupError:
    message = f"point {point} of machine {machine.name} cannot be removed: {why}"
    if why.startswith(UNTOLD):
        return Failed(message, hint="run the command on the host that has the repository's disk, where locks work")
    return Locked(
        message, hint="end the program that uses the point (`pybackup serve`, for example), and run the command again"
    )
