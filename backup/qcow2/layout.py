"""
The bytes of a data file: the one kind of qcow2 version 3 file that pybackup writes.

The source of every rule is QEMU's docs/interop/qcow2.txt; QEMU's own limits are named at each constant.  All numbers on
disk are big endian.  This module only computes values: it reads and writes no file.

    cluster 0          header (112 bytes), extensions, backing name; zeroes to the end of the cluster
    then, in any order data (raw clusters; runs of packed zstd frames), L2 tables, refcount blocks
    at the end         L1 table, the last refcount blocks, refcount table

Every table that the header refers to lies behind the data.  So a file can be sent from front to back, except for its
first part: that part is sent last, and only then is the file a qcow2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from backup.errors import Damaged, UsageError

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]

PART = 4 << 20
"""Bytes of a part: files are passed to their sink in parts.  PART is a multiple of every cluster size."""

UNALLOCATED, ZERO, RAW, COMPRESSED = 0, 1, 2, 3
"""Kinds of guest clusters: read the backing file; zeroes; stored unchanged; stored as a zstd frame."""

MIN_CLUSTER = 4 << 10
MAX_CLUSTER = 2 << 20  # QEMU: MAX_CLUSTER_BITS
SECTOR = 512
MAX_L1_BYTES = 32 << 20  # QEMU: QCOW_MAX_L1_SIZE
MAX_REFCOUNT_TABLE_BYTES = 8 << 20  # QEMU: QCOW_MAX_REFTABLE_SIZE
MAX_BACKING_NAME = 1023  # bytes
REFCOUNT_ORDER = 4  # 16-bit refcounts

COPIED = 1 << 63  # QCOW_OFLAG_COPIED: the cluster has exactly one reference
PACKED = 1 << 62  # QCOW_OFLAG_COMPRESSED
READS_AS_ZERO = 1  # QCOW_OFLAG_ZERO
OFFSET_BITS = 56  # an offset is stored in bits 9 to 55
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
"""Bytes that a reader of a header needs: header, extensions and backing name always fit into the smallest cluster."""

DAMAGED_HINT = (
    "keep the file; bring it back from another copy of the repository, or make a full backup: `pybackup full`"
)


@dataclass(frozen=True, slots=True)
class Image:
    """
    The properties of a data file's disk.

    Attributes
    ----------
    size : int
        Exact size of the disk in bytes.  The header stores the size rounded up to 512, so a reader gets that value.
    cluster_size : int
        Bytes; a power of two from 4 KiB to 2 MiB.
    backing : str or None
        File name, without a folder, of the parent's data file, which is a qcow2.
    zstd : bool
        Whether clusters may be compressed.
    """

    size: int
    cluster_size: int
    backing: str | None
    zstd: bool

    @property
    def clusters(self) -> int:
        """Number of guest clusters; the disk may end inside the last one."""
        return -(-self.size // self.cluster_size)

    @property
    def table_entries(self) -> int:
        """Number of guest clusters that one L2 table maps."""
        return self.cluster_size // 8

    @property
    def tables(self) -> int:
        """Number of entries of the L1 table; at least one, since an empty table would have no place in the file."""
        return max(1, -(-self.clusters // self.table_entries))

    @property
    def block_entries(self) -> int:
        """Number of host clusters that one refcount block counts."""
        return self.cluster_size // 2

    @property
    def max_host_clusters(self) -> int:
        """
        Number of host clusters that can be addressed and counted.

        The limit is the smallest of three: the 56 bits of an offset, the 62 - (cluster_bits - 8) bits of the offset in
        a compressed descriptor, and the clusters that a refcount table of 8 MiB counts.
        """
        offset = 1 << min(OFFSET_BITS, offset_bits(self.cluster_size))
        return min(offset // self.cluster_size, MAX_REFCOUNT_TABLE_BYTES // 8 * self.block_entries)


@dataclass(frozen=True, slots=True)
class Header:
    """The content of a header.  Offsets in bytes; both tables are contiguous."""

    image: Image
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int


class _Fields(NamedTuple):
    """The fields of a header on disk, in their order (qcow2.txt, "Header" and "Additional fields")."""

    magic: bytes
    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size: int
    encryption: int
    l1_size: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    header_length: int
    compression: int
    padding: bytes


def offset_bits(cluster_size: int) -> int:
    """Return the width in bits of the offset in a compressed descriptor (x in qcow2.txt)."""
    return 62 - (cluster_size.bit_length() - 1 - 8)


def require_writable(image: Image) -> None:
    """
    Refuse an image that cannot be written as a data file.

    Raises
    ------
    UsageError
        The cluster size is invalid, the disk is too large for it, or QEMU would not read the backing name as the name
        of a file in the same folder.
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
            hint="set a larger cluster_size and make a full backup: `pybackup full`",
        )
    if image.backing is not None and (fault := _fault_of_name(image.backing)):
        raise UsageError(f"backing name {image.backing!r} {fault}", hint="use the file name of the parent's data file")


def _fault_of_name(name: str) -> str | None:
    """Return why QEMU would not read a name as a file in the same folder; None if QEMU would."""
    if not 0 < len(name.encode("utf-8", "surrogatepass")) <= MAX_BACKING_NAME:
        return f"is not of 1 to {MAX_BACKING_NAME} bytes"
    # QEMU reads "json:..." and "PROTOCOL:..." as descriptions of nodes, not as file names.
    if name in {".", ".."} or any(c in "/:" or not c.isprintable() for c in name):
        return "is not a flat file name"
    return None


def pack_header(header: Header) -> bytes:
    """Return the content of cluster 0: header, extensions and backing name, padded with zeroes to cluster_size."""
    image = header.image
    extensions = b""
    name = b""
    if image.backing is not None:
        name = image.backing.encode()
        extensions += _EXTENSION.pack(_EXTENSION_BACKING_FORMAT, len(_BACKING_FORMAT)) + _BACKING_FORMAT.ljust(8, b"\0")
    extensions += _EXTENSION.pack(_EXTENSION_END, 0)
    fields = _Fields(
        magic=_MAGIC,
        version=3,
        backing_offset=_HEADER.size + len(extensions) if name else 0,
        backing_length=len(name),
        cluster_bits=image.cluster_size.bit_length() - 1,
        size=-(-image.size // SECTOR) * SECTOR,
        encryption=0,
        l1_size=image.tables,
        l1_offset=header.l1_offset,
        refcount_table_offset=header.refcount_table_offset,
        refcount_table_clusters=header.refcount_table_clusters,
        snapshots=0,
        snapshots_offset=0,
        incompatible=_FEATURE_COMPRESSION_TYPE if image.zstd else 0,
        compatible=0,
        autoclear=0,
        refcount_order=REFCOUNT_ORDER,
        header_length=_HEADER.size,
        compression=_COMPRESSION_ZSTD if image.zstd else 0,
        padding=bytes(7),
    )
    fixed = _HEADER.pack(*fields)
    return (fixed + extensions + name).ljust(image.cluster_size, b"\0")


def parse_header(data: bytes, file_size: int, name: str) -> Header:
    """
    Read a header, and refuse every value that pybackup does not write.

    Parameters
    ----------
    data : bytes
        The first `HEADER_BYTES` of the file, or the whole file if it is smaller.
    file_size : int
        Size of the file in bytes; all tables must lie inside.
    name : str
        The name of the file in messages.

    Raises
    ------
    Damaged
        A field has a wrong value; the message names the field and the value.
    """

    def refuse(what: str) -> Damaged:
        return Damaged(f"data file {name}: {what}", hint=DAMAGED_HINT)

    if len(data) < _HEADER.size:
        raise refuse(f"{len(data)} bytes are too few for a qcow2 header")
    fields = _Fields._make(_HEADER.unpack_from(data))
    _require_our_values(fields, refuse)
    backing = _parse_backing(data, fields.backing_offset, fields.backing_length, refuse)
    image = Image(fields.size, 1 << fields.cluster_bits, backing, _has_zstd(fields))
    header = Header(image, fields.l1_offset, fields.refcount_table_offset, fields.refcount_table_clusters)
    _require_inside(header, fields.l1_size, file_size, refuse)
    return header


def _has_zstd(fields: _Fields) -> bool:
    return bool(fields.incompatible & _FEATURE_COMPRESSION_TYPE)


def _require_our_values(fields: _Fields, refuse: Callable[[str], Damaged]) -> None:
    """Refuse features and field values that pybackup does not write; `refuse` makes the error."""
    if fields.magic != _MAGIC:
        raise refuse(f"not a qcow2 file (magic {fields.magic.hex()})")
    for what, value, ours in (
        ("version", fields.version, 3),
        ("header length", fields.header_length, _HEADER.size),
        ("encryption method", fields.encryption, 0),
        ("number of snapshots", fields.snapshots, 0),
        ("incompatible features", fields.incompatible & ~_FEATURE_COMPRESSION_TYPE, 0),
        ("autoclear features", fields.autoclear, 0),
        ("refcount order", fields.refcount_order, REFCOUNT_ORDER),
        ("compression type", fields.compression, _COMPRESSION_ZSTD if _has_zstd(fields) else 0),
        ("header padding", int.from_bytes(fields.padding, "big"), 0),
    ):
        if value != ours:
            raise refuse(f"{what} is {value}, pybackup writes {ours}")
    if not MIN_CLUSTER <= 1 << min(fields.cluster_bits, 63) <= MAX_CLUSTER:
        raise refuse(f"cluster bits {fields.cluster_bits} out of range")


def _require_inside(header: Header, l1_size: int, file_size: int, refuse: Callable[[str], Damaged]) -> None:
    """Refuse sizes that pybackup does not write, and tables that are not inside the file."""
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
    """Return the backing name, after a check of the name and of its format extension; `refuse` makes the error."""
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
    """Return the backing format in the header extensions, data[112:end]; other extensions are skipped."""
    backing_format: bytes | None = None
    at = _HEADER.size
    while at + _EXTENSION.size <= min(end, len(data)):
        kind, length = _EXTENSION.unpack_from(data, at)
        at += _EXTENSION.size
        # This includes the extension that ends the list: QEMU opens no file in which its length is too large.
        if at + length > min(end, len(data)):
            raise refuse("a header extension is too large")
        if kind == _EXTENSION_END:
            return backing_format
        if kind == _EXTENSION_BACKING_FORMAT:
            backing_format = data[at : at + length]
        at += -(-length // 8) * 8
    raise refuse("header extensions have no end")


def raw_entries(offsets: U64) -> U64:
    """Return the L2 entries of raw clusters, or the L1 entries of L2 tables, at these host offsets (bytes)."""
    return offsets | np.uint64(COPIED)


def frame_entries(offsets: U64, lengths: U64, cluster_size: int) -> U64:
    """
    Return the L2 entries of zstd frames at these host offsets, with these lengths (bytes).

        63 | 62 | 61 .......... x | x-1 ........ 0
         0 |  1 | sectors touched | byte offset in
           |    | minus one       | the file
    """
    sector = np.uint64(9)
    more = (offsets + lengths - np.uint64(1) >> sector) - (offsets >> sector)
    return np.uint64(PACKED) | more << np.uint64(offset_bits(cluster_size)) | offsets


def kinds(entries: U64) -> U8:
    """Return the kinds (UNALLOCATED, ZERO, RAW, COMPRESSED) of well-formed L2 entries; same shape."""
    codes = np.zeros(entries.shape, np.uint8)
    nonzero = np.flatnonzero(entries != 0)  # few in most tables
    used = entries.reshape(-1)[nonzero]
    # The two highest bits decide.  If neither is set, READS_AS_ZERO is the only well-formed entry besides 0.
    used_codes = np.array([ZERO, COMPRESSED, RAW, RAW], np.uint8)[(used >> np.uint64(62)).astype(np.intp)]
    used_codes[(used_codes == ZERO) & (used != READS_AS_ZERO)] = UNALLOCATED
    codes.reshape(-1)[nonzero] = used_codes
    return codes


def spans(entries: U64, cluster_size: int) -> tuple[U64, U64]:
    """
    Return the range of host bytes to read for each of well-formed L2 entries; same shape.

    Returns
    -------
    offsets, lengths
        Bytes.  The whole cluster for a raw one.  For a frame, from its first byte to the end of its last sector, which
        may contain the start of the next frame.  (0, 0) for clusters that store nothing.
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
    Return the index of the first L2 entry that pybackup would not have written; None if all are well-formed.

    Well-formed entries are: 0; 1; bit 63 with an aligned offset inside the file; and, in a file with zstd, bit 62 with
    a frame inside the file that touches fewer sectors than a cluster and one more.  No entry refers to cluster 0.
    """
    # Only the other entries are examined: most are 0 or 1, and a chain on a large disk has thousands of tables.
    suspects = np.flatnonzero(entries > np.uint64(READS_AS_ZERO))
    bad = _malformed(entries[suspects], image, file_size)
    return int(suspects[np.argmax(bad)]) if bad.any() else None


def _malformed(entries: U64, image: Image, file_size: int) -> npt.NDArray[np.bool_]:
    """Tell which L2 entries, none of them 0 or 1, are not well-formed."""
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
