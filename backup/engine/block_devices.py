"""What the kernel tells about block devices: which programs have a device open, and which file a loop device uses."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def writers(device: int) -> list[str]:
    """
    Name the other programs that have the block device with this number (st_rdev) open for writing: "qemu-kvm (4711)".

    QEMU's locks do not show these programs: a lock belongs to a device node and not to the device, and a machine of
    libvirt has device nodes of its own.  Root sees the programs of all users; other users see only their own.
    """
    return [f"{_name(pid)} ({pid})" for pid in _pids() if any(_writes(pid, fd, device) for fd in _descriptors(pid))]


def _pids() -> Iterator[int]:
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    yield from (int(name) for name in names if name.isdigit() and int(name) != os.getpid())


def _descriptors(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except OSError:  # the process belongs to another user, or has ended
        return []


def _writes(pid: int, fd: str, device: int) -> bool:
    try:
        status = os.stat(f"/proc/{pid}/fd/{fd}")
        if not stat.S_ISBLK(status.st_mode) or status.st_rdev != device:
            return False
        with open(f"/proc/{pid}/fdinfo/{fd}") as file:
            flags = next((line.split()[1] for line in file if line.startswith("flags:")), "0")
    except OSError:
        return False
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "a program"


def real_places(target: str) -> Iterator[Path]:
    """Yield the path that a target really has and, for a loop device, the path of its file."""
    yield Path(os.path.realpath(target))
    try:
        status = os.stat(target)
    except OSError:
        return
    if not stat.S_ISBLK(status.st_mode):
        return
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    for entry in ("loop", "../loop"):  # of the device itself, or of the device of which it is a partition
        with suppress(OSError):
            yield Path(os.path.realpath(Path(f"/sys/dev/block/{number}/{entry}/backing_file").read_text().rstrip("\n")))
