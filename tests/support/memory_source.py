"""
A machine whose disks lie in this process's memory: a host, its sources and their open disks, without NBD or QEMU.

It keeps to the contracts of `backup.sources.base` and `backup.model.open_disk`, and shows that nothing above them needs
more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from backup.model.disk import Bitmap, DiskState
from backup.model.extents import DIRTY, HOLE, ZERO, Mask, Runs
from backup.sources.base import NO_MACHINE_STATE, Capture, DiskRequest, ListsBitmaps, MachineState, Opened

SECTOR = 512
GRANULARITY = 64 << 10
MOST_READS = 3
EXPORTED = "changes-since-"
"""What precedes a bitmap's name on an open disk: callers must ask by the name that `Opened` gives them."""


class MemoryLane:
    """A lane that answers the latest read first."""

    def __init__(self, content: bytes, largest: int, smallest: int) -> None:
        self._content, self._largest, self._smallest = content, largest, smallest
        self._reads: list[object] = []

    @property
    def in_flight(self) -> int:
        return len(self._reads)

    def submit(self, offset: int, view: memoryview, token: object) -> None:
        assert self.in_flight < MOST_READS
        assert len(view) <= self._largest
        assert offset % self._smallest == 0
        view[:] = self._content[offset : offset + len(view)]
        self._reads.append(token)

    def wait(self, milliseconds: int, enough: int) -> list[object]:
        tokens, self._reads = self._reads[::-1], []
        return tokens


@dataclass
class MemoryDisk:
    """An open disk (`OpenDisk`): its content and its bitmaps at the instant, a dirty bit for each sector."""

    content: bytes
    bitmaps: dict[str, Mask]
    max_request: int = 128 << 10
    smallest_request: int = SECTOR
    max_in_flight: int | None = MOST_READS

    @property
    def size(self) -> int:
        return len(self.content)

    def allocation(self, start: int, end: int) -> Runs:
        data = np.frombuffer(self.content, np.uint8).reshape(-1, SECTOR).any(axis=1)
        return self._runs(np.where(data, 0, HOLE | ZERO), start, end)

    def dirty(self, bitmap: str, start: int, end: int) -> Runs:
        return self._runs(np.where(self.bitmaps[bitmap], DIRTY, 0), start, end)

    def expect_allocation(self, start: int, end: int) -> None:
        """Prepare nothing: the answer is at hand."""

    def expect_dirty(self, bitmap: str, start: int, end: int) -> None:
        """Prepare nothing: the answer is at hand."""

    @contextmanager
    def lanes(self, wanted: int) -> Iterator[list[MemoryLane]]:
        yield [MemoryLane(self.content, self.max_request, self.smallest_request) for _ in range(min(wanted, 2))]

    def _runs(self, sectors: np.ndarray, start: int, end: int) -> Runs:
        first = start // SECTOR
        flags = sectors[first : -(-end // SECTOR)].astype(np.uint32)
        starts = (first + np.arange(len(flags), dtype=np.int64)) * SECTOR
        return Runs.of(starts, end, flags)


class MemorySource(ListsBitmaps):
    """A disk whose bitmaps record what `write` does."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.bitmaps: dict[str, Mask] = {}

    def write(self, offset: int, data: bytes, *, seen: bool = True) -> None:
        """Write whole sectors; `seen` by the bitmaps or not."""
        self.content[offset : offset + len(data)] = data
        for dirty in self.bitmaps.values() if seen else ():
            dirty[offset // SECTOR : (offset + len(data)) // SECTOR] = True

    def foreign_format(self) -> str | None:
        return None

    def guessed_format(self) -> str | None:
        return None

    def inspect(self) -> DiskState:
        bitmaps = tuple(Bitmap(name, GRANULARITY) for name in self.bitmaps)
        return DiskState(kind="memory", path="memory", format="raw", size=len(self.content), bitmaps=bitmaps)

    def why_no_bitmap(self, state: DiskState) -> str | None:
        return None

    def start_bitmap(self, name: str) -> None:
        self.bitmaps[name] = np.zeros(len(self.content) // SECTOR, dtype=np.bool_)

    def remove_bitmap(self, name: str) -> None:
        del self.bitmaps[name]

    def qemu_version(self) -> str | None:
        return None


@dataclass(frozen=True)
class MemoryMoment:
    """An instant that nothing can end."""

    disks: tuple[Opened, ...]
    consistency: str = "crash"
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    machine: MachineState = NO_MACHINE_STATE

    def require_kept(self) -> None:
        """Pass."""

    def require_sound(self) -> None:
        """Pass."""


@dataclass
class MemoryHost:
    """The machine; `opened` are the disks of all instants, in order."""

    sources: Sequence[MemorySource]
    opened: list[MemoryDisk] = field(default_factory=list)
    machine: MachineState = NO_MACHINE_STATE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def discover(self) -> Sequence[tuple[str, MemorySource]]:
        return ()

    def lacks(self, disk: str, path: str) -> bool:
        return False

    def recover(self, owner: object) -> Sequence[str]:
        return ()

    def requests(self) -> tuple[DiskRequest, ...]:
        """The disks, named vd0, vd1 and so on."""
        return tuple(DiskRequest(f"vd{number}", source) for number, source in enumerate(self.sources))

    @contextmanager
    def instant(
        self, captures: Sequence[Capture], lanes: int, *, point: str, repository: Path | None, short_id: str
    ) -> Iterator[MemoryMoment]:
        disks = []
        for source, capture in zip(self.sources, captures, strict=True):
            assert capture.state == source.inspect()
            exported = {EXPORTED + name: dirty.copy() for name, dirty in source.bitmaps.items()}
            disk = MemoryDisk(bytes(source.content), exported)
            if capture.start_bitmap is not None:
                source.start_bitmap(capture.start_bitmap)
            name = None if capture.read_bitmap is None else EXPORTED + capture.read_bitmap
            disks.append(Opened(disk, name, None if capture.start_bitmap is None else GRANULARITY))
            self.opened.append(disk)
        yield MemoryMoment(tuple(disks), machine=self.machine)
