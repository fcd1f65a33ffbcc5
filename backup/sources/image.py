"""An image that no machine has open, served by a qemu-nbd that pybackup starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backup.errors import SourceError
from backup.model.disk import Bitmap, DiskState
from backup.model.manifest import LowerFile
from backup.qemu import image_bitmaps, images, locks, programs
from backup.sources.base import ListsBitmaps
from backup.sources.resting import STATUS_CONNECTIONS

if TYPE_CHECKING:
    from backup.nbd.export import Export


@dataclass(frozen=True, slots=True)
class ImageSource(ListsBitmaps):
    """An image that no machine has open.  `format` is "qcow2" or "raw"; None: the image's first bytes tell."""

    path: Path
    format: str | None = None

    def foreign_format(self) -> str | None:
        """Tell another program's format by the image's first bytes, unless the format was given."""
        return None if self.format else images.foreign_format(self.path)

    def guessed_format(self) -> str | None:
        """Tell qcow2 and raw by the image's first bytes, unless the format was given."""
        detected = images.detect_format(self.path)  # also where the format was given: the image must be readable
        return None if self.format else detected

    def inspect(self) -> DiskState:
        """Have qemu-img inspect the image."""
        image_format = self.guessed_format() or self.format or images.RAW
        if image_format == images.QCOW2:
            images.require_not_truncated(self.path)
        info = images.image_info(self.path, image_format)
        if info.encrypted:
            raise SourceError(
                f"{self.path}, or a file below it, is encrypted (LUKS): nothing can be read without the key",
                hint="back up the machine while it runs (--qmp, --allow-plaintext); or store the encrypted file "
                "unchanged, with --image-format raw (`format: raw`)",
            )
        if info.format == images.RAW:
            self._require_raw(info.size)
        return DiskState(
            kind="image",
            path=programs.filename(self.path),
            format=info.format,
            size=info.size,
            bitmaps=tuple(Bitmap(b.name, b.granularity, b.recording, b.inconsistent) for b in info.bitmaps),
            no_bitmaps=info.no_bitmaps,
            unseen_writes=info.unseen_writes,
            lower=tuple(LowerFile(layer.path, layer.size, layer.mtime_ns, layer.inode) for layer in info.lower),
            lower_bitmaps=info.lower_bitmaps,
            data_file=images.external_data_file(info.data_file, programs.filename(self.path), open_in_qemu=False),
        )

    def _require_raw(self, size: int) -> None:
        if size == 0:
            raise SourceError(f"{self.path} is empty", hint="is this the right file? a disk has at least one byte")
        if self.format is None and self.path.suffix == ".qcow2":
            raise SourceError(
                f"{self.path} has no qcow2 header",
                hint="the image is damaged; or, if it is raw, give --image-format raw",
            )

    def why_no_bitmap(self, state: DiskState) -> str | None:
        """A raw image, a qcow2 of version 2 and an image with an untrusted external data file can hold no bitmap."""
        return state.why_untrusted or state.no_bitmaps

    def require_room(self, state: DiskState, name: str) -> None:
        """Make sure that the image's file system has room for one more bitmap."""
        image_bitmaps.require_room(
            self.path, state.size, [bitmap.granularity for bitmap in state.bitmaps if bitmap.granularity], name
        )

    def start_bitmap(self, name: str) -> None:
        """Add a recording, persistent bitmap to the image."""
        image_bitmaps.add_bitmap(self.path, name)

    def remove_bitmap(self, name: str) -> None:
        """Remove a bitmap from the image."""
        image_bitmaps.remove_bitmap(self.path, name)

    def qemu_version(self) -> str | None:
        """The version of qemu-img."""
        return images.qemu_version()

    @contextmanager
    def open_disk(self, state: DiskState, bitmaps: Sequence[str], lanes: int) -> Iterator[Export]:
        """Serve the image with a qemu-nbd of pybackup's; QEMU's locks keep writers out of all its files meanwhile."""
        from backup.nbd.export import Export  # noqa: PLC0415 - brings numpy, which takes long to import
        from backup.qemu import servers  # noqa: PLC0415 - disks of a running machine need none of it

        with (
            locks.no_writers(_files(state)),
            servers.serve_image(
                self.path, state.format, bitmaps, lanes + STATUS_CONNECTIONS, meanwhile=images.qemu_version
            ) as uri,
            Export(uri, bitmaps, state.size) as export,
        ):
            yield export


def _files(state: DiskState) -> list[str]:
    """Return the files that hold the disk's bytes."""
    data = [] if state.data_file is None else [state.data_file.path]
    return [state.path, *data, *(layer.path for layer in state.lower)]
