"""Write a data file in parts, with its digests on the way."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Self

from backup import qcow2
from backup.errors import BackupError, Failed
from backup.model import digests
from backup.model.extents import Offsets
from backup.model.manifest import UNFINISHED, DataFile
from backup.runtime.direct_io import Output
from backup.storage.plain_file import create_file


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
        found = digests.digest(data) if known is None else known
        with self._lock:
            self._digests[number] = found
        try:
            self._output.write(number * digests.BLOCK, data)
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
            digest=digests.digest(listed).hex(),
            cluster_size=self._cluster_size,
            compression=compression,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
