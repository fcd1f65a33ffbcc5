"""
The QEMU process at the other end of a monitor, as /proc shows it to root and to the user who runs it.

Anybody else learns nothing here: each function then says None.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_PROGRAMS = ("qemu", "kvm")
"""What the names of QEMU's executables contain.  Another program on the socket (a proxy) has no images open."""


@dataclass(frozen=True, slots=True)
class Drive:
    """A drive of the command line (-drive): its id and file, empty where not given."""

    id: str
    file: str


def lost_file(pid: int, path: str) -> str | None:
    """
    Say what happened to the name of an image that a QEMU has open: "removed" or "replaced".

    None: the name still means the file that QEMU has open, or the kernel does not tell.
    """
    opened = _opened(pid) if path.startswith("/") and _is_qemu(pid) else None
    if opened is None:
        return None
    name = f"/proc/{pid}/root{path}"  # as QEMU sees it: a container has file systems of its own
    try:
        found = os.stat(name)
    except FileNotFoundError:
        # An absolute link in a container leads us elsewhere than QEMU.
        certain = os.path.isdir(os.path.dirname(name)) and not os.path.islink(name)
        return "removed" if certain else None
    except OSError:
        return None
    return None if _identity(found) in opened else "replaced"


def copying_drives(pid: int) -> Sequence[Drive]:
    """
    Drives of the command line that copy what is read from their backing file into their own (copy-on-read=on).

    QMP does not show this.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = os.fsdecode(file.read()).split("\0")
    except OSError:
        return ()
    options = [_options(value) for word, value in pairwise(words) if word in {"-drive", "--drive"}]
    copying = [found for found in options if found.get("copy-on-read", "off") in {"on", "yes", "true", "y"}]
    return [Drive(found.get("id", ""), found.get("file", "")) for found in copying]


def _options(text: str) -> dict[str, str]:
    """QEMU's option syntax: key=value, separated by commas; a comma in a value is doubled; a bare key is `on`."""
    found = {}
    for part in text.replace(",,", "\0").split(","):
        key, equals, value = part.replace("\0", ",").partition("=")
        found[key] = value if equals else "on"
    return found


def _is_qemu(pid: int) -> bool:
    try:
        program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False
    return any(name in program for name in _PROGRAMS)


def _opened(pid: int) -> set[tuple[int, ...]] | None:
    """The identities of all files that a process has open."""
    folder = f"/proc/{pid}/fd"
    found = set()
    try:
        for name in os.listdir(folder):
            try:
                found.add(_identity(os.stat(f"{folder}/{name}")))
            except FileNotFoundError:
                continue  # closed meanwhile
    except OSError:
        return None
    return found


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells files apart, and block devices, which may have several names."""
    if stat.S_ISBLK(status.st_mode):
        return (status.st_rdev,)
    return status.st_dev, status.st_ino
