"""
What a backup creates in a running QEMU, and its removal: at the end of a run, and after a run that was interrupted.

QEMU keeps exports, jobs, nodes, its NBD server and passed descriptors when the connection ends.  Those of pybackup are
recognized by their names, `pybackup-REPO8-...`; nothing else is touched.  The order of removal follows the
dependencies:

    exports -> NBD server -> jobs (and their filters) -> overlays -> descriptors (and with them the scratch files)
"""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from backup.errors import SourceError
from backup.qemu import folders
from backup.qmp.answers import Refused
from backup.runtime.ignoring import ignoring
from backup.runtime.shortage import free_bytes

if TYPE_CHECKING:
    from backup.qmp.blocks import BlockGraph

_log = logging.getLogger(__name__)

_GONE_SECONDS = 30.0
"""Time for QEMU to end an export or a job, which waits for the requests in flight."""
_CLIENTS_SECONDS = 10.0
"""Time for QEMU to notice the end of a connection."""
_FULL = 16 << 20
"""Bytes.  With less free space, a file system counts as full for the copies that QEMU makes before a guest's write."""


@dataclass(frozen=True, slots=True)
class ScratchPlace:
    """The scratch folder and the NBD socket of a run.  QEMU stores them for us with the descriptors (`opaque`)."""

    scratch: str
    socket: str

    def opaque(self, prefix: str) -> str:
        """Return the text that QEMU stores."""
        return f"{prefix} {json.dumps([self.scratch, self.socket])}"

    @classmethod
    def of(cls, opaque: str) -> ScratchPlace | None:
        """Read a text that `opaque` made; None for any other text."""
        with suppress(ValueError, TypeError, RecursionError):
            scratch, path = json.loads(opaque.partition(" ")[2])
            if "\0" not in f"{scratch}{path}":  # our paths contain none
                return cls(str(scratch), str(path))
        return None


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Everything in a QEMU whose name begins with one of our prefixes."""

    exports: tuple[str, ...]
    jobs: tuple[str, ...]
    nodes: tuple[str, ...]
    fdsets: tuple[int, ...]
    places: tuple[ScratchPlace, ...]

    def __bool__(self) -> bool:
        return self.in_the_way or bool(self.fdsets)

    @property
    def in_the_way(self) -> bool:
        """Whether anything would hinder another run or another user."""
        return bool(self.exports or self.jobs or self.nodes)


class Commands(Protocol):
    """A way to have QEMU execute commands; one that QEMU refuses raises `Refused`."""

    def command(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a command and return QEMU's answer."""


class Connected(Protocol):
    """Our connections to QEMU's NBD server."""

    def hung_up(self) -> None:
        """
        Close connections; called after QEMU was told to end all exports, since clients may not leave before.
        """

    def close(self) -> None:
        """Close the remaining connections; called after all exports have ended and before the server ends."""


def find_leftovers(monitor: Commands, prefixes: Sequence[str]) -> Leftovers:
    """Return everything in QEMU whose name has one of the prefixes: of one point, or of a whole repository."""

    def ours(name: str) -> bool:
        return name.startswith(tuple(prefixes))

    fdsets = [
        (int(fdset["fdset-id"]), fd["opaque"])
        for fdset in monitor.command("query-fdsets")
        for fd in fdset["fds"]
        if ours(fd.get("opaque", ""))
    ]
    places = [place for place in (ScratchPlace.of(opaque) for _, opaque in fdsets) if place is not None]
    nodes = monitor.command("query-named-block-nodes", {"flat": True})
    return Leftovers(
        exports=tuple(export["id"] for export in monitor.command("query-block-exports") if ours(export["id"])),
        jobs=tuple(job["id"] for job in monitor.command("query-jobs") if ours(job["id"])),
        nodes=tuple(node["node-name"] for node in nodes if ours(node["node-name"])),
        fdsets=tuple(dict.fromkeys(number for number, _ in fdsets)),
        places=tuple(dict.fromkeys(places)),
    )


def remove_leftovers(
    monitor: Commands, leftovers: Leftovers, *, own_server: bool | None, clients: Connected | None = None
) -> list[str]:
    """
    Remove leftovers from QEMU; return what was removed, for the user.

    Parameters
    ----------
    own_server : bool or None
        Whether the NBD server is ours, and must be stopped.  None: find out, since QEMU has at most one server and does
        not tell who started it.
    clients : Connected, optional
        Our own connections to the server.

    Raises
    ------
    SourceError
        QEMU does not end something, or the connection ended.
    """
    removed = []
    if own_server is None:
        # Our exports can only be on a server that we started.
        own_server = bool(leftovers.exports) or any(_serves(place.socket) for place in leftovers.places)
    owns = sorted({f"{name.rpartition('-')[0]}-" for name in (*leftovers.exports, *leftovers.nodes)})
    end_exports(monitor, leftovers.exports, owns, clients)
    removed += [f"export {name}" for name in leftovers.exports]
    has_client = own_server and has_client_at([place.socket for place in leftovers.places])
    if own_server and not has_client and _tolerant(monitor, "nbd-server-stop", {}):
        removed.append("the NBD server")
    for job in leftovers.jobs:
        _tolerant(monitor, "job-cancel", {"id": job})
    _wait_for_end(monitor, "query-jobs", leftovers.jobs)
    removed += [f"job {name}" for name in leftovers.jobs]
    removed += _remove_nodes(monitor, leftovers.nodes)
    if has_client:  # the descriptors stay, because they tell the next run that the server is ours
        raise SourceError(
            "QEMU's NBD server, which a backup started, still has a client and cannot be stopped",
            hint="end the client; then the next run, or `pybackup clean`, stops the server",
        )
    for number in leftovers.fdsets:
        _tolerant(monitor, "remove-fd", {"fdset-id": number})
    for place in leftovers.places:
        _remove_socket(place.socket)
    return removed


def end_exports(
    monitor: Commands, exports: Sequence[str], owns: Sequence[str], clients: Connected | None = None
) -> None:
    """
    End exports and all connections to them; `owns` are the prefixes of the connections' names in QEMU.

    The order matters.  QEMU first ends the clients of the exports, which may not leave before.  Then QEMU closes our
    ends: a client in its handshake, which belongs to no export, leaves only now.

    Raises
    ------
    SourceError
        QEMU does not end an export.
    """
    for export in exports:
        _tolerant(monitor, "block-export-del", {"id": export, "mode": "hard"})
    if clients is not None:
        clients.hung_up()
    _close_connections(monitor, owns)
    _wait_for_end(monitor, "query-block-exports", exports)
    if clients is not None:
        clients.close()


def has_client_at(addresses: Sequence[str]) -> bool:
    """
    Wait until no client is connected to our NBD server at these sockets; return True if one still is.

    nbd-server-stop waits for the last client, and ignores what a client sends in its handshake, even the end of its
    connection: QEMU would hang for ever with such a client.
    """
    deadline = time.monotonic() + _CLIENTS_SECONDS
    while any(map(folders.has_connection, addresses)):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.005)
    return False


def stopped_guest(graph: BlockGraph, leftovers: Leftovers) -> bool:
    """
    Tell whether a scratch file system of ours became full and stopped the guest.  Call this before space is freed.

    A guest has the same status when its own disk is full; so the scratch file system must be full too.  (If both are on
    one file system, a guest that is resumed only repeats the write.)
    """
    devices = [device for name in leftovers.nodes for device in graph.devices_above(name)]
    stopped = any(device.io_status == "nospace" for device in devices)
    return stopped and any(is_full(place.scratch) for place in leftovers.places)


def resume(monitor: Commands) -> bool:
    """Resume a guest that an I/O error stopped; return False if no I/O error stopped it."""
    if monitor.command("query-status")["status"] != "io-error":
        return False
    monitor.command("cont")
    return True


def is_full(folder: str | int) -> bool:
    """Tell whether the file system of a folder, or of an open file, has no room for another copy."""
    with ignoring(_log, f"free space of {folder}", OSError):
        return free_bytes(folder) < _FULL
    return False


def connection_name(own: str, number: int) -> str:
    """Return QEMU's name (getfd) of our end of a connection; `own` is the prefix of the connections' names."""
    return f"{own}k{number}"


def _close_connections(monitor: Commands, owns: Sequence[str]) -> None:
    """
    Have QEMU close our ends of connections whose other ends are closed, by the prefixes of their names.

    QEMU does not list them, and they belong to the monitor through which they were passed.  A run that uses another
    monitor leaves them (a few descriptors) until a run uses that monitor again.
    """
    for own in owns:
        number = 0
        while _tolerant(monitor, "closefd", {"fdname": connection_name(own, number)}):
            number += 1


def _remove_nodes(monitor: Commands, nodes: Sequence[str]) -> list[str]:
    """Remove nodes from the top down.  Jobs have already removed their filters; an overlay removes all below it."""
    removed = []
    for kind in ("f", "q", ""):
        remaining = sorted(set(nodes) & _node_names(monitor))
        for name in (name for name in remaining if _kind(name).startswith(kind)):
            monitor.command("blockdev-del", {"node-name": name})
            removed.append(f"node {name}")
    return removed


def _kind(name: str) -> str:
    """Return the kind and number of a node, as `instant` and `scratch` name them: f is an overlay, q a quorum."""
    return name.rpartition("-")[2]


def _node_names(monitor: Commands) -> set[str]:
    return {node["node-name"] for node in monitor.command("query-named-block-nodes", {"flat": True})}


def _tolerant(monitor: Commands, command: str, arguments: Mapping[str, object]) -> bool:
    """Execute a command; False if QEMU refuses, because the thing is gone or something still depends on it."""
    try:
        monitor.command(command, arguments)
    except Refused:
        return False
    return True


def _wait_for_end(monitor: Commands, query: str, names: Sequence[str]) -> None:
    """Wait until QEMU lists none of these exports or jobs any more; dismiss jobs that have ended."""

    def remaining() -> list[str]:
        entries: list[Mapping[str, Any]] = monitor.command(query)
        for entry in entries:
            if entry["id"] in names and entry.get("status") == "concluded":
                _tolerant(monitor, "job-dismiss", {"id": entry["id"]})
        return [entry["id"] for entry in entries if entry["id"] in names]

    wait_until(lambda: not remaining(), f"QEMU does not end {', '.join(names)}")


def wait_until(done: Callable[[], bool], what: str) -> None:
    """
    Call `done` again and again until it returns True.

    Raises
    ------
    SourceError
        `done` did not return True in time; `what` is the beginning of the message.
    """
    deadline = time.monotonic() + _GONE_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise SourceError(f"{what} within {_GONE_SECONDS:.0f} s", hint="does the storage of the machine hang?")
        time.sleep(0.005)


def _serves(path: str) -> bool:
    """Tell whether an NBD server greets on this socket, which only a server of ours can do."""
    with ignoring(_log, f"the socket {path} does not greet", OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        probe.connect(path)
        return probe.recv(8) == b"NBDMAGIC"
    return False


def _remove_socket(path: str) -> None:
    """Remove a socket of ours and its folder; the path comes from QEMU and is not trusted to be anything else."""
    folder = os.path.dirname(path)
    if os.path.basename(folder).startswith("pybackup-"):
        with ignoring(_log, f"removal of {path}", OSError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        with ignoring(_log, f"removal of {folder}", OSError):
            os.rmdir(folder)
