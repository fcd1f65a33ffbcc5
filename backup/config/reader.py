"""
The configuration: a YAML file to frozen values.  The only user of yaml.

The file is never turned into objects by yaml: it is composed into nodes, which know their line, and each key's value is
read from its text.  So every problem is found in one go and named with its line and key, a tag can construct nothing, a
duplicate key is seen, and `no`, `012` and `1:30` never become a false, a ten and a ninety.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from backup.errors import UsageError
from backup.model.names import FOLDER_HINT, Kind, folder_problem, name_problem, without_password
from backup.planning.retention import MAX_COUNT, RULES, Batch, Duration, Policy
from backup.units import KiB, MiB, parse_duration, parse_size, show_duration, show_size

MIN_LEVEL, MAX_LEVEL = -7, 19
"""Of zstd: its fast levels as far as -7, and those that its program offers without --ultra."""

_MAX_BYTES = 512 << 10
"""Of a configuration, which is enough for a thousand machines: to parse YAML takes much time and memory."""

_HINT = "`pybackup check-config --example` shows every key with a comment; `pybackup check-config` checks again"
_NBD_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")  # NBD's doc/uri.md
_PLAIN = {"int": "number", "float": "number", "bool": "truth value", "timestamp": "date"}


OnUnusableBitmap = Literal["rescan", "full", "fail"]
"""What an incremental becomes where there is a chain, and nothing to continue it from."""


@dataclass(frozen=True, slots=True)
class Compression:
    """How clusters are compressed: zstd of a level, or not at all (`level` is None)."""

    level: int | None

    @classmethod
    def parse(cls, text: str) -> Compression:
        """
        Read "none", "zstd" (level 1) or "zstd:LEVEL".

        Raises
        ------
        UsageError
            Another word, or a level outside -7..19.
        """
        if text == "none":
            return cls(None)
        match = re.fullmatch(r"zstd(?::(-?[0-9]{1,3}))?", text, re.ASCII)
        level = int(match[1] or 1) if match else None
        if level is None or not MIN_LEVEL <= level <= MAX_LEVEL:
            raise UsageError(
                f"{text!r} is not a compression",
                hint=f"write none, zstd, or zstd:LEVEL with a level from {MIN_LEVEL} to {MAX_LEVEL}",
            )
        return cls(level)

    def __str__(self) -> str:
        return "none" if self.level is None else f"zstd:{self.level}"


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """
    One disk of a machine: one of `image` (an offline image's absolute path), `nbd` (a URI) and `node` (a node, a device
    or an image of the machine's running QEMU) is set; or `node` and `image` of a machine that is on or off.

    `format` is the image's, None when the file says itself.  `bitmap` is the exact name of a bitmap on someone else's
    NBD server, which no backup by a configuration continues from: none says which point it starts from; of an image,
    the machine's family counts.  `allow_plaintext` lets a running QEMU decrypt the disk.
    """

    name: str
    image: Path | None = None
    nbd: str | None = None
    node: str | None = None
    format: Literal["qcow2", "raw"] | None = None
    bitmap: str | None = None
    allow_plaintext: bool = False


@dataclass(frozen=True, slots=True)
class Retention:
    """Which points prune keeps, when it rewrites a full, and whether it runs after each successful backup."""

    policy: Policy
    batch: Batch
    after_backup: bool = False


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """
    A machine and its disks; `bitmap` (a family), `compression`, `on_unusable_bitmap` and `retention` are its own or
    else the global ones.

    `qmp` is the socket of a running machine's QEMU, `agent` that of its guest agent; both paths are absolute.
    `exclude` names disks of the running machine that no point needs to hold.
    """

    name: str
    disks: tuple[DiskConfig, ...]
    bitmap: str | None
    compression: Compression
    on_unusable_bitmap: OnUnusableBitmap = "rescan"
    qmp: Path | None = None
    agent: Path | None = None
    freeze: Literal["no", "yes", "required"] = "no"
    scratch: Path | None = None
    exclude: tuple[str, ...] = ()
    allow_plaintext: bool = False
    retention: Retention | None = None

    @property
    def on_or_off(self) -> bool:
        """Are its disks read through QMP while it runs, and from their images while it is off?"""
        return self.qmp is not None and all(disk.image is not None for disk in self.disks)


_TIMEOUTS = 1.0, 86400.0
"""Seconds that `timeout` may name."""
_LIMITS = 64 * KiB, 1024 * 1024 * MiB
"""Bytes a second that `limit` may name."""


def parse_limit(text: str) -> int:
    """
    Read the value of --limit, bytes a second.

    Raises
    ------
    UsageError
        No size, or none that makes sense.
    """
    limit, (low, high) = parse_size(text), _LIMITS
    if not low <= limit <= high:
        raise UsageError(
            f"--limit {text} is out of bounds", hint=f"name bytes a second from {show_size(low)} to {show_size(high)}"
        )
    return limit


@dataclass(frozen=True, slots=True)
class Config:
    """
    All settings.  Sizes in bytes.

    `path` is the file they came from, None for the defaults.  At most `requests` are in flight on each of
    `connections`, each of at most `request_size` bytes.  `workers` is the number of cores to keep busy; None means all.
    A source is read at no more than `limit` bytes a second.  A wait without progress ends
    after `timeout` seconds.  `max_chain` is the number of points after which an
    incremental becomes a full.  An incremental reads `spot_check` clean clusters again.  `group_read` lets the group
    read the repository (0640 and 0750 instead of 0600 and 0700).
    """

    path: Path | None = None
    repository: Path | None = None
    bitmap: str | None = None
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

    def retention_of(self, machine: str) -> Retention | None:
        """What is kept of a machine, which need not be one of the configuration's; None: nothing is said."""
        return next((each.retention for each in self.machines if each.name == machine), self.retention)


def default() -> Config:
    """Return the settings that hold where no file and no option says otherwise."""
    return Config()


EXAMPLE = Path(__file__).parent.with_name("config.example.yaml")
"""An example with every key, and a comment on each; it is installed with the package."""


def load(path: Path, check: Callable[[os.stat_result], None] = lambda _status: None) -> Config:
    """
    Read a configuration file.  Relative paths in it are relative to its folder.

    `check` is called with the status of the opened file; what it raises refuses the file.

    Raises
    ------
    UsageError
        The file cannot be read, is not YAML, or says what it may not; the message lists all problems, one a line after
        the first, each with its line, key and what was expected.
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
            hint="name another file with --config; a machine takes some hundred bytes",
        )
    problems = _Problems()
    config = _config(_Section.root(_compose(path, text), problems, path.absolute().parent), path)
    problems.raise_any(path)
    return config


def _compose(path: Path, text: bytes) -> yaml.Node | None:
    """Parse YAML into nodes; nothing is constructed."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        reason = ", ".join(filter(None, (error.context, error.problem)))
    except yaml.YAMLError as error:  # not text: an encoding, a control character
        line, reason = "", str(error).splitlines()[0]
    except RecursionError:
        line, reason = "", "nested too deep"
    raise UsageError(f"{path}: {line}this is not YAML: {reason}", hint=_HINT)


def _config(section: _Section, path: Path) -> Config:
    section.allow(
        "repository", "bitmap", "compression", "cluster_size", "max_chain", "check_zeroes", "spot_check",
        "on_unusable_bitmap", "connections", "requests", "request_size", "workers", "limit", "timeout", "scratch",
        "scratch_reserve", "group_read", "retention", "machines",
    )  # fmt: skip
    known = Config()
    bitmap = section.name("bitmap", "bitmap")
    compression = section.compression(known.compression)
    unusable = section.unusable(known.on_unusable_bitmap)
    spot_check = section.integer("spot_check", 0, 1_000_000)
    retention = _retention(section, None)
    cluster_size = section.size("cluster_size", known.cluster_size, 4 * KiB, 2 * MiB)
    config = Config(
        path=path,
        repository=section.repository(),
        bitmap=bitmap,
        compression=compression,
        cluster_size=cluster_size,
        max_chain=section.integer("max_chain", 1, 10_000) or known.max_chain,
        check_zeroes=section.boolean("check_zeroes", otherwise=known.check_zeroes),
        spot_check=known.spot_check if spot_check is None else spot_check,
        on_unusable_bitmap=unusable,
        connections=section.integer("connections", 1, 64) or known.connections,
        requests=section.integer("requests", 1, 256) or known.requests,
        request_size=section.size("request_size", max(known.request_size, cluster_size), 64 * KiB, 32 * MiB),
        workers=section.integer("workers", 1, 256),
        limit=section.size("limit", 0, *_LIMITS) or None if "limit" in section.fields else None,
        timeout=section.seconds("timeout", known.timeout, *_TIMEOUTS),
        scratch=section.path("scratch"),
        scratch_reserve=section.size("scratch_reserve", known.scratch_reserve, 0, 1 << 60),
        group_read=section.boolean("group_read", otherwise=known.group_read),
        retention=retention,
        machines=tuple(
            _machine(child, bitmap, compression, unusable, retention)
            for child in section.children("machine", "machines")
        ),
    )
    if config.cluster_size & (config.cluster_size - 1):
        section.problem("cluster_size", f"expected a power of two, got {config.cluster_size}")
    elif config.request_size % config.cluster_size:
        size = show_size(config.cluster_size)
        section.problem("request_size", f"expected a multiple of the cluster size, {size}, got {config.request_size}")
    return config


def _machine(
    section: _Section,
    bitmap: str | None,
    compression: Compression,
    unusable: OnUnusableBitmap,
    retention: Retention | None,
) -> MachineConfig:
    section.allow(
        "disks", "bitmap", "compression", "on_unusable_bitmap", "qmp", "agent", "freeze", "scratch", "exclude",
        "allow_plaintext", "retention",
    )  # fmt: skip
    running = "qmp" in section.fields
    children = list(section.children("disk", "disks"))
    disks = tuple(_disk(child, running=running) for child in children)
    _require_different(children, disks)
    if "disks" not in section.fields:
        section.problem(None, "expected `disks`, with a name for each disk")
    if running and len({disk.image is None for disk in disks}) > 1:
        section.problem("disks", "expected `image` beside `node` for each disk, or for none")
    for key in ("agent", "freeze", "scratch", "exclude", "allow_plaintext"):
        if key in section.fields and not running:
            section.problem(key, "only a running machine, with `qmp`, has that")
    freeze = section.freeze()
    if freeze != "no" and "agent" not in section.fields:
        section.problem("freeze", "expected `agent` beside it, the guest agent's socket")
    return MachineConfig(
        name=section.last,
        disks=disks,
        bitmap=section.name("bitmap", "bitmap") or bitmap,
        compression=section.compression(compression),
        on_unusable_bitmap=section.unusable(unusable),
        qmp=section.path("qmp"),
        agent=section.path("agent"),
        freeze=freeze,
        scratch=section.path("scratch"),
        exclude=section.texts("exclude", "a node's name, a device's id or an image's path"),
        allow_plaintext=section.boolean("allow_plaintext", otherwise=False),
        retention=_retention(section, retention),
    )


def _retention(outer: _Section, otherwise: Retention | None) -> Retention | None:
    """The key `retention`; a machine's takes the place of the global one, whole."""
    section = outer.inner("retention")
    if section is None:
        return otherwise
    section.allow(*RULES, "within", "batch", "share", "after_backup")
    known = Batch()
    counts = {rule: section.integer(rule, 0, MAX_COUNT) or 0 for rule in RULES}
    policy = Policy(**counts, within=section.duration("within"))
    share = section.integer("share", 0, 1000)
    if policy.empty and not any(key in section.fields for key in (*RULES, "within")):
        section.problem(None, f"expected at least one of {', '.join(RULES)} and within")
    elif policy.empty:
        section.problem(None, "expected something to keep, got nothing: every count is 0")
    return Retention(
        policy=policy,
        batch=Batch(section.integer("batch", 1, 10_000) or known.points, known.share if share is None else share),
        after_backup=section.boolean("after_backup", otherwise=False),
    )


def _require_different(children: Sequence[_Section], disks: Sequence[DiskConfig]) -> None:
    """Two disks of one node would remove each other's bitmaps."""
    owners: dict[str, str] = {}
    for disk, child in zip(disks, children, strict=True):
        if disk.node is not None and owners.setdefault(disk.node, disk.name) != disk.name:
            child.problem("node", f"{disk.node} is the node of {owners[disk.node]} already")


def _disk(section: _Section, *, running: bool) -> DiskConfig:
    section.allow("image", "nbd", "node", "format", "bitmap", "allow_plaintext")
    sources = [key for key in ("image", "nbd", "node") if key in section.fields]
    got = " and ".join(sources) or "nothing"
    if running and sources not in (["node"], ["image", "node"]):
        expected = "`node`, as the machine has `qmp`, and `image` if the machine is off on some nights"
        section.problem(None, f"expected {expected}, got {got}")
    elif not running and "node" in sources:
        section.problem("node", "only a running machine, with `qmp`, has nodes")
    elif not running and len(sources) != 1:
        section.problem(None, f"expected one of `image` and `nbd`, got {got.replace('nothing', 'neither')}")
    if "image" not in sources and "format" in section.fields:
        section.problem(
            "format", "only an `image` has a format: an NBD server sends the disk's bytes, QEMU knows its own"
        )
    if not running and "allow_plaintext" in section.fields:
        section.problem("allow_plaintext", "only a running machine, with `qmp`, decrypts its disks")
    if "nbd" not in sources and "bitmap" in section.fields:
        section.problem("bitmap", "only an `nbd` disk names a bitmap; else the machine's `bitmap` counts")
    return DiskConfig(
        name=section.last,
        image=section.image(),
        nbd=section.nbd(),
        node=section.text("node", "a node's name, a device's id or an image's path"),
        format=section.format(),
        bitmap=section.bitmap_name(),
        allow_plaintext=section.boolean("allow_plaintext", otherwise=False),
    )


class _Problems:
    """What is wrong with a file, collected on the way."""

    def __init__(self) -> None:
        self._found: list[tuple[int, str]] = []
        self.images: dict[str, str] = {}
        """The disk that named an image, by the image's real path."""

    def add(self, line: int, where: str, what: str) -> None:
        self._found.append((line, f"line {line}: {where}: {what}" if where else f"line {line}: {what}"))

    def raise_any(self, path: Path) -> None:
        found = [text for _, text in sorted(self._found)]
        if len(found) == 1:
            raise UsageError(f"{path}: {found[0]}", hint=_HINT)
        if found:
            lines = [f"{path}: {len(found)} problems", *(f"  {text}" for text in found)]
            raise UsageError("\n".join(lines), hint=_HINT, listed=True)


class _Section:
    """
    One mapping of the file.  A reader returns what a key holds, None or the default where the key is absent or wrong;
    what is wrong goes to the problems.
    """

    def __init__(self, node: yaml.Node, line: int, keys: tuple[str, ...], problems: _Problems, folder: Path) -> None:
        self._line, self._keys, self._problems, self._folder = line, keys, problems, folder
        self.fields: dict[str, yaml.Node] = {}
        self._lines: dict[str, int] = {}
        if not isinstance(node, yaml.MappingNode):
            self.problem(None, f"expected keys and values, got {_describe(node)}")
            return
        for key, value in node.value:
            self._add(key, value)

    @classmethod
    def root(cls, node: yaml.Node | None, problems: _Problems, folder: Path) -> _Section:
        """Return the whole file's mapping; an empty file has no keys."""
        empty = yaml.MappingNode("tag:yaml.org,2002:map", [])
        return cls(empty if node is None else node, 1, (), problems, folder)

    @property
    def last(self) -> str:
        """The section's own key: the name of the machine or disk."""
        return self._keys[-1]

    def _add(self, key: yaml.Node, value: yaml.Node) -> None:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or _type(key) == "null":
            self._problems.add(line, ".".join(self._keys), f"expected a key, got {_describe(key)}")
        elif key.value in self.fields:
            self.problem(key.value, f"given twice, first on line {self._lines[key.value]}", line)
        else:
            self.fields[key.value] = value
            self._lines[key.value] = line

    def problem(self, key: str | None, what: str, line: int | None = None) -> None:
        """Note what is wrong with a key, or with the section itself (None)."""
        where = ".".join([*self._keys, *([] if key is None else [key])])
        self._problems.add(line or self._lines.get(key or "", self._line), where, what)

    def allow(self, *known: str) -> None:
        """Refuse keys that are not among these."""
        for key in self.fields:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                meant = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
                self.problem(key, f"unknown key; {meant}")

    def children(self, kind: Kind, key: str) -> Iterator[_Section]:
        """Yield the sections of a mapping from names to sections."""
        if key not in self.fields:
            return
        outer = _Section(self.fields[key], self._lines[key], (*self._keys, key), self._problems, self._folder)
        if not outer.fields and isinstance(self.fields[key], yaml.MappingNode):
            self.problem(key, f"expected at least one {kind}")
        for name, node in outer.fields.items():
            if problem := name_problem(kind, name):
                outer.problem(name, f"not a {kind}'s name: {problem}")
            yield _Section(node, outer._lines[name], (*outer._keys, name), self._problems, self._folder)

    def inner(self, key: str) -> _Section | None:
        """The section of a key that holds keys and values."""
        if key not in self.fields:
            return None
        if not isinstance(self.fields[key], yaml.MappingNode):
            self.problem(key, f"expected keys and values, got {_describe(self.fields[key])}")
            return None
        return _Section(self.fields[key], self._lines[key], (*self._keys, key), self._problems, self._folder)

    def duration(self, key: str) -> Duration | None:
        """A duration, as 30d."""
        expected = "a duration, as 30d, 12h, 2w, 6m or 1y"
        text = self._scalar(key, ("str",), expected)
        try:
            return None if text is None else Duration.parse(text)
        except UsageError:
            self.problem(key, f"expected {expected}, got {text!r}")
            return None

    def _scalar(self, key: str, types: tuple[str, ...], expected: str) -> str | None:
        """Return a scalar's text as it stands in the file, when its YAML type is one of these."""
        if key not in self.fields:
            return None
        node = self.fields[key]
        if isinstance(node, yaml.ScalarNode) and _type(node) in types and node.value and _is_utf8(node.value):
            return str(node.value)
        self.problem(key, f"expected {expected}, got {_describe(node)}")
        return None

    def text(self, key: str, expected: str) -> str | None:
        """Any text."""
        return self._scalar(key, ("str",), expected)

    def texts(self, key: str, expected: str) -> tuple[str, ...]:
        """A list of texts, or one text."""
        node = self.fields.get(key)
        if not isinstance(node, yaml.SequenceNode):
            found = self.text(key, f"{expected}, or a list of such")
            return () if found is None else (found,)
        entries = []
        for entry in node.value:
            if isinstance(entry, yaml.ScalarNode) and _type(entry) == "str" and entry.value and _is_utf8(entry.value):
                entries.append(str(entry.value))
            else:
                self.problem(key, f"expected {expected}, got {_describe(entry)}", entry.start_mark.line + 1)
        return tuple(entries)

    def freeze(self) -> Literal["no", "yes", "required"]:
        """The key `freeze`: a truth value, or `required`."""
        text = self._scalar("freeze", ("bool", "str"), "true, false or required")
        if text is None:
            return "no"
        if text == "required":
            return "required"
        known = yaml.SafeLoader.bool_values.get(text.lower())
        if known is None:
            self.problem("freeze", f"expected true, false or required, got {text!r}")
        return "yes" if known else "no"

    def unusable(self, otherwise: OnUnusableBitmap) -> OnUnusableBitmap:
        """The key `on_unusable_bitmap`."""
        match self._scalar("on_unusable_bitmap", ("str",), "rescan, full or fail"):
            case "rescan":
                return "rescan"
            case "full":
                return "full"
            case "fail":
                return "fail"
            case None:
                return otherwise
            case other:
                self.problem("on_unusable_bitmap", f"expected rescan, full or fail, got {other!r}")
                return otherwise

    def path(self, key: str) -> Path | None:
        """A path; a relative one is relative to the file's folder."""
        text = self._scalar(key, ("str",), "a path")
        return None if text is None else self._folder / Path(text)

    def repository(self) -> Path | None:
        """The key `repository`, a folder."""
        text = self._scalar("repository", ("str",), "a path")
        if text is not None and (problem := folder_problem(text)):
            self.problem("repository", f"{text!r} is no folder: {problem} ({FOLDER_HINT})")
            return None
        return None if text is None else self._folder / Path(text)

    def name(self, kind: Kind, key: str) -> str | None:
        """A name that keeps the rules of names.py."""
        text = self._scalar(key, ("str",), f"the name of a {kind}")
        if text is not None and (problem := name_problem(kind, text)):
            self.problem(key, f"not a {kind}'s name: {problem}")
            return None
        return text

    def compression(self, otherwise: Compression) -> Compression:
        """The key `compression`."""
        text = self._scalar("compression", ("str",), "none, zstd or zstd:LEVEL")
        try:
            return otherwise if text is None else Compression.parse(text)
        except UsageError as error:
            self.problem("compression", f"{error.message}: {error.hint}")
            return otherwise

    def size(self, key: str, otherwise: int, low: int, high: int) -> int:
        """A size in bytes between two bounds."""
        expected = f"a size from {show_size(low)} to {show_size(high)}"
        text = self._scalar(key, ("str", "int", "float"), expected)
        try:
            size = otherwise if text is None else parse_size(text)
        except UsageError:
            size = -1
        if low <= size <= high:
            return size
        self.problem(key, f"expected {expected}, got {text!r}")
        return otherwise

    def seconds(self, key: str, otherwise: float, low: float, high: float) -> float:
        """A time between two bounds, as 30s, 5m (also 5min) or 1h; in seconds."""
        expected = f"a time from {show_duration(low)} to {show_duration(high)}, as 30s, 5m or 1h"
        text = self._scalar(key, ("str",), expected)
        try:
            found = otherwise if text is None else parse_duration(re.sub(r"m$", "min", text))
        except UsageError:
            found = -1.0
        if low <= found <= high:
            return found
        self.problem(key, f"expected {expected}, got {text!r}")
        return otherwise

    def integer(self, key: str, low: int, high: int) -> int | None:
        """A whole number between two bounds, written in decimal."""
        expected = f"a whole number from {low} to {high}"
        text = self._scalar(key, ("int",), expected)
        if text is None:
            return None
        if re.fullmatch(r"0|[1-9][0-9]{0,9}", text, re.ASCII) and low <= int(text) <= high:
            return int(text)
        self.problem(key, f"expected {expected}, got {text!r}")
        return None

    def boolean(self, key: str, *, otherwise: bool) -> bool:
        """YAML's true or false; it takes yes, no, on and off as well."""
        text = self._scalar(key, ("bool",), "true or false")
        if text is not None and text.lower() not in yaml.SafeLoader.bool_values:  # tagged !!bool by hand
            self.problem(key, f"expected true or false, got {text!r}")
            return otherwise
        return otherwise if text is None else yaml.SafeLoader.bool_values[text.lower()]

    def image(self) -> Path | None:
        """An image's path, that no other disk of the file has: two would remove each other's bitmaps."""
        path = self.path("image")
        if path is not None:
            mine = ".".join(self._keys)
            other = self._problems.images.setdefault(os.path.realpath(path), mine)
            if other != mine:
                self.problem("image", f"{path} is the image of {other} already")
        return path

    def nbd(self) -> str | None:
        """An NBD URI."""
        text = self._scalar("nbd", ("str",), "an NBD URI")
        if text is not None and text.partition(":")[0] not in _NBD_SCHEMES:
            shown = without_password(text)
            self.problem(
                "nbd",
                f"expected an NBD URI, as nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH, got {shown!r}",
            )
            return None
        return text

    def format(self) -> Literal["qcow2", "raw"] | None:
        """An image's format."""
        match self._scalar("format", ("str",), "qcow2 or raw"):
            case "qcow2":
                return "qcow2"
            case "raw":
                return "raw"
            case None:
                return None
            case other:
                self.problem("format", f"expected qcow2 or raw, got {other!r}")
                return None

    def bitmap_name(self) -> str | None:
        """The exact name of a bitmap on an NBD server; QEMU allows up to 1023 bytes of anything."""
        text = self._scalar("bitmap", ("str",), "a bitmap's name")
        if text is not None and len(text.encode()) > 1023:
            self.problem("bitmap", f"expected at most 1023 bytes, got {len(text.encode())}")
            return None
        return text


def _type(node: yaml.Node) -> str:
    """Return the short YAML type of a node: "str", "int", "bool", "null" and so on; a foreign tag as it is."""
    return str(node.tag).removeprefix("tag:yaml.org,2002:")


def _describe(node: yaml.Node) -> str:
    """Say what a node is, for "expected X, got Y"."""
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    kind = _type(node)
    if kind == "null" or not node.value:
        return "nothing"
    shown = node.value if len(node.value) <= 60 else node.value[:60] + "..."
    if kind == "str":
        return f"the text {shown!r}"
    if kind in _PLAIN:
        return f"the {_PLAIN[kind]} {shown} (for text, put it in quotes)"
    return f"{shown!r} of type {kind}"


def _is_utf8(text: str) -> bool:
    """Whether the system can take a text as a name: no NUL, no half of a surrogate pair (YAML can escape both)."""
    return "\0" not in text and not re.search("[\ud800-\udfff]", text)
