"""
The commands that look at disks: full, incremental, rescan, audit, map; and clean, after runs that were cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup.cli import find, output
from backup.cli.context import common_code, completed, explained, options, show_error
from backup.cli.find import folder_of, path_of
from backup.cli.parameters import (
    AgentSocket,
    AllowPlaintext,
    BitmapName,
    CompressionText,
    DiskNames,
    DryRun,
    Exclude,
    FreezeFlag,
    Image,
    ImageFormat,
    ImageFormats,
    Images,
    Limit,
    MachineName,
    MachineNames,
    Nbd,
    Nodes,
    NoFallback,
    Qmp,
    Repo,
    Scratch,
    Since,
)
from backup.errors import WARNINGS_EXIT_CODE, BackupError, BitmapUnusable, Damaged, Failed, UsageError

if TYPE_CHECKING:
    from backup.config.reader import Config
    from backup.operations.audit import Audit
    from backup.operations.backup import Report
    from backup.operations.preflight import Request
    from backup.repository.repository import Repository


def full(
    machines: MachineNames = None,
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
    """Back up everything, and begin a chain."""
    _back_up("full", **locals())


def incremental(
    machines: MachineNames = None,
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
    """Back up what changed since the newest point.  Everything is read where that cannot be known."""
    _back_up("incremental", **locals())


def rescan(
    machines: MachineNames = None,
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
    """Back up what differs from the newest point.  Everything is read and compared."""
    _back_up("rescan", **locals())


def _back_up(wanted: str, *, repo: str | None, **parameters: Any) -> None:
    from backup.cli import requests, settings
    from backup.repository.repository import Repository

    config = find.config()
    given = requests.Options.of(wanted, **parameters)
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
                output.failure_object(request.machine, outcome)
                if isinstance(outcome, BackupError)
                else output.report_object(outcome)
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
        from backup.cli import pruning

        pruned = pruning.prune_one(repository, report.machine, wanted, config, output.Quiet())
    except Exception as error:  # noqa: BLE001 - the point is made, and whatever keeps it from being thinned is shown
        return replace(report, warnings=(*report.warnings, f"not pruned: {explained(error).message}"))
    report = replace(report, warnings=(*report.warnings, *pruned.warnings))
    if not pruned.removed:
        return report
    return replace(report, notes=(*report.notes, output.prune_line(pruned, dry_run=False)))


def _show_outcome(request: Request, outcome: Report | BackupError, *, several: bool) -> None:
    if isinstance(outcome, BackupError):
        show_error(outcome, of=request.machine if several else None)
        return
    for warning in outcome.warnings:
        output.warning(f"{outcome.machine}: {warning}")
    if options.quiet:
        return
    if not options.json:
        for text in output.report_lines(outcome, dry_run=request.dry_run):
            output.line(text)
    for note in outcome.notes:
        output.note(note, to_stderr=options.json)
    output.flush()


def audit(
    machines: MachineNames = None,
    image: Images = None,
    image_format: ImageFormats = None,
    nbd: Nbd = None,
    since: Since = None,
    qmp: Qmp = None,
    node: Nodes = None,
    exclude: Exclude = None,
    scratch: Scratch = None,
    machine: MachineName = None,
    disk: DiskNames = None,
    repo: Repo = None,
    bitmap: BitmapName = None,
    limit: Limit = None,
) -> None:
    """Hold disks, read whole, against their newest points.  12 where those, or the bitmaps since, lie."""
    _audit(**locals())


def _audit(*, repo: str | None, **parameters: Any) -> None:
    from backup.cli import requests

    config = find.config()
    given = requests.Options.of("audit", **parameters)
    find.require_format(*given.image_formats)
    made = requests.make_requests(given, config)
    repository = find.repository(folder_of(repo))
    outcomes = []
    for request in made:
        outcome = _audit_one(repository, request)
        outcomes.append((request, outcome))
        _show_audit(request, outcome, several=len(made) > 1)
    if options.json:
        output.document(
            [
                output.audit_failure_object(request.machine, outcome)
                if isinstance(outcome, BackupError)
                else output.audit_object(outcome)
                for request, outcome in outcomes
            ]
        )
    raise typer.Exit(_audit_code([outcome for _, outcome in outcomes]))


def _audit_one(repository: Repository, request: Request) -> Audit | BackupError:
    """Audit one machine.  Whatever happens to it must not keep the others from their audits."""
    from backup.operations.audit import audit as take

    try:
        with output.progress(wanted=not options.quiet) as progress:
            return take(repository, request, progress)
    except Exception as error:  # noqa: BLE001 - shown, and in the exit code
        return explained(error)


def _show_audit(request: Request, outcome: Audit | BackupError, *, several: bool) -> None:
    if isinstance(outcome, BackupError):
        show_error(outcome, of=request.machine if several else None)
        return
    for warning in outcome.warnings:
        output.warning(f"{outcome.machine}: {warning}")
    if not options.json and not options.quiet:
        for text in output.audit_lines(outcome):
            output.line(text)
        output.flush()
    output.audit_problems(outcome, completed)


def _audit_code(outcomes: Sequence[Audit | BackupError]) -> int:
    """The worst: a lie, or a damaged chain; then errors as of backups; then what nobody can tell."""
    from backup.operations.audit import LIES, UNKNOWN

    failed = {outcome.exit_code for outcome in outcomes if isinstance(outcome, BackupError)}
    audits = [outcome for outcome in outcomes if not isinstance(outcome, BackupError)]
    verdicts = {disk.verdict for found in audits for disk in found.disks}
    if LIES in verdicts or Damaged.exit_code in failed:
        return Damaged.exit_code
    if UNKNOWN in verdicts:
        failed.add(BitmapUnusable.exit_code)
    if failed:
        return failed.pop() if len(failed) == 1 else 1
    return WARNINGS_EXIT_CODE if any(found.warnings for found in audits) else 0


def map_(
    image: Image = None,
    image_format: ImageFormat = None,
    nbd: Nbd = None,
    qmp: Qmp = None,
    node: Annotated[str | None, typer.Option("--node", metavar="NODE", help="With --qmp: the disk.")] = None,
    scratch: Scratch = None,
    bitmap: Annotated[str | None, typer.Option("--bitmap", metavar="EXACT-NAME", help="The bitmap to show.")] = None,
    totals: Annotated[bool, typer.Option("--totals", help="Sums only.")] = False,
) -> None:
    """Show a source as the planner sees it.  Dirty or clean, data, zero or hole, in bytes."""
    from backup.cli import requests
    from backup.planning import extent_map

    find.require_format(image_format)
    place = requests.Place(path_of(image), image_format, nbd, path_of(qmp), node, path_of(scratch))
    with requests.open_disk(place, bitmap, find.config_or_default(), output.warning) as export:
        if totals:
            sums = extent_map.map_totals(export, bitmap)
            output.document(asdict(sums)) if options.json else output.map_sums(sums)
        elif options.json:
            output.map_objects(extent_map.read_map(export, bitmap))
        else:
            output.map_table(extent_map.read_map(export, bitmap), bitmap)


def clean(
    qmp: Annotated[
        str | None, typer.Option("--qmp", metavar="SOCKET", help="The QMP socket of a running machine's QEMU.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", metavar="FILE", help="An image that no machine has open; repeatable.")
    ] = None,
    bitmaps: Annotated[
        bool, typer.Option("--bitmaps", help="Select all bitmaps of the repository, those of its points too.")
    ] = False,
    repository: Annotated[
        list[str] | None,
        typer.Option("--repository", metavar="ID", help="Select all bitmaps of the repository with this short id."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove the selected bitmaps instead of listing them.")] = False,
    agent: AgentSocket = None,
    repo: Repo = None,
) -> None:
    """
    Remove what backups left in a running QEMU or in images.

    With --qmp alone: jobs, exports, nodes, bitmaps of no point, and a frozen guest, as a run that was cut off leaves
    them. With --bitmaps, --repository or --image, list pybackup's bitmaps; --yes removes those that are selected.
    """
    from backup.cli import cleaning

    wanted = cleaning.Wanted(
        qmp=path_of(qmp),
        images=tuple(map(Path, image or ())),
        agent=path_of(agent),
        repo=folder_of(repo),
        bitmaps=bitmaps,
        gone=tuple(repository or ()),
        yes=yes,
    )
    raise typer.Exit(cleaning.run(wanted))


def check_config(
    example: Annotated[
        bool, typer.Option("--example", help="Print an example with every key and a comment on each instead.")
    ] = False,
) -> None:
    """Check the configuration and say what it names."""
    if example:
        from backup.config.reader import EXAMPLE

        text = EXAMPLE.read_text(encoding="utf-8")
        output.document({"example": text}) if options.json else output.line(text.rstrip())
        return
    config = find.config()
    if config.path is None:
        raise UsageError(
            "there is no configuration",
            hint="write one like that of `pybackup check-config --example` and name it with --config",
        )
    disks = sum(len(machine.disks) for machine in config.machines)
    if options.json:
        output.document(
            {
                "path": str(config.path),
                "repository": None if config.repository is None else str(config.repository),
                "machines": {machine.name: [disk.name for disk in machine.disks] for machine in config.machines},
            }
        )
    elif not options.quiet:
        output.line(
            f"{output.plain(config.path)}: {len(config.machines)} machine{'s' * (len(config.machines) != 1)}, "
            f"{disks} disk{'s' * (disks != 1)}, repository {output.plain(config.repository or 'not named')}"
        )
