"""
Fakes of what is hard to come by: an NBD server whose every reply is legal and awkward, behind a fake `nbd` module.

A disk is told byte by byte: one array of allocation flags and one of dirty bits for each bitmap.  `naive_runs` is the
oracle that extents are held against.
"""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from backup.model.extents import Runs

ALLOCATION = "base:allocation"
DIRTY = "qemu:dirty-bitmap:"


@dataclass(frozen=True, slots=True)
class Manner:
    """
    How a server answers block status.

    `most` extents per context and reply (None: all); `over`: the last extent ends so many bytes beyond what was asked;
    `halves`: every extent comes as two; `empties`: extents of length zero in between; `noise`: unknown flag bits;
    `unequal`: every other context gets one extent only; `strange`: a context nobody asked for comes first.
    """

    name: str
    most: int | None = None
    over: int = 0
    halves: bool = False
    empties: bool = False
    noise: int = 0
    unequal: bool = False
    strange: bool = False

    def __str__(self) -> str:
        return self.name


MANNERS = [
    Manner("plain"),
    Manner("one extent per reply", most=1),
    Manner("two extents per reply", most=2),
    Manner("beyond what was asked", over=100_000),
    Manner("unmerged", halves=True),
    Manner("unmerged, three per reply", halves=True, most=3),
    Manner("zero lengths", empties=True),
    Manner("unknown flags", noise=0xF0),
    Manner("contexts unequal", unequal=True),
    Manner("a strange context", strange=True),
    Manner("all at once", most=3, over=4096, halves=True, empties=True, noise=0x80, unequal=True, strange=True),
]


@dataclass
class Disk:
    """A disk, byte by byte: allocation flags, and one row of dirty bits for each bitmap."""

    allocation: np.ndarray
    bitmaps: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.allocation)

    def flags(self, context: str) -> np.ndarray:
        return self.allocation if context == ALLOCATION else self.bitmaps[context.removeprefix(DIRTY)]

    def contexts(self) -> list[str]:
        return [ALLOCATION, *(DIRTY + name for name in self.bitmaps)]


def naive_runs(flags: Sequence[int] | np.ndarray, base: int = 0) -> list[tuple[int, int, int]]:
    """Start, end and flags of each run, found one value after the other."""
    found, at = [], base
    for value, run in groupby(np.asarray(flags).tolist()):
        length = len(list(run))
        found.append((at, at + length, int(value)))
        at += length
    return found


def as_list(runs: Runs) -> list[tuple[int, int, int]]:
    """The same of a Runs."""
    return list(zip(runs.starts.tolist(), runs.ends.tolist(), runs.flags.tolist(), strict=True))


class ModelSource:
    """A `plan.BlockStatus` that answers from a Disk directly and notes what it was asked."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.asked: list[tuple[str, int, int]] = []

    @property
    def size(self) -> int:
        return self.disk.size

    def allocation(self, start: int, end: int) -> Runs:
        return self._runs(ALLOCATION, start, end)

    def dirty(self, bitmap: str, start: int, end: int) -> Runs:
        return self._runs(DIRTY + bitmap, start, end)

    def expect_allocation(self, start: int, end: int) -> None:
        """Nothing is got ready: it is asked once only."""

    def expect_dirty(self, bitmap: str, start: int, end: int) -> None:
        """See expect_allocation."""

    def _runs(self, context: str, start: int, end: int) -> Runs:
        self.asked.append((context, start, end))
        rows = naive_runs(self.disk.flags(context)[start:end], start)
        starts = np.array([row[0] for row in rows], dtype=np.int64)
        return Runs.of(starts, end, np.array([row[2] for row in rows], dtype=np.uint32))


class FakeBinding:
    """Stands for the module `nbd`: handles of one server.  `connections` counts those made."""

    SIZE_MINIMUM, SIZE_MAXIMUM = 0, 2

    class Error(Exception):
        """Stands for nbd.Error."""

        @property
        def string(self) -> str:
            return str(self)

    def __init__(
        self,
        disk: Disk,
        manner: Manner,
        *,
        missing: Sequence[str] = (),
        multi_conn: bool = False,
        most_connections: int | None = None,
        reply: Callable[[str, int, int], list[int] | None] | None = None,
    ) -> None:
        self.disk = disk
        self.manner = manner
        self.offered = [context for context in disk.contexts() if context not in missing]
        self.multi_conn = multi_conn
        self.most_connections = most_connections
        self.reply = reply
        self.connections = 0
        self.open = 0
        self.requests: list[tuple[tuple[str, ...], int, int]] = []
        self.ends = socket.socketpair()  # for who looks at a connection's descriptor
        weakref.finalize(self, lambda ends: [end.close() for end in ends], self.ends)

    def NBD(self) -> FakeHandle:  # noqa: N802 - libnbd's name
        return FakeHandle(self)

    def entries(self, context: str, start: int, length: int, *, turn: int) -> list[int] | None:
        """The reply for one context: lengths and flags by turns; None leaves the context out."""
        if self.reply is not None:
            return self.reply(context, start, length)
        manner = self.manner
        rows = [[end - low, flags] for low, end, flags in naive_runs(self.disk.flags(context)[start : start + length])]
        if manner.halves:
            rows = [
                half
                for size, flags in rows
                for half in ([[size // 2, flags], [size - size // 2, flags]] if size > 1 else [[size, flags]])
            ]
        most = 1 if manner.unequal and turn % 2 else manner.most
        if most is not None:
            rows = rows[:most]
        covers = sum(size for size, _ in rows) == length
        if covers and manner.over:
            rows[-1][0] += manner.over
        if manner.empties:
            rows = [row for pair in rows for row in ([0, 3 - pair[1] % 4], pair)]
        return [value for size, flags in rows for value in (size, flags | manner.noise)]


class FakeHandle:
    """Stands for nbd.NBD; only what `backup.nbd.export` uses for block status."""

    def __init__(self, server: FakeBinding) -> None:
        self.server = server
        self.contexts: list[str] = []
        self.opt_mode = self.negotiating = self.waiting = False
        self.cookie = 0

    def set_uri_allow_local_file(self, allow: bool) -> None: ...

    def set_opt_mode(self, enable: bool) -> None:
        self.opt_mode = enable

    def clear_meta_contexts(self) -> None:
        self.contexts = []

    def add_meta_context(self, name: str) -> None:
        self.contexts.append(name)

    def aio_connect_uri(self, uri: str) -> None:
        self.server.connections += 1
        most = self.server.most_connections
        self.waiting = most is not None and self.server.open >= most
        if not self.waiting:
            self.server.open += 1
            self.negotiating = self.opt_mode

    def aio_is_connecting(self) -> bool:
        return self.waiting

    def aio_is_negotiating(self) -> bool:
        return self.negotiating

    def aio_is_ready(self) -> bool:
        return not (self.waiting or self.negotiating)

    def aio_get_fd(self) -> int:
        return self.server.ends[0].fileno()

    def aio_opt_list_meta_context(self, context: Callable[[str], int]) -> None:
        for name in self.server.offered:
            if any(name.startswith(asked) for asked in self.contexts):
                context(name)

    def aio_opt_go(self) -> None:
        self.negotiating = False

    def can_meta_context(self, name: str) -> bool:
        return name in self.contexts and name in self.server.offered

    def can_multi_conn(self) -> bool:
        return self.server.multi_conn

    def is_read_only(self) -> bool:
        return True

    def get_size(self) -> int:
        return self.server.disk.size

    def get_block_size(self, which: int) -> int:
        return 0

    def aio_block_status(self, count: int, offset: int, extent: Callable[[str, int, list[int], Any], int]) -> int:
        assert count > 0
        assert offset >= 0
        assert offset + count <= self.server.disk.size, "asked beyond the end: EINVAL (trap 12)"
        assert count < 1 << 32, "a length of 32 bits (trap 11)"
        served = [context for context in self.contexts if context in self.server.offered]
        self.server.requests.append((tuple(served), offset, count))
        if self.server.manner.strange:
            extent("x-strange:context", offset, [count, 3], None)
        # The last one asked for first: a client must go by name, not by order.
        for turn, context in enumerate(reversed(served)):
            entries = self.server.entries(context, offset, count, turn=turn)
            if entries is not None:
                extent(context, offset, entries, None)
        self.cookie += 1
        return self.cookie

    def aio_command_completed(self, cookie: int) -> bool:
        return True

    def poll(self, timeout: int) -> int:
        return 0

    def aio_in_flight(self) -> int:
        return 0

    def aio_disconnect(self) -> None:
        self.server.open -= 1

    def aio_is_closed(self) -> bool:
        return True

    def aio_is_dead(self) -> bool:
        return False
