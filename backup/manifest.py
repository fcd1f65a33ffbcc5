"""
Manifests: the JSON that describes a point and makes it exist (FORMAT.md, "The manifest").

A manifest ends in a digest of all its bytes before that digest, so that any changed byte is found.  Values are frozen;
`encode` and `decode` are pure.  Unknown fields are kept out of the way (a later program may add some);
a newer `version` is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from backup import digests
from backup.errors import BackupError, Damaged, Failed

FORMAT = "pybackup manifest"
VERSION = 2
"""The highest that this program reads; a manifest says the lowest that can express it (FORMAT.md, "History")."""
NEW = ".new"
"""What follows a data file's name while the file that will take its place waits beside it."""
KINDS = ("full", "incremental")
NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
POINT_PATTERN = r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}"

_POINT = re.compile(POINT_PATTERN)
_DATA = re.compile(NAME_PATTERN + r"\.(?P<point>" + POINT_PATTERN + r")\.qcow2")
_DIGESTS = re.compile(NAME_PATTERN + r"\.(?P<point>" + POINT_PATTERN + r")\.(?:(?P<rewritten>[1-9][0-9]{0,8})\.)?b3")
_NAME = re.compile(NAME_PATTERN)
_RANDOM = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 64 << 20
_MAX_DISK = 1 << 62

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parent:
    """What an incremental was made against: the point's id and the disk's identity in it."""

    point: str
    identity: str


@dataclass(frozen=True, slots=True)
class BitmapRecord:
    """
    The bitmaps of a backup.

    `read` is the bitmap it was planned from, `started` the one that records since this point; exact names or None.
    `granularity` is in bytes; None where the server does not say.  `claimed` is true where the user said which point
    `read` starts from (--since) and no name proves it.
    """

    read: str | None
    started: str | None
    granularity: int | None
    claimed: bool


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file: flat names, stored size in bytes, BLAKE3 (hex) over the digest file."""

    file: str
    size: int
    digests: str
    digest: str
    cluster_size: int
    compression: str


@dataclass(frozen=True, slots=True)
class Former:
    """
    What a disk's entry said before prune rewrote its data file, for as long as either file may have the name.

    The files differ in their backing file: prune rewrites one only where the parent is another afterwards.
    """

    kind: str
    reason: str
    parent: Parent | None
    data: DataFile


@dataclass(frozen=True, slots=True)
class ByteCounts:
    """
    Bytes: reported dirty; read as data; recorded as zero unread; of the data, found to be zero; and the stored file.
    """

    dirty: int
    data: int
    zero: int
    found_zero: int
    stored: int


@dataclass(frozen=True, slots=True)
class LowerFile:
    """A file below the source in its backing chain, as it was: no bitmap of the source sees a change there."""

    path: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """How a disk was read: kind ("image", "nbd" or "qmp"), path or URI, format, consistency, QEMU's version or None."""

    kind: str
    path: str
    format: str
    consistency: str
    qemu: str | None
    lower: tuple[LowerFile, ...]


@dataclass(frozen=True, slots=True)
class DiskEntry:
    """
    One disk of a point.  `size` is its exact size in bytes, `identity` stands for its content at that instant.

    `replaces` is set only while prune exchanges the data file.
    """

    name: str
    kind: str
    reason: str
    size: int
    identity: str
    parent: Parent | None
    bitmap: BitmapRecord
    data: DataFile
    bytes: ByteCounts
    source: SourceRecord
    replaces: Former | None = None

    def restored(self) -> DiskEntry:
        """The entry as it was before prune rewrote the data file; itself where it did not."""
        former = self.replaces
        if former is None:
            return self
        counts = replace(self.bytes, stored=former.data.size)
        return replace(
            self,
            kind=former.kind,
            reason=former.reason,
            parent=former.parent,
            data=former.data,
            bytes=counts,
            replaces=None,
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """One point of a machine; one that is `pinned` is never pruned."""

    point: str
    sequence: int
    machine: str
    repository: str
    started: str
    finished: str
    program: str
    disks: tuple[DiskEntry, ...]
    pinned: bool = False

    @property
    def version(self) -> int:
        """
        The lowest version of the format that can express it.

        An older program would call a file that is exchanged, or a digest file with a number, damaged.
        """
        plain = all(disk.replaces is None and generation(disk.data.digests) == 0 for disk in self.disks)
        return 1 if plain else 2

    def with_disk(self, entry: DiskEntry) -> Manifest:
        """The same point with another entry for one of its disks."""
        return replace(self, disks=tuple(entry if disk.name == entry.name else disk for disk in self.disks))

    def disk(self, name: str) -> DiskEntry | None:
        """The entry of a disk, or None where the point does not hold it."""
        return next((disk for disk in self.disks if disk.name == name), None)


def new_point_id(now: datetime, random_hex: str) -> str:
    """Make a point's id: UTC to the second for people, eight random hex digits for uniqueness; never for ordering."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{random_hex}"


def moment_of(text: str) -> datetime | None:
    """Read a time as it stands in a manifest (UTC); None where it is none."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found.astimezone(UTC) if found.tzinfo is not None else None


def timestamp(moment: datetime) -> str:
    """A time as it stands in a manifest: UTC, to the second."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def is_point_id(text: str) -> bool:
    """Does the text have the form of a point's id?"""
    return _POINT.fullmatch(text) is not None


def is_data_name(text: str) -> bool:
    """Does the text have the form of a data file's or digest file's name, or of one that waits to take its place?"""
    return _DATA.fullmatch(text.removesuffix(NEW)) is not None or _DIGESTS.fullmatch(text) is not None


def point_of(file: str) -> str | None:
    """The point whose data file or digest file has this name; None where it can be none's."""
    match = _DATA.fullmatch(file) or _DIGESTS.fullmatch(file)
    return match["point"] if match else None


def data_name(disk: str, point: str) -> str:
    """The name of a disk's data file."""
    return f"{disk}.{point}.qcow2"


def digest_name(disk: str, point: str, rewritten: int) -> str:
    """The name of the digest file of a disk's data file that was rewritten so many times."""
    return f"{disk}.{point}.{rewritten}.b3" if rewritten else f"{disk}.{point}.b3"


def generation(digest_file: str) -> int:
    """How often prune has rewritten the data file that a digest file of this name is of."""
    match = _DIGESTS.fullmatch(digest_file)
    return int(match["rewritten"] or 0) if match else 0


def encode(manifest: Manifest) -> bytes:
    """The manifest as JSON text, its own digest last."""
    document = {"format": FORMAT, "version": manifest.version, **asdict(manifest), "digest": "0" * 64}
    text = json.dumps(document, indent=2, ensure_ascii=True) + "\n"
    head = text.removesuffix(_tail("0" * 64)).encode("ascii")
    return head + _tail(digests.digest(head).hex()).encode("ascii")


def decode(content: bytes, name: str) -> Manifest:
    """
    Read a manifest; `name` is for messages.

    Raises
    ------
    Damaged
        It is not a manifest, or not the one that was written.
    Failed
        A newer program wrote it.
    """
    if len(content) > _MAX_BYTES:
        raise _damaged(name, f"it has {len(content)} bytes")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(name, f"it is not JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _damaged(name, f'its "format" is not "{FORMAT}"')
    tail = _tail(str(document.get("digest"))).encode("ascii", "replace")
    head = content.removesuffix(tail)
    if len(head) == len(content) or digests.digest(head).hex() != document.get("digest"):
        raise _damaged(name, "its bytes do not match its digest")
    # After the digest, which all versions end in: a flipped bit must not pass for a newer version.
    _check_version(document.get("version"), name)
    try:
        return _manifest(document)
    except (_BadField, RecursionError) as error:
        raise _damaged(name, str(error)) from None


def _tail(digest: str) -> str:
    return f',\n  "digest": "{digest}"\n}}\n'


def _check_version(version: object, name: str) -> None:
    if type(version) is int and version > VERSION:
        raise Failed(
            f"{name} has format version {version}; this program reads versions up to {VERSION}",
            hint="upgrade pybackup; nothing was changed",
        )
    if type(version) is not int or version < 1:
        raise _damaged(name, f"its version is {_shown(version)}")


def _damaged(name: str, why: str) -> BackupError:
    return Damaged(
        f"manifest {name} is damaged: {why}",
        hint="bring the file back from a copy of the repository; points that do not build on it are unharmed",
    )


def _shown(value: object) -> str:
    """A value in a message; a hostile one may have megabytes."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


class _BadField(Exception):
    """A field is missing or has the wrong type or form."""


class _Fields:
    """
    Takes typed fields out of a JSON object.

    Each run reads all manifests of a machine, of which there may be a thousand: what is right is found right by one
    look, and where it was, as `place` and the place of what it lies in, is put into words only for an error.
    """

    __slots__ = ("_outer", "_place", "_value")

    def __init__(self, value: object, place: str, outer: _Fields | None = None) -> None:
        self._place = place
        self._outer = outer
        if not isinstance(value, dict):
            raise _BadField(f"{self.where()} is not an object")
        self._value: dict[str, Any] = value

    def where(self) -> str:
        return self._place if self._outer is None else f"{self._outer.where()}.{self._place}"

    def take(self, key: str, kind: type[T]) -> T:
        value = self._value.get(key)
        if type(value) is not kind:
            raise _BadField(f"{self.where()}.{key} is {_shown(value)}, not {kind.__name__}")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        return None if self._value.get(key) is None else self.take(key, kind)

    def number(self, key: str, low: int = 0, high: int = _MAX_DISK) -> int:
        value = self._value.get(key)
        if type(value) is int and low <= value <= high:
            return value
        raise _BadField(f"{self.where()}.{key} is {self.take(key, int)}, not between {low} and {high}")

    def matching(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self._value.get(key)
        if type(value) is str and pattern.fullmatch(value):
            return value
        shown = _shown(self.take(key, str))
        raise _BadField(f"{self.where()}.{key} is {shown}, which pybackup does not write there")

    def inner(self, key: str) -> _Fields:
        return _Fields(self._value.get(key), key, self)

    def items(self, key: str) -> list[_Fields]:
        return [_Fields(value, f"{key}[{i}]", self) for i, value in enumerate(self.take(key, list))]


def _manifest(document: dict[str, Any]) -> Manifest:
    fields = _Fields(document, "manifest")
    disks = tuple(_disk(item) for item in fields.items("disks"))
    if len({disk.name for disk in disks}) != len(disks) or not disks:
        raise _BadField("manifest.disks is empty or names a disk twice")
    return Manifest(
        point=fields.matching("point", _POINT),
        sequence=fields.number("sequence", low=1),
        machine=fields.matching("machine", _NAME),
        repository=fields.matching("repository", _RANDOM),
        started=fields.take("started", str),
        finished=fields.take("finished", str),
        program=fields.take("program", str),
        disks=disks,
        pinned=bool(fields.optional("pinned", bool)),
    )


def _disk(fields: _Fields) -> DiskEntry:
    kind, parent = _kind(fields)
    former = None if fields.optional("replaces", dict) is None else _former(fields.inner("replaces"))
    return DiskEntry(
        name=fields.matching("name", _NAME),
        kind=kind,
        reason=fields.take("reason", str),
        size=fields.number("size"),
        identity=fields.matching("identity", _RANDOM),
        parent=parent,
        bitmap=_bitmap(fields.inner("bitmap")),
        data=_data(fields.inner("data")),
        bytes=_counts(fields.inner("bytes")),
        source=_source(fields.inner("source")),
        replaces=former,
    )


def _kind(fields: _Fields) -> tuple[str, Parent | None]:
    kind = fields.take("kind", str)
    parent = None if fields.optional("parent", dict) is None else fields.inner("parent")
    if kind not in KINDS or (kind == "incremental") != (parent is not None):
        raise _BadField(f"a disk's kind is {_shown(kind)} and its parent {'missing' if parent is None else 'given'}")
    if parent is None:
        return kind, None
    return kind, Parent(parent.matching("point", _POINT), parent.matching("identity", _RANDOM))


def _former(fields: _Fields) -> Former:
    kind, parent = _kind(fields)
    return Former(kind, fields.take("reason", str), parent, _data(fields.inner("data")))


def _bitmap(fields: _Fields) -> BitmapRecord:
    return BitmapRecord(
        read=fields.optional("read", str),
        started=fields.optional("started", str),
        granularity=fields.optional("granularity", int),
        claimed=fields.take("claimed", bool),
    )


def _data(fields: _Fields) -> DataFile:
    cluster_size = fields.number("cluster_size", 4096, 2 << 20)
    if cluster_size & (cluster_size - 1):
        raise _BadField(f"the cluster size {cluster_size} is no power of two")
    return DataFile(
        file=fields.matching("file", _DATA),
        size=fields.number("size", low=1),
        digests=fields.matching("digests", _DIGESTS),
        digest=fields.matching("digest", _DIGEST),
        cluster_size=cluster_size,
        compression=fields.take("compression", str),
    )


def _counts(fields: _Fields) -> ByteCounts:
    return ByteCounts(
        dirty=fields.number("dirty"),
        data=fields.number("data"),
        zero=fields.number("zero"),
        found_zero=fields.number("found_zero"),
        stored=fields.number("stored"),
    )


def _source(fields: _Fields) -> SourceRecord:
    lower = tuple(
        LowerFile(
            item.take("path", str), item.number("size"), item.take("mtime_ns", int), item.number("inode", 0, 1 << 64)
        )
        for item in fields.items("lower")
    )
    return SourceRecord(
        kind=fields.take("kind", str),
        path=fields.take("path", str),
        format=fields.take("format", str),
        consistency=fields.take("consistency", str),
        qemu=fields.optional("qemu", str),
        lower=lower,
    )
