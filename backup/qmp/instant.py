"""
One instant of a running machine's disks, frozen for reading while the guest keeps writing.

Each disk gets an empty overlay.  Before the guest overwrites something, a job of QEMU copies the old data to the
overlay (`blockdev-backup` with `sync: none`), so that the overlay keeps the content of that instant.  ONE transaction,
for all disks, adds the bitmaps of the new point, copies the bitmaps of the old point into the overlays, where nothing
changes them, and starts the jobs (QEMU: docs/interop/bitmaps.rst; libvirt does the same).

    guest -> device -> [filter: copy before write] -> disk <- backing - overlay <- NBD export <- us
                              |                                           ^
                              +---------------- old data -----------------+

`scratch` describes the storage of an overlay.  pybackup opens the overlay's file and the socket of the NBD server, and
passes the descriptors to QEMU, which often runs as a user who may open neither.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

from backup.errors import BackupError, Interrupted, SourceError
from backup.nbd.connection import Dialled
from backup.qemu import folders, unnamed_images
from backup.qemu.scratch_room import Room, ran_out
from backup.qmp import leftovers, scratch
from backup.qmp.answers import Refused
from backup.qmp.blocks import OURS, BlockGraph
from backup.qmp.clients import Clients
from backup.qmp.leftovers import ScratchPlace
from backup.qmp.monitor import Monitor, MonitorLost
from backup.runtime.ignoring import ignoring
from backup.runtime.shortage import free_bytes
from backup.runtime.signals import deferred, to_the_end

if TYPE_CHECKING:
    from backup.nbd.export import Export

_log = logging.getLogger(__name__)

_SPARE_FILES = 12
"""Descriptors.  A program that is started takes four of them, and a second connection to QEMU four more."""
_WATCH_SECONDS = 0.2
"""Seconds between two checks of the free space of the scratch folder and of QEMU's events."""
_LEAST = 4096
"""
Bytes of the smallest reserve.  With less free space the next copy fails.  If QEMU has no quorum, a guest behind an
export of QEMU's, and not behind a device, gets that error without an event.
"""
_STORAGE_SECONDS, _AGAIN_SECONDS = 60.0, 5.0
"""
Time for scratch storage to store a byte, at the first try and at later ones.  If it takes longer, nothing is removed
from QEMU.
"""
_STOPS = {"STOP", "BLOCK_IO_ERROR"}
"""Events after which a guest may be stopped."""


@dataclass(frozen=True, slots=True)
class InstantDisk:
    """
    What to do with one disk at the instant.

    `node` is the disk's node, and `size` its size in bytes.  `read` is the name of the bitmap to freeze, and `start`
    the name of the bitmap that begins at the instant.  `persistent` tells whether the node's image can keep a bitmap.
    The overlay's file is made in the folder `scratch`.  The backup will write about `writes` bytes to the repository.
    """

    node: str
    size: int
    read: str | None
    start: str | None
    persistent: bool
    scratch: Path
    writes: int


class Around(Protocol):
    """What the guest does before and after the transaction that freezes the instant."""

    @property
    def wanted(self) -> bool:
        """Whether the guest does anything."""

    def begin(self) -> None:
        """Flush and freeze the guest's file systems."""

    def end(self) -> None:
        """Let the guest continue.  Always called, also if `begin` failed or was not called."""


class SizeChanged(SourceError):
    """A disk was resized after it was inspected and before the transaction."""


class BitmapNotAdded(SourceError):
    """QEMU refused the bitmap that should start on the disk with this number; `why` is QEMU's reason."""

    def __init__(self, number: int, refused: Refused) -> None:
        super().__init__(refused.message, hint=refused.hint)
        self.number = number
        self.why = refused.text


def prefix(short_id: str, point: str) -> str:
    """
    Return the prefix of all names that a point uses in QEMU.

    A node's name has at most 31 bytes, so the prefix contains only the random part of the point's id.
    """
    return f"{OURS}{short_id}-{point.rpartition('-')[2]}-"


def query_block_graph(monitor: Monitor) -> BlockGraph:
    """Return the current block graph of QEMU."""
    return BlockGraph.of(
        monitor.command("query-named-block-nodes", {"flat": True}),
        monitor.command("query-block"),
        monitor.command("x-debug-query-block-graph"),
        monitor.command("query-block-exports"),
    )


@contextmanager
def frozen_instant(
    monitor: Monitor,
    own: str,
    disks: Sequence[InstantDisk],
    room: Room,
    around: Around,
) -> Iterator[Instant]:
    """
    Freeze an instant of all disks, and release it at the end of the block.

    Parameters
    ----------
    own : str
        The prefix of all names.
    around : Around
        What the guest does during the transaction, and only then.

    Raises
    ------
    SizeChanged
        The size of a disk is different now; nothing was changed.
    BitmapNotAdded
        A disk accepts no new bitmap; nothing was changed.
    SourceError
        QEMU refuses, the scratch folder has no space, or, while the disks were read, the instant was lost.
    """
    with _spare_files() as give_back:
        instant = Instant(monitor, own, disks, room, give_back)
        try:
            instant.begin(around)
            yield instant
        except (BackupError, Interrupted) as error:
            instant.end()
            shown = instant.lost if instant.lost is not None and isinstance(error, BackupError) else error
            shown.hint = "; ".join([shown.hint, *instant.troubles])
            raise shown from None
        finally:
            instant.end()


@contextmanager
def _spare_files() -> Iterator[Callable[[], None]]:
    """Reserve descriptors for the removal, in case the run has no others left; yield a function that frees them."""
    with ExitStack() as spare:
        for _ in range(_SPARE_FILES):
            spare.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        yield spare.close


class Instant:
    """A frozen instant of all disks of a point."""

    def __init__(
        self, monitor: Monitor, own: str, disks: Sequence[InstantDisk], room: Room, before_end: Callable[[], None]
    ) -> None:
        self._monitor = monitor
        self._own = own
        self._disks = disks
        self._room = room
        self._before_end = before_end
        self._folder, self._lock = folders.shared_folder()
        self._socket = os.fspath(self._folder / "nbd")
        self._fds: list[int] = []
        self._serving = False
        self._removing = threading.Lock()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look_after, name="watch", daemon=True)
        self._jobs: list[str] = []
        self._witness = scratch.Witness(monitor, own)
        self._clients = Clients(monitor, own, self._socket)
        self._storage_hangs = self._ended = False
        self._guard_refused = ""
        """QEMU's message, if it refuses a quorum."""
        self.lost: SourceError | None = None
        """Why the data that is read no longer belongs to the instant; None as long as it does."""
        self.troubles: list[str] = []
        """What went wrong in the removal, after everything was read."""

    def begin(self, around: Around) -> None:
        """Make the overlays, freeze the disks, and serve the overlays."""
        self._clients.stay = bool(self._monitor.command("query-iothreads"))
        writes = sum(disk.writes for disk in self._disks)
        for folder in dict.fromkeys(disk.scratch for disk in self._disks):
            self._room.require(folder, writes)
        for number, disk in enumerate(self._disks):
            self._add_overlay(number, disk)
        # Python can raise a signal at the beginning of any function, also of `end`, and the guest would stay frozen.
        with deferred() if around.wanted else nullcontext():
            try:
                around.begin()
                self._freeze()
            finally:
                around.end()
        self._jobs = [f"{self._own}j{number}" for number in range(len(self._disks))]
        self._watch.start()
        self._start_server()
        for number, disk in enumerate(self._disks):
            self._export(number, disk)

    @property
    def notes(self) -> list[str]:
        """Facts that the user should know: whether this QEMU refuses a quorum."""
        if not self._guard_refused:
            return []
        return [f"this QEMU refuses a quorum ({self._guard_refused}): a full scratch folder would stop the guest"]

    def require_kept(self) -> None:
        """
        Make sure that no loss of the instant is known.  This costs nothing.

        Raises
        ------
        SourceError
            The scratch folder had no space for QEMU's copies, or the connection ended.
        """
        if self.lost is not None:
            raise self.lost

    def require_sound(self) -> None:
        """
        Make sure that everything that was read belongs to the instant: no job ended, and no copy was lost.

        Call this after the last read, and before anything relies on the data.

        Raises
        ------
        SourceError
            A job was cancelled, a copy is missing, or `require_kept` raises.
        """
        self.require_kept()
        # QEMU's answer to any command comes after the events of everything that was read before.
        states = {job["id"]: job["status"] for job in self._monitor.command("query-jobs")}
        ended = [job for job in self._jobs if states.get(job) not in {"running", "paused", "standby"}]
        if ended:
            raise SourceError(
                f"QEMU's job {ended[0]} ended while the disk was read, so the data is not of one instant",
                hint="did someone cancel the job? run the command again",
            )
        self.lost = self.lost or self._lost_copy()
        self.require_kept()

    def end(self) -> None:
        """Remove everything that was made.  The next run removes what cannot be removed now."""
        to_the_end(self._end)

    def _end(self) -> None:
        self._before_end()
        if self._ended:
            return
        self._over.set()
        if self._watch.ident is not None:
            self._watch.join(_STORAGE_SECONDS)  # the thread may be waiting for the storage of the scratch folder
        try:
            self._remove()
        except MonitorLost:
            self._remove_through_new_connection()
        except scratch.StorageHangs as error:
            self.troubles.append(error.message)
        except BackupError as error:
            self.troubles.append(f"{error.message}; the next run removes what is left in QEMU")
        while self._fds:
            fd = self._fds.pop()
            if self._storage_hangs:
                continue  # closing the file may take as long as the storage hangs
            # A paused QEMU keeps the passed descriptors open; truncating the file frees at least its space.
            with ignoring(_log, "truncation of a scratch file", OSError):
                os.ftruncate(fd, 0)
            os.close(fd)
        folders.remove_folder(self._folder)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        self._ended = True

    def _add_overlay(self, number: int, disk: InstantDisk) -> None:
        fd = unnamed_images.create_scratch(disk.scratch, disk.size)
        self._fds.append(fd)
        opaque = ScratchPlace(os.fspath(disk.scratch), self._socket).opaque(self._own)
        fdset = self._monitor.pass_fd(fd, "add-fd", {"opaque": opaque})["fdset-id"]
        storage = scratch.file_node(self._own, number, fdset)
        overlay = {"driver": "qcow2", "node-name": f"{self._own}f{number}", "backing": disk.node}
        if not self._guard_refused:
            guarded = scratch.guarded(self._own, number, storage, scratch.lengthen(fd, disk.size))
            try:
                self._monitor.command("blockdev-add", {**overlay, "file": guarded})
                return
            except Refused as error:
                self._guard_refused = error.text
        self._monitor.command("blockdev-add", {**overlay, "file": storage})

    def _freeze(self) -> None:
        actions = [action for number, disk in enumerate(self._disks) for action in self._actions(number, disk)]
        try:
            self._monitor.command("transaction", {"actions": actions})
        except Refused as error:
            if "different sizes" in error.text:
                raise SizeChanged(error.message, hint=error.hint) from None
            self._require_bitmaps_taken()
            raise

    def _require_bitmaps_taken(self) -> None:
        """
        Make sure that each disk accepts its new bitmap: QEMU does not tell which part of a transaction it refused.

        Raises
        ------
        BitmapNotAdded
            A disk accepts no new bitmap.
        """
        for number, disk in enumerate(self._disks):
            if disk.start is None:
                continue
            bitmap = {"node": disk.node, "name": disk.start}
            try:
                self._monitor.command("block-dirty-bitmap-add", {**bitmap, "persistent": disk.persistent})
            except Refused as refused:
                raise BitmapNotAdded(number, refused) from None
            self._monitor.command("block-dirty-bitmap-remove", bitmap)

    def _actions(self, number: int, disk: InstantDisk) -> Iterator[dict[str, object]]:
        overlay = f"{self._own}f{number}"
        if disk.start is not None:
            added = {"node": disk.node, "name": disk.start, "persistent": disk.persistent}
            yield {"type": "block-dirty-bitmap-add", "data": added}
        if disk.read is not None:
            copied = {"node": overlay, "name": disk.read, "disabled": True}
            yield {"type": "block-dirty-bitmap-add", "data": copied}
            # With the node: QEMU would look for a name alone in the backing files as well (docs/traps.md, trap 21).
            merged = {"node": overlay, "target": disk.read, "bitmaps": [{"node": disk.node, "name": disk.read}]}
            yield {"type": "block-dirty-bitmap-merge", "data": merged}
        job = {
            "device": disk.node,
            "target": overlay,
            "sync": "none",
            "job-id": f"{self._own}j{number}",
            "filter-node-name": f"{self._own}c{number}",
        }
        yield {"type": "blockdev-backup", "data": job}

    def _start_server(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._socket)
            listener.listen(64)
            name = f"{self._own}nbd"
            self._monitor.pass_fd(listener.fileno(), "getfd", {"fdname": name})
            self._serving = True  # before the answer, which a signal may hide
            try:
                self._monitor.command("nbd-server-start", {"addr": {"type": "fd", "data": {"str": name}}})
            except Refused as error:
                self._serving = False
                self._monitor.command("closefd", {"fdname": name})
                raise (self._server_in_the_way() if "already running" in error.text else error) from None

    def _server_in_the_way(self) -> SourceError:
        what = "the machine's QEMU runs an NBD server already, and a QEMU can run only one"
        exports = [export["id"] for export in self._monitor.command("query-block-exports")]
        ours = next((name for name in exports if name.startswith(OURS)), None)
        if ours is not None:
            return SourceError(
                f"{what}: it serves {ours}",
                hint="is a backup running? if one was interrupted, the next run or `pybackup clean` cleans up after it",
            )
        return SourceError(
            what,
            hint="another program (a libvirt backup, a migration) uses the server: wait for its end, or end it there",
        )

    def _export(self, number: int, disk: InstantDisk) -> None:
        overlay, name = f"{self._own}f{number}", f"{self._own}e{number}"
        bitmaps = [{"node": overlay, "name": disk.read}] if disk.read is not None else []
        export = {"type": "nbd", "id": name, "node-name": overlay, "name": name, "bitmaps": bitmaps}
        self._monitor.command("block-export-add", export)

    def open(self, number: int) -> Export:
        """Open the disk with this number for reading."""
        from backup.nbd.export import Export  # noqa: PLC0415 - brings numpy, which takes long to import

        name, disk = f"{self._own}e{number}", self._disks[number]
        uri = f"nbd+unix:///{name}?socket={quote(self._socket)}"
        dialled = Dialled(name, self._clients.dial, modest=self._clients.stay)
        return Export(uri, [] if disk.read is None else [disk.read], dialled=dialled)

    def _remove(self) -> None:
        """
        Remove everything, exports first, so that no reader can get the disk's present content for that of the instant.
        """
        with self._removing:
            self._require_storage()
            self._clients.leave()
            full = any(leftovers.is_full(fd) for fd in self._fds)
            stopped = self._stopped_the_guest()
            ours = leftovers.find_leftovers(self._monitor, [self._own])
            leftovers.remove_leftovers(self._monitor, ours, own_server=self._serving, clients=self._clients)
            self._serving = False
            # The guest may have been stopped only now.  A guest that stopped because of its own disk is not resumed.
            if stopped or (full and "STOP" in self._events()):
                leftovers.resume(self._monitor)

    def _require_storage(self) -> None:
        """Make sure that a removal will not hang QEMU's main loop.  The second test gives the storage less time."""
        files = {fd: os.fspath(disk.scratch) for fd, disk in zip(self._fds, self._disks, strict=False)}
        seconds = _AGAIN_SECONDS if self._storage_hangs else _STORAGE_SECONDS
        self._storage_hangs = True
        scratch.require_answering(files, seconds)
        self._storage_hangs = False

    def _failed_the_guest(self) -> bool:
        """
        Tell whether the guest had an I/O error while there was no room for copies; it may continue with it (werror).
        """
        return "BLOCK_IO_ERROR" in self._events() and any(leftovers.is_full(fd) for fd in self._fds)

    def _stopped_the_guest(self) -> bool:
        """
        Tell whether a full scratch folder stopped the guest.  QEMU is asked only after an event that may mean this.
        """
        if not self._events() & _STOPS:
            return False
        ours = leftovers.find_leftovers(self._monitor, [self._own])
        return leftovers.stopped_guest(query_block_graph(self._monitor), ours)

    def _events(self) -> set[str]:
        """Return the names of QEMU's events since the beginning of the instant."""
        return self._witness.events()

    def _lost_copy(self) -> SourceError | None:
        """Return the error for a copy that was lost; None if no witness reports one."""
        lost = self._witness.lost()
        if lost is not None:
            number = lost.number if lost.number < len(self._disks) else 0  # QEMU may send any number
            return _lost(self._disks[number].scratch, f"{lost.access}: {lost.error}")
        for fd, disk in zip(self._fds, self._disks, strict=True):
            error = scratch.write_back_error(fd)
            if error is not None:
                return _lost(disk.scratch, f"write: {error.strerror}")
        return None

    def _remove_through_new_connection(self) -> None:
        """Remove everything after the connection ended: QEMU may still run, and our jobs must not stay in it."""
        try:
            with Monitor(self._monitor.path) as monitor:
                self._require_storage()
                ours = leftovers.find_leftovers(monitor, [self._own])
                stopped = leftovers.stopped_guest(query_block_graph(monitor), ours)
                leftovers.remove_leftovers(monitor, ours, own_server=self._serving, clients=self._clients)
                if stopped:
                    leftovers.resume(monitor)
        except SourceError as error:
            _log.info("after the connection was lost: %s", error.message)

    def _look_after(self) -> None:
        """Make sure that our job never stops the guest.  Runs in a thread of its own."""
        while self.lost is None and not self._over.wait(_WATCH_SECONDS):
            try:
                self._look()
            except SourceError as error:
                self.lost = self.lost or error

    def _look(self) -> None:
        if not self._monitor.alive():
            raise MonitorLost(
                f"the QMP connection {self._monitor.path} ended while the disk was read",
                hint="was the machine shut down, or QEMU killed? run the command again",
            )
        lost = self._lost_copy()
        if lost is not None:
            self.lost = lost
            self._remove()
            return
        free, folder = min((free_bytes(fd), disk.scratch) for fd, disk in zip(self._fds, self._disks, strict=True))
        if free >= max(self._room.reserve, _LEAST) and not self._failed_the_guest():
            return
        self.lost = ran_out(folder, free)
        self._remove()


def _lost(folder: Path, why: str) -> SourceError:
    return SourceError(
        f"the scratch folder {folder} lost what the guest overwrote ({why}); "
        "the backup was stopped, and the guest continues",
        hint="free some space, name another folder with --scratch, or back up when the guest writes less",
    )
