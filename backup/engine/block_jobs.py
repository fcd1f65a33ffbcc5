"""Jobs of a restore and of a merge: the clusters whose stored bytes begin in the same block of the same data file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from backup.model.digests import BLOCK
from backup.model.extents import Mask, Offsets


@dataclass(frozen=True, slots=True, eq=False)
class BlockJob:
    """
    Clusters whose stored bytes begin in block number `block` of link number `link` of the chain.

    `offsets` and `lengths` are ranges of the link's data file in bytes; `packed` tells which of them are zstd frames.
    """

    link: int
    block: int
    clusters: Offsets
    offsets: Offsets
    lengths: Offsets
    packed: Mask


def block_jobs(
    *, links: Offsets, clusters: Offsets, offsets: Offsets, lengths: Offsets, packed: Mask, order: Offsets
) -> Iterator[BlockJob]:
    """
    Divide clusters into jobs.

    Parameters
    ----------
    order : array
        The indices of the other arrays, sorted by link and then by block; the clusters of a job keep this order.
    """
    links, clusters, offsets = links[order], clusters[order], offsets[order]
    lengths, packed = lengths[order], packed[order]
    blocks = offsets // BLOCK
    changes = np.flatnonzero((np.diff(links) != 0) | (np.diff(blocks) != 0)) + 1
    for low, high in pairwise([0, *changes.tolist(), len(order)]):
        if low < high:
            here = slice(low, high)
            yield BlockJob(
                int(links[low]), int(blocks[low]), clusters[here], offsets[here], lengths[here], packed[here]
            )
