"""
The bytes of a data file: a qcow2 version 3 file of the one kind that pybackup writes.

Source of every rule: QEMU's docs/interop/qcow2.txt, and QEMU's limits as named at each constant.  All numbers on disk
are big endian.  Pure: nothing here reads or writes a file.

    cluster 0          header (112 bytes), extensions, backing name; zeroes to its end
    then, in any order data (raw clusters; runs of packed zstd frames), L2 tables, refcount blocks
    at the end         L1 table, refcount blocks that were still open, refcount table

Everything a header points at lies behind the data, so that the file can be sent off front to back except for its first
part, which comes last and makes it a file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backup.errors import Damaged, UsageError

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]

PART = 4 << 20
"""Bytes of a part, the unit in which a file goes to its sink.  A multiple of every cluster size."""

UNALLOCATED, ZERO, RAW, COMPRESSED = 0, 1, 2, 3
"""What an L2 entry says of a guest cluster: ask the backing file, zeroes, stored as it is, stored as a zstd frame."""

MIN_CLUSTER = 4 << 10
MAX_CLUSTER = 2 << 20  # QEMU: MAX_CLUSTER_BITS
SECTOR = 512
MAX_L1_BYTES = 32 << 20  # QEMU: QCOW_MAX_L1_SIZE
MAX_REFCOUNT_TABLE_BYTES = 8 << 20  # QEMU: QCOW_MAX_REFTABLE_SIZE
MAX_BACKING_NAME = 1023  # bytes
REFCOUNT_ORDER = 4  # 16-bit refcounts

COPIED = 1 << 63  # QCOW_OFLAG_COPIED: the one reference to this cluster
PACKED = 1 << 62  # QCOW_OFLAG_COMPRESSED
READS_AS_ZERO = 1  # QCOW_OFLAG_ZERO
OFFSET_BITS = 56  # an offset has bits 9-55
_OFFSET_MASK = (1 << OFFSET_BITS) - SECTOR

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIB7s")  # qcow2.txt, "Header" and "Additional fields"; 112 bytes
_EXTENSION = struct.Struct(">II")
_MAGIC = b"QFI\xfb"
_FEATURE_COMPRESSION_TYPE = 1 << 3
_COMPRESSION_ZSTD = 1
_EXTENSION_END = 0
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_BACKING_FORMAT = b"qcow2"

HEADER_BYTES = MIN_CLUSTER
"""Header, extensions and the longest backing name end well inside the smallest cluster: no reader needs more bytes."""

DAMAGED_HINT = "keep the file as it is; bring it back from another copy of the repository, or take a full"


@dataclass(frozen=True, slots=True)
class Image:
    """
    What a data file is of.

    Attributes
    ----------
    size : int
        Bytes of the disk, exact.  The header holds it rounded up to 512, so a reader finds the rounded size.
    cluster_size : int
        Bytes; a power of two from 4 KiB to 2 MiB.
    backing : str or None
        Flat name of the parent's data file, which is a qcow2.
    zstd : bool
        Compressed clusters are allowed.
    """

    size: int
    cluster_size: int
    backing: str | None
    zstd: bool

    @property
    def clusters(self) -> int:
        """Guest clusters, the last one perhaps cut by the disk's end."""
        return -(-self.size // self.cluster_size)

    @property
    def table_entries(self) -> int:
        """Guest clusters that one L2 table maps."""
        return self.cluster_size // 8

    @property
    def tables(self) -> int:
        """Entries of the L1 table.  At least one: an empty table would have no place of its own in the file."""
        return max(1, -(-self.clusters // self.table_entries))

    @property
    def block_entries(self) -> int:
        """Host clusters that one refcount block counts."""
        return self.cluster_size // 2

    @property
    def max_host_clusters(self) -> int:
        """
        Host clusters that can be addressed and counted.

        The tightest of: an offset's 56 bits, a compressed descriptor's 62 - (cluster_bits - 8) bits, and what a
        refcount table of 8 MiB counts.
        """
        offset = 1 << min(OFFSET_BITS, offset_bits(self.cluster_size))
        return min(offset // self.cluster_size, MAX_REFCOUNT_TABLE_BYTES // 8 * self.block_entries)


@dataclass(frozen=True, slots=True)
class Header:
    """A header's content.  Offsets in bytes; both tables are contiguous."""

    image: Image
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int


def offset_bits(cluster_size: int) -> int:
    """Width of the offset in a compressed cluster's descriptor: qcow2.txt's x."""
    return 62 - (cluster_size.bit_length() - 1 - 8)


def require_writable(image: Image) -> None:
    """
    Refuse an image that no data file can hold.

    Raises
    ------
    UsageError
        Wrong cluster size, a disk too large for it, or a backing name that QEMU would not read as a flat file name.
    """
    size = image.cluster_size
    if not MIN_CLUSTER <= size <= MAX_CLUSTER or size & (size - 1):
        raise UsageError(
            f"cluster size {size} is not a power of two from {MIN_CLUSTER} to {MAX_CLUSTER} bytes",
            hint="use 64 KiB, which is QEMU's default",
        )
    if image.size < 0 or image.tables * 8 > MAX_L1_BYTES:
        limit = MAX_L1_BYTES // 8 * image.table_entries * size
        raise UsageError(
            f"a disk of {image.size} bytes is too large for clusters of {size} bytes, which end at {limit}",
            hint="set a larger cluster_size and take a full",
        )
    if image.backing is not None and (fault := _fault_of_name(image.backing)):
        raise UsageError(f"backing name {image.backing!r} {fault}", hint="use the file name of the parent's data file")


def _fault_of_name(name: str) -> str | None:
    """Say why QEMU would not take the name as a file in the same folder; None when it would."""
    if not 0 < len(name.encode("utf-8", "surrogatepass")) <= MAX_BACKING_NAME:
        return f"is not of 1 to {MAX_BACKING_NAME} bytes"
    # QEMU reads "json:..." and "protocol:..." as something else than a file's name.
    if name in {".", ".."} or any(c in "/:" or not c.isprintable() for c in name):
        return "is not a flat file name"
    return None


def pack_header(header: Header) -> bytes:
    """Lay out cluster 0 of the file, cluster_size bytes."""
    image = header.image
    extensions = b""
    name = b""
    if image.backing is not None:
        name = image.backing.encode()
        extensions += _EXTENSION.pack(_EXTENSION_BACKING_FORMAT, len(_BACKING_FORMAT)) + _BACKING_FORMAT.ljust(8, b"\0")
    extensions += _EXTENSION.pack(_EXTENSION_END, 0)
    fixed = _HEADER.pack(
        _MAGIC,
        3,
        _HEADER.size + len(extensions) if name else 0,
        len(name),
        image.cluster_size.bit_length() - 1,
        -(-image.size // SECTOR) * SECTOR,
        0,  # no encryption
        image.tables,
        header.l1_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        0,  # no snapshots
        0,
        _FEATURE_COMPRESSION_TYPE if image.zstd else 0,
        0,
        0,
        REFCOUNT_ORDER,
        _HEADER.size,
        _COMPRESSION_ZSTD if image.zstd else 0,
        bytes(7),
    )
    return (fixed + extensions + name).ljust(image.cluster_size, b"\0")


def parse_header(data: bytes, file_size: int, name: str) -> Header:
    """
    Read a header and refuse everything that pybackup does not write.

    Parameters
    ----------
    data : bytes
        The file's first bytes, `HEADER_BYTES` of them or the whole of a smaller file.
    file_size : int
        Bytes of the file; every table must lie inside it.
    name : str
        What messages call the file.

    Raises
    ------
    Damaged
        Names the field and its value.
    """

    def refuse(what: str) -> Damaged:
        return Damaged(f"data file {name}: {what}", hint=DAMAGED_HINT)

    if len(data) < _HEADER.size:
        raise refuse(f"{len(data)} bytes are too few for a qcow2 header")
    (
        magic,
        version,
        backing_offset,
        backing_length,
        cluster_bits,
        size,
        crypt,
        l1_size,
        l1_offset,
        table_offset,
        table_clusters,
        snapshots,
        _snapshots_offset,
        incompatible,
        _compatible,
        autoclear,
        refcount_order,
        header_length,
        compression,
        padding,
    ) = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise refuse(f"not a qcow2 file (magic {magic.hex()})")
    zstd = bool(incompatible & _FEATURE_COMPRESSION_TYPE)
    for what, value, ours in (
        ("version", version, 3),
        ("header length", header_length, _HEADER.size),
        ("encryption method", crypt, 0),
        ("number of snapshots", snapshots, 0),
        ("incompatible features", incompatible & ~_FEATURE_COMPRESSION_TYPE, 0),
        ("autoclear features", autoclear, 0),
        ("refcount order", refcount_order, REFCOUNT_ORDER),
        ("compression type", compression, _COMPRESSION_ZSTD if zstd else 0),
        ("header padding", int.from_bytes(padding, "big"), 0),
    ):
        if value != ours:
            raise refuse(f"{what} is {value}, pybackup writes {ours}")
    if not MIN_CLUSTER <= 1 << min(cluster_bits, 63) <= MAX_CLUSTER:
        raise refuse(f"cluster bits {cluster_bits} out of range")
    backing = _parse_backing(data, backing_offset, backing_length, refuse)
    image = Image(size, 1 << cluster_bits, backing, zstd)
    header = Header(image, l1_offset, table_offset, table_clusters)
    _require_inside(header, l1_size, file_size, refuse)
    return header


def _require_inside(header: Header, l1_size: int, file_size: int, refuse: Callable[[str], Damaged]) -> None:
    """Refuse sizes that pybackup does not write and tables that are not inside the file."""
    size, cluster_size = header.image.size, header.image.cluster_size
    if size % SECTOR or header.image.tables * 8 > MAX_L1_BYTES:
        raise refuse(f"disk size {size} is no multiple of {SECTOR} or too large for clusters of {cluster_size} bytes")
    if l1_size != header.image.tables:
        raise refuse(f"L1 table has {l1_size} entries, a disk of {size} bytes needs {header.image.tables}")
    if file_size % cluster_size:
        raise refuse(f"file size {file_size} is no multiple of the cluster size {cluster_size}: truncated?")
    table_bytes = header.refcount_table_clusters * cluster_size
    if not 0 < table_bytes <= MAX_REFCOUNT_TABLE_BYTES:
        raise refuse(f"refcount table of {header.refcount_table_clusters} clusters")
    for what, offset, length in (
        ("L1 table", header.l1_offset, l1_size * 8),
        ("refcount table", header.refcount_table_offset, table_bytes),
    ):
        if offset % cluster_size or offset < cluster_size or offset + length > file_size:
            raise refuse(f"{what} at {offset}, {length} bytes, is not inside the file of {file_size} bytes")


def _parse_backing(data: bytes, offset: int, length: int, refuse: Callable[[str], Damaged]) -> str | None:
    """Read the backing name and hold its format extension against it; `refuse` makes the error."""
    backing_format = _find_extension(data, offset or len(data), refuse)
    if offset == 0:
        if backing_format is not None:
            raise refuse("a backing format but no backing name")
        return None
    if not 0 < length <= MAX_BACKING_NAME or offset < _HEADER.size or offset + length > len(data):
        raise refuse(f"backing name at {offset}, {length} bytes, is not inside the header")
    try:
        backing = data[offset : offset + length].decode()
    except UnicodeDecodeError:
        raise refuse(f"backing name {data[offset : offset + length]!r} is not UTF-8") from None
    if fault := _fault_of_name(backing):
        raise refuse(f"backing name {backing!r} {fault}")
    if backing_format != _BACKING_FORMAT:
        raise refuse(f"backing format is {backing_format!r}, pybackup writes {_BACKING_FORMAT!r}")
    return backing


def _find_extension(data: bytes, end: int, refuse: Callable[[str], Damaged]) -> bytes | None:
    """Walk the header extensions in data[112:end] and return the backing format; unknown extensions are passed over."""
    found: bytes | None = None
    at = _HEADER.size
    while at + _EXTENSION.size <= min(end, len(data)):
        kind, length = _EXTENSION.unpack_from(data, at)
        at += _EXTENSION.size
        # Of the last one too, whose length means nothing: QEMU opens no file in which it is too large.
        if at + length > min(end, len(data)):
            raise refuse("a header extension is too large")
        if kind == _EXTENSION_END:
            return found
        if kind == _EXTENSION_BACKING_FORMAT:
            found = data[at : at + length]
        at += -(-length // 8) * 8
    raise refuse("header extensions have no end")


def raw_entries(offsets: U64) -> U64:
    """L2 entries of clusters stored as they are, or L1 entries of L2 tables, at these host offsets in bytes."""
    return offsets | np.uint64(COPIED)


def frame_entries(offsets: U64, lengths: U64, cluster_size: int) -> U64:
    """
    L2 entries of zstd frames.

        63 | 62 | 61 ............ x | x-1 ........ 0
         0 |  1 | sectors after the | byte offset in
           |    | first one touched | the file
    """
    sector = np.uint64(9)
    more = (offsets + lengths - np.uint64(1) >> sector) - (offsets >> sector)
    return np.uint64(PACKED) | more << np.uint64(offset_bits(cluster_size)) | offsets


def kinds(entries: U64) -> U8:
    """Codes (UNALLOCATED, ZERO, RAW, COMPRESSED) of well-formed L2 entries, same shape."""
    codes = np.zeros(entries.shape, np.uint8)
    some = np.flatnonzero(entries != 0)  # few in most tables
    found = entries.reshape(-1)[some]
    # By the upper two bits; with neither of them, only 1 is well-formed, and 0 is not among these.
    named = np.array([ZERO, COMPRESSED, RAW, RAW], np.uint8)[(found >> np.uint64(62)).astype(np.intp)]
    named[(named == ZERO) & (found != READS_AS_ZERO)] = UNALLOCATED
    codes.reshape(-1)[some] = named
    return codes


def spans(entries: U64, cluster_size: int) -> tuple[U64, U64]:
    """
    Host bytes to read for each of well-formed L2 entries, same shape.

    Returns
    -------
    offsets, lengths
        Bytes.  A raw cluster whole; a frame from its first byte to the end of its last sector, which may hold the
        start of the next frame; (0, 0) for clusters that store nothing.
    """
    codes = kinds(entries)
    raw, packed = codes == RAW, codes == COMPRESSED
    bits = offset_bits(cluster_size)
    offsets = np.where(raw, entries & np.uint64(_OFFSET_MASK), np.uint64(0))
    offsets = np.where(packed, entries & np.uint64((1 << bits) - 1), offsets)
    more = entries >> np.uint64(bits) & np.uint64((1 << 62 - bits) - 1)
    ends = ((offsets >> np.uint64(9)) + more + np.uint64(1)) << np.uint64(9)
    lengths = np.where(raw, np.uint64(cluster_size), np.uint64(0))
    return offsets, np.where(packed, ends - offsets, lengths)


def find_malformed(entries: U64, image: Image, file_size: int) -> int | None:
    """
    Index of the first L2 entry that pybackup would not have written; None when all are well-formed.

    Well-formed: 0; 1; bit 63 and an aligned offset inside the file; in a zstd file, bit 62 and a frame inside the
    file whose sectors are those of less than a cluster; never inside cluster 0.
    """
    # Most entries of most tables are 0 or 1, and a chain on a large disk has thousands of tables.
    suspects = np.flatnonzero(entries > np.uint64(READS_AS_ZERO))
    bad = _malformed(entries[suspects], image, file_size)
    return int(suspects[np.argmax(bad)]) if bad.any() else None


def _malformed(entries: U64, image: Image, file_size: int) -> npt.NDArray[np.bool_]:
    """Which of L2 entries other than 0 and 1 are not well-formed."""
    codes = kinds(entries)
    offsets, lengths = spans(entries, image.cluster_size)
    stored = codes >= RAW
    size = np.uint64(image.cluster_size)
    bad = stored & ((offsets < size) | (offsets + lengths > np.uint64(file_size)))
    bad |= lengths >= size + np.uint64(SECTOR)
    raw = codes == RAW
    bad |= raw & ((entries != (offsets | np.uint64(COPIED))) | (offsets % size != 0))
    if image.zstd:
        bad |= (codes == COMPRESSED) & (offsets >> np.uint64(OFFSET_BITS) != 0)
    else:
        bad |= codes == COMPRESSED
    bad |= codes == UNALLOCATED
    return bad
