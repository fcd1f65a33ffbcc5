"""
pybackup's connections to the NBD server of a running QEMU: how they begin, and how they end before the server ends.

Two bugs of QEMU 7.2 determine the rules.  First, QEMU aborts when a client leaves an export whose disk has an iothread
(an assertion in nbd_blockdev_client_closed; virtnbdbackup #254), and we may be killed at any moment.  Second,
nbd-server-stop blocks QEMU until the last client has left, also a client in its handshake, whose connection does not
end with any export.
"""

from __future__ import annotations

import logging
import socket
import threading
import time

from backup.errors import SourceError
from backup.qmp import leftovers
from backup.qmp.monitor import Monitor
from backup.runtime.ignoring import ignoring

_log = logging.getLogger(__name__)

_DRAIN_SECONDS = 2.0
"""Time to read what a server sent before it closed the connection."""


class Clients:
    """
    The connections of one run.  Safe to use from several threads.

    Parameters
    ----------
    own : str
        The prefix of the run's names in QEMU.
    address : str
        The path of the server's socket.
    """

    def __init__(self, monitor: Monitor, own: str, address: str) -> None:
        self._monitor = monitor
        self._own = own
        self._address = address
        self._lock = threading.Lock()
        self._over = False
        self._kept = 0
        self._sockets: list[socket.socket] = []
        self.stay = False
        """Whether clients must stay until the server closes the connections, because a disk has an iothread."""

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
                self._monitor.pass_fd(connection.fileno(), "getfd", {"fdname": name})
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
