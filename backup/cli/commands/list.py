"""The command list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output, places
from backup.cli.context import options
from backup.cli.parameters import IdentityFile, MachineNames, Repo
from backup.errors import BackupError, Failed, NoIdentity, merged_exit_code
from backup.units import parse_count, show_age, show_size

if TYPE_CHECKING:
    from backup.model.manifest import DiskEntry, Manifest
    from backup.repository.named_files import NamedPoint

_MOST = 1_000_000
"""Greatest N of --last."""


def list_(
    machines: MachineNames = None,
    last: Annotated[
        str | None, typer.Option("--last", metavar="N", help="Only the newest N points of each machine.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="DATE",
            help="Only points that began on this day, local time, or later: 2026-11-28, or 7d for seven days ago.",
        ),
    ] = None,
    disk: Annotated[str | None, typer.Option("--disk", metavar="NAME", help="Only points that hold this disk.")] = None,
    long: Annotated[
        bool, typer.Option("--long", help="Show a line for each disk, with its size and the reason for its kind.")
    ] = False,
    repo: Repo = None,
    identity: IdentityFile = None,
) -> None:
    """List the points of the repository."""
    from backup.operations import listing
    from backup.repository.machine import Contents
    from backup.repository.named_files import named_points

    now = datetime.now(UTC)
    newest = None if last is None else parse_count("--last", last, 1, _MOST)
    selection = listing.Selection(newest, None if since is None else listing.parse_since(since, now), disk)
    listed: list[tuple[Manifest, str]] = []
    named: list[NamedPoint] = []
    damaged, codes = False, [0]
    for machine in find.machines(find.repository(places.named(repo, identity)), machines):
        if not machine.storage.traits.readable:
            named += selection.of_named(named_points(machine))
            continue
        try:
            contents = machine.contents()
        except NoIdentity:
            raise
        except BackupError as unreadable:  # this machine's folder; the others are listed all the same
            contents = Contents({}, {machine.name: unreadable})
        for error in contents.damaged.values():
            damaged = True
            output.warning(error.message)
            if machine.storage.traits.remote and isinstance(error, Failed):  # no answer: nothing is known of the point
                codes.append(error.exit_code)
        chosen = selection.of(contents.manifests.values())
        listed.extend((manifest, machine.location(manifest.point)) for manifest in chosen)
    if options.json:
        documents = [PointDocument.of(manifest, path) for manifest, path in listed]
        json_output.write(documents + [PointDocument.of_named(point) for point in named])
    elif named:
        _show_named(named, now)
    elif listed and long:
        _show_disks([manifest for manifest, _ in listed], disk)
    elif listed:
        _show_points([manifest for manifest, _ in listed], now)
    raise typer.Exit(merged_exit_code(codes, warned=damaged))


# Text


def _show_named(points: Sequence[NamedPoint], now: datetime) -> None:
    """Show a line for each point of a sealed repository, of which only the names and sizes of files are known."""
    rows = [
        (
            point.machine,
            point.point,
            f"{point.began.astimezone():%Y-%m-%d %H:%M}",
            show_age(max((now - point.began).total_seconds(), 0)),
            show_size(point.stored),
            ", ".join(sorted(point.disks)),
        )
        for point in points
    ]
    output.table(("MACHINE", "POINT", "TAKEN", "AGE", "STORED", "DISKS"), rows, right=(3, 4))
    output.note("the repository is sealed: --identity FILE shows more", to_stderr=True)


def _show_points(points: Sequence[Manifest], now: datetime) -> None:
    """Show a line for each point, which fits into 80 columns if the machine's name is short."""
    from backup.model.documents import moment_of

    rows = []
    for point in points:
        began = moment_of(point.started)
        rows.append(
            (
                point.machine,
                point.point,
                f"{began.astimezone():%Y-%m-%d %H:%M}",
                show_age((now - began).total_seconds()) if began <= now else "future",
                _kind(point),
                show_size(sum(disk.bytes.stored for disk in point.disks)),
                "pinned" if point.pinned else "",
            )
        )
    output.table(("MACHINE", "POINT", "TAKEN", "AGE", "KIND", "STORED", ""), rows, right=(3, 5))


def _kind(point: Manifest) -> str:
    """Return the kind of a point's disks in at most five letters: full, incr, or mixed."""
    kinds = {disk.kind for disk in point.disks}
    if len(kinds) > 1:
        return "mixed"
    return "full" if kinds == {"full"} else "incr"


def _show_disks(points: Sequence[Manifest], wanted: str | None) -> None:
    """Show a line for each disk of each point; with `wanted`, only for the disk of that name."""
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
        if wanted in {None, disk.name}
    ]
    output.table(("MACHINE", "POINT", "DISK", "KIND", "SIZE", "STORED", "REASON"), rows, right=(4, 5))


# JSON


@dataclass(frozen=True, slots=True)
class PointDocument:
    """
    A point; `manifest` is the path of its manifest, `created` the time at which its backup began.

    `machine_files` are the roles of the small files that belong to the machine.  Of a point in a sealed repository,
    without the identity, the names and sizes of files tell some fields, and the others are None.
    """

    machine: str
    point: str
    sequence: int | None
    manifest: str
    created: str
    pinned: bool | None
    disks: Sequence[DiskDocument]
    machine_files: Sequence[str]

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
            machine_files=[file.role for file in manifest.machine_files],
        )

    @classmethod
    def of_named(cls, point: NamedPoint) -> PointDocument:
        """Return the document of a point of which only the files' names and sizes are known."""
        from backup.model.manifest import timestamp

        return cls(
            machine=point.machine,
            point=point.point,
            sequence=None,
            manifest=point.manifest,
            created=timestamp(point.began),
            pinned=None,
            disks=[DiskDocument(name, stored_bytes=size) for name, size in sorted(point.disks.items())],
            machine_files=point.roles,
        )


@dataclass(frozen=True, slots=True)
class DiskDocument:
    """
    A disk of a point; `parent` is the id of the point that an incremental builds on.

    Without a manifest, only the name and `stored_bytes` are known.
    """

    name: str
    kind: str | None = None
    reason: str | None = None
    size: int | None = None
    parent: str | None = None
    dirty_bytes: int | None = None
    data_bytes: int | None = None
    zero_bytes: int | None = None
    stored_bytes: int | None = None

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
