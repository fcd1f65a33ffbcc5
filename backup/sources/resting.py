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

from backup.errors import SourceError, UsageError
from backup.model.manifest import LowerFile
from backup.model.names import without_password
from backup.nbd.export import Export
from backup.planning import plan
from backup.planning.decision import Bitmap, Sight
from backup.qemu import images, locks, programs, servers
from backup.sources.base import Moved, NotStarted, Opened, Owner, Source, Wish

_STATUS_CONNECTIONS = 4
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


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image that no machine has open.  `format` is "qcow2", "raw", or None to tell by its first bytes."""

    path: Path
    format: str | None = None

    @property
    def owns_bitmaps(self) -> bool:
        """Yes."""
        return True

    def foreign_format(self) -> str | None:
        """Another program's, unless the format was given."""
        return None if self.format else images.foreign_format(self.path)

    def guessed_format(self) -> str | None:
        """Qcow2 or raw, unless the format was given."""
        found = images.detect_format(self.path)
        return None if self.format else found

    def look(self) -> Sight:
        """Ask qemu-img."""
        image_format = self.guessed_format() or self.format or images.RAW
        if image_format == images.QCOW2:
            images.require_whole(self.path)
        info = images.image_info(self.path, image_format)
        if info.encrypted:
            raise SourceError(
                f"{self.path} is encrypted (LUKS), or a file below it is: nothing can be read without the key",
                hint="back up the machine while it runs (--qmp, --allow-plaintext); or store the encrypted file as it "
                "is, with --image-format raw (`format: raw`)",
            )
        if info.format == images.RAW:
            self._require_raw(info.size)
        return Sight(
            kind="image",
            path=programs.filename(self.path),
            format=info.format,
            size=info.size,
            bitmaps=tuple(Bitmap(b.name, b.granularity, b.recording, b.inconsistent) for b in info.bitmaps),
            no_bitmaps=info.no_bitmaps,
            unseen_writes=info.unseen_writes,
            lower=tuple(LowerFile(layer.path, layer.size, layer.mtime_ns, layer.inode) for layer in info.lower),
            lower_bitmaps=info.lower_bitmaps,
        )

    def _require_raw(self, size: int) -> None:
        if size == 0:
            raise SourceError(f"{self.path} is empty", hint="is it the right file? a disk has at least one byte")
        if self.format is None and self.path.suffix == ".qcow2":
            raise SourceError(
                f"{self.path} has no qcow2 header", hint="it is damaged, or raw: then say so with --image-format raw"
            )

    def why_no_bitmap(self, sight: Sight) -> str | None:
        """A raw image, a version 2 qcow2 and an image with an external data file get none."""
        return sight.unseen_writes or sight.no_bitmaps

    def require_room(self, sight: Sight, name: str) -> None:
        """A file needs free space on its file system."""
        images.require_room(
            self.path, sight.size, [bitmap.granularity for bitmap in sight.bitmaps if bitmap.granularity], name
        )

    def start_bitmap(self, name: str) -> None:
        """Add a recording, persistent bitmap."""
        images.add_bitmap(self.path, name)

    def remove_bitmap(self, name: str) -> None:
        """Remove a bitmap."""
        images.remove_bitmap(self.path, name)

    def qemu_version(self) -> str | None:
        """Version of qemu-img."""
        return images.qemu_version()

    @contextmanager
    def opened(self, sight: Sight, bitmaps: Sequence[str], lanes: int) -> Iterator[Export]:
        """Serve it with qemu-nbd; QEMU's locks keep writers out of all its files until it is closed."""
        with (
            locks.no_writers([sight.path, *(layer.path for layer in sight.lower)]),
            servers.served(
                self.path, sight.format, bitmaps, lanes + _STATUS_CONNECTIONS, meanwhile=images.qemu_version
            ) as uri,
            Export(uri, bitmaps, sight.size) as export,
        ):
            yield export


class NbdSource:
    """
    An export of someone's NBD server.  `bitmap` is the exact name of one of its dirty bitmaps, or None.

    The connection stays open from the first look to the end: a qemu-nbd without -t ends with its last client.
    """

    def __init__(self, uri: str, bitmap: str | None = None) -> None:
        self.uri = without_password(uri)
        self._address = uri
        self.bitmap = bitmap
        self._export: Export | None = None

    @property
    def owns_bitmaps(self) -> bool:
        """No: they are their owner's."""
        return False

    def foreign_format(self) -> str | None:
        """None: a server shows bytes, whatever it has them from."""
        return None

    def guessed_format(self) -> str | None:
        """None, as of a foreign one."""
        return None

    def look(self) -> Sight:
        """Ask the server."""
        export = self._connected()
        if export.size == 0:
            raise SourceError(f"{self.uri} is empty", hint="is it the right export? a disk has at least one byte")
        shown = (Bitmap(self.bitmap),) if self.bitmap and export.has_bitmap(self.bitmap) else ()
        return Sight(kind="nbd", path=self.uri, format="raw", size=export.size, bitmaps=shown)

    def why_no_bitmap(self, sight: Sight) -> str | None:
        """Its bitmaps are its owner's."""
        return f"the bitmaps of {sight.path} are its owner's to add and remove"

    def require_room(self, sight: Sight, name: str) -> None:
        """Never asked: see owns_bitmaps."""

    def start_bitmap(self, name: str) -> None:
        """Never: see owns_bitmaps."""
        raise UsageError(f"bitmap {name} cannot be added through {self.uri}", hint="name the image itself with --image")

    def remove_bitmap(self, name: str) -> None:
        """Never: see owns_bitmaps."""
        raise UsageError(
            f"bitmap {name} cannot be removed through {self.uri}", hint="name the image itself with --image"
        )

    def qemu_version(self) -> str | None:
        """The server does not say what it is."""
        return None

    @contextmanager
    def opened(self, sight: Sight, bitmaps: Sequence[str], lanes: int) -> Iterator[Export]:
        """The connection that there is; keeping writers out is the owner's duty."""
        del sight, bitmaps, lanes
        try:
            yield self._connected()
        finally:
            self.close()

    def close(self) -> None:
        """End the connection."""
        if self._export is not None:
            self._export.close()
            self._export = None

    def _connected(self) -> Export:
        if self._export is None:
            self._export = Export(self._address, [self.bitmap] if self.bitmap else [])
        return self._export
