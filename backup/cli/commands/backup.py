"""The commands full, incremental and rescan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from backup.cli import find, output
from backup.cli.commands import prune
from backup.cli.context import common_code, explained, options, show_error
from backup.cli.find import folder_of
from backup.cli.output import error_object, plain
from backup.cli.parameters import (
    AgentSocket,
    AllowPlaintext,
    BitmapName,
    CompressionText,
    ConfiguredMachines,
    DiskNames,
    DryRun,
    Exclude,
    FreezeFlag,
    ImageFormats,
    Images,
    Limit,
    MachineName,
    Nbd,
    Nodes,
    NoFallback,
    Qmp,
    Repo,
    Scratch,
    Since,
)
from backup.errors import BackupError, Failed
from backup.units import show_duration, show_size

if TYPE_CHECKING:
    from backup.cli.requests import Options
    from backup.config.settings import Config
    from backup.operations.backup import DiskReport, Report
    from backup.operations.request import Request
    from backup.repository.repository import Repository


def full(
    machines: ConfiguredMachines = None,
    image: Images = None,
    image_format: ImageFormats = None,
    nbd: Nbd = None,
    qmp: Qmp = None,
    node: Nodes = None,
    exclude: Exclude = None,
    scratch: Scratch = None,
    freeze: FreezeFlag = False,
    agent: AgentSocket = None,
    allow_plaintext: AllowPlaintext = False,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: Repo = None,
    bitmap: BitmapName = None,
    compression: CompressionText = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """
    Back up whole disks, and start a new chain.

    Without MACHINE and without a source (--image, --nbd or --qmp), every machine of the configuration is backed up; one
    that fails does not stop the others.  Exit code 3: the points exist, and there were warnings.
    """
    from backup.cli.requests import Options

    _back_up(
        Options.of(
            "full",
            machines=machines,
            image=image,
            image_format=image_format,
            nbd=nbd,
            qmp=qmp,
            node=node,
            exclude=exclude,
            scratch=scratch,
            machine=machine,
            disk=disk,
            bitmap=bitmap,
            limit=limit,
            freeze=freeze,
            agent=agent,
            allow_plaintext=allow_plaintext,
            compression=compression,
            dry_run=dry_run,
        ),
        repo,
    )


def incremental(
    machines: ConfiguredMachines = None,
    image: Images = None,
    image_format: ImageFormats = None,
    nbd: Nbd = None,
    since: Since = None,
    qmp: Qmp = None,
    node: Nodes = None,
    exclude: Exclude = None,
    scratch: Scratch = None,
    freeze: FreezeFlag = False,
    agent: AgentSocket = None,
    allow_plaintext: AllowPlaintext = False,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: Repo = None,
    bitmap: BitmapName = None,
    compression: CompressionText = None,
    limit: Limit = None,
    no_fallback: NoFallback = False,
    dry_run: DryRun = False,
) -> None:
    """
    Back up the data that changed since the newest point.

    A dirty bitmap of QEMU tells what changed.  Where no bitmap can be continued, the whole disk is read (a rescan or a
    full), the reason is shown, and the exit code is 3.  A disk without a point gets a full.

    Without MACHINE and without a source (--image, --nbd or --qmp), every machine of the configuration is backed up; one
    that fails does not stop the others.
    """
    from backup.cli.requests import Options

    _back_up(
        Options.of(
            "incremental",
            machines=machines,
            image=image,
            image_format=image_format,
            nbd=nbd,
            qmp=qmp,
            node=node,
            exclude=exclude,
            scratch=scratch,
            machine=machine,
            disk=disk,
            bitmap=bitmap,
            limit=limit,
            freeze=freeze,
            agent=agent,
            allow_plaintext=allow_plaintext,
            compression=compression,
            dry_run=dry_run,
            since=since,
            no_fallback=no_fallback,
        ),
        repo,
    )


def rescan(
    machines: ConfiguredMachines = None,
    image: Images = None,
    image_format: ImageFormats = None,
    nbd: Nbd = None,
    qmp: Qmp = None,
    node: Nodes = None,
    exclude: Exclude = None,
    scratch: Scratch = None,
    freeze: FreezeFlag = False,
    agent: AgentSocket = None,
    allow_plaintext: AllowPlaintext = False,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: Repo = None,
    bitmap: BitmapName = None,
    compression: CompressionText = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """
    Read whole disks, and back up what differs.

    No bitmap is trusted: all data is read, compared with the newest point, and stored where it differs.

    Without MACHINE and without a source (--image, --nbd or --qmp), every machine of the configuration is backed up; one
    that fails does not stop the others.
    """
    from backup.cli.requests import Options

    _back_up(
        Options.of(
            "rescan",
            machines=machines,
            image=image,
            image_format=image_format,
            nbd=nbd,
            qmp=qmp,
            node=node,
            exclude=exclude,
            scratch=scratch,
            machine=machine,
            disk=disk,
            bitmap=bitmap,
            limit=limit,
            freeze=freeze,
            agent=agent,
            allow_plaintext=allow_plaintext,
            compression=compression,
            dry_run=dry_run,
        ),
        repo,
    )


def _back_up(given: Options, repo: str | None) -> None:
    from backup.cli import requests, settings
    from backup.repository.repository import Repository

    config = find.config()
    find.require_format(*given.image_formats)
    path = settings.repository_path(folder_of(repo), config)
    modes = settings.modes(config)

    def open_repository() -> Repository:
        return Repository.open(path, modes)

    missing: BackupError | None = None
    try:
        repository = open_repository()
        if not given.dry_run:
            repository.tidy()
    except BackupError as error:
        missing = error
    made = requests.make_requests(given, config)
    if missing is not None:  # said after what is wrong with the command, and once for all machines
        raise missing
    outcomes = []
    unshown: Exception | None = None
    for request in made:
        outcome = _back_up_one(open_repository, request)
        if not isinstance(outcome, BackupError) and not given.dry_run:
            outcome = _prune_after(outcome, path, config)
        outcomes.append((request, outcome))
        try:
            _show_outcome(request, outcome, several=len(made) > 1)
        except Failed as error:
            unshown = error  # the other machines are backed up all the same
    if unshown is not None:
        raise unshown
    if options.json:
        output.document(
            [
                failure_object(request.machine, outcome) if isinstance(outcome, BackupError) else report_object(outcome)
                for request, outcome in outcomes
            ]
        )
    raise typer.Exit(common_code([outcome for _, outcome in outcomes]))


def _back_up_one(open_repository: Callable[[], Repository], request: Request) -> Report | BackupError:
    """Back up one machine.  Whatever happens to it, a bug included, must not keep the others from their backups."""
    from backup.operations.backup import create

    try:
        with output.progress(wanted=not options.quiet) as progress:
            return create(open_repository, request, progress)
    except Exception as error:  # noqa: BLE001 - shown, and in the exit code
        return explained(error)


def _prune_after(report: Report, repository: Path, config: Config) -> Report:
    """Prune a machine that was just backed up, where the configuration wants it; what fails is the backup's warning."""
    from dataclasses import replace

    wanted = config.retention_of(report.machine)
    if wanted is None or not wanted.after_backup:
        return report
    try:
        pruned = prune.prune_one(repository, report.machine, wanted, config, output.Quiet())
    except Exception as error:  # noqa: BLE001 - the point is made, and whatever keeps it from being thinned is shown
        return replace(report, warnings=(*report.warnings, f"not pruned: {explained(error).message}"))
    report = replace(report, warnings=(*report.warnings, *pruned.warnings))
    if not pruned.removed:
        return report
    return replace(report, notes=(*report.notes, prune.prune_line(pruned, dry_run=False)))


def _show_outcome(request: Request, outcome: Report | BackupError, *, several: bool) -> None:
    if isinstance(outcome, BackupError):
        show_error(outcome, of=request.machine if several else None)
        return
    for warning in outcome.warnings:
        output.warning(f"{outcome.machine}: {warning}")
    if options.quiet:
        return
    if not options.json:
        for text in report_lines(outcome, dry_run=request.dry_run):
            output.line(text)
    for note in outcome.notes:
        output.note(note, to_stderr=options.json)
    output.flush()


def report_object(report: Report) -> dict[str, Any]:
    """A machine's backup as scripts see it."""
    return {
        "machine": report.machine,
        "point": report.point,
        "manifest": None if report.manifest is None else str(report.manifest),
        "warnings": list(report.warnings),
        "error": None,
        "disks": [asdict(disk) for disk in report.disks],
    }


def failure_object(machine: str, problem: BackupError) -> dict[str, Any]:
    """A machine whose backup failed, as scripts see it."""
    failed = error_object(problem)
    return {"machine": machine, "point": None, "manifest": None, "warnings": [], "error": failed, "disks": []}


def report_lines(report: Report, *, dry_run: bool) -> Iterator[str]:
    """One line per disk."""
    for disk in report.disks:
        yield f"{report.machine}/{disk.name}: {_disk_text(disk, report.point, dry_run=dry_run)}"


def _disk_text(disk: DiskReport, point: str | None, *, dry_run: bool) -> str:
    counts = (
        f"dirty {show_size(disk.dirty_bytes)}, data {show_size(disk.data_bytes)}, zero {show_size(disk.zero_bytes)}"
    )
    if dry_run:
        return f"would be {disk.kind}, {counts} ({plain(disk.reason)})"
    stored = f"stored {show_size(disk.stored_bytes)} in {show_duration(disk.seconds)}"
    return f"{disk.kind} {point}, {counts}, {stored} ({plain(disk.reason)})"
