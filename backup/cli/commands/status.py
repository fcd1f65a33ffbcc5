"""The command status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options
from backup.cli.parameters import IdentityFile, MachineNames, Repo
from backup.errors import NotFound
from backup.units import parse_duration, show_age, show_size

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
    identity: IdentityFile = None,
) -> None:
    """
    Show the age and state of each disk's newest point.

    The exit code is 0 if all is well, 1 if a point is older than --max-age, 10 if something is missing, and 12 if
    something is damaged.
    """
    from backup.cli import settings
    from backup.operations import status as states

    limits = states.Limits(datetime.now(UTC), None if max_age is None else parse_duration(max_age))
    config = find.config() if repo is None else find.config_or_default()
    named = places.named(repo, identity)
    repository = find.repository(named)
    expected = settings.expected_disks(config, named.location, repository.machine_names())
    known = {*repository.machine_names(), *expected}
    disks: list[DiskStatus] = []
    for name in dict.fromkeys(machines or sorted(known)):
        machine = repository.machine(name) if name in known else find.machines(repository, [name])[0]
        disks += states.look(machine, expected.get(name), limits, named=name in expected or not expected)
    if not disks:
        raise NotFound(
            f"the repository {repository.location} has no machine", hint="`pybackup full` creates the first point"
        )
    code, summary = states.exit_code(disks), states.summary(disks)
    if options.json:
        json_output.write(StatusDocument(code, summary, limits.max_age, disks))
    elif not options.quiet:
        output.line(output.plain(summary))
        _show_table(disks, limits.now)
    if code and (options.json or options.quiet):
        output.warning(summary)
    raise typer.Exit(code)


# JSON


@dataclass(frozen=True, slots=True)
class StatusDocument:
    """The state of the disks; `code` is the exit code, `max_age` the limit of --max-age in seconds."""

    code: int
    summary: str
    max_age: float | None
    disks: Sequence[DiskStatus]


# Text


def _show_table(disks: Sequence[DiskStatus], now: datetime) -> None:
    rows = [
        (
            disk.machine,
            disk.disk or "-",
            disk.point or "-",
            "-" if disk.age_seconds is None else show_age(disk.age_seconds),
            "-" if disk.chain_points is None else str(disk.chain_points),
            "-" if disk.stored_bytes is None else show_size(disk.stored_bytes),
            "-" if disk.logical_bytes is None else show_size(disk.logical_bytes),
            "-" if disk.verified is None else _trust_text(disk.verified, now),
            disk.next,
        )
        for disk in disks
    ]
    columns = ("MACHINE", "DISK", "NEWEST", "AGE", "CHAIN", "STORED", "SIZE", "VERIFIED", "NEXT")
    output.table(columns, rows, right=(3, 4, 5, 6))


def _trust_text(trust: Trust, now: datetime) -> str:
    """Say when the files of a chain were verified, and how many of them."""
    from backup.model.documents import moment_of

    if trust.last is None:
        return "never"
    ago = f"{show_age(max((now - moment_of(trust.last)).total_seconds(), 0))} ago"
    return f"damaged, {ago}" if trust.code else f"{trust.files} of {trust.of}, {ago}"
