"""The command init."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options
from backup.cli.parameters import IdentityFile
from backup.errors import UsageError
from backup.model.location import Location
from backup.units import show_size


def init(
    repo: Annotated[
        str,
        typer.Argument(
            metavar="REPO",
            help="New or empty folder.  With --copy-of, also s3://BUCKET/PREFIX, or the name of a place in `copies` of "
            "the configuration.",
        ),
    ],
    copy_of: Annotated[
        str | None,
        typer.Option(
            "--copy-of",
            metavar="REPO",
            help="Create a second place for copies of this repository; see `pybackup copy`.",
        ),
    ] = None,
    recipient: Annotated[
        list[str] | None,
        typer.Option(
            "--recipient",
            metavar="age1...|FILE",
            help="With --copy-of: seal all files of the second place to this public key, or to those in a file.  "
            "Repeatable.  Default: `recipients` of the place in the configuration, else the place is not sealed.",
        ),
    ] = None,
    identity: IdentityFile = None,
) -> None:
    """
    Create an empty repository.

    No other command creates one: a backup to a disk that is not mounted fails with exit code 10, and does not fill the
    disk below the mount point.
    """
    from backup.cli import settings
    from backup.repository.repository import Repository

    config = find.config_or_default()
    if copy_of is None:
        if recipient:
            raise UsageError(
                "--recipient without --copy-of: only a second place can be sealed",
                hint="put the first repository on an encrypted file system instead; see docs/sealed-copies.md",
            )
        location: Location = places.first_of(repo)
        created = Repository.create(settings.storage(location, config))
    else:
        from backup.operations import copy

        place = places.place(repo)
        location = place.location
        source = find.repository(places.named(copy_of, identity))
        recipients = places.recipients(place, recipient)
        created = copy.make_second(settings.storage(location, config), source, recipients)
    document = InitDocument(
        repository=str(location),
        id=created.id,
        copy_of=copy_of,
        recipients=[str(key) for key in created.recipients],
        file_system=_mount_point(location) if isinstance(location, Path) else None,
        free_bytes=shutil.disk_usage(location).free if isinstance(location, Path) else None,
    )
    if options.json:
        json_output.write(document)
    elif not options.quiet:
        output.line(_created_line(document))
    if document.file_system == Path("/") and not options.quiet:
        # No warning: many hosts have one file system.  But a disk that is not mounted shows in the same way.
        output.note("the repository lies on the root file system; is another disk not mounted?", to_stderr=options.json)


def _mount_point(path: Path) -> Path:
    """Return the root of the file system that holds a folder."""
    place = Path(os.path.realpath(path))
    return next(folder for folder in (place, *place.parents) if os.path.ismount(folder))


# JSON and text


@dataclass(frozen=True, slots=True)
class InitDocument:
    """A new repository, and the file system that holds it; a bucket has none."""

    repository: str
    id: str
    copy_of: str | None
    recipients: Sequence[str]
    file_system: Path | None
    free_bytes: int | None


def _created_line(created: InitDocument) -> str:
    kind = "empty sealed copy" if created.recipients else "empty copy"
    what = "repository" if created.copy_of is None else f"{kind} of {output.plain(created.copy_of)}"
    made = f"created {what} at {output.plain(created.repository)}, id {created.id[:8]}"
    if created.file_system is None or created.free_bytes is None:
        return made
    return f"{made}, on the file system {output.plain(created.file_system)} with {show_size(created.free_bytes)} free"
