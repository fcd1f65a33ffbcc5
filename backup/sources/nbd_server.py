"""An export of somebody else's NBD server: only read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from backup.errors import SourceError, UsageError
from backup.model.disk import Bitmap, Sight
from backup.model.names import without_password
from backup.nbd.export import Export


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
