"""The command list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from backup.cli import find, json_output, output
from backup.cli.context import options
from backup.cli.parameters import MachineNames, Repo
from backup.errors import WARNINGS_EXIT_CODE, BackupError
from backup.units import show_size

if TYPE_CHECKING:
    from backup.model.manifest import DiskEntry, Manifest


def list_(machines: MachineNames = None, repo: Repo = None) -> None:
    """List the points of the repository."""
    from backup.repository.machine import Contents

    listed: list[tuple[Manifest, str]] = []
    damaged = False
    for machine in find.machines(find.repository(find.folder_of(repo)), machines):
        try:
            contents = machine.contents()
        except BackupError as unreadable:  # this machine's folder; the others are listed all the same
            contents = Contents({}, {machine.name: unreadable})
        for error in contents.damaged.values():
            damaged = True
            output.warning(error.message)
        ordered = sorted(contents.manifests.values(), key=lambda manifest: manifest.sequence)
        listed.extend((manifest, machine.location(manifest.point)) for manifest in ordered)
    if options.json:
        json_output.write([PointDocument.of(manifest, path) for manifest, path in listed])
    elif listed:
        _show_table([manifest for manifest, _ in listed])
    raise typer.Exit(WARNINGS_EXIT_CODE if damaged else 0)


# Text


def _show_table(points: Sequence[Manifest]) -> None:
    """Show a line for each disk of each point."""
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
        for point in points
        for disk in point.disks
    ]
    output.table(("MACHINE", "POINT", "DISK", "KIND", "SIZE", "STORED", "REASON"), rows, right=(4, 5))


# JSON


@dataclass(frozen=True, slots=True)
class PointDocument:
    """A point; `manifest` is the path of its manifest, `created` the time at which its backup began."""

    machine: str
    point: str
    sequence: int
    manifest: str
    created: str
    pinned: bool
    disks: Sequence[DiskDocument]

    @classmethod
    def of(cls, manifest: Manifest, path: str) -> PointDocument:
        """Return the document of a point."""
        return cls(
            machine=manifest.machine,
            point=manifest.point,
            sequence=manifest.sequence,
            manifest=path,
            created=manifest.started,
            pinned=manifest.pinned,
            disks=[DiskDocument.of(disk) for disk in manifest.disks],
        )


@dataclass(frozen=True, slots=True)
class DiskDocument:
    """A disk of a point; `parent` is the id of the point that an incremental builds on."""

    name: str
    kind: str
    reason: str
    size: int
    parent: str | None
    dirty_bytes: int
    data_bytes: int
    zero_bytes: int
    stored_bytes: int

    @classmethod
    def of(cls, disk: DiskEntry) -> DiskDocument:
        """Return the document of a disk."""
        return cls(
            name=disk.name,
            kind=disk.kind,
            reason=disk.reason,
            size=disk.size,
            parent=None if disk.parent is None else disk.parent.point,
            dirty_bytes=disk.bytes.dirty,
            data_bytes=disk.bytes.data,
            zero_bytes=disk.bytes.zero,
            stored_bytes=disk.bytes.stored,
        )
