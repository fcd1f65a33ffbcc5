"""
One disk of a backup, from the instant on: plan what the new point must hold of the disk, and write the data file.

This module brings numpy, which takes long to import; `backup.operations.backup` imports it while it waits for others.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from backup.engine import copier
from backup.engine.compare import Rescanned
from backup.errors import Damaged, NotFound, SourceError
from backup.model.chain import Chain
from backup.model.manifest import BitmapRecord, ByteCounts, DataFile, DiskEntry, Parent, SourceRecord
from backup.model.open_disk import OpenDisk
from backup.operations import spot_check
from backup.operations.preflight import DecidedDisk
from backup.operations.request import Request
from backup.planning import decision as decide
from backup.planning import plan
from backup.planning.decision import Decision
from backup.planning.plan import Plan
from backup.planning.sampling import Reservoir
from backup.repository import chain_reader, data_file, data_file_writer
from backup.repository.chain_reader import ChainContent
from backup.runtime.progress import Progress
from backup.sources.base import Moment, Opened
from backup.storage.base import Files

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DiskReport:
    """
    What was done for one disk or, on a dry run, would be done.  Bytes and seconds.

    `rescan`: an incremental for which the whole disk was compared with the chain.  Then `dirty_bytes` is what differs;
    on a dry run, which compares nothing, `dirty_bytes` is the disk's size.
    """

    name: str
    kind: str
    reason: str
    size: int
    dirty_bytes: int
    data_bytes: int
    zero_bytes: int
    stored_bytes: int
    seconds: float
    rescan: bool = False


@dataclass(frozen=True, slots=True)
class PlannedDisk:
    """A disk that is open at the instant, and its plan, which took `seconds` to make."""

    disk: DecidedDisk
    opened: Opened
    planned: Plan
    seconds: float

    def report(self, stored: int, seconds: float) -> DiskReport:
        """Report the disk, of which `stored` bytes were written in `seconds`."""
        return DiskReport(
            name=self.disk.name,
            kind=self.disk.decision.kind,
            reason=self.disk.decision.reason,
            size=self.planned.size,
            dirty_bytes=self.planned.totals.dirty,
            data_bytes=self.planned.totals.data,
            zero_bytes=self.planned.totals.zero,
            stored_bytes=stored,
            seconds=round(self.seconds + seconds, 3),
            rescan=self.disk.decision.rescan,
        )


@dataclass(frozen=True, slots=True)
class StoredDisk:
    """A disk whose data file is complete; `disk` has the final decision, which may differ from the planned one."""

    disk: DecidedDisk
    entry: DiskEntry
    report: DiskReport


@dataclass(frozen=True, slots=True)
class DiskCopies:
    """
    Plans and stores the disks of one run.

    Parameters
    ----------
    files : Files
        The machine's.
    point : str
        The id of the new point.
    redecided : callable
        Gives a disk another decision, after the planned one has turned out not to work; or refuses, with an error.
    warnings : list of str
        Collects what the user must know.
    """

    files: Files
    request: Request
    point: str
    progress: Progress
    redecided: Callable[[DecidedDisk, Decision], DecidedDisk]
    warnings: list[str]

    def plan_all(self, disks: Sequence[DecidedDisk], moment: Moment) -> list[PlannedDisk]:
        """Plan all disks, before any is stored."""
        return [self._plan(disk, opened, moment) for disk, opened in zip(disks, moment.disks, strict=True)]

    def _plan(self, disk: DecidedDisk, opened: Opened, moment: Moment) -> PlannedDisk:
        began = time.monotonic()
        disk, planned = self._planned(replace(disk, granularity=opened.granularity), opened, moment)
        return PlannedDisk(disk, opened, planned, time.monotonic() - began)

    def _planned(self, disk: DecidedDisk, opened: Opened, moment: Moment) -> tuple[DecidedDisk, Plan]:
        """
        Plan a disk; return the plan, and the disk with the decision that the plan follows.

        If planning shows that the decision does not work, the disk gets another decision and another plan: an
        incremental may become a rescan or a full, and a rescan may become a full.
        """
        decision = disk.decision
        try:
            if decision.parent is None:
                return disk, plan.plan_full(opened.disk, self.request.cluster_size)
            if decision.rescan:
                return disk, self._plan_rescan(opened.disk, decision.parent)
            assert opened.bitmap is not None
            planned, why_not = self._plan_incremental(disk, opened.disk, opened.bitmap, decision.parent)
        except (Damaged, NotFound) as error:  # errors of the chain: a source raises others
            return self._planned(self.redecided(disk, decide.broken(error)), opened, moment)
        if why_not is None:
            return disk, planned
        moment.require_sound()  # otherwise the instant may be lost, and the bitmap right
        instead = decide.instead(why_not, decision.parent, self.request.unusable)
        return self._planned(self.redecided(disk, instead), opened, moment)

    def _plan_rescan(self, source: OpenDisk, parent: Chain) -> Plan:
        with chain_reader.checked(self.files, parent, source.size) as content:
            return plan.plan_rescan(source, parent.cluster_size, content.index)

    def _plan_incremental(
        self, disk: DecidedDisk, source: OpenDisk, bitmap: str, parent: Chain
    ) -> tuple[Plan, str | None]:
        """Return the plan, and why the bitmap cannot be trusted if planning or a spot check shows that."""
        sampler = Reservoir(0 if self.request.dry_run else self.request.spot_check, _draw)
        with data_file.peeked(self.files, parent) as index:
            planned = plan.plan_incremental(
                source,
                parent.cluster_size,
                bitmap,
                parent_size=parent.size,
                chain=index if self.request.check_zeroes else None,
                sampler=sampler,
            )
        if planned.totals.missed:
            return planned, decide.why_missed(disk.decision.read or bitmap, planned.totals.missed)
        return planned, self._spot_checked(disk, source, parent, sampler)

    def _spot_checked(self, disk: DecidedDisk, source: OpenDisk, parent: Chain, sampler: Reservoir) -> str | None:
        """Explain why the bitmap cannot be trusted, if one of the sampled clusters differs from the chain."""
        clusters = sampler.chosen()
        try:
            difference = spot_check.differing(source, clusters, self.files, parent, self.request.copying)
        except SourceError as error:
            # A bad sector where nothing changed must not prevent the backup of what changed.
            self.warnings.append(f"disk {disk.name}: the spot check could not be made: {error.message}")
            return None
        _log.info(
            "%s/%s: %d of %d clean clusters checked", self.request.machine, disk.name, len(clusters), sampler.seen
        )
        if not difference.clusters:
            return None
        return decide.why_wrong(
            disk.decision.read or "", parent.newest.point, difference.clusters, len(clusters), difference.first
        )

    def store(self, job: PlannedDisk, written: list[str], moment: Moment) -> StoredDisk:
        """
        Write the data file of a disk; `written` collects the names of files, also where an error ends the writing.

        Raises
        ------
        BackupError
            The disk cannot be read, or the file cannot be written.
        """
        if not job.disk.decision.rescan:
            return self._copied(job, written, moment)
        attempted: list[str] = []
        try:
            return self._rescanned(job, attempted, moment)
        except (Damaged, NotFound) as error:  # errors of the chain, which is verified while it is read
            for name in attempted:
                self.files.discard(name)
            disk, planned = self._planned(self.redecided(job.disk, decide.broken(error)), job.opened, moment)
            return self._copied(replace(job, disk=disk, planned=planned), written, moment)
        finally:
            written.extend(attempted)

    def _rescanned(self, job: PlannedDisk, written: list[str], moment: Moment) -> StoredDisk:
        """Store only what differs from the parent."""
        parent = job.disk.decision.parent
        assert parent is not None
        with chain_reader.checked(self.files, parent, job.planned.size) as content:
            return self._copied(job, written, moment, content)

    def _copied(
        self, job: PlannedDisk, written: list[str], moment: Moment, content: ChainContent | None = None
    ) -> StoredDisk:
        """Write the data file of the planned data; with `content`, only the data that differs from the chain."""
        began = time.monotonic()
        disk, planned = job.disk, job.planned
        self.progress.begin(disk.name, planned.totals.data)
        made = data_file_writer.DataFileMaker(
            self.files,
            f"{disk.name}.{self.point}",
            size=planned.size,
            cluster_size=planned.cluster_size,
            backing=disk.decision.parent.newest.entry.data.file if disk.decision.parent else None,
            level=self.request.level,
            written=written,
        )
        sink = made if content is None else Rescanned(content, made)
        _log.info("%s/%s: %s (%s)", self.request.machine, disk.name, disk.decision.way, disk.decision.reason)

        def advance(done: int) -> None:
            moment.require_kept()
            self.progress.advance(done)

        with made:
            found_zero = copier.copy_disk(planned, job.opened.disk, sink, self.request.copying, advance)
            data = made.finish(self.request.compression)
        if isinstance(sink, Rescanned):
            job = _with_difference(job, sink.differing)
        entry = self._entry(job.disk, job.planned, data, found_zero, moment.consistency)
        return StoredDisk(job.disk, entry, job.report(data.size, time.monotonic() - began))

    def _entry(self, disk: DecidedDisk, planned: Plan, data: DataFile, found_zero: int, consistency: str) -> DiskEntry:
        parent = disk.decision.parent
        totals = planned.totals
        return DiskEntry(
            name=disk.name,
            kind=disk.decision.kind,
            reason=disk.decision.reason,
            size=planned.size,
            identity=os.urandom(16).hex(),
            parent=None if parent is None else Parent(parent.newest.point, parent.newest.entry.identity),
            bitmap=BitmapRecord(
                disk.decision.read, disk.started, disk.granularity, disk.decision.claimed, disk.why_none
            ),
            data=data,
            bytes=ByteCounts(totals.dirty, totals.data, totals.zero, found_zero, data.size),
            source=SourceRecord(
                kind=disk.state.kind,
                path=disk.state.path,
                format=disk.state.format,
                consistency=consistency,
                qemu=disk.source.qemu_version(),
                lower=disk.state.lower,
                plaintext=disk.state.plaintext,
                trusted_data_file=disk.state.data_file_claim,
            ),
        )


def _draw() -> float:
    """Draw an unpredictable number from [0, 1), as random.SystemRandom does, whose module is slow to import."""
    return (int.from_bytes(os.urandom(7)) >> 3) * 2**-53


def _with_difference(job: PlannedDisk, differing: int) -> PlannedDisk:
    """Add to a rescan the number of bytes that differ from the parent."""
    disk = replace(job.disk, decision=job.disk.decision.with_difference(differing))
    planned = replace(job.planned, totals=replace(job.planned.totals, dirty=differing))
    return replace(job, disk=disk, planned=planned)
