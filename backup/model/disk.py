"""The state of a disk before a byte of it is read: its size, its format, its bitmaps and their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from backup.model.manifest import POINT_PATTERN, LowerFile

_OWN_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_-]*\.([0-9a-f]{{8}})\.{POINT_PATTERN}")


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap of a disk.  `granularity` is in bytes; None: unknown."""

    name: str
    granularity: int | None = None
    recording: bool = True
    inconsistent: bool = False
    busy: bool = False
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class DiskState:
    """
    The state of a disk as its source showed it at one moment.

    `size` is exact, in bytes.  `no_bitmaps` says why the image can hold no bitmap, `unseen_writes` why a bitmap would
    miss some writes, `volatile` why a bitmap lasts no longer than the running QEMU.  `lower` are the files of the
    backing chain, `lower_bitmaps` the bitmaps in those.  `plaintext`: the image is encrypted, and QEMU decrypts it.
    `owns_bitmaps`: pybackup adds and removes the disk's bitmaps; else they are a server's, and the user's word says
    from which point one records.  `shows_encryption`: the source tells whether the image is encrypted.
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

    def bitmap(self, name: str) -> Bitmap | None:
        """Return the bitmap of exactly this name in the disk's own image, not in a file below it."""
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)


@dataclass(frozen=True, slots=True)
class Claim:
    """The user's word that `bitmap` on someone else's server records since point `since` (None: no word given)."""

    bitmap: str | None
    since: str | None


NO_CLAIM = Claim(None, None)


def bitmap_name(bitmap_family: str, short_id: str, point: str) -> str:
    """Return the exact name of the bitmap that starts at a point."""
    return f"{bitmap_family}.{short_id}.{point}"


def own_bitmaps(names: Iterable[str], short_id: str, *, keep: str | None) -> list[str]:
    """Return the bitmaps that this repository may remove: pybackup's names with its short id, but not `keep`."""
    return [name for name in names if name != keep and repository_of(name) == short_id]


def repository_of(name: str) -> str | None:
    """Return the short id of the repository in a bitmap's name of exactly our form; None for any other name."""
    match = _OWN_NAME.fullmatch(name)
    return None if match is None else match[1]
