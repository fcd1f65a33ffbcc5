"""The command copy."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup.cli import find
from backup.cli import output as render
from backup.cli.context import options
from backup.cli.find import folder_of
from backup.cli.output import plain, problem_objects
from backup.cli.parameters import (
    DryRun,
    Limit,
    Repo,
)
from backup.errors import NotFound
from backup.model.names import check_folder
from backup.units import counted, show_duration, show_rate, show_size

if TYPE_CHECKING:
    from backup.operations.copy import Replicated


def copy_(
    what: Annotated[
        str,
        typer.Argument(metavar="MACHINE[/POINT]", help="Machine to copy, or one point with the points it builds on."),
    ],
    other: Annotated[
        str, typer.Argument(metavar="OTHER-REPOSITORY", help="Folder that `pybackup init --copy-of` created.")
    ],
    repo: Repo = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """
    Copy the points that a second place lacks.

    Every block is checked against its digest.  Points that are there already are not copied again.
    """
    from backup.cli import settings
    from backup.operations import copy
    from backup.operations.verify import exit_code
    from backup.repository.repository import Repository

    [(machine, points)] = find.points([what], folder_of(repo))
    config = find.config_or_default()
    most = settings.limit(limit, config)
    source = Repository.open(machine.path.parent)
    contents = machine.contents()
    if not contents.manifests and not contents.damaged:
        raise NotFound(f"machine {machine.name} has no point", hint="see: `pybackup list`")
    place = copy.open_second(Path(check_folder(other)), source, settings.modes(config))
    if not dry_run:
        place.tidy()
    second, point = place.machine(machine.name), points[0] if points else None
    began = time.monotonic()
    if dry_run:
        done = copy.rehearse(machine, second, point)
    else:
        with render.progress(wanted=not options.quiet) as progress:
            done = copy.replicate(
                machine,
                second,
                point,
                workers=settings.workers(config),
                begin=functools.partial(progress.begin, machine.name),
                advance=progress.advance,
                limit=most,
            )
    if options.json:
        render.document(replicated_object(machine.name, other, done, dry_run=dry_run))
    elif not options.quiet:
        seconds = None if dry_run else time.monotonic() - began
        render.line(replicated_line(machine.name, other, done, seconds))
    for problem in done.problems:
        render.problem(problem)
    raise typer.Exit(exit_code(done.problems))


def replicated_object(machine: str, other: str, done: Replicated, *, dry_run: bool) -> dict[str, Any]:
    """What was copied, or on a dry run would be, as scripts see it."""
    return {
        "machine": machine,
        "repository": other,
        "dry_run": dry_run,
        "copied": list(done.copied),
        "present": list(done.present),
        "bytes": done.bytes,
        "problems": problem_objects(done.problems),
    }


def replicated_line(machine: str, other: str, done: Replicated, seconds: float | None) -> str:
    """One line for a machine that was copied in so many seconds; None: it was not, only planned."""
    what = f"{counted(len(done.copied), 'point')}, {show_size(done.bytes)}, to {plain(other)}"
    if seconds is None:
        return f"{machine}: would copy {what}; {len(done.present)} are there"
    spent = f"in {show_duration(seconds)}, {show_rate(done.bytes, seconds)}"
    return f"{machine}: copied {what} {spent}; {len(done.present)} were there"
