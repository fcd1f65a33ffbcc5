"""
From the points to keep to the steps of a prune: which data files are rewritten and which points removed, in order.

A point is removed with all of its disks at once.  A point that stays and builds on points that go first takes over the
data that it needs from them, disk by disk:

    in the middle    N -> R -> K      N becomes a larger incremental on K
    in front         N -> R -> F      F goes as well: N becomes a full.  That costs as much as a full: done in batches
    at the end       R -> K           R is removed, and nothing is rewritten

Pure: manifests in, steps out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from backup.model.documents import moment_of
from backup.model.manifest import DiskEntry, Manifest
from backup.planning.retention import Batch, DatedPoint


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A disk of a point takes over the data of `merged` (newest first) and builds on `onto` (None: as a full)."""

    point: str
    disk: str
    merged: tuple[str, ...]
    onto: str | None


@dataclass(frozen=True, slots=True)
class Remove:
    """A point is removed after the last point that builds on it was rewritten or removed."""

    point: str


Step = Rewrite | Remove


@dataclass(frozen=True, slots=True)
class Thinning:
    """The points that go now, those that wait for a batch, and the steps; after each, all other points are sound."""

    going: frozenset[str]
    waiting: frozenset[str]
    steps: tuple[Step, ...]


def dated_point(manifest: Manifest) -> DatedPoint:
    """The point of a manifest, as retention sees it."""
    return DatedPoint(
        manifest.point,
        manifest.sequence,
        moment_of(manifest.started),
        tuple(disk.name for disk in manifest.disks),
        manifest.pinned,
    )


def thin(manifests: Mapping[str, Manifest], keep: Collection[str], batch: Batch) -> Thinning:
    """
    Plan the removal of all points but those to `keep`.

    Every chain of `manifests` (by point id) must be sound.
    """
    unwanted = {point for point in manifests if point not in keep}
    going = set(unwanted)
    while waiting := _too_few(manifests, going, batch):
        going -= waiting  # so that fewer may be left to go in front of a point of another disk
    return Thinning(frozenset(going), frozenset(unwanted - going), tuple(_steps(manifests, going)))


def _too_few(manifests: Mapping[str, Manifest], going: Collection[str], batch: Batch) -> set[str]:
    """The points in front of a chain that are too few for a batch."""
    waiting: set[str] = set()
    for _, disk in _staying(manifests, going):
        merged, onto = _run(manifests, disk, going)
        if merged and onto is None:
            stored = [_entry(manifests, name, disk.name).data.size for name in merged]
            few = len(merged) < batch.points and sum(stored[:-1]) * 100 <= batch.share * stored[-1]
            waiting.update(merged if few else ())
    return waiting


def _steps(manifests: Mapping[str, Manifest], going: Collection[str]) -> Iterator[Step]:
    """Yield the rewrites in the order of the points, and each removal as soon as no point builds on the removed one."""
    children = Counter(disk.parent.point for manifest in manifests.values() for disk in manifest.disks if disk.parent)
    left = _newest_first(manifests, going)
    yield from _removals(manifests, left, children)
    for point, disk in _staying(manifests, going):
        merged, onto = _run(manifests, disk, going)
        if merged:
            yield Rewrite(point, disk.name, merged, onto)
            children[merged[0]] -= 1
            if onto is not None:
                children[onto] += 1
            yield from _removals(manifests, left, children)
    assert not left


def _removals(manifests: Mapping[str, Manifest], left: list[str], children: Counter[str]) -> Iterator[Step]:
    """Remove the points from `left`, newest first, on which no disk builds; `children` counts the disks that build."""
    for point in list(left):
        if not children[point]:
            left.remove(point)
            children.subtract(disk.parent.point for disk in manifests[point].disks if disk.parent)
            yield Remove(point)


def _staying(manifests: Mapping[str, Manifest], going: Collection[str]) -> Iterator[tuple[str, DiskEntry]]:
    """Yield the disks of the points that stay, oldest point first."""
    for point in reversed(_newest_first(manifests, [point for point in manifests if point not in going])):
        for disk in manifests[point].disks:
            yield point, disk


def _run(
    manifests: Mapping[str, Manifest], disk: DiskEntry, going: Collection[str]
) -> tuple[tuple[str, ...], str | None]:
    """The points that go directly below a disk's point, newest first, and the first point below them that stays."""
    merged: list[str] = []
    parent = disk.parent
    while parent is not None and parent.point in going:
        merged.append(parent.point)
        parent = _entry(manifests, parent.point, disk.name).parent
    return tuple(merged), None if parent is None else parent.point


def _entry(manifests: Mapping[str, Manifest], point: str, disk: str) -> DiskEntry:
    entry = manifests[point].disk(disk)
    assert entry is not None
    return entry


def _newest_first(manifests: Mapping[str, Manifest], points: Collection[str]) -> list[str]:
    return sorted(points, key=lambda point: manifests[point].sequence, reverse=True)
