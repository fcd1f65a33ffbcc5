"""
qemu-img and qemu-nbd (and guestfish): their command lines and answers.  The only user of `subprocess`.

An image's format is always told to QEMU (`-f`), never guessed by it: a guest that owns a raw disk could write a qcow2
header into it and have QEMU open any file of the host as its backing file.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote

from backup.errors import BackupError, Damaged, Failed, SourceError, UsageError
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
_LONGEST_FOLDER = 80
"""Bytes of a temporary folder's path that leave room for a folder and a socket in it."""
_T = TypeVar("_T")
_Where = str | tuple[str, int]
"""A Unix socket's path, or a TCP address and port."""
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
    lower = tuple(look_at(layer["filename"]) for layer in layers[1:])
    return ImageInfo(
        path=path,
        format=image_format,
        size=size,
        bitmaps=tuple(_bitmap(found) for found in data.get("bitmaps", ())),
        no_bitmaps=_why_no_bitmaps(image_format, data, size),
        fulls_only=why_fulls_only([_data(layer) for layer in layers], lower),
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


def why_fulls_only(details: Sequence[Mapping[str, Any]], lower: Sequence[Layer]) -> str | None:
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
        return Layer(name, 0, 0, 0)  # not a local file (a network source, json:...): see why_fulls_only
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
    with private_folder() as folder:
        address = str(folder / "nbd")
        command = [*_dies_with_us(), *_serve_command(path, image_format, bitmaps, connections, address)]
        # A file and no pipe: a server that complains a lot must not block on a pipe that nobody empties.
        with open(folder / "log", "w+", errors="replace") as complaints:
            server = _patiently(lambda: _start(command, address, path, complaints, meanwhile=meanwhile))
            try:
                yield f"nbd+unix:///?socket={quote(os.fsencode(address))}"
            except SourceError as error:
                raise _as_told(path, error, complaints) from None
            finally:
                _end(server)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server of our own listens: a Unix socket (mode 0600), or a TCP port of the host's address `bind`."""

    socket: Path | None
    bind: str = "127.0.0.1"
    port: int = 0

    @property
    def uri(self) -> str:
        """The NBD URI of what is served there."""
        if self.socket is not None:
            return f"nbd+unix:///?socket={quote(os.fsencode(filename(self.socket)))}"
        host = socket.gethostname() if self.bind in {"0.0.0.0", "::"} else self.bind  # noqa: S104 - compared, not bound
        return f"nbd://{f'[{host}]' if ':' in host else host}:{self.port}/"

    @property
    def options(self) -> list[str]:
        """As qemu-nbd takes it."""
        if self.socket is not None:
            return [f"--socket={filename(self.socket)}"]
        return [f"--bind={self.bind}", f"--port={self.port}"]

    @property
    def where(self) -> _Where:
        """As sockets take it."""
        return (self.bind, self.port) if self.socket is None else filename(self.socket)

    def require_free(self) -> None:
        """
        Make sure that a server can listen there, and takes no other program's socket away, as qemu-nbd would.

        Raises
        ------
        UsageError, Failed
            It is taken, or cannot be one.
        """
        if self.socket is not None:
            if os.path.lexists(self.socket):
                raise UsageError(
                    f"{self.socket} exists already", hint="name another, or remove it if a killed run left it"
                )
            if len(os.fsencode(filename(self.socket))) > _LONGEST_SOCKET:
                raise UsageError(
                    f"{self.socket} is too long for a socket",
                    hint=f"the kernel allows {_LONGEST_SOCKET} bytes; name a shorter path",
                )
        try:
            with socket.socket(_family(self.where)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(self.where)
            if self.socket is not None:
                self.socket.unlink()
        except (OSError, TypeError) as error:  # the latter of a host's name that none can have
            place = f"port {self.port} of {self.bind}" if self.socket is None else f"the socket {self.socket}"
            other = "another port, or an address of this host" if self.socket is None else "a folder that takes files"
            why = getattr(error, "strerror", None) or error
            raise Failed(f"{place} cannot be used: {why}", hint=f"choose {other}") from None


_LONGEST_SOCKET = 107
"""Bytes, of unix(7)'s sun_path."""


class Lent:
    """A running server of `lent`."""

    def __init__(self, server: subprocess.Popen[str], path: Path, complaints: IO[str]) -> None:
        self._server, self._path, self._complaints = server, path, complaints

    def wait(self) -> None:
        """
        Wait until the server ends; only a signal to this process ends the wait well.

        Raises
        ------
        SourceError
            It ended.
        """
        self._server.wait()
        raise _why_it_ended(self._server, self._path, self._complaints)


@contextmanager
def lent(path: Path, address: Address, overlay: int | None = None) -> Iterator[Lent]:
    """
    Serve a qcow2 image to whoever comes, read-only, or for writing over the nameless image `overlay` (a descriptor).

    The server ends with the block, and dies with this process.

    Raises
    ------
    BackupError
        The address is taken, or the image cannot be served.
    """
    address.require_free()
    serve = [*_dies_with_us(), "qemu-nbd", "--persistent", "--shared=0", "-f", QCOW2, *address.options]
    if overlay is None:
        serve += ["--read-only", "--", filename(path)]
    else:
        serve += ["--", f"/proc/self/fd/{overlay}"]
    kept = () if overlay is None else (overlay,)
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        server = _start(serve, address.where, path, complaints, pass_fds=kept)
        try:
            yield Lent(server, path, complaints)
        finally:
            _end(server)
            if address.socket is not None:
                address.socket.unlink(missing_ok=True)


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
        _run([*create, f"/proc/self/fd/{fd}"], pass_fds=[fd])
        yield fd
    finally:
        os.close(fd)


@contextmanager
def private_folder() -> Iterator[Path]:
    """
    Make a folder for a socket that only this user can reach; it is removed with what it holds.

    The kernel frees the flock that is held on it however this process ends.  So a folder that gives the lock is what a
    killed run left, and goes too.
    """
    folder = Path(socket_folder(_PRIVATE))
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # a file system without locks: then none of these is removed by others
                fcntl.flock(lock, fcntl.LOCK_EX)
            _remove_orphans(folder.parent)
            yield folder
        finally:
            os.close(lock)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_PRIVATE = "pybackup-own-"
_YOUNG = 60.0
"""Seconds: a folder that was just made may not be locked yet."""


def _remove_orphans(place: Path) -> None:
    for folder in place.glob(f"{_PRIVATE}*"):
        with suppress(OSError):  # another user's, in use, or gone
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if status.st_uid == os.geteuid() and time.time() - status.st_mtime > _YOUNG:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)


def socket_folder(prefix: str = "pybackup-") -> str:
    """
    Make a folder of mode 0700 for a socket.

    A socket's path has at most 107 bytes (unix(7)); where the temporary folder's leaves no room it is made in /tmp.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        folder = "/tmp"  # noqa: S108 - what mkdtemp makes in it is ours alone
    return tempfile.mkdtemp(prefix=prefix, dir=folder)


class GuestfishError(Failed):
    """Guestfish refused a command; `text` is what it said."""

    def __init__(self, text: str) -> None:
        super().__init__(f"libguestfs: {text}", hint="libguestfs-test-tool shows whether libguestfs works here")
        self.text = text


class Guestfish:
    """A guestfish that is asked one command after the other; it writes files into `pipe` (reading, writing end)."""

    def __init__(self, process: subprocess.Popen[bytes], complaints: IO[str], pipe: tuple[int, int]) -> None:
        self._process, self._complaints, self._pipe = process, complaints, pipe
        self._heard = 0

    def ask(self, command: str, *arguments: str) -> bytes:
        """
        Run one command; what it printed.

        Raises
        ------
        GuestfishError
            It failed.
        """
        end = self._send(command, *arguments)
        said = bytearray()
        while not said.endswith(end):
            chunk = os.read(self._stdout, 1 << 20)
            if not chunk:
                raise self._end()
            said += chunk
        self._require_success()
        return bytes(said.removesuffix(end))

    @contextmanager
    def stream(self, command: str, path: str) -> Iterator[Stream]:
        """
        Run a command that writes a file (`download`, `tar-out`), and yield what it writes, as it comes.

        Another error than Damaged in the block ends guestfish.

        Raises
        ------
        GuestfishError
            It failed; then what was read is not all.
        """
        stream = Stream(self._pipe[0], self._stdout, self._send(command, path, f"/dev/fd/{self._pipe[1]}"))
        cut_off = None
        try:
            yield stream
        except Damaged as error:
            cut_off = error  # guestfish knows best why
        except BaseException:
            self._process.kill()  # what it goes on to write would be taken for the next command's
            raise
        while stream.read():
            pass
        if not stream.complete:
            raise self._end()
        self._require_success()
        if cut_off is not None:
            raise cut_off

    @property
    def _stdout(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def _send(self, command: str, *arguments: str) -> bytes:
        """Give a command; what guestfish prints when it is done."""
        mark = f"pybackup-{os.urandom(8).hex()}"
        line = " ".join([f"-{command}", *map(_quoted, arguments)])  # the dash: an error does not end guestfish
        if len(line) > _LONGEST_LINE:
            raise UsageError("the path is too long for guestfish", hint="name a folder above it")
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\necho {mark}\n".encode())
            self._process.stdin.flush()
        return f"{mark}\n".encode()

    def _require_success(self) -> None:
        text = self._complained()
        if "error: " in text:
            raise GuestfishError(text.partition("error: ")[2])

    def _end(self) -> GuestfishError:
        return GuestfishError(self._complained() or "guestfish ended")

    def _complained(self) -> str:
        self._complaints.seek(self._heard)
        text = self._complaints.read()
        self._heard = self._complaints.tell()
        return _one_line(text) if text.strip() else ""


class Stream:
    """What a command of guestfish writes into the pipe `data`, until it prints `end` on `stdout` (descriptors)."""

    def __init__(self, data: int, stdout: int, end: bytes) -> None:
        self._data, self._stdout, self._end = data, stdout, end
        self._said = b""
        self._ended = False
        self._poll = select.poll()  # not select: the files of a long chain are open besides
        for fd in (data, stdout):
            self._poll.register(fd, select.POLLIN)

    def read(self, size: int = 1 << 16) -> bytes:
        """At most `size` bytes; none at the end."""
        while True:
            ready = dict(self._poll.poll(0 if self._ended else None))
            if ready.get(self._data, 0) & select.POLLIN:
                return os.read(self._data, size)
            if self._ended:
                return b""
            chunk = os.read(self._stdout, 1 << 16)
            self._said += chunk
            self._ended = not chunk or self.complete

    @property
    def complete(self) -> bool:
        """Did the command come to its end?"""
        return self._said.endswith(self._end)


_LONGEST_LINE = 8000
"""Characters; guestfish reads lines into a buffer of 8192."""
_HARMLESS = re.compile(rb"[A-Za-z0-9/._-]")


def _quoted(text: str) -> str:
    """An argument as guestfish reads it: every byte that could mean anything to it by its number."""
    return '"' + "".join(chr(b) if _HARMLESS.match(bytes([b])) else f"\\x{b:02x}" for b in os.fsencode(text)) + '"'


@contextmanager
def guestfish(image: Path) -> Iterator[Guestfish]:
    """
    Start guestfish with a qcow2 image, which it does not change; it and its QEMU end with the block.

    Raises
    ------
    Failed
        It is not installed.
    """
    if not shutil.which("guestfish"):
        raise Failed(
            "guestfish is not installed, and only libguestfs can read a guest's file system without root",
            hint="apt-get install guestfish (dnf install guestfs-tools); or see pybackup serve",
        )
    command = [*_dies_with_us(), "guestfish", "--ro", f"--format={QCOW2}", "-a", filename(image)]
    with private_folder() as folder, tempfile.TemporaryFile("w+", errors="replace") as complaints:
        # libguestfs' default is libvirt, where there is one, which may not read what only we may read.
        backend = os.environ.get("LIBGUESTFS_BACKEND", "direct")
        environment = {**os.environ, "LC_ALL": "C", "LIBGUESTFS_BACKEND": backend, "LIBGUESTFS_TMPDIR": str(folder)}
        _log.info("run: %s", shlex.join(command))
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,
                env=environment,
                pass_fds=[writing],
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)  # so that it ends with guestfish
        try:
            yield Guestfish(process, complaints, (reading, writing))
        finally:
            os.close(reading)
            # With its QEMU, which has nothing to lose.  A session of its own is a process group of its own.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    assert pipe is not None
                    pipe.close()


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
        _run(["qemu-img", "create", "-q", "-f", QCOW2, f"/proc/self/fd/{fd}", str(size)], pass_fds=[fd])
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
    command: Sequence[str],
    address: _Where,
    path: Path,
    complaints: IO[str],
    *,
    meanwhile: Callable[[], object] = lambda: None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[str]:
    server = _popen(command, complaints, pass_fds)
    try:
        meanwhile()
        _await(server, address, path, complaints)
    except BaseException:
        _end(server)
        raise
    return server


def _await(server: subprocess.Popen[str], address: _Where, path: Path, complaints: IO[str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _greets(address, deadline):
        if server.poll() is not None:
            raise _why_it_ended(server, path, complaints)
        if time.monotonic() > deadline:
            raise SourceError(
                f"qemu-nbd did not serve {path} within {_START_SECONDS:.0f} s", hint="is the storage hanging?"
            )
        time.sleep(0.001)


def _why_it_ended(server: subprocess.Popen[str], path: Path, complaints: IO[str]) -> BackupError:
    complaints.seek(0)
    return _image_error(path, complaints.read(4000) or f"qemu-nbd ended with status {server.returncode}")


def _family(address: _Where) -> socket.AddressFamily:
    if isinstance(address, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def _greets(address: _Where, deadline: float) -> bool:
    """
    Does the server send its greeting?

    qemu-nbd listens before it opens the image: connecting alone would succeed and then hide why it ended.
    """
    with socket.socket(_family(address)) as probe:
        probe.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            probe.connect(address)
            return bool(probe.recv(1))
        except OSError:
            return False


def _end(server: subprocess.Popen[str]) -> None:
    # A read-only server has nothing to tidy up, and one that is asked to end takes its time to.
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


def _run(command: Sequence[str], codes: Sequence[int] = (0,), pass_fds: Sequence[int] = ()) -> str:
    process = _popen(command, subprocess.PIPE, pass_fds)
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


def _popen(command: Sequence[str], stderr: int | IO[str], pass_fds: Sequence[int] = ()) -> subprocess.Popen[str]:
    _log.info("run: %s", shlex.join(command))
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if stderr == subprocess.PIPE else subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
            # A Ctrl-C in the terminal is for us; a qemu-img must not die of it half-way through a write.
            start_new_session=True,
            umask=0o077,  # of a server's socket: who may connect may read everything
            env={**os.environ, **_KEEP_BUFFERS, "LC_ALL": "C"},
        )
    except OSError as error:
        raise Failed(f"{command[0]} cannot be run: {error.strerror}", hint=_PACKAGE) from None


def _image_error(path: Path, stderr: str) -> BackupError:
    text = _one_line(stderr)
    if "lock" in text and ("Failed to get" in text or "Is another process using" in text):
        return ImageLocked(
            f"{path} is in use by another program: {text}",
            hint="if a machine runs on it: use --qmp, or shut it down; else wait for the other program",
        )
    return SourceError(f"{path} cannot be used: {text}", hint=f"look at it with: qemu-img info --backing-chain {path}")


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[:3]) or "no message"
