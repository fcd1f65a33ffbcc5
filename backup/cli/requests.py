"""
From the configuration and the command line to requests: which machines, which disks, how.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from backup.cli import settings
from backup.config.settings import Config, DiskConfig, MachineConfig, OnUnusableBitmap
from backup.engine.copier import Settings
from backup.errors import NotFound, SourceError, UsageError
from backup.model.compression import Compression
from backup.model.disk import Claim, DiskState
from backup.model.names import check_name, name_problem, without_password
from backup.operations.request import Names, Request
from backup.planning.decision import FULL, INCREMENTAL, RESCAN
from backup.qemu.programs import filename
from backup.sources.base import NO_FREEZE, Capture, DiskRequest, Freeze, Host, Opened, Source
from backup.sources.image import ImageSource
from backup.sources.nbd_server import NbdSource
from backup.sources.resting import AtRest

if TYPE_CHECKING:
    from backup.sources.on_or_off import OnOrOff
    from backup.sources.running import Running

AUDIT = "audit"
"""What is wanted of a machine's disks beside FULL, INCREMENTAL and RESCAN, which `decide` has."""

_UNNAMED = "disk"
"""The disk of an NBD export without a name."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `full`, `incremental`, `rescan` and `audit`, as given; None or empty where they were not."""

    wanted: str
    machines: tuple[str, ...]
    images: tuple[Path, ...]
    image_formats: tuple[str, ...]
    nbd: str | None
    qmp: Path | None
    nodes: tuple[str, ...]
    exclude: tuple[str, ...]
    allow_plaintext: bool
    scratch: Path | None
    freeze: bool
    agent: Path | None
    since: str | None
    machine: str | None
    disks: tuple[str, ...]
    bitmap: str | None
    compression: str | None
    limit: str | None
    fallback: bool
    dry_run: bool

    @classmethod
    def of(
        cls,
        wanted: str,
        *,
        machines: Sequence[str] | None,
        image: Sequence[str] | None,
        image_format: Sequence[str] | None,
        qmp: str | None,
        node: Sequence[str] | None,
        scratch: str | None,
        disk: Sequence[str] | None,
        exclude: Sequence[str] | None = None,
        allow_plaintext: bool = False,
        since: str | None = None,
        freeze: bool = False,
        agent: str | None = None,
        compression: str | None = None,
        no_fallback: bool = False,
        dry_run: bool = False,
        **others: Any,
    ) -> Options:
        """From the command line's parameters, of which each command lacks some."""
        return cls(
            wanted=wanted,
            machines=tuple(machines or ()),
            images=tuple(map(Path, image or ())),
            image_formats=tuple(image_format or ()),
            qmp=None if qmp is None else Path(qmp),
            nodes=tuple(node or ()),
            exclude=tuple(exclude or ()),
            allow_plaintext=allow_plaintext,
            scratch=None if scratch is None else Path(scratch),
            agent=None if agent is None else Path(agent),
            disks=tuple(disk or ()),
            since=since,
            freeze=freeze,
            compression=compression,
            fallback=not no_fallback,
            dry_run=dry_run,
            **others,
        )

    @property
    def sources(self) -> list[str]:
        """The options among those given that name a source."""
        given = {"--image": self.images, "--nbd": self.nbd is not None, "--qmp": self.qmp is not None}
        return [name for name, value in given.items() if value]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one disk is, as the options of `map` say it."""

    image: Path | None
    image_format: str | None
    nbd: str | None
    qmp: Path | None
    node: str | None
    scratch: Path | None


def make_requests(options: Options, config: Config) -> list[Request]:
    """
    All machines to back up.

    Raises
    ------
    UsageError, NotFound
        The options contradict each other or name no machine of the configuration.
    """
    _check(options)
    if options.qmp is not None:
        return [_from_qmp(options.qmp, options, config)]
    if options.images:
        return [_from_images(options, config)]
    if options.nbd is not None:
        return [_from_nbd(options.nbd, options, config)]
    return [_from_config(machine, options, config) for machine in _chosen(options.machines, config)]


@contextmanager
def open_disk(place: Place, bitmap: str | None, config: Config, warn: Callable[[str], None]) -> Iterator[Opened]:
    """
    Open one disk to be looked at; of a running machine one instant of it, of which nothing is left.

    Raises
    ------
    UsageError
        Not exactly one source is named.
    SourceError
        It cannot be opened, or has no such bitmap.
    """
    if [place.image, place.nbd, place.qmp].count(None) != 2 or (place.qmp is None) != (place.node is None):
        raise UsageError("map needs one source", hint="give --image FILE, --nbd URI, or --qmp SOCKET --node NODE")
    host: AtRest | Running
    if place.qmp is not None and place.node is not None:
        host = _running(place.qmp, [place.node], config, scratch=place.scratch or config.scratch)
        source: Source = host.sources[0]
    else:
        resting = NbdSource(place.nbd, bitmap) if place.nbd is not None else _image(place)
        host, source = AtRest([resting]), resting
    with host:
        state = source.inspect()
        if place.nbd is None and bitmap is not None:
            _require_shown(state, bitmap, warn)
        capture = Capture(state, bitmap, None)
        with host.instant(
            [capture], 1, point=f"map-{os.urandom(4).hex()}", repository=None, short_id="0" * 8
        ) as moment:
            yield moment.disks[0]
            moment.require_sound()


def agent_of(qmp: Path, config: Config) -> Path | None:
    """The guest agent's socket of the machine with this QMP socket, where the configuration knows it."""
    return next((machine.agent for machine in config.machines if machine.qmp == qmp.absolute()), None)


def _image(place: Place) -> ImageSource:
    assert place.image is not None
    return ImageSource(place.image, place.image_format)


def _require_shown(state: DiskState, bitmap: str, warn: Callable[[str], None]) -> None:
    found = state.bitmap(bitmap)
    if found is None:
        below = bitmap in state.lower_bitmaps
        where = " (a file below it has; writes to the image itself are not in that)" if below else ""
        names = ", ".join(shown.name for shown in state.bitmaps) or "none"
        raise SourceError(f"{state.path} has no dirty bitmap {bitmap!r}{where}", hint=f"it has: {names}")
    if not found.recording:
        warn(f"bitmap {bitmap} is disabled: writes since then are not in it")


def _check(options: Options) -> None:
    sources = options.sources
    if sources and options.machines:
        raise UsageError(
            f"MACHINE {options.machines[0]} together with a source ({', '.join(sources)})",
            hint="name a machine of the configuration, or a source with --machine NAME",
        )
    if len(sources) > 1:
        raise UsageError(" together with ".join(sources), hint="name one source")
    for name, value in (
        ("--machine", options.machine),
        ("--disk", options.disks),
        ("--image-format", options.image_formats),
    ):
        if value and not sources:
            raise UsageError(f"{name} without a source", hint="it goes with --image FILE, --nbd URI or --qmp SOCKET")
    if options.since is not None and options.nbd is None:
        raise UsageError("--since without --nbd", hint="pybackup's own bitmaps are named for the point they start from")
    if options.nbd is not None and len(options.disks) > 1:
        raise UsageError("--disk given twice", hint="an NBD export is one disk")
    _check_images(options)
    _check_qmp(options)


def _check_images(options: Options) -> None:
    images, formats, disks = len(options.images), len(options.image_formats), len(options.disks)
    if formats and not images:
        raise UsageError("--image-format without --image", hint="an NBD server and a running QEMU know the format")
    if not images:
        return
    if disks not in {0, images}:
        raise UsageError(f"--disk given {disks} times and --image {images} times", hint="they pair in their order")
    if formats not in {0, 1, images}:
        raise UsageError(
            f"--image-format given {formats} times and --image {images} times",
            hint="give one format for all images, or one for each of them in their order",
        )
    files = [os.path.realpath(image) for image in options.images]
    for number, file in enumerate(files):
        if file in files[:number]:
            first = options.images[files.index(file)]
            raise UsageError(f"{first} and {options.images[number]} are the same file", hint="name each image once")
    if images > 1 and options.machine is None:
        raise UsageError(f"{images} images and no machine's name", hint="name the machine: --machine NAME")


def _check_qmp(options: Options) -> None:
    for name, value in (
        ("--node", options.nodes),
        ("--exclude", options.exclude),
        ("--allow-plaintext", options.allow_plaintext),
        ("--freeze", options.freeze),
        ("--agent", options.agent),
        ("--scratch", options.scratch),
    ):
        if value and options.qmp is None:
            raise UsageError(f"{name} without --qmp", hint="it is for a running machine: --qmp SOCKET")
    if options.qmp is None:
        return
    if not options.nodes and options.machine is None:
        raise UsageError("all disks of a running machine, and no name for the machine", hint="name it: --machine NAME")
    if options.disks and len(options.disks) != len(options.nodes):
        raise UsageError(
            f"--disk given {len(options.disks)} times and --node {len(options.nodes)} times",
            hint="they pair in their order",
        )
    if options.freeze and options.agent is None:
        raise UsageError("--freeze without --agent", hint="name the guest agent's socket: --agent SOCKET")


def _chosen(names: Sequence[str], config: Config) -> Sequence[MachineConfig]:
    if not config.machines:
        where = f"the configuration {config.path} names no machine" if config.path else "there is no configuration"
        raise UsageError(
            f"nothing to back up: {where}",
            hint="name a source with --image FILE, --nbd URI or --qmp SOCKET, "
            "or write a configuration: `pybackup check-config --example`",
        )
    by_name = {machine.name: machine for machine in config.machines}
    for name in names:
        if name not in by_name:
            raise NotFound(f"the configuration has no machine {name!r}", hint=f"it has: {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(names)] if names else config.machines


def _from_images(options: Options, config: Config) -> Request:
    family = _family(options, config.bitmap)
    _require_bitmap(options, family)
    formats = options.image_formats or (None,)
    sources = [
        ImageSource(image, image_format)
        for image, image_format in zip(options.images, formats * (len(options.images) // len(formats)), strict=True)
    ]
    stems = [image.stem for image in options.images]
    machine = check_name("machine", options.machine or _derived(stems[0], "machine"))
    disks = _disk_names(options, stems, "--image")
    return _request(
        machine,
        AtRest(sources),
        tuple(
            DiskRequest(name, source, path=filename(source.path)) for name, source in zip(disks, sources, strict=True)
        ),
        family,
        options,
        config,
        named_by_path=options.machine is None,
    )


def _from_nbd(uri: str, options: Options, config: Config) -> Request:
    name = _export_name(uri)
    machine = check_name("machine", options.machine or _derived(name, "machine"))
    source = NbdSource(uri, options.bitmap)
    _require_bitmap(options, options.bitmap)
    [disk] = _disk_names(options, [name or _UNNAMED], "--nbd")
    return _request(
        machine,
        AtRest([source]),
        (DiskRequest(disk, source, Claim(options.bitmap, options.since)),),
        None,
        options,
        config,
        named_by_path=options.machine is None,
    )


def _disk_names(options: Options, derived: Sequence[str], pairs_with: str) -> list[str]:
    """Names of the disks, as given or derived from what names their sources; each once."""
    disks = [check_name("disk", name) for name in options.disks or (_derived(name, "disk") for name in derived)]
    for name in disks:
        if disks.count(name) > 1:
            raise UsageError(f"two disks are named {name}", hint=f"name each with --disk, in the order of {pairs_with}")
    return disks


def _from_qmp(socket: Path, options: Options, config: Config) -> Request:
    names = [Path(node).stem for node in options.nodes]
    if options.machine is None and len(names) > 1:
        raise UsageError("several disks and no machine's name", hint="name it: --machine NAME")
    family = _family(options, config.bitmap)
    _require_bitmap(options, family)
    host = _running(
        socket,
        options.nodes or None,
        config,
        exclude=options.exclude,
        complain=options.wanted != AUDIT,
        scratch=options.scratch or config.scratch,
        freeze=Freeze(options.agent, wanted=options.freeze, rehearsed=options.dry_run),
    )
    disks = _disk_names(options, names, "--node")
    return _request(
        check_name("machine", options.machine or _derived(names[0], "machine")),
        host,
        tuple(DiskRequest(name, source) for name, source in zip(disks, host.sources, strict=True)),
        family,
        options,
        config,
        named_by_path=options.machine is None,
    )


def _running(
    socket: Path,
    nodes: Sequence[str] | None,
    config: Config,
    *,
    images: Sequence[Path] = (),
    exclude: Sequence[str] = (),
    complain: bool = False,
    scratch: Path | None,
    freeze: Freeze = NO_FREEZE,
) -> Running:
    from backup.sources.running import Running  # QMP's library costs 0.05 s, which backups of images need not spend

    return Running(
        socket,
        nodes,
        images=images,
        exclude=exclude,
        complain=complain,
        scratch=scratch,
        reserve=config.scratch_reserve,
        freeze=freeze,
    )


def _from_config(machine: MachineConfig, options: Options, config: Config) -> Request:
    family = _family(options, machine.bitmap)
    if any(disk.nbd is None for disk in machine.disks):
        _require_bitmap(options, family)
    compression = None if options.compression else machine.compression
    freeze = NO_FREEZE if options.wanted == AUDIT else _freeze(machine, rehearsed=options.dry_run)
    host, disks = _configured(machine, options, config, freeze)
    unusable = machine.on_unusable_bitmap
    return _request(
        machine.name,
        host,
        disks,
        family,
        options,
        config,
        names=Names.CONFIGURED,
        compression=compression,
        unusable=unusable,
    )


def _freeze(machine: MachineConfig, *, rehearsed: bool) -> Freeze:
    wanted, required = machine.freeze != "no", machine.freeze == "required"
    return Freeze(machine.agent, wanted=wanted, required=required, rehearsed=rehearsed)


def _configured(
    machine: MachineConfig, options: Options, config: Config, freeze: Freeze
) -> tuple[Host, tuple[DiskRequest, ...]]:
    if machine.qmp is None:
        resting = [_resting(disk) for disk in machine.disks]
        claims = [Claim(disk.bitmap, None) for disk in machine.disks]
        named = zip(machine.disks, resting, claims, strict=True)
        return AtRest(resting), tuple(DiskRequest(disk.name, source, claim) for disk, source, claim in named)
    running = _running(
        machine.qmp,
        [disk.node or "" for disk in machine.disks],
        config,
        images=[disk.image for disk in machine.disks if disk.image is not None],
        exclude=machine.exclude,
        complain=options.wanted != AUDIT,
        scratch=machine.scratch or config.scratch,
        freeze=freeze,
    )
    host: Running | OnOrOff = running
    if machine.on_or_off:
        from backup.sources.on_or_off import OnOrOff

        images = [ImageSource(disk.image, disk.format) for disk in machine.disks if disk.image is not None]
        host = OnOrOff(running, images)
    sources: Sequence[Source] = host.sources
    return host, tuple(
        DiskRequest(disk.name, source, allow_plaintext=disk.allow_plaintext or machine.allow_plaintext)
        for disk, source in zip(machine.disks, sources, strict=True)
    )


def _resting(disk: DiskConfig) -> ImageSource | NbdSource:
    return ImageSource(disk.image, disk.format) if disk.image is not None else NbdSource(disk.nbd or "", disk.bitmap)


def _request(
    machine: str,
    host: Host,
    disks: tuple[DiskRequest, ...],
    family: str | None,
    options: Options,
    config: Config,
    *,
    named_by_path: bool = False,
    names: Names = Names.SUGGESTED,
    compression: Compression | None = None,
    unusable: OnUnusableBitmap | None = None,
) -> Request:
    unusable = unusable or config.on_unusable_bitmap
    if options.compression is not None:
        compression = Compression.parse(options.compression)
    return Request(
        machine=machine,
        host=host,
        disks=disks,
        wanted=options.wanted,
        bitmap_family=family,
        level=(compression or config.compression).level,
        cluster_size=config.cluster_size,
        max_chain=config.max_chain,
        check_zeroes=config.check_zeroes,
        spot_check=config.spot_check,
        unusable=RESCAN if unusable == "rescan" else FULL,
        fallback=options.fallback and unusable != "fail",
        begin=options.fallback,
        dry_run=options.dry_run,
        named_by_path=named_by_path,
        names=Names.GIVEN if options.disks else names,
        allow_plaintext=options.allow_plaintext or options.wanted == AUDIT,  # which stores nothing
        copying=Settings(
            config.connections,
            config.requests,
            config.request_size,
            settings.workers(config),
            limit=settings.limit(options.limit, config),
        ),
    )


def _family(options: Options, configured: str | None) -> str | None:
    family = options.bitmap or configured
    return check_name("bitmap", family) if family else None


def _require_bitmap(options: Options, bitmap: str | None) -> None:
    if options.wanted == INCREMENTAL and not bitmap:
        raise UsageError(
            "an incremental needs a bitmap's name",
            hint="give --bitmap NAME (any name, b1 for example), or `bitmap:` in the configuration",
        )


def _export_name(uri: str) -> str:
    try:
        return unquote(urlsplit(uri).path.removeprefix("/"))
    except ValueError:
        raise UsageError(
            f"{without_password(uri)!r} is not an NBD URI",
            hint="for example nbd://host/export or nbd+unix:///export?socket=PATH",
        ) from None


def _derived(name: str, kind: str) -> str:
    if name_problem("machine" if kind == "machine" else "disk", name) is not None:
        raise UsageError(f"no {kind}'s name can be taken from {name!r}", hint=f"name it: --{kind} NAME")
    return name
