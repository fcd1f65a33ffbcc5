"""
Chains: the points of a disk from a full to the newest, each one checked to continue the one before.

An incremental names the id and the identity of its parent.  `build` refuses gaps, swapped manifests and parents from
another chain.  `repository.cluster_index` finds the point that holds a byte.  This module does not import numpy, so
that a command that only shows chains starts quickly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from backup.errors import BackupError, Damaged, NotFound
from backup.model.manifest import DiskEntry, Manifest

_NONE: Mapping[str, BackupError] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Link:
    """One disk of one point, as an element of a chain."""

    point: str
    sequence: int
    entry: DiskEntry


@dataclass(frozen=True, slots=True)
class Chain:
    """The links of a disk, from the newest to the full."""

    disk: str
    links: tuple[Link, ...]

    @property
    def newest(self) -> Link:
        """The link of the point that the chain was built for."""
        return self.links[0]

    @property
    def size(self) -> int:
        """The exact size of the disk at the newest point, in bytes."""
        return self.links[0].entry.size

    @property
    def cluster_size(self) -> int:
        """The size of a cluster in bytes, the same in all links."""
        return self.links[0].entry.data.cluster_size

    def part(self, start: int, end: int | None = None) -> Chain:
        """Return the links with the indexes [start, end) as a chain, which need not end in a full."""
        return Chain(self.disk, self.links[start:end])

    @property
    def limits(self) -> tuple[int, ...]:
        """
        For each link, the offset from which its data is no longer visible.

        It is the smallest disk size of the link's point and all newer points of the chain.
        """
        limits: list[int] = []
        for link in self.links:
            limits.append(min(link.entry.size, limits[-1] if limits else link.entry.size))
        return tuple(limits)


def newest_manifest(manifests: Iterable[Manifest], disk: str | None = None) -> Manifest | None:
    """
    Return the newest of the manifests that hold `disk` (None: of all manifests); None if there is none.

    The newest manifest has the highest sequence number.  Times and names do not count.
    """
    holders = [manifest for manifest in manifests if disk is None or manifest.disk(disk) is not None]
    return max(holders, key=lambda manifest: manifest.sequence, default=None)


def build(
    manifests: Mapping[str, Manifest], point: str, disk: str, unreadable: Mapping[str, BackupError] = _NONE
) -> Chain:
    """
    Build the chain of a disk: follow the parents from `point` down to a full.

    Parameters
    ----------
    manifests : mapping
        The machine's manifests by point id.
    unreadable : mapping
        The errors of the manifests that could not be read, by file name: such a manifest is damaged, and not missing.

    Raises
    ------
    NotFound
        The point or the disk does not exist, or a parent's manifest is missing.
    BackupError
        A manifest of the chain cannot be read.
    Damaged
        A parent is not the point that the child builds on.
    """
    links = [first_link(manifests, point, disk, unreadable)]
    while links[-1].entry.parent is not None:
        links.append(parent_link(manifests, links[-1], disk, unreadable))
    return Chain(disk, tuple(links))


def require_whole(manifests: Mapping[str, Manifest]) -> None:
    """
    Make sure that the chain of every disk of every point is whole; each link is checked once.

    A parent's sequence is below its child's.  So a chain of valid links cannot go on for ever, and ends in a full.

    Raises
    ------
    NotFound, Damaged
        As `build`.
    """
    for manifest in manifests.values():
        for entry in manifest.disks:
            if entry.parent is not None:
                parent_link(manifests, Link(manifest.point, manifest.sequence, entry), entry.name, _NONE)


def first_link(manifests: Mapping[str, Manifest], point: str, disk: str, unreadable: Mapping[str, BackupError]) -> Link:
    """Return the link of the point that a chain is built for; raises as `build`."""
    manifest = manifests.get(point)
    if manifest is None:
        if f"{point}.json" in unreadable:
            raise unreadable[f"{point}.json"]
        raise NotFound(f"there is no point {point}", hint="`pybackup list` shows the points")
    entry = manifest.disk(disk)
    if entry is None:
        names = ", ".join(other.name for other in manifest.disks)
        raise NotFound(f"point {point} holds no disk {disk!r}", hint=f"it holds: {names}")
    return Link(point, manifest.sequence, entry)


def parent_link(
    manifests: Mapping[str, Manifest], child: Link, disk: str, unreadable: Mapping[str, BackupError]
) -> Link:
    """Return the parent of the incremental `child`; raises as `build`."""
    wanted = child.entry.parent
    assert wanted is not None
    manifest = manifests.get(wanted.point)
    if manifest is None:
        error = unreadable.get(f"{wanted.point}.json")
        if error is not None:
            why = f"point {child.point} builds on point {wanted.point}: {error.message}"
            raise type(error)(why, hint=error.hint) from None
        raise NotFound(
            f"point {child.point} builds on point {wanted.point}, whose manifest is missing",
            hint="bring the manifest back from a copy of the repository, or use a point before the gap",
        )
    entry = manifest.disk(disk)
    if entry is None:
        raise _mismatch(child, wanted.point, f"that point holds no disk {disk!r}")
    if entry.identity != wanted.identity:
        raise _mismatch(child, wanted.point, f"its identity is {entry.identity}, not {wanted.identity}")
    if manifest.sequence >= child.sequence:
        raise _mismatch(child, wanted.point, f"its sequence {manifest.sequence} is not below {child.sequence}")
    if entry.data.cluster_size != child.entry.data.cluster_size:
        raise _mismatch(child, wanted.point, f"its clusters have {entry.data.cluster_size} bytes")
    return Link(wanted.point, manifest.sequence, entry)


def _mismatch(child: Link, parent: str, why: str) -> BackupError:
    return Damaged(
        f"point {child.point} does not continue point {parent}: {why}",
        hint="a manifest was swapped or is from another chain; bring the right one back from a copy of the repository",
    )
