"""
The disks of a domain of libvirt: on, through a backup job of libvirt; off, from their images under their locks.

Both ways continue one chain, because the bitmaps are kept in the images.  libvirt knows a bitmap only as a checkpoint,
and its records of checkpoints are in the way of users (`virsh undefine` refuses) and of other backup tools.  So a run
has libvirt record the bitmaps that it needs, and removes the records at its end; the bitmaps stay.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from backup.errors import Locked, SourceError
from backup.model.disk import Bitmap, DiskState, own_bitmaps
from backup.model.manifest import LowerFile
from backup.qemu import images, scratch_room
from backup.qmp.agent import AgentError
from backup.runtime.signals import to_the_end
from backup.runtime.threads import Begun
from backup.sources import libvirt_connections as connections
from backup.sources import libvirt_job as jobs
from backup.sources.base import NO_FREEZE, Capture, Freeze, MachineState, Moment, Moved, Opened, Owner, Source
from backup.sources.freezing import Freezing
from backup.sources.image import ImageSource
from backup.sources.libvirt_domain import Domain, Refused
from backup.sources.libvirt_job import DomainMoment, Job
from backup.sources.libvirt_lock import only_run
from backup.sources.libvirt_records import Records
from backup.sources.libvirt_state import machine_state
from backup.sources.libvirt_xml import DomainDisk, DomainDocument, JobDisk
from backup.sources.resting import AtRest

KIND = "libvirt"
"""The kind of source that the manifest records."""


class Libvirt:
    """
    A domain; each `with` decides anew whether it is on or off.

    Parameters
    ----------
    uri : str
        The daemon's.
    name : str
        The domain's.
    targets : sequence of str
        Its disks by their target devices (vda); none: all but drives for removable media.
    exclude : sequence of str
        Disks that are left out knowingly.
    complain : bool
        Warn of disks that are neither named nor excluded.
    scratch : Path or None
        The folder for what the guest overwrites meanwhile; None: the image's own.
    reserve : int
        Bytes that must stay free there.
    """

    def __init__(
        self,
        uri: str,
        name: str,
        targets: Sequence[str] = (),
        *,
        exclude: Sequence[str] = (),
        complain: bool = False,
        scratch: Path | None = None,
        reserve: int = 0,
        freeze: Freeze = NO_FREEZE,
    ) -> None:
        self.name = name
        self.domain = Domain(uri, name)
        self.sources = tuple(DomainSource(self, target) for target in targets)
        self._all = not targets
        self._exclude = tuple(exclude)
        self._complain = complain
        self._scratch = None if scratch is None else scratch.absolute()
        self._reserve = reserve
        self._freeze = freeze
        self._no_agent: AgentError | None = None
        self._may_be_frozen = False
        self._is_on = False
        self._leave = ExitStack()
        self.records = Records(self.domain)
        self._seen = _Seen()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self.domain.close)
            self.domain.connect()
            undo.enter_context(only_run(self.domain.uuid(), self.name))
            self._is_on = self.domain.is_on()
            undo.callback(to_the_end, self.records.forget)
            self._leave = undo.pop_all()
        self._look_again()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._leave.close()

    @property
    def is_on(self) -> bool:
        """Whether the domain had a running QEMU when this run looked."""
        return self._is_on

    # Disks

    def _look_again(self, reads: Mapping[str, str | None] | None = None) -> None:
        """Drop what is known of the disks and their bitmaps (`reads`: see `Records.ask_again`)."""
        self._seen = _Seen()
        self.records.ask_again(reads)

    def document(self) -> DomainDocument:
        """The domain as it is, or will be at its next start."""
        return self.domain.document(on=self._is_on)

    def discover(self) -> Sequence[tuple[str, Source]]:
        """
        Return all disks but drives for removable media and the excluded ones, if no disks were named.

        Raises
        ------
        SourceError
            There is no such disk.
        """
        if not self._all:
            return ()
        found = [disk for disk in self._disks() if not disk.removable and disk.target not in self._exclude]
        if not found:
            raise SourceError(
                f"domain {self.name} has no disk that is not excluded",
                hint="name a disk with --disk (vda, for example); a cdrom or a floppy must be named",
            )
        self.sources = tuple(DomainSource(self, disk.target) for disk in found)
        return [(source.target, source) for source in self.sources]

    def lacks(self, disk: str, path: str) -> bool:
        """Tell whether the domain, whose disks the user did not name, has no such disk although it is not excluded."""
        if not self._all or disk in self._exclude:
            return False
        return all(disk != found.target and path != found.path for found in self._disks())

    def disk(self, target: str) -> DomainDisk:
        """
        Find a disk that pybackup can read.

        Raises
        ------
        SourceError
            The domain has no such disk, or it cannot be read.
        """
        disks = {disk.target: disk for disk in self._disks()}
        if target not in disks:
            raise SourceError(
                f"domain {self.name} has no disk {target!r}", hint=f"it has: {', '.join(disks) or 'no disk at all'}"
            )
        why_not = disks[target].why_unreadable()
        if why_not is not None:
            raise SourceError(f"disk {target} of domain {self.name} cannot be backed up: {why_not[0]}", hint=why_not[1])
        return disks[target]

    def size(self, target: str) -> int:
        """The size of a disk of the running domain, in bytes."""
        if self._seen.sizes is None:
            self._seen.sizes = self.domain.sizes()
        size = self._seen.sizes.get(target)
        return self.domain.size(target)[0] if size is None else size

    def inspection(self, target: str) -> Begun[images.ImageInfo]:
        """Have qemu-img inspect the image of a disk of the running domain; all disks' images are inspected at once."""
        if target not in self._seen.images:
            chosen = {source.target for source in self.sources}
            for disk in self._disks():
                if disk.target in chosen and disk.why_unreadable() is None:
                    self._seen.images[disk.target] = _begin_inspection(disk)
        return self._seen.images[target]

    def _disks(self) -> Sequence[DomainDisk]:
        return self._document_once().disks

    def _document_once(self) -> DomainDocument:
        if self._seen.document is None:
            self._seen.document = self.document()
        return self._seen.document

    def _unnamed(self, document: DomainDocument) -> list[str]:
        """Warnings: disks of the domain that no point holds though nobody excluded them."""
        known = {*self._exclude, *(source.target for source in self.sources)}
        return [
            f"disk {disk.target} ({disk.path or disk.storage}) of domain {self.name} is in no point: name the disk "
            "(--disk, `disks:`), or exclude it (--exclude, `exclude:`)"
            for disk in document.disks
            if self._complain and not disk.removable and disk.target not in known
        ]

    def _doubts(self, document: DomainDocument) -> list[str]:
        """Warnings: what makes a point of the domain less than it seems."""
        read = {source.target for source in self.sources}
        shared = [disk.target for disk in document.disks if disk.shareable and disk.target in read]
        frozen = (
            "the guest's file systems may still be frozen by a run that was killed, and no agent answers: thaw them "
            f"(virsh domfsthaw {self.name})"
        )
        return [
            *([frozen] if self._may_be_frozen else []),
            *self._unnamed(document),
            *(f"disk {target}: {_SHARED}; the point may hold several moments of the disk" for target in shared),
        ]

    def _remarks(self, document: DomainDocument) -> list[str]:
        """Notes: what the user may want to know."""
        there = {disk.target for disk in document.disks}
        gone = [target for target in self._exclude if target not in there]
        notes = [f"disk {target} is excluded, and domain {self.name} has no such disk" for target in gone]
        if self._is_on and self.domain.has_crashed():
            notes.append(
                f"the guest of domain {self.name} has crashed; the point holds the disks as the guest left them"
            )
        if not self._is_on and self.domain.is_saved():
            saved = f"the memory of domain {self.name} is saved (managedsave) and in no point"
            notes.append(f"{saved}: a restored machine starts anew")
        return notes

    # What cut-off runs left

    def recover(self, owner: Owner) -> Sequence[str]:
        """
        Remove what runs of this repository that were cut off have left in libvirt, and nothing else.

        Raises
        ------
        Locked
            Another program's job runs, or a run of another machine to which what is left may belong.
        """
        folders = self._scratch_folders()
        marked = any(map(jobs.is_mark, jobs.stale_files(self.domain, folders, owner.short_id)))
        done = self._thaw_leftover(marked=marked) if self._is_on else []
        if self._is_on:
            done += self._end_leftover(owner)
        done += self._delete_leftovers(owner)
        stale = jobs.stale_files(self.domain, folders, owner.short_id)
        kept = self._may_be_frozen  # so that the next run tries again
        return [*done, *jobs.remove_stale(path for path in stale if not (kept and jobs.is_mark(path)))]

    def _thaw_leftover(self, *, marked: bool) -> list[str]:
        """
        Thaw the guest if a run may have been killed while the guest was frozen; a run that freezes always does so.

        `marked`: a run that was to freeze the guest was killed in between.
        """
        agent = self._document_once().agent
        self._may_be_frozen = marked and agent is not None
        if agent != "connected" or not (marked or self._freeze.wanted):
            return []
        try:
            thawed = self.domain.thaw()
        except AgentError as error:
            self._no_agent = error  # said when the freeze is due, without another wait
            return []
        self._may_be_frozen = False
        return ["a freeze of the guest's file systems"] if thawed else []

    def _clients_must_stay(self, document: DomainDocument) -> bool:
        """Whether QEMU must keep one end of each connection; it is asked once until the next `_look_again`."""
        if self._seen.clients_must_stay is None:
            self._seen.clients_must_stay = connections.must_stay(self.domain, document)
        return self._seen.clients_must_stay

    def _end_leftover(self, owner: Owner) -> list[str]:
        ours = jobs.prefixes(owner.short_id)
        self.require_free(ours)
        kept = self._clients_must_stay(self._document_once())
        job = self.domain.job()
        if job is None:
            if kept:
                connections.close_kept(self.domain, ours)
            return []
        owner.require_alone()
        stopped = self.domain.lacks_space()
        if kept:
            connections.end(self.domain, job.socket or "", ours)
        self.domain.end_job()
        done = [f"backup job {job.exports[0]}"]
        if stopped and self.domain.lacks_space():  # if an image has no space, QEMU stops the guest again
            self.domain.resume()
            done.append("a stop of the guest for lack of space")
        return done

    def require_free(self, ours: Sequence[str] = ()) -> None:
        """
        Make sure that libvirt runs no job of the domain but a backup whose exports have names that begin with `ours`.

        libvirt would let a new backup wait for half a minute, and then refuse.

        Raises
        ------
        Locked
            It runs one.
        """
        job = self.domain.job()
        if job is None:
            self.domain.require_no_other_job()
            return
        if job.is_named(ours):
            return
        exports = ", ".join(name or "without a name" for name in job.exports) or "none"
        if job.is_named([jobs.OURS]):
            raise Locked(
                f"libvirt runs a backup job of pybackup for domain {self.name} already (exports: {exports})",
                hint="wait for its end; if that run was killed, its next run removes the job, and so does `pybackup "
                "clean --libvirt URI --domain NAME` with its repository",
            )
        raise Locked(
            f"libvirt runs a backup job of another program for domain {self.name} (exports: {exports})",
            hint=f"wait for its end; if nobody needs the job, end it: virsh domjobabort {self.name}",
        )

    def _delete_leftovers(self, owner: Owner) -> list[str]:
        """
        Delete the checkpoints of points that were never published.

        The other records of this repository's checkpoints go at the end of the run: the run needs them to find bitmaps
        that are to be removed.  While the domain is off, its images show the bitmaps.
        """
        done = []
        for name in own_bitmaps(self.domain.checkpoints(), owner.short_id, keep=None):
            if self._is_on and not owner.has_point(name.rpartition(".")[2]):
                owner.require_alone()
                self.records.delete(name)
                done.append(f"checkpoint {name}, which belongs to no point")
            else:
                self.records.forget_at_the_end(name)
        return done

    def _scratch_folders(self) -> list[Path]:
        if self._scratch is not None:
            return [self._scratch]
        paths = [disk.path for disk in self._disks() if disk.path is not None]
        return list(dict.fromkeys(Path(path).parent for path in paths if not Path(path).is_block_device()))

    # The instant

    @contextmanager
    def instant(
        self, captures: Sequence[Capture], lanes: int, *, point: str, repository: Path | None, short_id: str
    ) -> Iterator[Moment]:
        """
        Capture one instant of all disks.

        Raises
        ------
        Moved
            A disk changed since it was inspected.
        NotStarted
            A disk takes no new bitmap.
        Locked
            libvirt runs another job.
        """
        if not self._is_on:
            with self._resting(captures, lanes, point=point, repository=repository, short_id=short_id) as resting:
                yield resting
            return
        try:
            with self._running(captures, point=point, repository=repository, short_id=short_id) as moment:
                yield moment
        finally:
            self._look_again()

    @contextmanager
    def _running(
        self, captures: Sequence[Capture], *, point: str, repository: Path | None, short_id: str
    ) -> Iterator[Moment]:
        self.require_free()
        document = self.document()
        unique = point.rpartition("-")[2]
        disks = [
            self._job_disk(source, capture, short_id, unique)
            for source, capture in zip(self.sources, captures, strict=True)
        ]
        for disk in disks:
            if disk.start is not None:
                self.records.forget_at_the_end(disk.start)
        freezing = Freezing(self._freeze, lambda: Agent(self), self._no_agent)
        job = Job(
            self.domain,
            disks,
            document,
            scratch_room.Room(self._reserve, repository),
            freezing,
            writes=sum(self._writes(disk) for disk in disks),
            kept=jobs.prefixes(short_id)[0] if self._clients_must_stay(document) else None,
        )
        moment = DomainMoment(job, freezing, self._doubts(document), self._remarks(document))
        with freezing.told(), jobs.running_job(job), ExitStack() as opened:  # connections close before the job ends
            moment.machine = self._machine_state()
            self._look_again({disk.target: disk.read for disk in disks})
            if self._document_once().iothreads != document.iothreads:
                raise Moved(f"domain {self.name} got or lost an iothread before its instant was captured")
            for number, (source, capture) in enumerate(zip(self.sources, captures, strict=True)):
                _require_settled(source, capture)
                export = job.open(number)
                opened.callback(export.close)
                moment.disks.append(Opened(export, capture.read_bitmap))
            yield moment

    @contextmanager
    def _resting(
        self, captures: Sequence[Capture], lanes: int, *, point: str, repository: Path | None, short_id: str
    ) -> Iterator[Moment]:
        document = self.document()
        resting = AtRest([source.image() for source in self.sources])
        try:
            with resting.instant(captures, lanes, point=point, repository=repository, short_id=short_id) as moment:
                notes = (*moment.notes, *self._remarks(document))
                warnings = (*moment.warnings, *self._doubts(document))
                yield replace(moment, warnings=warnings, notes=notes, machine=self._machine_state())
        except images.ImageLocked as error:
            error.hint = (
                f"domain {self.name} was off when this run began; if it was started meanwhile, run the command again; "
                "else another program uses the image"
            )
            raise

    def _machine_state(self) -> MachineState:
        running = self.domain.running_xml() if self._is_on else None
        return machine_state(self.domain.definition(), self.domain.uri, running=running)

    def _job_disk(self, source: DomainSource, capture: Capture, short_id: str, unique: str) -> JobDisk:
        folder = self._scratch or scratch_room.folder_of(capture.state.path)
        scratch = jobs.scratch_file(folder, short_id, self.domain.uuid(), source.target, unique)
        export = f"{jobs.OURS}{short_id}-{unique}-{source.target}"
        return JobDisk(source.target, capture.read_bitmap, capture.start_bitmap, export, os.fspath(scratch))

    def _writes(self, disk: JobDisk) -> int:
        if disk.read is not None:
            return self.records.dirty_bytes(disk.read, disk.target) or 0
        return self.domain.size(disk.target)[1]

    def require_agent(self) -> None:
        """
        Make sure that the domain has an agent channel, and that an agent is connected to it.

        Raises
        ------
        AgentError
            It has none.
        """
        agent = self.document().agent
        if agent != "connected":
            why = "has no agent channel" if agent is None else "has an agent channel, but no agent is connected to it"
            raise AgentError(
                f"domain {self.name} {why}",
                hint="install qemu-guest-agent in the guest, and give the domain the channel org.qemu.guest_agent.0",
            )


@dataclass(slots=True)
class _Seen:
    """What was seen of the domain's disks, by target; libvirt and qemu-img are asked once for all of them."""

    document: DomainDocument | None = None
    clients_must_stay: bool | None = None
    sizes: dict[str, int] | None = None
    images: dict[str, Begun[images.ImageInfo]] = field(default_factory=dict)


def _begin_inspection(disk: DomainDisk) -> Begun[images.ImageInfo]:
    return Begun(lambda: images.image_info(Path(disk.path or ""), disk.format, shared=True), "qemu-img")


def _require_settled(source: DomainSource, capture: Capture) -> None:
    """After the instant, everything must be as it was inspected."""
    now = source.inspect()
    before = replace(now, bitmaps=tuple(bitmap for bitmap in now.bitmaps if bitmap.name != capture.start_bitmap))
    if before != capture.state:
        raise Moved(f"disk {source.target} of the domain changed before its instant was captured")
    if capture.start_bitmap is not None and now.bitmap(capture.start_bitmap) is None:
        raise Moved(f"disk {source.target} of the domain has no bitmap {capture.start_bitmap}, which was to start")


class Agent:
    """The guest agent, through libvirt's channel (`freezing.GuestAgent`)."""

    def __init__(self, host: Libvirt) -> None:
        self._host = host

    def __enter__(self) -> Self:
        self._host.require_agent()
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def close(self) -> None:
        """Do nothing: the channel is libvirt's."""

    def frozen(self) -> bool:
        """Return true: libvirt does not tell, and thawing a guest that is not frozen changes nothing."""
        return True

    def freeze(self) -> int:
        """Freeze the guest's file systems; return how many."""
        return self._host.domain.freeze()

    def thaw(self) -> int:
        """Thaw the guest's file systems; return how many were frozen."""
        return self._host.domain.thaw()


@dataclass(frozen=True, slots=True)
class DomainImage(ImageSource):
    """The image of a domain that is off.  `disk` is its disk in the domain."""

    disk: DomainDisk = field(kw_only=True)

    def inspect(self) -> DiskState:
        """Have qemu-img inspect the image; the source is libvirt, whether the domain is on or off."""
        return _of_domain(replace(ImageSource.inspect(self), kind=KIND), self.disk)


class DomainSource:
    """A disk of a domain, by its target device."""

    def __init__(self, host: Libvirt, target: str) -> None:
        self._host = host
        self.target = target

    def image(self) -> DomainImage:
        """The disk's image, to be read while the domain is off."""
        disk = self._host.disk(self.target)
        return DomainImage(Path(disk.path or ""), disk.format, disk=disk)

    def foreign_format(self) -> str | None:
        """None: libvirt says the format."""
        return None

    def guessed_format(self) -> str | None:
        """None: libvirt says the format."""
        return None

    def expect_bitmaps(self, names: Collection[str]) -> None:
        """Have every inspection ask libvirt for these bitmaps: it does not list what it has no record of."""
        self._host.records.expect(self.target, names)

    def expect_removal(self, names: Collection[str]) -> None:
        """Have libvirt remove these bitmaps together with those of the other disks."""
        self._host.records.expect_removal(self.target, names)

    def inspect(self) -> DiskState:
        """
        Inspect the disk through libvirt, or its image while the domain is off.

        Raises
        ------
        SourceError
            The disk cannot be inspected.
        """
        disk = self._host.disk(self.target)
        if not self._host.is_on:
            return self.image().inspect()
        inspection = self._host.inspection(self.target)
        size = self._host.size(self.target)
        sound = self._soundness()
        info = inspection.result(lambda: None)  # the thread limits the time
        state = DiskState(
            kind=KIND,
            path=disk.path or "",
            format=disk.format,
            size=-(-size // 512) * 512,
            bitmaps=tuple(_bitmaps(sound, info.bitmaps)),
            no_bitmaps=info.no_bitmaps,
            unseen_writes=info.unseen_writes or _why_other_chain(disk, info),
            lower=tuple(LowerFile(layer.path, layer.size, layer.mtime_ns, layer.inode) for layer in info.lower),
            lower_bitmaps=info.lower_bitmaps,
            plaintext=info.encrypted or disk.encrypted,
            lists_bitmaps=False,
            data_file=images.external_data_file(info.data_file, disk.path or "", open_in_qemu=True),
        )
        return _of_domain(state, disk)

    def _soundness(self) -> dict[str, bool]:
        """Tell for each bitmap that the disk may have whether libvirt vouches for it."""
        records = self._host.records
        return {name: records.dirty_bytes(name, self.target) is not None for name in records.possible(self.target)}

    def why_no_bitmap(self, state: DiskState) -> str | None:
        """An image that can hold no bitmap, or whose writers no bitmap sees, gets none."""
        return state.why_untrusted or state.no_bitmaps

    def remove_bitmap(self, name: str) -> None:
        """Remove a bitmap of the disk, through libvirt or from the image."""
        if self._host.is_on:
            try:
                self._host.records.remove(name, self.target)
            except Refused:
                if self._host.domain.is_on():
                    raise
                self._host.records.forget_at_the_end(name)
            else:
                return
        self.image().remove_bitmap(name)  # the domain is off, perhaps since a moment ago

    def qemu_version(self) -> str | None:
        """The version of libvirt's QEMU, or of qemu-img."""
        return self._host.domain.qemu_version() if self._host.is_on else self.image().qemu_version()


def _bitmaps(sound: Mapping[str, bool], stored: Sequence[images.ImageBitmap]) -> Iterator[Bitmap]:
    """
    The bitmaps that libvirt vouches for, and those that are stored in the image.

    libvirt tells of no others than those it is asked for.  QEMU has all stored ones in use, so that the image does not
    show which are sound: only libvirt's word makes one usable.
    """
    granularities = {bitmap.name: bitmap.granularity for bitmap in stored}
    for name, vouched in sound.items():
        if vouched:
            yield Bitmap(name)
        elif name in granularities:
            yield Bitmap(name, granularities[name], inconsistent=True)
    for name, granularity in granularities.items():
        if name not in sound:
            yield Bitmap(name, granularity, inconsistent=True)


_SHARED = "libvirt shares it with other machines (<shareable/>), whose writes this QEMU cannot see"


def _of_domain(state: DiskState, disk: DomainDisk) -> DiskState:
    """What libvirt's configuration of a disk says beyond its image, on and off alike."""
    unseen = state.unseen_writes or (_SHARED if disk.shareable else None)
    no_bitmaps = state.no_bitmaps
    if disk.read_only and no_bitmaps is None:
        no_bitmaps = "libvirt gives it to the machine read-only, and QEMU keeps no bitmap in such an image"
    return replace(state, unseen_writes=unseen, no_bitmaps=no_bitmaps)


def _why_other_chain(disk: DomainDisk, info: images.ImageInfo) -> str | None:
    """Why the files below the image may not be those that QEMU reads."""
    if disk.data_store is not None and disk.data_store != info.data_file:
        return f"QEMU has the external data file {disk.data_store}, and the image's header names {info.data_file}"
    ours = [os.path.realpath(layer.path) for layer in info.lower]
    theirs = [None if path is None else os.path.realpath(path) for path in disk.backing]
    if ours == theirs:
        return None
    return "QEMU has other files below the image than its header names, so that changes of them could go unseen"
