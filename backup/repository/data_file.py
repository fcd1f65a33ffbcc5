"""Open data files, and verify that they are what their manifests describe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from backup import qcow2
from backup.errors import Damaged
from backup.model.chain import Chain
from backup.model.manifest import DiskEntry
from backup.repository import checked_file
from backup.repository.checked_file import CACHED, BlockCache, CheckedFile
from backup.repository.cluster_index import Index
from backup.storage.base import Files
from backup.storage.refusals import open_file, opening, require_answer

_FROM_COPY = "bring the file back from a copy of the repository, or restore another point"


class OpenDataFile:
    """A data file that is open for reading; every byte is verified against its digest first."""

    def __init__(self, files: Files, entry: DiskEntry, cache: BlockCache) -> None:
        data = entry.data
        self.file = checked_file.open_checked(files, data, cache)
        try:
            self.reader = qcow2.Reader(self.file.read_at, data.size, self.file.path)
        except BaseException:
            self.close()
            raise

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes [offset, offset + length), verified."""
        return self.file.read_at(offset, length)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class PeekedDataFile:
    """A data file that is open for reading without digests: for planning, and for comparing a few clusters."""

    def __init__(self, files: Files, entry: DiskEntry) -> None:
        data = entry.data
        path = files.path(data.file)
        self._file = open_file(files, data.file)
        try:
            if self._file.size != data.size:
                raise Damaged(f"{path} has {self._file.size} bytes, and its manifest says {data.size}", hint=_FROM_COPY)
            if not files.has(data.digests):
                raise Damaged(f"{files.path(data.digests)} is missing", hint=_FROM_COPY)
            self.reader = qcow2.Reader(self.read_at, data.size, path)
            check_head(self.reader, entry, path)
        except BaseException:
            self.close()
            raise

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes [offset, offset + length), not verified."""
        try:
            content = bytes(self._file.read_at(offset, length))
        except OSError as error:
            require_answer(error)
            raise Damaged(f"a data file cannot be read: {error.strerror}", hint=_FROM_COPY) from None
        if len(content) != length:
            raise Damaged(f"a data file ends before byte {offset + length}", hint=_FROM_COPY)
        return content

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def open_files(files: Files, chain: Chain, cached: int = CACHED) -> Iterator[list[OpenDataFile]]:
    """
    Open all data files of a chain, newest first, and verify their heads against the manifests.

    At most `cached` verified blocks of all files together stay in memory.
    """
    cache = BlockCache(cached)
    with ExitStack() as stack:
        opened_files = [stack.enter_context(closing(OpenDataFile(files, link.entry, cache))) for link in chain.links]
        check_heads(chain, [file.reader for file in opened_files])
        yield opened_files


@contextmanager
def peeked_files(files: Files, chain: Chain, *, whole: bool = True) -> Iterator[list[PeekedDataFile]]:
    """
    Open all data files of a chain, newest first; their existence, sizes and heads are verified, not their content.

    Without `whole`, `chain` may be a part of a chain, whose last link is not a full.
    """
    with ExitStack() as stack:
        peeked_at = [stack.enter_context(closing(PeekedDataFile(files, link.entry))) for link in chain.links]
        if whole:
            check_heads(chain, [file.reader for file in peeked_at])
        yield peeked_at


@contextmanager
def peeked(files: Files, chain: Chain, *, whole: bool = True) -> Iterator[Index]:
    """Open the tables of a chain for planning, as `peeked_files`; yield the index of its clusters."""
    with peeked_files(files, chain, whole=whole) as peeked_at:
        yield Index(chain, [file.reader for file in peeked_at])


@contextmanager
def hold(files: Files, chain: Chain) -> Iterator[bool]:
    """
    Hold a chain's files, so that prune keeps them; yields False if the storage has no locks.

    The files are verified as by `peeked_files`.  A prune may have changed them just before, so the caller reads the
    manifests again.  The digest files are held, because QEMU does not open them: on NFS an flock is one of fcntl's
    locks, and would keep QEMU from the data files.
    """
    with peeked_files(files, chain):
        pass
    with ExitStack() as stack:
        with opening(files.location):
            protected = stack.enter_context(files.hold([link.entry.data.digests for link in chain.links]))
        yield protected


def check_head(reader: qcow2.Reader, entry: DiskEntry, name: str, parent: DiskEntry | None = None) -> None:
    """
    Verify a data file's head against its manifest's entry.

    Raises
    ------
    Damaged
        The size, the cluster size or the backing file differs.
    """
    image = reader.image
    facts: list[tuple[str, object, object]] = [
        ("size", image.size, -(-entry.size // 512) * 512),
        ("cluster size", image.cluster_size, entry.data.cluster_size),
        ("backing file", image.backing is not None, entry.parent is not None),
    ]
    if parent is not None:
        facts.append(("backing file", image.backing, parent.data.file))
    for what, actual, expected in facts:
        if actual != expected:
            raise Damaged(f"{name}: its {what} is {actual}, and the manifest says {expected}", hint=_FROM_COPY)


def check_heads(chain: Chain, readers: Sequence[qcow2.Reader]) -> None:
    """Verify all heads of a chain against their entries and against each other."""
    parents = [link.entry for link in chain.links[1:]]
    for link, reader, parent in zip(chain.links, readers, [*parents, None], strict=True):
        check_head(reader, link.entry, link.entry.data.file, parent)


def check_structure(file: CheckedFile, entry: DiskEntry, parent: DiskEntry | None, *, deep: bool) -> None:
    """
    Verify a data file's head, tables and refcounts, and with `deep` its compressed clusters.

    Raises
    ------
    Damaged
        The structure is damaged; the message names the first fault.
    """
    reader = qcow2.Reader(file.read_at, file.size, file.path)
    check_head(reader, entry, entry.data.file, parent)
    qcow2.check(reader, qcow2.Codec(entry.data.cluster_size, None) if deep else None)
