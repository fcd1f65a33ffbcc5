"""
How cost grows as work grows.  One function for each series; each point is the median of some runs, on tmpfs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from inputs import (
    AS,
    Bench,
    Layout,
    apart,
    empty_parent,
    forget_all_but,
    in_runs,
    newest_manifest,
    remove,
    scattered,
    write_clusters,
)
from measure import CLUSTER, GIB, MIB, PYBACKUP, TIB, Point, in_turn, largest, run, seconds, timed
from servers import nbdkit, qemu_nbd


def measured(
    bench: Bench,
    at: tuple[str, float, str, float],
    command: Sequence[str],
    clean: Callable[[], None],
    repeats: int | None = None,
) -> Point:
    """One point: line, x, label and units, and the runs of a command."""
    line, x, label, units = at
    (usages,) = in_turn([lambda: timed([command])], repeats or bench.repeats, clean)
    return Point(line, x, label, seconds(usages), units, largest(usages))


def dirty(bench: Bench) -> Iterator[Point]:
    """Dirty share, in clusters scattered over a fully allocated disk."""
    size = (256 * MIB) if bench.quick else (4 * GIB)
    clusters = size // CLUSTER
    shares = {"p0": 0.1, "p1": 1.0, "p2": 10.0, "p3": 100.0}
    bitmaps = {name: scattered(share / 100, clusters) for name, share in shares.items()}
    at = {name: (share, f"{share:g} %", len(bitmaps[name]) * CLUSTER / MIB) for name, share in shares.items()}
    yield from incrementals(bench, size, bitmaps, at)


def fragmentation(bench: Bench) -> Iterator[Point]:
    """The same dirty bytes in fewer or more runs, evenly spread."""
    size, total = (1 * GIB, 16 * MIB) if bench.quick else (64 * GIB, 256 * MIB)
    lengths = [length for length in (4096, 256, 64, 16, 4, 1) if length <= total // CLUSTER]
    bitmaps = {f"r{length}": in_runs(total // CLUSTER, length, size // CLUSTER) for length in lengths}
    counts = {f"r{length}": total // CLUSTER // length for length in lengths}
    at = {name: (float(count), f"{count:,} runs", float(total // MIB)) for name, count in counts.items()}
    yield from incrementals(bench, size, bitmaps, at)


def incrementals(
    bench: Bench, size: int, bitmaps: dict[str, list[int]], at: dict[str, tuple[float, str, float]]
) -> Iterator[Point]:
    """One fully allocated disk with several bitmaps, and the incremental of each."""
    image, repository = bench.tmpfs.path("allocated.qcow2"), bench.tmpfs.path("repository")
    apart(Layout, image, size, bench.pool(), bitmaps=bitmaps)
    point = empty_parent(repository, size)
    for name, place in at.items():
        with qemu_nbd("-r", "-f", "qcow2", "-B", name, str(image)) as server:
            for line in ("none", "zstd:1"):
                command = [
                    PYBACKUP,
                    *bench.configured(bench.tmpfs, spot_check=0),
                    "incremental",
                    "--nbd",
                    server.uri,
                    *AS,
                ]
                command += ["--bitmap", name, "--since", point]
                command += ["--repo", str(repository), "--compression", line]
                yield measured(bench, (line, *place), command, lambda: forget_all_but(repository, point))


def disk_size(bench: Bench) -> Iterator[Point]:
    """Ever larger disks with the same amount of data and of dirty data; offline images, whole nights."""
    sizes = [GIB, 16 * GIB, 256 * GIB, TIB, 4 * TIB, 16 * TIB]
    for size in sizes[:3] if bench.quick else sizes:
        place = bench.tmpfs
        place.clear(*bench.kept)
        image, repository = place.path("disk-of-a-size.qcow2"), place.path("repository")
        run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size)])
        night = [PYBACKUP, "incremental", "--image", str(image), "--repo", str(repository), "--bitmap", "b1"]
        clusters = range(0, size // CLUSTER, size // CLUSTER // 1024)
        write_clusters(image, clusters, bench.pool())
        label = f"{size // TIB} TiB" if size >= TIB else f"{size // GIB} GiB"
        at = (size / GIB, label, size / GIB)
        yield measured(bench, ("full, 64 MiB of data", *at), night, lambda: None, 1)
        points = []
        for _ in range(bench.repeats):
            write_clusters(image, clusters, bench.pool())
            points.append(measured(bench, ("", *at), night, lambda: None, 1))
        taken = [point.seconds[0] for point in points]
        yield Point("incremental, 64 MiB dirty", *at[:2], taken, at[2], max(point.memory for point in points))
        yield measured(bench, ("incremental, nothing dirty", *at), night, lambda: None)


def chain(bench: Bench) -> Iterator[Point]:
    """A chain that grows by one night after the other: the night itself, and the restore of its newest point."""
    size, longest = (256 * MIB, 10) if bench.quick else (GIB, 200)
    place = bench.tmpfs
    image, repository, target = (place.path(name) for name in ("growing.qcow2", "repository", "target"))
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size)])
    # A quarter of the disk is written at first, and 4 MiB, each time others, before each night.
    write_clusters(image, range(0, size // CLUSTER, 4), bench.pool())
    configured = bench.configured(place, max_chain=longest + 10)
    night = [PYBACKUP, *configured, "incremental", "--image", str(image), "--repo", str(repository), "--bitmap", "b1"]
    looked_at = [length for length in (1, 2, 5, 10, 25, 50, 100, 150, 200) if length <= longest]
    for length in range(1, longest + 1):
        if length > 1:
            write_clusters(image, scattered_from(length, size // CLUSTER), bench.pool())
        at = (float(length), str(length), float(length))
        point = measured(bench, ("night" if length > 1 else "night (full)", *at), night, lambda: None, 1)
        if length in looked_at:
            yield point
            command = [PYBACKUP, "restore", str(newest_manifest(repository)), str(target)]
            yield measured(bench, ("restore", *at), command, lambda: remove(target))


def scattered_from(number: int, clusters: int) -> list[int]:
    """64 clusters, others for each number."""
    return [(number * 7 + index * (clusters // 64)) % clusters for index in range(64)]


def connections(bench: Bench) -> Iterator[Point]:
    """More connections, at latencies of 0, 1 and 10 ms for each read (nbdkit's delay filter)."""
    size = (64 * MIB) if bench.quick else GIB
    place, pool = bench.tmpfs, bench.pool()
    repository, disk = place.path("repository"), place.path("raw")
    run(["cp", str(pool), str(disk)])
    for latency in (0, 1, 10):
        for count in (1, 2, 4, 8):
            with nbdkit("--filter=delay", "file", str(disk), f"rdelay={latency}ms") as server:
                options = bench.configured(place, connections=count)
                command = [PYBACKUP, *options, "full", "--nbd", server.uri, *AS, "--repo", str(repository)]
                at = (f"{latency} ms", float(count), str(count), size / MIB)
                yield measured(bench, at, [*command, "--compression", "none"], lambda: remove(repository))


def cores(bench: Bench) -> Iterator[Point]:
    """More cores, for the client and its server together (taskset)."""
    place = bench.tmpfs
    image, repository = bench.image(place), place.path("repository")
    there = sorted(os.sched_getaffinity(0))
    counts = sorted({count for count in (1, 2, 4, 8, 16, len(there)) if count <= len(there)})
    for count in counts:
        bound = ["taskset", "-c", ",".join(map(str, there[:count]))]
        for compression in ("none", "zstd:1"):
            full = [*bound, PYBACKUP, "full", "--image", str(image), "--repo", str(repository)]
            at = (f"full, {compression}", float(count), str(count), bench.size / MIB)
            yield measured(bench, at, [*full, "--compression", compression], lambda: remove(repository))
        run([PYBACKUP, "full", "--image", str(image), "--repo", str(repository)])
        target = place.path("target")
        at = ("restore", float(count), str(count), bench.size / MIB)
        command = [*bound, PYBACKUP, "restore", str(newest_manifest(repository)), str(target)]
        yield measured(bench, at, command, lambda: remove(place.path("target")))
        at = ("verify", float(count), str(count), bench.size / MIB)
        yield measured(bench, at, [*bound, PYBACKUP, "verify", "--repo", str(repository)], lambda: None)
        remove(repository)
