"""
An audit: compare one instant of a machine's disks with their newest points.

    clean in the bitmap   compared with the chain: a difference means that the chain or the bitmap is wrong
    dirty in the bitmap   left out: the data has changed, and the next backup stores it
    no usable bitmap      everything is compared: without a difference the chain is right; otherwise the differences may
                          be changes or errors, and are listed

An audit changes nothing: it starts and removes no bitmap, and writes no file of the repository.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from backup.engine import compare
from backup.engine.compare import Differences
from backup.errors import Damaged, NotFound, SourceError
from backup.model import chain as chains
from backup.model.chain import Chain
from backup.operations.preflight import expect_bitmaps, preflight, recognised
from backup.operations.request import Names, Request
from backup.planning import decision, plan
from backup.planning.plan import Plan
from backup.repository import chain_reader, salvage
from backup.repository.machine import Contents, Machine
from backup.repository.repository import Repository
from backup.runtime.progress import Progress
from backup.sources.base import Capture, DiskRequest, Moment, Moved, Opened

TRUE, LIES, UNKNOWN = "true", "lies", "unknown"
"""Verdicts: no error; clean data differs, an error; data differs that may have changed since the point."""

_TRIES = 5
"""How often an audit starts again because a disk changed between its inspection and its instant."""
_UNBOUNDED = 1 << 62


@dataclass(frozen=True, slots=True)
class DiskAudit:
    """
    The result of the audit of one disk.  Bytes and seconds.

    `point` is the disk's newest point.  `bitmap` is the exact name of the bitmap that was used; without one, `why` says
    why.  `dirty_bytes` were left out: they are dirty in the bitmap, or the disk has grown by them.  `read_bytes`
    were read; all others are zero on both sides.  `differences` are starts and ends of whole sectors of 512 bytes,
    ascending and not adjacent; `complete`: no difference is missing in them.
    """

    name: str
    point: str
    bitmap: str | None
    why: str | None
    size: int
    point_size: int
    dirty_bytes: int
    read_bytes: int
    differing_bytes: int
    differences: tuple[tuple[int, int], ...]
    complete: bool
    seconds: float

    @property
    def verdict(self) -> str:
        """TRUE, LIES or UNKNOWN."""
        if self.bitmap is not None:
            return LIES if self.differing_bytes else TRUE
        return UNKNOWN if self.differing_bytes or self.size != self.point_size else TRUE


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of the audit of one machine."""

    machine: str
    disks: tuple[DiskAudit, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Disk:
    """A disk to be audited; `why` says why no bitmap can be used."""

    request: DiskRequest
    capture: Capture
    chain: Chain
    why: str | None


def audit(repository: Repository, request: Request, progress: Progress) -> Audit:
    """
    Audit one machine.  Only the machine, its disks, the bitmap family and `copying` of the request are used.

    Raises
    ------
    NotFound
        A disk has no point.
    NotFound, Damaged
        A file of a chain is missing or damaged.
    SourceError
        A disk cannot be read.
    """
    request.require_available()
    machine = repository.machine(request.machine)
    if not machine.exists():
        raise NotFound(
            f"the repository {repository.location} has no machine {request.machine!r}",
            hint=f"it has: {', '.join(repository.machine_names()) or 'none'}",
        )
    # Locked although nothing is written: a simultaneous backup would remove the bitmap, or find the disks in use.
    with machine.lock(), request.host:
        run = _Audit(machine, repository.id[:8], request.complete(), progress)
        for _ in range(_TRIES):
            try:
                return run.attempt()
            except Moved:
                continue
    raise SourceError(
        f"the disks of machine {request.machine} kept changing between their inspection and their audit",
        hint="run the command again",
    )


class _Audit:
    """One audit of one machine: its contents, and the steps."""

    def __init__(self, machine: Machine, short_id: str, request: Request, progress: Progress) -> None:
        self.machine = machine
        self.short_id = short_id
        self.progress = progress
        self.contents: Contents = machine.contents()
        # A disk that the user names must have a point under that name.
        self.request = request if request.names is Names.GIVEN else recognised(request, self.contents)[0]

    def attempt(self) -> Audit:
        for disk in self.request.disks:
            expect_bitmaps(disk, self.contents, self._family(disk.name), self.short_id)
        disks = [self._prepared(disk) for disk in self.request.disks]
        with self._instant(disks) as moment:
            audits = [self._audited(disk, opened, moment) for disk, opened in zip(disks, moment.disks, strict=True)]
            moment.require_sound()  # otherwise the differences would belong to no instant
        left_out = [f"{name} is left out: {error.message}" for name, error in self.contents.damaged.items()]
        return Audit(self.machine.name, tuple(audits), (*left_out, *moment.warnings))

    def _instant(self, disks: Sequence[_Disk]) -> AbstractContextManager[Moment]:
        return self.request.host.instant(
            [disk.capture for disk in disks],
            self.request.copying.connections,
            point=f"audit-{os.urandom(4).hex()}",
            short_id="0" * 8,  # of no repository: the next run of any one may remove what a killed audit left
            repository=None,
        )

    def _prepared(self, disk: DiskRequest) -> _Disk:
        asked = replace(
            self.request,
            wanted=decision.INCREMENTAL,
            unusable=decision.RESCAN,
            max_chain=_UNBOUNDED,
            bitmap_family=self._family(disk.name),
        )
        seen = preflight(self.machine, self.contents, asked, disk, self.short_id)
        if seen.last is None:
            raise NotFound(
                f"disk {disk.name} of machine {self.machine.name} has no point to compare with",
                hint="take a backup first; `pybackup list` shows the points of each machine",
            )
        if not isinstance(seen.last, Chain):
            raise seen.last
        read = seen.decision.read
        why = None if read is not None else seen.decision.reason.removeprefix("rescan: ")
        return _Disk(disk, Capture(seen.state, read, None), seen.last, why)

    def _family(self, disk: str) -> str | None:
        """Return the family of --bitmap, or that of the bitmap that the disk's newest point started."""
        if self.request.bitmap_family is not None:
            return self.request.bitmap_family
        newest = chains.newest_manifest(self.contents.manifests.values(), disk)
        entry = None if newest is None else newest.disk(disk)
        started = None if entry is None else entry.bitmap.started
        return None if started is None else started.partition(".")[0]

    def _audited(self, disk: _Disk, opened: Opened, moment: Moment) -> DiskAudit:
        began = time.monotonic()
        chain = disk.chain

        def advance(done: int) -> None:
            moment.require_kept()
            self.progress.advance(done)

        try:
            differences, planned = self._compared(disk, opened, advance)
        except Damaged as error:
            raise salvage.located(error, self.machine, chain.newest.point, chain.disk) from None
        return _disk_audit(disk, planned, differences, time.monotonic() - began)

    def _compared(self, disk: _Disk, opened: Opened, advance: Callable[[int], None]) -> tuple[Differences, Plan]:
        chain = disk.chain
        with chain_reader.checked(self.machine.files, chain, opened.disk.size) as content:
            planned = plan.plan_audit(
                opened.disk, chain.cluster_size, opened.bitmap, parent_size=chain.size, chain=content.index
            )
            self.progress.begin(disk.request.name, planned.totals.data)
            return compare.compare(opened.disk, planned, content, self.request.copying, advance), planned


def _disk_audit(disk: _Disk, planned: Plan, differences: Differences, seconds: float) -> DiskAudit:
    return DiskAudit(
        name=disk.request.name,
        point=disk.chain.newest.point,
        bitmap=disk.capture.read_bitmap,
        why=disk.why,
        size=planned.size,
        point_size=disk.chain.size,
        dirty_bytes=planned.totals.dirty,
        read_bytes=planned.totals.data,
        differing_bytes=differences.bytes,
        differences=tuple(differences.ranges()),
        complete=differences.complete,
        seconds=round(seconds, 3),
    )
