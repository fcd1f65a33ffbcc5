"""
qemu-img and qemu-nbd: their command lines and their answers.  The only user of `subprocess`.

An image's format is always told to QEMU (`-f`), never guessed by it: a guest that owns a raw disk could write a qcow2
header into it and have QEMU open any file of the host as its backing file.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote

from backup.errors import BackupError, Failed, SourceError
from backup.qemu.truncation import may_be_cut_off

_log = logging.getLogger(__name__)

QCOW2, RAW = "qcow2", "raw"
_QCOW2_MAGIC = b"QFI\xfb"
_START_SECONDS = 30.0
"""How long a server may take to listen: it opens a whole backing chain first."""
_LOCK_TRIES, _LOCK_PAUSE = 5, 0.3
"""
Another program's short look at the image (qemu-img info, a killed run's last qemu-img) must not fail a run: that many
tries, that many seconds apart.
"""
_T = TypeVar("_T")
_PACKAGE = "install QEMU's tools: apt-get install qemu-utils (dnf install qemu-img)"


class ImageLocked(SourceError):
    """QEMU's lock says that another program uses the image."""


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
    """

    path: Path
    format: str
    size: int
    bitmaps: tuple[Bitmap, ...]
    no_bitmaps: str | None
    fulls_only: str | None
    lower: tuple[Layer, ...]
    lower_bitmaps: tuple[str, ...]


def detect_format(path: Path) -> str:
    """
    Qcow2 or raw, from the first four bytes.

    Raises
    ------
    SourceError
        The image cannot be read.
    """
    try:
        # A pipe in the image's place must not hang us.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise SourceError(f"{path} is neither a file nor a block device", hint="check the image's path")
            magic = file.read(4)
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror}", hint="check the image's path and permissions"
        ) from None
    return QCOW2 if magic == _QCOW2_MAGIC else RAW


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
    words = _run(["qemu-img", "--version"]).split()
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
    lower = tuple(_layer(layer["filename"]) for layer in layers[1:])
    return ImageInfo(
        path=path,
        format=image_format,
        size=size,
        bitmaps=tuple(_bitmap(found) for found in data.get("bitmaps", ())),
        no_bitmaps=_why_no_bitmaps(image_format, data, size),
        fulls_only=_why_fulls_only(layers, lower),
        lower=lower,
        lower_bitmaps=tuple(found["name"] for layer in layers[1:] for found in _data(layer).get("bitmaps", ())),
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


def _why_fulls_only(layers: Sequence[Mapping[str, Any]], lower: Sequence[Layer]) -> str | None:
    """Why writes may pass unseen by a bitmap of the topmost of `layers` and by the stat of those below."""
    if "data-file" in _data(layers[0]):
        return "its data lies in an external data file, whose writes no bitmap need see"
    for layer, found in zip(layers[1:], lower, strict=True):
        if "data-file" in _data(layer):
            return f"the data of its backing file {found.path} lies in an external data file, which may change unseen"
        if not found.inode:
            return f"its backing file {found.path} is no plain local file and cannot be watched for changes"
    return None


def _layer(name: str) -> Layer:
    try:
        status = os.stat(name)
    except OSError:
        return Layer(name, 0, 0, 0)  # not a local file (a network source, json:...): see _why_fulls_only
    if not stat.S_ISREG(status.st_mode):
        return Layer(name, 0, 0, 0)  # a block device's stat does not show writes
    return Layer(os.path.abspath(name), status.st_size, status.st_mtime_ns, status.st_ino)


def add_bitmap(path: Path, name: str) -> None:
    """
    Add an enabled, persistent bitmap; QEMU opens the image for writing for that moment.

    Raises
    ------
    ImageLocked, SourceError
        The image is in use, or QEMU refuses.
    """
    _run_on_image(["qemu-img", "bitmap", "--add", "-f", QCOW2, filename(path), name], path)


def remove_bitmap(path: Path, name: str) -> None:
    """
    Remove a bitmap, also an inconsistent one.

    Raises
    ------
    ImageLocked, SourceError
        The image is in use, or QEMU refuses.
    """
    _run_on_image(["qemu-img", "bitmap", "--remove", "-f", QCOW2, filename(path), name], path)


@contextmanager
def served(
    path: Path,
    image_format: str,
    bitmaps: Sequence[str],
    connections: int,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[str]:
    """
    Serve an image read-only with qemu-nbd and yield the NBD URI; QEMU's lock keeps writers out meanwhile.

    `meanwhile` is called while the server starts.

    The socket lies in a folder of mode 0700.  The server dies with this process, even when it is killed; a read-only
    server may be killed at any time.

    Raises
    ------
    ImageLocked, SourceError
        The image is in use, cannot be served, or cannot be read (then with what qemu-nbd said of it).
    """
    folder = tempfile.mkdtemp(prefix="pybackup-")
    address = os.path.join(folder, "nbd")
    command = [*_dies_with_us(), *_serve_command(path, image_format, bitmaps, connections, address)]
    try:
        # A file and no pipe: a server that complains a lot must not block on a pipe that nobody empties.
        with open(os.path.join(folder, "log"), "w+", errors="replace") as complaints:
            server = _patiently(lambda: _start(command, address, path, complaints, meanwhile))
            try:
                yield f"nbd+unix:///?socket={quote(address)}"
            except SourceError as error:
                raise _as_told(path, error, complaints) from None
            finally:
                _end(server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve_command(path: Path, image_format: str, bitmaps: Sequence[str], connections: int, address: str) -> list[str]:
    options = [option for name in bitmaps for option in ("-B", name)]
    serve = ["qemu-nbd", "-r", *options, "-t", f"--shared={connections}", f"--socket={address}"]
    entry = _table_bytes(path) if image_format == QCOW2 else None
    if entry is None:
        return [*serve, "-f", image_format, "--", filename(path)]
    name = filename(path).replace(",", ",,")
    return [*serve, "--image-opts", "--", f"driver={QCOW2},l2-cache-entry-size={entry},file.filename={name}"]


def _table_bytes(path: Path) -> int | None:
    """
    Bytes of an L2 table of a qcow2 image: one cluster; None where the header makes no sense.

    QEMU reads tables in slices of 4 KiB unless told otherwise (qcow2-cache.txt), which suits a machine's random reads.
    Who asks about a whole disk waits 16 times for each table: 1.4 s instead of 0.1 s on a disk of 1 TiB with data
    everywhere.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(24)
    except OSError:
        return None  # QEMU says best what is wrong
    bits = int.from_bytes(head[20:24], "big")
    return 1 << bits if len(head) == 24 and 9 <= bits <= 21 else None


def _dies_with_us() -> list[str]:
    """
    What to put before a command so that it dies when this process does (PR_SET_PDEATHSIG).

    A parent that was killed before the setting sends no signal any more, so that the shell looks whether it still is
    the parent.  setpriv is util-linux's and essential on Debian; without it a killed run leaves a read-only server.
    """
    found = shutil.which("setpriv")
    still_there = ["sh", "-c", 'test "$PPID" = "$0" && exec "$@"', str(os.getpid())]
    return [found, "--pdeathsig", "KILL", "--", *still_there] if found else []


def _as_told(path: Path, error: SourceError, complaints: IO[str]) -> SourceError:
    """
    The reason why reading failed, where qemu-nbd told it.

    When the image cannot be read in the middle of a reply, it hangs up, so that the client knows only that much.
    """
    complaints.seek(0)
    for line in complaints.read(64 << 10).splitlines():
        _, marker, reason = line.partition("Failed to send reply: ")
        if marker and "Unable to write to socket" not in reason:
            return SourceError(
                f"{path}: reading failed: {reason}",
                hint=f"no point was made; look at the storage below it, and at: qemu-img check {path}",
            )
    return error


def _start(
    command: Sequence[str], address: str, path: Path, complaints: IO[str], meanwhile: Callable[[], object]
) -> subprocess.Popen[str]:
    server = _popen(command, complaints)
    try:
        meanwhile()
        _await(server, address, path, complaints)
    except BaseException:
        _end(server)
        raise
    return server


def _await(server: subprocess.Popen[str], address: str, path: Path, complaints: IO[str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _greets(address, deadline):
        if server.poll() is not None:
            complaints.seek(0)
            raise _image_error(path, complaints.read(4000) or f"qemu-nbd ended with status {server.returncode}")
        if time.monotonic() > deadline:
            raise SourceError(
                f"qemu-nbd did not serve {path} within {_START_SECONDS:.0f} s", hint="is the storage hanging?"
            )
        time.sleep(0.001)


def _greets(address: str, deadline: float) -> bool:
    """
    Does the server send its greeting?

    qemu-nbd listens before it opens the image: connecting alone would succeed and then hide why it ended.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            probe.connect(address)
            return bool(probe.recv(1))
        except OSError:
            return False


def _end(server: subprocess.Popen[str]) -> None:
    server.terminate()
    try:
        server.wait(timeout=5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def filename(path: Path) -> str:
    """A path as QEMU's programs take it: absolute, so that no colon or dash at its start means anything else."""
    return os.path.abspath(path)


def _run_on_image(command: Sequence[str], path: Path, codes: Sequence[int] = (0,)) -> str:
    def run() -> str:
        try:
            return _run(command, codes)
        except _ProgramFailed as error:
            raise _image_error(path, error.stderr) from None

    return _patiently(run)


def _patiently(action: Callable[[], _T]) -> _T:
    """Try again for a moment while another program has the image's lock."""
    for _ in range(_LOCK_TRIES - 1):
        try:
            return action()
        except ImageLocked:
            time.sleep(_LOCK_PAUSE)
    return action()


class _ProgramFailed(Failed):
    """A program ended with an error."""

    def __init__(self, command: Sequence[str], stderr: str) -> None:
        super().__init__(f"{command[0]} failed: {_one_line(stderr)}", hint=_PACKAGE)
        self.stderr = stderr


def _run(command: Sequence[str], codes: Sequence[int] = (0,)) -> str:
    process = _popen(command, subprocess.PIPE)
    try:
        stdout, stderr = process.communicate()
    except BaseException:
        # A signal stops us, not a qemu-img that is writing an image's bitmaps; it needs only moments.  Its output must
        # be read on: nobody waits for a program that waits for room in a pipe.
        process.communicate()
        raise
    if process.returncode not in codes:
        raise _ProgramFailed(command, stderr)
    return stdout


_KEEP_BUFFERS = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
"""
For glibc's malloc (mallopt(3)): else qemu-nbd gives the buffer of each large read back to the kernel and gets another,
page by page, for the next; that doubles its processor time.
"""


def _popen(command: Sequence[str], stderr: int | IO[str]) -> subprocess.Popen[str]:
    _log.info("run: %s", shlex.join(command))
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if stderr == subprocess.PIPE else subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            errors="replace",
            # A Ctrl-C in the terminal is for us; a qemu-img must not die of it half-way through a write.
            start_new_session=True,
            env={**os.environ, **_KEEP_BUFFERS, "LC_ALL": "C"},
        )
    except OSError as error:
        raise Failed(f"{command[0]} cannot be run: {error.strerror}", hint=_PACKAGE) from None


def _image_error(path: Path, stderr: str) -> BackupError:
    text = _one_line(stderr)
    if "lock" in text and ("Failed to get" in text or "Is another process using" in text):
        return ImageLocked(
            f"{path} is in use by another program: {text}",
            hint="if a machine runs on it: use --qmp (to come), or shut it down; else wait for the other program",
        )
    return SourceError(f"{path} cannot be used: {text}", hint=f"look at it with: qemu-img info --backing-chain {path}")


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[:3]) or "no message"
