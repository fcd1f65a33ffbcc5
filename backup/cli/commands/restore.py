"""The command restore."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup.cli import find
from backup.cli import output as render
from backup.cli.context import options, show_error
from backup.cli.find import folder_of
from backup.cli.output import plain
from backup.cli.parameters import (
    PointName,
    Repo,
    WriteLimit,
)
from backup.errors import WARNINGS_EXIT_CODE, UsageError
from backup.units import show_duration, show_rate, show_size

if TYPE_CHECKING:
    from backup.model.manifest import Manifest
    from backup.operations.restore_targets import Place
    from backup.repository.machine import Machine
    from backup.repository.salvage import Lost


def restore(
    manifest: PointName,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="File, folder, block device or NBD URI to write to, or - for standard output.  A folder gets "
            "DISK.raw or DISK.qcow2 for each disk.",
        ),
    ],
    disk: Annotated[
        str | None, typer.Option("--disk", metavar="NAME", help="Disk to restore.  Default: all disks of the point.")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="raw|qcow2", help="Format to write.  Default: qcow2 if TARGET ends in .qcow2, else raw."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Overwrite an existing TARGET.  Always needed for devices and NBD exports."),
    ] = False,
    salvage: Annotated[
        bool,
        typer.Option(
            "--salvage",
            help="Restore what is intact of a damaged chain, write zeroes for the rest, list those ranges, and exit "
            "with 12.",
        ),
    ] = False,
    repo: Repo = None,
    limit: WriteLimit = None,
) -> None:
    """
    Restore the disks of a point.

    Every block is checked against its digest before it is written.  A file appears under its name only when it is
    complete.
    """
    from backup.cli import settings
    from backup.operations import restore as restoring
    from backup.operations import restore_space, restore_targets
    from backup.repository import salvage as salvaging

    find.require_format(format_)
    machine, found = find.point(manifest, folder_of(repo))
    config = find.config_or_default()
    # Not the configuration's limit: on the day of a restore everybody waits for it.
    workers, most = settings.workers(config), None if limit is None else settings.limit(limit, config)
    placed = restore_targets.place(machine, found, target, disk, format_, force=force)
    for text in placed.warnings:
        render.warning(text)
    if target == restore_targets.STDOUT:
        _stream(machine, found, placed.places[0], workers, most, salvage=salvage)
        return
    restore_space.require(machine, found, placed.places)
    done: list[dict[str, Any]] = []
    lost: list[tuple[str, Lost]] = []
    with restore_targets.made(placed.folder):
        for place in placed.places:
            began = time.monotonic()
            with render.progress(wanted=not options.quiet) as progress:
                restored = restoring.restore_disk(
                    machine,
                    found.point,
                    place.disk,
                    place.target,
                    image_format=place.format,
                    force=force,
                    workers=workers,
                    progress=progress,
                    limit=most,
                    salvaging=salvage,
                )
            seconds = round(time.monotonic() - began, 3)
            lost += [(place.disk, each) for each in restored.lost]
            done.append({"name": place.disk, "target": place.target, **asdict(restored), "seconds": seconds})
            if not options.json and not options.quiet:
                name = f"{found.machine}/{place.disk}"
                render.line(restored_line(name, place.target, restored.size, seconds))
                for text in lost_lines(restored.lost):
                    render.line(text)
    error = salvaging.loss(found.machine, lost)
    if error is not None:
        show_error(error)
    if options.json:
        told = None if error is None else render.error_object(error)
        document = {"machine": found.machine, "point": found.point, "warnings": list(placed.warnings), "error": told}
        render.document({**document, "disks": done})
    if error is not None:
        raise typer.Exit(error.exit_code)
    raise typer.Exit(WARNINGS_EXIT_CODE if placed.warnings else 0)


def _stream(machine: Machine, point: Manifest, place: Place, workers: int, limit: int | None, *, salvage: bool) -> None:
    """A disk to standard output, and all that is said about it to standard error."""
    from backup.engine import streamer as streaming

    output = 1  # sys.stdout would buffer once more
    if os.isatty(output):
        raise UsageError(
            "standard output is a terminal", hint="send the stream into a file or a program: > FILE, | PROGRAM"
        )
    for given, option in ((options.json, "--json"), (salvage, "--salvage"), (place.format != "raw", "--format qcow2")):
        if given:
            raise UsageError(f"{option} together with -", hint="standard output takes the raw stream and nothing else")
    began = time.monotonic()
    with render.progress(wanted=not options.quiet) as progress:
        done = streaming.stream(
            machine, point.point, place.disk, output, workers=workers, progress=progress, limit=limit
        )
    if not options.quiet:
        name, seconds = f"{point.machine}/{place.disk}", time.monotonic() - began
        render.note(restored_line(name, "standard output", done.size, seconds), to_stderr=True)


def restored_line(name: str, target: str, size: int, seconds: float) -> str:
    """One line for a restored disk."""
    return (
        f"{name}: restored {show_size(size)} to {plain(target)} in {show_duration(seconds)}, {show_rate(size, seconds)}"
    )


def lost_lines(lost: Sequence[Lost]) -> Iterator[str]:
    """A line for each range of the disk that a salvage could not bring back: start, length, why."""
    for each in lost:
        yield f"{each.start:>16}  {each.length:>16}  not proven, {each.content}: {plain(each.why)}"
