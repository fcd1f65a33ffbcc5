"""
The commands that look inside a point without a restore: serve, files, get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, output
from backup.cli.context import options
from backup.cli.find import folder_of, path_of
from backup.cli.parameters import (
    Filesystem,
    Manifest_,
    PointDisk,
    Repo,
)
from backup.errors import WARNINGS_EXIT_CODE, Interrupted

if TYPE_CHECKING:
    from backup.model.manifest import Manifest
    from backup.operations.serve import Served


def serve(
    manifest: Manifest_,
    disk: PointDisk = None,
    socket: Annotated[str | None, typer.Option("--socket", metavar="PATH", help="A Unix socket to listen on.")] = None,
    port: Annotated[str | None, typer.Option("--port", metavar="N", help="A TCP port; anyone there can read.")] = None,
    bind: Annotated[
        str | None, typer.Option("--bind", metavar="ADDRESS", help="With --port: instead of 127.0.0.1.")
    ] = None,
    writable: Annotated[bool, typer.Option("--writable", help="Let clients write; it is thrown away.")] = False,
    repo: Repo = None,
) -> None:
    """Serve a point's disk over NBD until Ctrl-C.  At once: nothing is copied."""
    from backup.operations import serve as serving

    where = serving.address(path_of(socket), port, bind)
    machine, found = find.point(manifest, folder_of(repo))
    name = serving.choose_disk(found, disk)
    with serving.serving(machine, found.point, name, where, writable=writable) as served:
        try:
            _show_served(found, name, served, writable)
            served.server.wait()
        except Interrupted:
            return  # that is how it is meant to end


def _show_served(point: Manifest, disk: str, served: Served, writable: bool) -> None:
    if not served.protected:
        output.warning("the repository's file system has no locks: nothing keeps prune from what is served")
    if options.json:
        output.document(output.served_object(point, disk, served, writable))
    elif not options.quiet:
        for text in output.served_lines(point, disk, served, writable):
            output.line(text)
    output.flush()


def files(
    manifest: Manifest_,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder of the guest.", show_default=False)] = "/",
    disk: PointDisk = None,
    filesystem: Filesystem = None,
    repo: Repo = None,
) -> None:
    """List a folder of the guest's files at a point.  Needs libguestfs."""
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
        output.files_table(entries)
    raise typer.Exit(WARNINGS_EXIT_CODE if guest.unmounted else 0)


def get(
    manifest: Manifest_,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file or a folder of the guest.")],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="A new name, or a folder to put it in.")],
    disk: PointDisk = None,
    filesystem: Filesystem = None,
    repo: Repo = None,
) -> None:
    """Bring a guest's file or folder back from a point.  Needs libguestfs."""
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
        output.line(output.fetched_line(path, target, fetched))
    raise typer.Exit(WARNINGS_EXIT_CODE if warnings else 0)


def _warn(texts: Sequence[str]) -> None:
    for text in texts:
        output.warning(text)
