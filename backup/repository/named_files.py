"""
What the names and sizes of a machine's files say about its points, without reading a manifest.

That is all there is to see of a sealed repository without the identity that opens its files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from backup.model import manifest as manifests
from backup.repository.machine import Machine, manifest_name, points_named


@dataclass(frozen=True, slots=True)
class NamedPoint:
    """
    A point by the names of its files.

    `began` is the time in the point's id.  `disks` are the sizes of the data files, by the names of the disks.  `roles`
    are those of the small files that belong to the machine.
    """

    machine: str
    point: str
    began: datetime
    manifest: str
    disks: Mapping[str, int]
    roles: tuple[str, ...]

    @property
    def stored(self) -> int:
        """The bytes of all data files."""
        return sum(self.disks.values())


def named_points(machine: Machine) -> list[NamedPoint]:
    """
    Return the points of a machine whose manifests have a name in its folder, oldest first.

    Raises
    ------
    BackupError
        The folder cannot be listed.
    """
    listing = machine.listing()
    disks: defaultdict[str, dict[str, int]] = defaultdict(dict)
    roles: defaultdict[str, list[str]] = defaultdict(list)
    for name in listing:
        point = manifests.point_of(name)
        if point is not None and name.endswith(_DATA):
            disks[point][name.removesuffix(f".{point}{_DATA}")] = listing.stat(name).size
        elif manifests.is_machine_file_name(name):
            point, _, suffix = name.partition(".")
            roles[point].append(_ROLES[suffix])
    return [
        NamedPoint(
            machine.name,
            point,
            _time_in(point),
            machine.files.path(manifest_name(point)),
            disks[point],
            tuple(sorted(roles[point])),
        )
        for point in points_named(listing)
    ]


_DATA = ".qcow2"
_ROLES = {suffix: role for role, suffix in manifests.SUFFIXES.items()}


def _time_in(point: str) -> datetime:
    """Return the time in a point's id."""
    try:
        return datetime.strptime(point[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
