"""
One backup of one machine, from the request to the published point.

The order of steps is the promise (design.md, "The bitmap's life"); N is the new point:

1. add N's bitmap, recording, and only then
2. fix the point in time: all the machine's images are locked before any byte is read; N's bitmap must be wholly clean
3. read through the old bitmap, store, fsync, publish N
4. remove the old bitmap and every other one of ours but N's; what cannot be removed is tried again next time

Nothing is ever cleared, so nothing can be cleared too early.  Killed at any instant, the next run tells from the names
alone what happened.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import backup
from backup import chain as chains
from backup import copier, datafile, decide, plan, qcow2
from backup.chain import Chain
from backup.decide import Claim, Decision, Sight
from backup.errors import BackupError, BitmapUnusable, Damaged, Interrupted, NotFound, SourceError, UsageError
from backup.manifest import (
    BitmapRecord,
    ByteCounts,
    DataFile,
    DiskEntry,
    Manifest,
    Parent,
    SourceRecord,
    new_point_id,
)
from backup.plan import Plan
from backup.progress import Progress
from backup.qemu.nbd import Export
from backup.repository import Contents, Machine, Repository
from backup.sources import Source

_log = logging.getLogger(__name__)

_SETTLE_TRIES = 5
"""How often a run begins again because a machine started between adding the bitmaps and locking the images."""


_NO_CLAIM = Claim(None, None)


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """One disk to back up.  `claim` is the user's word about a bitmap of someone else's server."""

    name: str
    source: Source
    claim: Claim = _NO_CLAIM


@dataclass(frozen=True, slots=True)
class Request:
    """
    What to back up and how.

    `family` names the bitmaps to keep (None: none); `level` is zstd's, None for no compression; `cluster_size` in bytes
    counts for fulls; `named_by_path` says that the machine's name was taken from the image's, not given.
    """

    machine: str
    disks: tuple[DiskRequest, ...]
    wanted: str
    family: str | None
    level: int | None = 1
    cluster_size: int = 64 << 10
    max_chain: int = 100
    check_zeroes: bool = True
    fallback: bool = True
    dry_run: bool = False
    named_by_path: bool = False
    copying: copier.Settings = field(default_factory=copier.Settings)

    @property
    def compression(self) -> str:
        """As the configuration and the manifest write it."""
        return "none" if self.level is None else f"zstd:{self.level}"


@dataclass(frozen=True, slots=True)
class DiskReport:
    """What was done, or on a dry run would be done, for one disk.  Bytes and seconds."""

    name: str
    kind: str
    reason: str
    size: int
    dirty_bytes: int
    data_bytes: int
    zero_bytes: int
    stored_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """What came of one machine's backup; `point` and `manifest` are None on a dry run."""

    machine: str
    point: str | None
    manifest: Path | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    disks: tuple[DiskReport, ...]


@dataclass(frozen=True, slots=True)
class _Disk:
    """One disk of a run: the request, what its source showed, and what was decided."""

    request: DiskRequest
    sight: Sight
    decision: Decision
    started: str | None
    """The bitmap that records since the new point, where one is started."""
    granularity: int | None = None
    """Bytes; of `started`, known once it is there."""

    @property
    def name(self) -> str:
        return self.request.name

    @property
    def source(self) -> Source:
        return self.request.source

    @property
    def asked(self) -> list[str]:
        """Bitmaps that must be readable through the export."""
        return [name for name in (self.decision.read, self.started) if name is not None]


@dataclass(frozen=True, slots=True)
class _Job:
    """A disk whose image is locked, and its plan; planning took so many seconds."""

    disk: _Disk
    export: Export
    planned: Plan
    seconds: float


def create(open_repository: Callable[[], Repository], request: Request, progress: Progress) -> Report:
    """
    Back up one machine.

    Parameters
    ----------
    open_repository : callable
        Opens the repository; for a real run it makes a missing one, for a dry run it pretends to.

    Raises
    ------
    BackupError
        Nothing was published, and nothing published before was touched.
    """
    repository = open_repository()
    machine = repository.machine(request.machine)
    if request.dry_run:
        return _Run(machine, machine.contents(), repository.identity, request, progress).rehearse()
    with machine.lock():
        contents = machine.contents()
        for name in machine.remove_leftovers(contents):
            _log.info("%s: removed %s, which no manifest names", request.machine, name)
        return _Run(machine, contents, repository.identity, request, progress).take()


class _Run:
    """One run: what is there, what is asked, and the steps."""

    def __init__(
        self, machine: Machine, contents: Contents, repository: str, request: Request, progress: Progress
    ) -> None:
        self.machine = machine
        self.contents = contents
        self.repository = repository
        self.request = request
        self.progress = progress
        self.started_at = datetime.now(UTC)
        self.point = self._new_point()
        self.published: Path | None = None
        self.warnings = [f"{name} is left out: {error.message}" for name, error in contents.damaged.items()]
        self.notes: list[str] = []

    def _new_point(self) -> str:
        return new_point_id(self.started_at, secrets.token_hex(4))

    def rehearse(self) -> Report:
        """Plan as a real run would, and change nothing."""
        disks = self._decided(start_bitmaps=False)
        with ExitStack() as locks:
            exports = self._opened(disks, locks)
            jobs = [self._plan(disk, export) for disk, export in zip(disks, exports, strict=True)]
        return self._report([job.disk for job in jobs], [_disk_report(job, 0, 0.0) for job in jobs])

    def take(self) -> Report:
        """
        Take the backup.

        A machine could start, write and stop between steps 1 and 2.  Then N's bitmap is not clean, or the image looks
        another, and both steps are done again.
        """
        for _ in range(_SETTLE_TRIES):
            try:
                report = self._attempt()
            except Interrupted as stopped:
                if self.published is not None:
                    stopped.hint = f"point {self.point} is published; what it replaces is removed by the next run"
                raise
            if report is not None:
                return report
            _log.info("%s: an image was written to before it was locked; once more", self.request.machine)
            # A copy of the image may hold this try's bitmap, which must not be taken for one of the next try's point.
            self.point = self._new_point()
        raise SourceError(
            f"the images of machine {self.request.machine} kept being written to while they were locked",
            hint="back up the machine while it is off",
        )

    def _attempt(self) -> Report | None:
        disks = self._decided(start_bitmaps=True)
        try:
            for disk in disks:
                if disk.started is not None:
                    disk.source.start_bitmap(disk.started)
            with ExitStack() as locks:
                exports = self._opened(disks, locks)
                settled = [_settled(disk, export) for disk, export in zip(disks, exports, strict=True)]
                held = [disk for disk in settled if disk is not None]
                reports = None
                if len(held) == len(disks):
                    jobs = [self._plan(disk, export) for disk, export in zip(held, exports, strict=True)]
                    disks = [job.disk for job in jobs]
                    reports = self._store_and_publish(jobs)
        finally:
            if self.published is None:
                _forget(disks)
        if reports is None:
            return None
        self._retire(disks)
        return self._report(disks, reports)

    def _decided(self, *, start_bitmaps: bool) -> list[_Disk]:
        disks = [self._decide(disk, start_bitmaps=start_bitmaps) for disk in self.request.disks]
        for disk in disks:
            self._require_allowed(disk)
        return disks

    def _require_allowed(self, disk: _Disk) -> None:
        if disk.decision.fallback and not self.request.fallback:
            raise BitmapUnusable(
                f"disk {disk.name} of machine {self.request.machine} needs a full: {disk.decision.reason}",
                hint="run it without --no-fallback, or run `pybackup full`",
            )

    def _decide(self, disk: DiskRequest, *, start_bitmaps: bool) -> _Disk:
        newest = chains.newest_manifest(self.contents.manifests.values(), disk.name)
        _check_claim(disk, newest, self.contents)
        if newest is not None:
            _check_format(disk, newest)
        sight = disk.source.look()
        if self.request.named_by_path:
            _check_path(disk, sight, self.contents)
        image = qcow2.Image(sight.size, self.request.cluster_size, None, zstd=self.request.level is not None)
        qcow2.require_writable(image)
        decision = decide.decide(
            self.request.wanted,
            sight,
            None if newest is None else self._last_chain(newest.point, disk.name),
            family=self.request.family,
            short_id=self._short_id,
            max_chain=self.request.max_chain,
            claim=disk.claim,
        )
        starts = start_bitmaps and self.request.family and disk.source.why_no_bitmap(sight) is None
        started = decide.bitmap_name(self.request.family or "", self._short_id, self.point) if starts else None
        return _Disk(disk, sight, decision, started)

    @property
    def _short_id(self) -> str:
        return self.repository[:8]

    def _last_chain(self, point: str, disk: str) -> Chain | BackupError:
        """The chain of the disk's newest point, its files looked at; or what is wrong with it."""
        try:
            chain = chains.build(self.contents.manifests, point, disk, self.contents.damaged)
            with datafile.peeked(self.machine.path, chain):
                return chain
        except BackupError as error:
            return error

    def _opened(self, disks: Sequence[_Disk], locks: ExitStack) -> list[Export]:
        lanes = self.request.copying.connections
        return [locks.enter_context(disk.source.opened(disk.sight, disk.asked, lanes)) for disk in disks]

    def _store_and_publish(self, jobs: Sequence[_Job]) -> list[DiskReport]:
        written: list[Path] = []
        try:
            stored = [self._store(job, written) for job in jobs]
            self.published = self.machine.publish(self._manifest([entry for entry, _ in stored]))
        except BaseException:
            # What a kill leaves here, the next run removes; a failure tidies up at once.  The manifest may have its
            # name already (a signal, just then) and goes first: a point must not lose its files.
            self.published = None
            with suppress(OSError):
                for path in (self.machine.path / f"{self.point}.json", *written):
                    path.unlink(missing_ok=True)
            raise
        return [report for _, report in stored]

    def _store(self, job: _Job, written: list[Path]) -> tuple[DiskEntry, DiskReport]:
        began = time.monotonic()
        disk, planned = job.disk, job.planned
        self.progress.begin(disk.name, planned.totals.data)
        made = datafile.DataFileMaker(
            self.machine.path,
            f"{disk.name}.{self.point}",
            size=planned.size,
            cluster_size=planned.cluster_size,
            backing=disk.decision.parent.newest.entry.data.file if disk.decision.parent else None,
            level=self.request.level,
            mode=self.machine.modes.file,
            written=written,
        )
        _log.info("%s/%s: %s (%s)", self.request.machine, disk.name, disk.decision.kind, disk.decision.reason)
        with made, job.export.lanes(self.request.copying.connections) as lanes:
            found_zero = copier.copy(
                planned,
                lanes,
                made,
                self.request.copying,
                max_request=job.export.max_request,
                progress=self.progress.advance,
            )
            data = made.finish(self.request.compression)
        entry = self._entry(disk, planned, data, found_zero)
        return entry, _disk_report(job, data.size, time.monotonic() - began)

    def _plan(self, disk: _Disk, export: Export) -> _Job:
        began = time.monotonic()
        parent = disk.decision.parent
        planned: Plan | Decision | None = None
        if parent is not None and disk.decision.read is not None:
            planned = self._plan_incremental(disk.decision.read, export, parent)
        if isinstance(planned, Decision):
            disk = replace(disk, decision=planned)
            self._require_allowed(disk)
        if not isinstance(planned, Plan):
            planned = plan.plan_full(export, self.request.cluster_size)
        return _Job(disk, export, planned, time.monotonic() - began)

    def _plan_incremental(self, bitmap: str, export: Export, parent: Chain) -> Plan | Decision:
        """The plan; or a decision for a full, where planning shows what no name did."""
        try:
            with datafile.peeked(self.machine.path, parent) as index:
                planned = plan.plan_incremental(
                    export,
                    parent.cluster_size,
                    bitmap,
                    parent_size=parent.size,
                    chain=index if self.request.check_zeroes else None,
                )
        except (Damaged, NotFound) as error:  # of the chain: a source's errors are others
            return decide.broken(error)
        return decide.distrust(bitmap, planned.totals.missed) if planned.totals.missed else planned

    def _manifest(self, entries: Sequence[DiskEntry]) -> Manifest:
        return Manifest(
            point=self.point,
            sequence=self.machine.next_sequence(self.contents),
            machine=self.request.machine,
            repository=self.repository,
            started=_timestamp(self.started_at),
            finished=_timestamp(datetime.now(UTC)),
            program=f"pybackup {backup.__version__}",
            disks=tuple(entries),
        )

    def _entry(self, disk: _Disk, planned: Plan, data: DataFile, found_zero: int) -> DiskEntry:
        parent = disk.decision.parent
        totals = planned.totals
        return DiskEntry(
            name=disk.name,
            kind=disk.decision.kind,
            reason=disk.decision.reason,
            size=planned.size,
            identity=secrets.token_hex(16),
            parent=None if parent is None else Parent(parent.newest.point, parent.newest.entry.identity),
            bitmap=BitmapRecord(disk.decision.read, disk.started, disk.granularity, disk.decision.claimed),
            data=data,
            bytes=ByteCounts(totals.dirty, totals.data, totals.zero, found_zero, data.size),
            source=SourceRecord(
                kind=disk.sight.kind,
                path=disk.sight.path,
                format=disk.sight.format,
                consistency="crash",
                qemu=disk.source.qemu_version(),
                lower=disk.sight.lower,
            ),
        )

    def _retire(self, disks: Sequence[_Disk]) -> None:
        """Step 4: N is published, so that its bitmap alone is needed."""
        for disk in disks:
            if disk.source.owns_bitmaps:
                names = [bitmap.name for bitmap in disk.sight.bitmaps]
                for name in decide.own_bitmaps(names, self._short_id, keep=disk.started):
                    try:
                        disk.source.remove_bitmap(name)
                    except BackupError as error:
                        self.warnings.append(f"disk {disk.name}: bitmap {name} could not be removed: {error.message}")

    def _report(self, disks: Sequence[_Disk], reports: Sequence[DiskReport]) -> Report:
        for disk in disks:
            if disk.decision.fallback:
                self.warnings.append(f"disk {disk.name}: full instead of incremental: {disk.decision.reason}")
            self.notes.extend(_note(disk, self.request.family))
        return Report(
            machine=self.request.machine,
            point=None if self.published is None else self.point,
            manifest=self.published,
            warnings=tuple(self.warnings),
            notes=tuple(self.notes),
            disks=tuple(reports),
        )


def _note(disk: _Disk, family: str | None) -> list[str]:
    why_not = disk.source.why_no_bitmap(disk.sight)
    if not disk.source.owns_bitmaps:
        return []
    if family is None:
        return [f"disk {disk.name}: no bitmap was named, so none is started: the next backup is a full (--bitmap NAME)"]
    if why_not is not None:
        return [f"disk {disk.name}: bitmap {family} cannot be started: {why_not}"]
    return []


def _settled(disk: _Disk, export: Export) -> _Disk | None:
    """Under the lock: the disk, if all is as it was when we decided and N's bitmap is wholly clean."""
    if not disk.source.owns_bitmaps:
        return disk
    now = disk.source.look()
    before = replace(now, bitmaps=tuple(bitmap for bitmap in now.bitmaps if bitmap.name != disk.started))
    if before != disk.sight:
        return None
    bitmap = now.bitmap(disk.started) if disk.started is not None else None
    if bitmap is None:
        return disk if disk.started is None else None
    return None if plan.any_dirty(export, bitmap.name) else replace(disk, granularity=bitmap.granularity)


def _forget(disks: Sequence[_Disk]) -> None:
    """Remove N's bitmaps: the point was not made.  What stays behind, the next run's step 4 removes."""
    for disk in disks:
        if disk.started is not None:
            with suppress(BackupError):
                if disk.source.look().bitmap(disk.started) is not None:
                    disk.source.remove_bitmap(disk.started)


def _check_claim(disk: DiskRequest, newest: Manifest | None, contents: Contents) -> None:
    since = disk.claim.since
    if since is None or (newest is not None and newest.point == since):
        return
    if newest is None or since not in contents.manifests:
        newest_point = "it has none at all" if newest is None else f"its newest is {newest.point}"
        raise NotFound(f"disk {disk.name} has no point {since}: {newest_point}", hint="without --since a full is taken")
    raise UsageError(
        f"--since {since} is not the newest point of disk {disk.name}, which is {newest.point}",
        hint="a chain grows only at its end; without --since a full is taken",
    )


def _check_format(disk: DiskRequest, newest: Manifest) -> None:
    """
    Refuse a raw image that has become a qcow2, and a qcow2 that has lost its header.

    A guest can write a qcow2 header, with any backing file of the host, into its raw disk; so this is asked before QEMU
    opens the image and the files that its header names.
    """
    entry = newest.disk(disk.name)
    assert entry is not None
    guessed = disk.source.guessed_format()
    if entry.source.kind != "image" or guessed is None or guessed == entry.source.format:
        return
    if guessed == "raw":
        raise SourceError(
            f"the image of disk {disk.name} was a qcow2 at point {newest.point} and has no qcow2 header now",
            hint="it is damaged, or was converted: then say --image-format raw (`format:` in the configuration)",
        )
    raise UsageError(
        f"the image of disk {disk.name} was raw at point {newest.point} and begins with a qcow2 header now",
        hint="say --image-format raw, or qcow2 if it was converted (`format:` in the configuration)",
    )


def _check_path(disk: DiskRequest, sight: Sight, contents: Contents) -> None:
    """A machine's name that was taken from the image's must not bring two machines into one folder."""
    newest = chains.newest_manifest(contents.manifests.values(), disk.name)
    newest = newest or chains.newest_manifest(contents.manifests.values())
    if newest is None:
        return
    recorded = [entry.source.path for entry in newest.disks if entry.name == disk.name or not newest.disk(disk.name)]
    if sight.path not in recorded:
        raise UsageError(
            f"machine {newest.machine} was backed up from {recorded[0]}, and this is {sight.path}",
            hint=f"name the machine: --machine {newest.machine} if it is the same one, another name if it is not",
        )


def _disk_report(job: _Job, stored: int, seconds: float) -> DiskReport:
    return DiskReport(
        name=job.disk.name,
        kind=job.disk.decision.kind,
        reason=job.disk.decision.reason,
        size=job.planned.size,
        dirty_bytes=job.planned.totals.dirty,
        data_bytes=job.planned.totals.data,
        zero_bytes=job.planned.totals.zero,
        stored_bytes=stored,
        seconds=round(job.seconds + seconds, 3),
    )


def _timestamp(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"
