"""The state of a disk before any of its bytes is read: its size, its format, its bitmaps and their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from backup.model.manifest import POINT_PATTERN, DataFileClaim, LowerFile

_OWN_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_-]*\.([0-9a-f]{{8}})\.{POINT_PATTERN}")


@dataclass(frozen=True, slots=True)
class Bitmap:
    """
    A dirty bitmap of a disk.

    `granularity` is the number of bytes that one bit stands for; None: unknown.  `recording`: QEMU records new writes.
    `inconsistent`: QEMU did not store the bitmap properly, and its content is lost.  `busy`: another operation in QEMU
    uses the bitmap.  `persistent`: QEMU stores the bitmap in the image.
    """

    name: str
    granularity: int | None = None
    recording: bool = True
    inconsistent: bool = False
    busy: bool = False
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class ExternalFile:
    """
    The external data file of a qcow2 image, by the path that QEMU opens.

    `file_id` is as in `DataFileClaim`; None: the path leads to no local file or block device, or is not absolute.
    `written`: the file was modified after the image, so something wrote to the file while no QEMU had the image open.
    """

    path: str
    file_id: str | None
    written: bool = field(default=False, compare=False)


_NOT_TRUSTED = "its data lies in an external data file, whose writes no bitmap need see"


@dataclass(frozen=True, slots=True)
class DiskState:
    """
    The state of a disk as its source showed it at one instant.

    `kind`, `path` and `format` are those of `SourceRecord`.  `size` is exact, in bytes.  Three texts give reasons, and
    are None where there is none: `no_bitmaps` why the image can hold no bitmap, `unseen_writes` why a bitmap would miss
    some writes, `volatile` why a bitmap lasts no longer than the running QEMU.

    `data_file` is the image's external data file.  `trusts_data_file`: the user states that nothing writes to this file
    except through the image; `unseen_writes` does not take account of the file.

    `lower` are the files of the backing chain, and `lower_bitmaps` the bitmaps in these files.  `plaintext`: the image
    is encrypted, and QEMU decrypts it.  `shows_encryption`: the source reports whether the image is encrypted.
    `owns_bitmaps`: pybackup adds and removes the disk's bitmaps.  Otherwise the bitmaps belong to an NBD server, and
    the user states from which point one of them records.  `lists_bitmaps`: the source lists every bitmap of the disk.
    Otherwise it knows only those that it was asked for (`Source.expect_bitmaps`).
    """

    kind: str
    path: str
    format: str
    size: int
    bitmaps: tuple[Bitmap, ...] = ()
    no_bitmaps: str | None = None
    unseen_writes: str | None = None
    volatile: str | None = None
    lower: tuple[LowerFile, ...] = ()
    lower_bitmaps: tuple[str, ...] = ()
    plaintext: bool = False
    owns_bitmaps: bool = True
    shows_encryption: bool = True
    lists_bitmaps: bool = True
    data_file: ExternalFile | None = None
    trusts_data_file: bool = field(default=False, compare=False)

    @property
    def why_untrusted(self) -> str | None:
        """Explain why a bitmap of the disk would miss some writes; None: it records all of them."""
        return self.unseen_writes or self._why_untrusted_data_file()

    @property
    def data_file_claim(self) -> DataFileClaim | None:
        """The user's statement about the external data file, as the manifest records it; None: there is none."""
        file = self.data_file
        if file is None or file.file_id is None or not self.trusts_data_file:
            return None
        return DataFileClaim(file.path, file.file_id)

    def _why_untrusted_data_file(self) -> str | None:
        if self.data_file is None:
            return None
        if not self.trusts_data_file:
            return _NOT_TRUSTED
        if self.data_file.file_id is None:
            return (
                f"its external data file {self.data_file.path} is no local file or block device that the image names "
                "by an absolute path"
            )
        return None

    def bitmap(self, name: str) -> Bitmap | None:
        """Return the bitmap of exactly this name in the disk's own image, not in a file below it."""
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)


@dataclass(frozen=True, slots=True)
class Claim:
    """The user's statement that `bitmap` on someone else's server records since point `since` (None: not stated)."""

    bitmap: str | None
    since: str | None


NO_CLAIM = Claim(None, None)


def bitmap_name(bitmap_family: str, short_id: str, point: str) -> str:
    """Return the exact name of the bitmap that starts at a point: FAMILY.SHORT_ID.POINT."""
    return f"{bitmap_family}.{short_id}.{point}"


def own_bitmaps(names: Iterable[str], short_id: str, *, keep: str | None) -> list[str]:
    """Return the bitmaps that this repository may remove: pybackup's names with its short id, but not `keep`."""
    return [name for name in names if name != keep and repository_of(name) == short_id]


def repository_of(name: str) -> str | None:
    """Return the short id of the repository in a bitmap's name of pybackup's form; None for any other name."""
    match = _OWN_NAME.fullmatch(name)
    return None if match is None else match[1]
