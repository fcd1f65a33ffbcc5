"""
Our connections to the NBD server of a running QEMU: how they begin, and how they end before the server does.

Two faults of QEMU 7.2 rule it.  A client that leaves an export whose disk has an iothread ends QEMU (an assertion in
nbd_blockdev_client_closed; virtnbdbackup #254), and we may be killed at any moment.  And nbd-server-stop waits, doing
nothing else, until the last client is gone, one in the middle of its handshake too, which no export's end hangs up on.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

from backup.errors import SourceError
from backup.qmp import leftovers
from backup.qmp.monitor import Monitor

_DRAIN_SECONDS = 2.0
"""For what a server that has hung up sent before."""


class Clients:
    """
    The connections of one run; safe to use from several threads.

    Parameters
    ----------
    own : str
        The prefix of the run's names in QEMU.
    address : str
        The server's socket.
    """

    def __init__(self, monitor: Monitor, own: str, address: str) -> None:
        self._monitor = monitor
        self._own = own
        self._address = address
        self._lock = threading.Lock()
        self._over = False
        self._held = 0
        self._sockets: list[socket.socket] = []
        self.stay = False
        """Must clients stay until the server hangs up?  So it is where a disk has an iothread."""

    def dial(self) -> int:
        """
        Connect to the server; returns the socket's descriptor.

        Where clients must stay QEMU gets our end of the connection too, before it is used, and keeps it open until the
        server has hung up.  What was asked for by then must fit into the socket, or a server that waits for room would
        hold up QEMU (`Dialled.modest`).

        Raises
        ------
        SourceError
            The server cannot be reached, or its end has begun.
        """
        with self._lock, socket.socket(socket.AF_UNIX) as connection:
            if self._over:
                raise SourceError("QEMU's NBD server is being ended", hint="run the command again")
            try:
                connection.connect(self._address)
            except OSError as error:
                raise SourceError(
                    f"QEMU's NBD server cannot be reached: {error.strerror}",
                    hint="was the machine shut down, or QEMU killed? run the command again",
                ) from None
            if self.stay:
                held = leftovers.held_name(self._own, self._held)
                self._monitor.pass_fd(connection.fileno(), "getfd", {"fdname": held})
                self._held += 1
            self._sockets.append(connection.dup())
            return connection.detach()

    def leave(self) -> None:
        """
        Make no more connections, and leave the server where clients may: it must not wait for us to read on.

        A QEMU that stops its guest waits until all requests are answered, and does nothing else.
        """
        with self._lock:
            self._over = True
        if not self.stay:
            self.close()

    def hung_up(self) -> None:
        """Let go of the connections on which the server has hung up; called when all exports were told to end."""
        self._drain()

    def close(self) -> None:
        """End the connections that are left; none is an export's any more, or clients may leave."""
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._drain()
        while self._sockets:
            self._sockets.pop().close()

    def _drain(self) -> None:
        """
        Read to the end what the server had sent when it hung up, or we did.

        The server waits for room to send the rest, and only then will notice that to be in vain: a unix socket that is
        shut down and full is not reported as writable.
        """
        deadline = time.monotonic() + _DRAIN_SECONDS
        for connection in list(self._sockets):
            with suppress(OSError):
                while True:
                    connection.settimeout(max(deadline - time.monotonic(), 0.001))
                    if not connection.recv(1 << 20):
                        break
                self._sockets.remove(connection)
                connection.close()
