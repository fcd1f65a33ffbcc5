"""
pybackup's connections to the NBD server of a running QEMU: how they begin, and how they end before the server ends.

Two bugs of QEMU 7.2 determine the rules.  First, QEMU aborts when a client leaves an export whose disk has an iothread
(an assertion in nbd_blockdev_client_closed; virtnbdbackup #254), and we may be killed at any moment.  Second,
nbd-server-stop blocks QEMU until the last client has left, also a client in its handshake, whose connection does not
end with any export.

`Monitor` passes the commands to QEMU, and so does libvirt (`backup/sources/libvirt_domain.py`).
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from backup.errors import SourceError
from backup.qmp import leftovers
from backup.runtime.ignoring import ignoring

_log = logging.getLogger(__name__)

_DRAIN_SECONDS = 2.0
"""Time to read what a server sent before it closed the connection."""
_ENDED_BY_CLIENTS = (9, 0)
"""Older versions of QEMU may abort.  From this one on, QEMU ends clients in its main loop only."""


def may_abort(version: str) -> bool:
    """Tell whether a QEMU of this version ("7.2.22") may abort when a client leaves a disk with an iothread."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return numbers < _ENDED_BY_CLIENTS


class Keeper(Protocol):
    """A way to pass a file descriptor to QEMU, which keeps it under a name."""

    def pass_fd(self, fd: int, name: str, arguments: Mapping[str, object]) -> Any:
        """Execute the command `name` (getfd) with a descriptor; ours stays open."""


class Clients:
    """
    The connections of one run.  Safe to use from several threads.

    Parameters
    ----------
    own : str
        The prefix of the names of connections in QEMU.
    address : str
        The path of the server's socket.
    stay : bool
        Clients must stay until the server closes the connections, because a disk has an iothread.
    """

    def __init__(self, keeper: Keeper, own: str, address: str, *, stay: bool = False) -> None:
        self._keeper = keeper
        self._own = own
        self._address = address
        self._lock = threading.Lock()
        self._over = False
        self._kept = 0
        self._sockets: list[socket.socket] = []
        self.stay = stay

    def dial(self) -> int:
        """
        Connect to the server and return the descriptor of the socket.

        If clients must stay, our end of the connection is also passed to QEMU, before its first use; QEMU keeps it open
        until the server has closed the connection.  Then all replies to our requests must fit into the socket: a server
        that waits for room would block QEMU (`Dialled.modest`).

        Raises
        ------
        SourceError
            The server cannot be reached, or `leave` was called.
        """
        with self._lock, socket.socket(socket.AF_UNIX) as connection:
            if self._over:
                raise SourceError("QEMU's NBD server is being stopped", hint="run the command again")
            try:
                connection.connect(self._address)
            except OSError as error:
                raise SourceError(
                    f"QEMU's NBD server cannot be reached: {error.strerror}",
                    hint="was the machine shut down, or QEMU killed? run the command again",
                ) from None
            if self.stay:
                name = leftovers.connection_name(self._own, self._kept)
                self._keeper.pass_fd(connection.fileno(), "getfd", {"fdname": name})
                self._kept += 1
            self._sockets.append(connection.dup())
            return connection.detach()

    def leave(self) -> None:
        """
        Make no more connections.  If clients may leave, close all connections, so that the server need not wait for us.

        A QEMU that stops its guest waits until all requests are answered, and does nothing else in the meantime.
        """
        with self._lock:
            self._over = True
        if not self.stay:
            self.close()

    def hung_up(self) -> None:
        """Close the connections that the server has closed; called after QEMU was told to end all exports."""
        self._drain()

    def close(self) -> None:
        """
        Close the remaining connections.  Called when they belong to no export any more, or when clients may leave.
        """
        for connection in self._sockets:
            with ignoring(_log, "shutdown of an NBD connection", OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._drain()
        while self._sockets:
            self._sockets.pop().close()

    def _drain(self) -> None:
        """
        Read what the server sent before it, or we, closed the connection.

        The server waits for room to send the rest, and notices only then that the connection is closed: the kernel does
        not report a Unix socket as writable that is shut down and full.
        """
        deadline = time.monotonic() + _DRAIN_SECONDS
        for connection in list(self._sockets):
            with ignoring(_log, "reading the rest from an NBD connection", OSError):
                while True:
                    connection.settimeout(max(deadline - time.monotonic(), 0.001))
                    if not connection.recv(1 << 20):
                        break
                self._sockets.remove(connection)
                connection.close()
