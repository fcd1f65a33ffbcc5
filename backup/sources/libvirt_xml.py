"""libvirt's XML documents: what a domain's disks are, and what a backup job is to do.  Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

_OWNER = re.compile(r"\+?([0-9]+):\+?([0-9]+)")
_VERSIONED = re.compile(r"-([0-9]+\.[0-9]+)$")
"""A type of machine that names a version of QEMU (pc-q35-7.2); distributions have types of their own names."""
_AGENT = "org.qemu.guest_agent.0"
_NO_SOURCE = {"index", "startupPolicy"}
"""Attributes of a `<source>` that say nothing of the medium."""
REMOVABLE = {"cdrom", "floppy"}
"""Devices whose medium is not the machine's own."""
FORMATS = {"qcow2", "raw"}
"""Formats of images that pybackup reads."""
_LOCAL = {"file", "block"}
"""Types of disks that lie in local files and block devices."""
_LOCAL_ONLY = "pybackup reads the disks of domains from local files and block devices only"
_WAYS = {
    "rbd": "; or map the image on the host (rbd map), and give the domain the block device",
    "iscsi": "; or log in to the target on the host (iscsiadm), and give the domain the block device",
    "nbd": "; while the domain is off, pybackup reads the export itself: pybackup full --nbd URI",
    "nfs": "; or mount the share on the host, and give the domain the file",
    "gluster": "; or mount the volume on the host, and give the domain the file",
    "volume": "; or give the domain the path of the volume (virsh vol-path) as a file or block device",
}
"""What the user can do about a disk of such a protocol or type, other than to leave it out."""


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """
    One `<disk>` of a domain.

    `target` is the name that libvirt's commands use (vda).  `storage` is the type of the source (file, block, network,
    ...), `protocol` that of a network source (rbd, ...), `path` the source's path (None: no local file or block device,
    or no medium), and `backing` are the paths of the files below it, nearest first, as far as libvirt tells them.
    `data_store` is the path of the external data file (None: libvirt before 10.10 does not tell it).  `lost` says why
    reading the source would not give what the guest writes.
    """

    target: str
    device: str
    storage: str
    path: str | None
    format: str
    backing: tuple[str | None, ...] = ()
    medium: bool = True
    read_only: bool = False
    shareable: bool = False
    encrypted: bool = False
    lost: str | None = None
    data_store: str | None = None
    protocol: str | None = None

    @property
    def removable(self) -> bool:
        """Whether the device is a drive for removable media."""
        return self.device in REMOVABLE

    def why_unreadable(self) -> tuple[str, str] | None:
        """Explain why pybackup cannot read the disk, and what the user can do; None: it can."""
        leave_out = f"leave the disk out: --exclude {self.target} (`exclude:` in the configuration)"
        if not self.medium:
            return f"the {self.device} has no medium", leave_out
        if self.storage == "network":
            way = _WAYS.get(self.protocol or "", "")
            return (
                f"its source is on the network ({self.protocol or 'of an unknown protocol'}), and {_LOCAL_ONLY}",
                f"{leave_out}{way}",
            )
        if self.storage not in _LOCAL or self.path is None:
            return (
                f"its source is of type {self.storage}, and {_LOCAL_ONLY}",
                f"{leave_out}{_WAYS.get(self.storage, '')}",
            )
        if self.format not in FORMATS:
            return f"its format is {self.format}, and pybackup reads qcow2 and raw", leave_out
        if self.lost is not None:
            return self.lost, leave_out
        return None


@dataclass(frozen=True, slots=True)
class DomainDocument:
    """
    What a domain's XML tells: its disks, the state of its agent channel (None: no channel), and QEMU's user.

    `iothreads`: a disk may have a thread of its own in QEMU.  `least_qemu`: the oldest QEMU that knows the type of
    machine ("7.2"); None if the type does not tell.
    """

    disks: tuple[DomainDisk, ...]
    agent: str | None
    owner: tuple[int, int] | None
    iothreads: bool = False
    least_qemu: str | None = None

    @classmethod
    def parse(cls, text: str) -> DomainDocument:
        """Read the XML that libvirt gives for a domain."""
        root = ET.fromstring(text)  # noqa: S314 - libvirt's own document
        disks = tuple(_disk(element) for element in root.iterfind("./devices/disk"))
        channel = root.find(f"./devices/channel/target[@name='{_AGENT}']")
        label = root.findtext("./seclabel[@model='dac']/label") or ""
        owner = _OWNER.fullmatch(label)
        return cls(
            disks=disks,
            agent=None if channel is None else channel.get("state", "disconnected"),
            owner=None if owner is None else (int(owner[1]), int(owner[2])),
            iothreads=_has_iothreads(root),
            least_qemu=_least_qemu(root),
        )


def _disk(element: ET.Element) -> DomainDisk:
    target, source, driver = element.find("target"), element.find("source"), element.find("driver")
    assert target is not None
    return DomainDisk(
        target=target.get("dev", ""),
        device=element.get("device", "disk"),
        storage=element.get("type", "file"),
        path=_path(source),
        format="raw" if driver is None else driver.get("type", "raw"),
        backing=tuple(_backing(element)),
        medium=_has_medium(source),
        read_only=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        encrypted=element.find(".//encryption") is not None,
        lost=_lost(element),
        data_store=_path(element.find("./source/dataStore/source")),
        protocol=None if source is None else source.get("protocol"),
    )


def _lost(element: ET.Element) -> str | None:
    if element.find("transient") is not None:
        return "the disk is transient: libvirt discards the guest's writes when the machine ends"
    if element.find("source/slices") is not None:
        return "the disk is a part of its file (<slices>), and pybackup reads whole files"
    if element.get("device") == "lun":
        return "the guest's SCSI commands go to the device itself (device='lun'), past what QEMU can capture"
    return None


def _has_medium(source: ET.Element | None) -> bool:
    """Tell whether a `<source>` names anything; libvirt 12.9 gives that of an empty drive a bare index."""
    return source is not None and (len(source) > 0 or not set(source.attrib) <= _NO_SOURCE)


def _path(source: ET.Element | None) -> str | None:
    return None if source is None else source.get("file") or source.get("dev")


def _backing(element: ET.Element) -> Iterable[str | None]:
    below = element.find("backingStore")
    while below is not None and below.find("source") is not None:
        yield _path(below.find("source"))
        below = below.find("backingStore")


def _has_iothreads(root: ET.Element) -> bool:
    """Also where a controller, or an option of QEMU that libvirt passes on, gives a disk the thread."""
    return any(
        "iothread" in word
        for element in root.iter()
        for word in (element.tag, *element.attrib, *element.attrib.values())
    )


def _least_qemu(root: ET.Element) -> str | None:
    kind = root.find("./os/type")
    found = None if kind is None else _VERSIONED.search(kind.get("machine", ""))
    return None if found is None else found[1]


@dataclass(frozen=True, slots=True)
class JobDisk:
    """One disk of a backup job: `read` and `start` name bitmaps, `scratch` the file for what the guest overwrites."""

    target: str
    read: str | None
    start: str | None
    export: str
    scratch: str


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A backup job that libvirt runs: the path of its NBD socket if any, its exports, and its scratch files."""

    socket: str | None
    exports: tuple[str, ...]
    scratch: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> RunningJob:
        """Read the XML that libvirt gives for a backup job."""
        root = ET.fromstring(text)  # noqa: S314 - libvirt's own document
        server = root.find("server")
        disks = [disk for disk in root.iterfind("./disks/disk") if disk.get("backup") == "yes"]
        return cls(
            socket=None if server is None else server.get("socket"),
            exports=tuple(disk.get("exportname", "") for disk in disks),
            scratch=tuple(found for disk in disks if (found := _path(disk.find("scratch"))) is not None),
        )

    def is_named(self, prefixes: Sequence[str]) -> bool:
        """Tell whether the names of all its exports begin with one of these."""
        return bool(self.exports) and all(name.startswith(tuple(prefixes)) for name in self.exports)


def backup_xml(socket: str, disks: Sequence[JobDisk], others: Iterable[str]) -> str:
    """Describe a job in pull mode for `disks`; `others` are the domain's other disks."""
    root = ET.Element("domainbackup", mode="pull")
    ET.SubElement(root, "server", transport="unix", socket=socket)
    listed = ET.SubElement(root, "disks")
    for disk in disks:
        how = {"backupmode": "full"}
        if disk.read is not None:
            how = {"backupmode": "incremental", "incremental": disk.read, "exportbitmap": disk.read}
        element = ET.SubElement(
            listed, "disk", {"name": disk.target, "backup": "yes", "type": "file", **how, "exportname": disk.export}
        )
        ET.SubElement(element, "driver", type="qcow2")
        ET.SubElement(element, "scratch", file=disk.scratch)
    for target in others:
        ET.SubElement(listed, "disk", name=target, backup="no")
    return ET.tostring(root, encoding="unicode")


def checkpoint_xml(name: str, targets: Iterable[str], others: Iterable[str] = ()) -> str:
    """Describe a checkpoint whose bitmap of the same name is on `targets`; libvirt must be told of all other disks."""
    root = ET.Element("domaincheckpoint")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "creationTime").text = "1"
    listed = ET.SubElement(root, "disks")
    for target in targets:
        ET.SubElement(listed, "disk", name=target, checkpoint="bitmap", bitmap=name)
    for target in others:
        ET.SubElement(listed, "disk", name=target, checkpoint="no")
    return ET.tostring(root, encoding="unicode")


def bitmap_sizes(text: str) -> dict[str, tuple[str, int | None]]:
    """Return for each disk of a checkpoint its bitmap's name, and the dirty bytes (None: missing or inconsistent)."""
    root = ET.fromstring(text)  # noqa: S314 - libvirt's own document
    found = {}
    for disk in root.iterfind("./disks/disk"):
        name, size = disk.get("bitmap"), disk.get("size")
        if disk.get("checkpoint") == "bitmap" and name is not None:
            found[disk.get("name", "")] = (name, None if size is None else int(size))
    return found


def disk_sizes(stats: Mapping[str, str | int]) -> dict[str, int]:
    """Return the size in bytes of each disk in libvirt's statistics, where libvirt knows it."""
    numbers = range(int(stats.get("block.count", 0)))
    sizes = {str(stats[f"block.{number}.name"]): stats.get(f"block.{number}.capacity") for number in numbers}
    return {target: int(size) for target, size in sizes.items() if size is not None}
