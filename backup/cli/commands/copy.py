"""The command copy."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options
from backup.cli.json_output import ProblemDocument
from backup.cli.output import plain
from backup.cli.parameters import DryRun, Limit, Repo
from backup.errors import NotFound
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

    [(machine, points)] = find.points([what], places.named(repo))
    config = find.config_or_default()
    bytes_a_second = settings.limit(limit, config)
    source = Repository.open(machine.storage)
    contents = machine.contents()
    if not contents.manifests and not contents.damaged:
        raise NotFound(f"machine {machine.name} has no point", hint="see: `pybackup list`")
    second = copy.open_second(settings.storage(places.place(other).location, config), source)
    if not dry_run:
        second.tidy()
    target, point = second.machine(machine.name), points[0] if points else None
    began = time.monotonic()
    if dry_run:
        result = copy.rehearse(machine, target, point)
    else:
        with output.progress(wanted=not options.quiet) as progress:
            result = copy.replicate(
                machine,
                target,
                point,
                workers=settings.workers(config),
                begin=functools.partial(progress.begin, machine.name),
                advance=progress.advance,
                limit=bytes_a_second,
            )
    if options.json:
        json_output.write(CopyDocument.of(machine.name, other, result, dry_run=dry_run))
    elif not options.quiet:
        seconds = None if dry_run else time.monotonic() - began
        output.line(_copied_line(machine.name, other, result, seconds))
    for problem in result.problems:
        output.problem(problem)
    raise typer.Exit(exit_code(result.problems))


# Text


def _copied_line(machine: str, other: str, result: Replicated, seconds: float | None) -> str:
    """Return the line of a machine that was copied in `seconds`; None means a dry run."""
    what = f"{counted(len(result.copied), 'point')}, {show_size(result.bytes)}, to {plain(other)}"
    if seconds is None:
        return f"{machine}: would copy {what}; {len(result.present)} are there already"
    spent = f"in {show_duration(seconds)}, {show_rate(result.bytes, seconds)}"
    return f"{machine}: copied {what} {spent}; {len(result.present)} were there already"


# JSON


@dataclass(frozen=True, slots=True)
class CopyDocument:
    """A machine that was copied, or would be: ids of its copied points, and of those that were there already."""

    machine: str
    repository: str
    dry_run: bool
    copied: Sequence[str]
    present: Sequence[str]
    bytes: int
    problems: Sequence[ProblemDocument]

    @classmethod
    def of(cls, machine: str, other: str, result: Replicated, *, dry_run: bool) -> CopyDocument:
        """Return the document of a machine that was copied to the repository `other`."""
        problems = json_output.problem_documents(result.problems)
        return cls(machine, other, dry_run, result.copied, result.present, result.bytes, problems)
