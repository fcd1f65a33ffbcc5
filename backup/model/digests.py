"""Digests of a data file's blocks: BLAKE3 of each 4 MiB (FORMAT.md, "The digest file").  The only user of `blake3`."""

from __future__ import annotations

from blake3 import blake3

BLOCK = 4 << 20
"""Bytes of the data file that one digest covers."""
LENGTH = 32
"""Bytes of a digest."""


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Return the BLAKE3 digest of data, 32 bytes."""
    return blake3(data).digest()


def block_count(file_size: int) -> int:
    """Return the number of blocks of a file of `file_size` bytes."""
    return -(-file_size // BLOCK)
