"""
The file that a restore replaces: no QEMU may use it meanwhile, and its owner, mode, ACL and labels are passed on.

A QEMU that has the file open would continue to write to a file without a name, and its disk would be lost at the next
start.  So the file is claimed with QEMU's own locks while the new file is written.  The claim is repeated right before
the new file takes the name, since the name may belong to another file by then.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Self

from backup.errors import Failed, os_errors_as
from backup.qemu import locks
from backup.qemu.images import ImageLocked

_ACL = "system.posix_acl_access"
_KEPT = (_ACL, "system.nfs4_acl", "security.selinux", "security.SMACK64")
"""Extended attributes that tell who may do what with a file.  They are kept, and so are all `user.*` attributes."""
_NO_ATTRIBUTES = {errno.ENODATA, errno.EOPNOTSUPP}
"""Errors of file systems without extended attributes."""


def claim_target(fd: int, name: str) -> None:
    """
    Keep every QEMU from using a file or device that will be overwritten, until `fd` is closed.

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
            hint="shut down the machine that runs on it, or name another target; --force does not override this",
        ) from None


class ReplacedFile:
    """
    The plain file, or nothing, that has the name `path`.

    Raises
    ------
    Failed
        A QEMU has the file open, or this user may not open it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def claim(self) -> bool:
        """Claim the file that has the name now; return whether it is another file than at the last call."""
        fd = self._open()
        if fd is not None and self._fd is not None and os.path.sameopenfile(fd, self._fd):
            os.close(fd)
            fd = self._fd
        another = fd is not None and fd != self._fd
        if fd != self._fd:
            self.close()
            self._fd = fd
        if fd is not None:
            claim_target(fd, str(self._path))
        return another

    def pass_on(self, fd: int) -> None:
        """
        Give the new file `fd` the owner, group, mode, ACL, security label and user attributes of the replaced file.

        Raises
        ------
        Failed
            This user may not do that.
        """
        if self._fd is None:
            return
        old, new = os.fstat(self._fd), os.fstat(fd)
        with os_errors_as(
            f"the file that replaces {self._path} cannot keep the former's owner (user {old.st_uid}, group "
            f"{old.st_gid}), mode and labels",
            hint="run as root; or move the former file away and restore to a new one, which will be yours",
        ):
            if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
                os.fchown(fd, old.st_uid, old.st_gid)
            os.fchmod(fd, stat.S_IMODE(old.st_mode) & 0o777)
            self._pass_attributes(self._fd, fd)

    def close(self) -> None:
        """End the claim."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> int | None:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return None  # the creation of the new file will report a more exact error
        except OSError as error:
            raise Failed(
                f"{self._path} cannot be opened to see whether a QEMU has it open: {error.strerror}",
                hint="run as a user who may read the file, or name another target",
            ) from None

    @staticmethod
    def _pass_attributes(old: int, new: int) -> None:
        wanted = _attributes(old)
        # The new file may have got an ACL from its folder, which would admit users whom the old file excluded.
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
        if error.errno in _NO_ATTRIBUTES:
            return {}
        raise
    return {name: os.getxattr(fd, name) for name in names if name in _KEPT or name.startswith("user.")}
