"""
Images: their format, what qemu-img reports about them, and the lock that other programs hold.

pybackup always tells QEMU the format of an image (`-f`); QEMU must not detect it.  A guest that owns a raw disk could
write a qcow2 header into it, and QEMU would open any file of the host as the backing file.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from backup.errors import BackupError, SourceError
from backup.model.disk import ExternalFile
from backup.qemu.programs import ProgramFailed, filename, one_line, stdout_of
from backup.qemu.truncation import may_be_truncated
from backup.runtime.ignoring import ignoring

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
QCOW2, RAW = "qcow2", "raw"
_VERSION = re.compile(rb"qemu-img version (\d+(?:\.\d+)+)")
"""The line of `qemu-img --version`, as the compiler puts it into the program."""
_QCOW2_MAGIC = b"QFI\xfb"
_HEAD_BYTES = 128
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
Offset and bytes by which QEMU recognizes other formats (the probe functions in block/).  LUKS is missing, because many
guests begin their raw disks with a LUKS header.
"""
_LOCK_TRIES, _LOCK_PAUSE = 5, 0.3
"""
Number of tries, and seconds between them, while an image is locked.  A short access of another program (qemu-img info,
or the last qemu-img of a killed run) must not fail a backup.
"""


class ImageLocked(SourceError):
    """QEMU's lock shows that another program uses the image, or a file below the image."""

    def __init__(self, path: Path | str, why: str) -> None:
        super().__init__(
            f"{path} is in use by another program: {why}",
            hint="if a machine runs on it, use --qmp or shut the machine down; otherwise wait for the other program",
        )


@dataclass(frozen=True, slots=True)
class ImageBitmap:
    """A persistent dirty bitmap of an image that no QEMU has open.  `granularity` in bytes."""

    name: str
    granularity: int
    recording: bool
    inconsistent: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """A file of an image's backing chain, with its stat: size in bytes, mtime in ns, inode."""

    path: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """
    The properties of an image that no QEMU has open.

    `size` is the virtual size in bytes, exact also for a raw image.  `no_bitmaps` is the reason why the image cannot
    hold bitmaps, and `unseen_writes` why writes can bypass them; None if there is no such reason.  `lower` are the
    files of the backing chain below the image, nearest first, and `lower_bitmaps` the names of the bitmaps in them.
    `encrypted` is true if the image, or a file below it, cannot be read without a key.  `data_file` is the name of the
    external data file as the image's header gives it; None: there is none.
    """

    path: Path
    format: str
    size: int
    bitmaps: tuple[ImageBitmap, ...]
    no_bitmaps: str | None
    unseen_writes: str | None
    lower: tuple[Layer, ...]
    lower_bitmaps: tuple[str, ...]
    encrypted: bool
    data_file: str | None


def detect_format(path: Path) -> str:
    """
    Return QCOW2 or RAW, according to the first bytes of an image.

    Raises
    ------
    SourceError
        The image does not exist or cannot be read.
    """
    return QCOW2 if _head(path).startswith(_QCOW2_MAGIC) else RAW


def foreign_format(path: Path) -> str | None:
    """
    Return QEMU's name of another format (vmdk, vdi, ...) that the first bytes show; None if they show none.

    Raises
    ------
    SourceError
        The image does not exist or cannot be read.
    """
    head = _head(path)
    return next((name for at, magic, name in _FOREIGN if head[at:].startswith(magic)), None)


def _head(path: Path) -> bytes:
    """Return the first bytes of an image, enough to recognize its format."""
    try:
        # O_NONBLOCK: opening a pipe at this path must not wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise SourceError(f"{path} is neither a file nor a block device", hint="check the path of the image")
            return file.read(_HEAD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(f"there is no image {path}", hint="check --image, or `image:` in the configuration") from None
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror}", hint="check the path and the permissions of the image"
        ) from None


def require_not_truncated(path: Path) -> None:
    """
    Refuse a qcow2 image whose file is truncated, since QEMU would read the lost clusters as zeroes.

    Call this before anything writes to the image: a new bitmap extends the file, and hides that it was truncated.

    Raises
    ------
    SourceError
        The image refers to clusters beyond the end of its file.
    """
    with open(path, "rb") as file:
        mode, size = os.fstat(file.fileno()).st_mode, os.fstat(file.fileno()).st_size
        if not stat.S_ISREG(mode) or not may_be_truncated(file, size):
            return
    report = _run_on_image(["qemu-img", "check", "--output=json", "-f", QCOW2, filename(path)], path, codes=(0, 2, 3))
    errors = json.loads(report).get("corruptions", 0)
    if errors:
        raise SourceError(
            f"{path} is damaged: it refers to {errors} clusters that are not in its {size} bytes; was it truncated?",
            hint=f"run: qemu-img check {path}; restore the image from an earlier point",
        )


@functools.cache
def qemu_version() -> str:
    """
    Return QEMU's version as qemu-img reports it ("7.2.22", for example).

    The version stands in the program's file, which takes a fiftieth of the time of a start.  A script in the place of
    the program has no version in its file: then qemu-img runs, once in a process.
    """
    program = shutil.which("qemu-img")
    with ignoring(_log, "reading the version in the file of qemu-img", OSError):
        found = _VERSION.search(Path(program).read_bytes()) if program else None
        if found is not None:
            return found[1].decode()
    words = stdout_of(["qemu-img", "--version"]).split()
    return words[2] if len(words) > 2 else "unknown"


def image_info(path: Path, image_format: str, *, shared: bool = False) -> ImageInfo:
    """
    Ask qemu-img about an image and its backing chain.

    `shared`: also if a running machine has the image open.  Then QEMU may have bitmaps that are not in the image yet,
    and all bitmaps in the image are in use.

    Raises
    ------
    ImageLocked
        Another program, such as a running machine, has the image open for writing.
    SourceError
        The image has another format, or a file below it is missing.
    """
    sharing = ["--force-share"] if shared else []
    command = ["qemu-img", "info", "--output=json", "--backing-chain", *sharing, "-f", image_format, filename(path)]
    layers = json.loads(_run_on_image(command, path))
    data = _data(layers[0])
    size = os.stat(path).st_size if image_format == RAW and path.is_file() else int(layers[0]["virtual-size"])
    lower = tuple(stat_layer(layer["filename"]) for layer in layers[1:])
    return ImageInfo(
        path=path,
        format=image_format,
        size=size,
        bitmaps=tuple(_bitmap(entry) for entry in data.get("bitmaps", ())),
        no_bitmaps=_why_no_bitmaps(image_format, data, size),
        unseen_writes=why_unseen_writes([_data(layer) for layer in layers], lower),
        lower=lower,
        lower_bitmaps=tuple(entry["name"] for layer in layers[1:] for entry in _data(layer).get("bitmaps", ())),
        encrypted=any(layer.get("encrypted", False) for layer in layers),
        data_file=data.get("data-file"),
    )


def _data(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the facts of qemu-img that are specific to the format."""
    data: Mapping[str, Any] = layer.get("format-specific", {}).get("data", {})
    return data


def _bitmap(entry: Mapping[str, Any]) -> ImageBitmap:
    flags = entry.get("flags", ())
    return ImageBitmap(entry["name"], int(entry["granularity"]), "auto" in flags, "in-use" in flags)


def _why_no_bitmaps(image_format: str, data: Mapping[str, Any], size: int) -> str | None:
    if image_format == RAW:
        return "a raw image cannot hold dirty bitmaps"
    if data.get("compat") == "0.10":
        return "a qcow2 image of version 2 cannot hold dirty bitmaps (qemu-img amend -o compat=1.1 upgrades it)"
    if size == 0:
        return "QEMU keeps no dirty bitmap in an image of no bytes"  # qemu-img prints this too, but exits with 0
    return None


def why_unseen_writes(details: Sequence[Mapping[str, Any]], lower: Sequence[Layer]) -> str | None:
    """
    Return why writes can bypass a bitmap of the topmost image and the stat of the files below it; None if they cannot.

    An external data file of the topmost image is no reason here: the user may trust it (`DiskState.trusts_data_file`).

    `details` are the facts specific to the format, of the image and of each file in `lower`, as qemu-img info and QMP
    report them.
    """
    for data, layer in zip(details[1:], lower, strict=True):
        if "data-file" in data:
            return f"the data of its backing file {layer.path} lies in an external data file, which may change unseen"
        if not layer.inode:
            return f"its backing file {layer.path} is no plain local file and cannot be watched for changes"
    return None


def stat_layer(name: str) -> Layer:
    """Stat a file of a backing chain, named as QEMU does.  All numbers are 0 where a stat would not show writes."""
    try:
        status = os.stat(name)
    except OSError:
        return Layer(name, 0, 0, 0)  # not a local file (a network source, json:...); see why_unseen_writes
    if not stat.S_ISREG(status.st_mode):
        return Layer(name, 0, 0, 0)  # the stat of a block device does not show writes
    return Layer(os.path.abspath(name), status.st_size, status.st_mtime_ns, status.st_ino)


def external_data_file(name: str | None, image: str, *, open_in_qemu: bool) -> ExternalFile | None:
    """
    Identify the external data file `name` of an image; None: the image has none.

    `open_in_qemu`: a running machine writes to both files now.

    The name must be an absolute path: QEMU takes a relative one from its working folder, not from the image's.
    """
    if name is None:
        return None
    if not name.startswith("/"):
        return ExternalFile(name, None)
    try:
        status = os.stat(name)
        written = not open_in_qemu and status.st_mtime_ns > os.stat(image).st_mtime_ns
    except OSError:
        return ExternalFile(name, None)
    if stat.S_ISREG(status.st_mode):
        return ExternalFile(name, f"inode {status.st_ino}", written)
    if stat.S_ISBLK(status.st_mode):
        return ExternalFile(name, device_id(status.st_rdev))
    return ExternalFile(name, None)


def device_id(device: int, sysfs: Path = Path("/sys/dev/block")) -> str:
    """Return what identifies a block device after a restart of the host, too: the UUID that LVM gives it."""
    try:
        uuid = (sysfs / f"{os.major(device)}:{os.minor(device)}/dm/uuid").read_text("ascii").strip()
    except (OSError, ValueError):
        uuid = ""
    return f"uuid {uuid}" if uuid else "device"


def _run_on_image(command: Sequence[str], path: Path, codes: Sequence[int] = (0,)) -> str:
    def attempt() -> str:
        try:
            return stdout_of(command, codes)
        except ProgramFailed as error:
            raise image_error(path, error.stderr) from None

    return retry_while_locked(attempt)


def retry_while_locked(action: Callable[[], _T]) -> _T:
    """Call `action` again for about a second while another program has the lock of the image."""
    for _ in range(_LOCK_TRIES - 1):
        try:
            return action()
        except ImageLocked:
            time.sleep(_LOCK_PAUSE)
    return action()


def image_error(path: Path, stderr: str) -> BackupError:
    """Return the error that a program's complaint about an image means."""
    text = one_line(stderr)
    if "lock" in text and ("Failed to get" in text or "Is another process using" in text):
        return ImageLocked(path, text)
    return SourceError(f"{path} cannot be used: {text}", hint=f"see: qemu-img info --backing-chain {path}")
