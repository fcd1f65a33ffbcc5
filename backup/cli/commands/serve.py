"""The command serve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options
from backup.cli.output import plain
from backup.cli.parameters import IdentityFile, PointDisk, PointName, Repo
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
    identity: IdentityFile = None,
) -> None:
    """
    Serve a disk of a point over NBD until Ctrl-C.

    Nothing is copied: clients can read at once.  The commands for guestfish, nbd-client and QEMU are shown.
    """
    from backup.operations import serve as serving

    address = serving.address(find.path_of(socket), port, bind)
    machine, point = find.point(manifest, places.named(repo, identity))
    name = serving.choose_disk(point, disk)
    with serving.serving(machine, point.point, name, address, writable=writable) as served:
        try:
            _show(served, ServeDocument.of(point, name, served, writable=writable))
            served.server.wait()
        except Interrupted:
            return  # the usual end


def _show(served: Served, document: ServeDocument) -> None:
    if not served.protected:
        output.warning("the repository's file system has no locks: prune may remove the point while it is served")
    if options.json:
        json_output.write(document)
    elif not options.quiet:
        for text in _lines(document, tcp=served.address.socket is None):
            output.line(text)
    output.flush()


# JSON and text


@dataclass(frozen=True, slots=True)
class ServeDocument:
    """A disk that is being served, and the commands that look into it, by the program's name."""

    machine: str
    point: str
    disk: str
    uri: str
    size: int
    export_size: int
    writable: bool
    commands: Mapping[str, str]

    @classmethod
    def of(cls, point: Manifest, disk: str, served: Served, *, writable: bool) -> ServeDocument:
        """Return the document of a disk of the point."""
        from backup.operations.serve import commands

        return cls(
            machine=point.machine,
            point=point.point,
            disk=disk,
            uri=served.uri,
            size=served.size,
            export_size=served.export_size,
            writable=writable,
            commands=commands(served.uri, served.address, writable=writable),
        )


def _lines(served: ServeDocument, *, tcp: bool) -> Iterator[str]:
    mode = "for writing (what clients write is discarded)" if served.writable else "read-only"
    size = show_size(served.size)
    yield f"serving {served.machine}/{served.disk} of point {served.point}, {size}, {mode}, until Ctrl-C"
    if served.export_size != served.size:
        yield f"the disk has {served.size} bytes; the export has {served.export_size}, filled up with zeroes"
    if tcp:
        yield f"everyone who can connect to {plain(served.uri)} can read it: NBD asks for no password"
    yield plain(served.uri)
    for command in served.commands.values():
        yield f"  {plain(command)}"
