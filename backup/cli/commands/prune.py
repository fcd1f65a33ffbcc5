"""The command prune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup.cli import find, settings
from backup.cli import output as render
from backup.cli.context import common_code, explained, options, show_error
from backup.cli.find import folder_of
from backup.cli.output import error_object, freed_text, line, table
from backup.cli.parameters import (
    DryRun,
    MachineNames,
    Repo,
)
from backup.config.settings import Config, Retention
from backup.errors import BackupError, UsageError
from backup.planning.retention import MAX_COUNT, Batch, Duration, Policy
from backup.repository.repository import Repository
from backup.units import counted, show_size

if TYPE_CHECKING:
    from backup.operations.prune import Report
    from backup.runtime.progress import Progress

_KEEPS = {
    "last": "Keep the newest N points.",
    "hourly": "Keep the newest point of each of the last N hours that have a point.",
    "daily": "The same for days.",
    "weekly": "The same for weeks.",
    "monthly": "The same for months.",
    "yearly": "The same for years.",
}


def _keep(what: str) -> Any:
    return typer.Option(f"--keep-{what}", metavar="N", help=_KEEPS[what])


def prune(
    machines: MachineNames = None,
    keep_last: Annotated[str | None, _keep("last")] = None,
    keep_hourly: Annotated[str | None, _keep("hourly")] = None,
    keep_daily: Annotated[str | None, _keep("daily")] = None,
    keep_weekly: Annotated[str | None, _keep("weekly")] = None,
    keep_monthly: Annotated[str | None, _keep("monthly")] = None,
    keep_yearly: Annotated[str | None, _keep("yearly")] = None,
    keep_within: Annotated[
        str | None,
        typer.Option(
            "--keep-within",
            metavar="D",
            help="Keep the points of the time D before the newest point, for example 30d.  Units: h, d, w, m "
            "(months), y.",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="N",
            help="Rewrite a full when N points before it can be removed at once.  Default: `batch` in the "
            "configuration, else 7.",
        ),
    ] = None,
    repo: Repo = None,
    dry_run: DryRun = False,
) -> None:
    """
    Remove the points that no --keep option keeps.

    The points that stay keep all their data: what they share with a removed point is merged into them first.

    The --keep options, all together, replace those of `retention` in the configuration.
    """
    from backup.cli import settings

    counts = {
        "last": keep_last,
        "hourly": keep_hourly,
        "daily": keep_daily,
        "weekly": keep_weekly,
        "monthly": keep_monthly,
        "yearly": keep_yearly,
    }
    config = find.config() if repo is None else find.config_or_default()
    given = Keep.of(counts, keep_within, batch)
    path = settings.repository_path(folder_of(repo), config)
    chosen = [(name, given.retention(config, name)) for name in _names(path, machines)]
    outcomes: list[Report | BackupError] = []
    objects = []
    for name, wanted in chosen:
        try:
            with render.progress(wanted=not options.quiet) as progress:
                outcome = prune_one(path, name, wanted, config, progress, dry_run=dry_run)
        except Exception as error:  # noqa: BLE001 - the other machines are pruned all the same
            failed = explained(error)
            show_error(failed, of=name if len(chosen) > 1 else None)
            outcomes.append(failed)
            objects.append(unpruned_object(name, failed, dry_run=dry_run))
            continue
        outcomes.append(outcome)
        objects.append(pruned_object(outcome, dry_run=dry_run))
        _show_pruned(outcome, dry_run=dry_run)
    if options.json:
        render.document(objects)
    raise typer.Exit(common_code(outcomes))


def _names(repository: Path, machines: Sequence[str] | None) -> list[str]:
    from backup.repository.repository import Repository

    return [machine.name for machine in find.machines(Repository.open(repository), machines)]


def _show_pruned(report: Report, *, dry_run: bool) -> None:
    for warning in report.warnings:
        render.warning(f"{report.machine}: {warning}")
    if options.json or options.quiet:
        return
    if dry_run or options.verbose:
        prune_table(report)
    render.line(prune_line(report, dry_run=dry_run))


@dataclass(frozen=True, slots=True)
class Keep:
    """The options of `prune`, as given; the --keep options take the place of the configuration's, all together."""

    policy: Policy
    batch: int | None

    @classmethod
    def of(cls, counts: Mapping[str, str | None], within: str | None, batch: str | None) -> Keep:
        """
        Read the options' texts.

        Raises
        ------
        UsageError
            One is no number, or no duration.
        """
        numbers = {rule: _number(f"--keep-{rule}", text, 0) for rule, text in counts.items() if text is not None}
        policy = Policy(**numbers, within=None if within is None else Duration.parse(within))
        if numbers and policy.empty:
            raise UsageError(
                "the --keep options keep nothing: every count is 0", hint="give one of them a higher count"
            )
        return cls(policy, None if batch is None else _number("--batch", batch, 1))

    def retention(self, config: Config, machine: str) -> Retention:
        """
        What counts for a machine.

        Raises
        ------
        UsageError
            Neither the options nor the configuration say what to keep.
        """
        found = config.retention_of(machine) or Retention(Policy(), Batch())
        if not self.policy.empty:
            found = replace(found, policy=self.policy)
        if found.policy.empty:
            raise UsageError(
                f"nothing says which points of machine {machine} to keep",
                hint="give --keep-last N or another --keep option, or `retention:` in the configuration",
            )
        return found if self.batch is None else replace(found, batch=replace(found.batch, points=self.batch))


def _number(option: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_COUNT)) and least <= int(text) <= MAX_COUNT):
        raise UsageError(f"{option} {text!r} is no count", hint=f"write a whole number from {least}")
    return int(text)


def prune_one(
    repository: Path, machine: str, wanted: Retention, config: Config, progress: Progress, *, dry_run: bool = False
) -> Report:
    """
    Prune one machine of the repository.

    Raises
    ------
    BackupError
        See `operations.prune.prune`.
    """
    from backup.operations import prune as pruning

    request = pruning.Request(wanted.policy, wanted.batch, settings.workers(config), dry_run)
    return pruning.prune(Repository.open(repository, settings.modes(config)).machine(machine), request, progress)


def pruned_object(report: Report, *, dry_run: bool) -> dict[str, Any]:
    """A machine's prune as scripts see it."""
    return {**asdict(report), "dry_run": dry_run, "error": None}


def unpruned_object(machine: str, problem: BackupError, *, dry_run: bool) -> dict[str, Any]:
    """A machine whose prune failed, as scripts see it."""
    nothing: dict[str, Any] = {"machine": machine, "points": [], "rewrites": [], "freed_bytes": 0, "warnings": []}
    return {**nothing, "dry_run": dry_run, "error": error_object(problem)}


def prune_table(report: Report) -> None:
    """What becomes of each point and why, and what is rewritten."""
    rows = [
        (report.machine, point.point, point.created, point.action, ", ".join(point.reasons)) for point in report.points
    ]
    table(("MACHINE", "POINT", "CREATED", "ACTION", "WHY"), rows)
    for rewrite in report.rewrites:
        line(
            f"rewrite {report.machine}/{rewrite.disk} of {rewrite.point} as {rewrite.kind}, with "
            f"{counted(len(rewrite.merged), 'point')} merged: read {show_size(rewrite.read_bytes)}, "
            f"{show_size(rewrite.stored_before)} before, {show_size(rewrite.stored_after)} after"
        )


def prune_line(report: Report, *, dry_run: bool) -> str:
    """One line for a machine."""
    waiting = f", {report.waiting} waiting" if report.waiting else ""
    return (
        f"{report.machine}: {'would remove' if dry_run else 'removed'} {report.removed} of "
        f"{counted(len(report.points), 'point')}{waiting}, {counted(len(report.rewrites), 'data file')} rewritten, "
        f"{freed_text(report.freed_bytes)}"
    )
