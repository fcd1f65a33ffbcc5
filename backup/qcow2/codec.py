"""
One cluster as one zstd frame, and back.

The only module that imports zstandard.  A frame carries its content's size and checksum: QEMU refuses a cluster whose
checksum fails, and without one hands out wrong bytes (design.md, "The data file").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import zstandard

from backup.errors import Damaged
from backup.qcow2.layout import DAMAGED_HINT, U8, U64

Buffer = bytes | bytearray | memoryview

_MAGIC = 0xFD2FB528
_RESERVED_BITS = 0x18  # bit 3 is reserved, bit 4 unused: no encoder sets them
_SINGLE_SEGMENT, _HAS_CHECKSUM = 0x20, 0x04
_DICTIONARY_BYTES = (0, 1, 2, 4)
_CONTENT_SIZE_BYTES = (0, 2, 4, 8)
_BLOCK_RLE, _BLOCK_RESERVED = 1, 3
_CHECKSUM_BYTES = 4


@dataclass(frozen=True, slots=True)
class Frame:
    """What a frame's headers tell.  Bytes; `content` is None where the header doesn't say it."""

    length: int
    content: int | None
    checksum: bool


class Codec:
    """
    Compresses and decompresses clusters.  One per thread: zstandard's contexts must not be shared.

    Parameters
    ----------
    cluster_size : int
        Bytes of every cluster.
    level : int or None
        zstd's level; None never compresses (but still decompresses).
    """

    def __init__(self, cluster_size: int, level: int | None) -> None:
        self._cluster_size = cluster_size
        self._compressor = None
        if level is not None:
            self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
        self._decompressor = zstandard.ZstdDecompressor()
        self._usual_head = _usual_head(cluster_size)

    def encode(self, cluster: memoryview) -> bytes | None:
        """Return the cluster's frame, or None where that is not smaller than the cluster, which is then stored raw."""
        if self._compressor is None:
            return None
        frame = self._compressor.compress(cluster)
        return frame if len(frame) < self._cluster_size else None

    def decode_into(self, frame: memoryview, cluster: memoryview) -> None:
        """
        Fill `cluster` from the frame at the start of `frame`; what follows that is not looked at.

        Raises
        ------
        Damaged
            No frame of ours (with checksum, of as many bytes as `cluster` has), cut, or its content fails the checksum.
            `cluster` holds anything then.
        """
        end = self._end(frame, len(cluster))
        try:
            # As the frame is whole and there is room for its content, zstd decodes right into `cluster` and ends with
            # the checksum.  Of a cut frame it would hand out the bytes before it has seen a checksum.
            count = self._decompressor.stream_reader(frame[:end]).readinto(cluster)
        except zstandard.ZstdError as error:
            raise _damaged(str(error)) from error
        if count != len(cluster):
            raise _damaged(f"gave {count} of {len(cluster)} bytes")

    def _end(self, frame: memoryview, content: int) -> int:
        """Where a frame ends that holds `content` bytes with a checksum; any other is refused."""
        head = self._usual_head
        if content == self._cluster_size and frame[: len(head)] == head:
            end = _end_of_blocks(frame, len(head)) + _CHECKSUM_BYTES
            if end > len(frame):
                raise _cut(frame)
            return end
        found = parse_frame(frame)
        # Checked before zstandard sees it: it allocates as much as the frame claims.
        if found.content != content or not found.checksum:
            raise _damaged(
                f"holds {found.content} bytes, checksum {'yes' if found.checksum else 'no'}; "
                f"a cluster is {content} bytes with checksum"
            )
        return found.length


def _usual_head(cluster_size: int) -> bytes:
    """The header of nearly all our frames (a single segment, its size, a checksum), known without being parsed."""
    code = 1 if cluster_size < 65536 + 256 else 2  # two bytes hold 256 to 65,791, four the rest
    descriptor = code << 6 | _SINGLE_SEGMENT | _HAS_CHECKSUM
    content = cluster_size - 256 if code == 1 else cluster_size
    return _MAGIC.to_bytes(4, "little") + bytes([descriptor]) + content.to_bytes(_CONTENT_SIZE_BYTES[code], "little")


def frame_length(data: Buffer) -> int:
    """
    Length in bytes of the zstd frame at the start of `data`, from its headers alone: a descriptor in an L2 table only
    says in which sector the frame ends.

    Raises
    ------
    Damaged
        Not a frame, or one that does not end inside `data`.
    """
    return parse_frame(data).length


def frame_lengths(data: U8, offsets: U64, cluster_size: int) -> U64:
    """
    Lengths in bytes of the zstd frames at these offsets in `data`, each wholly inside it, from their headers alone.

    Nearly all are of the kind that `_usual_head` knows, with a single block, and are measured together.

    Raises
    ------
    Damaged
        One of them is no frame, or does not end inside `data`.
    """
    head = np.frombuffer(_usual_head(cluster_size), np.uint8)
    room = len(head) + 3
    if len(data) < room:
        return _parsed_lengths(data, offsets)
    at = np.minimum(offsets, np.uint64(len(data) - room)).astype(np.intp)
    starts = data[at[:, np.newaxis] + np.arange(room)]
    blocks = starts[:, len(head) :].astype(np.uint64) @ np.array([1, 1 << 8, 1 << 16], np.uint64)
    last, kind, size = blocks & np.uint64(1), blocks >> np.uint64(1) & np.uint64(3), blocks >> np.uint64(3)
    size = np.where(kind == _BLOCK_RLE, np.uint64(1), size)
    lengths: U64 = np.uint64(room + _CHECKSUM_BYTES) + size
    usual = (starts[:, : len(head)] == head).all(axis=1) & (last == 1) & (kind != _BLOCK_RESERVED) & (at == offsets)
    others = np.flatnonzero(~usual | (offsets + lengths > len(data)))
    lengths[others] = _parsed_lengths(data, offsets[others])
    return lengths


def _parsed_lengths(data: U8, offsets: U64) -> U64:
    view = data.data
    return np.array([frame_length(view[offset:]) for offset in offsets.tolist()], np.uint64)


def parse_frame(data: Buffer) -> Frame:
    """
    Read the headers of the frame at the start of `data` (RFC 8878, section 3.1.1).

        magic 4 | descriptor 1 | window 0-1 | dictionary 0-4 | content size 0-8 | blocks ... | checksum 0-4

    Raises
    ------
    Damaged
        Not a frame, or one that does not end inside `data`.
    """
    if len(data) < 5 or int.from_bytes(data[:4], "little") != _MAGIC:
        raise _damaged(f"starts with {bytes(data[:5]).hex()}, not with a frame header")
    descriptor = data[4]
    if descriptor & _RESERVED_BITS:
        raise _damaged(f"descriptor {descriptor:#04x} has reserved bits")
    single = bool(descriptor & _SINGLE_SEGMENT)
    checksum = bool(descriptor & _HAS_CHECKSUM)
    at = 5 + (not single) + _DICTIONARY_BYTES[descriptor & 3]
    # A single segment always tells its size, in one byte where the field's code is 0.
    width = _CONTENT_SIZE_BYTES[descriptor >> 6] or int(single)
    content = int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)
    end = _end_of_blocks(data, at + width) + (_CHECKSUM_BYTES if checksum else 0)
    if end > len(data):
        raise _cut(data)
    return Frame(end, content if width else None, checksum)


def _end_of_blocks(data: Buffer, at: int) -> int:
    """Offset behind the last of the blocks that start at `at`; each is 3 bytes of header and its content."""
    last = False
    while not last:
        if at + 3 > len(data):
            raise _cut(data)
        head = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = bool(head & 1), head >> 1 & 3, head >> 3
        if kind == _BLOCK_RESERVED:
            raise _damaged(f"block of a reserved type at byte {at}")
        at += 3 + (1 if kind == _BLOCK_RLE else size)
    return at


def _damaged(what: str) -> Damaged:
    return Damaged(f"zstd frame: {what}", hint=DAMAGED_HINT)


def _cut(data: Buffer) -> Damaged:
    return _damaged(f"ends beyond the {len(data)} bytes at hand")
