"""The command audit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from backup.cli import find, output
from backup.cli.context import completed, explained, options, show_error
from backup.cli.find import folder_of
from backup.cli.output import err, error_object, plain
from backup.cli.parameters import (
    BitmapName,
    ConfiguredMachines,
    DiskNames,
    Exclude,
    ImageFormats,
    Images,
    Limit,
    MachineName,
    Nbd,
    Nodes,
    Qmp,
    Repo,
    Scratch,
    Since,
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
            qmp=qmp,
            node=node,
            exclude=exclude,
            scratch=scratch,
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

    config = find.config()
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
                audit_failure_object(request.machine, outcome)
                if isinstance(outcome, BackupError)
                else audit_object(outcome)
                for request, outcome in outcomes
            ]
        )
    raise typer.Exit(_audit_code([outcome for _, outcome in outcomes]))


def _audit_one(repository: Repository, request: Request) -> Audit | BackupError:
    """Audit one machine."""
    from backup.night.night import attempt
    from backup.operations.audit import audit as take

    def work() -> Audit:
        with output.progress(wanted=not options.quiet) as progress:
            return take(repository, request, progress)

    outcome = attempt(work)
    return explained(outcome) if isinstance(outcome, BackupError) else outcome


def _show_audit(request: Request, outcome: Audit | BackupError, *, several: bool) -> None:
    if isinstance(outcome, BackupError):
        show_error(outcome, of=request.machine if several else None)
        return
    for warning in outcome.warnings:
        output.warning(f"{outcome.machine}: {warning}")
    if not options.json and not options.quiet:
        for text in audit_lines(outcome):
            output.line(text)
        output.flush()
    audit_problems(outcome, completed)


def _audit_code(outcomes: Sequence[Audit | BackupError]) -> int:
    """Merge the outcomes: a wrong bitmap or a damaged chain (12) first; an unknown verdict counts as a failure (14)."""
    from backup.operations.audit import LIES, UNKNOWN

    codes = [outcome.exit_code for outcome in outcomes if isinstance(outcome, BackupError)]
    audits = [outcome for outcome in outcomes if not isinstance(outcome, BackupError)]
    verdict_codes = {LIES: Damaged.exit_code, UNKNOWN: BitmapUnusable.exit_code}
    codes += [verdict_codes.get(disk.verdict, 0) for found in audits for disk in found.disks]
    return merged_exit_code(codes, worst=(Damaged.exit_code,), warned=any(found.warnings for found in audits))


def audit_object(found: Audit) -> dict[str, Any]:
    """A machine's audit as scripts see it."""
    disks = [
        {
            **asdict(disk),
            "differences": [{"start": start, "length": end - start} for start, end in disk.differences],
            "verdict": disk.verdict,
        }
        for disk in found.disks
    ]
    return {"machine": found.machine, "warnings": list(found.warnings), "error": None, "disks": disks}


def audit_failure_object(machine: str, problem: BackupError) -> dict[str, Any]:
    """A machine whose audit failed, as scripts see it."""
    return {"machine": machine, "warnings": [], "error": error_object(problem), "disks": []}


def audit_lines(found: Audit) -> Iterator[str]:
    """One line per disk, and one for each range that differs."""
    for disk in found.disks:
        left_out = f", left out {show_size(disk.dirty_bytes)} that changed since" if disk.bitmap else ""
        yield (
            f"{found.machine}/{disk.name}: {_verdict(disk)}: compared with {disk.point}, read "
            f"{show_size(disk.read_bytes)} of {show_size(disk.size)} in {show_duration(disk.seconds)}{left_out}"
        )
        for start, end in disk.differences:
            yield f"{start:>16}  {end - start:>16}  differs"
        if not disk.complete:
            yield f"{'':>34}  and more"


def _verdict(disk: DiskAudit) -> str:
    if disk.differing_bytes:
        return f"{disk.differing_bytes} bytes differ"
    return "equal" if disk.size == disk.point_size else f"equal, but {disk.size - disk.point_size:+} bytes long"


def audit_problems(found: Audit, completed: Callable[[str], str]) -> None:
    """Two lines for each disk that is not known to be what the chain says; `completed` gives hints their options."""
    for disk in found.disks:
        if disk.verdict == "true":
            continue
        place = f"{found.machine}/{disk.name}"
        if disk.bitmap is not None:
            err(
                f"pybackup: error: {plain(place)}: {disk.differing_bytes} bytes that bitmap {plain(disk.bitmap)} calls "
                f"clean differ from point {disk.point}: the bitmap lies, or the chain does"
            )
            hint = "`pybackup rescan` stores what differs and starts a new bitmap; keep older points"
        else:
            err(
                f"pybackup: error: {plain(place)}: {_verdict(disk)}, and whether that changed since point {disk.point} "
                f"or was missed by it nobody can tell: {plain(disk.why or '')}"
            )
            hint = "`pybackup rescan` stores what differs; an audit after it can tell"
        err(f"pybackup: hint: {completed(hint)}")
