"""
Make requests from command-line options and the configuration: which machines and disks to read, and how.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from backup.cli import settings
from backup.config.settings import Config, MachineConfig
from backup.engine.copy_settings import CopySettings
from backup.errors import BackupError, NotFound, UsageError
from backup.model.compression import Compression
from backup.model.libvirt_uri import URI_HINT, is_pattern, uri_problem
from backup.model.names import check_name, name_problem, without_password
from backup.operations.request import Names, Request
from backup.planning.decision import FULL, INCREMENTAL, RESCAN
from backup.sources.base import NO_FREEZE, Freeze, Unavailable
from backup.sources.choose import DiskSpecification, Specification, choose, matching_domains

AUDIT = "audit"
"""The value of `Options.wanted` for an audit; the other values are those of `planning.decision`."""

_UNNAMED = "disk"
"""The name of the disk of an NBD export that has no name."""


@dataclass(frozen=True, slots=True)
class Options:
    """
    The options of `full`, `incremental`, `rescan` and `audit`; an option that was not given is None or empty.

    The value of --bitmap is `bitmap` (an exact name) if an NBD server is the source, otherwise `bitmap_family`.
    """

    wanted: str
    machines: tuple[str, ...]
    images: tuple[Path, ...]
    image_formats: tuple[str, ...]
    nbd: str | None
    libvirt: str | None
    domain: str | None
    bitmap: str | None
    since: str | None
    qmp: Path | None
    nodes: tuple[str, ...]
    exclude: tuple[str, ...]
    scratch: Path | None
    freeze: bool
    agent: Path | None
    allow_plaintext: bool
    trust_data_file: bool
    machine: str | None
    disks: tuple[str, ...]
    bitmap_family: str | None
    compression: str | None
    limit: str | None
    fallback: bool
    dry_run: bool

    @classmethod
    def of(
        cls,
        wanted: str,
        *,
        machines: Iterable[str] | None,
        image: Iterable[str] | None,
        image_format: Iterable[str] | None,
        nbd: str | None,
        libvirt: str | None,
        domain: str | None,
        qmp: str | None,
        node: Iterable[str] | None,
        exclude: Iterable[str] | None,
        scratch: str | None,
        machine: str | None,
        disk: Iterable[str] | None,
        bitmap: str | None,
        limit: str | None,
        since: str | None = None,
        freeze: bool = False,
        agent: str | None = None,
        allow_plaintext: bool = False,
        trust_data_file: bool = False,
        compression: str | None = None,
        no_fallback: bool = False,
        dry_run: bool = False,
    ) -> Options:
        """Make options from the parameters of a command; a parameter that the command lacks has its default."""
        return cls(
            wanted=wanted,
            machines=tuple(machines or ()),
            images=tuple(map(Path, image or ())),
            image_formats=tuple(image_format or ()),
            nbd=nbd,
            libvirt=libvirt,
            domain=domain,
            bitmap=None if nbd is None else bitmap,
            since=since,
            qmp=_path(qmp),
            nodes=tuple(node or ()),
            exclude=tuple(exclude or ()),
            scratch=_path(scratch),
            freeze=freeze,
            agent=_path(agent),
            allow_plaintext=allow_plaintext,
            trust_data_file=trust_data_file,
            machine=machine,
            disks=tuple(disk or ()),
            bitmap_family=bitmap if nbd is None else None,
            compression=compression,
            limit=limit,
            fallback=not no_fallback,
            dry_run=dry_run,
        )

    @property
    def sources(self) -> list[str]:
        """The given options that name a source."""
        given = {
            "--libvirt": self.libvirt is not None,
            "--image": self.images,
            "--nbd": self.nbd is not None,
            "--qmp": self.qmp is not None,
        }
        return [name for name, value in given.items() if value]


def make_requests(options: Options, config: Config) -> list[Request]:
    """
    Make a request for each machine that the options name; without a name, for each machine of the configuration.

    Raises
    ------
    UsageError, NotFound
        The options contradict each other or name no machine of the configuration.
    """
    _check(options)
    if options.libvirt is not None:
        return _from_libvirt(options.libvirt, options, config)
    if options.qmp is not None:
        return [_from_qmp(options.qmp, options, config)]
    if options.images:
        return [_from_images(options, config)]
    if options.nbd is not None:
        return [_from_nbd(options.nbd, options, config)]
    chosen = _chosen(options.machines, config)
    return [request for machine in chosen for request in _from_config(machine, options, config)]


def one_disk(
    config: Config,
    *,
    image: str | None,
    image_format: str | None,
    nbd: str | None,
    libvirt: str | None,
    domain: str | None,
    disk: str | None,
    qmp: str | None,
    node: str | None,
    scratch: str | None,
    bitmap: str | None,
) -> Specification:
    """
    Specify the one disk that the options of `map` name.

    Raises
    ------
    UsageError
        Not exactly one source is named.
    """
    of_domain = {libvirt is None, domain is None, disk is None}
    if [image, nbd, qmp, libvirt].count(None) != 3 or (qmp is None) != (node is None) or len(of_domain) > 1:
        raise UsageError(
            "map needs one source",
            hint="give --image FILE, --nbd URI, --qmp SOCKET --node NODE, or --libvirt URI --domain NAME --disk vda",
        )
    if libvirt is not None:
        check_uri(libvirt)
    server_bitmap = bitmap if nbd is not None else None
    only = DiskSpecification(disk or _UNNAMED, _path(image), image_format, nbd, server_bitmap, node=node)
    return Specification(
        disks=(only,),
        qmp=_path(qmp),
        libvirt=libvirt,
        domain=domain or "",
        scratch=_path(scratch) or config.scratch,
        scratch_reserve=config.scratch_reserve,
    )


def agent_of(qmp: Path, config: Config) -> Path | None:
    """Return the agent socket of the configured machine with this QMP socket; None if there is no such machine."""
    return next((machine.agent for machine in config.machines if machine.qmp == qmp.absolute()), None)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


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
        ("--trust-data-file", options.trust_data_file),
    ):
        if value and not sources:
            raise UsageError(
                f"{name} without a source", hint="use it with --libvirt URI, --image FILE, --nbd URI or --qmp SOCKET"
            )
    if options.since is not None and options.nbd is None:
        raise UsageError(
            "--since without --nbd",
            hint="omit --since: the name of pybackup's own bitmap contains the point",
        )
    if options.nbd is not None and options.trust_data_file:
        raise UsageError(
            "--trust-data-file together with --nbd",
            hint="omit --trust-data-file: an NBD server does not tell whether the image has an external data file",
        )
    if options.nbd is not None and len(options.disks) > 1:
        raise UsageError("--disk given twice", hint="an NBD export is one disk")
    _check_images(options)
    _check_qmp(options)
    _check_libvirt(options)


def _check_images(options: Options) -> None:
    images, formats, disks = len(options.images), len(options.image_formats), len(options.disks)
    if formats and not images:
        raise UsageError("--image-format without --image", hint="an NBD server and a running QEMU know the format")
    if not images:
        return
    if disks not in {0, images}:
        raise UsageError(
            f"--disk given {disks} times and --image {images} times",
            hint="give one --disk for each --image, in the same order",
        )
    if formats not in {0, 1, images}:
        raise UsageError(
            f"--image-format given {formats} times and --image {images} times",
            hint="give one format for all images, or one for each --image, in the same order",
        )
    files = [os.path.realpath(image) for image in options.images]
    for number, file in enumerate(files):
        if file in files[:number]:
            first = options.images[files.index(file)]
            raise UsageError(f"{first} and {options.images[number]} are the same file", hint="name each image once")
    if images > 1 and options.machine is None:
        raise UsageError(
            f"{images} images are given, but no name for the machine", hint="name the machine: --machine NAME"
        )


def _check_qmp(options: Options) -> None:
    if options.qmp is None:
        for name, given in (("--node", options.nodes), ("--agent", options.agent)):
            if given:
                raise UsageError(f"{name} without --qmp", hint="it is for a running machine: --qmp SOCKET")
    for name, value in (
        ("--exclude", options.exclude),
        ("--allow-plaintext", options.allow_plaintext),
        ("--freeze", options.freeze),
        ("--scratch", options.scratch),
    ):
        if value and options.qmp is None and options.libvirt is None:
            raise UsageError(
                f"{name} without --qmp and --libvirt",
                hint="the option is for a running machine: --qmp SOCKET, or --libvirt URI --domain NAME",
            )
    if options.qmp is None:
        return
    if not options.nodes and options.machine is None:
        raise UsageError(
            "all disks of a running machine are meant, but no name for the machine is given",
            hint="name the machine: --machine NAME",
        )
    if options.disks and len(options.disks) != len(options.nodes):
        raise UsageError(
            f"--disk given {len(options.disks)} times and --node {len(options.nodes)} times",
            hint="give one --disk for each --node, in the same order",
        )
    if options.freeze and options.agent is None:
        raise UsageError("--freeze without --agent", hint="name the guest agent's socket: --agent SOCKET")


def _check_libvirt(options: Options) -> None:
    if options.libvirt is None:
        if options.domain is not None:
            raise UsageError("--domain without --libvirt", hint="name the libvirt: --libvirt qemu:///system")
        return
    check_uri(options.libvirt)
    if options.domain is None:
        raise UsageError(
            "--libvirt without --domain", hint="name the domain: --domain NAME; virsh list --all shows them"
        )


def check_uri(uri: str) -> None:
    """
    Make sure that pybackup can use a URI of libvirt.

    Raises
    ------
    UsageError
        It cannot: the URI is wrong, or names a daemon on another host.
    """
    problem = uri_problem(uri)
    if problem is not None:
        raise UsageError(f"--libvirt {without_password(uri)} cannot be used: {problem}", hint=URI_HINT)


def _chosen(names: Sequence[str], config: Config) -> Sequence[MachineConfig]:
    if not config.machines:
        where = f"the configuration {config.path} names no machine" if config.path else "there is no configuration"
        raise UsageError(
            f"nothing to back up: {where}",
            hint="name a source with --libvirt URI --domain NAME, --image FILE, --nbd URI or --qmp SOCKET, "
            "or write a configuration: `pybackup check-config --example`",
        )
    by_name = {machine.name: machine for machine in config.machines}
    for name in names:
        if name not in by_name:
            raise NotFound(f"the configuration has no machine {name!r}", hint=f"it has: {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(names)] if names else config.machines


def _from_images(options: Options, config: Config) -> Request:
    bitmap_family = _bitmap_family(options, config.bitmap_family)
    _require_bitmap(options, bitmap_family)
    formats = options.image_formats or (None,)
    stems = [image.stem for image in options.images]
    machine = check_name("machine", options.machine or _derived(stems[0], "machine"))
    names = _disk_names(options, stems, "--image")
    pairs = zip(names, options.images, formats * (len(names) // len(formats)), strict=True)
    disks = tuple(DiskSpecification(name, image, image_format) for name, image, image_format in pairs)
    return _request(machine, Specification(disks), bitmap_family, options, config)


def _from_nbd(uri: str, options: Options, config: Config) -> Request:
    export = _export_name(uri)
    machine = check_name("machine", options.machine or _derived(export, "machine"))
    _require_bitmap(options, options.bitmap)
    [name] = _disk_names(options, [export or _UNNAMED], "--nbd")
    disk = DiskSpecification(name, nbd=uri, bitmap=options.bitmap, since=options.since)
    return _request(machine, Specification((disk,)), None, options, config)


def _disk_names(options: Options, derived: Sequence[str], pairs_with: str) -> list[str]:
    """Return the names of the disks, given or derived from the names of their sources; no two are equal."""
    disks = [check_name("disk", name) for name in options.disks or (_derived(name, "disk") for name in derived)]
    for name in disks:
        if disks.count(name) > 1:
            raise UsageError(
                f"two disks are named {name}", hint=f"name each disk with --disk, in the order of {pairs_with}"
            )
    return disks


def _from_qmp(socket: Path, options: Options, config: Config) -> Request:
    stems = [Path(node).stem for node in options.nodes]
    if options.machine is None and len(stems) > 1:
        raise UsageError(
            "several disks are given, but no name for the machine", hint="name the machine: --machine NAME"
        )
    bitmap_family = _bitmap_family(options, config.bitmap_family)
    _require_bitmap(options, bitmap_family)
    names = _disk_names(options, stems, "--node")
    machine = check_name("machine", options.machine or _derived(stems[0], "machine"))
    specification = Specification(
        disks=tuple(DiskSpecification(name, node=node) for name, node in zip(names, options.nodes, strict=True)),
        qmp=socket,
        exclude=options.exclude,
        warn_of_others=options.wanted != AUDIT,
        scratch=options.scratch or config.scratch,
        scratch_reserve=config.scratch_reserve,
        freeze=Freeze(options.agent, wanted=options.freeze, rehearsed=options.dry_run),
    )
    return _request(machine, specification, bitmap_family, options, config)


def _from_libvirt(uri: str, options: Options, config: Config) -> list[Request]:
    domain = options.domain or ""
    bitmap_family = _bitmap_family(options, config.bitmap_family)
    _require_bitmap(options, bitmap_family)
    specification = Specification(
        disks=tuple(DiskSpecification(check_name("disk", name)) for name in options.disks),
        libvirt=uri,
        exclude=options.exclude,
        warn_of_others=options.wanted != AUDIT,
        scratch=options.scratch or config.scratch,
        scratch_reserve=config.scratch_reserve,
        freeze=Freeze(wanted=options.freeze, rehearsed=options.dry_run),
    )

    def of_domain(name: str) -> Request:
        machine = options.machine or _derived(name, "machine", f"name the machine: --domain {name!r} --machine NAME")
        return _request(machine, replace(specification, domain=name), bitmap_family, options, config)

    if options.machine is not None or not is_pattern(domain):  # with --machine, a name of one domain in any case
        return [of_domain(domain)]
    template = _request(domain, specification, bitmap_family, options, config)
    return [_or_unavailable(of_domain, name, template) for name in matching_domains(uri, domain)]


def _or_unavailable(of_domain: Callable[[str], Request], name: str, template: Request) -> Request:
    """Make the request of a domain, or one that fails: a domain must not keep the others of a pattern from backups."""
    try:
        return of_domain(name)
    except BackupError as error:
        return replace(template, machine=name, host=Unavailable(error))


def _from_config(machine: MachineConfig, options: Options, config: Config) -> list[Request]:
    """
    Request the backup of a machine of the configuration, or of each domain that its pattern means.

    A domain that another machine means, too, belongs to one of them; see `Config.machine_of_domain`.
    """
    if machine.libvirt is None or machine.domains is None:
        return [_from_machine(machine, options, config)]
    uri, template = machine.libvirt, _from_machine(machine, options, config)

    def of_domain(name: str) -> Request:
        derived = _derived(name, "machine", _own_machine(uri, name))
        _require_named(machine, derived, config)
        return _from_machine(replace(machine, name=derived, domain=name, domains=None), options, config)

    try:
        domains = matching_domains(uri, machine.domains)
        own = [name for name in domains if config.machine_of_domain(uri, name) == machine]
        if not own and machine.name in options.machines:
            raise UsageError(
                f"each domain that matches {machine.domains!r} belongs to another machine of the configuration",
                hint="back up that machine, or correct the pattern `domains:`",
            )
    except BackupError as error:  # which must not keep other machines from their backups
        return [replace(template, host=Unavailable(error))]
    return [_or_unavailable(of_domain, name, template) for name in own]


def _require_named(machine: MachineConfig, domain: str, config: Config) -> None:
    """Refuse a domain whose name is that of another machine of the configuration, also of another libvirt's domain."""
    named = config.machine_of(domain)
    if named is not None and named != machine:
        raise UsageError(
            f"domain {domain} matches the pattern of {machine.name}, and {named.name} of the configuration means "
            "another machine of that name",
            hint=_own_machine(machine.libvirt or "", domain),
        )


def _own_machine(uri: str, domain: str) -> str:
    return f"give the domain a machine of its own in the configuration: NAME: {{libvirt: {uri!r}, domain: {domain!r}}}"


def _from_machine(machine: MachineConfig, options: Options, config: Config) -> Request:
    bitmap_family = _bitmap_family(options, machine.bitmap_family)
    if any(disk.nbd is None for disk in machine.disks):
        _require_bitmap(options, bitmap_family)
    specification = Specification(
        disks=tuple(DiskSpecification.of_config(disk, machine) for disk in machine.disks),
        qmp=machine.qmp,
        libvirt=machine.libvirt,
        domain=machine.domain or machine.name,
        exclude=machine.exclude,
        warn_of_others=options.wanted != AUDIT,
        scratch=machine.scratch or config.scratch,
        scratch_reserve=config.scratch_reserve,
        freeze=NO_FREEZE if options.wanted == AUDIT else _freeze(machine, rehearsed=options.dry_run),
    )
    return _request(machine.name, specification, bitmap_family, options, config, machine)


def _freeze(machine: MachineConfig, *, rehearsed: bool) -> Freeze:
    wanted, required = machine.freeze != "no", machine.freeze == "required"
    return Freeze(machine.agent, wanted=wanted, required=required, rehearsed=rehearsed)


def _request(
    name: str,
    specification: Specification,
    bitmap_family: str | None,
    options: Options,
    config: Config,
    machine: MachineConfig | None = None,
) -> Request:
    """Make the request for the machine called `name`; `machine` is its part of the configuration, if it has one."""
    host, disks = choose(specification)
    unusable = machine.on_unusable_bitmap if machine is not None else config.on_unusable_bitmap
    return Request(
        machine=name,
        host=host,
        disks=disks,
        wanted=options.wanted,
        bitmap_family=bitmap_family,
        level=_compression(options, config, machine).level,
        cluster_size=config.cluster_size,
        max_chain=config.max_chain,
        check_zeroes=config.check_zeroes,
        spot_check=config.spot_check,
        unusable=RESCAN if unusable == "rescan" else FULL,
        fallback=options.fallback and unusable != "fail",
        begin=options.fallback,
        dry_run=options.dry_run,
        named_by_path=machine is None and options.machine is None and options.libvirt is None,
        names=_names(options, machine),
        allow_plaintext=options.allow_plaintext
        or options.wanted == AUDIT  # an audit stores nothing
        or (machine is not None and machine.allow_plaintext),
        trust_data_file=options.trust_data_file or (machine is not None and machine.trust_data_file),
        copying=CopySettings(
            config.connections,
            config.requests,
            config.request_size,
            settings.workers(config),
            limit=settings.limit(options.limit, config),
        ),
    )


def _compression(options: Options, config: Config, machine: MachineConfig | None) -> Compression:
    if options.compression is not None:
        return Compression.parse(options.compression)
    return config.compression if machine is None else machine.compression


def _names(options: Options, machine: MachineConfig | None) -> Names:
    if machine is not None or options.libvirt is not None:  # whose disks libvirt names
        return Names.CONFIGURED
    return Names.GIVEN if options.disks else Names.SUGGESTED


def _bitmap_family(options: Options, configured: str | None) -> str | None:
    bitmap_family = options.bitmap_family or configured
    return check_name("bitmap", bitmap_family) if bitmap_family else None


def _require_bitmap(options: Options, name: str | None) -> None:
    """Refuse an incremental without the name of a bitmap or of a family of bitmaps."""
    if options.wanted == INCREMENTAL and not name:
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


def _derived(name: str, kind: str, hint: str | None = None) -> str:
    if name_problem("machine" if kind == "machine" else "disk", name) is not None:
        raise UsageError(
            f"no name for the {kind} can be derived from {name!r}", hint=hint or f"name the {kind}: --{kind} NAME"
        )
    return name
