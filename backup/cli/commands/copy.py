"""The command copy."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options, show_error, user_error
from backup.cli.json_output import ProblemDocument
from backup.cli.output import plain
from backup.cli.parameters import DryRun, IdentityFile, Limit, Repo
from backup.errors import BackupError, UsageError
from backup.units import counted, show_duration, show_rate, show_size

if TYPE_CHECKING:
    from backup.cli.find import Named
    from backup.config.settings import Config
    from backup.operations.copies import Copying, Job, Outcome, Target
    from backup.operations.copy import Replicated
    from backup.repository.repository import Repository


def copy_(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MACHINE[/POINT]]... DEST",
            help="Machines to copy, or points with the points they build on (default: all machines), and the second "
            "place that `pybackup init --copy-of` created: a folder, s3://BUCKET/PREFIX, or the name of a place in "
            "`copies` of the configuration.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="NAME", help="Copy to this place of the configuration; all arguments are machines."
        ),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Copy to every place of the configuration; all arguments are machines.")
    ] = False,
    repo: Repo = None,
    identity: IdentityFile = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """
    Copy the points that a second place lacks.

    Every block is checked against its digest.  Points that are there already are not copied again.  A machine or a
    place that fails does not stop the others.
    """
    from backup.cli import settings
    from backup.operations import copies

    config, names = find.config_or_default(), list(what or ())
    if to is None and not all_:
        if not names:
            raise UsageError(
                "copy needs the place to copy to",
                hint="name it behind the machines, or give --to NAME or --all; see: `pybackup copy --help`",
            )
        chosen = [places.place(names[-1])]
        shown = [names.pop()]
    else:
        config = find.config()
        chosen = _configured(config, to, everywhere=all_)
        shown = [str(place.location) for place in chosen]
    targets = [places.target(text, place, config, limit) for text, place in zip(shown, chosen, strict=True)]
    named = places.named(repo, identity)
    watch = functools.partial(output.progress, wanted=not options.quiet)
    copying = copies.Copying(settings.workers(config), watch, dry_run)
    single = len(names) == 1 and not all_
    jobs = _jobs(names, named)
    outcomes: list[Outcome] = []
    for outcome in _outcomes(copying, targets, jobs, named):
        if single and isinstance(outcome.result, BackupError):
            raise outcome.result
        _show(outcome, dry_run=dry_run, several=not single)
        outcomes.append(outcome)
    if options.json and single:
        [outcome] = outcomes
        assert outcome.machine is not None
        assert not isinstance(outcome.result, BackupError)
        json_output.write(CopyDocument.of(outcome.machine, outcome.place, outcome.result, dry_run=dry_run))
    elif options.json:
        json_output.write([MachineDocument.of(outcome, dry_run=dry_run) for outcome in outcomes])
    raise typer.Exit(copies.exit_code(outcomes))


def _configured(config: Config, to: str | None, *, everywhere: bool) -> list[places.Place]:
    """Return the places that --to or --all means."""
    if to is not None and everywhere:
        raise UsageError("--to together with --all", hint="give one of the two")
    if to is not None:
        return [places.called(to, config)]
    if not config.copies:
        raise UsageError("the configuration has no second places", hint="add `copies:` to it, or name the place")
    return [places.called(copy.name, config) for copy in config.copies]


def _jobs(names: Sequence[str], named: Named) -> list[Job] | None:
    """Return what the names mean, or None without names."""
    from backup.operations.copies import Job

    if not names:
        return None
    jobs = []
    for name in names:
        source = find.repository_of(name, named)
        [(machine, points)] = find.points([name], named)
        jobs.append(Job(source, machine, points[0] if points else None))
    if len({job.source.id for job in jobs}) > 1:
        raise UsageError("the points are of several repositories", hint="copy the points of each repository by itself")
    return jobs


def _outcomes(
    copying: Copying, targets: Sequence[Target], jobs: Sequence[Job] | None, named: Named
) -> Iterator[Outcome]:
    source: Repository = find.repository(named) if jobs is None else jobs[0].source
    for target in targets:
        yield from copying.to_place(target, source, jobs)


# Text


def _show(outcome: Outcome, *, dry_run: bool, several: bool) -> None:
    if isinstance(outcome.result, BackupError):
        of = outcome.machine if outcome.machine is not None else outcome.place
        show_error(user_error(outcome.result), of=of if several else None)
        return
    assert outcome.machine is not None
    if not options.json and not options.quiet:
        seconds = None if dry_run else outcome.seconds
        output.line(_copied_line(outcome.machine, outcome.place, outcome.result, seconds))
        output.flush()
    for problem in outcome.result.problems:
        output.problem(problem)


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


@dataclass(frozen=True, slots=True)
class MachineDocument:
    """One machine of several, as CopyDocument, or why it was not copied; `machine` is null if the place failed."""

    machine: str | None
    repository: str
    dry_run: bool
    copied: Sequence[str]
    present: Sequence[str]
    bytes: int
    problems: Sequence[ProblemDocument]
    error: BackupError | None

    @classmethod
    def of(cls, outcome: Outcome, *, dry_run: bool) -> MachineDocument:
        """Return the document of an outcome."""
        result = outcome.result
        if isinstance(result, BackupError):
            return cls(outcome.machine, outcome.place, dry_run, (), (), 0, (), result)
        problems = json_output.problem_documents(result.problems)
        return cls(outcome.machine, outcome.place, dry_run, result.copied, result.present, result.bytes, problems, None)
