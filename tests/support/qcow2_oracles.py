"""Builds data files for the tests of backup.qcow2 and asks programs that this project did not write about them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from backup.qcow2 import PART, Codec, Image, Reader, Writer

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@dataclass
class FileSink:
    """Puts parts into a file and keeps what it was given; holds the writer to the protocol's promises."""

    path: Path
    parts: list[tuple[int, int]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        with self.lock:
            assert number not in {n for n, _ in self.parts}, "a part came twice"
            assert not any(n == 0 for n, _ in self.parts), "something came after part 0"
            self.parts.append((number, len(data)))
        mode = "r+b" if self.path.exists() else "xb"
        with self.path.open(mode) as file:
            file.seek(number * PART)
            file.write(data)

    def require_parts_of(self, size: int) -> None:
        expected = {n: min(PART, size - n * PART) for n in range(-(-size // PART))}
        assert dict(self.parts) == expected
        assert self.parts[-1][0] == 0


class NullSink:
    """Counts bytes and forgets them."""

    def __init__(self) -> None:
        self.size = 0

    def put(self, number: int, data: bytes | bytearray | memoryview) -> None:
        self.size += len(data)


def decode(codec: Codec, frame: bytes, size: int) -> bytes:
    """The cluster of `size` bytes in a frame."""
    cluster = bytearray(size)
    codec.decode_into(memoryview(frame), memoryview(cluster))
    return bytes(cluster)


def pad(data: bytes, cluster_size: int) -> bytearray:
    """Data and zeroes up to whole clusters."""
    return bytearray(data) + bytes(-len(data) % cluster_size)


def write_image(path: Path, image: Image, data: bytes, *, level: int | None = 1, batch: int = 16) -> int:
    """A file that holds all of a disk; returns its size in bytes."""
    assert len(data) == image.size
    sink = FileSink(path)
    writer = Writer(image, sink, level=level)
    codec = Codec(image.cluster_size, level)
    clusters = pad(data, image.cluster_size)
    for first in range(0, image.clusters, batch):
        at = first * image.cluster_size
        writer.write(first, clusters[at : at + batch * image.cluster_size], codec)
        writer.completed_below(first + batch)
    size = writer.finish()
    sink.require_parts_of(size)
    assert path.stat().st_size == size
    return size


def open_reader(path: Path) -> Reader:
    data = path.read_bytes()
    return Reader(lambda offset, length: data[offset : offset + length], len(data), path.name)


def run(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def require_clean(path: Path) -> None:
    """qemu-img finds neither an error nor a leak."""
    assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", path)


def require_same(found: bytes | bytearray, expected: bytes | bytearray) -> None:
    """Bytes are equal; says where they differ, and not how, which takes pytest minutes for a disk."""
    if found != expected:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
        raise AssertionError(f"{len(found)} bytes, expected {len(expected)}; first difference at {at}")


def require_equal(path: Path, data: bytes) -> None:
    """QEMU reads these bytes from the file and its chain; what it rounds up reads as zeroes."""
    raw = path.with_name(path.name + ".raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    require_same(raw.read_bytes(), pad(data, 512))
    raw.unlink()


def entries_of(reader: Reader, first: int, count: int) -> npt.NDArray[np.uint64]:
    """The L2 entries of guest clusters, also those that are 0."""
    places, found = reader.allocated(first, count)
    entries = np.zeros(count, np.uint64)
    entries[places] = found
    return entries


def read_disk(reader: Reader, parent: bytes) -> bytes:
    """The disk as our own reader sees it, over a parent's bytes; the rounded size."""
    image = reader.image
    size = image.cluster_size
    codec = Codec(size, None)
    disk = pad(parent, size)[: image.clusters * size]
    disk += bytes(image.clusters * size - len(disk))
    entries = entries_of(reader, 0, image.clusters)
    offsets, lengths = reader.spans(entries)
    for index, kind in enumerate(reader.kinds(entries).tolist()):
        found = reader.read(int(offsets[index]), int(lengths[index])) if kind >= 2 else bytes(size)
        if kind == 3:
            found = decode(codec, found, size)
        if kind:
            disk[index * size : (index + 1) * size] = found
    return bytes(disk[: image.size])
