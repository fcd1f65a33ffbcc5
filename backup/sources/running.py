"""
The disks of a running machine: nodes of its QEMU, captured at one instant through QMP while the guest goes on writing.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Self

from backup.errors import Locked, SourceError, UsageError
from backup.model import disk
from backup.model.disk import Bitmap, DiskState
from backup.model.manifest import LowerFile
from backup.model.names import name_problem
from backup.qemu import images, scratch_room
from backup.qmp import instant as fleece
from backup.qmp import leftovers, process, scratch
from backup.qmp.agent import Agent, AgentError
from backup.qmp.answers import Refused
from backup.qmp.blocks import OURS, BlockGraph, Device, Node
from backup.qmp.instant import Instant, InstantDisk
from backup.qmp.monitor import Monitor
from backup.runtime.ignoring import ignoring
from backup.sources.base import (
    NO_FREEZE,
    NO_MACHINE_STATE,
    Capture,
    Freeze,
    ListsBitmaps,
    MachineState,
    Moved,
    NotStarted,
    Opened,
    Owner,
    Source,
)
from backup.sources.freezing import Freezing

_log = logging.getLogger(__name__)

_STORAGE_SECONDS = 60.0
"""How long it may take to make a file in the scratch folder of an interrupted run."""
_ELSEWHERE = {
    "inmigrate": "that QEMU waits for a machine to be migrated to it",
    "finish-migrate": "it is being migrated to another QEMU",
    "postmigrate": "it was migrated to another QEMU",
}
"""States (RunState) in which another QEMU writes to the images, so that data that is read here may be out of date."""

_PASSED_THROUGH = {"host_device", "iscsi"}
"""Drivers of storage to which a device can pass the guest's SCSI commands."""
_PASS_THROUGH = {"scsi-block", "scsi-generic"}
"""Devices that pass the guest's commands to the storage; QEMU's block layer sees no writes in those."""


class Running:
    """
    A running machine as a host.

    Parameters
    ----------
    socket : Path
        QEMU's QMP socket.
    nodes : sequence of str or None
        The machine's disks, each by its node's name, its device's id or its image.  None: all writable disks.
    images : sequence of Path
        The image of each of `nodes`, for a machine whose disks are read from images while the machine is off.
    exclude : sequence of str
        Disks that are left out on purpose, named in the same ways.
    complain : bool
        Warn of disks that are neither named nor excluded.
    scratch : Path or None
        Folder in which QEMU keeps what the guest overwrites meanwhile; None: the folder of each image.
    reserve : int
        Bytes that must stay free in that folder.
    """

    def __init__(
        self,
        socket: Path,
        nodes: Sequence[str] | None,
        *,
        images: Sequence[Path] = (),
        exclude: Sequence[str] = (),
        complain: bool = False,
        scratch: Path | None = None,
        reserve: int = 0,
        freeze: Freeze = NO_FREEZE,
    ) -> None:
        self.socket = socket
        pairs = zip_longest(nodes or (), images)
        self.sources = tuple(NodeSource(self, node, image) for node, image in pairs)
        self._all = nodes is None
        self._exclude = tuple(exclude)
        self._complain = complain
        # If this run is interrupted, QEMU has the name for the run that cleans up, which may work in another folder.
        self._scratch = None if scratch is None else scratch.absolute()
        self._reserve = reserve
        self._freeze = freeze
        self._monitor: Monitor | None = None
        self._no_agent: AgentError | None = None

    def __enter__(self) -> Self:
        self._monitor = Monitor(self.socket)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.monitor.close()

    @property
    def monitor(self) -> Monitor:
        """The connection, inside the `with`."""
        assert self._monitor is not None
        return self._monitor

    def require_here(self) -> None:
        """
        Make sure that this QEMU runs the machine, and owns its images.

        Raises
        ------
        SourceError
            The machine is or was migrated, and another QEMU writes to the images.
        """
        why_not = _ELSEWHERE.get(self.monitor.command("query-status")["status"])
        if why_not is not None:
            raise SourceError(
                f"the machine does not run in the QEMU of {self.socket}: {why_not}",
                hint="back it up through the QMP socket of the QEMU that runs it",
            )

    def blocks(self) -> BlockGraph:
        """Query the present block graph of QEMU."""
        return fleece.query_block_graph(self.monitor)

    def local(self, name: str) -> str:
        """Translate a file name of QEMU's for this process: relative names start from QEMU's working folder."""
        folder = self.monitor.working_folder()
        special = name.startswith("/") or ":" in name.partition("/")[0] or folder is None
        return name if special else os.path.normpath(f"{folder}/{name}")

    def why_unseen(self, blocks: BlockGraph, name: str) -> str | None:
        """Explain which writes neither the disk's bitmaps nor a backup's jobs see; None: they see all writes."""
        for device in blocks.devices_above(name):
            if device.shares and self._property(device, "share-rw") is True:
                return (
                    f"device {device.names[0]} shares it with other machines (share-rw=on), whose writes this QEMU "
                    "cannot see"
                )
            if blocks.storage(name).driver in _PASSED_THROUGH:
                kind = self._property(device, "type")
                if isinstance(kind, str) and kind in _PASS_THROUGH:
                    return f"device {device.names[0]} ({kind}) passes the guest's writes to the storage unseen by QEMU"
        return blocks.unseen_writer(name, self.is_one_file)

    def _property(self, device: Device, name: str) -> object:
        """Read a property of a guest's device; None: the device has no such property."""
        try:
            return self.monitor.command("qom-get", {"path": device.path, "property": name})
        except Refused:
            return None

    def is_one_file(self, one: str, other: str) -> bool:
        """Whether two file names of QEMU's mean the same file or block device."""
        try:
            first, second = os.stat(self.local(one)), os.stat(self.local(other))
        except OSError:
            return False
        if stat.S_ISBLK(first.st_mode) and stat.S_ISBLK(second.st_mode):
            return first.st_rdev == second.st_rdev
        return os.path.samestat(first, second)

    def same_file(self, ours: str, qemus: str) -> bool:
        """Whether a file name of the user's and one of QEMU's mean the same file."""
        return ours == qemus or os.path.realpath(ours) == os.path.realpath(self.local(qemus))

    def discover(self) -> Sequence[tuple[str, Source]]:
        """
        Find all writable disks that are not excluded, if no disks were named.

        Raises
        ------
        SourceError
            There are none, an excluded disk does not exist, or two disks would have one name.
        """
        if not self._all:
            return ()
        blocks = self.blocks()
        excluded = {blocks.resolve(text, self.same_file).name for text in self._exclude}
        nodes: dict[str, Node] = {}
        for device, node in blocks.disks():
            name = _disk_name(device, node, self.local(blocks.storage(node.name).file))
            if node.name in excluded or name in self._exclude:
                continue
            if name in nodes:
                raise SourceError(
                    f"two disks of the machine would be called {name}, nodes {nodes[name].name} and {node.name}",
                    hint="name each disk: --node NODE --disk NAME",
                )
            nodes[name] = node
        if not nodes:
            raise SourceError(
                f"the machine of {self.socket} has no disk that is writable and not excluded",
                hint="name a disk with --node NODE (a node's name, a device's id or an image)",
            )
        self.sources = tuple(NodeSource(self, node.name, label=name) for name, node in nodes.items())
        return list(zip(nodes, self.sources, strict=True))

    def lacks(self, disk: str, path: str) -> bool:
        """Tell whether the machine, whose disks the user did not name, has no such disk although it is not excluded."""
        if not self._all or disk in self._exclude:
            return False
        blocks = self.blocks()
        for device, node in blocks.disks():
            file = self.local(blocks.storage(node.name).file)
            if disk == _disk_name(device, node, file) or self.same_file(path, file):
                return False
        return True

    def recover(self, owner: Owner) -> Sequence[str]:
        """
        Remove what interrupted runs of this repository left in QEMU: everything but the bitmaps of its points.

        Raises
        ------
        Locked
            Something is left, and may belong to a run of another machine of the repository that goes on.
        SourceError
            Another QEMU owns the machine's images.
        """
        done = self._thaw_leftover()
        self.require_here()
        # Dry runs and `map` belong to no repository, and have zeroes in place of its id.
        remains = leftovers.find_leftovers(self.monitor, [f"{OURS}{short}-" for short in (owner.short_id, "0" * 8)])
        blocks = self.blocks()
        bitmaps = list(_unpublished(blocks, owner))
        if not remains and not bitmaps:
            return done
        try:
            owner.require_alone()
        except Locked:
            if remains.in_the_way or bitmaps:
                raise
            return done  # only file descriptors, which a paused QEMU keeps after each run
        if remains.in_the_way:
            scratch.require_folders_answering({place.scratch for place in remains.places}, _STORAGE_SECONDS)
        stopped = leftovers.stopped_guest(blocks, remains)
        done += leftovers.remove_leftovers(self.monitor, remains, own_server=None)
        if stopped and leftovers.resume(self.monitor):
            done.append("a stop of the guest: a full scratch folder was the reason")
        for node, name in bitmaps:
            try:
                self.monitor.command("block-dirty-bitmap-remove", {"node": node, "name": name})
            except Refused:
                continue  # a file below the disk, which QEMU has open read-only, keeps its bitmaps
            done.append(f"bitmap {name} of node {node}, which belongs to no point")
        return done

    def _open_agent(self) -> Agent:
        assert self._freeze.agent is not None
        return Agent(self._freeze.agent)

    def _thaw_leftover(self) -> list[str]:
        """Thaw a guest that was frozen when an earlier run was killed."""
        if self._freeze.agent is None:
            return []
        try:
            with Agent(self._freeze.agent) as agent:
                if not agent.frozen():
                    return []
                agent.thaw()
        except AgentError as error:
            self._no_agent = error  # reported when the freeze is due, without another wait
            return []
        return ["a freeze of the guest's file systems"]

    @contextmanager
    def instant(
        self, captures: Sequence[Capture], lanes: int, *, point: str, repository: Path | None, short_id: str
    ) -> Iterator[RunningMoment]:
        """
        Capture one instant of all disks.

        Raises
        ------
        Moved
            A disk has changed since it was inspected.
        NotStarted
            A disk takes no new bitmap.
        """
        del lanes
        self.require_here()
        self._require_different()
        blocks = self.blocks()
        for source in self.sources:
            source.require_untouched_by_reading(blocks)
        doubts = [*self._unnamed(blocks), *(doubt for source in self.sources for doubt in source.doubts(blocks))]
        targets = [self._target(source, capture) for source, capture in zip(self.sources, captures, strict=True)]
        freezing = Freezing(self._freeze, self._open_agent, self._no_agent)
        own = fleece.prefix(short_id, point)
        moment = RunningMoment(freezing, doubts)
        try:
            with (
                freezing.told(),
                ExitStack() as opened,  # closed after the instant, whose end makes the server close the connections
                fleece.frozen_instant(
                    self.monitor, own, targets, scratch_room.Room(self._reserve, repository), freezing
                ) as instant,
            ):
                moment.instant = instant
                self.require_here()  # from now on no migration can end, because the jobs block it
                granularities = [_settled(*pair) for pair in zip(self.sources, captures, strict=True)]
                for number, granularity in enumerate(granularities):
                    export = instant.open(number)
                    opened.callback(export.close)
                    moment.disks.append(Opened(export, captures[number].read_bitmap, granularity))
                yield moment
        except fleece.SizeChanged as error:
            raise Moved(error.message) from None
        except fleece.BitmapNotAdded as error:
            raise NotStarted(error.number, error, error.why, lasting=False) from None

    def _require_different(self) -> None:
        owners: dict[str, NodeSource] = {}
        for source in self.sources:
            other = owners.setdefault(source.node.name, source)
            if other is not source:
                raise UsageError(
                    f"{other.text} and {source.text} are the same disk, node {source.node.name}",
                    hint="name each disk once",
                )

    def _unnamed(self, blocks: BlockGraph) -> list[str]:
        """Warn of disks of the machine that no point holds although the user did not exclude them."""
        if not self._complain:
            return []
        known = {source.node.name for source in self.sources}
        for text in self._exclude:
            with ignoring(_log, f"excluded disk {text}", SourceError):  # a disk that is gone needs no exclusion
                known.add(blocks.resolve(text, self.same_file).name)
        warnings = []
        for device, node in blocks.disks():
            file = self.local(blocks.storage(node.name).file)
            name = _disk_name(device, node, file)
            if node.name not in known and name not in self._exclude:
                warnings.append(
                    f"disk {name} ({file}) of the running machine is in no point: name the disk (--node, `disks:`), "
                    "or exclude it (--exclude, `exclude:`)"
                )
        return warnings

    def _target(self, source: NodeSource, capture: Capture) -> InstantDisk:
        node = source.node
        bitmap = next((bitmap for bitmap in node.bitmaps if bitmap.name == capture.read_bitmap), None)
        return InstantDisk(
            node=node.name,
            size=node.size,
            read=capture.read_bitmap,
            start=capture.start_bitmap,
            persistent=capture.state.volatile is None,
            scratch=self._scratch or scratch_room.folder_of(capture.state.path),
            writes=node.stored if bitmap is None else bitmap.dirty,
        )


class NodeSource(ListsBitmaps):
    """
    A disk of a running machine; `text` is its node's name, its device's id, or its image.

    `image` is read instead while the machine is off; None: the machine is always on.  `label` is the disk's name in
    warnings.
    """

    def __init__(self, host: Running, text: str, image: Path | None = None, *, label: str | None = None) -> None:
        self._host = host
        self.text = text
        self._image = image
        self._label = label or text
        self._node: Node | None = None

    @property
    def node(self) -> Node:
        """The node to which the guest wrote at the last inspection."""
        assert self._node is not None
        return self._node

    def foreign_format(self) -> str | None:
        """Return None: QEMU shows the disk, whatever the image's format is."""
        return None

    def guessed_format(self) -> str | None:
        """Return None: QEMU has the image open already, in the format that QEMU was given."""
        return None

    def inspect(self) -> DiskState:
        """Query QEMU for the disk's node and the files below it."""
        blocks = self._host.blocks()
        self._node = node = blocks.resolve(self.text, self._host.same_file)
        chain = blocks.chain(node.name)
        files = [self._host.local(blocks.storage(link.name).file) for link in chain]
        lower = [images.stat_layer(file) for file in files[1:]]
        self._require_image(files)
        return DiskState(
            kind="qmp",
            path=files[0],
            format=node.driver if node.driver == images.QCOW2 else images.RAW,
            size=node.size,
            bitmaps=tuple(_bitmaps(node)),
            unseen_writes=images.why_unseen_writes([link.details for link in chain], lower)
            or self._host.why_unseen(blocks, node.name),
            volatile=_why_volatile(node),
            lower=tuple(LowerFile(layer.path, layer.size, layer.mtime_ns, layer.inode) for layer in lower),
            lower_bitmaps=tuple(bitmap.name for link in chain[1:] for bitmap in link.bitmaps),
            plaintext=blocks.is_encrypted(node.name),
            data_file=images.external_data_file(self._data_file(blocks), files[0], open_in_qemu=True),
        )

    def _data_file(self, blocks: BlockGraph) -> str | None:
        file = blocks.data_file(self.node.name)
        return None if file is None else self._host.local(file)

    def _require_image(self, files: Sequence[str]) -> None:
        """
        Refuse another machine's QEMU.

        Raises
        ------
        SourceError
            The image that is read while the machine is off is not among the files of the disk.
        """
        if self._image is None or any(self._host.same_file(str(self._image), file) for file in files):
            return
        raise SourceError(
            f"the QEMU of {self._host.socket} has {files[0]} as disk {self.text}, and not {self._image}",
            hint="does the socket belong to another machine? correct `qmp:`, `node:` or `image:`",
        )

    def why_no_bitmap(self, state: DiskState) -> str | None:
        """Refuse a bitmap where writes would pass it by: an external data file, for example, or a second writer."""
        return state.why_untrusted

    def require_untouched_by_reading(self, blocks: BlockGraph) -> None:
        """
        Make sure that QEMU does not copy into the image what a backup reads from the files below it.

        Below a copy-on-read filter QEMU does not copy.  With the drive's own option it copies for every reader.

        Raises
        ------
        SourceError
            QEMU would copy.
        """
        if len(blocks.chain(self.node.name)) == 1:
            return
        ids = {name for device in blocks.devices_above(self.node.name) for name in device.names}
        file = blocks.storage(self.node.name).file
        for drive in process.copying_drives(self._host.monitor.peer):
            if drive.id in ids or (drive.file and self._host.is_one_file(drive.file, file)):
                raise SourceError(
                    f"QEMU would copy all that a backup reads into {self._host.local(file)}: the drive has "
                    "copy-on-read=on",
                    hint="start the machine without copy-on-read, or with the filter -blockdev copy-on-read,file=NODE, "
                    "below which pybackup reads",
                )

    def doubts(self, blocks: BlockGraph) -> list[str]:
        """Warn of what makes a point of this disk less than it seems."""
        name, doubts = self.node.name, []
        if blocks.is_abandoned(name):
            doubts.append(
                f"disk {self._label}: no device of the machine uses node {name}, so the guest writes elsewhere; was "
                "the disk moved to another image? name it by its device or its present image"
            )
        why = self._host.why_unseen(blocks, name)
        if why is not None:
            doubts.append(f"disk {self._label}: {why}; the point may hold several moments of the disk")
        file = self._host.local(blocks.storage(name).file)
        if self._image is not None and not self._host.same_file(str(self._image), file):
            doubts.append(
                f"disk {self._label}: the machine writes to {file} now, and while it is off {self._image} would be "
                "read, which lies below it: correct `image:`, or commit the snapshot"
            )
        for what, path in (("image", file), ("external data file", self._data_file(blocks))):
            lost = None if path is None else process.lost_file(self._host.monitor.peer, path)
            if lost is not None:
                doubts.append(
                    f"disk {self._label}: the {what} {path} was {lost} while QEMU has it open; all that the guest "
                    "writes is lost when the machine ends"
                )
        return doubts

    def remove_bitmap(self, name: str) -> None:
        """Have QEMU remove a bitmap from the image at once; a bitmap in an image that QEMU may not write stays."""
        try:
            self._host.monitor.command("block-dirty-bitmap-remove", {"node": self.node.name, "name": name})
        except Refused as error:
            if "readonly" not in error.text:
                raise

    def qemu_version(self) -> str | None:
        """The version of the running QEMU."""
        return self._host.monitor.version


@dataclass(slots=True)
class RunningMoment:
    """An instant that QEMU keeps for pybackup."""

    _freezing: Freezing
    _doubts: Sequence[str]
    disks: list[Opened] = field(default_factory=list)
    instant: Instant | None = None
    machine: MachineState = NO_MACHINE_STATE
    """QEMU tells nothing that could define a machine."""

    @property
    def consistency(self) -> str:
        """`filesystem` if the guest was frozen, else `crash`."""
        return self._freezing.consistency

    @property
    def warnings(self) -> Sequence[str]:
        """Warnings of the disks, of the freeze, and of what could not be removed in the end."""
        troubles = [] if self.instant is None else self.instant.troubles
        return [*self._doubts, *self._freezing.warnings, *troubles]

    @property
    def notes(self) -> Sequence[str]:
        """How long the guest was frozen, and what the instant's scratch files lack."""
        return [*self._freezing.notes, *([] if self.instant is None else self.instant.notes)]

    def require_kept(self) -> None:
        """Make sure that nothing is known to have ended the instant."""
        assert self.instant is not None
        self._freezing.require_held()
        self.instant.require_kept()

    def require_sound(self) -> None:
        """Make sure that all jobs still run, and that no copy of what the guest overwrote was lost."""
        assert self.instant is not None
        self._freezing.require_held()
        self.instant.require_sound()


def _disk_name(device: Device, node: Node, file: str) -> str:
    """
    Name a disk that the user has not named: by the id of its device or drive, its node, or the stem of its image.

    QEMU makes up an id for a device without one, and a name for a node without one.
    """
    words = device.path.split("/")
    own = words[3] if words[1:3] == ["machine", "peripheral"] else ""
    for name in (own, *device.names, node.name, Path(file).stem):
        if name_problem("disk", name) is None:
            return name
    return "disk"


def _bitmaps(node: Node) -> Iterator[Bitmap]:
    for bitmap in node.bitmaps:
        yield Bitmap(
            bitmap.name, bitmap.granularity, bitmap.recording, bitmap.inconsistent, bitmap.busy, bitmap.persistent
        )


def _why_volatile(node: Node) -> str | None:
    if node.driver != images.QCOW2:
        return f"QEMU keeps no bitmap in a {node.driver} image when QEMU ends"
    if node.details.get("compat") == "0.10":
        return "QEMU keeps no bitmap in a qcow2 image of version 2 when QEMU ends"
    if node.read_only:
        return "QEMU keeps no bitmap in an image that is open read-only when QEMU ends"
    if node.size == 0:
        return "QEMU keeps no bitmap in an empty image when QEMU ends"
    return None


def _unpublished(blocks: BlockGraph, owner: Owner) -> Iterator[tuple[str, str]]:
    """Yield the node and the name of each bitmap of this repository that belongs to no point."""
    for node in blocks.nodes.values():
        if node.name.startswith(OURS):
            continue  # a copy, which disappears with its overlay
        for name in disk.own_bitmaps((bitmap.name for bitmap in node.bitmaps), owner.short_id, keep=None):
            if not owner.has_point(name.rpartition(".")[2]):
                yield node.name, name


def _settled(source: NodeSource, capture: Capture) -> int | None:
    """Require that the disk is still as it was inspected; return the granularity of the bitmap that was started."""
    inspected = source.node.name
    now = source.inspect()
    before = replace(now, bitmaps=tuple(bitmap for bitmap in now.bitmaps if bitmap.name != capture.start_bitmap))
    if source.node.name != inspected or before != capture.state:
        raise Moved(f"disk {source.text} changed before its instant was captured")
    started = None if capture.start_bitmap is None else now.bitmap(capture.start_bitmap)
    return None if started is None else started.granularity
