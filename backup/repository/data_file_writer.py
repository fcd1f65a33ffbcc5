"""Write data files and their digest files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from backup import qcow2
from backup.errors import Failed
from backup.model import digests
from backup.model.extents import Offsets
from backup.model.manifest import DataFile
from backup.storage.base import Files
from backup.storage.refusals import require_answer


class PartFile:
    """
    A data file that is written in numbered parts; each part is hashed as it is written (a `qcow2.PartSink`).

    The file has its name only from `finish` on, so that a file of that name is complete.

    Raises
    ------
    Failed
        The file exists, or the storage is full.
    """

    def __init__(self, files: Files, name: str) -> None:
        self.path = files.path(name)
        self._digests: dict[int, bytes] = {}
        self._lock = threading.Lock()
        with _writing(self.path):
            self._file = files.create(name, digests.BLOCK)

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        """Write part `number` (digests.BLOCK bytes; the last may be shorter)."""
        block_digest = digests.digest(data)
        with self._lock:
            self._digests[number] = block_digest
        with _writing(self.path):
            self._file.put(number, data)

    def finish(self) -> bytes:
        """Make the file durable, give it its name, and return the digests of its blocks, in order."""
        with _writing(self.path):
            self._file.finish()
        return b"".join(self._digests[number] for number in range(len(self._digests)))

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()


class CopiedFile:
    """
    A data file that is copied from its first byte to its last.

    The file has its name only from `finish` on, so that a file of that name is complete.

    Raises
    ------
    Failed
        The file exists, or the storage is full.
    """

    def __init__(self, files: Files, name: str, size: int) -> None:
        self.path = files.path(name)
        with _writing(self.path):
            self._file = files.stream(name, size)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes of the file."""
        with _writing(self.path):
            self._file.write(data)

    def finish(self) -> None:
        """Make the file durable, and give it its name."""
        with _writing(self.path):
            self._file.finish()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()


def write_digests(files: Files, name: str, content: bytes) -> None:
    """Write a digest file, durable."""
    with _writing(files.path(name)):
        files.write(name, content)


@contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        require_answer(error)
        raise Failed(
            f"{path} cannot be written: {error.strerror}",
            hint="check the space and the permissions there; what was published before is untouched",
        ) from None


class DataFileMaker:
    """
    Creates one data file and its digest file (a `copier.Sink`).

    `written` collects the names of the files, so that a run that fails can discard them; `stem` is "DISK.POINT".
    """

    batch = qcow2.PART

    def __init__(
        self,
        files: Files,
        stem: str,
        *,
        size: int,
        cluster_size: int,
        backing: str | None,
        level: int | None,
        written: list[str],
    ) -> None:
        self._files = files
        self._level = level
        self._cluster_size = cluster_size
        self._data = f"{stem}.qcow2"
        self._digests = f"{stem}.b3"
        self._written = written
        self._codecs = threading.local()
        image = qcow2.Image(size=size, cluster_size=cluster_size, backing=backing, zstd=level is not None)
        written.append(self._data)  # first: a signal may come as soon as the file exists
        self._file = PartFile(files, self._data)
        self._writer = qcow2.Writer(image, self._file, level=level)

    def write(self, clusters: Offsets, data: memoryview) -> int:
        """Store whole clusters with these ascending numbers, and return how many of them are all zeroes."""
        codec = getattr(self._codecs, "codec", None)
        if codec is None:
            codec = self._codecs.codec = qcow2.Codec(self._cluster_size, self._level)
        return self._writer.write_scattered(clusters, data, codec)

    def zero(self, first_cluster: int, count: int) -> None:
        """Record clusters that read as zeroes."""
        self._writer.zero(first_cluster, count)

    def completed_below(self, cluster: int) -> None:
        """Promise that no cluster below this one will be written; their tables can leave memory."""
        self._writer.completed_below(cluster)

    def finish(self, compression: str) -> DataFile:
        """Complete both files, durable, and describe them for the manifest."""
        size = self._writer.finish()
        listed = self._file.finish()
        self._written.append(self._digests)
        write_digests(self._files, self._digests, listed)
        return DataFile(
            file=self._data,
            size=size,
            digests=self._digests,
            digest=digests.digest(listed).hex(),
            cluster_size=self._cluster_size,
            compression=compression,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
