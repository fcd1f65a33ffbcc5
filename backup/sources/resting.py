"""
Disks at rest: an offline image is served by a qemu-nbd of our own, read-only, and its bitmaps are ours to add and
remove.  A server reached by an NBD URI is someone else's: it is only read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

from backup.errors import SourceError
from backup.model.disk import Sight
from backup.nbd.export import Export
from backup.planning import plan
from backup.qemu import images
from backup.sources.base import Moved, NotStarted, Opened, Owner, Source, Wish

STATUS_CONNECTIONS = 4
"""Connections beside the copier's: one to begin with, and one for each context (allocation, two bitmaps)."""


class RestingSource(Source, Protocol):
    """A disk that is opened by itself."""

    def require_room(self, sight: Sight, name: str) -> None:
        """
        Make sure that the disk's storage has room for one more bitmap.

        Raises
        ------
        BitmapRefused
            It has not; nothing was changed.
        """

    def start_bitmap(self, name: str) -> None:
        """
        Add a recording bitmap.

        Raises
        ------
        BitmapRefused
            It does not record; QEMU may have lost those that were there.
        """

    def opened(self, sight: Sight, bitmaps: Sequence[str], lanes: int) -> AbstractContextManager[Export]:
        """Open it for reading, writers kept out where that is ours to do; `bitmaps` can be asked about."""


@dataclass(frozen=True, slots=True)
class LockedMoment:
    """Images whose locks are held, and exports whose owner keeps writers out."""

    disks: tuple[Opened, ...]
    consistency: str = "crash"
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def require_kept(self) -> None:
        """It is: locks are."""

    def require_sound(self) -> None:
        """It is: nobody could write meanwhile."""


class AtRest:
    """
    A host of disks that nobody writes to: each is opened by itself, and the instant is when all are locked.

    Parameters
    ----------
    sources : sequence of RestingSource
        The machine's disks.
    """

    def __init__(self, sources: Sequence[RestingSource]) -> None:
        self._sources = tuple(sources)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def found(self) -> Sequence[tuple[str, Source]]:
        """None: images and exports are always named."""
        return ()

    def recover(self, owner: Owner) -> Sequence[str]:
        """Nothing stays behind but bitmaps, which are retired when the next point is published."""
        del owner
        return ()

    @contextmanager
    def instant(
        self, wishes: Sequence[Wish], lanes: int, *, point: str, repository: Path | None, short_id: str
    ) -> Iterator[LockedMoment]:
        """
        Start the bitmaps, and only then lock the images.

        Raises
        ------
        Moved
            A machine started, wrote and stopped in between: a new bitmap is not clean, or an image looks another.
        NotStarted
            A bitmap cannot be started.
        """
        del point, repository, short_id
        for number, (source, wish) in enumerate(zip(self._sources, wishes, strict=True)):
            if wish.start is not None:
                _start(number, source, wish.sight, wish.start)
        with ExitStack() as held:
            opened = []
            for number, (source, wish) in enumerate(zip(self._sources, wishes, strict=True)):
                asked = [name for name in (wish.read, wish.start) if name is not None]
                try:
                    opened.append(held.enter_context(source.opened(wish.sight, asked, lanes)))
                except images.ImageLocked:
                    raise
                except SourceError as error:
                    if wish.start is not None:
                        _require_recording(number, source, wish.start, error)
                    raise
            yield LockedMoment(tuple(map(_settled, self._sources, wishes, opened)))


def _start(number: int, source: RestingSource, sight: Sight, name: str) -> None:
    try:
        source.require_room(sight, name)
        source.start_bitmap(name)
    except images.BitmapRefused as refused:
        raise NotStarted(number, refused, refused.why, lasting=refused.lasting) from None


def _require_recording(number: int, source: RestingSource, name: str, error: SourceError) -> None:
    """An image whose new bitmap QEMU lost without a word cannot be served with it: then that is the reason."""
    found = source.look().bitmap(name)
    if found is None or found.inconsistent or not found.recording:
        raise NotStarted(number, error, "QEMU did not keep it in the image", lasting=False) from None


def _settled(source: RestingSource, wish: Wish, export: Export) -> Opened:
    """Under the lock: all must be as it was when it was looked at, and the new bitmap wholly clean."""
    if not source.owns_bitmaps:
        return Opened(export)
    now = source.look()
    before = replace(now, bitmaps=tuple(bitmap for bitmap in now.bitmaps if bitmap.name != wish.start))
    started = None if wish.start is None else now.bitmap(wish.start)
    if before != wish.sight or (wish.start is not None and started is None):
        raise Moved(f"{wish.sight.path} changed before it was locked")
    if started is None:
        return Opened(export)
    if plan.any_dirty(export, started.name):
        raise Moved(f"{wish.sight.path} was written to before it was locked")
    return Opened(export, started.granularity)
