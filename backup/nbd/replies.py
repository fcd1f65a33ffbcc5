"""Understand the answers of an NBD server: block status as extents, and the pieces of a structured reply."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from backup.errors import SourceError
from backup.model.extents import Runs
from backup.nbd.connection import NO_PROTOCOL

if TYPE_CHECKING:
    import nbd


MAX_REQUEST = 32 << 20
"""Largest read or write of a server that announces no other limit (NBD protocol, "Block sizes")."""
_SMALLEST_PIECE = 512
"""A read may arrive in one piece for each of this many bytes; the limit bounds the memory for the pieces."""


@dataclass(frozen=True, slots=True)
class Question:
    """A block status request in flight, for the bytes [start, end); `answers` receives the answers of its context."""

    handle: nbd.NBD
    cookie: int
    context: str
    start: int
    end: int
    answers: list[list[int]]


@dataclass(frozen=True, slots=True)
class Blocks:
    """
    The sizes of requests that a server accepts (NBD protocol, "Block sizes").  Bytes.

    A request begins and ends at multiples of `smallest` or at the end of the export, which has `size` bytes.  A read or
    write has at most `largest` bytes, a multiple of `smallest`.
    """

    smallest: int
    largest: int
    size: int

    def around(self, start: int, end: int) -> tuple[int, int]:
        """Round [start, end) out to whole blocks, but not beyond the end of the export."""
        return start - start % self.smallest, max(end, min(end + -end % self.smallest, self.size))


def extents_from_reply(entries: list[int], start: int, end: int, uri: str) -> Runs:
    """
    Turn one reply (length, flags, length, flags, ...) into runs of [start, at most end).

    Raises
    ------
    SourceError
        The reply makes no progress.
    """
    if len(entries) == 2 and entries[0]:  # each window of an idle disk is one extent
        return Runs.uniform(start, min(start + entries[0], end), entries[1])
    # array takes the integers out of a list three times as fast as numpy does.
    columns = np.frombuffer(array("Q", entries), np.int64).reshape(-1, 2)
    if not columns[:, 0].all():
        columns = columns[columns[:, 0] > 0]
    if not len(columns):
        raise SourceError(
            f"{uri} answered a block status request at {start} with no extent",
            hint=NO_PROTOCOL,
        )
    bounds = np.empty(len(columns) + 1, dtype=np.int64)
    bounds[0] = 0
    np.cumsum(columns[:, 0], out=bounds[1:])
    bounds += start
    inside = int(np.searchsorted(bounds[:-1], end))
    return Runs.of(bounds[:inside], min(int(bounds[-1]), end), columns[:inside, 1].astype(np.uint32))


class Pieces:
    """
    The pieces of [start, end) that have arrived, in any order.  Bytes.

    libnbd only adds up the lengths of the pieces (structured replies) that answer a read, so that a piece that arrives
    twice hides another one that never arrives.
    """

    __slots__ = ("_end", "_found", "_start")

    def __init__(self, start: int, end: int) -> None:
        self._start, self._end = start, end
        self._found: list[list[int]] = []

    def add(self, start: int, length: int) -> bool:
        """Note a piece; return False if there are more separate pieces than a sane server sends."""
        if self._found and self._found[-1][1] == start:
            self._found[-1][1] += length
        elif length:
            self._found.append([start, start + length])
        return len(self._found) <= 1 + (self._end - self._start) // _SMALLEST_PIECE

    def complete(self) -> bool:
        """Tell whether every byte has arrived exactly once."""
        end = self._start
        for low, high in sorted(self._found):
            if low != end:
                return False
            end = high
        return end == self._end


def blocks_of(binding: Any, handle: nbd.NBD) -> Blocks:
    """Return the sizes of requests that the server of an open connection accepts."""
    smallest = handle.get_block_size(binding.SIZE_MINIMUM) or 1
    # libnbd itself refuses more than 64 MiB, whatever the server announces (nbd_pwrite(3)).
    largest = min(handle.get_block_size(binding.SIZE_MAXIMUM) or MAX_REQUEST, MAX_REQUEST)
    return Blocks(smallest, max(largest - largest % smallest, smallest), handle.get_size())
