"""
The file that a restore replaces: kept from every QEMU meanwhile, and its owner, mode, ACL and labels passed on.

A QEMU that has the file open would go on writing into a file without a name, and its disk would be lost at its next
start.  So the file is claimed with QEMU's own locks for as long as the new one is written, and claimed again right
before the new file takes its name: another file may have the name by then.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Self

from backup.errors import Failed
from backup.qemu import locks
from backup.qemu.images import ImageLocked

_ACL = "system.posix_acl_access"
_KEPT = (_ACL, "system.nfs4_acl", "security.selinux", "security.SMACK64")
"""Extended attributes that say who may do what with a file.  `user.*` is kept as well."""
_NO_SUCH = {errno.ENODATA, errno.EOPNOTSUPP}


def claim(fd: int, name: str) -> None:
    """
    Keep every QEMU from a file or device that is to be overwritten, until `fd` is closed.

    Raises
    ------
    Failed
        A QEMU has it open.
    """
    try:
        locks.claim(fd, name)
    except ImageLocked as error:
        raise Failed(
            error.message,
            hint="shut down the machine that runs on it, or name another target; --force never takes an image in use",
        ) from None


class Former:
    """
    Whatever has the name `path` now, a plain file or nothing.

    Raises
    ------
    Failed
        A QEMU has it open, or this user may not look.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def claim(self) -> bool:
        """Claim the file that has the name now; whether that is another file than at the last call."""
        found = self._opened()
        if found is not None and self._fd is not None and os.path.sameopenfile(found, self._fd):
            os.close(found)
            found = self._fd
        another = found is not None and found != self._fd
        if found != self._fd:
            self.close()
            self._fd = found
        if found is not None:
            claim(found, str(self._path))
        return another

    def pass_on(self, fd: int) -> None:
        """
        Give the new file the owner, group, mode, ACL, security label and user attributes of the former.

        Raises
        ------
        Failed
            This user may not.
        """
        if self._fd is None:
            return
        former, new = os.fstat(self._fd), os.fstat(fd)
        try:
            if (former.st_uid, former.st_gid) != (new.st_uid, new.st_gid):
                os.fchown(fd, former.st_uid, former.st_gid)
            os.fchmod(fd, stat.S_IMODE(former.st_mode) & 0o777)
            self._pass_attributes(self._fd, fd)
        except OSError as error:
            raise Failed(
                f"the file that replaces {self._path} cannot keep the former's owner (user {former.st_uid}, group "
                f"{former.st_gid}), mode and labels: {error.strerror}",
                hint="run as root; or move the former file away and restore to a new one, which will be yours",
            ) from None

    def close(self) -> None:
        """End the claim."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> int | None:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return None  # making the new file will say what is wrong
        except OSError as error:
            raise Failed(
                f"{self._path} cannot be opened to see whether a QEMU has it open: {error.strerror}",
                hint="run as a user who may read it, or name another target",
            ) from None

    @staticmethod
    def _pass_attributes(former: int, new: int) -> None:
        wanted = _attributes(former)
        # An ACL that the new file got from its folder would let in whom the former kept out.
        if _ACL not in wanted and _ACL in _attributes(new):
            os.removexattr(new, _ACL)
        present = _attributes(new)
        for name, value in wanted.items():
            if present.get(name) != value:
                os.setxattr(new, name, value)


def _attributes(fd: int) -> dict[str, bytes]:
    try:
        names = os.listxattr(fd)
    except OSError as error:
        if error.errno in _NO_SUCH:
            return {}
        raise
    return {name: os.getxattr(fd, name) for name in names if name in _KEPT or name.startswith("user.")}
