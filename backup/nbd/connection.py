"""Connect to an NBD server through libnbd, and disconnect."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backup.errors import BackupError, SourceError
from backup.model.names import without_password
from backup.runtime import signals
from backup.runtime.ignoring import ignoring

if TYPE_CHECKING:
    import nbd


_log = logging.getLogger(__name__)

ALLOCATION = "base:allocation"
DIRTY_BITMAP = "qemu:dirty-bitmap:"
TICK = 100
"""Milliseconds between two checks for signals and deadlines."""
_CONNECT_SECONDS = 30.0
"""How long a server may take for the handshake; a busy server for one client sends nothing until that client leaves."""
EXTRA_SECONDS = 5.0
"""How long a server that has just answered may take for the handshake of one more connection."""
_LEAVE_SECONDS = 5.0
"""How long a server may take to close the connection after a disconnect."""
NO_PROTOCOL = "the server violates the NBD protocol; nothing was assumed about the disk"
_MOST_OFFERED, _A_NAME = 32 << 20, 64
"""Bytes of memory for the names of a server's bitmaps (an image has at most 65,535), and for each beside its text."""
_MOST_SHOWN, _LONGEST_SHOWN = 10, 128
"""Number of bitmaps' names that a hint lists, and of characters of each."""
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
"""Seconds without traffic before the first probe, seconds between probes, and unanswered probes that end it."""
_INSTALL = (
    "install the distribution's binding: apt-get install python3-libnbd (dnf install python3-libnbd), then make setup"
)


def load_binding() -> Any:
    """
    Import libnbd's Python binding.

    Raises
    ------
    BackupError
        The binding is missing or was built for another Python, or the module is PyPI's unrelated package `nbd`.
    """
    try:
        module = importlib.import_module("nbd")
    except ModuleNotFoundError as error:
        what = (
            f"python3-libnbd on this machine was built for another Python than {sys.executable}"
            if error.name == "libnbdmod"
            else f"libnbd's Python binding (package python3-libnbd) is missing for {sys.executable}"
        )
        raise BackupError(what, hint=_INSTALL) from None
    except ImportError as error:
        raise BackupError(
            f"libnbd's Python binding (package python3-libnbd) does not load: {error}", hint=_INSTALL
        ) from None
    if not hasattr(module, "NBD"):
        raise BackupError(
            f"the module 'nbd' at {module.__file__} is another program's, not libnbd's (package python3-libnbd)",
            hint="pip uninstall nbd, then " + _INSTALL,
        )
    return module


@dataclass(frozen=True, slots=True)
class Dialled:
    """
    How to connect to an export that no URI names; the server ends these connections, without a disconnect.

    `dial` returns a connected socket, which the caller owns.  `name` is the export's name.  `modest`: never request
    more than the server can send while no reply is read, which is the buffer of a unix socket (net.core.wmem_default,
    208 KiB).
    """

    name: str
    dial: Callable[[], int]
    modest: bool = False


def connect(
    binding: Any,
    uri: str,
    contexts: Sequence[str] | None,
    *,
    offered: list[str] | None = None,
    seconds: float = _CONNECT_SECONDS,
    dialled: Dialled | None = None,
) -> nbd.NBD:
    """
    Connect and negotiate `contexts`; return the handle, from which the caller learns which contexts the server has.

    Parameters
    ----------
    contexts : sequence of str or None
        Names of meta contexts.  None: only reads will follow, and the server answers each in one piece (a simple
        reply).
    offered : list of str, optional
        Receives the names of all dirty bitmap contexts that the server lists.  They are listed on the same connection,
        because a server for one client at a time keeps a second client waiting.
    seconds : float
        How long the server may take.

    Raises
    ------
    SourceError
        The server cannot be reached, does not answer, or has no such export; or the URI is not valid.
    """
    handle: nbd.NBD = binding.NBD()
    address, uri = uri, without_password(uri)
    deadline = time.monotonic() + seconds
    try:
        # The user gives the URI, so that its tls-psk-file and tls-certificates are the user's own files.
        handle.set_uri_allow_local_file(True)
        handle.set_opt_mode(offered is not None)
        if contexts is None:
            handle.set_request_structured_replies(False)
        _ask_for(handle, contexts or () if offered is None else [DIRTY_BITMAP])
        if dialled is None:
            handle.aio_connect_uri(address)
        else:
            handle.set_export_name(dialled.name)
            handle.aio_connect_socket(dialled.dial())
        _await_handshake(handle, uri, deadline)
        if offered is not None and handle.aio_is_negotiating():
            _list_contexts(binding, handle, uri, deadline, offered)
            _ask_for(handle, contexts or ())
            handle.aio_opt_go()
            _await_handshake(handle, uri, deadline)
            if handle.aio_is_negotiating():
                raise SourceError(f"{uri}: the server refuses the export", hint="nbdinfo --list URI shows its exports")
        if handle.aio_is_ready():
            _keep_alive(handle)
    except binding.Error as error:
        raise source_error(uri, error) from None
    return handle


def _ask_for(handle: nbd.NBD, contexts: Sequence[str]) -> None:
    handle.clear_meta_contexts()
    for context in contexts:
        handle.add_meta_context(context)


def _list_contexts(binding: Any, handle: nbd.NBD, uri: str, deadline: float, offered: list[str]) -> None:
    fd = handle.aio_get_fd()
    room = _MOST_OFFERED

    def collect(name: str) -> int:
        nonlocal room
        room -= len(name) + _A_NAME
        if room >= 0:
            offered.append(name)
            return 0
        _hang_up(fd)  # libnbd goes on as long as replies arrive
        return -1

    with ignoring(_log, "the server lists no bitmaps, so that a hint cannot name them", binding.Error):
        handle.aio_opt_list_meta_context(collect)
        _await_handshake(handle, uri, deadline)
    if room < 0:
        raise SourceError(f"{uri} lists more dirty bitmaps than a disk can have", hint=NO_PROTOCOL)


def listed(names: Sequence[str]) -> str:
    """Join the first of these names for a hint, each shortened to a length that a terminal can show."""
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(name[:_LONGEST_SHOWN] for name in names[:_MOST_SHOWN]) + more or "none"


def _hang_up(fd: int) -> None:
    """End a connection that libnbd is using; libnbd keeps its descriptor."""
    with suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def _keep_alive(handle: nbd.NBD) -> None:
    """Let the kernel detect a TCP peer that has vanished, even while no reply is due."""
    with socket.socket(fileno=os.dup(handle.aio_get_fd())) as connection:
        if connection.family in {socket.AF_INET, socket.AF_INET6}:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _await_handshake(handle: nbd.NBD, uri: str, deadline: float) -> None:
    while handle.aio_is_connecting():
        if time.monotonic() > deadline:
            raise SourceError(
                f"{uri}: the server does not answer",
                hint="is the server busy with another client? without --shared=N, qemu-nbd serves one at a time",
            )
        tick(handle)


def tick(handle: nbd.NBD) -> None:
    """Let libnbd work for at most TICK; signals are deferred, because libnbd drops exceptions of callbacks."""
    with signals.deferred():
        handle.poll(TICK)


def source_error(uri: str, error: Any) -> SourceError:
    """Put libnbd's message into a SourceError, with the URI."""
    return SourceError(
        without_password(f"{uri}: {error.string}"), hint="is the server running, and is the URI right? try: nbdinfo URI"
    )


def shutdown(binding: Any, handle: nbd.NBD) -> None:
    """Disconnect if no request is in flight; otherwise dropping the handle closes the connection."""
    with ignoring(_log, "disconnecting from an NBD server", binding.Error):
        if handle.aio_in_flight():
            return
        handle.aio_disconnect()
        deadline = time.monotonic() + _LEAVE_SECONDS
        while not (handle.aio_is_closed() or handle.aio_is_dead()) and time.monotonic() < deadline:
            handle.poll(TICK)
