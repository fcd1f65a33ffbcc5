"""qcow2 images in files without a name: they disappear with the last process that has them open."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backup.errors import os_errors_as
from backup.qemu.images import QCOW2
from backup.qemu.programs import filename, stdout_of


@contextmanager
def temporary_overlay(base: Path) -> Iterator[int]:
    """
    Make an overlay on a qcow2 image, in an unnamed file in the temporary folder ($TMPDIR), and yield its descriptor.

    Raises
    ------
    Failed
        No file can be made in the folder.
    """
    folder = Path(tempfile.gettempdir())
    with os_errors_as(f"no overlay can be made in {folder}", hint="name another folder with TMPDIR=DIR"):
        fd = _unnamed_file(folder)
    try:
        create = ["qemu-img", "create", "-q", "-f", QCOW2, "-b", filename(base), "-F", QCOW2]
        stdout_of([*create, f"/proc/self/fd/{fd}"], pass_fds=[fd])
        yield fd
    finally:
        os.close(fd)


def create_scratch(folder: Path, size: int) -> int:
    """
    Make an empty qcow2 image of `size` bytes in an unnamed file and return its descriptor.

    The file exists until the last process closes it, so that nothing can be left behind.

    Raises
    ------
    Failed
        No file can be made in the folder.
    """
    hint = "name another folder with --scratch (`scratch:` in the configuration)"
    with os_errors_as(f"no scratch file can be made in {folder}", hint=hint):
        fd = _unnamed_file(folder)
    try:
        stdout_of(["qemu-img", "create", "-q", "-f", QCOW2, f"/proc/self/fd/{fd}", str(size)], pass_fds=[fd])
    except BaseException:
        os.close(fd)
        raise
    return fd


def _unnamed_file(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
            raise
    fd, name = tempfile.mkstemp(prefix="pybackup-", suffix=".scratch", dir=folder)  # NFS has no unnamed files
    os.unlink(name)
    return fd
