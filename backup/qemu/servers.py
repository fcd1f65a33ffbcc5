"""
qemu-nbd: an image that we read ourselves, and a point of a chain that is lent to whoever comes.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

from backup.errors import BackupError, Failed, SourceError, UsageError
from backup.qemu import programs, sockets
from backup.qemu.folders import private_folder
from backup.qemu.images import QCOW2, image_error, patiently
from backup.qemu.programs import Process, dies_with_us, filename

_START_SECONDS = 30.0
"""How long a server may take to listen: it opens a whole backing chain first."""
_Where = str | tuple[str, int]
"""A Unix socket's path, or a TCP address and port."""


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
        command = [*dies_with_us(), *_serve_command(path, image_format, bitmaps, connections, address)]
        # A file and no pipe: a server that complains a lot must not block on a pipe that nobody empties.
        with open(folder / "log", "w+", errors="replace") as complaints:
            server = patiently(lambda: _start(command, address, path, complaints, meanwhile=meanwhile))
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
            if len(os.fsencode(filename(self.socket))) > sockets.LONGEST:
                raise UsageError(
                    f"{self.socket} is too long for a socket",
                    hint=f"the kernel allows {sockets.LONGEST} bytes; name a shorter path",
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


class Lent:
    """A running server of `lent`."""

    def __init__(self, server: Process, path: Path, complaints: IO[str]) -> None:
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
    serve = [*dies_with_us(), "qemu-nbd", "--persistent", "--shared=0", "-f", QCOW2, *address.options]
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
) -> Process:
    server = programs.popen(command, complaints, pass_fds)
    try:
        meanwhile()
        _await(server, address, path, complaints)
    except BaseException:
        _end(server)
        raise
    return server


def _await(server: Process, address: _Where, path: Path, complaints: IO[str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _greets(address, deadline):
        if server.poll() is not None:
            raise _why_it_ended(server, path, complaints)
        if time.monotonic() > deadline:
            raise SourceError(
                f"qemu-nbd did not serve {path} within {_START_SECONDS:.0f} s", hint="is the storage hanging?"
            )
        time.sleep(0.001)


def _why_it_ended(server: Process, path: Path, complaints: IO[str]) -> BackupError:
    complaints.seek(0)
    return image_error(path, complaints.read(4000) or f"qemu-nbd ended with status {server.returncode}")


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


def _end(server: Process) -> None:
    # A read-only server has nothing to tidy up, and one that is asked to end takes its time to.
    programs.kill(server)
