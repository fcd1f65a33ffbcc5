"""The request of a backup or an audit: a machine, its disks, and how they are read and stored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto

from backup.engine.copy_settings import CopySettings
from backup.planning import decision as decide
from backup.sources.base import DiskRequest, Host, Unavailable


class Names(Enum):
    """
    Where the names of a request's disks come from: the configuration, --disk, or the names of their sources.

    A name from the configuration always counts.  Otherwise a disk that the machine's points know keeps its name there.
    """

    CONFIGURED = auto()
    GIVEN = auto()
    SUGGESTED = auto()


@dataclass(frozen=True, slots=True)
class Request:
    """
    What to back up, and how.

    Parameters
    ----------
    host, disks
        The host of the disks' sources, and the disks in the same order; `complete` adds those that the host discovers.
    wanted : str
        decision.FULL, INCREMENTAL or RESCAN.
    bitmap_family : str or None
        Family of the bitmaps that pybackup keeps on the disks; None: it keeps none.
    level : int or None
        zstd's compression level; None: no compression.
    cluster_size : int
        Bytes; only a full takes it.
    max_chain : int
        Number of points in a chain at which the next backup of the disk starts a new chain.
    check_zeroes : bool
        Have an incremental look for clusters that are clean and zero although the chain holds data there.
    spot_check : int
        Number of clean clusters that an incremental reads again.
    unusable : str
        What an incremental becomes if no bitmap continues a sound chain: decision.RESCAN or FULL.
    fallback : bool
        Allow `unusable`; without it such an incremental fails.
    begin : bool
        Allow the first full of a disk in place of an incremental.
    named_by_path : bool
        The machine's name was derived from an image's name, and not given.
    allow_plaintext : bool
        Allow a running QEMU to decrypt the disks.
    trust_data_file : bool
        The user states that nothing writes to the disks' external data files except through the images.
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
    trust_data_file: bool = False
    copying: CopySettings = field(default_factory=CopySettings)

    @property
    def compression(self) -> str:
        """The compression as the configuration and the manifest write it: "none" or "zstd:LEVEL"."""
        return "none" if self.level is None else f"zstd:{self.level}"

    def require_available(self) -> None:
        """
        Make sure that the machine's host can be used, as far as is known.

        Raises
        ------
        BackupError
            The reason for which it cannot be used.
        """
        if isinstance(self.host, Unavailable):
            raise self.host.error

    def complete(self) -> Request:
        """Add the disks that the host, once connected, discovers by itself."""
        discovered = tuple(DiskRequest(name, source) for name, source in self.host.discover())
        return replace(self, disks=(*self.disks, *discovered)) if discovered else self
