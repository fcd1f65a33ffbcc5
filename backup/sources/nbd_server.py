"""An export of someone else's NBD server, which is only read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from backup.errors import SourceError, UsageError
from backup.model.disk import Bitmap, DiskState
from backup.model.manifest import NBD
from backup.model.names import without_password
from backup.sources.base import ListsBitmaps

if TYPE_CHECKING:
    from backup.nbd.export import Export


class NbdSource(ListsBitmaps):
    """
    An export of someone else's NBD server.  `bitmap` is the exact name of one of its dirty bitmaps, or None.

    The connection stays open from the first inspection to the end: a qemu-nbd without -t ends with its last client.
    """

    def __init__(self, uri: str, bitmap: str | None = None) -> None:
        self.uri = without_password(uri)
        self._address = uri
        self.bitmap = bitmap
        self._export: Export | None = None

    def foreign_format(self) -> str | None:
        """Return None: a server shows the disk's bytes, whatever image they come from."""
        return None

    def guessed_format(self) -> str | None:
        """Return None: a server shows the disk's bytes, whatever image they come from."""
        return None

    def inspect(self) -> DiskState:
        """Ask the server for the disk's size and for the bitmap."""
        export = self._connected()
        if export.size == 0:
            raise SourceError(f"{self.uri} is empty", hint="is this the right export? a disk has at least one byte")
        shown = (Bitmap(self.bitmap),) if self.bitmap and export.has_bitmap(self.bitmap) else ()
        return DiskState(
            kind=NBD,
            path=self.uri,
            format="raw",
            size=export.size,
            bitmaps=shown,
            owns_bitmaps=False,
            shows_encryption=False,
        )

    def why_no_bitmap(self, state: DiskState) -> str | None:
        """Refuse every bitmap: a server's bitmaps are its owner's."""
        return f"the bitmaps of {state.path} are its owner's to add and remove"

    def require_room(self, state: DiskState, name: str) -> None:
        """Pass: `start_bitmap` refuses every bitmap."""

    def start_bitmap(self, name: str) -> None:
        """Refuse: a server's bitmaps are its owner's."""
        raise UsageError(f"bitmap {name} cannot be added through {self.uri}", hint="name the image itself with --image")

    def remove_bitmap(self, name: str) -> None:
        """Refuse: a server's bitmaps are its owner's."""
        raise UsageError(
            f"bitmap {name} cannot be removed through {self.uri}", hint="name the image itself with --image"
        )

    def qemu_version(self) -> str | None:
        """Return None: a server does not say which program it is."""
        return None

    @contextmanager
    def open_disk(self, state: DiskState, bitmaps: Sequence[str], lanes: int) -> Iterator[Export]:
        """Use the connection of `inspect`; keeping writers out is the server's owner's duty."""
        del state, bitmaps, lanes
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
        from backup.nbd.export import Export  # noqa: PLC0415 - brings numpy, which takes long to import

        if self._export is None:
            self._export = Export(self._address, [self.bitmap] if self.bitmap else [])
        return self._export
