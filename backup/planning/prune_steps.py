"""
From the points to keep to what is done to the others: which data files are rewritten, which points removed, in order.

A point goes away for all of its disks at once.  Where a point that stays builds on ones that go, it takes over what it
needs of them first, disk by disk:

    in the middle    N -> R -> K      N becomes a larger incremental on K
    in front         N -> R -> F      with F gone as well, N becomes a full: as dear as a full, so it is done in batches
    at the end       R -> K           R is removed and nothing rewritten

Pure: manifests in, steps out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from backup.model.documents import moment_of
from backup.model.manifest import DiskEntry, Manifest
from backup.planning.retention import Batch, Moment


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A disk of a point takes over what `merged` (newest first) hold and builds on `onto`; None: it becomes a full."""

    point: str
    disk: str
    merged: tuple[str, ...]
    onto: str | None


@dataclass(frozen=True, slots=True)
class Remove:
    """A point on which no other builds any more is removed."""

    point: str


Step = Rewrite | Remove


@dataclass(frozen=True, slots=True)
class Thinning:
    """The points that go now, those that wait for a batch, and the steps, which leave all others whole at any time."""

    going: frozenset[str]
    waiting: frozenset[str]
    steps: tuple[Step, ...]


def moment(manifest: Manifest) -> Moment:
    """A point as retention sees it."""
    return Moment(
        manifest.point,
        manifest.sequence,
        moment_of(manifest.started),
        tuple(disk.name for disk in manifest.disks),
        manifest.pinned,
    )


def thin(manifests: Mapping[str, Manifest], keep: Collection[str], batch: Batch) -> Thinning:
    """
    Plan the removal of all points but those to `keep`.

    Every chain of `manifests` (by point id) must be whole.
    """
    unwanted = {point for point in manifests if point not in keep}
    going = set(unwanted)
    while waiting := _too_few(manifests, going, batch):
        going -= waiting  # which may leave fewer to go before a point of another disk
    return Thinning(frozenset(going), frozenset(unwanted - going), tuple(_steps(manifests, going)))


def _too_few(manifests: Mapping[str, Manifest], going: Collection[str], batch: Batch) -> set[str]:
    """Points in front of a chain that are not enough for a batch."""
    waiting: set[str] = set()
    for _, disk in _staying(manifests, going):
        merged, onto = _run(manifests, disk, going)
        if merged and onto is None:
            stored = [_entry(manifests, name, disk.name).data.size for name in merged]
            few = len(merged) < batch.points and sum(stored[:-1]) * 100 <= batch.share * stored[-1]
            waiting.update(merged if few else ())
    return waiting


def _steps(manifests: Mapping[str, Manifest], going: Collection[str]) -> Iterator[Step]:
    """Rewrites in the order of the points, and each point's removal as soon as nothing builds on it."""
    children = Counter(disk.parent.point for held in manifests.values() for disk in held.disks if disk.parent)
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
    """Take those out of `left`, newest first, on which no disk builds; `children` counts the disks that do."""
    for point in list(left):
        if not children[point]:
            left.remove(point)
            children.subtract(disk.parent.point for disk in manifests[point].disks if disk.parent)
            yield Remove(point)


def _staying(manifests: Mapping[str, Manifest], going: Collection[str]) -> Iterator[tuple[str, DiskEntry]]:
    """The disks of the points that stay, oldest point first."""
    for point in reversed(_newest_first(manifests, [point for point in manifests if point not in going])):
        for disk in manifests[point].disks:
            yield point, disk


def _run(
    manifests: Mapping[str, Manifest], disk: DiskEntry, going: Collection[str]
) -> tuple[tuple[str, ...], str | None]:
    """The points that go right below a disk's, newest first; and the first below that stays."""
    merged: list[str] = []
    parent = disk.parent
    while parent is not None and parent.point in going:
        merged.append(parent.point)
        parent = _entry(manifests, parent.point, disk.name).parent
    return tuple(merged), None if parent is None else parent.point


def _entry(manifests: Mapping[str, Manifest], point: str, disk: str) -> DiskEntry:
    found = manifests[point].disk(disk)
    assert found is not None
    return found


def _newest_first(manifests: Mapping[str, Manifest], points: Collection[str]) -> list[str]:
    return sorted(points, key=lambda point: manifests[point].sequence, reverse=True)
