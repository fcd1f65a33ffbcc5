"""
Which disk of a point goes where, and in which format: what a restore's TARGET means.

    a folder, or a name that ends in /     DISK.raw or DISK.qcow2 in it, for one disk or ten
    several disks, and nothing there yet   the same, in a new folder of that name
    -                                      standard output
    anything else                          the one disk: a file, a block device or an NBD URI
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from backup.engine.block_devices import real_places
from backup.engine.targets import is_device, is_uri, refuse_existing
from backup.errors import Failed, NotFound, UsageError
from backup.model.manifest import Manifest
from backup.model.names import MARKER
from backup.qemu.images import QCOW2, RAW
from backup.repository.machine import Machine

STDOUT = "-"
_SUFFIXES = {".qcow2": QCOW2, ".raw": RAW}
"""What the end of a file's name says of its format."""
_OF_FILES = (*_SUFFIXES, ".img")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one disk goes."""

    disk: str
    target: str
    format: str


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a point's disks go; `folder` is the one that holds them, which need not exist yet; None: no folder."""

    places: tuple[Place, ...]
    folder: Path | None
    warnings: tuple[str, ...]


def place(
    machine: Machine, point: Manifest, target: str, disk: str | None, image_format: str | None, *, force: bool
) -> Placed:
    """
    Decide where the disks of a machine's point go; nothing is made.

    Raises
    ------
    NotFound
        The point does not hold the disk.
    UsageError
        The target does not fit, exists and --force was not given, or lies in a repository.
    """
    names = _disks(point, disk)
    if not target:
        raise UsageError("TARGET is empty", hint="name a file, a folder, a block device, an NBD URI, or -")
    if target != STDOUT and not is_uri(target):
        _refuse_repository(machine, target)
    if _is_folder(target, len(names)):
        base = target.rstrip("/") or "/"
        made = image_format or RAW
        places = tuple(Place(name, os.path.join(base, f"{name}.{made}"), made) for name in names)
        for each in places:
            refuse_existing(Path(each.target), force=force)
        return Placed(places, Path(base), ())
    if len(names) > 1 and target == STDOUT:
        raise UsageError(
            f"point {point.point} holds several disks, and standard output takes one",
            hint=f"name it: --disk {' or '.join(names)}",
        )
    if len(names) > 1:
        raise UsageError(
            f"{target} is no folder, and point {point.point} holds several disks",
            hint=f"name a folder ({target.rstrip('/')}/ is one), or one disk: --disk {' or '.join(names)}",
        )
    suffix = _SUFFIXES.get(Path(target).suffix.lower())
    if suffix is None or target == STDOUT or is_uri(target) or is_device(Path(target)):
        return Placed((Place(names[0], target, image_format or RAW),), None, ())
    warnings: tuple[str, ...] = ()
    if image_format not in {None, suffix}:
        warnings = (f"{target} is written as {image_format}, as --format says, though its name says {suffix}",)
    return Placed((Place(names[0], target, image_format or suffix),), None, warnings)


def _disks(point: Manifest, disk: str | None) -> list[str]:
    names = [held.name for held in point.disks]
    if disk is None:
        return names
    if disk not in names:
        raise NotFound(f"point {point.point} holds no disk {disk!r}", hint=f"it holds: {', '.join(names)}")
    return [disk]


def _is_folder(target: str, disks: int) -> bool:
    if target == STDOUT or is_uri(target):
        return False
    if os.path.lexists(target.rstrip("/") or "/"):
        if target.endswith("/") and not os.path.isdir(target):
            raise UsageError(f"{target} is no folder", hint="name a folder, or the file without a slash at its end")
        return os.path.isdir(target)
    # A name that looks like a file's is meant for one disk: several do not make a folder of that name.
    return target.endswith("/") or (disks > 1 and Path(target).suffix.lower() not in _OF_FILES)


@contextmanager
def made(folder: Path | None) -> Iterator[None]:
    """
    Make the folder, and those above it, where they are missing; after a failure, those that are empty are removed.

    Raises
    ------
    Failed
        It cannot be made.
    """
    missing = [] if folder is None else [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        for each in reversed(missing):
            os.mkdir(each, 0o700)
    except OSError as error:
        raise Failed(f"{folder} cannot be made: {error.strerror}", hint="check the path and the permissions") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for each in missing:
                os.rmdir(each)
        raise


def _refuse_repository(machine: Machine, target: str) -> None:
    """Refuse to restore over backups or between them, whatever way the target is written."""
    ours = machine.files.local_folder()
    for place in real_places(target):
        for folder in (place, *place.parents):
            beside = ours is not None and os.path.exists(folder) and machine.exists() and folder.samefile(ours)
            if beside or os.path.lexists(folder / MARKER):
                raise UsageError(
                    f"{target} lies among the backups in {folder}", hint="restore to a place outside of it"
                )
