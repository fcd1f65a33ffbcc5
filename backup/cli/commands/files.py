"""The commands files and get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options
from backup.cli.output import plain
from backup.cli.parameters import Filesystem, IdentityFile, PointDisk, PointName, Repo
from backup.errors import WARNINGS_EXIT_CODE
from backup.units import counted, show_size

if TYPE_CHECKING:
    from backup.guest.files import Entry, Fetched


# files


def files(
    manifest: PointName,
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Absolute path of a folder in the guest.  Default: /.", show_default=False),
    ] = "/",
    disk: PointDisk = None,
    filesystem: Filesystem = None,
    repo: Repo = None,
    identity: IdentityFile = None,
) -> None:
    """
    List a folder of the guest as it was at a point.

    Needs guestfish (libguestfs).
    """
    from backup.guest import files as guest_files
    from backup.operations.serve import choose_disk

    guest_files.absolute(path)
    machine, point = find.point(manifest, places.named(repo, identity))
    with guest_files.open_files(machine, point.point, choose_disk(point, disk), filesystem) as guest:
        entries = guest.list(path)
    _warn(guest.unmounted)
    if options.json:
        json_output.write(entries)
    else:
        _show_entries(entries)
    raise typer.Exit(WARNINGS_EXIT_CODE if guest.unmounted else 0)


def _show_entries(entries: Sequence[Entry]) -> None:
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
    output.table(("MODE", "SIZE", "MODIFIED", "NAME"), rows, right=(1,))


# get


def get(
    manifest: PointName,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Absolute path of a file or folder in the guest.")],
    dest: Annotated[
        str,
        typer.Argument(metavar="DEST", help="New file or folder to create, or an existing folder to put it in."),
    ],
    disk: PointDisk = None,
    filesystem: Filesystem = None,
    repo: Repo = None,
    identity: IdentityFile = None,
) -> None:
    """
    Copy a file or folder of the guest out of a point.

    Needs guestfish (libguestfs).
    """
    from backup.guest import files as guest_files
    from backup.operations.serve import choose_disk

    machine, point = find.point(manifest, places.named(repo, identity))
    target = guest_files.target_of(path, Path(dest))
    guest_files.require_new(target)
    with guest_files.open_files(machine, point.point, choose_disk(point, disk), filesystem) as guest:
        fetched = guest.get(path, target)
    left_out = [f"not copied, as it is no file, folder or link: {name}" for name in fetched.left_out]
    warnings = [*guest.unmounted, *left_out]
    _warn(warnings)
    if options.json:
        json_output.write(GetDocument.of(path, target, fetched))
    elif not options.quiet:
        output.line(f"{plain(path)}: {counted(fetched.files, 'file')}, {show_size(fetched.bytes)}, to {plain(target)}")
    raise typer.Exit(WARNINGS_EXIT_CODE if warnings else 0)


@dataclass(frozen=True, slots=True)
class GetDocument:
    """What was copied out of a guest: files and their bytes, and the names of what could not be copied."""

    path: str
    target: Path
    error: None
    files: int
    bytes: int
    left_out: Sequence[str]

    @classmethod
    def of(cls, path: str, target: Path, fetched: Fetched) -> GetDocument:
        """Return the document of a copy to `target`."""
        return cls(path, target, None, fetched.files, fetched.bytes, fetched.left_out)


def _warn(texts: Sequence[str]) -> None:
    for text in texts:
        output.warning(text)
