"""
One instant of a running machine's disks, frozen for reading while the guest writes on.

Per disk an empty overlay lies on the disk; before the guest overwrites something, a job of QEMU's copies what was there
to the overlay (`blockdev-backup` with `sync: none`), so that the overlay goes on to read as the disk did at that
instant.  ONE transaction, for all disks, adds the new point's bitmaps, copies the old point's into the overlays, where
nothing writes, and starts the jobs (QEMU: docs/interop/bitmaps.rst; libvirt does the same).

    guest -> device -> [filter: copy before write] -> disk <- backing - overlay <- NBD export <- us
                              |                                           ^
                              +---------------- old data -----------------+

The overlay's storage is that of `scratch`.  Its file and the NBD server's socket are opened by us and passed as
descriptors: QEMU often runs as a user that may open neither.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from backup.errors import BackupError, Interrupted, SourceError
from backup.nbd.connection import Dialled
from backup.nbd.export import Export
from backup.qemu import folders, images
from backup.qmp import leftovers, scratch
from backup.qmp.blocks import OURS, Blocks
from backup.qmp.clients import Clients
from backup.qmp.leftovers import Place
from backup.qmp.monitor import Monitor, MonitorLost, Refused
from backup.runtime.signals import deferred, to_the_end

_log = logging.getLogger(__name__)

_SPARE_FILES = 12
"""Descriptors; a program that is started takes four, and a second connection to QEMU as many."""
_WATCH_SECONDS = 0.2
"""Between looks at the scratch folder's space and at QEMU's events."""
_LEAST = 4096
"""
Bytes, of any reserve.  With less the next copy fails; and where QEMU has no quorum, a guest behind an export of QEMU's,
not a device, gets that error without an event.
"""
_STORAGE_SECONDS, _AGAIN_SECONDS = 60.0, 5.0
"""How long scratch storage may take for a byte before nothing is removed from QEMU: the first time, and after that."""
_STOPS = {"STOP", "BLOCK_IO_ERROR"}
"""Events after which a guest may stand still."""


@dataclass(frozen=True, slots=True)
class Target:
    """
    One disk: its node and size (bytes); `read` names the bitmap to freeze, `start` the one that begins at the instant.

    `persistent`: can the node's image keep a bitmap?  The overlay's file is made in the folder `scratch`; the backup
    will write about `writes` bytes to the repository.
    """

    node: str
    size: int
    read: str | None
    start: str | None
    persistent: bool
    scratch: Path
    writes: int


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that must stay free on scratch file systems, and the repository's folder, which may lie on one of them."""

    reserve: int
    repository: Path | None


class Around(Protocol):
    """What the guest does for the transaction."""

    @property
    def wanted(self) -> bool:
        """Does it do anything?"""

    def begin(self) -> None:
        """Flush and freeze."""

    def end(self) -> None:
        """Go on, whatever happened; called also where `begin` failed or was never reached."""


class SizeChanged(SourceError):
    """A disk was resized between our look at it and the transaction."""


class BitmapNotAdded(SourceError):
    """QEMU refuses the bitmap that was to start on the target of this number, and why."""

    def __init__(self, number: int, refused: Refused) -> None:
        super().__init__(refused.message, hint=refused.hint)
        self.number = number
        self.why = refused.text


def prefix(short_id: str, point: str) -> str:
    """
    What the names of all that a point needs in QEMU begin with.

    A node's name has at most 31 bytes, so that of a point's id only the random part is in it.
    """
    return f"{OURS}{short_id}-{point.rpartition('-')[2]}-"


def query_blocks(monitor: Monitor) -> Blocks:
    """QEMU's block graph of this moment."""
    return Blocks.of(
        monitor.command("query-named-block-nodes", {"flat": True}),
        monitor.command("query-block"),
        monitor.command("x-debug-query-block-graph"),
        monitor.command("query-block-exports"),
    )


@contextmanager
def frozen_instant(
    monitor: Monitor,
    own: str,
    targets: Sequence[Target],
    room: Room,
    around: Around,
) -> Iterator[Instant]:
    """
    Freeze an instant of all targets, and let go of it in the end; `around` holds for the transaction alone.

    Parameters
    ----------
    own : str
        The prefix of all names.

    Raises
    ------
    SizeChanged
        A disk has another size now; nothing was changed.
    BitmapNotAdded
        A disk takes no new bitmap; nothing was changed.
    SourceError
        QEMU refuses, the scratch folder has no space, or (from within) the instant was lost while it was read.
    """
    with _spare_files() as give_back:
        instant = Instant(monitor, own, targets, room, give_back)
        try:
            instant.begin(around)
            yield instant
        except (BackupError, Interrupted) as error:
            instant.end()
            told = instant.lost if instant.lost is not None and isinstance(error, BackupError) else error
            told.hint = "; ".join([told.hint, *instant.troubles])
            raise told from None
        finally:
            instant.end()


@contextmanager
def _spare_files() -> Iterator[Callable[[], None]]:
    """Keep descriptors back for the removal, which needs some also where a run had no more; yields what frees them."""
    with ExitStack() as spare:
        for _ in range(_SPARE_FILES):
            spare.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        yield spare.close


class Instant:
    """A frozen instant."""

    def __init__(
        self, monitor: Monitor, own: str, targets: Sequence[Target], room: Room, before_end: Callable[[], None]
    ) -> None:
        self._monitor = monitor
        self._own = own
        self._targets = targets
        self._room = room
        self._before_end = before_end
        self._folder, self._lock = folders.shared_folder()
        self._socket = os.fspath(self._folder / "nbd")
        self._fds: list[int] = []
        self._serving = False
        self._undoing = threading.Lock()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look_after, name="watch", daemon=True)
        self._jobs: list[str] = []
        self._witness = scratch.Witness(monitor, own)
        self._clients = Clients(monitor, own, self._socket)
        self._silent = self._ended = False
        self._guard_refused = ""
        """QEMU's text, where it has no quorum."""
        self.lost: SourceError | None = None
        """Why what is read is not the instant any more; None while all is well."""
        self.troubles: list[str] = []
        """What went wrong at the end, when all was read."""

    def begin(self, around: Around) -> None:
        """Make the overlays, freeze, and serve them."""
        self._clients.stay = bool(self._monitor.command("query-iothreads"))
        for folder in dict.fromkeys(target.scratch for target in self._targets):
            self._require_space(folder)
        for number, target in enumerate(self._targets):
            self._add_overlay(number, target)
        # Python raises a signal where a function begins, also where `end` does: a guest must not stay frozen by that.
        with deferred() if around.wanted else nullcontext():
            try:
                around.begin()
                self._freeze()
            finally:
                around.end()
        self._jobs = [f"{self._own}j{number}" for number in range(len(self._targets))]
        self._watch.start()
        self._start_server()
        for number, target in enumerate(self._targets):
            self._export(number, target)

    @property
    def notes(self) -> list[str]:
        """What the user may want to know."""
        if not self._guard_refused:
            return []
        return [f"this QEMU refuses a quorum ({self._guard_refused}): a full scratch folder would stop the guest"]

    def require_kept(self) -> None:
        """
        Make sure, at no cost, that nothing is known that ended the instant.

        Raises
        ------
        SourceError
            Something is: there was no space for QEMU's copies, or the connection ended.
        """
        if self.lost is not None:
            raise self.lost

    def require_sound(self) -> None:
        """
        Make sure that all that was read was the instant: no job ended meanwhile, and no copy was lost.

        Asked after the last read, and before anybody relies on what was read.

        Raises
        ------
        SourceError
            A job was cancelled by someone, a copy is missing, or what `require_kept` raises.
        """
        self.require_kept()
        # The answer to any command comes after the events of all that was read before.
        there = {found["id"]: found["status"] for found in self._monitor.command("query-jobs")}
        ended = [job for job in self._jobs if there.get(job) not in {"running", "paused", "standby"}]
        if ended:
            raise SourceError(
                f"QEMU's job {ended[0]} ended while the disk was read: what was read is no instant of it",
                hint="was it cancelled by someone? run the command again",
            )
        self.lost = self.lost or self._lost_copy()
        self.require_kept()

    def end(self) -> None:
        """Remove all that was made.  What cannot be removed now is removed by the next run."""
        to_the_end(self._end)

    def _end(self) -> None:
        self._before_end()
        if self._ended:
            return
        self._over.set()
        if self._watch.ident is not None:
            self._watch.join(_STORAGE_SECONDS)  # it may wait for the scratch folder's storage
        try:
            self._let_go()
        except MonitorLost:
            self._undo_by_another()
        except scratch.Silent as error:
            self.troubles.append(error.message)
        except BackupError as error:
            self.troubles.append(f"{error.message}; what is left in QEMU is removed by the next run")
        while self._fds:
            fd = self._fds.pop()
            if self._silent:
                continue  # to close it may take as long as the storage does
            # A paused QEMU keeps passed descriptors open; the space at least is given back.
            with suppress(OSError):
                os.ftruncate(fd, 0)
            os.close(fd)
        folders.remove_folder(self._folder)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        self._ended = True

    def _require_space(self, folder: Path) -> None:
        try:
            free, device = leftovers.free_bytes(os.fspath(folder)), os.stat(folder).st_dev
        except OSError as error:
            raise SourceError(
                f"the scratch folder {folder} cannot be used: {error.strerror}",
                hint="name another one with --scratch (`scratch:` in the configuration)",
            ) from None
        shared = self._room.repository is not None and _device(self._room.repository) == device
        writes = sum(target.writes for target in self._targets) if shared else 0
        if free < self._room.reserve + writes:
            also = f", and the backup writes up to {writes} to the same file system" if shared else ""
            raise SourceError(
                f"the scratch folder {folder} has {free} bytes free; {self._room.reserve} must stay free{also}",
                hint="what the guest overwrites during the backup needs room there: free some space, name another "
                "folder with --scratch, or lower `scratch_reserve`",
            )

    def _add_overlay(self, number: int, target: Target) -> None:
        fd = images.create_scratch(target.scratch, target.size)
        self._fds.append(fd)
        opaque = Place(os.fspath(target.scratch), self._socket).opaque(self._own)
        fdset = self._monitor.pass_fd(fd, "add-fd", {"opaque": opaque})["fdset-id"]
        storage = scratch.file_node(self._own, number, fdset)
        overlay = {"driver": "qcow2", "node-name": f"{self._own}f{number}", "backing": target.node}
        if not self._guard_refused:
            guarded = scratch.guarded(self._own, number, storage, scratch.lengthen(fd, target.size))
            try:
                self._monitor.command("blockdev-add", {**overlay, "file": guarded})
                return
            except Refused as error:
                self._guard_refused = error.text
        self._monitor.command("blockdev-add", {**overlay, "file": storage})

    def _freeze(self) -> None:
        actions = [action for number, target in enumerate(self._targets) for action in self._actions(number, target)]
        try:
            self._monitor.command("transaction", {"actions": actions})
        except Refused as error:
            if "different sizes" in error.text:
                raise SizeChanged(error.message, hint=error.hint) from None
            self._require_bitmaps_taken()
            raise

    def _require_bitmaps_taken(self) -> None:
        """
        Make sure that each disk takes its new bitmap: QEMU does not say which part of a transaction it refused.

        Raises
        ------
        BitmapNotAdded
            One disk does not.
        """
        for number, target in enumerate(self._targets):
            if target.start is None:
                continue
            bitmap = {"node": target.node, "name": target.start}
            try:
                self._monitor.command("block-dirty-bitmap-add", {**bitmap, "persistent": target.persistent})
            except Refused as refused:
                raise BitmapNotAdded(number, refused) from None
            self._monitor.command("block-dirty-bitmap-remove", bitmap)

    def _actions(self, number: int, target: Target) -> Iterator[dict[str, object]]:
        overlay = f"{self._own}f{number}"
        if target.start is not None:
            added = {"node": target.node, "name": target.start, "persistent": target.persistent}
            yield {"type": "block-dirty-bitmap-add", "data": added}
        if target.read is not None:
            copied = {"node": overlay, "name": target.read, "disabled": True}
            yield {"type": "block-dirty-bitmap-add", "data": copied}
            # By node and name: a name alone would be looked for in the backing files too (trap 21).
            merged = {"node": overlay, "target": target.read, "bitmaps": [{"node": target.node, "name": target.read}]}
            yield {"type": "block-dirty-bitmap-merge", "data": merged}
        job = {
            "device": target.node,
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
            self._serving = True  # also where a signal hides the answer
            try:
                self._monitor.command("nbd-server-start", {"addr": {"type": "fd", "data": {"str": name}}})
            except Refused as error:
                self._serving = False
                self._monitor.command("closefd", {"fdname": name})
                raise (self._server_in_the_way() if "already running" in error.text else error) from None

    def _server_in_the_way(self) -> SourceError:
        what = "the machine's QEMU runs an NBD server already, and it can run only one"
        exports = [found["id"] for found in self._monitor.command("query-block-exports")]
        ours = next((name for name in exports if name.startswith(OURS)), None)
        if ours is not None:
            return SourceError(
                f"{what}: it serves {ours}",
                hint="is a backup under way? after one that was cut off, the next run or `pybackup clean` tidies up",
            )
        return SourceError(
            what,
            hint="another program (a libvirt backup, a migration) uses it: wait for it to end, or end it there",
        )

    def _export(self, number: int, target: Target) -> None:
        overlay, name = f"{self._own}f{number}", f"{self._own}e{number}"
        bitmaps = [{"node": overlay, "name": target.read}] if target.read is not None else []
        export = {"type": "nbd", "id": name, "node-name": overlay, "name": name, "bitmaps": bitmaps}
        self._monitor.command("block-export-add", export)

    def open(self, number: int) -> Export:
        """Open the disk of the target with this number for reading."""
        name, target = f"{self._own}e{number}", self._targets[number]
        uri = f"nbd+unix:///{name}?socket={quote(self._socket)}"
        dialled = Dialled(name, self._clients.dial, modest=self._clients.stay)
        return Export(uri, [] if target.read is None else [target.read], dialled=dialled)

    def _let_go(self) -> None:
        """Remove all, exports first: readers must not get what a disk holds now for what it held."""
        with self._undoing:
            self._require_storage()
            self._clients.leave()
            full = any(leftovers.is_full(fd) for fd in self._fds)
            stopped = self._stopped_the_guest()
            found = leftovers.find(self._monitor, [self._own])
            leftovers.remove(self._monitor, found, own_server=self._serving, clients=self._clients)
            self._serving = False
            # It may have been stopped only now; but a guest that its own disk's error stopped is not ours to resume.
            if stopped or (full and "STOP" in self._events()):
                leftovers.resume(self._monitor)

    def _require_storage(self) -> None:
        """Make sure that nothing hangs QEMU's main loop; storage that did not answer gets less time again."""
        files = {fd: os.fspath(target.scratch) for fd, target in zip(self._fds, self._targets, strict=False)}
        seconds = _AGAIN_SECONDS if self._silent else _STORAGE_SECONDS
        self._silent = True
        scratch.require_answering(files, seconds)
        self._silent = False

    def _failed_the_guest(self) -> bool:
        """Did it have an I/O error while there was no room for copies?  It may have to go on with that (werror)."""
        return "BLOCK_IO_ERROR" in self._events() and any(leftovers.is_full(fd) for fd in self._fds)

    def _stopped_the_guest(self) -> bool:
        """Asked often, so that QEMU is asked only after an event that may say so."""
        if not self._events() & _STOPS:
            return False
        return leftovers.stopped_guest(query_blocks(self._monitor), leftovers.find(self._monitor, [self._own]))

    def _events(self) -> set[str]:
        """Names of QEMU's events since the instant's begin."""
        return self._witness.events()

    def _lost_copy(self) -> SourceError | None:
        """That something of what the guest overwrote is not in the scratch files, where a witness says so."""
        lost = self._witness.lost()
        if lost is not None:
            known = lost.number if lost.number < len(self._targets) else 0  # QEMU's word is not trusted further
            return _lost(self._targets[known].scratch, f"{lost.access}: {lost.error}")
        for fd, target in zip(self._fds, self._targets, strict=True):
            error = scratch.write_back_error(fd)
            if error is not None:
                return _lost(target.scratch, f"write: {error.strerror}")
        return None

    def _undo_by_another(self) -> None:
        """The connection was cut; QEMU may be there all the same, and a guest must not be left with our jobs."""
        try:
            with Monitor(self._monitor.path) as again:
                self._require_storage()
                found = leftovers.find(again, [self._own])
                stopped = leftovers.stopped_guest(query_blocks(again), found)
                leftovers.remove(again, found, own_server=self._serving, clients=self._clients)
                if stopped:
                    leftovers.resume(again)
        except SourceError as error:
            _log.info("after the connection was lost: %s", error.message)

    def _look_after(self) -> None:
        """See to it that our job is never the reason why the guest stands still.  In a thread of its own."""
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
            self._let_go()
            return
        free, folder = min(
            (leftovers.free_bytes(fd), of.scratch) for fd, of in zip(self._fds, self._targets, strict=True)
        )
        if free >= max(self._room.reserve, _LEAST) and not self._failed_the_guest():
            return
        self.lost = SourceError(
            f"the scratch folder {folder} ran out of space ({free} bytes left) while the guest wrote; "
            "the backup was ended, and the guest goes on",
            hint="free some space, name another folder with --scratch, or back up when the guest writes less",
        )
        self._let_go()


def _lost(folder: Path, why: str) -> SourceError:
    return SourceError(
        f"the scratch folder {folder} lost what the guest overwrote ({why}); "
        "the backup was ended, and the guest goes on",
        hint="free some space, name another folder with --scratch, or back up when the guest writes less",
    )


def _device(folder: Path) -> int | None:
    """The file system of a folder, or of the one that it will be made in."""
    for path in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return os.stat(path).st_dev
    return None
