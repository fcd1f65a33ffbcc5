"""The commands full, incremental and rescan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options, show_error, user_error
from backup.cli.json_output import ProblemDocument
from backup.cli.output import plain
from backup.cli.parameters import (
    AgentSocket,
    AllowPlaintext,
    BitmapName,
    CompressionText,
    ConfiguredMachines,
    DiskNames,
    Domains,
    DryRun,
    Exclude,
    FirstRepo,
    FreezeFlag,
    ImageFormats,
    Images,
    LibvirtUri,
    Limit,
    MachineName,
    Nbd,
    Nodes,
    NoFallback,
    Qmp,
    Scratch,
    Since,
    TrustDataFile,
)
from backup.errors import BackupError, Failed
from backup.units import counted, show_duration, show_size

if TYPE_CHECKING:
    from backup.cli.requests import Options
    from backup.night.night import Outcome
    from backup.operations.backup import Report
    from backup.operations.copies import Outcome as CopyOutcome
    from backup.operations.disk_copy import DiskReport


def full(
    machines: ConfiguredMachines = None,
    image: Images = None,
    image_format: ImageFormats = None,
    nbd: Nbd = None,
    libvirt: LibvirtUri = None,
    domain: Domains = None,
    qmp: Qmp = None,
    node: Nodes = None,
    exclude: Exclude = None,
    scratch: Scratch = None,
    freeze: FreezeFlag = False,
    agent: AgentSocket = None,
    allow_plaintext: AllowPlaintext = False,
    trust_data_file: TrustDataFile = False,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: FirstRepo = None,
    bitmap: BitmapName = None,
    compression: CompressionText = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """
    Back up whole disks, and start a new chain.

    Without MACHINE and without a source (--libvirt, --image, --nbd or --qmp), every machine of the configuration is
    backed up; one that fails does not stop the others.  Exit code 3: the points exist, and there were warnings.
    """
    from backup.cli.requests import Options

    _back_up(
        Options.of(
            "full",
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
            machine=machine,
            disk=disk,
            bitmap=bitmap,
            limit=limit,
            freeze=freeze,
            agent=agent,
            allow_plaintext=allow_plaintext,
            trust_data_file=trust_data_file,
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
    libvirt: LibvirtUri = None,
    domain: Domains = None,
    qmp: Qmp = None,
    node: Nodes = None,
    exclude: Exclude = None,
    scratch: Scratch = None,
    freeze: FreezeFlag = False,
    agent: AgentSocket = None,
    allow_plaintext: AllowPlaintext = False,
    trust_data_file: TrustDataFile = False,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: FirstRepo = None,
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

    Without MACHINE and without a source (--libvirt, --image, --nbd or --qmp), every machine of the configuration is
    backed up; one that fails does not stop the others.
    """
    from backup.cli.requests import Options

    _back_up(
        Options.of(
            "incremental",
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
            machine=machine,
            disk=disk,
            bitmap=bitmap,
            limit=limit,
            freeze=freeze,
            agent=agent,
            allow_plaintext=allow_plaintext,
            trust_data_file=trust_data_file,
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
    libvirt: LibvirtUri = None,
    domain: Domains = None,
    qmp: Qmp = None,
    node: Nodes = None,
    exclude: Exclude = None,
    scratch: Scratch = None,
    freeze: FreezeFlag = False,
    agent: AgentSocket = None,
    allow_plaintext: AllowPlaintext = False,
    trust_data_file: TrustDataFile = False,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: FirstRepo = None,
    bitmap: BitmapName = None,
    compression: CompressionText = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """
    Read whole disks, and back up what differs.

    No bitmap is trusted: all data is read, compared with the newest point, and stored where it differs.

    Without MACHINE and without a source (--libvirt, --image, --nbd or --qmp), every machine of the configuration is
    backed up; one that fails does not stop the others.
    """
    from backup.cli.requests import Options

    _back_up(
        Options.of(
            "rescan",
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
            machine=machine,
            disk=disk,
            bitmap=bitmap,
            limit=limit,
            freeze=freeze,
            agent=agent,
            allow_plaintext=allow_plaintext,
            trust_data_file=trust_data_file,
            compression=compression,
            dry_run=dry_run,
        ),
        repo,
    )


def _back_up(given: Options, repo: str | None) -> None:
    from backup.cli import requests, settings
    from backup.night import night
    from backup.repository.repository import Repository

    config = find.config()
    find.require_format(*given.image_formats)
    path = settings.repository_location(None if repo is None else places.first_of(repo), config)
    open_repository = partial(Repository.open, settings.storage(path, config))
    missing: BackupError | None = None
    try:
        repository = open_repository()
        if not given.dry_run:
            repository.tidy()
    except BackupError as error:
        missing = error
    wanted = requests.make_requests(given, config)
    if missing is not None:  # reported after what is wrong with the command, and once for all machines
        raise missing
    watch = partial(output.progress, wanted=not options.quiet)
    targets = places.after_backup(path, config)
    machines = night.Night(open_repository, config, settings.workers(config), watch, targets)
    outcomes = list(_shown(machines.run(wanted), several=len(wanted) > 1, dry_run=given.dry_run))
    if options.json:
        json_output.write([MachineDocument.of(outcome) for outcome in outcomes])
    raise typer.Exit(night.exit_code(outcomes))


def _shown(outcomes: Iterable[Outcome], *, several: bool, dry_run: bool) -> Iterator[Outcome]:
    """
    Show each outcome as soon as the machine is done.

    Raises
    ------
    Failed
        An outcome could not be shown; raised after the last machine, since all machines are backed up all the same.
    """
    unshown: Failed | None = None
    for outcome in outcomes:
        try:
            _show(outcome, several=several, dry_run=dry_run)
        except Failed as error:
            unshown = error
        yield outcome
    if unshown is not None:
        raise unshown


# Text


def _show(outcome: Outcome, *, several: bool, dry_run: bool) -> None:
    report = outcome.report
    if isinstance(report, BackupError):
        show_error(user_error(report), of=outcome.machine if several else None)
        return
    for warning in outcome.warnings:
        output.warning(f"{report.machine}: {warning}")
    for copy in outcome.copies:
        _show_failed(copy, several=several)
    if options.quiet:
        return
    if not options.json:
        for disk in report.disks:
            output.line(f"{report.machine}/{disk.name}: {_disk_text(disk, report.point, dry_run=dry_run)}")
    for note in _notes(outcome, report):
        output.note(note, to_stderr=options.json)
    output.flush()


def _show_failed(copy: CopyOutcome, *, several: bool) -> None:
    """Show why a machine, or a point of it, was not copied; the point that was made is shown all the same."""
    if isinstance(copy.result, BackupError):
        failure = user_error(copy.result)
        failure.message = f"not copied to {copy.place}: {failure.message}"
        show_error(failure, of=copy.machine if several else None)
        return
    for problem in copy.result.problems:
        output.problem(problem)


def _disk_text(disk: DiskReport, point: str | None, *, dry_run: bool) -> str:
    counts = (
        f"dirty {show_size(disk.dirty_bytes)}, data {show_size(disk.data_bytes)}, zero {show_size(disk.zero_bytes)}"
    )
    if dry_run:
        return f"would be {disk.kind}, {counts} ({plain(disk.reason)})"
    stored = f"stored {show_size(disk.stored_bytes)} in {show_duration(disk.seconds)}"
    return f"{disk.kind} {point}, {counts}, {stored} ({plain(disk.reason)})"


def _notes(outcome: Outcome, report: Report) -> Iterator[str]:
    yield from report.notes
    for copy in outcome.copies:
        if not isinstance(copy.result, BackupError):
            copied = f"{counted(len(copy.result.copied), 'point')}, {show_size(copy.result.bytes)}"
            yield f"copied {copied}, to {plain(copy.place)}"
    if outcome.pruned is not None and not isinstance(outcome.pruned, BackupError) and outcome.pruned.removed:
        yield output.pruned_line(outcome.pruned, dry_run=False)


# JSON


@dataclass(frozen=True, slots=True)
class MachineDocument:
    """A machine that was backed up, or could not be; `point` and `manifest` are null on a failure and a dry run."""

    machine: str
    point: str | None
    manifest: str | None
    warnings: Sequence[str]
    error: BackupError | None
    disks: Sequence[DiskReport]
    copies: Sequence[CopyDocument] = ()

    @classmethod
    def of(cls, outcome: Outcome) -> MachineDocument:
        """Return the document of a machine."""
        report = outcome.report
        if isinstance(report, BackupError):
            return cls(outcome.machine, None, None, (), report, ())
        copies = [CopyDocument.of(copy) for copy in outcome.copies]
        return cls(report.machine, report.point, report.manifest, outcome.warnings, None, report.disks, copies)


@dataclass(frozen=True, slots=True)
class CopyDocument:
    """The copy of a machine to a second place after its backup: ids of copied points, and why it failed."""

    place: str
    copied: Sequence[str]
    bytes: int
    problems: Sequence[ProblemDocument]
    error: BackupError | None

    @classmethod
    def of(cls, copy: CopyOutcome) -> CopyDocument:
        """Return the document of a copy."""
        if isinstance(copy.result, BackupError):
            return cls(copy.place, (), 0, (), copy.result)
        problems = json_output.problem_documents(copy.result.problems)
        return cls(copy.place, copy.result.copied, copy.result.bytes, problems, None)
