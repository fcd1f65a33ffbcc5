"""
What this host knows of places elsewhere: locks among its own processes, and notes that are not worth a request.

The folder is XDG_STATE_HOME/pybackup; without that variable /var/lib/pybackup for root, and ~/.local/state/pybackup for
others.  It holds, for each place, a folder of locks and one of notes.  All of it may be removed when nothing runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from backup.storage.plain_file import create_file, open_file

_ID = "host"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_TICK = 0.05


def state_folder(environment: Mapping[str, str], home: Path) -> Path:
    """Return the folder for state of this user's programs."""
    named = environment.get("XDG_STATE_HOME", "")
    if named.startswith("/"):
        return Path(named) / "pybackup"
    return Path("/var/lib/pybackup") if os.geteuid() == 0 else home / ".local/state/pybackup"


class HostState:
    """
    The locks and notes about one place.

    Attributes
    ----------
    identity : str
        16 hex digits that no other host has, nor this one after its next start.  Processes of one identity exclude each
        other with the locks.  Where the folder cannot be written, each process has an identity of its own.
    """

    def __init__(self, folder: Path, place: str) -> None:
        self._place = folder / "places" / _digest(place)
        try:
            for made in (folder, self._place.parent, self._place):
                made.mkdir(mode=0o700, parents=made == folder, exist_ok=True)
            self.identity = _digest(f"{_host_id(folder / _ID)} {_boot_id()}")
            self.shared = True
        except OSError:
            self.identity = os.urandom(8).hex()
            self.shared = False

    def notes(self, key: str) -> Path:
        """Return the folder for notes about the place; `key` tells repositories at one location apart."""
        return self._place / f"notes-{_digest(key)}"

    def has_notes(self) -> bool:
        """Tell whether there are notes about the place, of whichever repository."""
        return self.shared and any(name.startswith("notes-") for name in os.listdir(self._place))

    def try_lock(self, name: str, seconds: float = 0.0) -> Callable[[], None] | None:
        """
        Take a lock that no other process of this host has; wait for at most `seconds`.

        Returns the function that frees the lock, or None if another process has it.  The lock ends with the process.
        """
        if not self.shared:
            return _nothing
        fd = self._open(name)
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    os.close(fd)
                    return None
                time.sleep(_TICK)
            else:
                return lambda: os.close(fd)

    def _open(self, name: str) -> int:
        return open_file(self._place / name, os.O_RDWR | os.O_CREAT, 0o600, sole=True)


def _nothing() -> None:
    pass


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _host_id(path: Path) -> str:
    """Return the random number that the file holds; the first process writes it."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}")
        with open(create_file(temporary, 0o600), "w", encoding="ascii") as file:
            file.write(os.urandom(16).hex())
        with suppress(FileExistsError):  # another process was faster
            os.link(temporary, path)
        temporary.unlink()
    return path.read_text(encoding="ascii")


def _boot_id() -> str:
    """Return what tells this start of the host from others, also from a copy of the host that runs elsewhere."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""
