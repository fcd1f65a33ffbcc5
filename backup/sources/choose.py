"""
From the declaration of a machine's disks to the sources that read them: the only place that knows every kind of source.

A further kind is a module beside this one, a field of `Specification` and a branch in `choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from backup.errors import SourceError
from backup.model.disk import Claim
from backup.qemu.programs import filename
from backup.sources.base import NO_FREEZE, DiskRequest, Freeze, Host, Source
from backup.sources.image import ImageSource
from backup.sources.nbd_server import NbdSource
from backup.sources.resting import AtRest

if TYPE_CHECKING:
    from backup.config.settings import DiskConfig, MachineConfig
    from backup.sources.running import Running


@dataclass(frozen=True, slots=True)
class DiskSpecification:
    """
    Where one disk is: in an `image`, behind the URI of an `nbd` server, or in a `node` of the machine's running QEMU.

    `node` and `image` together: the machine runs on some nights and is off on others.  `image_format` is "qcow2" or
    "raw"; None: the image's first bytes tell.  `bitmap` is the exact name of one of the server's dirty bitmaps, which
    starts from the point `since` by the user's word.  `allow_plaintext` allows a running QEMU to decrypt the disk.
    `trust_data_file`: nothing writes to the external data file of the image except through the image.
    """

    name: str
    image: Path | None = None
    image_format: str | None = None
    nbd: str | None = None
    bitmap: str | None = None
    since: str | None = None
    node: str | None = None
    allow_plaintext: bool = False
    trust_data_file: bool = False

    @classmethod
    def of_config(cls, disk: DiskConfig, machine: MachineConfig) -> DiskSpecification:
        """Specify a disk of the configuration."""
        return cls(
            name=disk.name,
            image=disk.image,
            image_format=disk.format,
            nbd=disk.nbd,
            bitmap=disk.bitmap,
            node=disk.node,
            allow_plaintext=disk.allow_plaintext or machine.allow_plaintext,
            trust_data_file=disk.trust_data_file or machine.trust_data_file,
        )


@dataclass(frozen=True, slots=True)
class Specification:
    """
    Where a machine's disks are, and how one instant of them is captured.

    `qmp` is the QMP socket of the machine's running QEMU; or `libvirt` is the URI of the libvirt that has the machine
    as `domain`.  The other fields are for these two only: without `disks`, all its writable disks but those in
    `exclude` are meant; `warn_of_others` warns of writable disks that are neither in `disks` nor in `exclude`; QEMU
    keeps what the guest overwrites meanwhile in the folder `scratch` (None: that of each image), where
    `scratch_reserve` bytes stay free.
    """

    disks: tuple[DiskSpecification, ...] = ()
    qmp: Path | None = None
    libvirt: str | None = None
    domain: str = ""
    exclude: tuple[str, ...] = ()
    warn_of_others: bool = False
    scratch: Path | None = None
    scratch_reserve: int = 0
    freeze: Freeze = NO_FREEZE


def choose(specification: Specification) -> tuple[Host, tuple[DiskRequest, ...]]:
    """
    Choose the host and the sources of a machine's disks, in the order of the specification; nothing is opened.

    The disks are empty where the host discovers them.
    """
    if specification.qmp is not None:
        return _running(specification.qmp, specification)
    if specification.libvirt is not None:
        return _domain(specification.libvirt, specification)
    sources = [_resting(disk) for disk in specification.disks]
    return AtRest(sources), _requests(specification.disks, sources)


def matching_domains(uri: str, pattern: str) -> list[str]:
    """
    Return the names of the domains of a libvirt, on or off, that match a pattern (`web*`); at least one.

    Raises
    ------
    SourceError
        No domain matches, or libvirt cannot be asked.
    """
    from backup.sources.libvirt_domain import matching  # noqa: PLC0415 - as below

    domains = matching(uri, lambda name: name == pattern or fnmatchcase(name, pattern))
    if not domains:
        raise SourceError(f"no domain of libvirt at {uri} matches {pattern!r}", hint="see: virsh -c URI list --all")
    return domains


def _running(qmp: Path, specification: Specification) -> tuple[Host, tuple[DiskRequest, ...]]:
    # QMP's library costs 0.05 s, which backups of images need not spend.
    from backup.sources.running import Running  # noqa: PLC0415

    disks = specification.disks
    images = [disk.image for disk in disks if disk.image is not None]
    running = Running(
        qmp,
        [disk.node or "" for disk in disks] if disks else None,
        images=images,
        exclude=specification.exclude,
        complain=specification.warn_of_others,
        scratch=specification.scratch,
        reserve=specification.scratch_reserve,
        freeze=specification.freeze,
    )
    return _on_or_off(running, disks) if images else (running, _requests(disks, running.sources))


def _domain(uri: str, specification: Specification) -> tuple[Host, tuple[DiskRequest, ...]]:
    from backup.sources.libvirt import Libvirt  # noqa: PLC0415 - libvirt-python is optional

    host = Libvirt(
        uri,
        specification.domain,
        [disk.name for disk in specification.disks],
        exclude=specification.exclude,
        complain=specification.warn_of_others,
        scratch=specification.scratch,
        reserve=specification.scratch_reserve,
        freeze=specification.freeze,
    )
    return host, _requests(specification.disks, host.sources)


def _on_or_off(running: Running, disks: Sequence[DiskSpecification]) -> tuple[Host, tuple[DiskRequest, ...]]:
    from backup.sources.on_or_off import OnOrOff  # noqa: PLC0415 - as above

    images = [ImageSource(disk.image, disk.image_format) for disk in disks if disk.image is not None]
    host = OnOrOff(running, images)
    return host, _requests(disks, host.sources)


def _resting(disk: DiskSpecification) -> ImageSource | NbdSource:
    if disk.image is not None:
        return ImageSource(disk.image, disk.image_format)
    return NbdSource(disk.nbd or "", disk.bitmap)


def _requests(disks: Sequence[DiskSpecification], sources: Sequence[Source]) -> tuple[DiskRequest, ...]:
    return tuple(
        DiskRequest(
            disk.name,
            source,
            Claim(disk.bitmap, disk.since),
            path=None if disk.image is None else filename(disk.image),
            allow_plaintext=disk.allow_plaintext,
            trust_data_file=disk.trust_data_file,
        )
        for disk, source in zip(disks, sources, strict=True)
    )
