"""
Read data files with every block verified against its digest.

A digest file (`.b3`) holds the 32-byte BLAKE3 digests of its data file's blocks, one for each 4 MiB, in order.  The
last block may be short.  The manifest holds the digest of the digest file (FORMAT.md, "The digest file").
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing

from backup.errors import Damaged, DamagedBlock
from backup.model.digests import BLOCK, LENGTH, block_count, digest
from backup.model.manifest import DataFile
from backup.storage.base import Files
from backup.storage.refusals import open_file, require_answer


def load(files: Files, name: str, expected: str, blocks: int) -> bytes:
    """
    Read a digest file and verify it against the manifest.

    Raises
    ------
    NotFound
        The digest file is missing.
    Damaged
        Its length, or its digest (64 hex digits in `expected`), differs.
    """
    path = files.path(name)
    with closing(open_file(files, name)) as file:
        # The length is compared first: a hostile manifest may name a size that is larger than the memory.
        fits = file.size == blocks * LENGTH
        try:
            content = bytes(file.read_at(0, file.size)) if fits else b""
        except OSError as error:
            require_answer(error)
            raise Damaged(f"{path} cannot be read: {error.strerror}", hint=_FROM_COPY) from None
    if not fits or digest(content).hex() != expected:
        raise Damaged(f"{path} is not the digest file that the manifest names", hint=_FROM_COPY)
    return content


_FROM_COPY = (
    "bring the file back from a copy of the repository, or restore another point; `pybackup verify` lists all damage, "
    "and `pybackup restore --salvage` restores what is not damaged"
)
_PATIENCE = 2.0
"""Seconds to wait until another thread has loaded a block; after that the block is loaded twice, at no risk."""
CACHED = 16
"""Default number of blocks in a cache."""


class BlockCache:
    """
    Caches the most recent verified blocks of the files that share the cache; several threads load a block once.

    Tables lie between the data, and compressed clusters cross from one block to the next, so that successive reads need
    the same blocks.  `capacity` (blocks) limits the memory for a chain of any length.
    """

    def __init__(self, capacity: int = CACHED) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._loading: dict[tuple[int, int], threading.Event] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int], load: Callable[[], bytes]) -> bytes:
        """
        Return the block under `key`; `load` it if it is not cached.

        A signal may end the main thread's call at any line, before it can wake the waiting threads.  So a thread waits
        for another one for a limited time, and then loads the block itself.
        """
        mine = threading.Event()
        given_up: threading.Event | None = None
        while True:
            with self._lock:
                if key in self._blocks:
                    self._blocks.move_to_end(key)
                    return self._blocks[key]
                loading = self._loading.get(key)
                if loading is None or loading is given_up or loading.is_set():
                    self._loading[key] = mine
                    break
            if not loading.wait(_PATIENCE):
                given_up = loading
        try:
            block = load()
            with self._lock:
                self._blocks[key] = block
                while len(self._blocks) > self._capacity:
                    self._blocks.popitem(last=False)
            return block
        finally:
            mine.set()
            with self._lock:
                if self._loading.get(key) is mine:
                    del self._loading[key]


class CheckedFile:
    """
    A data file of which every byte is verified against its digest before use.  Safe to use from several threads.

    `size` is the length of the file in bytes that its manifest names, and `digests` the content of its digest file.
    With `once`, no block is read again soon, so the system's cache needs to keep none.  Without `whole`, a file of
    another length is opened as well, and `digests` may be empty: then each block counts as damaged.

    Raises
    ------
    NotFound, Damaged
        The file is missing, or has another length than its manifest names.
    """

    def __init__(
        self,
        files: Files,
        name: str,
        size: int,
        digests: bytes,
        cache: BlockCache,
        *,
        once: bool = False,
        whole: bool = True,
    ) -> None:
        self.path = files.path(name)
        self.size = size
        self._digests = digests
        self._cache = cache
        self._file = open_file(files, name, once=BLOCK if once else 0)
        actual = self._file.size
        if whole and actual != size:
            self.close()
            raise Damaged(f"{self.path} has {actual} bytes, and its manifest says {size}", hint=_FROM_COPY)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return block_count(self.size)

    def listed(self, number: int) -> bytes:
        """Return the digest that a block must have."""
        return self._digests[number * LENGTH : (number + 1) * LENGTH]

    @property
    def all_listed(self) -> bytes:
        """The content of the digest file."""
        return self._digests

    def check_block(self, number: int) -> bytes | memoryview:
        """
        Read one block and verify it; with `once`, this thread's next call overwrites the returned memory.

        Raises
        ------
        Damaged
            The block does not match its digest, or cannot be read.
        """
        start, length = number * BLOCK, min(BLOCK, self.size - number * BLOCK)
        try:
            content = self._file.read_at(start, length)
        except OSError as error:
            require_answer(error)
            raise self._damaged(start, length, f"cannot be read at {start}: {error.strerror}") from None
        if len(content) != length or digest(content) != self.listed(number):
            raise self._damaged(start, length, f"is damaged between bytes {start} and {start + length}")
        return content

    def read_unchecked(self, offset: int, length: int) -> bytes:
        """
        Return bytes [offset, offset + length) without a digest: the caller verifies them in another way.

        Raises
        ------
        Damaged
            The storage fails, or the file is too short.
        """
        try:
            content = bytes(self._file.read_at(offset, length))
        except OSError as error:
            require_answer(error)
            raise self._damaged(offset, length, f"cannot be read at {offset}: {error.strerror}") from None
        if len(content) != length:
            raise self._damaged(offset, length, f"ends before byte {offset + length}")
        return content

    def _damaged(self, start: int, length: int, what: str) -> Damaged:
        return DamagedBlock(self.path, start, start + length, message=f"{self.path} {what}", hint=_FROM_COPY)

    def block(self, number: int) -> bytes:
        """Return a verified block, from the cache if possible."""
        return self._cache.get((id(self), number), lambda: bytes(self.check_block(number)))

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes [offset, offset + length), verified."""
        parts = []
        while length > 0:
            number, at = divmod(offset, BLOCK)
            if number >= self.blocks:
                raise Damaged(f"{self.path} ends before byte {offset}", hint=_FROM_COPY)
            part = self.block(number)[at : at + length]
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_checked(files: Files, data: DataFile, cache: BlockCache, *, once: bool = False) -> CheckedFile:
    """
    Open a data file and the digest file that belongs to it.

    Raises
    ------
    NotFound, Damaged
        One of them is missing, or not what the manifest names.
    """
    listed = load(files, data.digests, data.digest, block_count(data.size))
    return CheckedFile(files, data.file, data.size, listed, cache, once=once)
