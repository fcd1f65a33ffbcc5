"""The command audit."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options, show_error, user_error, with_options
from backup.cli.json_output import ByteRange
from backup.cli.output import plain
from backup.cli.parameters import (
    BitmapName,
    ConfiguredMachines,
    DiskNames,
    Domains,
    Exclude,
    ImageFormats,
    Images,
    LibvirtUri,
    Limit,
    MachineName,
    Nbd,
    Nodes,
    Qmp,
    Repo,
    Scratch,
    Since,
    TrustDataFile,
)
from backup.errors import BackupError, BitmapUnusable, Damaged, merged_exit_code
from backup.units import show_duration, show_size

if TYPE_CHECKING:
    from backup.cli.requests import Options
    from backup.operations.audit import Audit, DiskAudit
    from backup.operations.request import Request
    from backup.repository.repository import Repository


def audit(
    machines: ConfiguredMachines = None,
    image: Images = None,
    image_format: ImageFormats = None,
    nbd: Nbd = None,
    since: Since = None,
    libvirt: LibvirtUri = None,
    domain: Domains = None,
    qmp: Qmp = None,
    node: Nodes = None,
    exclude: Exclude = None,
    scratch: Scratch = None,
    trust_data_file: TrustDataFile = False,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: Repo = None,
    bitmap: BitmapName = None,
    limit: Limit = None,
) -> None:
    """
    Compare whole disks with their newest points.

    Nothing is stored.  Exit code 12: data differs although the bitmap reports it as unchanged, so that the bitmap or
    the point is wrong.  Exit code 14: data differs, and no usable bitmap tells whether it changed since the point.
    """
    from backup.cli.requests import Options

    _audit(
        Options.of(
            "audit",
            machines=machines,
            image=image,
            image_format=image_format,
            nbd=nbd,
            libvirt=libvirt,
            domain=domain,
            qmp=qmp,
            node=node,
            exclude=exclude,
            scratch=scratch,
            trust_data_file=trust_data_file,
            machine=machine,
            disk=disk,
            bitmap=bitmap,
            limit=limit,
            since=since,
        ),
        repo,
    )


def _audit(given: Options, repo: str | None) -> None:
    from backup.cli import requests
    from backup.runtime.failures import attempt

    config = find.config()
    find.require_format(*given.image_formats)
    audited = requests.make_requests(given, config)
    repository = find.repository(places.named(repo))
    outcomes = []
    for request in audited:
        outcome = attempt(functools.partial(_audit_one, repository, request))
        if isinstance(outcome, BackupError):
            outcome = user_error(outcome)
        outcomes.append((request.machine, outcome))
        _show(request.machine, outcome, several=len(audited) > 1)
    if options.json:
        json_output.write([MachineDocument.of(machine, outcome) for machine, outcome in outcomes])
    raise typer.Exit(_exit_code([outcome for _, outcome in outcomes]))


def _audit_one(repository: Repository, request: Request) -> Audit:
    from backup.operations.audit import audit as audit_machine

    with output.progress(wanted=not options.quiet) as progress:
        return audit_machine(repository, request, progress)


def _exit_code(outcomes: Sequence[Audit | BackupError]) -> int:
    """Merge the outcomes: a wrong bitmap or a damaged chain (12) first; an unknown verdict counts as a failure (14)."""
    from backup.operations.audit import LIES, UNKNOWN

    codes = [outcome.exit_code for outcome in outcomes if isinstance(outcome, BackupError)]
    audits = [outcome for outcome in outcomes if not isinstance(outcome, BackupError)]
    verdict_codes = {LIES: Damaged.exit_code, UNKNOWN: BitmapUnusable.exit_code}
    codes += [verdict_codes.get(disk.verdict, 0) for audit in audits for disk in audit.disks]
    return merged_exit_code(codes, worst=(Damaged.exit_code,), warned=any(audit.warnings for audit in audits))


# Text


def _show(machine: str, outcome: Audit | BackupError, *, several: bool) -> None:
    if isinstance(outcome, BackupError):
        show_error(outcome, of=machine if several else None)
        return
    for warning in outcome.warnings:
        output.warning(f"{machine}: {warning}")
    if not options.json and not options.quiet:
        for disk in outcome.disks:
            for text in _disk_lines(machine, disk):
                output.line(text)
        output.flush()
    for disk in outcome.disks:
        _show_fault(f"{machine}/{disk.name}", disk)


def _disk_lines(machine: str, disk: DiskAudit) -> Iterator[str]:
    """Yield a line for the disk, and one for each range that differs: start and length."""
    skipped = f", skipped {show_size(disk.dirty_bytes)} that changed since" if disk.bitmap else ""
    yield (
        f"{machine}/{disk.name}: {_verdict(disk)}: compared with {disk.point}, read "
        f"{show_size(disk.read_bytes)} of {show_size(disk.size)} in {show_duration(disk.seconds)}{skipped}"
    )
    for start, end in disk.differences:
        yield f"{start:>16}  {end - start:>16}  differs"
    if not disk.complete:
        yield f"{'':>34}  and more"


def _verdict(disk: DiskAudit) -> str:
    if disk.differing_bytes:
        return f"{disk.differing_bytes} bytes differ"
    return (
        "equal"
        if disk.size == disk.point_size
        else f"equal, but the size differs by {disk.size - disk.point_size:+} bytes"
    )


def _show_fault(place: str, disk: DiskAudit) -> None:
    """Show an error of two lines if the disk, its bitmap or its point is wrong or may be wrong."""
    if disk.verdict == "true":
        return
    if disk.bitmap is not None:
        message = (
            f"{disk.differing_bytes} bytes that bitmap {disk.bitmap} reports as clean differ from point {disk.point}: "
            "the bitmap or the point is wrong"
        )
        hint = "`pybackup rescan` stores what differs and starts a new bitmap; keep the older points"
    else:
        message = (
            f"{_verdict(disk)}, and it is unknown whether the disk changed since point {disk.point} or the point "
            f"is wrong: {disk.why or ''}"
        )
        hint = "`pybackup rescan` stores what differs; a later audit can then tell which"
    output.err(f"pybackup: error: {plain(place)}: {plain(message)}")
    output.err(f"pybackup: hint: {with_options(hint)}")


# JSON


@dataclass(frozen=True, slots=True)
class DiskDocument:
    """An audited disk; the fields of `DiskAudit`, with its verdict: "true", "lies" or "unknown"."""

    name: str
    point: str
    bitmap: str | None
    why: str | None
    size: int
    point_size: int
    dirty_bytes: int
    read_bytes: int
    differing_bytes: int
    differences: Sequence[ByteRange]
    complete: bool
    seconds: float
    verdict: str

    @classmethod
    def of(cls, disk: DiskAudit) -> DiskDocument:
        """Return the document of a disk."""
        values = {**json_output.fields_of(disk), "differences": json_output.byte_ranges(disk.differences)}
        return cls(**values, verdict=disk.verdict)


@dataclass(frozen=True, slots=True)
class MachineDocument:
    """A machine that was audited, or could not be."""

    machine: str
    warnings: Sequence[str]
    error: BackupError | None
    disks: Sequence[DiskDocument]

    @classmethod
    def of(cls, machine: str, outcome: Audit | BackupError) -> MachineDocument:
        """Return the document of a machine."""
        if isinstance(outcome, BackupError):
            return cls(machine, (), outcome, ())
        return cls(outcome.machine, outcome.warnings, None, [DiskDocument.of(disk) for disk in outcome.disks])
