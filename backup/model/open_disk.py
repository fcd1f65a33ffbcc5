"""
The interface of an open disk, which shows one instant and hides how the disk is reached.

Planning asks an open disk which ranges read as zeroes and which are dirty; the engine reads its bytes through lanes.
`backup.nbd.export.Export` is the implementation that sources use.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from backup.model.extents import Runs


class BlockStatus(Protocol):
    """The part of an open disk that planning needs."""

    @property
    def size(self) -> int:
        """Exact size of the disk in bytes."""

    def allocation(self, start: int, end: int) -> Runs:
        """
        Return the allocation flags (HOLE and ZERO) of the bytes [start, end); no flags where allocation is unknown.

        Raises
        ------
        SourceError
            The disk cannot be queried.
        """

    def dirty(self, bitmap: str, start: int, end: int) -> Runs:
        """
        Return which of the bytes [start, end) the bitmap of exactly this name reports as dirty (the flag DIRTY).

        Raises
        ------
        SourceError
            The disk cannot be queried, or has no such bitmap: a missing bitmap never means "all clean".
        """

    def expect_allocation(self, start: int, end: int) -> None:
        """Announce a call of `allocation` with the same range, so that the answer can be prepared meanwhile."""

    def expect_dirty(self, bitmap: str, start: int, end: int) -> None:
        """Announce a call of `dirty` with the same range, so that the answer can be prepared meanwhile."""


class Lane(Protocol):
    """One connection to a disk, with several reads in flight.  One thread at a time uses a lane."""

    @property
    def in_flight(self) -> int:
        """Number of reads that have no answer yet."""

    def submit(self, offset: int, view: memoryview, token: object) -> None:
        """
        Start to read len(view) bytes at `offset` into `view`; `wait` returns `token` when they have arrived.

        Raises
        ------
        SourceError
            The connection is gone.
        """

    def wait(self, milliseconds: int, enough: int) -> list[object]:
        """
        Wait until `enough` reads have finished or the time is over; return the tokens of all reads that have finished.

        Raises
        ------
        SourceError
            A read failed, or no answer came within the timeout (`backup.runtime.timeouts`).
        """


class OpenDisk(BlockStatus, Protocol):
    """A disk that is open for reading; every answer and every byte belongs to the same instant."""

    @property
    def max_request(self) -> int:
        """Largest read in bytes, a multiple of `smallest_request`."""

    @property
    def smallest_request(self) -> int:
        """Bytes; a lane extends every read to multiples of this number."""

    @property
    def max_in_flight(self) -> int | None:
        """Largest number of reads in flight on one lane; None: any number."""

    def lanes(self, wanted: int) -> AbstractContextManager[Sequence[Lane]]:
        """Open lanes to read through: `wanted` of them, or fewer where the disk allows no more; at least one."""
