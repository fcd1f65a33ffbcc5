"""
Data files in a machine's folder: written in parts with digests on the way, opened against their manifest's entry.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from backup import qcow2
from backup.errors import Damaged
from backup.model.chain import Chain
from backup.model.manifest import DiskEntry
from backup.repository import checked_file
from backup.repository.checked_file import CACHED, BlockCache, CheckedFile
from backup.repository.cluster_index import Index
from backup.storage.folder import open_plain

_FROM_COPY = "bring the file back from a copy of the repository, or restore another point"


class OpenDataFile:
    """A data file opened for reading, every byte held against its digest first."""

    def __init__(self, folder: Path, entry: DiskEntry, cache: BlockCache) -> None:
        data = entry.data
        self.file = checked_file.opened(folder / data.file, data.size, folder / data.digests, data.digest, cache)
        try:
            self.reader = qcow2.Reader(self.file.read_at, data.size, str(self.file.path))
        except BaseException:
            self.close()
            raise

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), checked."""
        return self.file.read_at(offset, length)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class PeekedDataFile:
    """
    A data file opened unchecked: for planning, where `verify` has the last word, and for a look at few of its clusters.
    """

    def __init__(self, folder: Path, entry: DiskEntry) -> None:
        path = folder / entry.data.file
        self._fd = open_plain(path)
        try:
            actual = os.fstat(self._fd).st_size
            if actual != entry.data.size:
                raise Damaged(f"{path} has {actual} bytes where its manifest says {entry.data.size}", hint=_FROM_COPY)
            if not (folder / entry.data.digests).is_file():
                raise Damaged(f"{folder / entry.data.digests} is missing", hint=_FROM_COPY)
            self.reader = qcow2.Reader(self.read_at, actual, str(path))
            check_head(self.reader, entry, str(path))
        except BaseException:
            self.close()
            raise
        self._path = path

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), unchecked."""
        try:
            content = os.pread(self._fd, length, offset)
        except OSError as error:
            raise Damaged(f"a data file cannot be read: {error.strerror}", hint=_FROM_COPY) from None
        if len(content) != length:
            raise Damaged(f"a data file ends before byte {offset + length}", hint=_FROM_COPY)
        return content

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def opened(folder: Path, chain: Chain, cached: int = CACHED) -> Iterator[list[OpenDataFile]]:
    """
    Open all data files of a chain, newest first, and hold their heads against the manifests.

    At most `cached` checked blocks of all of them together stay in memory.
    """
    cache = BlockCache(cached)
    with ExitStack() as stack:
        files = [stack.enter_context(closing(OpenDataFile(folder, link.entry, cache))) for link in chain.links]
        check_heads(chain, [file.reader for file in files])
        yield files


@contextmanager
def peeked_files(folder: Path, chain: Chain, *, whole: bool = True) -> Iterator[list[PeekedDataFile]]:
    """
    Open all data files of a chain, newest first; existence, sizes and heads are checked, contents are not.

    With `whole` off it may be a part of a chain, whose last link is no full.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(closing(PeekedDataFile(folder, link.entry))) for link in chain.links]
        if whole:
            check_heads(chain, [file.reader for file in files])
        yield files


@contextmanager
def peeked(folder: Path, chain: Chain, *, whole: bool = True) -> Iterator[Index]:
    """Open a chain's metadata for planning, as `peeked_files`."""
    with peeked_files(folder, chain, whole=whole) as files:
        yield Index(chain, [file.reader for file in files])


@contextmanager
def held(folder: Path, chain: Chain) -> Iterator[bool]:
    """
    Keep `prune` from a chain's files, which are checked as by `peeked`; False where the file system has no locks.

    What is held may have been changed just before: the manifests are to be read again.  The locks are on the digest
    files, which QEMU does not open: on NFS an flock is one of fcntl's, and would keep QEMU from the data files.
    """
    with peeked_files(folder, chain):
        pass
    with ExitStack() as stack:
        yield all(_hold(stack, folder / link.entry.data.digests) for link in chain.links)


def _hold(stack: ExitStack, path: Path) -> bool:
    fd = open_plain(path)
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)  # a prune that replaces the file just now ends in a moment
    except OSError:
        return False
    return True


def check_head(reader: qcow2.Reader, entry: DiskEntry, name: str, parent: DiskEntry | None = None) -> None:
    """
    Hold a data file's head against its manifest's entry.

    Raises
    ------
    Damaged
        Size, cluster size, backing file or compression is another.
    """
    image = reader.image
    facts: list[tuple[str, object, object]] = [
        ("size", image.size, -(-entry.size // 512) * 512),
        ("cluster size", image.cluster_size, entry.data.cluster_size),
        ("backing file", image.backing is not None, entry.parent is not None),
    ]
    if parent is not None:
        facts.append(("backing file", image.backing, parent.data.file))
    for what, found, expected in facts:
        if found != expected:
            raise Damaged(f"{name}: its {what} is {found}, and the manifest says {expected}", hint=_FROM_COPY)


def check_heads(chain: Chain, readers: Sequence[qcow2.Reader]) -> None:
    """Hold all heads of a chain against their entries and each other."""
    parents = [link.entry for link in chain.links[1:]]
    for link, reader, parent in zip(chain.links, readers, [*parents, None], strict=True):
        check_head(reader, link.entry, link.entry.data.file, parent)


def check_structure(file: CheckedFile, entry: DiskEntry, parent: DiskEntry | None, *, deep: bool) -> None:
    """
    Check a data file's head, tables and refcounts, and with `deep` its frames.

    Raises
    ------
    Damaged
        The first thing that is wrong.
    """
    reader = qcow2.Reader(file.read_at, file.size, str(file.path))
    check_head(reader, entry, entry.data.file, parent)
    qcow2.check(reader, qcow2.Codec(entry.data.cluster_size, None) if deep else None)
