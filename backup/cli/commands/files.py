"""The commands files and get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, output
from backup.cli.context import options
from backup.cli.find import folder_of
from backup.cli.output import plain, table
from backup.cli.parameters import (
    Filesystem,
    PointDisk,
    PointName,
    Repo,
)
from backup.errors import WARNINGS_EXIT_CODE
from backup.units import counted, show_size

if TYPE_CHECKING:
    from backup.guest.files import Entry, Fetched


def files(
    manifest: PointName,
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Absolute path of a folder in the guest.  Default: /.", show_default=False),
    ] = "/",
    disk: PointDisk = None,
    filesystem: Filesystem = None,
    repo: Repo = None,
) -> None:
    """
    List a folder of the guest as it was at a point.

    Needs guestfish (libguestfs).
    """
    from backup.guest import files as guestfiles
    from backup.operations.serve import choose_disk

    guestfiles.absolute(path)
    machine, found = find.point(manifest, folder_of(repo))
    with guestfiles.opened(machine, found.point, choose_disk(found, disk), filesystem) as guest:
        entries = guest.list(path)
    _warn(guest.unmounted)
    if options.json:
        output.document([asdict(entry) for entry in entries])
    else:
        files_table(entries)
    raise typer.Exit(WARNINGS_EXIT_CODE if guest.unmounted else 0)


def get(
    manifest: PointName,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Absolute path of a file or folder in the guest.")],
    dest: Annotated[
        str, typer.Argument(metavar="DEST", help="New file or folder to create, or an existing folder to put it in.")
    ],
    disk: PointDisk = None,
    filesystem: Filesystem = None,
    repo: Repo = None,
) -> None:
    """
    Copy a file or folder of the guest out of a point.

    Needs guestfish (libguestfs).
    """
    from backup.guest import files as guestfiles
    from backup.operations.serve import choose_disk

    machine, found = find.point(manifest, folder_of(repo))
    target = guestfiles.target_of(path, Path(dest))
    guestfiles.require_new(target)
    with guestfiles.opened(machine, found.point, choose_disk(found, disk), filesystem) as guest:
        fetched = guest.get(path, target)
    warnings = [*guest.unmounted, *(f"left out, being no file, folder or link: {name}" for name in fetched.left_out)]
    _warn(warnings)
    if options.json:
        output.document({"path": path, "target": str(target), "error": None, **asdict(fetched)})
    elif not options.quiet:
        output.line(fetched_line(path, target, fetched))
    raise typer.Exit(WARNINGS_EXIT_CODE if warnings else 0)


def _warn(texts: Sequence[str]) -> None:
    for text in texts:
        output.warning(text)


def files_table(entries: Sequence[Entry]) -> None:
    """A guest's files, a line for each."""
    letters = {"directory": "d", "link": "l", "file": "-"}
    rows = [
        (
            f"{letters.get(entry.kind, '?')} {entry.mode:04o}",
            str(entry.size),
            entry.modified,
            entry.name if entry.target is None else f"{entry.name} -> {entry.target}",
        )
        for entry in entries
    ]
    table(("MODE", "SIZE", "MODIFIED", "NAME"), rows, right=(1,))


def fetched_line(path: str, target: Path, fetched: Fetched) -> str:
    """One line for what was brought back from a guest."""
    return f"{plain(path)}: {counted(fetched.files, 'file')}, {show_size(fetched.bytes)}, to {plain(target)}"
