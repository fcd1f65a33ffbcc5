"""The command serve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup.cli import find, output
from backup.cli.context import options
from backup.cli.find import folder_of, path_of
from backup.cli.output import plain
from backup.cli.parameters import (
    PointDisk,
    PointName,
    Repo,
)
from backup.errors import Interrupted
from backup.units import show_size

if TYPE_CHECKING:
    from backup.model.manifest import Manifest
    from backup.operations.serve import Served


def serve(
    manifest: PointName,
    disk: PointDisk = None,
    socket: Annotated[
        str | None,
        typer.Option("--socket", metavar="PATH", help="Unix socket to listen on.  Default: one in a temporary folder."),
    ] = None,
    port: Annotated[
        str | None,
        typer.Option("--port", metavar="N", help="TCP port to listen on.  Everyone who can connect can read the disk."),
    ] = None,
    bind: Annotated[
        str | None,
        typer.Option("--bind", metavar="ADDRESS", help="With --port: address to listen on.  Default: 127.0.0.1."),
    ] = None,
    writable: Annotated[
        bool, typer.Option("--writable", help="Let clients write.  What they write is discarded at the end.")
    ] = False,
    repo: Repo = None,
) -> None:
    """
    Serve a disk of a point over NBD until Ctrl-C.

    Nothing is copied: clients can read at once.  The commands for guestfish, nbd-client and QEMU are shown.
    """
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
        output.document(served_object(point, disk, served, writable))
    elif not options.quiet:
        for text in served_lines(point, disk, served, writable):
            output.line(text)
    output.flush()


def served_object(point: Manifest, disk: str, served: Served, writable: bool) -> dict[str, Any]:
    """What is served, as scripts see it."""
    from backup.operations.serve import commands

    return {
        "machine": point.machine,
        "point": point.point,
        "disk": disk,
        "uri": served.uri,
        "size": served.size,
        "export_size": served.export_size,
        "writable": writable,
        "commands": commands(served.uri, served.address, writable=writable),
    }


def served_lines(point: Manifest, disk: str, served: Served, writable: bool) -> Iterator[str]:
    """What is served, and how to look inside."""
    from backup.operations.serve import commands

    how = "for writing (what is written is thrown away)" if writable else "read-only"
    yield f"serving {point.machine}/{disk} of point {point.point}, {show_size(served.size)}, {how}, until Ctrl-C"
    if served.export_size != served.size:
        yield f"the disk has {served.size} bytes; the export has {served.export_size}, the last of which are zeroes"
    if served.address.socket is None:
        yield f"anyone who can connect to {plain(served.uri)} can read it: NBD asks for no password"
    yield plain(served.uri)
    for command in commands(served.uri, served.address, writable=writable).values():
        yield f"  {plain(command)}"
