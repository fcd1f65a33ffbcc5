"""
The spot check: read a few clusters that the bitmap reports as clean, and compare them with the chain.

A bitmap's name does not show that the bitmap was cleared, or disabled during writes, or that something wrote to the
image without QEMU (docs/traps.md, trap 47).  A spot check finds such changes with a probability that grows with their
number.
"""

from __future__ import annotations

from dataclasses import dataclass

from backup.engine import compare
from backup.engine.copy_settings import CopySettings
from backup.model.chain import Chain
from backup.model.extents import Offsets
from backup.model.open_disk import OpenDisk
from backup.planning import plan
from backup.repository import chain_reader
from backup.storage.base import Files


@dataclass(frozen=True, slots=True)
class Difference:
    """The number of clusters that differ, and the offset of the first sector that does; 0 and 0: none differs."""

    clusters: int
    first: int


def differing(disk: OpenDisk, clusters: Offsets, files: Files, chain: Chain, settings: CopySettings) -> Difference:
    """
    Compare these clusters (ascending) of the disk with the chain in `files`.

    The first comparison checks only the frames' own checksums.  What differs is compared again, and this time every
    block of the chain's files is verified against its digest: a difference that remains shows that the bitmap, and not
    the chain, is wrong.

    Raises
    ------
    NotFound, Damaged
        A file of the chain is missing or damaged.
    SourceError
        The disk cannot be read.
    """
    if not len(clusters):
        return Difference(0, 0)
    planned = plan.plan_of(clusters, disk.size, chain.cluster_size)
    with chain_reader.glanced(files, chain, disk.size, clusters) as content:
        suspected = compare.compare(disk, planned, content, settings, _unwatched).clusters()
    if not len(suspected):
        return Difference(0, 0)
    planned = plan.plan_of(suspected, disk.size, chain.cluster_size)
    with chain_reader.checked(files, chain, disk.size) as content:
        differences = compare.compare(disk, planned, content, settings, _unwatched)
    return (
        Difference(len(differences.clusters()), differences.ranges()[0][0]) if differences.bytes else Difference(0, 0)
    )


def _unwatched(_done: int) -> None:
    """Ignore the progress of a comparison that takes moments."""
