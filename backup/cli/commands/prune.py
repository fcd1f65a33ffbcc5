"""The command prune."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup.cli import find, json_output, output, settings
from backup.cli.context import options, show_error, user_error
from backup.cli.parameters import DryRun, MachineNames, Repo
from backup.config.settings import Config, Retention
from backup.errors import BackupError, UsageError, merged_exit_code
from backup.planning.retention import MAX_COUNT, Batch, Duration, Policy
from backup.units import counted, show_size

if TYPE_CHECKING:
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
    dry_run: DryRun = False,
) -> None:
    """
    Remove the points that no --keep option keeps.

    The other points keep all their data: what they need from a removed point is merged into them first.

    The --keep options, all together, replace those of `retention` in the configuration.
    """
    from backup.night.night import attempt

    counts = {
        "last": keep_last,
        "hourly": keep_hourly,
        "daily": keep_daily,
        "weekly": keep_weekly,
        "monthly": keep_monthly,
        "yearly": keep_yearly,
    }
    config = find.config() if repo is None else find.config_or_default()
    keep = Keep.of(counts, keep_within, batch)
    path = settings.repository_path(find.folder_of(repo), config)
    retentions = {name: keep.retention(config, name) for name in _machine_names(path, machines)}
    outcomes: dict[str, Report | BackupError] = {}
    for name, retention in retentions.items():
        outcome = attempt(functools.partial(_prune_machine, path, name, retention, config, dry_run=dry_run))
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


def _machine_names(repository: Path, machines: Sequence[str] | None) -> list[str]:
    from backup.repository.repository import Repository
    from backup.storage.choose import storage_at

    return [machine.name for machine in find.machines(Repository.open(storage_at(repository)), machines)]


def _prune_machine(repository: Path, machine: str, retention: Retention, config: Config, *, dry_run: bool) -> Report:
    from backup.operations import prune as pruning
    from backup.repository.repository import Repository

    request = pruning.Request(retention.policy, retention.batch, settings.workers(config), dry_run)
    opened = Repository.open(settings.storage(repository, config)).machine(machine)
    with output.progress(wanted=not options.quiet) as progress:
        return pruning.prune(opened, request, progress)


# The --keep options


@dataclass(frozen=True, slots=True)
class Keep:
    """The --keep options and --batch, as given."""

    policy: Policy
    batch: int | None

    @classmethod
    def of(cls, counts: Mapping[str, str | None], within: str | None, batch: str | None) -> Keep:
        """
        Read the texts of the options.

        Raises
        ------
        UsageError
            One is not a number or not a duration, or all counts are 0.
        """
        numbers = {rule: _count(f"--keep-{rule}", text, 0) for rule, text in counts.items() if text is not None}
        policy = Policy(**numbers, within=None if within is None else Duration.parse(within))
        if numbers and policy.empty:
            raise UsageError(
                "the --keep options keep nothing: every count is 0", hint="give at least one count above 0"
            )
        return cls(policy, None if batch is None else _count("--batch", batch, 1))

    def retention(self, config: Config, machine: str) -> Retention:
        """
        Return the retention of a machine: the options, completed from the configuration.

        Raises
        ------
        UsageError
            Neither the options nor the configuration say what to keep.
        """
        retention = config.retention_of(machine) or Retention(Policy(), Batch())
        if not self.policy.empty:
            retention = replace(retention, policy=self.policy)
        if retention.policy.empty:
            raise UsageError(
                f"nothing says which points of machine {machine} to keep",
                hint="give --keep-last N or another --keep option, or `retention:` in the configuration",
            )
        if self.batch is None:
            return retention
        return replace(retention, batch=replace(retention.batch, points=self.batch))


def _count(option: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_COUNT)) and least <= int(text) <= MAX_COUNT):
        raise UsageError(f"{option} {text!r} is not a count", hint=f"give a whole number from {least} to {MAX_COUNT}")
    return int(text)


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
