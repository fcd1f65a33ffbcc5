"""
Images: what qemu-img says of them, their bitmaps, and files for it to make.

An image's format is always told to QEMU (`-f`), never guessed by it: a guest that owns a raw disk could write a qcow2
header into it and have QEMU open any file of the host as its backing file.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from backup.errors import BackupError, Failed, SourceError
from backup.qemu.programs import ProgramFailed, filename, finish, one_line, run
from backup.qemu.truncation import may_be_cut_off

_T = TypeVar("_T")
QCOW2, RAW = "qcow2", "raw"
_QCOW2_MAGIC = b"QFI\xfb"
_HEAD = 128
_FOREIGN = (
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)
"""
Offset and bytes by which QEMU knows other formats (the probe functions in block/).  Not LUKS: many guests begin their
raw disks with that.
"""
_LOCK_TRIES, _LOCK_PAUSE = 5, 0.3
"""
Another program's short look at the image (qemu-img info, a killed run's last qemu-img) must not fail a run: that many
tries, that many seconds apart.
"""

_UNWRITABLE = tuple(map(os.strerror, (errno.EROFS, errno.EACCES, errno.EPERM)))
_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
"""Of the reasons for which QEMU cannot add a bitmap: those of an image that is read-only, and those of full storage."""
_LONGEST_REASON = 500
"""Characters: a manifest keeps it."""
_NO_ROOM = "the image's storage has no room for it"
_DIRECTORY_ENTRY = 24 + 1024
"""Bytes, at most, of a bitmap in the image's directory of bitmaps (docs/interop/qcow2.txt)."""


class ImageLocked(SourceError):
    """QEMU's lock says that another program uses the image, or a file below it."""

    def __init__(self, path: Path | str, why: str) -> None:
        super().__init__(
            f"{path} is in use by another program: {why}",
            hint="if a machine runs on it: use --qmp, or shut it down; else wait for the other program",
        )


class BitmapRefused(SourceError):
    """
    A new bitmap does not record in an image, and `why`.

    `lasting`: the reason is a property of the image (it is read-only), so that later attempts will meet it as well.
    """

    def __init__(self, path: Path | str, name: str, why: str, *, lasting: bool = False) -> None:
        super().__init__(
            f"bitmap {name} cannot be started in {path}: {why}",
            hint="a backup needs no bitmap: without one it reads the whole disk",
        )
        self.why = why
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A persistent dirty bitmap of an image.  `granularity` in bytes."""

    name: str
    granularity: int
    recording: bool
    inconsistent: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of an image's backing chain, and the stat of it: size in bytes, mtime in ns, inode."""

    path: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """
    What an offline image is.

    `size` is its virtual size in bytes, exact for a raw image; `no_bitmaps` says why it can hold no bitmap (None when
    it can); `lower` are the files below it, nearest first, and `lower_bitmaps` the names of the bitmaps in them.
    `encrypted`: nothing can be read of it, or of a file below it, without a key.
    """

    path: Path
    format: str
    size: int
    bitmaps: tuple[Bitmap, ...]
    no_bitmaps: str | None
    unseen_writes: str | None
    lower: tuple[Layer, ...]
    lower_bitmaps: tuple[str, ...]
    encrypted: bool


def detect_format(path: Path) -> str:
    """
    Qcow2 or raw, from the first bytes.

    Raises
    ------
    SourceError
        There is no image, or it cannot be read.
    """
    return QCOW2 if _head(path).startswith(_QCOW2_MAGIC) else RAW


def foreign_format(path: Path) -> str | None:
    """
    The format of other programs that the first bytes are of, by QEMU's name for it; None: of none.

    Raises
    ------
    SourceError
        As `detect_format`.
    """
    head = _head(path)
    return next((name for at, magic, name in _FOREIGN if head[at:].startswith(magic)), None)


def _head(path: Path) -> bytes:
    """The first bytes of an image, as many as tell formats apart."""
    try:
        # A pipe in the image's place must not hang us.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise SourceError(f"{path} is neither a file nor a block device", hint="check the image's path")
            return file.read(_HEAD)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(f"there is no image {path}", hint="check --image, or `image:` in the configuration") from None
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror}", hint="check the image's path and permissions"
        ) from None


def require_whole(path: Path) -> None:
    """
    Refuse a qcow2 image whose file is cut off: QEMU would read the lost clusters as zeroes.

    Ask before anything writes to the image: adding a bitmap extends the file, and then nobody can tell any more.

    Raises
    ------
    SourceError
        Clusters that the image refers to lie beyond the end of its file.
    """
    with open(path, "rb") as file:
        mode, size = os.fstat(file.fileno()).st_mode, os.fstat(file.fileno()).st_size
        if not stat.S_ISREG(mode) or not may_be_cut_off(file, size):
            return
    found = _run_on_image(["qemu-img", "check", "--output=json", "-f", QCOW2, filename(path)], path, codes=(0, 2, 3))
    errors = json.loads(found).get("corruptions", 0)
    if errors:
        raise SourceError(
            f"{path} is damaged: {errors} clusters that it refers to are not in its {size} bytes; is the file cut off?",
            hint=f"look at it with: qemu-img check {path}; restore the image from an earlier point",
        )


@functools.cache
def qemu_version() -> str:
    """QEMU's version as qemu-img tells it, "7.2.22" for example; asked once in a process."""
    words = run(["qemu-img", "--version"]).split()
    return words[2] if len(words) > 2 else "unknown"


def image_info(path: Path, image_format: str) -> ImageInfo:
    """
    Ask qemu-img about an image and its backing chain.

    Raises
    ------
    ImageLocked
        A running machine has it open.
    SourceError
        It is no image of that format, or a file below it is missing.
    """
    command = ["qemu-img", "info", "--output=json", "--backing-chain", "-f", image_format, filename(path)]
    layers = json.loads(_run_on_image(command, path))
    data = _data(layers[0])
    size = os.stat(path).st_size if image_format == RAW and path.is_file() else int(layers[0]["virtual-size"])
    lower = tuple(look_at(layer["filename"]) for layer in layers[1:])
    return ImageInfo(
        path=path,
        format=image_format,
        size=size,
        bitmaps=tuple(_bitmap(found) for found in data.get("bitmaps", ())),
        no_bitmaps=_why_no_bitmaps(image_format, data, size),
        unseen_writes=why_unseen_writes([_data(layer) for layer in layers], lower),
        lower=lower,
        lower_bitmaps=tuple(found["name"] for layer in layers[1:] for found in _data(layer).get("bitmaps", ())),
        encrypted=any(layer.get("encrypted", False) for layer in layers),
    )


def _data(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = layer.get("format-specific", {}).get("data", {})
    return found


def _bitmap(found: Mapping[str, Any]) -> Bitmap:
    flags = found.get("flags", ())
    return Bitmap(found["name"], int(found["granularity"]), "auto" in flags, "in-use" in flags)


def _why_no_bitmaps(image_format: str, data: Mapping[str, Any], size: int) -> str | None:
    if image_format == RAW:
        return "a raw image cannot hold dirty bitmaps"
    if data.get("compat") == "0.10":
        return "a qcow2 image of version 2 cannot hold dirty bitmaps (qemu-img amend -o compat=1.1 upgrades it)"
    if size == 0:
        return "QEMU keeps no dirty bitmap in an image of no bytes"  # qemu-img says so, and exits with 0
    return None


def why_unseen_writes(details: Sequence[Mapping[str, Any]], lower: Sequence[Layer]) -> str | None:
    """
    Why writes may pass unseen by a bitmap of the topmost image and by the stat of those below; None when they cannot.

    `details` are the format's own facts of the image and of each file in `lower`, as qemu-img info and QMP tell them.
    """
    if "data-file" in details[0]:
        return "its data lies in an external data file, whose writes no bitmap need see"
    for data, found in zip(details[1:], lower, strict=True):
        if "data-file" in data:
            return f"the data of its backing file {found.path} lies in an external data file, which may change unseen"
        if not found.inode:
            return f"its backing file {found.path} is no plain local file and cannot be watched for changes"
    return None


def look_at(name: str) -> Layer:
    """Stat a file of a backing chain, named as QEMU does."""
    try:
        status = os.stat(name)
    except OSError:
        return Layer(name, 0, 0, 0)  # not a local file (a network source, json:...): see why_unseen_writes
    if not stat.S_ISREG(status.st_mode):
        return Layer(name, 0, 0, 0)  # a block device's stat does not show writes
    return Layer(os.path.abspath(name), status.st_size, status.st_mtime_ns, status.st_ino)


def add_bitmap(path: Path, name: str) -> None:
    """
    Add an enabled, persistent bitmap; QEMU opens the image for writing for that moment.

    qemu-img ends with 0 where it lost the new bitmap while it closed the image, and only complains on standard error;
    the bitmaps that were there are inconsistent then.  So after a complaint the image is looked at.

    Raises
    ------
    ImageLocked
        The image is in use.
    BitmapRefused
        The image does not have the bitmap.
    """
    complaints = _change_bitmaps("--add", path, name)
    if complaints and not records(path, name):
        raise _refusal(path, name, complaints)


def records(path: Path, name: str) -> bool:
    """Does a bitmap of an image record, and can it be trusted?"""
    found = next((bitmap for bitmap in image_info(path, QCOW2).bitmaps if bitmap.name == name), None)
    return found is not None and found.recording and not found.inconsistent


def require_room(path: Path, size: int, granularities: Sequence[int], name: str) -> None:
    """
    Make sure that a file's storage has room for one more bitmap, before QEMU opens the image for writing.

    While QEMU closes an image it stores all bitmaps anew, besides their former copies.  Without room for that it loses
    all of them, so that an attempt would cost the bitmaps that are there.  Of a block device nobody knows what is free.

    Parameters
    ----------
    size : int
        The disk's, in bytes.
    granularities : sequence of int
        Of the bitmaps that are there.

    Raises
    ------
    BitmapRefused
        The file system has less free space than that.
    """
    if not path.is_file():
        return
    try:
        with open(path, "rb") as file:
            found = os.fstatvfs(file.fileno())
            cluster = 1 << int.from_bytes(file.read(24)[20:24], "big")
    except OSError:
        return  # QEMU says best what is wrong
    if found.f_flag & os.ST_RDONLY:
        return  # which is the reason then, and not that nothing is free there
    free = found.f_frsize * (found.f_bfree if os.geteuid() == 0 else found.f_bavail)
    needed = _bitmaps_room(size, [*granularities, max(cluster, 4096)], cluster)
    if found.f_blocks and free < needed:
        raise BitmapRefused(path, name, f"{_NO_ROOM} ({free} bytes are free, and QEMU may need {needed})")


def _bitmaps_room(size: int, granularities: Sequence[int], cluster: int) -> int:
    """Bytes that the bitmaps of a disk take at most: each one's bits and table, and what refers to them all."""

    def clusters(length: int) -> int:
        return -(-length // cluster)

    bits = [clusters(-(-size // (8 * granularity))) for granularity in granularities]
    directory = clusters(_DIRECTORY_ENTRY * len(granularities))
    counts = 2
    return cluster * (sum(found + clusters(8 * found) for found in bits) + directory + counts)


def remove_bitmap(path: Path, name: str) -> None:
    """
    Remove a bitmap, also an inconsistent one.

    Raises
    ------
    ImageLocked, SourceError
        The image is in use, QEMU refuses, or it lost other bitmaps.
    """
    complaints = _change_bitmaps("--remove", path, name)
    if complaints:
        raise SourceError(
            f"QEMU complained while it removed bitmap {name}: {one_line(complaints)}",
            hint=f"look at it with: qemu-img info {path}",
        )


def _change_bitmaps(action: str, path: Path, name: str) -> str:
    """Add or remove a bitmap; what qemu-img complained of although it ended with 0."""

    def attempt() -> str:
        try:
            return finish(["qemu-img", "bitmap", action, "-f", QCOW2, filename(path), name]).stderr
        except ProgramFailed as error:
            found = image_error(path, error.stderr)
            if action != "--add" or isinstance(found, ImageLocked):
                raise found from None
            raise _refusal(path, name, error.stderr) from None

    return patiently(attempt)


def _refusal(path: Path, name: str, complaints: str) -> BitmapRefused:
    """Why a bitmap was not added, in words that are the same every night."""
    text = one_line(complaints).removeprefix("qemu-img: ")[:_LONGEST_REASON]
    of_system = next((why for why in (*_UNWRITABLE, *_FULL) if why in text), None)
    if of_system in _UNWRITABLE:
        return BitmapRefused(path, name, f"the image cannot be opened for writing ({of_system})", lasting=True)
    return BitmapRefused(path, name, f"{_NO_ROOM} ({of_system})" if of_system else text)


@contextmanager
def throw_away(base: Path) -> Iterator[int]:
    """
    Make an overlay on a qcow2 image in a file without a name in the temporary folder ($TMPDIR); its descriptor.

    Raises
    ------
    Failed
        The folder takes no file.
    """
    folder = Path(tempfile.gettempdir())
    try:
        fd = _nameless(folder)
    except OSError as error:
        raise Failed(
            f"no overlay can be made in {folder}: {error.strerror}", hint="name another folder with TMPDIR=DIR"
        ) from None
    try:
        create = ["qemu-img", "create", "-q", "-f", QCOW2, "-b", filename(base), "-F", QCOW2]
        run([*create, f"/proc/self/fd/{fd}"], pass_fds=[fd])
        yield fd
    finally:
        os.close(fd)


def create_scratch(folder: Path, size: int) -> int:
    """
    Make an empty qcow2 image of `size` bytes in a file without a name, and return its descriptor.

    Whoever has it open uses it; when the last one is gone, so is the file: nothing can be left behind.

    Raises
    ------
    Failed
        The folder takes no file.
    """
    try:
        fd = _nameless(folder)
    except OSError as error:
        raise Failed(
            f"no scratch file can be made in {folder}: {error.strerror}",
            hint="name another folder with --scratch (`scratch:` in the configuration)",
        ) from None
    try:
        run(["qemu-img", "create", "-q", "-f", QCOW2, f"/proc/self/fd/{fd}", str(size)], pass_fds=[fd])
    except BaseException:
        os.close(fd)
        raise
    return fd


def _nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
            raise
    fd, name = tempfile.mkstemp(prefix="pybackup-", suffix=".scratch", dir=folder)  # NFS has no nameless files
    os.unlink(name)
    return fd


def _run_on_image(command: Sequence[str], path: Path, codes: Sequence[int] = (0,)) -> str:
    def attempt() -> str:
        try:
            return run(command, codes)
        except ProgramFailed as error:
            raise image_error(path, error.stderr) from None

    return patiently(attempt)


def patiently(action: Callable[[], _T]) -> _T:
    """Try again for a moment while another program has the image's lock."""
    for _ in range(_LOCK_TRIES - 1):
        try:
            return action()
        except ImageLocked:
            time.sleep(_LOCK_PAUSE)
    return action()


def image_error(path: Path, stderr: str) -> BackupError:
    """What a program's complaint about an image means."""
    text = one_line(stderr)
    if "lock" in text and ("Failed to get" in text or "Is another process using" in text):
        return ImageLocked(path, text)
    return SourceError(f"{path} cannot be used: {text}", hint=f"look at it with: qemu-img info --backing-chain {path}")
