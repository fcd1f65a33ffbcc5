"""
Connect to Unix sockets, also to those whose paths are longer than the kernel allows.

An address of a Unix socket has 107 bytes (unix(7)).  Instead of a longer path, the address contains a short path that
leads through a descriptor of the folder: /proc/self/fd/N/NAME.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

LONGEST = 107
"""Bytes of the longest address of a Unix socket."""


def connect_unix(connection: socket.socket, path: Path) -> None:
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
            raise OSError(errno.ENAMETOOLONG, f"the name of the socket is too long: an address has {LONGEST} bytes")
        connection.connect(address)
    finally:
        os.close(folder)
