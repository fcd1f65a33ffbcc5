"""
List and remove pybackup's bitmaps in a running machine or in images.

Bitmaps keep QEMU from reverting a disk to an internal snapshot (loadvm, `qemu-img snapshot -a`, `virsh
snapshot-revert`), and the bitmaps of a repository that no longer exists would stay in an image for ever.  Only bitmaps
whose names have exactly the form FAMILY.REPOSITORY.POINT, with an id that the user selected, are removed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from backup.errors import SourceError
from backup.model import disk
from backup.qemu import image_bitmaps, images
from backup.qmp.blocks import OURS, BlockGraph
from backup.qmp.monitor import Monitor
from backup.repository.repository import Repository
from backup.runtime.ignoring import ignoring
from backup.sources.base import Host, Owner, Source

_log = logging.getLogger(__name__)


class Place(Protocol):
    """A place that holds bitmaps: a node of a running QEMU, or an image."""

    @property
    def text(self) -> str:
        """Return the place as messages name it."""

    def bitmaps(self) -> Sequence[str]:
        """Return the names of the bitmaps."""

    def remove(self, name: str) -> None:
        """
        Remove a bitmap.

        Raises
        ------
        SourceError
            QEMU refuses.
        """


@dataclass(frozen=True, slots=True)
class NodePlace:
    """A node of a running QEMU, and the `names` of its bitmaps when the node was examined."""

    monitor: Monitor
    node: str
    names: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return the name of the node."""
        return f"node {self.node}"

    def bitmaps(self) -> Sequence[str]:
        """Return the names from the time at which the node was examined."""
        return self.names

    def remove(self, name: str) -> None:
        """Have QEMU remove a bitmap; QEMU updates the image at once."""
        self.monitor.command("block-dirty-bitmap-remove", {"node": self.node, "name": name})


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """An image that no machine has open."""

    path: Path

    @property
    def text(self) -> str:
        """Return the path of the image."""
        return f"image {self.path}"

    def bitmaps(self) -> Sequence[str]:
        """Return the names that qemu-img lists; a raw image has no bitmaps."""
        if images.detect_format(self.path) != images.QCOW2:
            return ()
        return [bitmap.name for bitmap in images.image_info(self.path, images.QCOW2).bitmaps]

    def remove(self, name: str) -> None:
        """Have qemu-img remove a bitmap."""
        image_bitmaps.remove_bitmap(self.path, name)


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """A disk of a domain of libvirt, on or off, and the `names` of its bitmaps when the disk was inspected."""

    disk: str
    source: Source
    names: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return the name of the disk."""
        return f"disk {self.disk}"

    def bitmaps(self) -> Sequence[str]:
        """Return the names from the time at which the disk was inspected."""
        return self.names

    def remove(self, name: str) -> None:
        """Have libvirt, or qemu-img while the domain is off, remove a bitmap."""
        self.source.remove_bitmap(name)


@dataclass(frozen=True, slots=True)
class NamedBitmap:
    """A bitmap with a name of pybackup's form; `repository` is the short id in the name."""

    place: Place
    name: str
    repository: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What became of a bitmap.

    `selected`: the bitmap's repository is among those whose bitmaps are to be removed.  `problem` is why the bitmap
    could not be removed.
    """

    bitmap: NamedBitmap
    selected: bool
    removed: bool = False
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class GoneOwner:
    """A repository that no longer exists (`sources.base.Owner`), of which only the short id is known."""

    short_id: str

    def has_point(self, point: str) -> bool:
        """Return True: the points are unknown, and a bitmap without a point is not removed for that reason."""
        del point
        return True

    def require_alone(self) -> None:
        """Do nothing: a repository that no longer exists has no lock."""


def places_of(monitor: Monitor, blocks: BlockGraph) -> list[Place]:
    """Return the nodes with bitmaps, except nodes that a running backup added for itself."""
    return [
        NodePlace(monitor, node.name, tuple(bitmap.name for bitmap in node.bitmaps))
        for node in blocks.nodes.values()
        if node.bitmaps and not node.name.startswith(OURS)
    ]


def started_bitmaps(repository: Repository) -> dict[str, set[str]]:
    """
    Return the bitmaps that the points of a repository started and a disk may still have, by the path of its image.

    These are the bitmaps of a disk's two newest points: a run that was killed leaves the older one as well.
    """
    started: dict[str, set[str]] = {}
    for path, names in _started(repository):
        started.setdefault(path, set()).update(names[-2:])
    return started


def _started(repository: Repository) -> Iterator[tuple[str, list[str]]]:
    """Yield for each disk of each machine the path of its image, and the bitmaps that points started, oldest first."""
    for name in repository.machine_names():
        of_machine: dict[str, list[str]] = {}
        for manifest in sorted(repository.machine(name).contents().manifests.values(), key=lambda each: each.sequence):
            for entry in manifest.disks:
                if entry.bitmap.started is not None:
                    of_machine.setdefault(entry.source.path, []).append(entry.bitmap.started)
        yield from of_machine.items()


def remove_superseded(domain: Host, repository: Repository, owner: Owner) -> list[str]:
    """
    Remove from each disk the bitmap of its last point but one, which a run that was killed in the end has left.

    Without libvirt's record of it, a later run could not see the bitmap.  Returns what was removed, as texts.
    """
    superseded = {path: names[-2] for path, names in _started(repository) if len(names) > 1}
    removed: list[str] = []
    disks: Sequence[tuple[str, Source]] = ()
    with ignoring(_log, "removal of superseded bitmaps", SourceError):  # a domain without a disk
        disks = domain.discover()
    for target, source in disks:
        with ignoring(_log, f"removal of superseded bitmaps of disk {target}", SourceError):
            name = superseded.get(source.inspect().path)
            if name is None:
                continue
            source.expect_bitmaps([name])
            if source.inspect().bitmap(name) is not None:
                owner.require_alone()
                source.remove_bitmap(name)
                removed.append(f"bitmap {name} of disk {target}, which a newer point supersedes")
    return removed


def disk_places(
    disks: Iterable[tuple[str, Source]], started: Mapping[str, Collection[str]]
) -> tuple[list[Place], list[str]]:
    """
    Inspect the disks of a domain; also return why some cannot be inspected.

    `started` are the bitmaps that may be there, by the path of the image: while the domain is on, libvirt lists only
    bitmaps that it is asked for, until QEMU has stored them in the image.
    """
    places: list[Place] = []
    problems = []
    for name, source in disks:
        try:
            state = source.inspect()
            if not state.lists_bitmaps:
                source.expect_bitmaps(started.get(state.path, ()))
                state = source.inspect()
        except SourceError as error:
            problems.append(error.message)
            continue
        places.append(DiskPlace(name, source, tuple(bitmap.name for bitmap in state.bitmaps)))
    return places, problems


def find(places: Iterable[Place]) -> list[NamedBitmap]:
    """
    List the bitmaps with names of pybackup's form, of any repository.

    Raises
    ------
    SourceError
        A place cannot be examined.
    """
    return [
        NamedBitmap(place, name, repository)
        for place in places
        for name in place.bitmaps()
        if (repository := disk.repository_of(name)) is not None
    ]


def select(bitmaps: Iterable[NamedBitmap], repositories: Collection[str]) -> list[Outcome]:
    """Select the bitmaps of these repositories (short ids)."""
    return [Outcome(bitmap, bitmap.repository in repositories) for bitmap in bitmaps]


def remove(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Remove the selected bitmaps; a failure of one does not stop the removal of the others."""
    return [_remove(outcome) if outcome.selected else outcome for outcome in outcomes]


def _remove(outcome: Outcome) -> Outcome:
    try:
        outcome.bitmap.place.remove(outcome.bitmap.name)
    except SourceError as error:
        return replace(outcome, problem=error.message)
    return replace(outcome, removed=True)
