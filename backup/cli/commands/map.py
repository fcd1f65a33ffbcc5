"""The command map."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output
from backup.cli.context import options
from backup.cli.output import line, plain
from backup.cli.parameters import DomainName, Image, ImageFormat, LibvirtUri, Nbd, Qmp, Scratch
from backup.units import show_size

if TYPE_CHECKING:
    from backup.planning.extent_map import Extent, MapTotals

_SPOOLED = 1 << 20
"""Characters of a JSON document that are kept in memory; a longer one goes to a temporary file."""


def map_(
    image: Image = None,
    image_format: ImageFormat = None,
    nbd: Nbd = None,
    libvirt: LibvirtUri = None,
    domain: DomainName = None,
    disk: Annotated[
        str | None,
        typer.Option("--disk", metavar="NAME", help="With --libvirt: the disk, named by its target device (vda)."),
    ] = None,
    qmp: Qmp = None,
    node: Annotated[
        str | None,
        typer.Option("--node", metavar="NODE", help="With --qmp: the disk, named by its node, device id or image."),
    ] = None,
    scratch: Scratch = None,
    bitmap: Annotated[
        str | None, typer.Option("--bitmap", metavar="EXACT-NAME", help="Dirty bitmap to show, by its exact name.")
    ] = None,
    totals: Annotated[bool, typer.Option("--totals", help="Show the sums only.")] = False,
) -> None:
    """
    Show which parts of a disk are dirty, data, zero or holes.

    All numbers are bytes.  Nothing is backed up.
    """
    from backup.cli import requests
    from backup.operations.map import open_disk
    from backup.planning import extent_map
    from backup.sources.choose import choose

    find.require_format(image_format)
    specification = requests.one_disk(
        find.config_or_default(),
        image=image,
        image_format=image_format,
        nbd=nbd,
        libvirt=libvirt,
        domain=domain,
        disk=disk,
        qmp=qmp,
        node=node,
        scratch=scratch,
        bitmap=bitmap,
    )
    host, [request] = choose(specification)
    with open_disk(host, request, bitmap, output.warning) as opened:
        if totals:
            sums = extent_map.map_totals(opened.disk, opened.bitmap)
            json_output.write(sums) if options.json else _show_totals(sums)
        elif options.json:
            _write_extents(extent_map.read_map(opened.disk, opened.bitmap))
        else:
            _show_extents(extent_map.read_map(opened.disk, opened.bitmap), bitmap)


# Text


def _show_extents(extents: Iterable[Extent], bitmap: str | None) -> None:
    """Show a line for each extent as it is read; there may be millions."""
    state = f"bitmap {plain(bitmap)}" if bitmap is not None else "bitmap -"
    width = max(len(state), 8)
    line(f"{'START':>16}  {'LENGTH':>16}  {state:<{width}}  CONTENT")
    for extent in extents:
        dirty = "-" if extent.dirty is None else "dirty" if extent.dirty else "clean"
        line(f"{extent.start:>16}  {extent.length:>16}  {dirty:<{width}}  {_content(extent)}")


def _content(extent: Extent) -> str:
    if extent.zero:
        return "zero (hole)" if extent.hole else "zero"
    return "data (hole)" if extent.hole else "data"


def _show_totals(totals: MapTotals) -> None:
    for name, value in json_output.fields_of(totals).items():
        if value is not None:
            line(f"{name.replace('_', ' and '):<16} {value:>20}  {show_size(value)}")


# JSON


def _write_extents(extents: Iterable[Extent]) -> None:
    """Write a list of the extents, or nothing if the source fails half-way; there may be millions of extents."""
    import json
    import tempfile

    with tempfile.SpooledTemporaryFile(_SPOOLED, "w+") as spool:
        separator = "["
        for extent in extents:
            spool.write(f"{separator}\n{json.dumps(json_output.fields_of(extent))}")
            separator = ","
        spool.write("[]" if separator == "[" else "\n]")
        spool.seek(0)
        while chunk := spool.read(_SPOOLED):
            output.out(chunk)
    line("")
