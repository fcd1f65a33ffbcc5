"""
The configuration: a YAML file becomes frozen values.

The yaml library never creates objects from the file.  It only composes nodes, which know their lines, and each value
is read from the text of its node.  So one run finds all problems and names the line and the key of each, no tag can
construct anything, duplicate keys are found, and `no`, `012` and `1:30` never become false, ten and ninety.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from backup.config.sections import HINT, Problems, Section
from backup.config.settings import (
    LIMITS,
    TIMEOUTS,
    Config,
    CopyConfig,
    DiskConfig,
    MachineConfig,
    OnUnusableBitmap,
    Retention,
)
from backup.errors import UsageError
from backup.model.compression import Compression
from backup.model.location import is_same
from backup.planning.retention import MAX_COUNT, RULES, Batch, Policy
from backup.units import KiB, MiB, show_size

_MAX_BYTES = 512 << 10
"""Largest configuration, enough for a thousand machines.  The limit exists because parsing YAML takes much memory."""
EXAMPLE = Path(__file__).parent.with_name("config.example.yaml")
"""The path of an example with every key and a comment on each, installed with the package."""


def load(path: Path, check: Callable[[os.stat_result], None] = lambda _status: None) -> Config:
    """
    Read a configuration file.  Relative paths in the file start from its folder.

    `check` is called with the status of the opened file, and refuses the file by raising an error.

    Raises
    ------
    UsageError
        The file cannot be read, is not YAML, or has problems.  The message lists all problems after its first line,
        each with its line, its key and what was expected.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES + 1)
            status = os.fstat(file.fileno())
    except OSError as error:
        raise UsageError(
            f"cannot read the configuration {path}: {error.strerror}",
            hint="name another file with --config, or start from `pybackup check-config --example`",
        ) from None
    check(status)
    if len(text) > _MAX_BYTES:
        raise UsageError(
            f"the configuration {path} has more than {_MAX_BYTES} bytes",
            hint="name another file with --config; one machine takes a few hundred bytes",
        )
    problems = Problems()
    config = _config(Section.root(_compose(path, text), problems, path.absolute().parent), path)
    problems.raise_any(path)
    return config


def _compose(path: Path, text: bytes) -> yaml.Node | None:
    """Parse YAML into nodes, without constructing any object."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        reason = ", ".join(filter(None, (error.context, error.problem)))
    except yaml.YAMLError as error:  # the encoding, or a control character
        line, reason = "", str(error).splitlines()[0]
    except RecursionError:
        line, reason = "", "nested too deep"
    raise UsageError(f"{path}: {line}this is not YAML: {reason}", hint=HINT)


def _config(section: Section, path: Path) -> Config:
    section.allow(
        "repository", "bitmap", "compression", "cluster_size", "max_chain", "check_zeroes", "spot_check",
        "on_unusable_bitmap", "connections", "requests", "request_size", "workers", "limit", "timeout", "scratch",
        "scratch_reserve", "group_read", "retention", "machines", "copies",
    )  # fmt: skip
    defaults = Config()
    bitmap_family = section.name("bitmap", "bitmap")
    compression = section.compression(defaults.compression)
    unusable = section.unusable(defaults.on_unusable_bitmap)
    spot_check = section.integer("spot_check", 0, 1_000_000)
    retention = _retention(section, None)
    cluster_size = section.size("cluster_size", defaults.cluster_size, 4 * KiB, 2 * MiB)
    config = Config(
        path=path,
        repository=section.repository(),
        bitmap_family=bitmap_family,
        compression=compression,
        cluster_size=cluster_size,
        max_chain=section.integer("max_chain", 1, 10_000) or defaults.max_chain,
        check_zeroes=section.boolean("check_zeroes", otherwise=defaults.check_zeroes),
        spot_check=defaults.spot_check if spot_check is None else spot_check,
        on_unusable_bitmap=unusable,
        connections=section.integer("connections", 1, 64) or defaults.connections,
        requests=section.integer("requests", 1, 256) or defaults.requests,
        request_size=section.size("request_size", max(defaults.request_size, cluster_size), 64 * KiB, 32 * MiB),
        workers=section.integer("workers", 1, 256),
        limit=_limit(section),
        timeout=section.seconds("timeout", defaults.timeout, *TIMEOUTS),
        scratch=section.path("scratch"),
        scratch_reserve=section.size("scratch_reserve", defaults.scratch_reserve, 0, 1 << 60),
        group_read=section.boolean("group_read", otherwise=defaults.group_read),
        retention=retention,
        machines=tuple(
            _machine(child, bitmap_family, compression, unusable, retention)
            for child in section.children("machine", "machines")
        ),
        copies=_copies(section),
    )
    if config.cluster_size & (config.cluster_size - 1):
        section.problem("cluster_size", f"expected a power of two, got {config.cluster_size}")
    elif config.request_size % config.cluster_size:
        size = show_size(config.cluster_size)
        section.problem("request_size", f"expected a multiple of the cluster size, {size}, got {config.request_size}")
    return config


def _machine(
    section: Section,
    bitmap_family: str | None,
    compression: Compression,
    unusable: OnUnusableBitmap,
    retention: Retention | None,
) -> MachineConfig:
    section.allow(
        "disks", "bitmap", "compression", "on_unusable_bitmap", "qmp", "agent", "libvirt", "domain", "domains",
        "freeze", "scratch", "exclude", "allow_plaintext", "trust_data_file", "retention",
    )  # fmt: skip
    running, of_libvirt = "qmp" in section.fields, "libvirt" in section.fields
    children = list(section.children("disk", "disks"))
    disks = tuple(_domain_disk(child) if of_libvirt else _disk(child, running=running) for child in children)
    _require_different(children, disks)
    if "disks" not in section.fields and not of_libvirt:
        section.problem(None, "expected `disks`, with a name for each disk")
    if running and len({disk.image is None for disk in disks}) > 1:
        section.problem("disks", "expected `image` beside `node` for each disk, or for none")
    for key in ("freeze", "scratch", "exclude", "allow_plaintext"):
        if key in section.fields and not (running or of_libvirt):
            section.problem(key, "only a running machine, with `qmp` or `libvirt`, can have this key")
    freeze = section.freeze()
    if freeze != "no" and "agent" not in section.fields and not of_libvirt:
        section.problem("freeze", "expected `agent` beside it, the guest agent's socket")
    _check_libvirt(section, running=running, of_libvirt=of_libvirt)
    return MachineConfig(
        name=section.last,
        disks=disks,
        bitmap_family=section.name("bitmap", "bitmap") or bitmap_family,
        compression=section.compression(compression),
        on_unusable_bitmap=section.unusable(unusable),
        qmp=section.path("qmp"),
        agent=section.path("agent"),
        libvirt=section.libvirt(),
        domain=(section.text("domain", "a domain's name") or section.last) if of_libvirt else None,
        domains=section.text("domains", "a pattern of domains' names, as lab-*"),
        freeze=freeze,
        scratch=section.path("scratch"),
        exclude=section.texts("exclude", "a node's name, a device's id or an image's path"),
        allow_plaintext=section.boolean("allow_plaintext", otherwise=False),
        trust_data_file=section.boolean("trust_data_file", otherwise=False),
        retention=_retention(section, retention),
    )


def _check_libvirt(section: Section, *, running: bool, of_libvirt: bool) -> None:
    """Note what goes with `libvirt` only, and what does not go with it."""
    if "agent" in section.fields and not running:
        section.problem(
            "agent", "libvirt has its own channel to the agent" if of_libvirt else "only a machine with `qmp` has that"
        )
    if of_libvirt and running:
        section.problem("libvirt", "expected one of `qmp` and `libvirt`, got both")
    for key in ("domain", "domains"):
        if key in section.fields and not of_libvirt:
            section.problem(key, "expected `libvirt` beside it, for example qemu:///system")
    if "domain" in section.fields and "domains" in section.fields:
        section.problem("domains", "expected one of `domain` and `domains`, got both")


def _domain_disk(section: Section) -> DiskConfig:
    """A disk of a domain, which its name alone tells: it is the target device (vda)."""
    section.allow("allow_plaintext", "trust_data_file")
    return DiskConfig(
        section.last,
        allow_plaintext=section.boolean("allow_plaintext", otherwise=False),
        trust_data_file=section.boolean("trust_data_file", otherwise=False),
    )


def _retention(outer: Section, otherwise: Retention | None) -> Retention | None:
    """Read the key `retention`; a machine's own replaces the global one as a whole."""
    section = outer.inner("retention")
    if section is None:
        return otherwise
    section.allow(*RULES, "within", "batch", "share", "after_backup")
    defaults = Batch()
    counts = {rule: section.integer(rule, 0, MAX_COUNT) or 0 for rule in RULES}
    policy = Policy(**counts, within=section.duration("within"))
    share = section.integer("share", 0, 1000)
    if policy.empty and not any(key in section.fields for key in (*RULES, "within")):
        section.problem(None, f"expected at least one of {', '.join(RULES)} and within")
    elif policy.empty:
        section.problem(None, "expected something to keep, got nothing: every count is 0")
    return Retention(
        policy=policy,
        batch=Batch(section.integer("batch", 1, 10_000) or defaults.points, defaults.share if share is None else share),
        after_backup=section.boolean("after_backup", otherwise=False),
    )


def _limit(section: Section) -> int | None:
    return section.size("limit", 0, *LIMITS) or None if "limit" in section.fields else None


def _copies(section: Section) -> tuple[CopyConfig, ...]:
    """Read the second places; two of one location would have two retentions."""
    places: list[CopyConfig] = []
    for child in section.children("place", "copies"):
        place = _copy(child)
        if place is None:
            continue
        other = next((known.name for known in places if is_same(known.to, place.to)), None)
        if other is not None:
            child.problem("to", f"{place.to} is already the location of {other}")
        places.append(place)
    return tuple(places)


def _copy(section: Section) -> CopyConfig | None:
    section.allow(
        "to", "endpoint", "region", "profile", "recipients", "machines", "retention", "after_backup", "limit"
    )  # fmt: skip
    location = section.location()
    if "to" not in section.fields:
        section.problem(None, "expected `to`, a folder or s3://BUCKET/PREFIX")
    place = CopyConfig(
        name=section.last,
        to=Path() if location is None else location,
        recipients=section.recipients(),
        machines=section.texts("machines", "a machine's name or a pattern, as db*"),
        retention=_retention(section, None),
        after_backup=section.boolean("after_backup", otherwise=False),
        limit=_limit(section),
    )
    return None if location is None else place


def _require_different(children: Sequence[Section], disks: Sequence[DiskConfig]) -> None:
    """Refuse two disks on one node, which would remove each other's bitmaps."""
    owners: dict[str, str] = {}
    for disk, child in zip(disks, children, strict=True):
        if disk.node is not None and owners.setdefault(disk.node, disk.name) != disk.name:
            child.problem("node", f"{disk.node} is already the node of disk {owners[disk.node]}")


def _disk(section: Section, *, running: bool) -> DiskConfig:
    section.allow("image", "nbd", "node", "format", "bitmap", "allow_plaintext", "trust_data_file")
    sources = [key for key in ("image", "nbd", "node") if key in section.fields]
    got = " and ".join(sources) or "nothing"
    if running and sources not in (["node"], ["image", "node"]):
        expected = "`node`, since the machine has `qmp`, and `image` if the machine is off on some nights"
        section.problem(None, f"expected {expected}, got {got}")
    elif not running and "node" in sources:
        section.problem("node", "only a running machine, with `qmp`, has nodes")
    elif not running and len(sources) != 1:
        section.problem(None, f"expected one of `image` and `nbd`, got {got.replace('nothing', 'neither')}")
    if "image" not in sources and "format" in section.fields:
        section.problem(
            "format",
            "only an `image` has a format: an NBD server sends the disk's bytes, and a running QEMU knows the format",
        )
    if not running and "allow_plaintext" in section.fields:
        section.problem("allow_plaintext", "only a running machine, with `qmp`, decrypts its disks")
    if "nbd" in sources and "trust_data_file" in section.fields:
        section.problem("trust_data_file", "an NBD server does not tell whether the image has an external data file")
    if "nbd" not in sources and "bitmap" in section.fields:
        section.problem("bitmap", "only an `nbd` disk names a bitmap; for other disks the machine's `bitmap` counts")
    return DiskConfig(
        name=section.last,
        image=section.image(),
        nbd=section.nbd(),
        node=section.text("node", "a node's name, a device's id or an image's path"),
        format=section.format(),
        bitmap=section.bitmap_name(),
        allow_plaintext=section.boolean("allow_plaintext", otherwise=False),
        trust_data_file=section.boolean("trust_data_file", otherwise=False),
    )
