"""
A quick test for truncated qcow2 files.  QEMU reads clusters beyond the end of the file as zeroes, without an error.

The test needs only a few small reads: a file is suspicious if the highest host cluster with a refcount begins at or
beyond the end of the file.  A machine that was killed can leave such a file as well (with clusters that are counted,
but not written and not referred to), so `qemu-img check` makes the decision.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

_HEADER = struct.Struct(">4sI12xI24xQI36xI")  # qcow2.txt, "Header": version, cluster_bits, refcount table, order
_VERSION_2_ORDER = 4
_MAX_TABLE = 8 << 20
"""Bytes; QEMU refuses a larger refcount table (QCOW_MAX_REFTABLE_SIZE)."""


def may_be_truncated(file: BinaryIO, size: int) -> bool:
    """
    Tell whether clusters are counted beyond the `size` bytes of an image's file.

    Returns False for an invalid header, which QEMU itself refuses.
    """
    header = _read(file, 0, _HEADER.size)
    if len(header) < _HEADER.size:
        return False
    magic, version, cluster_bits, table_offset, table_clusters, order = _HEADER.unpack(header)
    order = order if version > 2 else _VERSION_2_ORDER
    if magic != b"QFI\xfb" or not 9 <= cluster_bits <= 21 or order > 6:
        return False
    table = _read(file, table_offset, min(table_clusters << cluster_bits, _MAX_TABLE))
    if len(table) < 8:
        return True
    entries = struct.unpack(f">{len(table) // 8}Q", table[: len(table) // 8 * 8])
    last = max((index for index, entry in enumerate(entries) if entry), default=None)
    if last is None:
        return False
    block = _read(file, entries[last] & ~0x1FF, 1 << cluster_bits)
    if len(block) < 1 << cluster_bits and entries[last] + (1 << cluster_bits) > size:
        return True
    counted = len(block.rstrip(b"\0"))
    if not counted:
        return False
    bits = 1 << order
    within = (block[counted - 1].bit_length() - 1) // bits  # the low bits of a byte belong to lower entries
    highest = last * ((8 << cluster_bits) // bits) + (counted - 1) * 8 // bits + (within if bits < 8 else 0)
    return bool(highest << cluster_bits >= size)


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    try:
        file.seek(offset)
        return file.read(length)
    except (OSError, ValueError, OverflowError):
        return b""
