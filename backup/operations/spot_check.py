"""
The spot check: a few clusters that the bitmap calls clean, read from the disk and held against the chain.

No name shows that a bitmap was cleared, or disabled and enabled again after writes, or that something wrote past QEMU
(trap 47); this finds it with a probability that grows with the lie.
"""

from __future__ import annotations

from dataclasses import dataclass

from backup.engine import compare, copier
from backup.model.chain import Chain
from backup.model.extents import Offsets
from backup.model.open_disk import OpenDisk
from backup.planning import plan
from backup.repository import chain_reader
from backup.storage.base import Files


@dataclass(frozen=True, slots=True)
class Lies:
    """How many of the clusters differ, and the first byte (a sector's first) that does; 0 and 0 where none differs."""

    clusters: int
    first: int


def differing(disk: OpenDisk, clusters: Offsets, files: Files, chain: Chain, settings: copier.Settings) -> Lies:
    """
    Which of these clusters (ascending) of the disk are not what the chain in `files` says.

    Each is compared with what lies in the chain's files, which a frame's own checksum covers.  What differs is compared
    again, with every block of the files held against its digest: only then it is the bitmap that lied.

    Raises
    ------
    NotFound, Damaged
        The chain is not what was written.
    SourceError
        The disk cannot be read.
    """
    if not len(clusters):
        return Lies(0, 0)
    planned = plan.plan_of(clusters, disk.size, chain.cluster_size)
    with chain_reader.glanced(files, chain, disk.size, clusters) as content:
        suspected = compare.compare(disk, planned, content, settings, _unwatched).clusters()
    if not len(suspected):
        return Lies(0, 0)
    planned = plan.plan_of(suspected, disk.size, chain.cluster_size)
    with chain_reader.checked(files, chain, disk.size) as content:
        differences = compare.compare(disk, planned, content, settings, _unwatched)
    return Lies(len(differences.clusters()), differences.ranges()[0][0]) if differences.bytes else Lies(0, 0)


def _unwatched(_done: int) -> None:
    """It takes moments."""
