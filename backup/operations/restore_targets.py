"""
What the TARGET of a restore means: where each disk of the point goes, and in which format.

    a folder, or a name that ends in /     DISK.raw or DISK.qcow2 in it, for any number of disks
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
"""The format that the suffix of a file's name stands for."""
_OF_FILES = (*_SUFFIXES, ".img")
"""Suffixes that show that a name is meant for a file, and not for a folder."""


@dataclass(frozen=True, slots=True)
class Place:
    """The target of one disk."""

    disk: str
    target: str
    format: str


@dataclass(frozen=True, slots=True)
class Placed:
    """The targets of a point's disks; `folder` holds them and need not exist yet, or is None."""

    places: tuple[Place, ...]
    folder: Path | None
    warnings: tuple[str, ...]


def place(
    machine: Machine, point: Manifest, target: str, disk: str | None, image_format: str | None, *, force: bool
) -> Placed:
    """
    Decide where the disks of a machine's point go; nothing is created.

    Raises
    ------
    NotFound
        The point does not hold the disk.
    UsageError
        The target does not fit the disks, lies in a repository, or exists without --force.
    """
    names = _disks(point, disk)
    if not target:
        raise UsageError(
            "TARGET is empty",
            hint="name a file, a folder, a block device or an NBD URI, or write - for standard output",
        )
    if target != STDOUT and not is_uri(target):
        _refuse_repository(machine, target)
    if _is_folder(target, len(names)):
        base = target.rstrip("/") or "/"
        made = image_format or RAW
        places = tuple(Place(name, os.path.join(base, f"{name}.{made}"), made) for name in names)
        for one in places:
            refuse_existing(Path(one.target), force=force)
        return Placed(places, Path(base), ())
    if len(names) > 1 and target == STDOUT:
        raise UsageError(
            f"point {point.point} holds several disks, and standard output takes one",
            hint=f"name one disk: --disk {' or '.join(names)}",
        )
    if len(names) > 1:
        raise UsageError(
            f"{target} is not a folder, and point {point.point} holds several disks",
            hint=f"name a folder (a new one with a slash at its end), or one disk: --disk {' or '.join(names)}",
        )
    suffix = _SUFFIXES.get(Path(target).suffix.lower())
    if suffix is None or target == STDOUT or is_uri(target) or is_device(Path(target)):
        return Placed((Place(names[0], target, image_format or RAW),), None, ())
    warnings: tuple[str, ...] = ()
    if image_format not in {None, suffix}:
        warnings = (f"{target} is written as {image_format} because of --format, although its name says {suffix}",)
    return Placed((Place(names[0], target, image_format or suffix),), None, warnings)


def _disks(point: Manifest, disk: str | None) -> list[str]:
    names = [entry.name for entry in point.disks]
    if disk is None:
        return names
    if disk not in names:
        raise NotFound(
            f"point {point.point} holds no disk {disk!r}", hint=f"the point holds these disks: {', '.join(names)}"
        )
    return [disk]


def _is_folder(target: str, disks: int) -> bool:
    if target == STDOUT or is_uri(target):
        return False
    if os.path.lexists(target.rstrip("/") or "/"):
        if target.endswith("/") and not os.path.isdir(target):
            raise UsageError(
                f"{target} is not a folder", hint="name a folder, or the file without the slash at the end"
            )
        return os.path.isdir(target)
    # The name of a file is meant for one disk: a folder of that name is not created for several disks.
    return target.endswith("/") or (disks > 1 and Path(target).suffix.lower() not in _OF_FILES)


@contextmanager
def made(folder: Path | None, *, for_machine: bool) -> Iterator[None]:
    """
    Create the folder and its missing parents; after a failure, those of them that are empty are removed.

    `for_machine`: a machine will run from the folder.  QEMU's user must be able to enter it; the files in it stay their
    owner's until libvirt gives them to that user.

    Raises
    ------
    Failed
        The folder cannot be created.
    """
    missing = [] if folder is None else [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        for path in reversed(missing):
            os.mkdir(path, 0o700)
            if for_machine:
                os.chmod(path, 0o711)  # noqa: S103 - entered by QEMU's user, and listed by the owner only
    except OSError as error:
        raise Failed(
            f"{folder} cannot be created: {error.strerror}", hint="check the path and the permissions"
        ) from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in missing:
                os.rmdir(path)
        raise


def _refuse_repository(machine: Machine, target: str) -> None:
    """Refuse a target in a repository, also through a link or a loop device."""
    ours = machine.files.local_folder()
    for place in real_places(target):
        for folder in (place, *place.parents):
            beside = ours is not None and os.path.exists(folder) and machine.exists() and folder.samefile(ours)
            if beside or os.path.lexists(folder / MARKER):
                raise UsageError(
                    f"{target} lies in the repository {folder}", hint="name a target outside of the repository"
                )
