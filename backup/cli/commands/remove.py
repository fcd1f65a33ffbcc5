"""The command remove."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options
from backup.cli.output import freed_text, plain
from backup.cli.parameters import DryRun, IdentityFile, Repo
from backup.errors import BackupError, Failed, UsageError
from backup.units import counted

if TYPE_CHECKING:
    from backup.operations.prune import RewriteReport
    from backup.operations.remove import Removal


def remove(
    what: Annotated[
        str, typer.Argument(metavar="MACHINE[/POINT]", help="Machine, or one of its points by the whole id.")
    ],
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove without asking.  Needed where there is no terminal.")
    ] = False,
    repo: Repo = None,
    identity: IdentityFile = None,
    dry_run: DryRun = False,
) -> None:
    """
    Remove a point, or a machine with all its points.

    The other points keep all their data: what they need from the removed point is merged into them first.
    """
    from backup.cli import settings
    from backup.operations import remove as removing

    name, slash, point = what.partition("/")
    if slash and (not point or point == "latest"):
        raise UsageError(f"{what} names no point", hint=f"name the point by its whole id; see: `pybackup list {name}`")
    if not yes and not dry_run and not sys.stdin.isatty():
        raise UsageError("remove asks before it removes, and there is no terminal", hint="give --yes or --dry-run")
    config = find.config() if repo is None else find.config_or_default()
    location = settings.repository_location(places.named(repo, identity).location, config)
    [machine] = find.machines(find.open_at(location, config, identity), [name])
    workers = settings.workers(config)
    removal = removing.plan(machine, point or None, workers=workers)
    if not dry_run:
        if not yes:
            _require_confirmed(removal)
        with output.progress(wanted=not options.quiet) as progress:
            removal = removing.remove(machine, removal, workers=workers, progress=progress)
    if options.json:
        json_output.write(RemoveDocument.of(removal, dry_run=dry_run))
    elif not options.quiet:
        for text in _lines(removal, "would remove" if dry_run else "removed"):
            output.line(text)


def _require_confirmed(removal: Removal) -> None:
    """Show what will be removed, and ask on the terminal; only y and yes mean yes."""
    for text in _lines(removal, "this removes"):
        output.err(text)
    sys.stderr.write("Go on? [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        output.err("")  # after Ctrl-D the cursor is still behind the question
    if answer.strip().lower() not in {"y", "yes"}:
        raise Failed("not confirmed: nothing was removed", hint="answer y, or give --yes")


# Text


def _lines(removal: Removal, verb: str) -> Iterator[str]:
    """Yield lines that say what is removed of a machine, and what the consequences are."""
    if removal.point is not None:
        what = f"point {removal.point}: {counted(len(removal.rewrites), 'data file')} rewritten"
    else:
        damaged = f" and {counted(len(removal.damaged), 'damaged manifest')}" if removal.damaged else ""
        what = f"the machine with {counted(len(removal.removed), 'point')}{damaged}"
    yield f"{removal.machine}: {verb} {what}, {freed_text(removal.freed_bytes)}"
    for note in removal.notes:
        yield f"pybackup: note: {plain(note)}"


# JSON


@dataclass(frozen=True, slots=True)
class RemoveDocument:
    """What was removed, or would be; `point` is null if the whole machine is removed."""

    machine: str
    point: str | None
    removed: Sequence[str]
    rewrites: Sequence[RewriteReport]
    damaged: Sequence[str]
    freed_bytes: int
    notes: Sequence[str]
    dry_run: bool
    error: BackupError | None = None

    @classmethod
    def of(cls, removal: Removal, *, dry_run: bool) -> RemoveDocument:
        """Return the document of a removal."""
        return cls(**json_output.fields_of(removal), dry_run=dry_run)
