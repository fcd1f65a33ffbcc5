"""The command verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options
from backup.cli.json_output import ProblemDocument
from backup.cli.parameters import IdentityFile, Limit, Repo
from backup.errors import BackupError, UsageError
from backup.units import counted, show_size

if TYPE_CHECKING:
    from backup.operations.verify import Choice, Problem, Verified


def verify(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MANIFEST|MACHINE",
            help="Points (as for restore) or machines to verify.  Default: all machines.",
            show_default=False,
        ),
    ] = None,
    repo: Repo = None,
    identity: IdentityFile = None,
    deep: Annotated[bool, typer.Option("--deep", help="Decompress every cluster as well.")] = False,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than",
            metavar="30d",
            help="Skip files that were verified without a fault in this time.  Units: s, min, h, d, w.",
        ),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option("--sample", metavar="5%", help="Read only this share of the blocks of 4 MiB, chosen at random."),
    ] = None,
    limit: Limit = None,
) -> None:
    """
    Re-read the stored data, and report every changed byte.

    Every block is checked against its digest.  Exit code 12: something is damaged.  Exit code 10: something is missing.
    """
    from backup.cli import settings
    from backup.operations import verify as verifying

    config = find.config_or_default()
    workers, bytes_a_second = settings.workers(config), settings.limit(limit, config)
    choice = _choice(older_than, sample, deep=deep)
    results: list[Verified] = []
    with output.progress(wanted=not options.quiet) as progress:
        for machine, points in find.points(what or [], places.named(repo, identity), config):
            try:
                progress.begin(machine.name, verifying.stored_bytes(machine, points, choice, deep=deep))
                result = verifying.verify_machine(
                    machine,
                    deep=deep,
                    workers=workers,
                    progress=progress.advance,
                    points=points,
                    choice=choice,
                    limit=bytes_a_second,
                )
            except BackupError as error:  # this machine's folder cannot be read; the others are verified all the same
                result = verifying.unverified(machine, error)
            results.append(result)
    problems = [problem for result in results for problem in result.problems]
    document = VerifyDocument.of(results, problems, deep=deep)
    if options.json:
        json_output.write(document)
    elif not options.quiet:
        output.line(_verified_line(document))
    for reason in sorted({result.forgotten for result in results if result.forgotten is not None}):
        if not options.quiet:
            output.note(f"the result could not be saved for later runs: {reason}", to_stderr=True)
    for problem in problems:
        output.problem(problem)
    raise typer.Exit(verifying.exit_code(problems))


def _choice(older_than: str | None, sample: str | None, *, deep: bool) -> Choice:
    """Read the options that choose what is verified."""
    from backup.operations.verify import Choice
    from backup.units import parse_duration, parse_share

    if deep and sample is not None:
        raise UsageError(
            "--deep together with --sample",
            hint="give one of the two: --deep needs whole files, and a sample has only some of their blocks",
        )
    since = None
    if older_than is not None:
        try:
            since = datetime.now(UTC) - timedelta(seconds=parse_duration(older_than))
        except OverflowError:
            since = datetime.min.replace(tzinfo=UTC)  # every time is later
    return Choice(since, 1.0 if sample is None else parse_share(sample))


# JSON and text


@dataclass(frozen=True, slots=True)
class VerifyDocument:
    """What was verified of all machines, and what is wrong."""

    points: int
    files: int
    bytes: int
    skipped: int
    sampled: int
    deep: bool
    problems: Sequence[ProblemDocument]

    @classmethod
    def of(cls, results: Sequence[Verified], problems: Sequence[Problem], *, deep: bool) -> VerifyDocument:
        """Add up the results of the machines."""
        return cls(
            points=sum(result.points for result in results),
            files=sum(result.files for result in results),
            bytes=sum(result.bytes for result in results),
            skipped=sum(result.skipped for result in results),
            sampled=sum(result.sampled for result in results),
            deep=deep,
            problems=json_output.problem_documents(problems),
        )


def _verified_line(verified: VerifyDocument) -> str:
    sample = f" (a sample of {counted(verified.sampled, 'file')})" if verified.sampled else ""
    skipped = f", {verified.skipped} skipped" if verified.skipped else ""
    count = len(verified.problems)
    problems = counted(count, "problem") if count else "no problems"
    return (
        f"verified {counted(verified.points, 'point')}, {counted(verified.files, 'data file')}, "
        f"{show_size(verified.bytes)}{sample}{skipped}: {problems}"
    )
