"""Memory in whole pages: what O_DIRECT reads into and writes from without the kernel's page cache."""

from __future__ import annotations

import mmap


def pages(size: int) -> memoryview:
    """`size` bytes of zeroes that begin on a page; given back to the system when nothing refers to them any more."""
    return memoryview(mmap.mmap(-1, size))[:size]
