"""
Data files in a machine's folder: written in parts with digests on the way, opened against their manifest's entry.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Self

from backup import qcow2
from backup.errors import BackupError, Damaged, Failed
from backup.model.chain import Chain
from backup.model.extents import Offsets
from backup.model.manifest import UNFINISHED, DataFile, DiskEntry
from backup.repository import checked_file
from backup.repository.checked_file import CACHED, BlockCache, CheckedFile
from backup.repository.cluster_index import Index
from backup.runtime.direct_io import Output
from backup.storage.plain_file import create_file

_FROM_COPY = "bring the file back from a copy of the repository, or restore another point"


class PartFile:
    """
    A file that is written in numbered parts, each hashed as it comes (a `qcow2.PartSink`).

    It is called `path` with `.part` until `finish`, so that a file without that is complete.

    Raises
    ------
    Failed
        The file exists, or the disk is full.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        self._part = part_name(path)
        self._digests: dict[int, bytes] = {}
        self._lock = threading.Lock()
        try:
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            self._fd = create_file(self._part, mode)
        except OSError as error:
            raise _cannot_write(path, error) from None
        self._output = Output(self._fd, self._part, grows=True)

    def put(self, number: int, data: bytes | bytearray | memoryview, known: bytes | None = None) -> None:
        """Write part `number` (digests.BLOCK bytes each, the last may be short); `known` is its digest, if it is."""
        found = checked_file.digest(data) if known is None else known
        with self._lock:
            self._digests[number] = found
        try:
            self._output.write(number * checked_file.BLOCK, data)
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def finish(self) -> bytes:
        """Make the file last, give it its name, and return the digests of its blocks, in order."""
        try:
            os.fsync(self._fd)
            os.rename(self._part, self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        self.close()
        return b"".join(self._digests[number] for number in range(len(self._digests)))

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._output.close()


def part_name(path: Path) -> Path:
    """What a data file is called until it is complete."""
    return path.with_name(path.name + UNFINISHED)


def write_digests(path: Path, content: bytes, mode: int) -> None:
    """Write a `.b3` file that lasts."""
    try:
        with open(create_file(path, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> BackupError:
    return Failed(
        f"{path} cannot be written: {error.strerror}",
        hint="check the space and the permissions there; what was published before is untouched",
    )


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
        self._fd = checked_file.open_plain(path)
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
    fd = checked_file.open_plain(path)
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)  # a prune that replaces the file just now ends in a moment
    except OSError:
        return False
    return True


class DataFileMaker:
    """
    Makes one data file and its digest file under their own names (a `copier.Sink`).

    `written` collects the paths, so that a run that fails can remove them; `stem` is "DISK.POINT".
    """

    batch = qcow2.PART

    def __init__(
        self,
        folder: Path,
        stem: str,
        *,
        size: int,
        cluster_size: int,
        backing: str | None,
        level: int | None,
        mode: int,
        written: list[Path],
    ) -> None:
        self._folder = folder
        self._mode = mode
        self._level = level
        self._cluster_size = cluster_size
        self._data = folder / f"{stem}.qcow2"
        self._digests = folder / f"{stem}.b3"
        self._written = written
        self._codecs = threading.local()
        image = qcow2.Image(size=size, cluster_size=cluster_size, backing=backing, zstd=level is not None)
        written += [part_name(self._data), self._data]  # first: a signal may come as soon as the file is there
        self._file = PartFile(self._data, mode)
        self._writer = qcow2.Writer(image, self._file, level=level)

    def write(self, clusters: Offsets, data: memoryview) -> int:
        """Store whole clusters with these numbers, ascending; returns how many of them are all zeroes."""
        codec = getattr(self._codecs, "codec", None)
        if codec is None:
            codec = self._codecs.codec = qcow2.Codec(self._cluster_size, self._level)
        return self._writer.write_scattered(clusters, data, codec)

    def zero(self, first_cluster: int, count: int) -> None:
        """Record clusters that read as zero."""
        self._writer.zero(first_cluster, count)

    def completed_below(self, cluster: int) -> None:
        """Nothing will come for clusters below this one any more."""
        self._writer.completed_below(cluster)

    def finish(self, compression: str) -> DataFile:
        """Complete both files, make them last, and describe them for the manifest."""
        size = self._writer.finish()
        listed = self._file.finish()
        self._written.append(self._digests)
        write_digests(self._digests, listed, self._mode)
        return DataFile(
            file=self._data.name,
            size=size,
            digests=self._digests.name,
            digest=checked_file.digest(listed).hex(),
            cluster_size=self._cluster_size,
            compression=compression,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


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
