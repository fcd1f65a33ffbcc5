"""The command show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from backup.cli import find
from backup.cli import output as render
from backup.cli.context import explained, options
from backup.cli.find import folder_of
from backup.cli.output import line, plain
from backup.cli.parameters import (
    PointName,
    Repo,
)
from backup.errors import BackupError
from backup.units import show_size

if TYPE_CHECKING:
    from backup.model.manifest import Manifest


def show(
    manifest: PointName,
    repo: Repo = None,
) -> None:
    """Show a point: its disks, their sources and their chains."""
    from backup.model import chain as chains

    machine, found = find.point(manifest, folder_of(repo))
    contents = machine.contents()
    links: dict[str, list[str] | BackupError] = {}
    for disk in found.disks:
        try:
            chain = chains.build(contents.manifests, found.point, disk.name, contents.damaged)
            links[disk.name] = [link.point for link in chain.links]
        except BackupError as error:
            links[disk.name] = explained(error)
    path = machine.path / f"{found.point}.json"
    if options.json:
        shown = {
            name: render.error_object(link) if isinstance(link, BackupError) else link for name, link in links.items()
        }
        render.document({**asdict(found), "manifest": str(path), "chains": shown})
    else:
        manifest_text(found, path, links)


def manifest_text(manifest: Manifest, path: Path, chains: Mapping[str, Sequence[str] | BackupError]) -> None:
    """A point for people."""
    pinned = ", pinned" if manifest.pinned else ""
    line(f"point {manifest.point} of machine {manifest.machine}, sequence {manifest.sequence}{pinned}")
    line(f"  manifest  {plain(path)}")
    line(f"  taken     {plain(manifest.started)} to {plain(manifest.finished)} by {plain(manifest.program)}")
    for disk in manifest.disks:
        line(f"disk {disk.name}: {disk.kind} ({plain(disk.reason)})")
        line(f"  size      {disk.size} bytes ({show_size(disk.size)})")
        source = disk.source
        line(
            f"  source    {plain(source.kind)} {plain(source.path)} ({plain(source.format)}, "
            f"{plain(source.consistency)}-consistent)"
        )
        line(f"  bitmap    read {plain(disk.bitmap.read or '-')}, started {plain(disk.bitmap.started or '-')}")
        line(
            f"  bytes     dirty {show_size(disk.bytes.dirty)}, data {show_size(disk.bytes.data)}, "
            f"zero {show_size(disk.bytes.zero)}, stored {show_size(disk.bytes.stored)}"
        )
        line(
            f"  data      {disk.data.file} ({plain(disk.data.compression)}, "
            f"clusters of {show_size(disk.data.cluster_size)})"
        )
        chain = chains[disk.name]
        if isinstance(chain, BackupError):
            line(f"  chain     broken: {plain(chain.message)}")
        else:
            line(f"  chain     {len(chain)} point{'s' if len(chain) > 1 else ''}: {' <- '.join(chain)}")
