"""The command show."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options, user_error
from backup.cli.output import plain
from backup.cli.parameters import IdentityFile, PointName, Repo
from backup.errors import BackupError, NotFound, UsageError
from backup.units import counted, show_size

if TYPE_CHECKING:
    from backup.model.manifest import DiskEntry, Manifest
    from backup.repository.machine import Machine

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Characters that a terminal may obey; libvirt's XML has none of them."""
Links = Sequence[str] | BackupError
"""The points of a disk's chain, newest first, or why the chain is broken."""


def show(
    manifest: PointName,
    repo: Repo = None,
    identity: IdentityFile = None,
    definition: Annotated[
        bool,
        typer.Option("--definition", help="Print the machine's definition (libvirt's XML) and nothing else."),
    ] = False,
) -> None:
    """Show a point: its disks, their sources and their chains."""
    from backup.model import chain

    machine, point = find.point(manifest, places.named(repo, identity))
    if definition:
        _print_definition(machine, point)
        return
    contents = machine.contents()
    chains: dict[str, Links] = {}
    for disk in point.disks:
        try:
            links = chain.build(contents.manifests, point.point, disk.name, contents.damaged).links
            chains[disk.name] = [link.point for link in links]
        except BackupError as error:
            chains[disk.name] = user_error(error)
    path = machine.location(point.point)
    if options.json:
        # The fields of the manifest, as docs/json.md and FORMAT.md describe them, and two more.
        json_output.write({**json_output.fields_of(point), "manifest": path, "chains": chains})
    else:
        _show_text(point, path, chains)


def _print_definition(machine: Machine, point: Manifest) -> None:
    """Print the definition as it is stored, but without control characters."""
    from backup.model.manifest import DEFINITION
    from backup.repository import machine_files

    if options.json:
        raise UsageError("--json together with --definition", hint="the definition is XML; give one of the two")
    file = point.machine_file(DEFINITION)
    if file is None:
        raise NotFound(
            f"point {point.point} of machine {point.machine} holds no definition",
            hint="only backups with --libvirt keep the machine's definition",
        )
    text = machine_files.load(machine.files, file).decode("utf-8", "replace")
    output.out(_CONTROLS.sub("?", text))


def _show_text(point: Manifest, path: str, chains: Mapping[str, Links]) -> None:
    pinned = ", pinned" if point.pinned else ""
    output.line(f"point {point.point} of machine {point.machine}, sequence {point.sequence}{pinned}")
    output.line(f"  manifest  {plain(path)}")
    output.line(f"  taken     {plain(point.started)} to {plain(point.finished)} by {plain(point.program)}")
    for file in point.machine_files:
        output.line(f"  {file.role:<9} {file.file} ({show_size(file.size)})")
    for disk in point.disks:
        for text in _disk_lines(disk, chains[disk.name]):
            output.line(text)


def _disk_lines(disk: DiskEntry, links: Links) -> Iterator[str]:
    source, stored = disk.source, disk.bytes
    yield f"disk {disk.name}: {disk.kind} ({plain(disk.reason)})"
    yield f"  size      {disk.size} bytes ({show_size(disk.size)})"
    yield (
        f"  source    {plain(source.kind)} {plain(source.path)} ({plain(source.format)}, "
        f"{plain(source.consistency)}-consistent)"
    )
    yield f"  bitmap    read {plain(disk.bitmap.read or '-')}, started {plain(disk.bitmap.started or '-')}"
    yield (
        f"  bytes     dirty {show_size(stored.dirty)}, data {show_size(stored.data)}, zero {show_size(stored.zero)}, "
        f"stored {show_size(stored.stored)}"
    )
    clusters = show_size(disk.data.cluster_size)
    yield f"  data      {disk.data.file} ({plain(disk.data.compression)}, clusters of {clusters})"
    if isinstance(links, BackupError):
        yield f"  chain     broken: {plain(links.message)}"
    else:
        yield f"  chain     {counted(len(links), 'point')}: {' <- '.join(links)}"
