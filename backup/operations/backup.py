"""
One backup of one machine, from the request to the published point.

The order of the steps is the promise (docs/design.md, "The bitmap's life").  N is the new point:

1. Add N's bitmap, which records from then on.
2. Only then fix the instant: lock all images of the machine before any byte is read; N's bitmap must still be clean.
3. Read what the old bitmap calls dirty, check some of what it calls clean, store, fsync, and publish N.
4. Remove the old bitmap and all other bitmaps of this repository but N's; the next run retries what cannot be removed.

No bitmap is ever cleared, so that none can be cleared too early.  Whenever a run is killed, the names of the bitmaps
tell the next run what happened.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import backup
from backup.errors import BackupError, BitmapUnusable, Interrupted, SourceError, UsageError
from backup.model.disk import DiskState, bitmap_name, own_bitmaps
from backup.model.manifest import DiskEntry, MachineFile, Manifest, machine_file_name, new_point_id, timestamp
from backup.operations.preflight import DecidedDisk, expect_bitmaps, known_name, preflight, recognised
from backup.operations.request import Request
from backup.planning import decision as decide
from backup.planning.decision import Decision, Refusal
from backup.qemu.images import RAW
from backup.repository import machine_files
from backup.repository.machine import Contents, Machine, manifest_name
from backup.repository.opened_chain import examine
from backup.repository.replacement import settle
from backup.repository.repository import Repository
from backup.runtime import meanwhile
from backup.runtime.ignoring import ignoring
from backup.runtime.progress import Progress
from backup.sources.base import DiskRequest, Moment, Moved, NotStarted

if TYPE_CHECKING:
    from backup.operations.disk_copy import DiskCopies, DiskReport, PlannedDisk, StoredDisk

_log = logging.getLogger(__name__)

_NEEDED_LATER = ("numpy", "backup.qcow2", "backup.nbd.export", "backup.operations.disk_copy")
"""What copies disks, and takes long to import: that is done while the run waits for QEMU's programs and for libvirt."""

_SETTLE_TRIES = 5
"""How often a run starts again because a machine started between step 1 and step 2."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one machine's backup; `point` and `manifest` are None on a dry run."""

    machine: str
    point: str | None
    manifest: str | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    disks: tuple[DiskReport, ...]


def create(open_repository: Callable[[], Repository], request: Request, progress: Progress) -> Report:
    """
    Back up one machine.

    Parameters
    ----------
    open_repository : callable
        Opens the repository.  Each machine opens it anew: its disk may be gone since the machine before.

    Raises
    ------
    BackupError
        Nothing was published, and nothing published before was touched.
    """
    request.require_available()  # before the name of the machine, which may be the reason
    repository = open_repository()
    _require_first(repository)
    machine = repository.machine(request.machine)
    if not machine.exists():
        _require_sources(machine, repository.id, request, progress)
    if request.dry_run:
        with request.host:
            meanwhile.leave_imports(_NEEDED_LATER)
            # A rehearsal, too, warns of a broken chain.
            return examine(
                machine,
                lambda contents: _Backup(machine, contents, repository.id, request.complete(), progress).rehearse(),
                doubtful=lambda report: bool(report.warnings),
            )
    run: _Backup | None = None
    try:
        with machine.lock(), request.host:
            meanwhile.leave_imports(_NEEDED_LATER)
            contents = settle(machine)
            run = _Backup(machine, contents, repository.id, request.complete(), progress)
            removed = request.host.recover(repository.ownership(request.machine))
            if removed:
                run.notes.append(f"removed from QEMU what an interrupted run had left: {', '.join(removed)}")
            return run.take()
    except Interrupted as stopped:
        stopped.hint = _after_stop(request.machine, run)
        raise


def _require_sources(machine: Machine, repository: str, request: Request, progress: Progress) -> None:
    """
    Make sure that the disks of a new machine can be opened and backed up, before the machine's folder is made.

    A mistyped image must leave no machine in the repository.
    """
    with request.host:
        _Backup(machine, Contents({}, {}), repository, request.complete(), progress).require_disks()


def _after_stop(machine: str, run: _Backup | None) -> str:
    """Tell the user what a run that a signal stopped has left."""
    if run is not None and run.published is not None:
        return f"point {run.point} is published; the next run removes the bitmaps that it replaces"
    return f"no point of machine {machine} was published, and the earlier points are untouched; run the command again"


def _require_first(repository: Repository) -> None:
    """Refuse a second place that takes only copies, before anything is done to a disk."""
    if not repository.storage.traits.rewritable:
        what = "sealed" if repository.sealed else "a bucket"
        raise UsageError(
            f"{repository.location} is {what}, and takes only copies of points",
            hint="back up to a plain repository in a folder, and copy its points there",
        )


class _Backup:
    """One backup of one machine: its contents, the request, and the steps."""

    def __init__(
        self, machine: Machine, contents: Contents, repository: str, request: Request, progress: Progress
    ) -> None:
        self.machine = machine
        self.contents = contents
        self.repository = repository
        self.request = request
        self.notes: list[str] = []
        self.progress = progress
        self.started_at = datetime.now(UTC)
        self.point = self._new_point()
        self.published: str | None = None
        self.warnings = [f"{name} is left out: {error.message}" for name, error in contents.damaged.items()]
        self.refusals: dict[str, Refusal] = {}
        """By the disk's name: why its bitmap could not be started in an earlier attempt of this run."""

    def _new_point(self) -> str:
        return new_point_id(self.started_at, os.urandom(4).hex())

    def require_disks(self) -> None:
        """
        Inspect all disks, and change nothing.

        Raises
        ------
        BackupError
            A disk cannot be backed up.
        """
        self._decided(start_bitmaps=False)

    def rehearse(self) -> Report:
        """Plan as a real run would, and change nothing."""
        self._recognise()
        disks = self._decided(start_bitmaps=False)
        with self._instant(disks) as moment:
            jobs = self._copies().plan_all(disks, moment)
            moment.require_sound()
        return self._report([job.disk for job in jobs], [job.report(0, 0.0) for job in jobs], moment)

    def take(self) -> Report:
        """
        Take the backup.

        A machine can start, write and stop between steps 1 and 2.  Then N's bitmap is not clean, or the image has
        changed, and both steps are repeated.  They are also repeated if a bitmap could not be started: a disk without
        room for a bitmap is backed up without one.
        """
        self._recognise()
        moves = 0
        while moves < _SETTLE_TRIES:
            try:
                return self._attempt()
            except Moved as moved:
                _log.info("%s: %s; trying again", self.request.machine, moved.message)
                moves += 1
            except NotStarted as refused:  # at most twice for each disk
                _log.info("%s: %s; trying again", self.request.machine, refused.message)
            # A copy of the image may hold this attempt's bitmap, which must not pass for the next attempt's.
            self.point = self._new_point()
        raise SourceError(
            f"the disks of machine {self.request.machine} kept changing between their inspection and their backup",
            hint="an image must not be written to while it is backed up: back up the machine while it is off",
        )

    def _recognise(self) -> None:
        """
        Give the disks the names by which the machine's points know them, and warn of disks that are missing.

        That may ask QEMU, and so comes after the host has thawed a guest that an earlier run left frozen.
        """
        self.request, notes = recognised(self.request, self.contents)
        self.notes.extend(notes)
        self.warnings.extend(self._vanished())

    def _attempt(self) -> Report:
        disks = self._decided(start_bitmaps=True)
        try:
            with self._instant(disks) as moment:
                copies = self._copies()
                stored = self._store_and_publish(copies, copies.plan_all(disks, moment), moment)
        except NotStarted as refused:
            self._refused(disks[refused.number], refused)
            raise
        finally:
            if self.published is None:
                _forget(disks)
        disks = [done.disk for done in stored]
        self._retire(disks)
        return self._report(disks, [done.report for done in stored], moment)

    def _refused(self, disk: DecidedDisk, refused: NotStarted) -> None:
        """
        Remember why a disk gets no bitmap.

        If the attempt made bitmaps of this repository inconsistent, their removal may leave room for a second attempt.
        """
        earlier = self.refusals.get(disk.name)
        lost = disk.decision.read if earlier is None else earlier.lost
        again = earlier is None and not refused.lasting and self._removed_inconsistent(disk)
        self.refusals[disk.name] = Refusal(refused.why, refused.lasting, lost, final=not again)

    def _removed_inconsistent(self, disk: DecidedDisk) -> bool:
        """Remove this repository's inconsistent bitmaps, which no point can use; tell whether there were any."""
        try:
            inconsistent = [bitmap.name for bitmap in disk.source.inspect().bitmaps if bitmap.inconsistent]
            useless = own_bitmaps(inconsistent, self._short_id, keep=None)
            for name in useless:
                disk.source.remove_bitmap(name)
        except BackupError as error:
            _log.info("%s/%s: %s", self.request.machine, disk.name, error.message)
            return False
        return bool(useless)

    def _instant(self, disks: Sequence[DecidedDisk]) -> AbstractContextManager[Moment]:
        return self.request.host.instant(
            [disk.capture for disk in disks],
            self.request.copying.connections,
            point=self.point,
            # A dry run's names belong to no repository, so that the next run of any repository may remove what it left.
            short_id="0" * 8 if self.request.dry_run else self._short_id,
            repository=self.machine.files.local_folder(),
        )

    def _decided(self, *, start_bitmaps: bool) -> list[DecidedDisk]:
        for request in self.request.disks:
            expect_bitmaps(request, self.contents, self.request.bitmap_family, self._short_id)
        disks = [self._decide(disk, start_bitmaps=start_bitmaps) for disk in self.request.disks]
        for disk in disks:
            self._require_allowed(disk)
        return disks

    def _require_allowed(self, disk: DecidedDisk) -> None:
        name = f"disk {disk.name} of machine {self.request.machine}"
        if disk.decision.first and not self.request.begin:
            raise BitmapUnusable(
                f"{name} has no point yet, and needs a full",
                hint="run it without --no-fallback once, or run `pybackup full`",
            )
        if disk.decision.fallback and not self.request.fallback:
            raise BitmapUnusable(
                f"{name} needs a {disk.decision.way}: {disk.decision.reason.removeprefix('rescan: ')}",
                hint="run it without --no-fallback, or run `pybackup rescan` or `pybackup full`",
            )

    def _redecided(self, disk: DecidedDisk, decision: Decision) -> DecidedDisk:
        """Return the disk with a new decision, after planning or copying showed that the first one does not work."""
        changed = replace(disk, decision=decision)
        self._require_allowed(changed)
        self._require_writable(disk.state, decision)
        return changed

    def _decide(self, disk: DiskRequest, *, start_bitmaps: bool) -> DecidedDisk:
        refusal = self.refusals.get(disk.name)
        seen = preflight(self.machine, self.contents, self.request, disk, self._short_id, refusal=refusal)
        state, decision = seen.state, seen.decision
        self._require_writable(state, decision)
        given_up = refusal if refusal is not None and refusal.final else None
        never = disk.source.why_no_bitmap(state)
        why_none = never or (given_up.why if given_up else None)
        starts = start_bitmaps and self.request.bitmap_family and why_none is None
        wanted = self.request.bitmap_family and state.owns_bitmaps
        return DecidedDisk(
            disk,
            state,
            decision,
            started=bitmap_name(self.request.bitmap_family or "", self._short_id, self.point) if starts else None,
            why_none=why_none if wanted else None,
            warned=why_none is not None
            and (given_up is None or given_up.lasting)
            and decide.warned(self._entries(disk.name, state.kind), why_none, refused=given_up is not None),
            refused=given_up is not None,
        )

    def _entries(self, disk: str, kind: str) -> list[DiskEntry]:
        """Return the disk's entries that were read from this kind of source, oldest first."""
        entries = [entry for manifest in self._by_age() if (entry := manifest.disk(disk)) is not None]
        return [entry for entry in entries if entry.source.kind == kind]

    def _by_age(self) -> list[Manifest]:
        """Return the machine's manifests, oldest first."""
        return sorted(self.contents.manifests.values(), key=lambda manifest: manifest.sequence)

    def _require_writable(self, state: DiskState, decision: Decision) -> None:
        """Refuse a disk that no data file can hold; a chain keeps its cluster size, a full takes the configured one."""
        from backup import qcow2  # noqa: PLC0415 - see `_NEEDED_LATER`

        parent = decision.parent
        cluster_size = self.request.cluster_size if parent is None else parent.cluster_size
        qcow2.require_writable(qcow2.Image(state.size, cluster_size, None, zstd=self.request.level is not None))

    @property
    def _short_id(self) -> str:
        return self.repository[:8]

    def _copies(self) -> DiskCopies:
        from backup.operations.disk_copy import DiskCopies  # noqa: PLC0415 - see `_NEEDED_LATER`

        return DiskCopies(self.machine.files, self.request, self.point, self.progress, self._redecided, self.warnings)

    def _store_and_publish(self, copies: DiskCopies, jobs: Sequence[PlannedDisk], moment: Moment) -> list[StoredDisk]:
        written: list[str] = []
        try:
            stored = [copies.store(job, written, moment) for job in jobs]
            files = [self._store_file(role, content, written) for role, content in moment.machine.files.items()]
            moment.require_sound()
            self.published = self.machine.publish(self._manifest([done.entry for done in stored], files))
        except BaseException:
            # After a kill the next run removes the files; after a failure they are removed at once.  The manifest may
            # have its name already (a signal came just then) and goes first: a point must not lose its files.
            self.published = None
            with ignoring(_log, "removing the files of a point that was not published", OSError):
                for name in (manifest_name(self.point), *written):
                    self.machine.files.discard(name)
            raise
        return stored

    def _store_file(self, role: str, content: bytes, written: list[str]) -> MachineFile:
        written.append(machine_file_name(role, self.point))  # first: a signal may come as soon as the file exists
        return machine_files.store(self.machine.files, role, self.point, content)

    def _manifest(self, entries: Sequence[DiskEntry], files: Sequence[MachineFile]) -> Manifest:
        return Manifest(
            point=self.point,
            sequence=self.machine.next_sequence(self.contents),
            machine=self.request.machine,
            repository=self.repository,
            started=timestamp(self.started_at),
            finished=timestamp(datetime.now(UTC)),
            program=f"pybackup {backup.__version__}",
            disks=tuple(entries),
            machine_files=tuple(files),
        )

    def _retire(self, disks: Sequence[DecidedDisk]) -> None:
        """
        Step 4: remove this repository's other bitmaps, since N is published and needs only its own.

        An image that refused the new bitmap is not changed: QEMU would store all bitmaps again, also those of other
        programs, and may lose them where it has no room.  A later run removes this repository's.
        """
        retired = [(disk, self._replaced(disk)) for disk in disks if disk.state.owns_bitmaps and not disk.refused]
        for disk, names in retired:
            disk.source.expect_removal(names)
        for disk, names in retired:
            for name in names:
                try:
                    disk.source.remove_bitmap(name)
                except BackupError as error:
                    self.warnings.append(f"disk {disk.name}: bitmap {name} could not be removed: {error.message}")
                    self.warnings.extend(self._lost(disk))

    def _replaced(self, disk: DecidedDisk) -> list[str]:
        """Return the names of this repository's bitmaps of a disk, without the one that was started."""
        return own_bitmaps((bitmap.name for bitmap in disk.state.bitmaps), self._short_id, keep=disk.started)

    def _lost(self, disk: DecidedDisk) -> list[str]:
        """Warn that the new bitmap is gone, if QEMU lost it while it stored all bitmaps of the image again."""
        if disk.started is None:
            return []
        try:
            bitmap = disk.source.inspect().bitmap(disk.started)
        except BackupError as error:
            _log.info("%s/%s: %s", self.request.machine, disk.name, error.message)
            return []
        if bitmap is not None and bitmap.recording and not bitmap.inconsistent:
            return []
        return [f"disk {disk.name}: the new bitmap was lost; the next backup is a {self.request.unusable}"]

    def _known_otherwise(self, disk: DecidedDisk) -> list[str]:
        """Warn if the points of the machine seem to know a disk without a point under another name."""
        manifests = self.contents.manifests
        known = known_name(manifests, disk.name, disk.state.path, given=True)
        if known != disk.name:  # which only a name of the configuration can be
            return [f"disk {disk.name}: {disk.state.path} was disk {known} until now, and a new chain begins"]
        names = {bitmap.name for bitmap in disk.state.bitmaps}
        last = {entry.name: entry for manifest in self._by_age() for entry in manifest.disks}
        moved = [entry.name for entry in last.values() if entry.bitmap.started in names]
        if not moved:
            return []
        why = (
            f"a new chain begins, and its image has the bitmap of disk {moved[0]}'s newest point; if the image was "
            f"moved, name the disk {moved[0]} again"
        )
        return [f"disk {disk.name}: {why}"]

    def _vanished(self) -> list[str]:
        """Warn once of each disk that the machine has lost: the disk is in the last point, and not in this one."""
        points = self._by_age()
        read = {disk.name for disk in self.request.disks}
        gone = [disk for disk in points[-1].disks if disk.name not in read] if points else []
        return [
            f"disk {disk.name} ({disk.source.path}) is in point {points[-1].point}, the last one, and not in this one: "
            "the machine has no such disk any more"
            for disk in gone
            if self.request.host.lacks(disk.name, disk.source.path)
        ]

    def _report(self, disks: Sequence[DecidedDisk], reports: Sequence[DiskReport], moment: Moment) -> Report:
        self.warnings.extend((*moment.warnings, *moment.machine.warnings))
        self.notes.extend((*moment.notes, *moment.machine.notes))
        for disk in disks:
            if disk.decision.fallback and not (disk.decision.unavoidable and disk.warned):
                why = disk.decision.reason.removeprefix("rescan: ")
                self.warnings.append(f"disk {disk.name}: {disk.decision.way} instead of {self.request.wanted}: {why}")
            if disk.decision.first:
                self.warnings.extend(self._known_otherwise(disk))
            if disk.refused and not disk.warned:
                then = f"the next backup is a {self.request.unusable}"
                self.warnings.append(f"disk {disk.name}: no bitmap was started: {disk.why_none}; {then}")
            if disk.started is not None and disk.decision.kind == decide.FULL and disk.state.volatile:
                then = f"the first backup after a restart of the machine is a {self.request.unusable}"
                self.warnings.append(f"disk {disk.name}: {disk.state.volatile}, so that {then}")
            self.notes.extend(_note(disk, self.request))
        return Report(
            machine=self.request.machine,
            point=None if self.published is None else self.point,
            manifest=self.published,
            warnings=tuple(self.warnings),
            notes=tuple(self.notes),
            disks=tuple(reports),
        )


def _note(disk: DecidedDisk, request: Request) -> list[str]:
    family = request.bitmap_family
    if not disk.state.owns_bitmaps:
        return []
    if family is None:
        why = f"no bitmap was named, so none is started: the next backup is a {request.unusable} (--bitmap NAME)"
        return [f"disk {disk.name}: {why}"]
    if disk.why_none is not None and not disk.refused and not disk.warned:
        return [f"disk {disk.name}: bitmap {family} cannot be started: {disk.why_none}{_remedy(disk.state)}"]
    return []


def _remedy(state: DiskState) -> str:
    """Say how the user can have incrementals of a disk without bitmaps, if there is a way; else nothing."""
    if state.data_file is not None and not state.trusts_data_file:
        return "; if nothing writes to that file except through the image: --trust-data-file (`trust_data_file: true`)"
    if state.no_bitmaps is not None and state.format == RAW:
        return "; docs/raw-disks.md shows how a raw disk has incrementals"
    return ""


def _forget(disks: Sequence[DecidedDisk]) -> None:
    """Remove N's bitmaps, since the point was not made; step 4 of the next run removes what stays."""
    for disk in disks:
        if disk.started is not None:
            with ignoring(_log, f"removing the bitmap of disk {disk.name}", BackupError):
                if disk.source.inspect().bitmap(disk.started) is not None:
                    disk.source.remove_bitmap(disk.started)
