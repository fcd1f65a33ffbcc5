"""
One instant of a running domain's disks, through a backup job of libvirt in pull mode.

libvirt begins the job and a checkpoint (the new bitmaps) at one instant, saves in scratch files what the guest
overwrites from then on, and serves the disks of the instant over NBD on a Unix socket.  The job belongs to no
connection: it goes on when pybackup is killed or libvirt is restarted, and the next run ends it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from backup.errors import BackupError, Interrupted, SourceError, os_errors_as
from backup.model.libvirt_uri import has_usual_folders, is_session
from backup.nbd.connection import Dialled
from backup.qemu import folders
from backup.qemu.scratch_room import Room, ran_out
from backup.qemu.sockets import LONGEST
from backup.qmp.clients import Clients
from backup.runtime.ignoring import ignoring
from backup.runtime.shortage import free_bytes
from backup.runtime.signals import deferred, to_the_end
from backup.sources import libvirt_connections as connections
from backup.sources.base import NO_MACHINE_STATE, MachineState, Moved, NotStarted, Opened
from backup.sources.freezing import Freezing
from backup.sources.libvirt_domain import BROKEN_BITMAP, Domain, Refused
from backup.sources.libvirt_xml import DomainDocument, JobDisk, RunningJob, backup_xml, checkpoint_xml

if TYPE_CHECKING:
    from backup.nbd.export import Export

_log = logging.getLogger(__name__)

OURS = "pybackup-"
NOBODY = "0" * 8
"""The short id of dry runs, audits and `map`, which belong to no repository."""
_SYSTEM = Path("/var/lib/libvirt/qemu")
"""Where the daemon of the system keeps a folder for each running domain, in which its QEMU may make sockets."""
_FROZEN = "frozen"
"""Ends the name of a file beside the scratch files that is there while a run has the guest frozen."""
_WATCH_SECONDS = 0.2
"""Between two looks at the free space of the scratch folders."""
_LOOKS_PER_QUESTION = 5
"""How many looks there are for each question to libvirt whether the guest goes on."""
_FULL = 1 << 20
"""Bytes.  A file system with less free space is full: a scratch file grows by clusters of 64 KiB and their tables."""


def prefixes(short_id: str) -> tuple[str, str]:
    """What the names of this repository's exports begin with, and those of runs that belong to no repository."""
    return f"{OURS}{short_id}-", f"{OURS}{NOBODY}-"


def scratch_file(folder: Path, short_id: str, uuid: str, target: str, unique: str) -> Path:
    """The scratch file of a disk; its name tells the domain, so that only runs of the same domain remove it."""
    return folder / f"{OURS}{short_id}-{uuid}-{unique}-{target}"


def stale_files(domain: Domain, scratch: Sequence[Path], short_id: str) -> list[Path]:
    """Return the scratch files and the marks of a freeze that runs of this repository left for this domain."""
    uuid = domain.uuid()
    return [path for folder in scratch for each in (short_id, NOBODY) for path in folder.glob(f"{OURS}{each}-{uuid}-*")]


def is_mark(path: Path) -> bool:
    """Tell whether a file says that a run had the guest frozen."""
    return path.name.endswith(f"-{_FROZEN}")


def remove_stale(paths: Iterable[Path]) -> list[str]:
    """
    Remove what `stale_files` found; say which scratch files were removed.

    Call this only while no backup job of the domain runs.
    """
    removed = []
    for path in paths:
        with ignoring(_log, f"{path} is not removed", OSError):
            path.unlink()
            if not is_mark(path):
                removed.append(f"scratch file {path}")
    return removed


class Job:
    """
    A backup job of a domain, from its begin to its end.

    Parameters
    ----------
    disks : sequence of JobDisk
        What is read.
    document : DomainDocument
        The domain as it was inspected.
    writes : int
        Bytes that the backup writes to the repository, at most.
    kept : str or None
        The prefix of the names by which QEMU keeps one end of each connection; None: it need not keep them.
    """

    def __init__(
        self,
        domain: Domain,
        disks: Sequence[JobDisk],
        document: DomainDocument,
        room: Room,
        freezing: Freezing,
        *,
        writes: int = 0,
        kept: str | None = None,
    ) -> None:
        self._domain = domain
        self._disks = disks
        self._document = document
        self._room = room
        self._freezing = freezing
        self._folder, self._lock = folders.shared_folder()
        self._writes = writes
        self._kept = kept
        self._clients: Clients | None = None
        self._socket = ""
        self._folders = tuple(dict.fromkeys(Path(disk.scratch).parent for disk in disks))
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look_after, name="watch", daemon=True)
        self._begun = self._was_stopped = self._ended = False
        self.lost: SourceError | None = None
        """Why the data that is read no longer belongs to the instant; None as long as it does."""
        self.troubles: list[str] = []
        """What went wrong at the end, after everything was read."""

    def begin(self) -> None:
        """Freeze the guest, begin the job, and thaw the guest."""
        for folder in self._folders:
            self._room.require(folder, self._writes)
        self._was_stopped = self._domain.lacks_space()
        # Once libvirt was asked, a signal waits for the answer: else nothing would tell whether the job runs.
        with deferred(), self._marked():
            try:
                self._freezing.begin()
                self._begin()
            finally:
                self._freezing.end()
        if self._kept is not None:
            self._clients = Clients(self._domain, self._kept, self._socket, stay=True)
        self._watch.start()

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Leave a file for as long as the guest may be frozen, so that the next run knows if this one is killed."""
        if not self._freezing.wanted:
            yield
            return
        scratch = Path(self._disks[0].scratch)
        mark = scratch.with_name(f"{scratch.name.rpartition('-')[0]}-{_FROZEN}")
        with ignoring(_log, f"{mark} is not made", OSError):
            mark.touch(mode=0o600)
        try:
            yield
        finally:
            if self._freezing.stuck is None:
                with ignoring(_log, f"{mark} is not removed", OSError):
                    mark.unlink(missing_ok=True)

    def _begin(self) -> None:
        places = list(self._places())
        for number, place in enumerate(places, 1):
            self._socket = str(place)
            try:
                self._begin_at(place)
            except Refused as error:
                if "ailed to bind socket" not in error.text or number == len(places):
                    raise self._meaning(error) from None
                _log.info("no socket at %s: %s", place, error.text)
            else:
                return

    def _begin_at(self, place: Path) -> None:
        targets = {disk.target: disk for disk in self._disks}
        others = [disk.target for disk in self._document.disks if disk.target not in targets]
        started = [disk for disk in self._disks if disk.start is not None]
        checkpoint = None
        if started:
            kept = [disk.target for disk in self._disks if disk.start is None]
            checkpoint = checkpoint_xml(started[0].start or "", [disk.target for disk in started], [*kept, *others])
        self._begun = True  # before the answer, which may never come
        self._domain.begin_job(backup_xml(str(place), self._disks, others), checkpoint)

    def _meaning(self, error: Refused) -> SourceError:
        """What libvirt's refusal means for the run."""
        if error.code == BROKEN_BITMAP:
            return Moved(error.message)  # a bitmap that was there a moment ago
        first = next((number for number, disk in enumerate(self._disks) if disk.start is not None), None)
        if first is not None and "bitmap" in error.text.lower():
            return NotStarted(first, error, error.text, lasting=False)  # libvirt does not tell which disk's
        if not self._domain.is_on():
            return SourceError(
                f"domain {self._domain.name} was shut off before its backup began",
                hint="run the command again: the images of a domain that is off are backed up, too",
            )
        return error

    def _places(self) -> Iterator[Path]:
        """
        Paths where QEMU may make a socket and this user can reach it, the best one first.

        The security modules of distributions allow QEMU the domain's own folder.
        """
        own = f"{Path(self._disks[0].export).name.rpartition('-')[0]}-nbd"
        for folder in self._own_folders():
            path = folder / own
            if len(os.fsencode(path)) <= LONGEST and os.access(folder, os.X_OK):
                yield path
        yield self._made_folder() / "n"

    def _own_folders(self) -> Iterator[Path]:
        uri = self._domain.uri
        if not has_usual_folders(uri):
            return
        base = _SYSTEM
        if is_session(uri):
            base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "libvirt/qemu/lib"
        with ignoring(_log, f"reading {base}", OSError):
            yield from base.glob(f"domain-{self._domain.number()}-*")

    def _made_folder(self) -> Path:
        """A folder that only QEMU's user can enter, in one that everybody may pass through."""
        folder = self._folder / "q"
        user = self._qemu_user()
        folder.mkdir(mode=0o700, exist_ok=True)
        if user is not None and user[0] != os.geteuid():
            with os_errors_as(
                f"user {user[0]}, as which QEMU runs, cannot be given a folder for a socket",
                hint="run pybackup as root, or as the user of the session's libvirt",
                kind=SourceError,
            ):
                os.chown(folder, *user)
                os.chmod(self._folder, 0o711)  # noqa: S103 - to pass through, not to read
        return folder

    def _qemu_user(self) -> tuple[int, int] | None:
        if self._document.owner is not None:
            return self._document.owner
        # Without a label, QEMU runs as root, who needs no folder, or as the user who may read the image.
        targets = {disk.target for disk in self._disks}
        image = next(disk.path for disk in self._document.disks if disk.target in targets)
        with ignoring(_log, f"owner of {image}", OSError):
            status = os.stat(image or "")
            return status.st_uid, status.st_gid
        return None

    def open(self, number: int) -> Export:
        """Open the disk with this number for reading."""
        from backup.nbd.export import Export  # noqa: PLC0415 - brings numpy, which takes long to import

        disk = self._disks[number]
        uri = f"nbd+unix:///{quote(disk.export)}?socket={quote(self._socket)}"
        dialled = None if self._clients is None else Dialled(disk.export, self._clients.dial, modest=True)
        return Export(uri, [] if disk.read is None else [disk.read], dialled=dialled)

    def require_kept(self) -> None:
        """
        Make sure that no loss of the instant is known.  This costs nothing.

        Raises
        ------
        SourceError
            The scratch folder had no room.
        """
        if self.lost is not None:
            raise self.lost

    def require_sound(self) -> None:
        """
        Make sure that everything that was read belongs to the instant: the job goes on, for each disk.

        Raises
        ------
        SourceError
            The job ended, or `require_kept` raises.
        """
        self.require_kept()
        job = self._domain.job()
        gone = [disk.target for disk in self._disks if not self._is_ours(job) or not self._domain.reads(disk.target)]
        if gone:
            raise SourceError(
                f"libvirt's backup job ended while disk {gone[0]} was read: what was read is no instant of it",
                hint="was the job aborted (virsh domjobabort), or the domain shut off? run the command again",
            )
        self.require_kept()

    def _is_ours(self, job: RunningJob | None) -> bool:
        return job is not None and job.socket == self._socket

    def end(self) -> None:
        """End the job, and remove everything that was made.  The next run removes what cannot be removed now."""
        to_the_end(self._end)

    def _end(self) -> None:
        if self._ended:
            return
        self._over.set()
        if self._watch.ident is not None:
            self._watch.join()
        if self._begun:
            try:
                self._end_job()
            except SourceError as error:
                self.troubles.append(f"{error.message}; what is left of the job is removed by the next run")
            with ignoring(_log, f"{self._socket} is not removed", OSError):
                Path(self._socket).unlink(missing_ok=True)
        folders.remove_folder(self._folder)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        self._ended = True

    def _end_job(self) -> None:
        ours = self._is_ours(self._domain.job())
        if self._clients is not None:
            self._leave(self._clients, ours=ours)
        if ours:
            self._domain.end_job()
        if not self._was_stopped and self._domain.is_on() and self._domain.lacks_space():
            self._domain.resume()  # QEMU tries the write again, which needs no room in a scratch file any more

    def _leave(self, clients: Clients, *, ours: bool) -> None:
        """End our connections before the job.  If the job has ended already, or the domain, there are none."""
        assert self._kept is not None
        clients.leave()
        if ours:
            connections.end(self._domain, self._socket, [self._kept], clients)
            return
        with ignoring(_log, "closing the ends of connections that QEMU keeps", SourceError):
            connections.close_kept(self._domain, [self._kept])
        clients.close()

    def explained(self, error: BackupError) -> BackupError:
        """Return why the read failed: the loss of the instant, a domain that is off now, or the error itself."""
        if self.lost is not None:
            return self.lost
        with ignoring(_log, "asking for the domain's state", SourceError):
            if self._begun and not self._domain.is_on():
                return SourceError(
                    f"domain {self._domain.name} was shut off while its disks were read",
                    hint="run the command again: the images of a domain that is off are backed up, too",
                )
        return error

    def _look_after(self) -> None:
        """Make sure that the job never stops the guest.  Runs in a thread of its own."""
        looks = 0
        while self.lost is None and not self._over.wait(_WATCH_SECONDS):
            looks += 1
            try:
                self._look()
                if self.lost is None and looks % _LOOKS_PER_QUESTION == 0:
                    self._ask()
            except (SourceError, OSError) as error:
                _log.info("watching the scratch folders: %s", error)

    def _look(self) -> None:
        free, folder = min((free_bytes(folder), folder) for folder in self._folders)
        if free >= max(self._room.reserve, _FULL):
            return
        self.lost = ran_out(folder, free)
        self._end_job()

    def _ask(self) -> None:
        """Find a guest that lacks space although the scratch folders seem to have some (a quota, for example)."""
        if self._was_stopped or not self._domain.lacks_space():
            return
        self.lost = SourceError(
            f"QEMU stopped the guest of domain {self._domain.name} for lack of space; the backup was stopped, and the "
            "guest continues",
            hint="has the storage of the images, or the scratch folder, a quota? free some space, or name another "
            "folder with --scratch",
        )
        self._end_job()


@dataclass(slots=True)
class DomainMoment:
    """An instant of a running domain that libvirt keeps."""

    job: Job
    freezing: Freezing
    doubts: Sequence[str]
    remarks: Sequence[str] = ()
    disks: list[Opened] = field(default_factory=list)
    machine: MachineState = NO_MACHINE_STATE

    @property
    def consistency(self) -> str:
        """`filesystem` if the guest was frozen, else `crash`."""
        return self.freezing.consistency

    @property
    def warnings(self) -> Sequence[str]:
        """Of the disks, of the freeze, and of what could not be removed in the end."""
        return [*self.doubts, *self.freezing.warnings, *self.job.troubles]

    @property
    def notes(self) -> Sequence[str]:
        """What was seen of the domain, and how long the guest was frozen."""
        return [*self.remarks, *self.freezing.notes]

    def require_kept(self) -> None:
        """Make sure that no loss of the instant is known."""
        self.freezing.require_held()
        self.job.require_kept()

    def require_sound(self) -> None:
        """Make sure that everything that was read belongs to the instant."""
        self.freezing.require_held()
        self.job.require_sound()


@contextmanager
def running_job(job: Job) -> Iterator[Job]:
    """
    Begin a job, and end it with the block.

    Raises
    ------
    BackupError
        The job cannot begin, or what went wrong in the block.
    """
    try:
        job.begin()
        yield job
    except (BackupError, Interrupted) as error:
        told = (
            job.explained(error)
            if isinstance(error, BackupError) and not isinstance(error, Moved | NotStarted)
            else error
        )
        job.end()
        told.hint = "; ".join([told.hint, *job.troubles])
        raise told from None
    finally:
        job.end()
