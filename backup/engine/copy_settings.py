"""How a disk is copied: how much at a time, and how fast."""

from __future__ import annotations

from dataclasses import dataclass, replace

_BATCHES_EACH = 4
"""Batches that each worker should get at least, so that the workers finish at about the same time."""


@dataclass(frozen=True, slots=True)
class CopySettings:
    """
    The degree of parallelism, and the limits.

    Each of `connections` has at most `requests` reads in flight, of at most `request_size` bytes each.  `workers` is
    the number of processor cores to use.  All buffers together have at most `buffer_limit` bytes.  `limit` is the
    highest rate of reading in bytes a second (None: no limit).
    """

    connections: int = 4
    requests: int = 16
    request_size: int = 1 << 19
    workers: int = 2
    buffer_limit: int = 64 << 20
    limit: int | None = None

    def within(self, most: int | None) -> CopySettings:
        """Return the settings with at most `most` reads in flight on a connection (None: unchanged)."""
        return self if most is None else replace(self, requests=min(self.requests, most))

    def threads(self, lanes: int) -> int:
        """
        Return the number of threads: one for each connection, and one more than cores, since some wait for the disk.
        """
        return max(self.workers + 1, lanes)

    def buffers(self, lanes: int, batch: int) -> int:
        """Return the number of buffers of `batch` bytes: one for each thread, and enough for all reads in flight."""
        wanted = self.threads(lanes) + -(-lanes * self.requests * self.request_size // batch)
        return max(1, min(wanted, self.buffer_limit // batch))

    def batch(self, data: int, cluster_size: int, most: int) -> int:
        """
        Return the size of a buffer in bytes, for `data` bytes in all.

        The size is `most`, which the sink handles best, or less if workers would be idle, but never less than one read.
        """
        share = data // (_BATCHES_EACH * self.workers)
        size = max(self.request_size, min(most, share))
        return max(cluster_size, size // cluster_size * cluster_size)
