"""Persistent dirty bitmaps in images that no QEMU has open: add one, remove one, check that there is room for one."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from backup.errors import SourceError
from backup.qemu.images import QCOW2, ImageLocked, image_error, image_info, retry_while_locked
from backup.qemu.programs import ProgramFailed, filename, one_line, run_to_end
from backup.runtime.shortage import free_bytes_for_us

_UNWRITABLE = tuple(map(os.strerror, (errno.EROFS, errno.EACCES, errno.EPERM)))
"""Reasons of QEMU that mean that the image is read-only."""
_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
"""Reasons of QEMU that mean that the storage is full."""
_LONGEST_REASON = 500
"""Characters of a reason that the manifest keeps."""
_NO_ROOM = "the image's storage has no room for it"
_DIRECTORY_ENTRY = 24 + 1024
"""Longest entry (bytes) of a bitmap in the image's bitmap directory (docs/interop/qcow2.txt)."""


class BitmapRefused(SourceError):
    """
    QEMU could not start a new bitmap in an image; `why` is the reason.

    `lasting` is true if the reason is a property of the image (read-only), so that later attempts will fail as well.
    """

    def __init__(self, path: Path | str, name: str, why: str, *, lasting: bool = False) -> None:
        super().__init__(
            f"bitmap {name} cannot be started in {path}: {why}",
            hint="the backup works without a bitmap, but reads the whole disk",
        )
        self.why = why
        self.lasting = lasting


def add_bitmap(path: Path, name: str) -> None:
    """
    Add an enabled, persistent bitmap.  QEMU opens the image for writing for a moment.

    If QEMU loses the new bitmap while it closes the image, qemu-img only prints a complaint and exits with 0, and all
    older bitmaps are inconsistent.  So after any complaint the bitmap is looked for in the image.

    Raises
    ------
    ImageLocked
        Another program uses the image.
    BitmapRefused
        The bitmap was not added.
    """
    complaints = _change_bitmaps("--add", path, name)
    if complaints and not _records(path, name):
        raise _refusal(path, name, complaints)


def remove_bitmap(path: Path, name: str) -> None:
    """
    Remove a bitmap, which may be inconsistent.

    Raises
    ------
    ImageLocked
        Another program uses the image.
    SourceError
        QEMU refused, or lost other bitmaps.
    """
    complaints = _change_bitmaps("--remove", path, name)
    if complaints:
        raise SourceError(
            f"QEMU complained while it removed bitmap {name}: {one_line(complaints)}",
            hint=f"see: qemu-img info {path}",
        )


def require_room(path: Path, size: int, granularities: Sequence[int], name: str) -> None:
    """
    Make sure that the storage of an image file has room for one more bitmap, before QEMU opens the image for writing.

    When QEMU closes an image, it writes all bitmaps anew beside their old copies.  Without room for that, QEMU loses
    all of them, so that an attempt would destroy the existing bitmaps.  Block devices are not checked, since the free
    space of their storage is unknown.

    Parameters
    ----------
    size : int
        Size of the disk in bytes.
    granularities : sequence of int
        Granularities (bytes) of the existing bitmaps.

    Raises
    ------
    BitmapRefused
        The file system has too little free space.
    """
    if not path.is_file():
        return
    try:
        with open(path, "rb") as file:
            read_only = os.fstatvfs(file.fileno()).f_flag & os.ST_RDONLY
            free = free_bytes_for_us(file.fileno())
            cluster = 1 << int.from_bytes(file.read(24)[20:24], "big")
    except OSError:
        return  # QEMU's own message will be more exact
    if read_only:
        return  # QEMU will report this reason, which is the true one even if the file system is full as well
    needed = _bitmaps_room(size, [*granularities, max(cluster, 4096)], cluster)
    if free is not None and free < needed:
        raise BitmapRefused(path, name, f"{_NO_ROOM} ({free} bytes are free, and QEMU may need {needed})")


def _records(path: Path, name: str) -> bool:
    """Tell whether the image has a bitmap of this name that records and is consistent."""
    return any(
        bitmap.name == name and bitmap.recording and not bitmap.inconsistent
        for bitmap in image_info(path, QCOW2).bitmaps
    )


def _bitmaps_room(size: int, granularities: Sequence[int], cluster: int) -> int:
    """Return how many bytes the bitmaps of a disk take at most: their bits, their tables, and the bitmap directory."""

    def clusters(length: int) -> int:
        return -(-length // cluster)

    bits = [clusters(-(-size // (8 * granularity))) for granularity in granularities]
    directory = clusters(_DIRECTORY_ENTRY * len(granularities))
    refcounts = 2
    return cluster * (sum(count + clusters(8 * count) for count in bits) + directory + refcounts)


def _change_bitmaps(action: str, path: Path, name: str) -> str:
    """Add or remove a bitmap; return what qemu-img printed on standard error although it exited with 0."""

    def attempt() -> str:
        try:
            return run_to_end(["qemu-img", "bitmap", action, "-f", QCOW2, filename(path), name]).stderr
        except ProgramFailed as error:
            meaning = image_error(path, error.stderr)
            if action != "--add" or isinstance(meaning, ImageLocked):
                raise meaning from None
            raise _refusal(path, name, error.stderr) from None

    return retry_while_locked(attempt)


def _refusal(path: Path, name: str, complaints: str) -> BitmapRefused:
    """Return the error for a bitmap that was not added; the same reason has the same words every night."""
    text = one_line(complaints).removeprefix("qemu-img: ")[:_LONGEST_REASON]
    of_system = next((why for why in (*_UNWRITABLE, *_FULL) if why in text), None)
    if of_system in _UNWRITABLE:
        return BitmapRefused(path, name, f"the image cannot be opened for writing ({of_system})", lasting=True)
    return BitmapRefused(path, name, f"{_NO_ROOM} ({of_system})" if of_system else text)
