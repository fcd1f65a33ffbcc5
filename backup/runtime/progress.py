"""The interface to the display of progress.  Only the command line displays: no other package prints."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one disk after another, in the thread that called the operation."""

    def begin(self, disk: str, total: int) -> None:
        """Start a disk whose work ends at `total` bytes."""

    def advance(self, done: int) -> None:
        """Report that `done` bytes of the disk are finished."""


class Quiet:
    """A `Progress` that displays nothing."""

    def begin(self, disk: str, total: int) -> None:
        """Ignore the disk."""

    def advance(self, done: int) -> None:
        """Ignore the bytes."""
