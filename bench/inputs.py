"""
Disks to back up: file systems of real files, and qcow2 images laid out as a measurement needs them.

A fully allocated disk of 64 GiB, or one of 1 TiB in eight million extents, would take longer to write than to measure.
Such images are therefore laid out here, table by table (QEMU's docs/interop/qcow2.txt): their L2 tables map the guest's
clusters onto a pool of real data that is far smaller, over and over.  To QEMU that is an image like any other, as if
snapshots shared its clusters (`qemu-img check` finds nothing), its block status says "data" wherever data are, and the
tables that must be read for it are all there.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import sys
import traceback
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbd
from measure import CLUSTER, GIB, MIB, PYBACKUP, run
from servers import qemu_nbd

PER_TABLE = CLUSTER // 8
"""Entries of an L2 table."""
PER_BLOCK = CLUSTER // 2
"""Entries of a refcount block, of 16 bits each."""
COPIED = 1 << 63
"""In an entry: this cluster has a refcount of one."""
BITMAPS_EXTENSION = 0x23852875


def apart(work: Callable[..., object], *arguments: Any, **named: Any) -> None:
    """Do some work in a child process, so that its memory is not ours (see measure.py)."""
    child = os.fork()
    if not child:
        try:
            work(*arguments, **named)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - shown here; the parent only sees the exit code
            traceback.print_exc()
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"bench: error: {work.__name__} failed")


@dataclass(frozen=True)
class Place:
    """A folder to measure in: "tmpfs" or "disk"."""

    name: str
    folder: Path

    def path(self, name: str) -> Path:
        """A file in it."""
        return self.folder / name

    def clear(self, *kept: str) -> None:
        """Remove everything but the files named."""
        for found in self.folder.iterdir():
            if found.name not in kept:
                remove(found)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def real_files() -> list[tuple[int, str]]:
    """Sizes and paths of the files below /usr of 32 KiB or more (most of its bytes), in the same mixed order always."""
    found = run(["find", "/usr", "-xdev", "-type", "f", "-readable", "-size", "+31k", "-printf", "%s %p\\n"])
    lines = sorted(found.splitlines())
    random.Random(1).shuffle(lines)
    return [(int(size), path) for size, path in (line.split(" ", 1) for line in lines)]


def make_file_system(path: Path, size: int) -> None:
    """
    Make a qcow2 image with an ext4 of `size` bytes, 85 % full of files of /usr.

    The files are linked into the tree that mke2fs copies where /usr is on the same file system, which is quicker.
    """
    total, tree, raw = 0, path.with_suffix(".tree"), path.with_suffix(".raw")
    for length, file in real_files():
        if total + length <= size * 0.85:
            copy = tree / file[1:]
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                copy.hardlink_to(file)
            except OSError:
                shutil.copyfile(file, copy)
            total += length
    run(["mke2fs", "-q", "-F", "-t", "ext4", "-E", "no_copy_xattrs", "-d", str(tree), str(raw), f"{size // MIB}M"])
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-W", "-m", "8", str(raw), str(path)])
    remove(tree)
    remove(raw)


def make_pool(path: Path, size: int) -> None:
    """Make a file of `size` bytes of real data: files of /usr, one after the other."""
    with path.open("wb") as pool:
        for _, file in real_files():
            with open(file, "rb") as source:
                while (room := size - pool.tell()) and (some := source.read(min(room, MIB))):
                    pool.write(some)
            if not room:
                return
        sys.exit("bench: error: /usr has too few files for the pool of real data")


def every(_: int) -> bool:
    """All clusters."""
    return True


def even(cluster: int) -> bool:
    """Every second cluster."""
    return cluster % 2 == 0


class Layout:
    """
    Lays out a qcow2 image: `size` bytes of guest, of which the chosen clusters lie in the pool, with dirty bitmaps.

    Parameters
    ----------
    pool : Path or None
        Data for the chosen clusters, the first one to the first and so on, from the start again when it ends.
    chosen : callable, optional
        Whether a guest cluster is allocated; `every` or `even`, which are quick.
    bitmaps : mapping of str to clusters
        Names of bitmaps (granularity CLUSTER), and which clusters are dirty in them; bytes are a pattern for all.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        pool: Path | None,
        *,
        chosen: Callable[[int], bool] = every,
        bitmaps: Mapping[str, Iterable[int] | bytes],
    ) -> None:
        self.size = size
        self.clusters = size // CLUSTER
        self.step = 1 if chosen is every else 2
        self.pool_clusters = pool.stat().st_size // CLUSTER if pool else 0
        tables = -(-self.clusters // PER_TABLE) if pool else 0
        self.used = 0
        self.header = self.take(1)
        self.l1 = self.take(-(-self.clusters // PER_TABLE) * 8 / CLUSTER)
        self.l2 = self.take(tables)
        self.directory = self.take(1)
        bitmap_bytes = -(-self.clusters // 8)
        self.bitmap_clusters = -(-bitmap_bytes // CLUSTER)
        self.bitmap_tables = [self.take(self.bitmap_clusters * 8 / CLUSTER) for _ in bitmaps]
        self.bitmap_data = [self.take(self.bitmap_clusters) for _ in bitmaps]
        self.blocks_number = -(-(self.used + self.pool_clusters + 64) // (PER_BLOCK - 2))
        self.refcount_table_clusters = -(-self.blocks_number * 8 // CLUSTER)
        self.refcount_table = self.take(self.refcount_table_clusters)
        self.blocks = self.take(self.blocks_number)
        self.data = self.take(self.pool_clusters)
        with path.open("wb") as file:
            self.file = file
            self._write_header(len(bitmaps))
            self._write_tables(tables)
            self._write_bitmaps(bitmaps)
            self._write_refcounts()
            file.truncate(self.used * CLUSTER)
            if pool:
                file.seek(self.data * CLUSTER)
                with pool.open("rb") as source:
                    while os.sendfile(file.fileno(), source.fileno(), None, 64 * MIB):
                        pass

    def take(self, clusters: float) -> int:
        """Give out so many clusters of the file, rounded up; the first one's number."""
        first = self.used
        self.used += -int(-clusters // 1)
        return first

    def put(self, cluster: int, content: bytes) -> None:
        """Write at the start of a cluster of the file."""
        self.file.seek(cluster * CLUSTER)
        self.file.write(content)

    def _write_header(self, bitmaps: int) -> None:
        l1_entries = -(-self.clusters // PER_TABLE)
        places = (self.l1 * CLUSTER, self.refcount_table * CLUSTER, self.refcount_table_clusters)
        fixed = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 16, self.size, 0, l1_entries, *places, 0, 0)
        features = struct.pack(">QQQII", 0, 0, bool(bitmaps), 4, 104)  # autoclear bit 0: the bitmaps are consistent
        extension = struct.pack(">IIIIQQ", BITMAPS_EXTENSION, 24, bitmaps, 0, 0, self.directory * CLUSTER)
        self.extension_at = len(fixed + features)
        self.put(self.header, fixed + features + (extension if bitmaps else b"") + bytes(8))

    def _write_tables(self, tables: int) -> None:
        if not tables:
            return
        self.put(self.l1, _big_endian("Q", ((self.l2 + index) * CLUSTER | COPIED for index in range(tables))))
        flag = COPIED if self.clusters // self.step <= self.pool_clusters else 0
        for index in range(tables):
            first = index * PER_TABLE // self.step
            entries = (
                (self.data + (first + number) % self.pool_clusters) * CLUSTER | flag
                for number in range(PER_TABLE // self.step)
            )
            table = array("Q", bytes(CLUSTER))
            table[:: self.step] = array("Q", entries)
            table.byteswap()
            self.put(self.l2 + index, table.tobytes())

    def _write_bitmaps(self, bitmaps: Mapping[str, Iterable[int] | bytes]) -> None:
        directory = b""
        for name, table, data in zip(bitmaps, self.bitmap_tables, self.bitmap_data, strict=True):
            places = ((data + index) * CLUSTER for index in range(self.bitmap_clusters))
            self.put(table, _big_endian("Q", places))
            self.put(data, _bits(bitmaps[name], self.clusters))
            entry = struct.pack(">QIIBBHI", table * CLUSTER, self.bitmap_clusters, 2, 1, 16, len(name), 0)
            entry += name.encode()  # flags 2: it records; type 1; granularity 1 << 16
            directory += entry + bytes(-len(entry) % 8)
        self.put(self.directory, directory)
        self.file.seek(self.header * CLUSTER + self.extension_at + 16)
        self.file.write(struct.pack(">Q", len(directory)))

    def _write_refcounts(self) -> None:
        self.put(
            self.refcount_table, _big_endian("Q", ((self.blocks + n) * CLUSTER for n in range(self.blocks_number)))
        )
        mapped = self.clusters // self.step
        for block in range(self.blocks_number):
            counts = array("H", bytes(CLUSTER))
            for index in range(PER_BLOCK):
                cluster = block * PER_BLOCK + index
                if cluster < self.data:
                    counts[index] = 1
                elif cluster < self.used:
                    number = cluster - self.data
                    counts[index] = mapped // self.pool_clusters + (number < mapped % self.pool_clusters)
            counts.byteswap()
            self.put(self.blocks + block, counts.tobytes())


def _big_endian(code: str, values: Iterable[int]) -> bytes:
    packed = array(code, values)
    packed.byteswap()
    return packed.tobytes()


def _bits(dirty: Iterable[int] | bytes, clusters: int) -> bytes:
    if isinstance(dirty, bytes):
        return dirty * (clusters // 8 // len(dirty))
    bits = bytearray(-(-clusters // 8))
    for cluster in dirty:
        bits[cluster // 8] |= 1 << cluster % 8
    return bytes(bits)


ALTERNATELY = b"\x55"
"""A bitmap of which every second cluster is dirty."""


def scattered(share: float, clusters: int) -> list[int]:
    """Clusters chosen at random, always the same ones."""
    return random.Random(2).sample(range(clusters), max(1, round(share * clusters)))


def in_runs(total: int, run_length: int, clusters: int) -> list[int]:
    """`total` clusters in runs of `run_length`, evenly spread over a disk of `clusters`."""
    gap = clusters * run_length // total
    return [start + index for start in range(0, total // run_length * gap, gap) for index in range(run_length)]


def write_clusters(image: Path, clusters: Iterable[int], data: Path) -> None:
    """Write real data to clusters of an image, as its guest would."""
    with qemu_nbd("-f", "qcow2", "--cache=unsafe", str(image)) as server, data.open("rb") as source:
        handle: Any = nbd.NBD()
        handle.connect_uri(server.uri)
        for cluster in clusters:
            while handle.aio_in_flight() >= 16:
                handle.poll(-1)
            some = source.read(CLUSTER)
            if len(some) < CLUSTER:
                source.seek(0)
                some = source.read(CLUSTER)
            handle.aio_pwrite(bytearray(some), cluster * CLUSTER, lambda _error: 1)  # 1: done and forgotten
        while handle.aio_in_flight():
            handle.poll(-1)
        handle.flush()
        handle.shutdown()


def new_repository(path: Path) -> Path:
    """An empty repository."""
    run([PYBACKUP, "--quiet", "init", str(path)])
    return path


def empty_parent(repository: Path, size: int) -> str:
    """
    Make a repository and begin a chain with a full of an empty disk; the point's id.

    An incremental's cost does not depend on what its parent holds, and a full of 64 GiB takes long.
    """
    new_repository(repository)
    empty = repository.with_suffix(".empty")
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(empty), str(size)])
    with qemu_nbd("-r", "-f", "qcow2", str(empty)) as server:
        run([PYBACKUP, "full", "--nbd", server.uri, *AS, "--repo", str(repository)])
    remove(empty)
    return newest_manifest(repository).stem


AS = ["--machine", "bench", "--disk", "disk"]
"""How a disk behind a URI is called, so that the same one is continued."""


def newest_manifest(repository: Path) -> Path:
    """The manifest of the newest point of a repository with one machine."""
    return max(repository.glob("*/*.json"), key=lambda path: path.stat().st_mtime_ns)


def data_files(repository: Path) -> list[str]:
    """All data files of a repository with one machine."""
    return sorted(map(str, repository.glob("*/*.qcow2")))


def forget_all_but(repository: Path, point: str) -> None:
    """Remove the files of all points but one, to run the same incremental again."""
    for path in repository.glob("*/*-*.*"):
        if point not in path.name:
            path.unlink()


class Bench:
    """
    What the parts share: where they measure, how often, and inputs that several need.

    `size` is the bytes of the file system image, `rounds` the pairs of a bar; `repeats` the runs of a series' point.
    """

    kept = ("disk.qcow2", "pool")

    def __init__(self, tmpfs: Path, disk: Path, *, rounds: int, quick: bool) -> None:
        self.quick = quick
        self.tmpfs, self.disk = Place("tmpfs", tmpfs), Place("disk", disk)
        self.places = (self.tmpfs, self.disk)
        self.rounds = 1 if quick else rounds
        self.repeats = 1 if quick else 3
        self.size = (256 * MIB) if quick else (4 * GIB)

    def image(self, place: Place) -> Path:
        """The image of a real file system, in one of the places; made when first asked for."""
        path, made = place.path("disk.qcow2"), self.disk.path("disk.qcow2")
        if not made.exists():
            apart(make_file_system, made, self.size)
        if not path.exists():
            shutil.copyfile(made, path)
        return path

    def pool(self) -> Path:
        """The pool of real data."""
        path = self.disk.path("pool")
        if not path.exists():
            apart(make_pool, path, (64 * MIB) if self.quick else GIB)
        return path

    def configured(self, place: Place, **keys: object) -> list[str]:
        """Options for a configuration with these keys."""
        path = place.path("config.yaml")
        path.write_text("".join(f"{name}: {value}\n" for name, value in keys.items()) or "{}\n")
        return ["--config", str(path)]
