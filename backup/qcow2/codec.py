"""
Compression: one cluster is one zstd frame.

This is the only module that imports zstandard.  Each frame carries the size and the checksum of its content.  With a
checksum QEMU refuses a damaged cluster; without one QEMU would return wrong bytes (docs/design.md, "The data file").
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
    """The content of a frame's headers.  Sizes in bytes; `content` is None if the header lacks the content size."""

    length: int
    content: int | None
    checksum: bool


class Codec:
    """
    Compresses and decompresses clusters.  Each thread needs its own, since zstandard's contexts must not be shared.

    Parameters
    ----------
    cluster_size : int
        Bytes of every cluster.
    level : int or None
        zstd's level.  None: never compress (decompression works).
    """

    def __init__(self, cluster_size: int, level: int | None) -> None:
        self._cluster_size = cluster_size
        self._compressor = None
        if level is not None:
            self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
        self._decompressor = zstandard.ZstdDecompressor()
        self._usual_head = _usual_head(cluster_size)

    def encode(self, cluster: memoryview) -> bytes | None:
        """Return the cluster's frame, or None if the frame would not be smaller: then the cluster is stored raw."""
        if self._compressor is None:
            return None
        frame = self._compressor.compress(cluster)
        return frame if len(frame) < self._cluster_size else None

    def decode_into(self, frame: memoryview, cluster: memoryview) -> None:
        """
        Decompress the frame at the start of `frame` into `cluster`; bytes behind the frame are ignored.

        Raises
        ------
        Damaged
            The frame is incomplete or has another form than pybackup's, its content has another length than `cluster`,
            or the checksum does not match.  The content of `cluster` is undefined then.
        """
        end = self._end(frame, len(cluster))
        try:
            # zstd decompresses straight into `cluster` and verifies the checksum at the end, because the frame is whole
            # and its content fits.  Of an incomplete frame zstd would return bytes without having seen a checksum.
            count = self._decompressor.stream_reader(frame[:end]).readinto(cluster)
        except zstandard.ZstdError as error:
            raise _damaged(str(error)) from error
        if count != len(cluster):
            raise _damaged(f"decompressed to {count} of {len(cluster)} bytes")

    def _end(self, frame: memoryview, content: int) -> int:
        """Return where a frame ends that has `content` bytes and a checksum; refuse any other frame."""
        head = self._usual_head
        if content == self._cluster_size and frame[: len(head)] == head:
            end = _end_of_blocks(frame, len(head)) + _CHECKSUM_BYTES
            if end > len(frame):
                raise _cut(frame)
            return end
        headers = parse_frame(frame)
        # Checked before decompression, because zstandard allocates as much memory as the frame claims to need.
        if headers.content != content or not headers.checksum:
            raise _damaged(
                f"holds {headers.content} bytes, checksum {'yes' if headers.checksum else 'no'}; "
                f"a cluster is {content} bytes with checksum"
            )
        return headers.length


def _usual_head(cluster_size: int) -> bytes:
    """Return the header of nearly all our frames (single segment, with size and checksum), to compare with."""
    code = 1 if cluster_size < 65536 + 256 else 2  # two bytes hold 256 to 65,791, four the rest
    descriptor = code << 6 | _SINGLE_SEGMENT | _HAS_CHECKSUM
    content = cluster_size - 256 if code == 1 else cluster_size
    return _MAGIC.to_bytes(4, "little") + bytes([descriptor]) + content.to_bytes(_CONTENT_SIZE_BYTES[code], "little")


def frame_length(data: Buffer) -> int:
    """
    Return the length in bytes of the zstd frame at the start of `data`, from its headers.

    The L2 entry of a frame does not contain the length: it only tells the sector in which the frame ends.

    Raises
    ------
    Damaged
        `data` does not start with a frame, or the frame does not end inside `data`.
    """
    return parse_frame(data).length


def frame_lengths(data: U8, offsets: U64, cluster_size: int) -> U64:
    """
    Return the lengths in bytes of the zstd frames at these offsets in `data`, from their headers.

    Nearly all frames have the header of `_usual_head` and a single block; numpy measures those together.

    Raises
    ------
    Damaged
        At one of the offsets there is no frame, or the frame does not end inside `data`.
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
        `data` does not start with a frame, or the frame does not end inside `data`.
    """
    if len(data) < 5 or int.from_bytes(data[:4], "little") != _MAGIC:
        raise _damaged(f"starts with {bytes(data[:5]).hex()}, not with a frame header")
    descriptor = data[4]
    if descriptor & _RESERVED_BITS:
        raise _damaged(f"descriptor {descriptor:#04x} has reserved bits")
    single = bool(descriptor & _SINGLE_SEGMENT)
    checksum = bool(descriptor & _HAS_CHECKSUM)
    at = 5 + (not single) + _DICTIONARY_BYTES[descriptor & 3]
    # A single segment always contains its size; if the code of the size field is 0, the size takes one byte.
    width = _CONTENT_SIZE_BYTES[descriptor >> 6] or int(single)
    content = int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)
    end = _end_of_blocks(data, at + width) + (_CHECKSUM_BYTES if checksum else 0)
    if end > len(data):
        raise _cut(data)
    return Frame(end, content if width else None, checksum)


def _end_of_blocks(data: Buffer, at: int) -> int:
    """Return the offset behind the last of the blocks that start at `at`; a block has a header of 3 bytes."""
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
    return _damaged(f"is not complete in the {len(data)} bytes that were read")
