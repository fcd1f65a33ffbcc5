"""The command prune."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options, show_error, user_error
from backup.cli.parameters import DryRun, IdentityFile, MachineNames, Repo
from backup.errors import BackupError, merged_exit_code
from backup.model.location import Location
from backup.units import counted, show_size

if TYPE_CHECKING:
    from backup.config.settings import Config, Retention
    from backup.operations.prune import PointReport, Report, RewriteReport


def _keep(unit: str, text: str) -> Any:
    return typer.Option(f"--keep-{unit}", metavar="N", help=text)


def prune(
    machines: MachineNames = None,
    keep_last: Annotated[str | None, _keep("last", "Keep the newest N points.")] = None,
    keep_hourly: Annotated[
        str | None, _keep("hourly", "Keep the newest point of each of the last N hours that have a point.")
    ] = None,
    keep_daily: Annotated[str | None, _keep("daily", "The same for days.")] = None,
    keep_weekly: Annotated[str | None, _keep("weekly", "The same for weeks.")] = None,
    keep_monthly: Annotated[str | None, _keep("monthly", "The same for months.")] = None,
    keep_yearly: Annotated[str | None, _keep("yearly", "The same for years.")] = None,
    keep_within: Annotated[
        str | None,
        typer.Option(
            "--keep-within",
            metavar="D",
            help="Keep the points that are at most D older than the newest point, for example 30d.  Units: h, d, w, m "
            "(months), y.",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="N",
            help="Merge points into a full only when N points can be removed at once.  Default: `batch` in the "
            "configuration, else 7.",
        ),
    ] = None,
    repo: Repo = None,
    identity: IdentityFile = None,
    dry_run: DryRun = False,
) -> None:
    """
    Remove the points that no --keep option keeps.

    The other points keep all their data: what they need from a removed point is merged into them first.

    In a bucket and in a sealed place, nothing is merged: a point stays while a later point that stays needs it.

    The --keep options, all together, replace those of `retention` in the configuration.  A place of `copies` has its
    own `retention`.
    """
    from backup.cli import settings
    from backup.cli.retention import KeepOptions
    from backup.runtime.failures import attempt

    counts = {
        "last": keep_last,
        "hourly": keep_hourly,
        "daily": keep_daily,
        "weekly": keep_weekly,
        "monthly": keep_monthly,
        "yearly": keep_yearly,
    }
    config = find.config() if repo is None else find.config_or_default()
    keep = KeepOptions.of(counts, keep_within, batch)
    place = None if repo is None else places.place(repo)
    location = settings.repository_location(None if place is None else place.location, config)
    names = [machine.name for machine in find.machines(find.open_at(location, None, identity), machines)]
    own = None if place is None or place.configured is None else place.configured.retention
    retentions = {name: keep.retention(own or config.retention_of(name), name) for name in names}
    outcomes: dict[str, Report | BackupError] = {}
    for name, retention in retentions.items():
        outcome = attempt(
            functools.partial(_prune_machine, location, identity, name, retention, config, dry_run=dry_run)
        )
        if isinstance(outcome, BackupError):
            show_error(user_error(outcome), of=name if len(retentions) > 1 else None)
        else:
            _show(outcome, dry_run=dry_run)
        outcomes[name] = outcome
    if options.json:
        json_output.write([MachineDocument.of(name, outcome, dry_run=dry_run) for name, outcome in outcomes.items()])
    codes = [outcome.exit_code for outcome in outcomes.values() if isinstance(outcome, BackupError)]
    warned = any(outcome.warnings for outcome in outcomes.values() if not isinstance(outcome, BackupError))
    raise typer.Exit(merged_exit_code(codes, warned=warned))


def _prune_machine(
    location: Location, identity: str | None, machine: str, retention: Retention, config: Config, *, dry_run: bool
) -> Report:
    from backup.cli import settings
    from backup.operations import prune as pruning

    request = pruning.Request(retention.policy, retention.batch, settings.workers(config), dry_run)
    opened = find.open_at(location, config, identity).machine(machine)
    with output.progress(wanted=not options.quiet) as progress:
        return pruning.prune(opened, request, progress)


# Text


def _show(report: Report, *, dry_run: bool) -> None:
    for warning in report.warnings:
        output.warning(f"{report.machine}: {warning}")
    if options.json or options.quiet:
        return
    if dry_run or options.verbose:
        _show_steps(report)
    output.line(output.pruned_line(report, dry_run=dry_run))


def _show_steps(report: Report) -> None:
    """Show what becomes of each point and why, and the data files that are rewritten."""
    rows = [
        (report.machine, point.point, point.created, point.action, ", ".join(point.reasons)) for point in report.points
    ]
    output.table(("MACHINE", "POINT", "CREATED", "ACTION", "WHY"), rows)
    for rewrite in report.rewrites:
        output.line(
            f"rewrite {report.machine}/{rewrite.disk} of {rewrite.point} as {rewrite.kind}, with "
            f"{counted(len(rewrite.merged), 'point')} merged: read {show_size(rewrite.read_bytes)}, "
            f"{show_size(rewrite.stored_before)} before, {show_size(rewrite.stored_after)} after"
        )


# JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineDocument:
    """A machine that was pruned, or would be, or could not be."""

    machine: str
    points: Sequence[PointReport] = ()
    rewrites: Sequence[RewriteReport] = ()
    freed_bytes: int = 0
    warnings: Sequence[str] = ()
    dry_run: bool
    error: BackupError | None = None

    @classmethod
    def of(cls, machine: str, outcome: Report | BackupError, *, dry_run: bool) -> MachineDocument:
        """Return the document of a machine."""
        if isinstance(outcome, BackupError):
            return cls(machine=machine, dry_run=dry_run, error=outcome)
        return cls(**json_output.fields_of(outcome), dry_run=dry_run)
