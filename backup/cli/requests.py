"""
From the configuration and the command line to requests: which machines, which disks, how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from backup import config as configuration
from backup.cli.settings import workers
from backup.config import Config, DiskConfig, MachineConfig
from backup.copier import Settings
from backup.create import DiskRequest, Request
from backup.decide import Claim
from backup.errors import NotFound, UsageError
from backup.names import check_name, name_problem
from backup.sources import ImageSource, NbdSource


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `full` and `incremental`, as given; None where they were not."""

    wanted: str
    machines: tuple[str, ...]
    image: Path | None
    image_format: str | None
    nbd: str | None
    since: str | None
    machine: str | None
    disk: str | None
    bitmap: str | None
    compression: str | None
    limit: str | None
    fallback: bool
    dry_run: bool


def make_requests(options: Options, config: Config) -> list[Request]:
    """
    All machines to back up.

    Raises
    ------
    UsageError, NotFound
        The options contradict each other or name no machine of the configuration.
    """
    _check(options)
    if options.image is not None or options.nbd is not None:
        return [_from_source(options, config)]
    return [_from_config(machine, options, config) for machine in _chosen(options.machines, config)]


def _check(options: Options) -> None:
    source = options.image is not None or options.nbd is not None
    if source and options.machines:
        raise UsageError(
            f"MACHINE {options.machines[0]} together with a source (--image, --nbd)",
            hint="name a machine of the configuration, or a source with --machine NAME",
        )
    if options.image is not None and options.nbd is not None:
        raise UsageError("--image together with --nbd", hint="name one source")
    for name, value in (
        ("--machine", options.machine),
        ("--disk", options.disk),
        ("--image-format", options.image_format),
    ):
        if value is not None and not source:
            raise UsageError(f"{name} without a source", hint="it goes with --image FILE or --nbd URI")
    if options.since is not None and options.nbd is None:
        raise UsageError("--since without --nbd", hint="pybackup's own bitmaps are named for the point they start from")
    if options.image_format is not None and options.image is None:
        raise UsageError("--image-format without --image", hint="an NBD server shows no format")


def _chosen(names: Sequence[str], config: Config) -> Sequence[MachineConfig]:
    if not config.machines:
        where = f"the configuration {config.path} names no machine" if config.path else "there is no configuration"
        raise UsageError(
            f"nothing to back up: {where}",
            hint="name a source with --image FILE or --nbd URI, or see config.example.yaml",
        )
    by_name = {machine.name: machine for machine in config.machines}
    for name in names:
        if name not in by_name:
            raise NotFound(f"the configuration has no machine {name!r}", hint=f"it has: {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(names)] if names else config.machines


def _from_source(options: Options, config: Config) -> Request:
    name = options.image.stem if options.image is not None else _export_name(options.nbd or "")
    machine = options.machine or _derived(name, "machine")
    if options.image is not None:
        source: ImageSource | NbdSource = ImageSource(options.image, options.image_format)
        family, claim = _family(options, config.bitmap), Claim(None, None)
    else:
        source = NbdSource(options.nbd or "", options.bitmap)
        family, claim = None, Claim(options.bitmap, options.since)
    _require_bitmap(options, options.bitmap or family)
    disk = DiskRequest(
        name=check_name("disk", options.disk or _derived(name, "disk")),
        source=source,
        claim=claim,
    )
    return _request(
        check_name("machine", machine), (disk,), family, options, config, named_by_path=options.machine is None
    )


def _from_config(machine: MachineConfig, options: Options, config: Config) -> Request:
    family = _family(options, machine.bitmap)
    if any(disk.image is not None for disk in machine.disks):
        _require_bitmap(options, family)
    disks = tuple(_disk(disk) for disk in machine.disks)
    compression = None if options.compression else machine.compression
    return _request(machine.name, disks, family, options, config, compression=compression)


def _disk(disk: DiskConfig) -> DiskRequest:
    if disk.image is not None:
        return DiskRequest(disk.name, ImageSource(disk.image, disk.format))
    return DiskRequest(disk.name, NbdSource(disk.nbd or "", disk.bitmap), Claim(disk.bitmap, None))


def _request(
    machine: str,
    disks: tuple[DiskRequest, ...],
    family: str | None,
    options: Options,
    config: Config,
    *,
    named_by_path: bool = False,
    compression: configuration.Compression | None = None,
) -> Request:
    if options.compression is not None:
        compression = configuration.Compression.parse(options.compression)
    return Request(
        machine=machine,
        disks=disks,
        wanted=options.wanted,
        family=family,
        level=(compression or config.compression).level,
        cluster_size=config.cluster_size,
        max_chain=config.max_chain,
        check_zeroes=config.check_zeroes,
        fallback=options.fallback,
        dry_run=options.dry_run,
        named_by_path=named_by_path,
        copying=Settings(
            config.connections,
            config.requests,
            config.request_size,
            workers(config),
            limit=config.limit if options.limit is None else configuration.parse_limit(options.limit),
        ),
    )


def _family(options: Options, configured: str | None) -> str | None:
    family = options.bitmap or configured
    return check_name("bitmap", family) if family else None


def _require_bitmap(options: Options, bitmap: str | None) -> None:
    if options.wanted == "incremental" and not bitmap:
        raise UsageError(
            "an incremental needs a bitmap's name",
            hint="give --bitmap NAME (any name, b1 for example), or `bitmap:` in the configuration",
        )


def _export_name(uri: str) -> str:
    try:
        return unquote(urlsplit(uri).path.removeprefix("/"))
    except ValueError:
        raise UsageError(
            f"{uri!r} is not an NBD URI", hint="for example nbd://host/export or nbd+unix:///export?socket=PATH"
        ) from None


def _derived(name: str, kind: str) -> str:
    if name_problem("machine" if kind == "machine" else "disk", name) is not None:
        raise UsageError(f"no {kind}'s name can be taken from {name!r}", hint=f"name it: --{kind} NAME")
    return name
