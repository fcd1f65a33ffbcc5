"""Digests of a data file's blocks: BLAKE3 of each 4 MiB (FORMAT.md, "The digest file").  The only user of `blake3`."""

from __future__ import annotations

from blake3 import blake3

BLOCK = 4 << 20
"""Bytes of the data file under one digest."""
LENGTH = 32
"""Bytes of a digest."""


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """BLAKE3 of data, 32 bytes."""
    return blake3(data).digest()


def block_count(file_size: int) -> int:
    """Number of blocks of a file of so many bytes."""
    return -(-file_size // BLOCK)
