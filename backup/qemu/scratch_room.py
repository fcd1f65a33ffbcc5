"""Room for what the guest overwrites while its disks are read: the scratch folders, and what must stay free there."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backup.errors import SourceError, os_errors_as
from backup.runtime.shortage import free_bytes
from backup.units import show_size

_NAME_ONE = "name one with --scratch (`scratch:` in the configuration)"
_NAME_ANOTHER = "name another folder with --scratch (`scratch:` in the configuration)"


@dataclass(frozen=True, slots=True)
class Room:
    """
    Bytes that must stay free on scratch file systems, and the folder of the repository, which may be on one of them.
    """

    reserve: int
    repository: Path | None

    def require(self, folder: Path, writes: int) -> None:
        """
        Make sure that a scratch folder has enough free space; the backup writes `writes` bytes to the repository.

        Raises
        ------
        SourceError
            The folder has too little free space, or cannot be used.
        """
        with os_errors_as(f"the scratch folder {folder} cannot be used", hint=_NAME_ANOTHER, kind=SourceError):
            free, device = free_bytes(folder), os.stat(folder).st_dev
        shared = self.repository is not None and _device(self.repository) == device
        if free < self.reserve + (writes if shared else 0):
            also = f", and the backup writes up to {show_size(writes)} to the same file system" if shared else ""
            raise SourceError(
                f"the scratch folder {folder} has {show_size(free)} free; {show_size(self.reserve)} must stay "
                f"free{also}",
                hint="what the guest overwrites during the backup needs room there: free some space, name another "
                "folder with --scratch, or lower `scratch_reserve`",
            )


def _device(folder: Path) -> int | None:
    """
    Return the device of a folder's file system; for a folder that does not exist yet, of its first existing parent.
    """
    for path in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return os.stat(path).st_dev
    return None


def ran_out(folder: Path, free: int) -> SourceError:
    """Return the error for a scratch folder with too little space (`free` bytes) while the guest writes."""
    return SourceError(
        f"the scratch folder {folder} ran out of space ({show_size(free)} left) while the guest wrote; "
        "the backup was stopped, and the guest continues",
        hint="free some space, name another folder with --scratch, or back up when the guest writes less",
    )


def folder_of(image: str) -> Path:
    """
    Return the folder of an image, in which scratch files can be made.

    Raises
    ------
    SourceError
        The image is no local file.
    """
    folder = os.path.dirname(image)
    # The folder of a block device is /dev, which lies in memory.
    if not image.startswith("/") or not os.path.isdir(folder) or Path(image).is_block_device():
        raise SourceError(
            f"no scratch folder is named, and {image} is no local file whose folder could be used", hint=_NAME_ONE
        )
    return Path(folder)
