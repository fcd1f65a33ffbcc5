"""A check, before the first byte is written, whether the files of a restore will fit."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

from backup.engine.targets import is_device, is_uri
from backup.errors import Damaged, Failed, NotFound
from backup.model.extents import windows
from backup.model.manifest import Manifest
from backup.operations.restore_targets import Place
from backup.repository import data_file
from backup.repository.machine import Machine
from backup.repository.opened_chain import open_chain
from backup.runtime.shortage import free_bytes_for_us
from backup.units import show_size

_WINDOW = 1 << 20
"""The number of clusters that are counted at once."""
_COMPRESSING = {0x9123683E, 0x2FC12FC1, 0xCA451A4E, 0xF2F52010}
"""btrfs, ZFS, bcachefs and F2FS by statfs(2)'s f_type; they may compress, so that more data fits than is free."""


def require(machine: Machine, point: Manifest, places: Sequence[Place]) -> None:
    """
    Refuse to restore to files if their file system has less free space than the disks hold data.

    The data is counted only if the full sizes do not fit.  A chain that cannot be read is no error here; the restore
    reports it.

    Raises
    ------
    Failed
        There is too little free space.
    """
    files = [place for place in places if not is_uri(place.target) and not is_device(Path(place.target))]
    if not files:
        return
    sizes = {disk.name: disk.size for disk in point.disks}
    folder = _existing(Path(os.path.realpath(files[0].target)).parent)
    free = _free(folder)
    if free is None or sum(sizes[place.disk] for place in files) <= free or _compresses(folder):
        return
    try:
        needed = sum(_data_bytes(machine, point, place.disk) for place in files)
    except (Damaged, NotFound):
        return
    if needed > free:
        raise Failed(
            f"{folder} has {show_size(free)} free, and the data of the restore needs {show_size(needed)}",
            hint="name another target, or free space there; nothing was written",
        )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if os.path.isdir(path))


def _free(folder: Path) -> int | None:
    """Return the bytes that this user may still write there, or None if the file system does not tell."""
    try:
        return free_bytes_for_us(folder)
    except OSError:
        return None


def _compresses(folder: Path) -> bool:
    """Tell whether files may take less space than they have bytes; True if the file system cannot be examined."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_long * 32)()
    if libc.statfs(os.fsencode(folder), ctypes.byref(buffer)):
        return True
    return buffer[0] & 0xFFFFFFFF in _COMPRESSING


def _data_bytes(machine: Machine, point: Manifest, disk: str) -> int:
    """Count the bytes of the clusters that hold data, from the tables of the chain alone."""
    with open_chain(machine, point.point, disk, lambda chain: data_file.peeked(machine.files, chain)) as (chain, index):
        size = chain.cluster_size
        counts = (
            int(index.holds_data(start // size, -(-(end - start) // size)).sum())
            for start, end in windows(0, chain.size, _WINDOW * size)
        )
        return min(sum(counts) * size, chain.size)
