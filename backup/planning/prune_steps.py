"""
The steps of a prune, planned from the points to keep: which data files to rewrite and which points to remove, in order.

A point is removed with all of its disks at once.  If a kept point builds on points that are removed, the kept point
first takes over the data that it needs from them, disk by disk.  N and K are kept, R and the full F are removed:

    in the middle    N -> R -> K      N becomes a larger incremental on K
    in front         N -> R -> F      N becomes a full; this costs as much as a full backup, so it is done in batches
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
    """A disk of a point takes over the data of points `merged` (newest first) and builds on `onto` (None: a full)."""

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
    """
    The plan of a prune: the points that are `going` to be removed, and the `steps` that do it.

    `waiting` points are unwanted too, but are too few for a batch; a later prune removes them.  After every step, all
    points that are not yet removed are sound.
    """

    going: frozenset[str]
    waiting: frozenset[str]
    steps: tuple[Step, ...]


def dated_point(manifest: Manifest) -> DatedPoint:
    """Return the point of a manifest in the form that retention needs."""
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
        going -= waiting  # the batch of another disk may be too small now, so look again
    return Thinning(frozenset(going), frozenset(unwanted - going), tuple(_steps(manifests, going)))


def needed_by_kept(manifests: Mapping[str, Manifest], keep: Collection[str]) -> dict[str, int]:
    """
    Return the points on which points to `keep` build but that are not kept themselves, and how many points need each.

    Where data files cannot be rewritten, these points stay as well.
    """
    needed: Counter[str] = Counter()
    for point in keep:
        below: set[str] = set()
        left = [point]
        while left:
            parents = {disk.parent.point for disk in manifests[left.pop()].disks if disk.parent is not None}
            left += parents - below
            below |= parents
        needed.update(below)
    return {point: count for point, count in needed.items() if point not in keep}


def _too_few(manifests: Mapping[str, Manifest], going: Collection[str], batch: Batch) -> set[str]:
    """Return the unwanted points at the full end of a chain that are too few for a batch."""
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
    """Yield the disks of the points that are kept, oldest point first."""
    for point in reversed(_newest_first(manifests, [point for point in manifests if point not in going])):
        for disk in manifests[point].disks:
            yield point, disk


def _run(
    manifests: Mapping[str, Manifest], disk: DiskEntry, going: Collection[str]
) -> tuple[tuple[str, ...], str | None]:
    """Return the points to remove directly below a disk's point, newest first, and the kept point below them."""
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
