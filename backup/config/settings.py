"""The configuration as frozen values: global settings, machines, disks and retention."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from backup.errors import UsageError
from backup.model.compression import Compression
from backup.model.location import Location
from backup.planning.retention import Batch, Policy
from backup.units import KiB, MiB, parse_size, show_size

OnUnusableBitmap = Literal["rescan", "full", "fail"]
"""What an incremental becomes if the disk has a sound chain, and no bitmap continues it."""


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """
    One disk of a machine: `image` (an offline image's absolute path), `nbd` (a URI), or `node` (a node, a device or an
    image of the machine's running QEMU); or `node` and `image` for a machine that is on or off.

    `format` is the image's format; None: the first bytes of the image show the format.  `bitmap` is the exact name of a
    bitmap on someone else's NBD server.  A backup by a configuration never continues from this bitmap, since a file
    cannot state from which point the bitmap starts each night.  `allow_plaintext` allows a running QEMU to decrypt the
    disk.  `trust_data_file` states that nothing writes to the external data file of the image except through the image.
    """

    name: str
    image: Path | None = None
    nbd: str | None = None
    node: str | None = None
    format: Literal["qcow2", "raw"] | None = None
    bitmap: str | None = None
    allow_plaintext: bool = False
    trust_data_file: bool = False


@dataclass(frozen=True, slots=True)
class Retention:
    """Which points a prune keeps, when it rewrites a full, and whether it follows each successful backup."""

    policy: Policy
    batch: Batch
    after_backup: bool = False


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """
    A machine and its disks; `bitmap_family`, `compression`, `on_unusable_bitmap` and `retention` are the machine's own
    or the global ones.

    `qmp` is the QMP socket of the QEMU of a running machine, `agent` the socket of its guest agent; both paths are
    absolute.  `freeze` tells whether the agent freezes the file systems for the instant of the backup; with "required",
    the backup fails if the freeze fails.  `scratch` is the folder for the scratch images of a backup; None: the global
    one.  `exclude` names disks of the running machine that no point needs to hold.  `allow_plaintext` allows QEMU to
    decrypt all disks of the machine.  `trust_data_file` is the
    statement of `DiskConfig` about all disks of the machine.

    `libvirt` is the URI of the libvirt that has the machine as `domain`, and then `disks` are named by their target
    devices; without any, all disks of the domain are meant.  `domains` is a pattern: every matching domain is a machine
    of its own, with these settings.
    """

    name: str
    disks: tuple[DiskConfig, ...]
    bitmap_family: str | None
    compression: Compression
    on_unusable_bitmap: OnUnusableBitmap = "rescan"
    qmp: Path | None = None
    agent: Path | None = None
    libvirt: str | None = None
    domain: str | None = None
    domains: str | None = None
    freeze: Literal["no", "yes", "required"] = "no"
    scratch: Path | None = None
    exclude: tuple[str, ...] = ()
    allow_plaintext: bool = False
    trust_data_file: bool = False
    retention: Retention | None = None

    @property
    def on_or_off(self) -> bool:
        """Whether the disks are read through QMP while the machine runs, and from their images while it is off."""
        return self.qmp is not None and all(disk.image is not None for disk in self.disks)


@dataclass(frozen=True, slots=True)
class CopyConfig:
    """
    A second place, and what is copied there.

    `to` is its location.  `recipients` are the public keys to which a sealed place seals its files: each is a key, or
    the absolute path of a file with keys.  `machines` are patterns of the machines that are copied when a command line
    names none; empty: all.  `retention` is the place's own; None: as in the first repository.  With `after_backup`,
    each backup of a machine is followed by its copy.  A copy reads at most `limit` bytes a second; None: as the file
    says.
    """

    name: str
    to: Location
    recipients: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()
    retention: Retention | None = None
    after_backup: bool = False
    limit: int | None = None

    def wants(self, machine: str) -> bool:
        """Tell whether the machine is copied to this place when a command line names no machine."""
        return not self.machines or any(fnmatchcase(machine, pattern) for pattern in self.machines)


TIMEOUTS = 1.0, 86400.0
"""Bounds of `timeout`, in seconds."""
LIMITS = 64 * KiB, 1024 * 1024 * MiB
"""Bounds of `limit`, in bytes a second."""


def parse_limit(text: str) -> int:
    """
    Read the value of --limit, bytes a second.

    Raises
    ------
    UsageError
        The text is not a size, or the limit is out of bounds.
    """
    limit, (low, high) = parse_size(text), LIMITS
    if not low <= limit <= high:
        raise UsageError(
            f"--limit {text} is out of bounds", hint=f"name bytes a second from {show_size(low)} to {show_size(high)}"
        )
    return limit


@dataclass(frozen=True, slots=True)
class Config:
    """
    All settings.  Sizes in bytes.

    `path` is the file that the settings come from; None: the defaults.  Each of `connections` has at most `requests`
    requests in flight, each of at most `request_size` bytes.  `workers` is the number of cores to keep busy; None: all.
    A source is read at no more than `limit` bytes a second.  A wait without progress ends after `timeout` seconds.
    `max_chain` is the number of points after which an incremental becomes a full.  `check_zeroes`: an incremental
    compares zeroes that the bitmap reports as clean with the chain.  An incremental reads `spot_check` clean clusters
    again.  `scratch` is the folder for scratch images, and `scratch_reserve` the space that stays free there.
    `group_read` allows the group to read the repository (0640 and 0750 instead of 0600 and 0700).  `copies` are the
    second places.
    """

    path: Path | None = None
    repository: Path | None = None
    bitmap_family: str | None = None
    compression: Compression = Compression(1)
    cluster_size: int = 64 * KiB
    max_chain: int = 100
    check_zeroes: bool = True
    spot_check: int = 64
    on_unusable_bitmap: OnUnusableBitmap = "rescan"
    connections: int = 4
    requests: int = 16
    request_size: int = 512 * KiB
    workers: int | None = None
    limit: int | None = None
    timeout: float = 300.0
    scratch: Path | None = None
    scratch_reserve: int = 256 * MiB
    group_read: bool = False
    retention: Retention | None = None
    machines: tuple[MachineConfig, ...] = ()
    copies: tuple[CopyConfig, ...] = ()

    def copy_called(self, name: str) -> CopyConfig | None:
        """Return the second place of this name, or None."""
        return next((copy for copy in self.copies if copy.name == name), None)

    def retention_of(self, machine: str) -> Retention | None:
        """Return a machine's own retention, or else the global one (None: none); the machine need not be configured."""
        found = self.machine_of(machine)
        return self.retention if found is None else found.retention

    def machine_of(self, name: str) -> MachineConfig | None:
        """Return the machine of this name, or the one whose pattern means the domain of this name; None: neither."""
        named = [known for known in self.machines if known.name == name and known.domains is None]
        matched = [known for known in self.machines if known.domains and fnmatchcase(name, known.domains)]
        return next(iter((*named, *matched)), None)

    def machine_of_domain(self, uri: str, domain: str) -> MachineConfig | None:
        """
        Return the machine that means a domain of the libvirt at `uri`; None: none does.

        That is the machine that names the domain, or else the first whose pattern the domain matches.
        """
        local = [machine for machine in self.machines if machine.libvirt == uri]
        named = [known for known in local if known.domains is None and (known.domain or known.name) == domain]
        matched = [known for known in local if known.domains and fnmatchcase(domain, known.domains)]
        return next(iter((*named, *matched)), None)


def default() -> Config:
    """Return the settings that apply without a configuration file and without an option."""
    return Config()
