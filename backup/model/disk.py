"""What a source shows of a disk before a byte of it is read: size, format, bitmaps, and the point each starts from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from backup.model.manifest import POINT_PATTERN, LowerFile

_OWN_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_-]*\.([0-9a-f]{{8}})\.{POINT_PATTERN}")


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap that the source shows.  `granularity` in bytes, None where unknown."""

    name: str
    granularity: int | None = None
    recording: bool = True
    inconsistent: bool = False
    busy: bool = False
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class Sight:
    """
    What a source shows of a disk, taken at one moment.

    `size` is exact, in bytes.  `no_bitmaps` says why it can hold no bitmap, `unseen_writes` why no bitmap would see all
    writes, `volatile` why a bitmap lasts no longer than the running QEMU.  `lower` are the files of its backing chain,
    `lower_bitmaps` the bitmaps in those.  `plaintext`: the image is encrypted, and QEMU decrypts what it shows.
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

    def bitmap(self, name: str) -> Bitmap | None:
        """The bitmap of exactly that name in the source's own image."""
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)


@dataclass(frozen=True, slots=True)
class Claim:
    """The user's word that `bitmap` on someone else's server records since point `since` (None: no word given)."""

    bitmap: str | None
    since: str | None


def bitmap_name(family: str, short_id: str, point: str) -> str:
    """The name of the bitmap that starts at a point."""
    return f"{family}.{short_id}.{point}"


def own_bitmaps(names: Iterable[str], short_id: str, *, keep: str | None) -> list[str]:
    """Names that are this repository's to remove: those of exactly our form, but `keep`."""
    return [name for name in names if name != keep and repository_of(name) == short_id]


def repository_of(name: str) -> str | None:
    """Return the short id of the repository in a bitmap's name of exactly our form; None for any other name."""
    found = _OWN_NAME.fullmatch(name)
    return None if found is None else found[1]
