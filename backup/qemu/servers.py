"""qemu-nbd servers: one for an image that pybackup reads, and one that gives other programs a point of a chain."""

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
from backup.qemu.images import QCOW2, image_error, retry_while_locked
from backup.qemu.programs import Process, dies_with_us, filename

_START_SECONDS = 30.0
"""Time for a server to begin to answer; before that it opens the whole backing chain."""
_SocketAddress = str | tuple[str, int]
"""The path of a Unix socket, or a TCP address and port."""


@contextmanager
def serve_image(
    path: Path,
    image_format: str,
    bitmaps: Sequence[str],
    connections: int,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[str]:
    """
    Serve an image read-only with qemu-nbd and yield the NBD URI.  QEMU's lock keeps writers out during the block.

    `meanwhile` is called while the server starts.

    The socket lies in a folder of mode 0700.  The server dies with this process, even if the process is killed.  A
    read-only server may be killed at any time.

    Raises
    ------
    ImageLocked
        Another program uses the image.
    SourceError
        The image cannot be served, or cannot be read; in that case the message contains qemu-nbd's reason.
    """
    with private_folder() as folder:
        address = str(folder / "nbd")
        command = [*dies_with_us(), *_serve_command(path, image_format, bitmaps, connections, address)]
        # Complaints go to a file, since a server that prints a lot would block on a pipe that is not read.
        with open(folder / "log", "w+", errors="replace") as complaints:
            server = retry_while_locked(lambda: _start(command, address, path, complaints, meanwhile=meanwhile))
            try:
                yield f"nbd+unix:///?socket={quote(os.fsencode(address))}"
            except SourceError as error:
                raise _with_reason(path, error, complaints) from None
            finally:
                programs.kill(server)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server for other programs listens: on a Unix socket of mode 0600, or on a TCP port of address `bind`."""

    socket: Path | None
    bind: str = "127.0.0.1"
    port: int = 0

    @property
    def uri(self) -> str:
        """The NBD URI of the server."""
        if self.socket is not None:
            return f"nbd+unix:///?socket={quote(os.fsencode(filename(self.socket)))}"
        host = socket.gethostname() if self.bind in {"0.0.0.0", "::"} else self.bind  # noqa: S104 - compared, not bound
        return f"nbd://{f'[{host}]' if ':' in host else host}:{self.port}/"

    @property
    def options(self) -> list[str]:
        """The address as options of qemu-nbd."""
        if self.socket is not None:
            return [f"--socket={filename(self.socket)}"]
        return [f"--bind={self.bind}", f"--port={self.port}"]

    @property
    def for_socket(self) -> _SocketAddress:
        """The address for Python's socket functions."""
        return (self.bind, self.port) if self.socket is None else filename(self.socket)

    def require_free(self) -> None:
        """
        Make sure that a server can listen at this address.

        qemu-nbd itself would take over the socket of another program.

        Raises
        ------
        UsageError, Failed
            The address is in use or cannot be used.
        """
        if self.socket is not None:
            if os.path.lexists(self.socket):
                raise UsageError(
                    f"{self.socket} exists already",
                    hint="name another socket, or remove this one if a killed run left it",
                )
            if len(os.fsencode(filename(self.socket))) > sockets.LONGEST:
                raise UsageError(
                    f"{self.socket} is too long for a socket",
                    hint=f"the kernel allows {sockets.LONGEST} bytes; name a shorter path",
                )
        try:
            with socket.socket(_family(self.for_socket)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(self.for_socket)
            if self.socket is not None:
                self.socket.unlink()
        except (OSError, TypeError) as error:  # TypeError: the name of the host contains impossible characters
            place = f"port {self.port} of {self.bind}" if self.socket is None else f"the socket {self.socket}"
            other = "another port, or an address of this host" if self.socket is None else "a folder that takes files"
            why = getattr(error, "strerror", None) or error
            raise Failed(f"{place} cannot be used: {why}", hint=f"choose {other}") from None


class PointServer:
    """A running server of `serve_point`."""

    def __init__(self, server: Process, path: Path, complaints: IO[str]) -> None:
        self._server, self._path, self._complaints = server, path, complaints

    def wait(self) -> None:
        """
        Wait until a signal interrupts the wait.

        Raises
        ------
        SourceError
            The server ended.
        """
        self._server.wait()
        raise _why_it_ended(self._server, self._path, self._complaints)


@contextmanager
def serve_point(path: Path, address: Address, overlay: int | None = None) -> Iterator[PointServer]:
    """
    Serve a qcow2 image to other programs: read-only, or writable with an `overlay` that takes the writes.

    `overlay` is the descriptor of an unnamed image on top of `path`.  The server ends with the block, and dies with
    this process.

    Raises
    ------
    BackupError
        The address is in use, or the image cannot be served.
    """
    address.require_free()
    serve = [*dies_with_us(), "qemu-nbd", "--persistent", "--shared=0", "-f", QCOW2, *address.options]
    if overlay is None:
        serve += ["--read-only", "--", filename(path)]
    else:
        serve += ["--", f"/proc/self/fd/{overlay}"]
    inherited = () if overlay is None else (overlay,)
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        server = _start(serve, address.for_socket, path, complaints, pass_fds=inherited)
        try:
            yield PointServer(server, path, complaints)
        finally:
            programs.kill(server)
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
    Return the size (bytes) of an L2 table of a qcow2 image, which is one cluster; None if the header is invalid.

    By default QEMU reads tables in slices of 4 KiB (qcow2-cache.txt), which suits the random reads of a machine.  A
    client that asks about a whole disk would wait 16 times for each table: 1.4 s instead of 0.1 s on a disk of 1 TiB
    with data everywhere.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(24)
    except OSError:
        return None  # QEMU's own message will be more exact
    bits = int.from_bytes(head[20:24], "big")
    return 1 << bits if len(head) == 24 and 9 <= bits <= 21 else None


def _with_reason(path: Path, error: SourceError, complaints: IO[str]) -> SourceError:
    """
    Return the reason why reading failed, if qemu-nbd printed one; otherwise `error`.

    If the image cannot be read in the middle of a reply, qemu-nbd closes the connection, and the client learns no more.
    """
    complaints.seek(0)
    for line in complaints.read(64 << 10).splitlines():
        _, marker, reason = line.partition("Failed to send reply: ")
        if marker and "Unable to write to socket" not in reason:
            return SourceError(
                f"{path}: reading failed: {reason}",
                hint=f"no point was made; check the storage below the image, and run: qemu-img check {path}",
            )
    return error


def _start(
    command: Sequence[str],
    address: _SocketAddress,
    path: Path,
    complaints: IO[str],
    *,
    meanwhile: Callable[[], object] = lambda: None,
    pass_fds: Sequence[int] = (),
) -> Process:
    server = programs.popen(command, complaints, pass_fds)
    try:
        meanwhile()
        _wait_until_ready(server, address, path, complaints)
    except BaseException:
        programs.kill(server)
        raise
    return server


def _wait_until_ready(server: Process, address: _SocketAddress, path: Path, complaints: IO[str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _greets(address, deadline):
        if server.poll() is not None:
            raise _why_it_ended(server, path, complaints)
        if time.monotonic() > deadline:
            raise SourceError(
                f"qemu-nbd did not serve {path} within {_START_SECONDS:.0f} s",
                hint="check whether the storage of the image hangs",
            )
        time.sleep(0.001)


def _why_it_ended(server: Process, path: Path, complaints: IO[str]) -> BackupError:
    complaints.seek(0)
    return image_error(path, complaints.read(4000) or f"qemu-nbd ended with status {server.returncode}")


def _family(address: _SocketAddress) -> socket.AddressFamily:
    if isinstance(address, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def _greets(address: _SocketAddress, deadline: float) -> bool:
    """
    Tell whether the server sends its greeting.

    A connection alone proves nothing: qemu-nbd listens before it opens the image, which may still fail.
    """
    with socket.socket(_family(address)) as probe:
        probe.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            probe.connect(address)
            return bool(probe.recv(1))
        except OSError:
            return False
