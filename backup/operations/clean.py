"""
Our bitmaps in a running machine or in images: the list of them, and their removal.

Bitmaps keep QEMU from reverting a disk to an internal snapshot (loadvm, `qemu-img snapshot -a`, `virsh
snapshot-revert`), and those of a repository that is gone stay in an image for ever.  Only names of exactly our form,
FAMILY.REPOSITORY.POINT, with an id that the user selected, are removed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from backup.errors import SourceError
from backup.model import disk
from backup.qemu import image_bitmaps, images
from backup.qmp.blocks import OURS, BlockGraph
from backup.qmp.monitor import Monitor


class Place(Protocol):
    """Where bitmaps are: a node of a running QEMU, or an image."""

    @property
    def text(self) -> str:
        """What users call it."""

    def bitmaps(self) -> Sequence[str]:
        """Names of its bitmaps."""

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
    """A node of a running QEMU, whose `names` were the bitmaps' a moment ago."""

    monitor: Monitor
    node: str
    names: tuple[str, ...]

    @property
    def text(self) -> str:
        """The node's name."""
        return f"node {self.node}"

    def bitmaps(self) -> Sequence[str]:
        """Those of the moment at which it was looked at."""
        return self.names

    def remove(self, name: str) -> None:
        """Have QEMU remove it, which it writes to the image at once."""
        self.monitor.command("block-dirty-bitmap-remove", {"node": self.node, "name": name})


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """An image that no machine has open."""

    path: Path

    @property
    def text(self) -> str:
        """Its path."""
        return f"image {self.path}"

    def bitmaps(self) -> Sequence[str]:
        """As qemu-img lists them; none of a raw image."""
        if images.detect_format(self.path) != images.QCOW2:
            return ()
        return [bitmap.name for bitmap in images.image_info(self.path, images.QCOW2).bitmaps]

    def remove(self, name: str) -> None:
        """Have qemu-img remove it."""
        image_bitmaps.remove_bitmap(self.path, name)


@dataclass(frozen=True, slots=True)
class Found:
    """A bitmap whose name has our form; `repository` is the short id in its name."""

    place: Place
    name: str
    repository: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What became of a bitmap.

    `selected`: is its repository among those whose bitmaps are to go?  `problem` is why it could not be removed.
    """

    found: Found
    selected: bool
    removed: bool = False
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class GoneOwner:
    """A repository of which only the short id is known (`sources.base.Owner`): its bitmaps are removed by name."""

    short_id: str

    def has_point(self, point: str) -> bool:
        """Yes: that a bitmap belongs to no point is no reason to remove it here."""
        del point
        return True

    def require_alone(self) -> None:
        """Pass: nobody can tell whether a run of a repository that is gone is under way."""


def places_of(monitor: Monitor, blocks: BlockGraph) -> list[Place]:
    """Nodes with bitmaps, but those that a backup made for itself, which go with it."""
    return [
        NodePlace(monitor, node.name, tuple(bitmap.name for bitmap in node.bitmaps))
        for node in blocks.nodes.values()
        if node.bitmaps and not node.name.startswith(OURS)
    ]


def find(places: Iterable[Place]) -> list[Found]:
    """
    List the bitmaps whose names have our form, of whichever repository.

    Raises
    ------
    SourceError
        A place cannot be looked at.
    """
    return [
        Found(place, name, repository)
        for place in places
        for name in place.bitmaps()
        if (repository := disk.repository_of(name)) is not None
    ]


def select(found: Iterable[Found], repositories: Collection[str]) -> list[Outcome]:
    """Mark the bitmaps of these repositories (short ids)."""
    return [Outcome(each, each.repository in repositories) for each in found]


def remove(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Remove the bitmaps that are selected; one that cannot be removed does not keep the others."""
    return [_remove(each) if each.selected else each for each in outcomes]


def _remove(outcome: Outcome) -> Outcome:
    try:
        outcome.found.place.remove(outcome.found.name)
    except SourceError as error:
        return replace(outcome, problem=error.message)
    return replace(outcome, removed=True)
