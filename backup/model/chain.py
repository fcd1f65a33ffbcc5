"""
Chains: a disk's points from a full to the newest, proven contiguous.

A child names its parent's id and identity; `build` refuses gaps, swaps and foreign parents.  Which point holds a byte
is backup.index's to say; this module does without numpy, so that a command that only shows chains starts quickly.
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
    """One disk in one point."""

    point: str
    sequence: int
    entry: DiskEntry


@dataclass(frozen=True, slots=True)
class Chain:
    """Links from the newest to the full."""

    disk: str
    links: tuple[Link, ...]

    @property
    def newest(self) -> Link:
        """The link that the chain was built for."""
        return self.links[0]

    @property
    def size(self) -> int:
        """Exact size of the disk at the newest point, in bytes."""
        return self.links[0].entry.size

    @property
    def cluster_size(self) -> int:
        """Bytes; the same in all links."""
        return self.links[0].entry.data.cluster_size

    def part(self, start: int, end: int | None = None) -> Chain:
        """Some neighbouring links, as a chain of their own: what they hold, whatever lies below them."""
        return Chain(self.disk, self.links[start:end])

    @property
    def limits(self) -> tuple[int, ...]:
        """For each link: from this byte on it does not show, since it or a point after it was that short."""
        limits: list[int] = []
        for link in self.links:
            limits.append(min(link.entry.size, limits[-1] if limits else link.entry.size))
        return tuple(limits)


def newest_manifest(manifests: Iterable[Manifest], disk: str | None = None) -> Manifest | None:
    """The manifest of the highest sequence, of those that hold `disk`; never by time or name."""
    held = [manifest for manifest in manifests if disk is None or manifest.disk(disk) is not None]
    return max(held, key=lambda manifest: manifest.sequence, default=None)


def build(
    manifests: Mapping[str, Manifest], point: str, disk: str, unreadable: Mapping[str, BackupError] = _NONE
) -> Chain:
    """
    Follow parents from `point` down to a full.

    Parameters
    ----------
    manifests : mapping
        The machine's manifests by point id.
    unreadable : mapping
        What is wrong with the others, by file name: a damaged manifest is there, and not missing.

    Raises
    ------
    NotFound
        The point or the disk is not there, or a parent's manifest is missing.
    BackupError
        A manifest of the chain cannot be read.
    Damaged
        A parent is not the one that the child was made against.
    """
    links = [first_link(manifests, point, disk, unreadable)]
    while links[-1].entry.parent is not None:
        links.append(parent_link(manifests, links[-1], disk, unreadable))
    return Chain(disk, tuple(links))


def require_whole(manifests: Mapping[str, Manifest]) -> None:
    """
    Make sure that every disk of every point leads down to a full; each link is looked at once.

    A parent's sequence is below its child's, so that links which are all sound end somewhere, which is in a full.

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
    """A disk in the point that a chain is built for; raises as `build`."""
    manifest = manifests.get(point)
    if manifest is None:
        if f"{point}.json" in unreadable:
            raise unreadable[f"{point}.json"]
        raise NotFound(f"there is no point {point}", hint="see `pybackup list` for the points that there are")
    entry = manifest.disk(disk)
    if entry is None:
        names = ", ".join(held.name for held in manifest.disks)
        raise NotFound(f"point {point} holds no disk {disk!r}", hint=f"it holds: {names}")
    return Link(point, manifest.sequence, entry)


def parent_link(
    manifests: Mapping[str, Manifest], child: Link, disk: str, unreadable: Mapping[str, BackupError]
) -> Link:
    """What the child, an incremental, was made against; raises as `build`."""
    wanted = child.entry.parent
    assert wanted is not None
    manifest = manifests.get(wanted.point)
    if manifest is None:
        found = unreadable.get(f"{wanted.point}.json")
        if found is not None:
            why = f"point {child.point} builds on point {wanted.point}: {found.message}"
            raise type(found)(why, hint=found.hint) from None
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
        hint="a manifest was swapped or is another chain's; bring the right one back from a copy of the repository",
    )
