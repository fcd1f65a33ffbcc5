"""
Unix sockets by paths of any length.

The kernel's address of a unix socket has room for 107 bytes (unix(7)).  A longer path is replaced by one through a
descriptor of its folder, /proc/self/fd/N/NAME.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

LONGEST = 107
"""Bytes of a unix socket's address."""


def connect(connection: socket.socket, path: Path) -> None:
    """
    Connect to the socket at a path.

    Raises
    ------
    OSError
        The socket cannot be reached.
    """
    address = os.fsencode(path)
    if len(address) <= LONGEST:
        connection.connect(address)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        address = b"/proc/self/fd/%d/%s" % (folder, os.fsencode(path.name))
        if len(address) > LONGEST:
            raise OSError(errno.ENAMETOOLONG, f"the socket's own name is too long: an address has {LONGEST} bytes")
        connection.connect(address)
    finally:
        os.close(folder)
