"""
A machine whose disks nobody writes to: images of a machine that is off, and exports of someone else's NBD server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

from backup.errors import SourceError
from backup.model.disk import DiskState
from backup.model.open_disk import OpenDisk
from backup.qemu import image_bitmaps, images
from backup.sources.base import NO_MACHINE_STATE, Capture, MachineState, Moved, NotStarted, Opened, Owner, Source

STATUS_CONNECTIONS = 4
"""Connections beside the copier's: one to begin with, and one for each context (allocation, two bitmaps)."""


class RestingSource(Source, Protocol):
    """A disk that is opened independently of the machine's other disks."""

    def require_room(self, state: DiskState, name: str) -> None:
        """
        Make sure that the disk's storage has room for one more bitmap.

        Raises
        ------
        BitmapRefused
            The storage has no room; nothing was changed.
        """

    def start_bitmap(self, name: str) -> None:
        """
        Add a recording bitmap.

        Raises
        ------
        BitmapRefused
            The bitmap does not record, and QEMU may have lost the image's other bitmaps.
        """

    def open_disk(self, state: DiskState, bitmaps: Sequence[str], lanes: int) -> AbstractContextManager[OpenDisk]:
        """
        Open the disk for reading, so that `bitmaps` can be asked about; keep writers out where that is pybackup's duty.

        Raises
        ------
        SourceError
            The disk cannot be opened.
        """


@dataclass(frozen=True, slots=True)
class LockedMoment:
    """Images whose locks pybackup holds, and exports from which their owner keeps writers away."""

    disks: tuple[Opened, ...]
    consistency: str = "crash"
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    machine: MachineState = NO_MACHINE_STATE
    """Images and exports tell nothing of a machine."""

    def require_kept(self) -> None:
        """Always passes: the image locks are held until the end of the block."""

    def require_sound(self) -> None:
        """Always passes: the image locks keep every writer out until the end of the block."""


class AtRest:
    """
    A host of disks that nobody writes to: each is opened independently, and the instant is when all are locked.

    Parameters
    ----------
    sources : sequence of RestingSource
        The machine's disks.
    """

    def __init__(self, sources: Sequence[RestingSource]) -> None:
        self.sources = tuple(sources)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def discover(self) -> Sequence[tuple[str, Source]]:
        """Return nothing: the user names every image and every export."""
        return ()

    def lacks(self, disk: str, path: str) -> bool:
        """Return false: the user names every disk."""
        del disk, path
        return False

    def recover(self, owner: Owner) -> Sequence[str]:
        """Return nothing: a run that was cut off leaves only bitmaps, which go when the next point is published."""
        del owner
        return ()

    @contextmanager
    def instant(
        self, captures: Sequence[Capture], lanes: int, *, point: str, repository: Path | None, short_id: str
    ) -> Iterator[LockedMoment]:
        """
        Start the bitmaps, and only then lock the images.

        Raises
        ------
        Moved
            A machine started, wrote and stopped in between: a new bitmap is not clean, or an image has changed.
        NotStarted
            A bitmap cannot be started.
        """
        del point, repository, short_id
        for number, (source, capture) in enumerate(zip(self.sources, captures, strict=True)):
            if capture.start_bitmap is not None:
                _start(number, source, capture.state, capture.start_bitmap)
        with ExitStack() as locks:
            disks = []
            for number, (source, capture) in enumerate(zip(self.sources, captures, strict=True)):
                bitmaps = [name for name in (capture.read_bitmap, capture.start_bitmap) if name is not None]
                try:
                    disks.append(locks.enter_context(source.open_disk(capture.state, bitmaps, lanes)))
                except images.ImageLocked:
                    raise
                except SourceError as error:
                    if capture.start_bitmap is not None:
                        _require_recording(number, source, capture.start_bitmap, error)
                    raise
            yield LockedMoment(tuple(map(_settled, self.sources, captures, disks)))


def _start(number: int, source: RestingSource, state: DiskState, name: str) -> None:
    try:
        source.require_room(state, name)
        source.start_bitmap(name)
    except image_bitmaps.BitmapRefused as refused:
        raise NotStarted(number, refused, refused.why, lasting=refused.lasting) from None


def _require_recording(number: int, source: RestingSource, name: str, error: SourceError) -> None:
    """
    Explain an image that cannot be served: where its new bitmap is gone, the reason is that QEMU lost the bitmap.

    Raises
    ------
    NotStarted
        QEMU did not keep the bitmap, without a word.
    """
    bitmap = source.inspect().bitmap(name)
    if bitmap is None or bitmap.inconsistent or not bitmap.recording:
        raise NotStarted(number, error, "QEMU did not keep it in the image", lasting=False) from None


def _settled(source: RestingSource, capture: Capture, disk: OpenDisk) -> Opened:
    """Require, under the lock, that the disk is still as it was inspected and that its new bitmap is wholly clean."""
    if not capture.state.owns_bitmaps:
        return Opened(disk, capture.read_bitmap)
    now = source.inspect()
    before = replace(now, bitmaps=tuple(bitmap for bitmap in now.bitmaps if bitmap.name != capture.start_bitmap))
    started = None if capture.start_bitmap is None else now.bitmap(capture.start_bitmap)
    if before != capture.state or (capture.start_bitmap is not None and started is None):
        raise Moved(f"{capture.state.path} changed before it was locked")
    if started is None:
        return Opened(disk, capture.read_bitmap)
    from backup.planning import plan  # noqa: PLC0415 - brings numpy, which takes long to import

    if plan.any_dirty(disk, started.name):
        raise Moved(f"{capture.state.path} was written to before it was locked")
    return Opened(disk, capture.read_bitmap, started.granularity)
