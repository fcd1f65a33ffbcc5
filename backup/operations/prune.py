"""
Remove the points that retention does not keep; merge what the others need of them into the points that stay.

    manifests -> retention (which points) -> thin (which steps) -> space -> rewrite, exchange and remove, step by step

After every step and at every instant within a step, each point that stays restores to the same bytes, by pybackup and
by `qemu-img convert`: a data file is replaced as a whole (`exchange`), and a point is removed only when no other point
builds on it any more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from backup.errors import BackupError, Failed, Interrupted
from backup.model import chain as chains
from backup.model.documents import moment_of
from backup.model.manifest import Manifest
from backup.planning import retention
from backup.planning.prune_steps import Remove, Rewrite, Thinning, dated_point, needed_by_kept, thin
from backup.planning.retention import DISORDER, FUTURE, UNCONFIRMED, Batch, Policy
from backup.repository.machine import Contents, Machine, manifest_name
from backup.repository.manifests import read_manifest
from backup.repository.opened_chain import examine
from backup.repository.replacement import exchange, settle
from backup.runtime.progress import Progress
from backup.storage.base import UNTOLD
from backup.storage.refusals import explained
from backup.units import counted, show_size

if TYPE_CHECKING:
    from backup.engine.merge import Estimate, Merge

_log = logging.getLogger(__name__)

_MARGIN = 4 << 20
"""Bytes that a rewrite may need besides its data file: for a digest file, manifests and the file system's own data."""

_PAUSE = timedelta(days=30)
"""A longer time between two backups makes the clock suspect: machines pause for weeks, a clock errs by years."""

DEFAULT_BATCH = Batch()

KEEP, WAIT, REMOVE = "keep", "wait", "remove"
"""What becomes of a point.  A point that waits is removed when enough others go with it (`retention.Batch`)."""


@dataclass(frozen=True, slots=True)
class Request:
    """Which of a machine's points to keep; `workers` is the number of threads that rewrite data files."""

    policy: Policy
    batch: Batch = DEFAULT_BATCH
    workers: int = 2
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class PointReport:
    """A point, the time at which its backup began, what becomes of it (KEEP, WAIT or REMOVE), and why."""

    point: str
    sequence: int
    created: str
    action: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """
    A data file that was rewritten, or on a dry run would be.

    `kind` is the kind of the file afterwards, `merged` are the points whose data it takes over.  Sizes are in bytes;
    `stored_after` of a dry run is an upper bound.
    """

    point: str
    disk: str
    kind: str
    merged: tuple[str, ...]
    read_bytes: int
    stored_before: int
    stored_after: int


@dataclass(frozen=True, slots=True)
class Report:
    """What was done with a machine's points, or on a dry run would be; points oldest first."""

    machine: str
    points: tuple[PointReport, ...]
    rewrites: tuple[RewriteReport, ...]
    freed_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def removed(self) -> int:
        """Return the number of points that are removed."""
        return sum(point.action == REMOVE for point in self.points)

    @property
    def waiting(self) -> int:
        """Return the number of points that wait for others."""
        return sum(point.action == WAIT for point in self.points)


def prune(machine: Machine, request: Request, progress: Progress) -> Report:
    """
    Prune one machine.

    Raises
    ------
    UsageError
        The policy keeps nothing.
    Damaged, NotFound
        A manifest cannot be read, or a chain is broken.  Nothing is removed.
    Failed
        The disk is full or fails, or a rewrite needs more space than is free.  What was done before stays done.
    """
    if request.dry_run or not _has_points(machine):
        return _rehearse(machine, request)  # a folder that is not a machine's must not even get a lock file
    with settled(machine) as contents:
        return Thinner(machine, request, contents, _wanted(request, contents)).run(progress)


def _has_points(machine: Machine) -> bool:
    """Tell whether the machine's folder holds any manifest, also one of another name."""
    return any(".json" in name for name in machine.listing())


@contextmanager
def settled(machine: Machine) -> Iterator[Contents]:
    """Hold the machine's lock, and remove leftovers of interrupted runs, at the start and after a failure."""
    with machine.lock():
        try:
            yield settle(machine)
        except BaseException as error:
            with suppress(BackupError, OSError):
                settle(machine)
            if isinstance(error, Interrupted):
                error.hint = "all points that stay are complete; run the command again to continue"
            raise


def _rehearse(machine: Machine, request: Request) -> Report:
    return examine(machine, lambda contents: Thinner(machine, request, contents, _wanted(request, contents))).rehearse()


def _wanted(request: Request, contents: Contents) -> Mapping[str, tuple[str, ...]]:
    """Return the points that the policy keeps, and why."""
    return retention.keep(map(dated_point, contents.manifests.values()), request.policy, datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class _Lacking:
    """The first step that lacks space, by its number, and the error that says so."""

    number: int
    error: BackupError


class Thinner:
    """
    Plans and executes the removal of all points of a machine except some.

    Where the storage cannot replace data files, nothing is merged: the points that the kept ones build on stay, too.

    Parameters
    ----------
    contents : Contents
        The machine's manifests; every chain must be complete.
    keep : mapping
        The points that stay, and why.  Points in use stay as well; `reasons` has both.

    Raises
    ------
    Damaged, NotFound
        A manifest cannot be read, or a chain is broken.
    """

    def __init__(
        self, machine: Machine, request: Request, contents: Contents, keep: Mapping[str, tuple[str, ...]]
    ) -> None:
        _require_whole(machine, contents)
        self.machine = machine
        self.request = request
        self.manifests = dict(contents.manifests)
        self.reasons = dict(keep)
        self._keep_used()
        self.needed: Mapping[str, int] = {}
        if not machine.storage.traits.rewritable:
            self._keep_needed()
        self.thinning: Thinning = thin(self.manifests, self.reasons, request.batch)
        self.estimates = _estimated(machine, self.manifests, self.thinning)
        self.all = contents.manifests

    def run(self, progress: Progress) -> Report:
        """Execute the steps, up to the first one that lacks space."""
        lacking = self.lacking()
        steps = self.thinning.steps if lacking is None else self.thinning.steps[: lacking.number]
        before = _stored(self.manifests)
        for step in steps:
            if isinstance(step, Rewrite):
                self._rewrite(step, progress)
            else:
                self._remove(step.point)
        if lacking is not None:
            raise lacking.error
        return self.report(before - _stored(self.manifests))

    def rehearse(self) -> Report:
        """Report what a run would do, with a warning if it would run out of space."""
        lacking = self.lacking()
        report = self.report()
        return report if lacking is None else replace(report, warnings=(*report.warnings, lacking.error.message))

    def _rewrite(self, step: Rewrite, progress: Progress) -> None:
        from backup.engine.merge import consolidate, discard  # noqa: PLC0415 - see `_estimated`

        merge = _merge(self.manifests, step)
        former = merge.newest.entry
        with self.machine.unused(former) as why_not:
            pass
        if why_not is None:
            _log.info("%s: %s/%s takes over %d points", self.machine.name, step.point, step.disk, len(step.merged))
            entry = consolidate(self.machine, merge, workers=self.request.workers, progress=progress)
            with self.machine.unused(former) as why_not:  # the merge may have taken hours
                if why_not is None:
                    self.manifests[step.point] = exchange(self.machine, self.manifests[step.point], entry)
        if why_not is not None:
            discard(self.machine, merge)
            del self.estimates[step]
            self._keep(step.point, why_not)

    def _remove(self, point: str) -> None:
        """Remove a point, unless it is in use or a point that could not be rewritten still builds on it."""
        manifest = self.manifests[point]
        with self.machine.unused(*manifest.disks) as why_not:
            why_not = why_not or self._why_needed(point)
            if why_not is None:
                self.machine.remove_point(self.manifests.pop(point))
                _log.info("%s: removed point %s", self.machine.name, point)
        if why_not is not None:
            self._keep(point, why_not)

    def _why_needed(self, point: str) -> str | None:
        builds = (
            manifest.point
            for manifest in self.manifests.values()
            for disk in manifest.disks
            if disk.parent is not None and disk.parent.point == point
        )
        child = next(builds, None)
        return None if child is None else f"point {child} builds on it"

    def _keep_used(self) -> None:
        """Keep the points that are in use; they form whole chains, so that none of their files is rewritten."""
        for point, why in self.machine.points_in_use().items():
            if point in self.manifests:
                self._keep(point, why)

    def _keep_needed(self) -> None:
        """Keep the points that other kept points build on."""
        self.needed = needed_by_kept(self.manifests, self.reasons)
        for point, count in self.needed.items():
            self._keep(point, f"{counted(count, 'later point')} {'needs' if count == 1 else 'need'} it")

    def _keep(self, point: str, why: str) -> None:
        """Keep a point, and add the reason."""
        before = self.reasons.get(point, ())
        if why not in before:
            self.reasons[point] = (*before, why)

    def _untold(self) -> Iterator[str]:
        """Yield a warning if points stay only because it is unknown whether they are in use: the repository grows."""
        why = [reasons[0] for reasons in self.reasons.values() if reasons[0].startswith(UNTOLD)]
        if why:
            yield f"{counted(len(why), 'point')} not removed: {why[0]}"

    def _doubted(self) -> Iterator[str]:
        """Yield a warning on the first night on which the clock seems wrong; later, only the point's reason says so."""
        *_, former, newest = [None, None, *sorted(self.all.values(), key=lambda manifest: manifest.sequence)]
        if former is None or newest is None or self._doubt(former) is not None:
            return
        wrong = self._doubt(newest)
        pause = moment_of(newest.started) - moment_of(former.started)
        saved = any(UNCONFIRMED in why for reasons in self.reasons.values() for why in reasons)
        if wrong is None and pause > _PAUSE and saved:
            wrong = f"{pause.days} days after the point before it"
        if wrong is not None:
            yield (
                f"the newest point {newest.point} is dated {newest.started}, {wrong}: check this host's clock; "
                "no other point is removed because of that time"
            )

    def _doubt(self, manifest: Manifest) -> str | None:
        """Return why the time of a point cannot be right, or None if it may be right."""
        return next((why for why in self.reasons.get(manifest.point, ()) if why in {DISORDER, FUTURE}), None)

    def lacking(self) -> _Lacking | None:
        """Return the first step that needs more space than is free, counting what the steps before it free."""
        with explained(self.machine.files.location):
            free = self.machine.files.free_bytes()
        if free is None:
            return None
        for number, step in enumerate(self.thinning.steps):
            if isinstance(step, Remove):
                free += sum(disk.data.size for disk in self.all[step.point].disks)
                continue
            needed = self.estimates[step].writes + _MARGIN
            if needed > free:
                return _Lacking(number, self._no_space(step, needed, free))
            free += self._former_size(step) - self.estimates[step].writes
        return None

    def _no_space(self, step: Rewrite, needed: int, free: int) -> BackupError:
        return Failed(
            f"machine {self.machine.name}: a rewrite of disk {step.disk} of point {step.point} needs {needed} bytes "
            f"({show_size(needed)}) of free space, and {free} ({show_size(free)}) are free",
            hint="add space for the repository, or keep the points before that one; all points are complete",
        )

    def _former_size(self, step: Rewrite) -> int:
        return next(disk.data.size for disk in self.all[step.point].disks if disk.name == step.disk)

    def report(self, freed: int | None = None) -> Report:
        """Report what was done or is planned; `freed` is in bytes, or None for the estimate."""
        if freed is None:
            gone = sum(disk.data.size for point in self.thinning.going for disk in self.all[point].disks)
            grown = sum(cost.writes - self._former_size(step) for step, cost in self.estimates.items())
            freed = gone - grown
        ordered = sorted(self.all.values(), key=lambda manifest: manifest.sequence)
        return Report(
            machine=self.machine.name,
            points=tuple(self._point(manifest) for manifest in ordered),
            rewrites=tuple(self._rewritten(step, cost) for step, cost in self.estimates.items()),
            freed_bytes=freed,
            warnings=(*self._untold(), *self._doubted()),
        )

    def _point(self, manifest: Manifest) -> PointReport:
        point = manifest.point
        batch = self.request.batch
        action, reasons = KEEP, self.reasons.get(point, ())
        if point in self.thinning.going and not reasons:
            action = REMOVE
        elif point in self.thinning.waiting:
            action = WAIT
            share = f"points with {batch.share} % of the full's bytes"
            reasons = (f"until {batch.points} points can be removed at once, or {share}",)
        return PointReport(point, manifest.sequence, manifest.started, action, reasons)

    def _rewritten(self, step: Rewrite, cost: Estimate) -> RewriteReport:
        done = self.manifests[step.point].disk(step.disk)
        former = self._former_size(step)
        after = cost.writes if done is None or self.request.dry_run else done.data.size
        kind = "full" if step.onto is None else "incremental"
        return RewriteReport(step.point, step.disk, kind, step.merged, cost.reads, former, after)


def _require_whole(machine: Machine, contents: Contents) -> None:
    """Refuse a machine with a manifest that cannot be read: it may need any of the points."""
    for error in contents.damaged.values():
        raise type(error)(
            f"machine {machine.name} is not pruned because one of its manifests cannot be read: {error.message}",
            hint=error.hint,
        )
    chains.require_whole(contents.manifests)


def _estimated(machine: Machine, manifests: Mapping[str, Manifest], thinning: Thinning) -> dict[Rewrite, Estimate]:
    """Return what each rewrite costs.  Most nights have none, and do without what merges data files, and its numpy."""
    rewrites = [step for step in thinning.steps if isinstance(step, Rewrite)]
    if not rewrites:
        return {}
    from backup.engine.merge import estimate  # noqa: PLC0415 - see above

    return {step: estimate(machine, _merge(manifests, step)) for step in rewrites}


def _merge(manifests: Mapping[str, Manifest], step: Rewrite) -> Merge:
    from backup.engine.merge import Merge  # noqa: PLC0415 - see `_estimated`

    return Merge(chains.build(manifests, step.point, step.disk), 1 + len(step.merged))


def _stored(manifests: Mapping[str, Manifest]) -> int:
    return sum(disk.data.size for manifest in manifests.values() for disk in manifest.disks)


def set_pin(machine: Machine, point: str, *, pinned: bool) -> bool:
    """
    Pin a point, so that neither prune nor remove takes it, or unpin it.  Returns False if nothing changed.

    Raises
    ------
    NotFound
        The point does not exist any more.
    BackupError
        The manifest cannot be read or written.
    """
    with machine.lock():
        settle(machine)
        manifest = read_manifest(machine.files, manifest_name(point))
        if manifest.pinned == pinned:
            return False
        machine.rewrite(replace(manifest, pinned=pinned))
        return True
