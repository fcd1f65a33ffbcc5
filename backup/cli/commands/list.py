"""The command list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from backup.cli import find
from backup.cli import output as render
from backup.cli.context import options
from backup.cli.find import folder_of
from backup.cli.output import table
from backup.cli.parameters import (
    MachineNames,
    Repo,
)
from backup.errors import WARNINGS_EXIT_CODE, BackupError
from backup.units import show_size

if TYPE_CHECKING:
    from backup.model.manifest import Manifest


def list_(machines: MachineNames = None, repo: Repo = None) -> None:
    """List the points of the repository."""
    from backup.repository.machine import Contents

    found: list[tuple[Manifest, Path]] = []
    damaged = False
    for machine in find.machines(find.repository(folder_of(repo)), machines):
        try:
            contents = machine.contents()
        except BackupError as unreadable:  # of this machine's folder; the others are shown all the same
            contents = Contents({}, {machine.path.name: unreadable})
        for error in contents.damaged.values():
            damaged = True
            render.warning(error.message)
        ordered = sorted(contents.manifests.values(), key=lambda manifest: manifest.sequence)
        found.extend((manifest, machine.path / f"{manifest.point}.json") for manifest in ordered)
    if options.json:
        render.document([point_object(manifest, path) for manifest, path in found])
    elif found:
        points_table([manifest for manifest, _ in found])
    raise typer.Exit(WARNINGS_EXIT_CODE if damaged else 0)


def point_object(manifest: Manifest, path: Path) -> dict[str, Any]:
    """A point of `list` as scripts see it."""
    return {
        "machine": manifest.machine,
        "point": manifest.point,
        "sequence": manifest.sequence,
        "manifest": str(path),
        "created": manifest.started,
        "pinned": manifest.pinned,
        "disks": [
            {
                "name": disk.name,
                "kind": disk.kind,
                "reason": disk.reason,
                "size": disk.size,
                "parent": None if disk.parent is None else disk.parent.point,
                "dirty_bytes": disk.bytes.dirty,
                "data_bytes": disk.bytes.data,
                "zero_bytes": disk.bytes.zero,
                "stored_bytes": disk.bytes.stored,
            }
            for disk in manifest.disks
        ],
    }


def points_table(manifests: Sequence[Manifest]) -> None:
    """The points of `list`, a line for each disk."""
    rows = [
        (
            point.machine,
            point.point,
            disk.name,
            disk.kind,
            show_size(disk.size),
            show_size(disk.bytes.stored),
            f"pinned; {disk.reason}" if point.pinned else disk.reason,
        )
        for point in manifests
        for disk in point.disks
    ]
    table(("MACHINE", "POINT", "DISK", "KIND", "SIZE", "STORED", "REASON"), rows, right=(4, 5))
