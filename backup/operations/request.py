"""What is asked of a backup: a machine, its disks, and how."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto

from backup.engine import copier
from backup.planning import decision as decide
from backup.sources.base import DiskRequest, Host


class Names(Enum):
    """
    Where the names of a request's disks come from: the configuration, --disk, or what names their sources.

    A name of the configuration holds.  Else a disk that the machine has already, by another name, keeps that.
    """

    CONFIGURED = auto()
    GIVEN = auto()
    SUGGESTED = auto()


@dataclass(frozen=True, slots=True)
class Request:
    """
    What to back up and how.

    `wanted` is decide.FULL, INCREMENTAL or RESCAN; `unusable` (FULL or RESCAN) what an incremental becomes where no
    bitmap continues a sound chain, unless `fallback` forbids it; `begin` allows a disk's first full in its place;
    `spot_check` the number of clean clusters that an incremental reads again.  `host` holds the disks' sources, in the
    order of `disks`, to which `complete` adds those that the host discovers.  `bitmap_family` names the bitmaps to keep
    (None: none); `level` is zstd's, None for no compression; `cluster_size` in bytes counts for fulls; `named_by_path`
    says that the machine's name was taken from the image's, not given; `allow_plaintext` lets a running QEMU decrypt
    disks.
    """

    machine: str
    host: Host
    disks: tuple[DiskRequest, ...]
    wanted: str
    bitmap_family: str | None
    level: int | None = 1
    cluster_size: int = 64 << 10
    max_chain: int = 100
    check_zeroes: bool = True
    spot_check: int = 64
    unusable: str = decide.RESCAN
    fallback: bool = True
    begin: bool = True
    dry_run: bool = False
    named_by_path: bool = False
    names: Names = Names.SUGGESTED
    allow_plaintext: bool = False
    copying: copier.Settings = field(default_factory=copier.Settings)

    @property
    def compression(self) -> str:
        """As the configuration and the manifest write it."""
        return "none" if self.level is None else f"zstd:{self.level}"

    def complete(self) -> Request:
        """Add the disks that the host, once connected, discovers by itself."""
        discovered = tuple(DiskRequest(name, source) for name, source in self.host.discover())
        return replace(self, disks=(*self.disks, *discovered)) if discovered else self
