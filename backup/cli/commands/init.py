"""The command init."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from backup.cli import find, output
from backup.cli.context import options
from backup.model.names import check_folder


def init(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="New or empty folder.")],
    copy_of: Annotated[
        str | None,
        typer.Option(
            "--copy-of",
            metavar="REPO",
            help="Create a second place for copies of this repository; see `pybackup copy`.",
        ),
    ] = None,
) -> None:
    """
    Create an empty repository.

    No other command creates one: a backup to a disk that is not mounted fails with exit code 10, and does not fill the
    disk below the mount point.
    """
    from backup.cli import settings
    from backup.operations import copy
    from backup.repository.repository import Repository
    from backup.units import show_size

    path = Path(check_folder(repo))
    modes = settings.modes(find.config_or_default())
    if copy_of is None:
        made = Repository.create(path, modes)
    else:
        made = copy.make_second(path, Repository.open(Path(check_folder(copy_of))), modes)
    place = _mount_point(made.path)
    free = shutil.disk_usage(made.path).free
    if options.json:
        found = {"repository": str(path), "id": made.identity, "copy_of": copy_of}
        output.document({**found, "file_system": str(place), "free_bytes": free})
    elif not options.quiet:
        what = "repository" if copy_of is None else f"empty copy of {output.plain(copy_of)}"
        output.line(
            f"made {what} at {output.plain(path)}, id {made.identity[:8]}, "
            f"on the file system {output.plain(place)} with {show_size(free)} free"
        )
    if place == Path("/") and not options.quiet:
        # Not a warning: many machines have one file system.  But this is how a disk that is not mounted shows.
        output.note("it lies on the root file system; make sure that no other disk was meant", to_stderr=options.json)


def _mount_point(path: Path) -> Path:
    """The root of the file system that holds a folder."""
    place = Path(os.path.realpath(path))
    return next(folder for folder in (place, *place.parents) if os.path.ismount(folder))
