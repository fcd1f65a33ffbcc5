"""
The QEMU process that a monitor is connected to, as /proc shows it.

Only root and the user who runs QEMU can see this; for other users the functions return nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_PROGRAMS = ("qemu", "kvm")
"""Parts of the names of QEMU's executables.  Another program on the socket, such as a proxy, has no images open."""


@dataclass(frozen=True, slots=True)
class Drive:
    """A drive of QEMU's command line (-drive): its id and file, empty if not given."""

    id: str
    file: str


def lost_file(pid: int, path: str) -> str | None:
    """
    Return what happened to the name of an image that QEMU has open: "removed" or "replaced".

    None: the name still belongs to the file that QEMU has open, or the kernel does not tell.
    """
    open_files = _open_files(pid) if path.startswith("/") and _is_qemu(pid) else None
    if open_files is None:
        return None
    name = f"/proc/{pid}/root{path}"  # the path as QEMU sees it; QEMU may run in a container
    try:
        status = os.stat(name)
    except FileNotFoundError:
        # In a container, an absolute link leads us to another place than QEMU, so that a missing file proves nothing.
        certain = os.path.isdir(os.path.dirname(name)) and not os.path.islink(name)
        return "removed" if certain else None
    except OSError:
        return None
    return None if _identity(status) in open_files else "replaced"


def copying_drives(pid: int) -> Sequence[Drive]:
    """
    Return the drives on QEMU's command line that use copy-on-read: they write to their image what is read from below.

    QMP does not show this option.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = os.fsdecode(file.read()).split("\0")
    except OSError:
        return ()
    options = [_options(value) for word, value in pairwise(words) if word in {"-drive", "--drive"}]
    copying = [drive for drive in options if drive.get("copy-on-read", "off") in {"on", "yes", "true", "y"}]
    return [Drive(drive.get("id", ""), drive.get("file", "")) for drive in copying]


def _options(text: str) -> dict[str, str]:
    """Parse QEMU's option syntax: key=value, separated by commas; ",," is a comma; a key without a value means "on"."""
    options = {}
    for part in text.replace(",,", "\0").split(","):
        key, equals, value = part.replace("\0", ",").partition("=")
        options[key] = value if equals else "on"
    return options


def _is_qemu(pid: int) -> bool:
    try:
        program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False
    return any(name in program for name in _PROGRAMS)


def _open_files(pid: int) -> set[tuple[int, ...]] | None:
    """Return the identities of all files that a process has open; None if this user may not see them."""
    folder = f"/proc/{pid}/fd"
    identities = set()
    try:
        for name in os.listdir(folder):
            try:
                identities.add(_identity(os.stat(f"{folder}/{name}")))
            except FileNotFoundError:
                continue  # the process has closed the file in the meantime
    except OSError:
        return None
    return identities


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what identifies a file; for a block device, which may have several nodes, its number."""
    if stat.S_ISBLK(status.st_mode):
        return (status.st_rdev,)
    return status.st_dev, status.st_ino
