"""
Is a qcow2 image cut off?  QEMU reads what lies beyond the end of its file as zeroes, without an error.

Only a suspicion, from a few small reads: the highest host cluster that has a refcount begins at or beyond the end of
the file.  A machine that was killed can leave such an image too (clusters counted and not yet written, referred to by
nobody), so that `qemu-img check` has the last word.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

_HEADER = struct.Struct(">4sI12xI24xQI36xI")  # qcow2.txt, "Header": version, cluster_bits, refcount table, order
_VERSION_2_ORDER = 4
_MAX_TABLE = 8 << 20
"""Bytes; QEMU refuses a larger refcount table (QCOW_MAX_REFTABLE_SIZE)."""


def may_be_cut_off(file: BinaryIO, size: int) -> bool:
    """
    Look whether clusters are counted beyond the `size` bytes of an image's file.

    A header that makes no sense is left to QEMU to refuse.
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
    within = (block[counted - 1].bit_length() - 1) // bits  # lower entries lie in lower bits of a byte
    highest = last * ((8 << cluster_bits) // bits) + (counted - 1) * 8 // bits + (within if bits < 8 else 0)
    return bool(highest << cluster_bits >= size)


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    try:
        file.seek(offset)
        return file.read(length)
    except (OSError, ValueError, OverflowError):
        return b""
