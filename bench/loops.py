"""
The limits: nothing but zstd, and nothing but BLAKE3, on all cores, over files.

    loops.py zstd FILE       compress each 64 KiB cluster of a file to a frame with a checksum, level 1; prints seconds
    loops.py blake3 FILE...  hash each 4 MiB of the files
    loops.py hash BYTES      hash so many bytes, the same 4 MiB over and over; prints processor seconds

For zstd the file is mapped and read once before, so that neither starting nor reading counts in what is printed.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CLUSTER, BLOCK, SHARE = 65536, 4 << 20, 16 << 20
THREADS = len(os.sched_getaffinity(0))


def compress(path: str) -> float:
    """Compress a file's clusters, in shares that the threads take in turn.  Seconds."""
    import zstandard  # noqa: PLC0415 - dear to import for the other loop

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        view = memoryview(data)
        for at in range(0, len(view), 4096):
            view[at]

        def work(start: int) -> None:
            compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
            for at in range(start, min(start + SHARE, len(view)), CLUSTER):
                compressor.compress(view[at : at + CLUSTER])

        began = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(0, len(view), SHARE)))
        took = time.perf_counter() - began
        view.release()
        return took


def hash_all(paths: list[str]) -> None:
    """Read and hash the blocks of files."""
    from blake3 import blake3  # noqa: PLC0415 - see compress

    def work(path: str, start: int) -> None:
        with open(path, "rb", buffering=0) as file:
            blake3(os.pread(file.fileno(), BLOCK, start)).digest()

    blocks = [(path, start) for path in paths for start in range(0, Path(path).stat().st_size, BLOCK)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda block: work(*block), blocks))


def hash_only(size: int) -> float:
    """Hash `size` bytes and do nothing else.  Processor seconds."""
    from blake3 import blake3  # noqa: PLC0415 - see compress

    block = os.urandom(BLOCK)
    began = time.process_time()
    for _ in range(size // BLOCK):
        blake3(block).digest()
    return time.process_time() - began


if __name__ == "__main__":
    if sys.argv[1] == "zstd":
        print(compress(sys.argv[2]))
    elif sys.argv[1] == "hash":
        print(hash_only(int(sys.argv[2])))
    else:
        hash_all(sys.argv[2:])
