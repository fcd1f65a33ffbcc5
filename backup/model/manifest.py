"""
Manifests: the JSON that describes a point and makes it exist (FORMAT.md, "The manifest").

A manifest ends in a digest of all bytes before the digest, so that any changed byte is found.  `decode` checks every
field (type, range, length, characters), and returns nothing that pybackup does not write.  Unknown fields are ignored,
because a later program may add some; a newer `version` is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property

from backup.errors import Damaged, Failed
from backup.model import documents
from backup.model.digests import digest
from backup.model.documents import DIGEST, RANDOM, WORD, BadDocument, Fields, shown

FORMAT = "pybackup manifest"
VERSION = 3
"""The highest version that this program reads; a manifest has the lowest that can express it (FORMAT.md, "History")."""
UNFINISHED = ".part"
"""Suffix of a data file that is not complete: a file whose name ends in .qcow2 is always a whole image."""
NEW = ".new"
"""Suffix of a rewritten data file that has not yet replaced the existing file."""
KINDS = ("full", "incremental")
NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
POINT_PATTERN = r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}"

_POINT = re.compile(POINT_PATTERN)
_DATA = re.compile(NAME_PATTERN + r"\.(?P<point>" + POINT_PATTERN + r")\.qcow2")
_DIGESTS = re.compile(NAME_PATTERN + r"\.(?P<point>" + POINT_PATTERN + r")\.(?:(?P<rewritten>[1-9][0-9]{0,8})\.)?b3")
_NAME = re.compile(NAME_PATTERN)
_MACHINE_FILE = re.compile(rf"(?P<point>{POINT_PATTERN})\.(?P<suffix>[a-z]+)")
_COMPRESSION = re.compile(r"none|zstd(:-?[0-9]{1,3})?")
_MAX_FILE = 1 << 56
"""Largest offset of a qcow2 file, in bytes."""
_MAX_TABLE = 4 << 20
"""Most entries of an L1 table (QEMU: QCOW_MAX_L1_SIZE)."""
_MAX_GRANULARITY = 1 << 40
DEFINITION, NVRAM, TPM = "definition", "nvram", "tpm"
"""Roles of a machine's files: libvirt's XML, the firmware's variables (UEFI), the state of the emulated TPM."""
SUFFIXES = {DEFINITION: "xml", NVRAM: "nvram", TPM: "tpm"}
"""What follows the point in the name of a machine's file.  No data file and no manifest has such a name."""
MAX_MACHINE_FILE = {DEFINITION: 4 << 20, NVRAM: 64 << 20, TPM: 4 << 20}
"""Largest files of each role, in bytes."""
_MAX_NANOSECONDS = 1 << 94
"""Largest time of a file: a file system may return any 64 bits of seconds for a damaged inode."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The parent of an incremental: the point's id, and the disk's identity in that point."""

    point: str
    identity: str


@dataclass(frozen=True, slots=True)
class BitmapRecord:
    """
    The bitmaps of a backup.

    `read` is the bitmap that the backup was planned from, `started` the bitmap that records since this point; exact
    names or None.  `granularity` is in bytes; None where the server does not report it.  `claimed` is true where only
    the user stated which point `read` starts from (--since).  `why_none` gives the reason why no bitmap records since
    this point; None where a bitmap does, or none was wanted.
    """

    read: str | None
    started: str | None
    granularity: int | None
    claimed: bool
    why_none: str | None = None


@dataclass(frozen=True, slots=True)
class DataFile:
    """
    A data file and its digest file.

    `file` and `digests` are the names of the two, without a folder.  `size` is the length of the data file in bytes,
    and `digest` the BLAKE3 of the digest file, in hex.  `compression` is "none" or "zstd:LEVEL".
    """

    file: str
    size: int
    digests: str
    digest: str
    cluster_size: int
    compression: str


@dataclass(frozen=True, slots=True)
class Former:
    """
    The parts of a disk's entry that changed when prune rewrote the data file, as they were before.

    The entry keeps them until the new file has certainly replaced the existing one.  The two files differ in their
    backing file: prune rewrites a file only if its parent changes.
    """

    kind: str
    reason: str
    parent: Parent | None
    data: DataFile


@dataclass(frozen=True, slots=True)
class ByteCounts:
    """
    The bytes of a disk's backup.

    `dirty` were reported dirty, `data` were read, `zero` were recorded as zero without reading; `found_zero` of the
    data turned out to be zero; `stored` is the size of the data file.
    """

    dirty: int
    data: int
    zero: int
    found_zero: int
    stored: int


@dataclass(frozen=True, slots=True)
class LowerFile:
    """
    A file below the source image in its backing chain, as it was at the backup.

    The bitmaps of the source image do not record changes of this file; a change of size, time or inode shows them.
    """

    path: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class DataFileClaim:
    """
    The user's statement that nothing writes to the source image's external data file except through the image.

    `path` and `file_id` name the file as it was at the backup.  `file_id` is "inode N" for a file, "uuid ID" for a
    device of the device mapper (LVM), and "device" for any other block device.
    """

    path: str
    file_id: str


@dataclass(frozen=True, slots=True)
class MachineFile:
    """
    A small file that belongs to the machine, and not to one of its disks.

    `role` says what the file is, `file` is its name without a folder, `size` its length in bytes, and `digest` the
    BLAKE3 of its content, in hex.
    """

    role: str
    file: str
    size: int
    digest: str


NBD = "nbd"
"""The kind of a source that is an export of someone else's NBD server."""


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """
    How a disk was read: kind ("image", "nbd", "qmp" or "libvirt"), path or URI, format, consistency, QEMU's version or
    None.

    `plaintext`: the image is encrypted, and QEMU decrypted what was read.  `trusted_data_file` is set if the image has
    an external data file and the user trusts its bitmaps nevertheless.
    """

    kind: str
    path: str
    format: str
    consistency: str
    qemu: str | None
    lower: tuple[LowerFile, ...]
    plaintext: bool = False
    trusted_data_file: DataFileClaim | None = None

    @property
    def of_server(self) -> bool:
        """Whether someone else's NBD server served the disk: `path` is a URI then, and `format` is not an image's."""
        return self.kind == NBD


@dataclass(frozen=True, slots=True)
class DiskEntry:
    """
    One disk of a point.  `size` is its exact size in bytes, `identity` stands for its content at that instant.

    `replaces` is set only while prune replaces the data file.
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
        """Return the entry from before prune rewrote the data file, or the entry itself if prune did not."""
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


@dataclass(frozen=True)
class Manifest:
    """One point of a machine; a `pinned` point is never pruned."""

    point: str
    sequence: int
    machine: str
    repository: str
    started: str
    finished: str
    program: str
    disks: tuple[DiskEntry, ...]
    pinned: bool = False
    machine_files: tuple[MachineFile, ...] = ()

    @property
    def version(self) -> int:
        """
        The lowest version of the format that can express the manifest.

        An older program would report a file that is being replaced, or a digest file with a number, as damaged.  It
        would not copy the machine's files, would leave them behind, and would drop the field when it pins the point.
        """
        if self.machine_files:
            return 3
        plain = all(disk.replaces is None and generation(disk.data.digests) == 0 for disk in self.disks)
        return 1 if plain else 2

    def with_disk(self, entry: DiskEntry) -> Manifest:
        """Return the same point with another entry for one of its disks."""
        return replace(self, disks=tuple(entry if disk.name == entry.name else disk for disk in self.disks))

    def disk(self, name: str) -> DiskEntry | None:
        """Return the entry of a disk, or None if the point does not hold the disk."""
        return self._by_name.get(name)

    def machine_file(self, role: str) -> MachineFile | None:
        """Return the machine's file of this role, or None if the point has none."""
        return next((file for file in self.machine_files if file.role == role), None)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files that belong to the point, without its manifest."""
        of_disks = (name for disk in self.disks for name in (disk.data.file, disk.data.digests))
        return (*of_disks, *(file.file for file in self.machine_files))

    @cached_property
    def _by_name(self) -> Mapping[str, DiskEntry]:
        """The entries by disk name: a search of the list for each of thousands of disks would take too long."""
        return {disk.name: disk for disk in self.disks}


def max_disk_size(cluster_size: int) -> int:
    """Return the size (bytes) of the largest disk that a data file with clusters of this size can hold."""
    return _MAX_TABLE * (cluster_size // 8) * cluster_size


def new_point_id(now: datetime, random_hex: str) -> str:
    """Return a new point id: UTC for people, eight random hex digits to be unique.  Points are never ordered by id."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{random_hex}"


def timestamp(moment: datetime) -> str:
    """Return a time as manifests write it: UTC, to the second."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def is_point_id(text: str) -> bool:
    """Tell whether a text has the form of a point's id."""
    return _POINT.fullmatch(text) is not None


def is_data_name(text: str) -> bool:
    """Tell whether a name is that of a data file (also with UNFINISHED or NEW behind it) or of a digest file."""
    return (
        _DATA.fullmatch(text.removesuffix(UNFINISHED).removesuffix(NEW)) is not None
        or _DIGESTS.fullmatch(text) is not None
    )


def is_machine_file_name(text: str) -> bool:
    """Tell whether a name is that of a machine's file."""
    match = _MACHINE_FILE.fullmatch(text)
    return match is not None and match["suffix"] in SUFFIXES.values()


def machine_file_name(role: str, point: str) -> str:
    """Return the name of the machine's file of this role."""
    return f"{point}.{SUFFIXES[role]}"


def point_of(file: str) -> str | None:
    """Return the point that a data file or digest file of this name belongs to, or None for other names."""
    match = _DATA.fullmatch(file) or _DIGESTS.fullmatch(file)
    return match["point"] if match else None


def data_name(disk: str, point: str) -> str:
    """Return the name of a disk's data file."""
    return f"{disk}.{point}.qcow2"


def digest_name(disk: str, point: str, rewritten: int) -> str:
    """Return the name of the digest file of a data file that prune has rewritten `rewritten` times."""
    return f"{disk}.{point}.{rewritten}.b3" if rewritten else f"{disk}.{point}.b3"


def generation(digest_file: str) -> int:
    """Return how often prune has rewritten the data file that a digest file of this name belongs to."""
    match = _DIGESTS.fullmatch(digest_file)
    return int(match["rewritten"] or 0) if match else 0


def encode(manifest: Manifest) -> bytes:
    """
    Return the manifest as JSON text that ends in its own digest.

    Raises
    ------
    Failed
        The manifest is larger than a manifest may be.
    """
    document = {"format": FORMAT, "version": manifest.version, **asdict(manifest), "digest": "0" * 64}
    text = json.dumps(document, indent=2, ensure_ascii=True) + "\n"
    head = text.encode("ascii").removesuffix(_tail("0" * 64))
    if len(text) > documents.MAX_BYTES:
        raise Failed(
            f"the manifest of {len(manifest.disks)} disks of machine {manifest.machine} has {len(text)} bytes, more "
            f"than {documents.MAX_BYTES}",
            hint="divide the disks between several machines: --machine NAME, or `machines:` in the configuration",
        )
    return head + _tail(digest(head).hex())


def decode(content: bytes, name: str) -> Manifest:
    """
    Read a manifest; `name` is for messages.

    The digest is verified before the content is parsed.

    Raises
    ------
    Damaged
        The content is no manifest, or was changed since it was written.
    Failed
        A newer program wrote it.
    """
    try:
        _require_digest(content)
        document = documents.parse(content)
        if document.get("format") != FORMAT:
            raise BadDocument(f'its "format" is not "{FORMAT}"')
        # The digest, which every version has, was verified first: a flipped bit must not pass for a newer version.
        _require_version(document.get("version"), name)
        return _manifest(Fields(document, "manifest"))
    except BadDocument as error:
        raise Damaged(
            f"manifest {name} is damaged: {error}",
            hint="bring the file back from a copy of the repository; points that do not build on it are unharmed",
        ) from None


def _tail(digest: str) -> bytes:
    return f',\n  "digest": "{digest}"\n}}\n'.encode("ascii")


def _require_digest(content: bytes) -> None:
    """Make sure that the content ends in the digest of all bytes before that end."""
    if len(content) > documents.MAX_BYTES:
        raise BadDocument(f"it has {len(content)} bytes, more than {documents.MAX_BYTES}")
    length = len(content) - len(_tail("0" * 64))
    if length < 0 or content[length:] != _tail(digest(memoryview(content)[:length]).hex()):
        raise BadDocument("its bytes do not match its digest")


def _require_version(version: object, name: str) -> None:
    if type(version) is int and version > VERSION:
        raise Failed(
            f"{name} has format version {shown(version)}; this program reads versions up to {VERSION}",
            hint="upgrade pybackup; nothing was changed",
        )
    if type(version) is not int or version < 1:
        raise BadDocument(f"its version is {shown(version)}")


def _manifest(fields: Fields) -> Manifest:
    point = fields.matching("point", _POINT)
    disks = tuple(_disk(item, point) for item in fields.items("disks"))
    if len({disk.name for disk in disks}) != len(disks) or not disks:
        raise BadDocument("manifest.disks is empty or names a disk twice")
    files = (
        tuple(_machine_file(item, point) for item in fields.items("machine_files"))
        if fields.has("machine_files")
        else ()
    )
    if len({file.role for file in files}) != len(files):
        raise BadDocument("manifest.machine_files names a role twice")
    return Manifest(
        point=point,
        sequence=fields.number("sequence", low=1),
        machine=fields.matching("machine", _NAME),
        repository=fields.matching("repository", RANDOM),
        started=fields.time("started"),
        finished=fields.time("finished"),
        program=fields.matching("program", WORD),
        disks=disks,
        pinned=fields.has("pinned") and fields.take("pinned", bool),
        machine_files=files,
    )


def _machine_file(fields: Fields, point: str) -> MachineFile:
    role, name = fields.take("role", str), fields.take("file", str)
    # The file is removed together with the point, so it must belong to the point.
    if role not in SUFFIXES or name != machine_file_name(role, point):
        raise BadDocument(f"{fields.where()} is {shown(name)} of role {shown(role)}, which is no file of the machine")
    return MachineFile(
        role=role,
        file=name,
        size=fields.number("size", low=1, high=MAX_MACHINE_FILE[role]),
        digest=fields.matching("digest", DIGEST),
    )


def _disk(fields: Fields, point: str) -> DiskEntry:
    name = fields.matching("name", _NAME)
    kind, parent = _kind(fields)
    data = _data(fields.inner("data"), name, point)
    return DiskEntry(
        name=name,
        kind=kind,
        reason=fields.text("reason"),
        size=fields.number("size", high=max_disk_size(data.cluster_size)),
        identity=fields.matching("identity", RANDOM),
        parent=parent,
        bitmap=_bitmap(fields.inner("bitmap")),
        data=data,
        bytes=_counts(fields.inner("bytes")),
        source=_source(fields.inner("source")),
        replaces=_former(fields.inner("replaces"), name, point) if fields.has("replaces") else None,
    )


def _kind(fields: Fields) -> tuple[str, Parent | None]:
    kind = fields.take("kind", str)
    parent = fields.inner("parent") if fields.has("parent") else None
    if kind not in KINDS or (kind == "incremental") != (parent is not None):
        raise BadDocument(f"a disk's kind is {shown(kind)} and its parent {'missing' if parent is None else 'given'}")
    if parent is None:
        return kind, None
    return kind, Parent(parent.matching("point", _POINT), parent.matching("identity", RANDOM))


def _former(fields: Fields, disk: str, point: str) -> Former:
    kind, parent = _kind(fields)
    return Former(kind, fields.text("reason"), parent, _data(fields.inner("data"), disk, point))


def _bitmap(fields: Fields) -> BitmapRecord:
    return BitmapRecord(
        read=fields.optional_text("read"),
        started=fields.optional_text("started"),
        granularity=fields.number("granularity", 1, _MAX_GRANULARITY) if fields.has("granularity") else None,
        claimed=fields.take("claimed", bool),
        why_none=fields.optional_text("why_none"),
    )


def _data(fields: Fields, disk: str, point: str) -> DataFile:
    cluster_size = fields.number("cluster_size", 4096, 2 << 20)
    if cluster_size & (cluster_size - 1):
        raise BadDocument(f"the cluster size {cluster_size} is not a power of two")
    file, listed = fields.matching("file", _DATA), fields.matching("digests", _DIGESTS)
    # These files are removed together with the point, so they must belong to the point.
    if file != data_name(disk, point) or listed != digest_name(disk, point, generation(listed)):
        raise BadDocument(
            f"{fields.where()} names {file} and {listed}, which are not the files of disk {disk} in point {point}"
        )
    return DataFile(
        file=file,
        size=fields.number("size", low=1, high=_MAX_FILE),
        digests=listed,
        digest=fields.matching("digest", DIGEST),
        cluster_size=cluster_size,
        compression=fields.matching("compression", _COMPRESSION),
    )


def _counts(fields: Fields) -> ByteCounts:
    return ByteCounts(
        dirty=fields.number("dirty"),
        data=fields.number("data"),
        zero=fields.number("zero"),
        found_zero=fields.number("found_zero"),
        stored=fields.number("stored"),
    )


def _source(fields: Fields) -> SourceRecord:
    return SourceRecord(
        kind=fields.matching("kind", WORD),
        path=fields.text("path"),
        format=fields.matching("format", WORD),
        consistency=fields.matching("consistency", WORD),
        qemu=fields.optional_text("qemu"),
        lower=tuple(_lower(item) for item in fields.items("lower")),
        plaintext=fields.has("plaintext") and fields.take("plaintext", bool),
        trusted_data_file=_claim(fields.inner("trusted_data_file")) if fields.has("trusted_data_file") else None,
    )


def _claim(fields: Fields) -> DataFileClaim:
    return DataFileClaim(path=fields.text("path"), file_id=fields.text("file_id"))


def _lower(fields: Fields) -> LowerFile:
    return LowerFile(
        path=fields.text("path"),
        size=fields.number("size"),
        mtime_ns=fields.number("mtime_ns", -_MAX_NANOSECONDS, _MAX_NANOSECONDS),
        inode=fields.number("inode", 0, (1 << 64) - 1),
    )
