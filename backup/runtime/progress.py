"""
Who watches a long piece of work; the library never prints.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told of one disk after the other, in the thread that asked for the work."""

    def begin(self, disk: str, total: int) -> None:
        """Work on a disk begins; it ends at `total` bytes."""

    def advance(self, done: int) -> None:
        """So many bytes of it are done."""
