"""
Targets of a restore: a file (raw or qcow2), a block device, an NBD export.

A file appears under its name only when it is whole.  A device or an export cannot; it needs --force, is refused when it
is too small before a byte is written, and gets its zeroes written, as its old contents are unknown.  A file or a device
that a QEMU has open is refused, also with --force.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from backup import qcow2
from backup.engine import block_devices
from backup.engine.replaced_file import Former, claim
from backup.errors import BackupError, Failed, UsageError
from backup.nbd.target import NbdTarget
from backup.runtime.direct_io import Output, write_all

RAW, QCOW2 = "raw", "qcow2"
_NBD_SCHEMES = ("nbd://", "nbds://", "nbd+unix://", "nbds+unix://", "nbd+vsock://", "nbds+vsock://")
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_ZERO_RANGE = 0x01, 0x10  # linux/falloc.h
_ZERO_STEP = 1 << 30
_ZEROES = bytes(1 << 20)


class Target(Protocol):
    """Where a disk is restored to; safe to use from several threads."""

    @property
    def reads_zero(self) -> bool:
        """Is what is not written known to read as zeroes?"""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write data (bytes) at offset."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes."""


def is_uri(text: str) -> bool:
    """Does the text name an NBD export?"""
    return text.startswith(_NBD_SCHEMES)


@contextmanager
def opened(text: str, size: int, image_format: str, *, cluster_size: int, force: bool) -> Iterator[Target]:
    """
    Open what `text` names for a disk of `size` bytes; on success it is complete and durable when the block ends.

    Raises
    ------
    UsageError
        It exists and --force was not given, or the format does not fit.
    Failed
        It is too small or cannot be written.
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
    Refuse what a new file may not replace.

    Raises
    ------
    UsageError
        It exists and --force was not given, or it is no file.
    """
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder, and a file is to be made there", hint="name another target")
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
    with Former(path) as former:
        former.claim()
        with _new_file(path, former, size, image_format, cluster_size, force=force) as target:
            yield target


@contextmanager
def _new_file(
    path: Path, former: Former, size: int, image_format: str, cluster_size: int, *, force: bool
) -> Iterator[Target]:
    """A file that takes the name of the former when it is whole."""
    part = path.with_name(f".pybackup-{os.urandom(8).hex()}.part")
    with _explained(path):
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    output = Output(fd, part, grows=image_format != RAW)
    try:
        former.pass_on(fd)  # before hours of writing: this user may not be allowed to
        if image_format == RAW:
            target: RawFile | Qcow2File = RawFile(fd, output, size, path)
        else:
            target = Qcow2File(output, size, cluster_size, path)
        yield target
        with _explained(path):
            target.finish()
            os.fsync(fd)
            refuse_existing(path, force=force)
            if former.claim():
                former.pass_on(fd)
                os.fsync(fd)
            # Opened before the rename: once the file has its name, no lack of anything makes the restore a failure.
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
    with _explained(path):
        try:
            fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise Failed(f"{path} is in use (mounted, or part of something)", hint="unmount it first") from None
    try:
        claim(fd, str(path))
        _refuse_writers(fd, path)
        with _explained(path):
            _require_room(str(path), os.lseek(fd, 0, os.SEEK_END), size)
        yield Device(fd, path)
        with _explained(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def _refuse_writers(fd: int, path: Path) -> None:
    found = block_devices.writers(os.fstat(fd).st_rdev)
    if found:
        raise Failed(
            f"{path} is open for writing in {', '.join(found)}", hint="end that program first, or name another target"
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
        raise UsageError(f"{name} is {what}, which takes no {image_format}", hint="leave --format out")
    if not force:
        raise UsageError(f"{name} is {what}, whose contents would be lost", hint="use --force if that is meant")


def _require_room(name: str, room: int, size: int) -> None:
    if room < size:
        raise Failed(
            f"{name} has {room} bytes and the disk has {size}", hint="name a larger target; nothing was written"
        )


def is_device(path: Path) -> bool:
    """Is it a block device?"""
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


class RawFile:
    """A new sparse file: what is not written is a hole."""

    reads_zero = True

    def __init__(self, fd: int, output: Output, size: int, path: Path) -> None:
        self._output = output
        self._path = path
        with _explained(path):
            os.ftruncate(fd, size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write data (bytes) at offset."""
        with _explained(self._path):
            self._output.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Nothing: a hole reads as zeroes."""

    def finish(self) -> None:
        """Nothing is left to do."""


class Device:
    """A block device, whose old contents are unknown."""

    reads_zero = False

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._fallocate = _libc_fallocate()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write data (bytes) at offset."""
        with _explained(self._path):
            write_all(self._fd, offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Zero the range by the kernel (blkdev_issue_zeroout, through fallocate), else by writing zeroes."""
        with _explained(self._path):
            for low in range(offset, offset + length, _ZERO_STEP):
                count = min(_ZERO_STEP, offset + length - low)
                # The kernel takes whole sectors only; the rest, and old kernels, get written zeroes.
                if low % 4096 or count % 4096 or not self._fallocate(self._fd, low, count):
                    for at in range(low, low + count, len(_ZEROES)):
                        write_all(self._fd, at, _ZEROES[: min(len(_ZEROES), low + count - at)])


class Qcow2File:
    """A standalone qcow2: the disk's last state, uncompressed, ready to run a machine from."""

    reads_zero = True

    def __init__(self, output: Output, size: int, cluster_size: int, path: Path) -> None:
        self._output = output
        self._path = path
        self._cluster_size = cluster_size
        self._codec = qcow2.Codec(cluster_size, None)
        self._writer = qcow2.Writer(qcow2.Image(size, cluster_size, None, zstd=False), self, level=None)

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """Write one part of the file (qcow2.PartSink)."""
        with _explained(self._path):
            self._output.write(number * qcow2.PART, data)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write whole clusters; the disk's last one may be short."""
        padded = bytearray(-(-len(data) // self._cluster_size) * self._cluster_size)
        padded[: len(data)] = data
        self._writer.write(offset // self._cluster_size, padded, self._codec)

    def zero(self, offset: int, length: int) -> None:
        """Nothing: without a backing file, what is not written reads as zeroes."""

    def done_below(self, offset: int) -> None:
        """Nothing below this byte comes any more, or is under way: its L2 tables leave memory."""
        self._writer.completed_below(offset // self._cluster_size)

    def finish(self) -> None:
        """Write tables and head."""
        self._writer.finish()


class _Fallocate(Protocol):
    def __call__(self, fd: int, offset: int, length: int) -> bool: ...


def _libc_fallocate() -> _Fallocate:
    """fallocate(2), which the standard library lacks; returns whether it worked."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]

    def call(fd: int, offset: int, length: int) -> bool:
        return bool(libc.fallocate(fd, _FALLOC_FL_ZERO_RANGE | _FALLOC_FL_KEEP_SIZE, offset, length) == 0)

    return call


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> BackupError:
    return Failed(
        f"{path} cannot be written: {error.strerror}",
        hint="check the space and the permissions there; the backup is unharmed, restore again",
    )
