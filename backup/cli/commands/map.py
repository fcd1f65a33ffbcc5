"""The command map."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, output
from backup.cli.context import options
from backup.cli.output import SPOOL, line, out, plain
from backup.cli.parameters import (
    Image,
    ImageFormat,
    Nbd,
    Qmp,
    Scratch,
)
from backup.units import show_size

if TYPE_CHECKING:
    from backup.planning.extent_map import Extent, MapTotals


def map_(
    image: Image = None,
    image_format: ImageFormat = None,
    nbd: Nbd = None,
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
        qmp=qmp,
        node=node,
        scratch=scratch,
        bitmap=bitmap,
    )
    host, [disk] = choose(specification)
    with open_disk(host, disk, bitmap, output.warning) as opened:
        if totals:
            sums = extent_map.map_totals(opened.disk, opened.bitmap)
            output.document(asdict(sums)) if options.json else map_sums(sums)
        elif options.json:
            map_objects(extent_map.read_map(opened.disk, opened.bitmap))
        else:
            map_table(extent_map.read_map(opened.disk, opened.bitmap), bitmap)


def map_table(extents: Iterable[Extent], bitmap: str | None) -> None:
    """The extents of `map`, a line each, as they come: there may be millions."""
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


def map_objects(extents: Iterable[Extent]) -> None:
    """The extents of `map` as one JSON list; nothing of it when the source fails half-way.  There may be millions."""
    import json
    import tempfile

    with tempfile.SpooledTemporaryFile(SPOOL, "w+") as spool:
        separator = "["
        for extent in extents:
            spool.write(f"{separator}\n{json.dumps(asdict(extent))}")
            separator = ","
        spool.write("[]" if separator == "[" else "\n]")
        spool.seek(0)
        while chunk := spool.read(SPOOL):
            out(chunk)
    line("")


def map_sums(totals: MapTotals) -> None:
    """The sums of `map --totals`."""
    for name, value in asdict(totals).items():
        if value is not None:
            line(f"{name.replace('_', ' and '):<16} {value:>20}  {show_size(value)}")
