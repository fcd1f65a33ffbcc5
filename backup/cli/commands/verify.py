"""The command verify."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find
from backup.cli import output as render
from backup.cli.context import options
from backup.cli.find import folder_of
from backup.cli.parameters import (
    Limit,
    Repo,
)
from backup.errors import BackupError, UsageError
from backup.units import counted, show_size

if TYPE_CHECKING:
    from backup.operations.verify import Choice, Verified


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
    workers, most = settings.workers(config), settings.limit(limit, config)
    choice = _choice(older_than, sample, deep=deep)
    found: list[Verified] = []
    with render.progress(wanted=not options.quiet) as progress:
        for machine, points in find.points(what or [], folder_of(repo)):
            try:
                progress.begin(machine.name, verifying.stored_bytes(machine, points, choice, deep=deep))
                verified = verifying.verify_machine(
                    machine,
                    deep=deep,
                    workers=workers,
                    progress=progress.advance,
                    points=points,
                    choice=choice,
                    limit=most,
                )
            except BackupError as error:  # of this machine's folder; the others are verified all the same
                verified = verifying.unverified(machine, error)
            found.append(verified)
    problems = [problem for result in found for problem in result.problems]
    names = ("points", "files", "bytes", "skipped", "sampled")
    sums = {name: sum(getattr(result, name) for result in found) for name in names}
    if options.json:
        render.document({**sums, "deep": deep, "problems": render.problem_objects(problems)})
    elif not options.quiet:
        render.line(
            f"verified {verified_text(sums)}: {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}"
        )
    for why in sorted({result.forgotten for result in found if result.forgotten is not None}):
        if not options.quiet:
            render.note(f"what was found is not remembered: {why}", to_stderr=True)
    for problem in problems:
        render.problem(problem)
    raise typer.Exit(verifying.exit_code(problems))


def _choice(older_than: str | None, sample: str | None, *, deep: bool) -> Choice:
    from backup.operations.verify import Choice
    from backup.units import parse_duration, parse_share

    if deep and sample is not None:
        raise UsageError("--deep together with --sample", hint="a sample is of blocks, whose clusters cross their ends")
    since = None
    if older_than is not None:
        try:
            since = datetime.now(UTC) - timedelta(seconds=parse_duration(older_than))
        except OverflowError:
            since = datetime.min.replace(tzinfo=UTC)  # before Christ: all that was ever verified is newer
    return Choice(since, 1.0 if sample is None else parse_share(sample))


def verified_text(sums: Mapping[str, int]) -> str:
    """What was verified."""
    text = f"{counted(sums['points'], 'point')}, {counted(sums['files'], 'data file')}, {show_size(sums['bytes'])}"
    if sums["sampled"]:
        text += f" (a sample of {counted(sums['sampled'], 'file')})"
    return text + (f", {sums['skipped']} left out" if sums["skipped"] else "")
