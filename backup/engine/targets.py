"""
Targets of a restore: a file (raw or qcow2), a block device, or an NBD export.

A file gets its name only when its content is complete.  A device or an export is overwritten in place.  So it needs
--force, is refused before the first write if it is too small, and its zeroes are written, since the old content is
unknown.
A file or device that a QEMU has open is refused, even with --force.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from backup import qcow2
from backup.engine import block_devices
from backup.engine.replaced_file import ReplacedFile, claim_target
from backup.errors import Failed, UsageError, os_errors_as
from backup.nbd.target import NbdTarget
from backup.qemu.images import RAW
from backup.runtime.direct_io import Output, write_all

_NBD_SCHEMES = ("nbd://", "nbds://", "nbd+unix://", "nbds+unix://", "nbd+vsock://", "nbds+vsock://")
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_ZERO_RANGE = 0x01, 0x10  # linux/falloc.h
_ZERO_STEP = 1 << 30
"""Bytes that one call of fallocate zeroes at most."""
_ZEROES = bytes(1 << 20)
_NOT_WRITTEN_HINT = "check the space and the permissions there; the backup is unharmed, restore again"


class Target(Protocol):
    """Where a disk is restored to.  Safe to use from several threads."""

    @property
    def reads_zero(self) -> bool:
        """Whether ranges that were not written are known to read as zeroes."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write data (bytes) at offset."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes."""


def is_uri(text: str) -> bool:
    """Tell whether a target is the URI of an NBD export."""
    return text.startswith(_NBD_SCHEMES)


@contextmanager
def open_target(text: str, size: int, image_format: str, *, cluster_size: int, force: bool) -> Iterator[Target]:
    """
    Open the target that `text` names for a disk of `size` bytes.

    If the block succeeds, the target is complete and durable at its end.

    Raises
    ------
    UsageError
        The target exists and --force was not given, or the format does not fit.
    Failed
        The target is too small or cannot be written.
    """
    if is_uri(text):
        opener = _nbd(text, size, image_format, force=force)
    elif is_device(Path(text)):
        opener = _device(Path(text), size, image_format, force=force)
    else:
        opener = _file(Path(text), size, image_format, cluster_size, force=force)
    with opener as target:
        yield target


def refuse_existing(path: Path, *, force: bool) -> None:
    """
    Refuse a path at which no new file may be made.

    Raises
    ------
    UsageError
        The path exists and --force was not given, or it is not a file.
    """
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder, but the target must be a file", hint="name another target")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(
            f"{path} is neither a file nor a block device",
            hint="name another target; `-` writes a raw stream to standard output, also into a pipe",
        )
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path} exists", hint="name another target, or use --force to replace it")


@contextmanager
def _file(path: Path, size: int, image_format: str, cluster_size: int, *, force: bool) -> Iterator[Target]:
    refuse_existing(path, force=force)
    path = Path(os.path.realpath(path))
    with ReplacedFile(path) as replaced:
        replaced.claim()
        with _new_file(path, replaced, size, image_format, cluster_size, force=force) as target:
            yield target


@contextmanager
def _new_file(
    path: Path, replaced: ReplacedFile, size: int, image_format: str, cluster_size: int, *, force: bool
) -> Iterator[Target]:
    """Write a new file, which takes the name `path` when it is complete."""
    part = path.with_name(f".pybackup-{os.urandom(8).hex()}.part")
    with _as_not_written(path):
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    output = Output(fd, part, grows=image_format != RAW)
    try:
        replaced.pass_on(fd)  # now, since this user may not be allowed to, and writing may take hours
        if image_format == RAW:
            target: RawFile | Qcow2File = RawFile(fd, output, size, path)
        else:
            target = Qcow2File(output, size, cluster_size, path)
        yield target
        with _as_not_written(path):
            target.finish()
            os.fsync(fd)
            refuse_existing(path, force=force)
            if replaced.claim():
                replaced.pass_on(fd)
                os.fsync(fd)
            # Opened before the rename: once the file has its name, no shortage may make the restore fail.
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.rename(part, path)
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        output.close()
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


@contextmanager
def _device(path: Path, size: int, image_format: str, *, force: bool) -> Iterator[Target]:
    _require_force(str(path), image_format, "a block device", force=force)
    with _as_not_written(path):
        try:
            fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise Failed(
                f"{path} is in use (mounted, or part of a RAID, for example)",
                hint="end its use, or name another target",
            ) from None
    try:
        claim_target(fd, str(path))
        _refuse_writers(fd, path)
        with _as_not_written(path):
            _require_room(str(path), os.lseek(fd, 0, os.SEEK_END), size)
        yield DeviceTarget(fd, path)
        with _as_not_written(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def _refuse_writers(fd: int, path: Path) -> None:
    programs = block_devices.writers(os.fstat(fd).st_rdev)
    if programs:
        raise Failed(
            f"{path} is open for writing in {', '.join(programs)}",
            hint="end that program first, or name another target",
        )


@contextmanager
def _nbd(uri: str, size: int, image_format: str, *, force: bool) -> Iterator[Target]:
    _require_force(uri, image_format, "an NBD export", force=force)
    export = NbdTarget(uri)
    try:
        if export.read_only:
            raise Failed(f"{uri} is read-only", hint="start the server without -r")
        _require_room(uri, export.size, size)
        yield export
        export.flush()
    finally:
        export.close()


def _require_force(name: str, image_format: str, what: str, *, force: bool) -> None:
    if image_format != RAW:
        raise UsageError(f"{name} is {what}, which takes no {image_format}", hint="omit --format")
    if not force:
        raise UsageError(f"{name} is {what}, whose contents would be lost", hint="use --force to overwrite it")


def _require_room(name: str, room: int, size: int) -> None:
    if room < size:
        raise Failed(
            f"{name} has {room} bytes, but the disk has {size}", hint="name a larger target; nothing was written"
        )


def is_device(path: Path) -> bool:
    """Tell whether a path is a block device."""
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


class RawFile:
    """A new sparse file; ranges that are not written are holes."""

    reads_zero = True

    def __init__(self, fd: int, output: Output, size: int, path: Path) -> None:
        self._output = output
        self._failure = _not_written(path)
        with os_errors_as(self._failure, hint=_NOT_WRITTEN_HINT):
            os.ftruncate(fd, size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write data (bytes) at offset."""
        with os_errors_as(self._failure, hint=_NOT_WRITTEN_HINT):
            self._output.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Do nothing, since a hole reads as zeroes."""

    def finish(self) -> None:
        """Do nothing, since a raw file has no tables."""


class DeviceTarget:
    """A block device, whose old content is unknown."""

    reads_zero = False

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._failure = _not_written(path)
        self._fallocate = _libc_fallocate()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write data (bytes) at offset."""
        with os_errors_as(self._failure, hint=_NOT_WRITTEN_HINT):
            write_all(self._fd, offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Zero a range in the kernel (blkdev_issue_zeroout, through fallocate), or by writing zeroes."""
        with os_errors_as(self._failure, hint=_NOT_WRITTEN_HINT):
            for low in range(offset, offset + length, _ZERO_STEP):
                count = min(_ZERO_STEP, offset + length - low)
                # The kernel accepts only whole sectors, and old kernels none: the rest is written as zeroes.
                if low % 4096 or count % 4096 or not self._fallocate(self._fd, low, count):
                    for at in range(low, low + count, len(_ZEROES)):
                        write_all(self._fd, at, _ZEROES[: min(len(_ZEROES), low + count - at)])


class Qcow2File:
    """A standalone qcow2 with the disk's content, uncompressed, from which a machine can run."""

    reads_zero = True

    def __init__(self, output: Output, size: int, cluster_size: int, path: Path) -> None:
        self._output = output
        self._failure = _not_written(path)
        self._cluster_size = cluster_size
        self._codec = qcow2.Codec(cluster_size, None)
        self._writer = qcow2.Writer(qcow2.Image(size, cluster_size, None, zstd=False), self, level=None)

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """Write a part of the file (qcow2.PartSink)."""
        with os_errors_as(self._failure, hint=_NOT_WRITTEN_HINT):
            self._output.write(number * qcow2.PART, data)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write whole clusters; the last one of the disk may be shorter."""
        padded = bytearray(-(-len(data) // self._cluster_size) * self._cluster_size)
        padded[: len(data)] = data
        self._writer.write(offset // self._cluster_size, padded, self._codec)

    def zero(self, offset: int, length: int) -> None:
        """Do nothing: without a backing file, clusters that are not written read as zeroes."""

    def done_below(self, offset: int) -> None:
        """Take note that no write below this offset (bytes) runs or follows; L2 tables below it leave memory."""
        self._writer.completed_below(offset // self._cluster_size)

    def finish(self) -> None:
        """Write the remaining tables and the header."""
        self._writer.finish()


class _Fallocate(Protocol):
    def __call__(self, fd: int, offset: int, length: int) -> bool: ...


def _libc_fallocate() -> _Fallocate:
    """Return fallocate(2), which the standard library lacks; the function returns whether the call succeeded."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]

    def call(fd: int, offset: int, length: int) -> bool:
        return bool(libc.fallocate(fd, _FALLOC_FL_ZERO_RANGE | _FALLOC_FL_KEEP_SIZE, offset, length) == 0)

    return call


def _not_written(path: Path) -> str:
    return f"{path} cannot be written"


def _as_not_written(path: Path) -> AbstractContextManager[None]:
    return os_errors_as(_not_written(path), hint=_NOT_WRITTEN_HINT)
