"""The command remove."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find
from backup.cli import output as render
from backup.cli.context import options
from backup.cli.find import folder_of
from backup.cli.output import err, freed_text, plain
from backup.cli.parameters import (
    DryRun,
    Repo,
)
from backup.errors import Failed, UsageError
from backup.units import counted

if TYPE_CHECKING:
    from backup.operations.remove import Removal


def remove(
    what: Annotated[
        str, typer.Argument(metavar="MACHINE[/POINT]", help="Machine, or one of its points by the whole id.")
    ],
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove without asking.  Needed where there is no terminal.")
    ] = False,
    repo: Repo = None,
    dry_run: DryRun = False,
) -> None:
    """
    Remove a point, or a machine with all its points.

    The points that stay keep all their data: what they share with the removed point is merged into them first.
    """
    from backup.cli import settings
    from backup.operations import remove as removing
    from backup.repository.repository import Repository

    name, slash, point = what.partition("/")
    if slash and (not point or point == "latest"):
        raise UsageError(f"{what} names no point", hint=f"name the point by its whole id; see: `pybackup list {name}`")
    if not yes and not dry_run and not sys.stdin.isatty():
        raise UsageError("remove asks before it removes, and there is no terminal", hint="give --yes, or --dry-run")
    config = find.config() if repo is None else find.config_or_default()
    path = settings.repository_path(folder_of(repo), config)
    [machine] = find.machines(Repository.open(path, settings.modes(config)), [name])
    workers = settings.workers(config)
    removal = removing.plan(machine, point or None, workers=workers)
    if not dry_run:
        if not yes:
            _require_confirmed(removal)
        with render.progress(wanted=not options.quiet) as progress:
            removal = removing.remove(machine, removal, workers=workers, progress=progress)
    if options.json:
        render.document({**asdict(removal), "dry_run": dry_run, "error": None})
    elif not options.quiet:
        for text in removal_lines(removal, "would remove" if dry_run else "removed"):
            render.line(text)


def _require_confirmed(removal: Removal) -> None:
    for text in removal_lines(removal, "this removes"):
        render.to_stderr(text)
    if not asked("Go on?"):
        raise Failed("not confirmed: nothing was removed", hint="answer y, or give --yes")


def removal_lines(removal: Removal, verb: str) -> Iterator[str]:
    """What is removed of a machine, and what follows from that."""
    if removal.point is not None:
        rewritten = counted(len(removal.rewrites), "data file")
        what = f"point {removal.point}: {rewritten} rewritten"
    else:
        damaged = f" and {counted(len(removal.damaged), 'damaged manifest')}" if removal.damaged else ""
        what = f"the machine with {counted(len(removal.removed), 'point')}{damaged}"
    yield f"{removal.machine}: {verb} {what}, {freed_text(removal.freed_bytes)}"
    for text in removal.notes:
        yield f"pybackup: note: {plain(text)}"


def asked(question: str) -> bool:
    """Ask on the terminal; only y and yes mean yes."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        err("")  # Ctrl-D: the shell's prompt begins a line of its own
    return answer.strip().lower() in {"y", "yes"}
