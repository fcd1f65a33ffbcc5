"""The command status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup.cli import find
from backup.cli import output as render
from backup.cli.context import options
from backup.cli.find import folder_of
from backup.cli.output import table
from backup.cli.parameters import (
    MachineNames,
    Repo,
)
from backup.errors import NotFound
from backup.units import show_age, show_size

if TYPE_CHECKING:
    from backup.operations.status import DiskStatus, Trust


def status(
    machines: MachineNames = None,
    max_age: Annotated[
        str | None,
        typer.Option(
            "--max-age",
            metavar="26h",
            help="Exit with 1 if the newest point of a disk is older.  Units: s, min, h, d, w.",
        ),
    ] = None,
    repo: Repo = None,
) -> None:
    """
    Show the age and state of each disk's newest point.

    The exit code is 0 if all is well, 1 if a point is older than --max-age, 10 if something is missing, and 12 if
    something is damaged.
    """
    from backup.cli import settings
    from backup.operations import status as states
    from backup.units import parse_duration

    limits = states.Limits(datetime.now(UTC), None if max_age is None else parse_duration(max_age))
    config = find.config() if repo is None else find.config_or_default()
    repository = find.repository(folder_of(repo))
    expected = settings.expected_disks(config, repository.path)
    known = {*repository.machine_names(), *expected}
    found = []
    for name in dict.fromkeys(machines or sorted(known)):
        machine = repository.machine(name) if name in known else find.machines(repository, [name])[0]
        found += states.look(machine, expected.get(name), limits, named=name in expected or not expected)
    if not found:
        raise NotFound(f"the repository {repository.path} has no machine", hint="`pybackup full` makes a first point")
    code = states.exit_code(found)
    if options.json:
        render.document(status_object(found, code, states.summary(found), limits.max_age))
    elif not options.quiet:
        render.line(render.plain(states.summary(found)))
        status_table(found, limits.now)
    if code and (options.json or options.quiet):
        render.warning(states.summary(found))
    raise typer.Exit(code)


def status_object(found: Sequence[DiskStatus], code: int, summary: str, max_age: float | None) -> dict[str, Any]:
    """The state of the disks as scripts see it."""
    return {"code": code, "summary": summary, "max_age": max_age, "disks": [asdict(status) for status in found]}


def status_table(found: Sequence[DiskStatus], now: datetime) -> None:
    """The state of the disks, a line for each."""
    rows = [
        (
            status.machine,
            status.disk or "-",
            status.point or "-",
            "-" if status.age_seconds is None else show_age(status.age_seconds),
            "-" if status.chain_points is None else str(status.chain_points),
            "-" if status.stored_bytes is None else show_size(status.stored_bytes),
            "-" if status.logical_bytes is None else show_size(status.logical_bytes),
            "-" if status.verified is None else _trust_text(status.verified, now),
            status.next,
        )
        for status in found
    ]
    columns = ("MACHINE", "DISK", "NEWEST", "AGE", "CHAIN", "STORED", "SIZE", "VERIFIED", "NEXT")
    table(columns, rows, right=(3, 4, 5, 6))


def _trust_text(trust: Trust, now: datetime) -> str:
    from backup.model.documents import moment_of

    if trust.last is None:
        return "never"
    ago = f"{show_age(max((now - moment_of(trust.last)).total_seconds(), 0))} ago"
    return f"damaged, {ago}" if trust.code else f"{trust.files} of {trust.of}, {ago}"
