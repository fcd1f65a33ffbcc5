"""
What a backup makes in a running QEMU, and its removal: at a run's end, and after one that was cut off.

QEMU keeps exports, jobs, nodes, its NBD server and passed descriptors when the connection ends.  All of ours are known
by their names alone, `pybackup-REPO8-...`; nothing else is touched.  They go in the order of need:

    exports -> NBD server -> jobs (and their filters) -> overlays -> descriptors (and with them the scratch files)
"""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from backup.errors import SourceError
from backup.qemu import folders
from backup.qmp.blocks import Blocks
from backup.qmp.monitor import Monitor, Refused

_GONE_SECONDS = 30.0
"""How long QEMU may take to end an export or a job: requests under way are waited for."""
_CLIENTS_SECONDS = 10.0
"""How long QEMU may take to notice the end of a connection."""
_FULL = 16 << 20
"""Bytes.  A file system with less is full for the copies that QEMU makes before a guest's write."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run's scratch files and NBD socket lie; QEMU keeps it for us beside the descriptors (`opaque`)."""

    scratch: str
    socket: str

    def opaque(self, prefix: str) -> str:
        """As QEMU keeps it."""
        return f"{prefix} {json.dumps([self.scratch, self.socket])}"

    @classmethod
    def of(cls, opaque: str) -> Place | None:
        """Read what `opaque` made; None of anything else."""
        with suppress(ValueError, TypeError, RecursionError):
            scratch, path = json.loads(opaque.partition(" ")[2])
            if "\0" not in f"{scratch}{path}":  # no path of ours has one
                return cls(str(scratch), str(path))
        return None


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What a QEMU has whose name begins with one of our prefixes."""

    exports: tuple[str, ...]
    jobs: tuple[str, ...]
    nodes: tuple[str, ...]
    fdsets: tuple[int, ...]
    places: tuple[Place, ...]

    def __bool__(self) -> bool:
        return self.in_the_way or bool(self.fdsets)

    @property
    def in_the_way(self) -> bool:
        """Is there anything that keeps another run, or a user, from something?"""
        return bool(self.exports or self.jobs or self.nodes)


class Connected(Protocol):
    """Connections to QEMU's NBD server."""

    def hung_up(self) -> None:
        """All exports were told to end: only now may clients leave (see `clients`)."""

    def close(self) -> None:
        """All exports have ended, and the server is about to."""


def find(monitor: Monitor, prefixes: Sequence[str]) -> Leftovers:
    """All that is ours: of one point, or of a repository, by its prefixes."""

    def ours(name: str) -> bool:
        return name.startswith(tuple(prefixes))

    fdsets = [
        (int(fdset["fdset-id"]), fd["opaque"])
        for fdset in monitor.command("query-fdsets")
        for fd in fdset["fds"]
        if ours(fd.get("opaque", ""))
    ]
    places = [place for place in (Place.of(opaque) for _, opaque in fdsets) if place is not None]
    named = monitor.command("query-named-block-nodes", {"flat": True})
    return Leftovers(
        exports=tuple(found["id"] for found in monitor.command("query-block-exports") if ours(found["id"])),
        jobs=tuple(found["id"] for found in monitor.command("query-jobs") if ours(found["id"])),
        nodes=tuple(found["node-name"] for found in named if ours(found["node-name"])),
        fdsets=tuple(dict.fromkeys(number for number, _ in fdsets)),
        places=tuple(dict.fromkeys(places)),
    )


def remove(
    monitor: Monitor, found: Leftovers, *, own_server: bool | None, clients: Connected | None = None
) -> list[str]:
    """
    Remove them, and say what was removed.

    Parameters
    ----------
    own_server : bool or None
        Is the NBD server ours to stop?  None: find out.  QEMU has at most one and does not tell whose it is.
    clients : Connected, optional
        Our own connections to the server, where there are any.

    Raises
    ------
    SourceError
        Something does not go away, or the connection ended.
    """
    removed = []
    if own_server is None:
        # Ours are the only exports that we know to be on no server but ours.
        own_server = bool(found.exports) or any(_serves(place.socket) for place in found.places)
    for export in found.exports:
        _tolerant(monitor, "block-export-del", {"id": export, "mode": "hard"})
    if clients is not None:
        clients.hung_up()
    _close_held(monitor, found)
    _await(monitor, "query-block-exports", found.exports)
    if clients is not None:
        clients.close()
    removed += [f"export {name}" for name in found.exports]
    left = own_server and _clients_left(found)
    if own_server and not left and _tolerant(monitor, "nbd-server-stop", {}):
        removed.append("the NBD server")
    for job in found.jobs:
        _tolerant(monitor, "job-cancel", {"id": job})
    _await(monitor, "query-jobs", found.jobs)
    removed += [f"job {name}" for name in found.jobs]
    removed += _remove_nodes(monitor, found.nodes)
    if left:  # by the descriptors the next run knows whose the server is
        raise SourceError(
            "QEMU's NBD server, which a backup started, still has a client and cannot be stopped",
            hint="end the client; after that the next run, or `pybackup clean`, stops the server",
        )
    for number in found.fdsets:
        _tolerant(monitor, "remove-fd", {"fdset-id": number})
    for place in found.places:
        _remove_socket(place.socket)
    return removed


def _clients_left(found: Leftovers) -> bool:
    """
    Wait until our NBD server has no client; True where it has one still.

    nbd-server-stop waits for the last client and does not look at what clients in their handshake send, the end of
    their connection included: a client that is left there hangs QEMU for ever.
    """
    deadline = time.monotonic() + _CLIENTS_SECONDS
    while any(folders.has_connection(place.socket) for place in found.places):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.005)
    return False


def stopped_guest(blocks: Blocks, found: Leftovers) -> bool:
    """
    Did a full scratch file system of ours stop the guest?  Ask before it is freed.

    A guest's own full disk gives the same status; so the scratch file system must be full too.  (Where both lie on one
    file system, a guest that goes on only tries the same write once more.)
    """
    devices = [device for name in found.nodes for device in blocks.devices_above(name)]
    stopped = any(device.io_status == "nospace" for device in devices)
    return stopped and any(is_full(place.scratch) for place in found.places)


def resume(monitor: Monitor) -> bool:
    """Let a guest go on that an I/O error stopped; False where it was not."""
    if monitor.command("query-status")["status"] != "io-error":
        return False
    monitor.command("cont")
    return True


def is_full(folder: str | int) -> bool:
    """Has the file system of a folder, or of an open file, no room for another copy?"""
    with suppress(OSError):
        return free_bytes(folder) < _FULL
    return False


def free_bytes(folder: str | int) -> int:
    """Bytes that the file system of a folder, or of an open file, has left for us."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def held_name(own: str, number: int) -> str:
    """The name by which QEMU keeps our end of a connection (getfd); `own` is the prefix of a point's names."""
    return f"{own}k{number}"


def _close_held(monitor: Monitor, found: Leftovers) -> None:
    """
    Have QEMU close our ends of connections, which have no other end any more.

    There is no list of them, and they belong to the monitor that got them: a run that came in by another one leaves
    them, a few descriptors, until that monitor's next clean-up.
    """
    for own in sorted({f"{name.rpartition('-')[0]}-" for name in (*found.exports, *found.nodes)}):
        number = 0
        while _tolerant(monitor, "closefd", {"fdname": held_name(own, number)}):
            number += 1


def _remove_nodes(monitor: Monitor, nodes: Sequence[str]) -> list[str]:
    """The job took its filters along, and an overlay takes all below it; what has no overlay goes from the top down."""
    removed = []
    for kind in ("f", "q", ""):
        left = sorted(set(nodes) & _node_names(monitor))
        for name in (name for name in left if _kind(name).startswith(kind)):
            monitor.command("blockdev-del", {"node-name": name})
            removed.append(f"node {name}")
    return removed


def _kind(name: str) -> str:
    """What a node is and its number, as `fleece` and `scratch` name it: f an overlay, q a quorum, and others."""
    return name.rpartition("-")[2]


def _node_names(monitor: Monitor) -> set[str]:
    return {found["node-name"] for found in monitor.command("query-named-block-nodes", {"flat": True})}


def _tolerant(monitor: Monitor, command: str, arguments: Mapping[str, object]) -> bool:
    """Execute; False where QEMU refuses: it went by itself, or what needs it goes first."""
    try:
        monitor.command(command, arguments)
    except Refused:
        return False
    return True


def _await(monitor: Monitor, query: str, names: Sequence[str]) -> None:
    """Wait until none of these is there any more."""

    def left() -> list[str]:
        found: list[Mapping[str, Any]] = monitor.command(query)
        for job in found:
            if job["id"] in names and job.get("status") == "concluded":
                _tolerant(monitor, "job-dismiss", {"id": job["id"]})
        return [entry["id"] for entry in found if entry["id"] in names]

    wait_until(lambda: not left(), f"QEMU does not end {', '.join(names)}")


def wait_until(done: Callable[[], bool], what: str) -> None:
    """
    Look again and again until it is done.

    Raises
    ------
    SourceError
        It is not done in time.
    """
    deadline = time.monotonic() + _GONE_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise SourceError(f"{what} within {_GONE_SECONDS:.0f} s", hint="does the storage of the machine hang?")
        time.sleep(0.005)


def _serves(path: str) -> bool:
    """Does an NBD server greet on this socket?  Only a server that was started with our socket can."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        probe.connect(path)
        return probe.recv(8) == b"NBDMAGIC"
    return False


def _remove_socket(path: str) -> None:
    """Remove a socket of ours and its folder; what QEMU says about paths is not trusted further than that."""
    folder = os.path.dirname(path)
    if os.path.basename(folder).startswith("pybackup-"):
        with suppress(OSError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        with suppress(OSError):  # a run that was killed before it listened has made no socket
            os.rmdir(folder)
