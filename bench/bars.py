"""
The bars: what a user could run instead, and how much of its time we may take.  One function for each, in pairs.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from inputs import (
    ALTERNATELY,
    AS,
    Bench,
    Layout,
    Place,
    apart,
    data_files,
    empty_parent,
    even,
    forget_all_but,
    new_repository,
    newest_manifest,
    remove,
    scattered,
    write_clusters,
)
from measure import (
    CLUSTER,
    GIB,
    PYBACKUP,
    TIB,
    Count,
    Row,
    Usage,
    Watch,
    in_turn,
    largest,
    processors,
    run,
    seconds,
    timed,
)
from servers import HERE, Daemon, Server, qemu_nbd, storage_daemon

READ_ONLY, PLAN_ONLY, LOOPS = (
    [sys.executable, str(HERE / name)] for name in ("read_only.py", "plan_only.py", "loops.py")
)


def pair(
    row: Row,
    bench: Bench,
    ours: Sequence[Sequence[str]],
    theirs: Sequence[Sequence[str]],
    *,
    servers: Sequence[int] = (),
    clean: Callable[[], None] = lambda: None,
) -> Row:
    """Measure ours and theirs in turn and complete the row."""
    sides = [lambda: timed(ours, servers), lambda: timed(theirs, servers)]
    return completed(row, *in_turn(sides, bench.rounds, clean))


def completed(row: Row, ours: Sequence[Usage], theirs: Sequence[Usage]) -> Row:
    """Fill in what was measured; processor time only where it was measured on both sides."""
    both = all(usage.processor for usage in theirs)
    return replace(
        row,
        ours=seconds(ours),
        theirs=seconds(theirs),
        ours_processor=processors(ours) if both else [],
        theirs_processor=processors(theirs) if both else [],
        memory=largest(ours),
        foreign=[round(max(one.foreign, other.foreign), 3) for one, other in zip(ours, theirs, strict=True)],
    )


def version(bench: Bench) -> Iterator[Row]:
    """How long it takes to start."""
    row = Row("`pybackup --version`", "`python -c pass`", "difference", 0.15)
    sides = [lambda: timed([[PYBACKUP, "--version"]]), lambda: timed([[sys.executable, "-c", "pass"]])]
    yield completed(row, *in_turn(sides, 4 * bench.rounds, lambda: None))


def read_only(bench: Bench) -> Iterator[Row]:
    """A full with its output thrown away."""
    for place in bench.places:
        with qemu_nbd("-r", "-f", "qcow2", str(bench.image(place))) as server:
            row = Row("read only, with BLAKE3", "`nbdcopy URI null:`", "ratio", 1.0, place.name)
            theirs = [["nbdcopy", server.uri, "null:"]]
            measured = pair(row, bench, [[*READ_ONLY, server.uri]], theirs, servers=[server.id])
            yield replace(measured, note=least_time(bench, server, bench.image(place).stat().st_size))


TUNED = (
    ["--connections=4", "--requests=64"],  # nbdcopy's default
    ["--connections=1", "--requests=8", "--request-size=524288"],
    ["--connections=2", "--requests=4", "--request-size=131072"],
)


def least_time(bench: Bench, server: Server, size: int) -> str:
    """What reading and hashing cost at the least, and how long the cores take for both if none ever waits."""
    copies = [[["nbdcopy", *options, server.uri, "null:"]] for options in TUNED for _ in range(bench.rounds)]
    reading = min(timed(copy, [server.id]).processor for copy in copies)
    hashing = min(float(run([*LOOPS, "hash", str(size)])) for _ in range(bench.rounds))
    cores = len(os.sched_getaffinity(0))
    return (
        f"of processor time nbdcopy takes {reading:.2f} s at the least (server included, {len(TUNED)} settings tried), "
        f"and BLAKE3 of as many bytes {hashing:.2f} s; {cores} cores that never wait have both done in "
        f"{(reading + hashing) / cores:.2f} s, without a start"
    )


def full_none(bench: Bench) -> Iterator[Row]:
    """A full without compression."""
    for place in bench.places:
        with qemu_nbd("-r", "-f", "qcow2", str(bench.image(place))) as server:
            repository, copy = new_repository(place.path("repository")), place.path("copy")
            ours = [PYBACKUP, "full", "--nbd", server.uri, *AS, "--repo", str(repository), "--compression", "none"]
            theirs = [["nbdcopy", server.uri, str(copy)], ["sync", str(copy)]]
            row = Row("full, none, digests, fsynced", "`nbdcopy URI FILE`, `sync FILE`", "ratio", 1.0, place.name)
            clean = cleaner(copy, points=repository)
            yield pair(row, bench, [ours], theirs, servers=[server.id], clean=clean)


def full_zstd(bench: Bench) -> Iterator[Row]:
    """A compressed full, against the usual program and against the limit."""
    for place in bench.places:
        image, repository, copy = bench.image(place), new_repository(place.path("repository")), place.path("copy")
        ours = [PYBACKUP, "full", "--image", str(image), "--repo", str(repository), "--compression", "zstd:1"]
        convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-c", "-m", "16", "-W"]
        convert += ["-o", "compression_type=zstd", str(image), str(copy)]
        loop = [*LOOPS, "zstd", str(image)]
        sides = [
            lambda ours=ours: timed([ours]),
            lambda convert=convert: timed([convert]),
            lambda loop=loop: Usage(float(run(loop)), 0.0, 0),
        ]
        usages = in_turn(sides, bench.rounds, cleaner(copy, points=repository))
        against = "`qemu-img convert -c -m 16 -W -o compression_type=zstd`"
        row = Row("full, zstd:1", against, "ratio", 0.5, place.name, processor_limit=0.65)
        yield completed(row, usages[0], usages[1])
        limit = "a bare loop over zstandard on all cores"
        yield completed(Row("full, zstd:1", limit, "rate", 0.85, place.name), usages[0], usages[2])


def plan(bench: Bench) -> Iterator[Row]:
    """The plan of a bitmap of which every second cluster is dirty."""
    size = (8 if bench.quick else 128) * GIB
    image = bench.tmpfs.path("alternating.qcow2")
    apart(Layout, image, size, None, bitmaps={"b": ALTERNATELY})
    runs = size // CLUSTER // 2
    with qemu_nbd("-r", "-f", "qcow2", "-B", "b", str(image)) as server:
        ours = [*PLAN_ONLY, server.uri, "b"]
        theirs = [["nbdinfo", "--map=qemu:dirty-bitmap:b", server.uri]]
        inside = sorted(float(run(ours).split()[0]) for _ in range(bench.rounds))[bench.rounds // 2]
        note = f"whole processes; planning alone takes ours {inside:.3f} s"
        what = f"plan of {runs:,} dirty and as many clean runs"
        row = Row(what, "`nbdinfo --map=qemu:dirty-bitmap:b URI`", "ratio", 1.0, "tmpfs", note=note)
        yield pair(row, bench, [ours], theirs, servers=[server.id])


def incremental(bench: Bench) -> Iterator[Row]:
    """1 % of a disk dirty, in scattered clusters."""
    size = (4 if bench.quick else 64) * GIB
    dirty = scattered(0.01, size // CLUSTER)
    for place in bench.places:
        image, repository, target = (place.path(name) for name in ("allocated.qcow2", "repository", "target.qcow2"))
        apart(Layout, image, size, bench.pool(), bitmaps={"ours": dirty, "theirs": dirty})
        point = empty_parent(repository, size)
        unchecked = bench.configured(place, spot_check=0)  # it would see that the parent is none

        def clean(repository: Path = repository, point: str = point, target: Path = target) -> None:
            forget_all_but(repository, point)
            remove(target)

        with storage_daemon(image) as daemon:
            uri = daemon.serve("ours")

            def theirs(target: Path = target, daemon: Daemon = daemon) -> Usage:
                before, watch, start = daemon.processor, Watch(), time.perf_counter()
                made = timed([["qemu-img", "create", "-q", "-f", "qcow2", str(target), str(size)]])
                daemon.back_up(target, "theirs")
                synced = timed([["sync", str(target)]])
                took = time.perf_counter() - start
                processor = daemon.processor - before + made.processor + synced.processor
                return Usage(took, processor, 0, watch.foreign(processor))

            for compression in ("none", "zstd:1"):
                ours = [PYBACKUP, *unchecked, "incremental", "--nbd", uri, *AS, "--bitmap", "ours", "--since", point]
                ours += ["--repo", str(repository), "--compression", compression]
                work = f"incremental, {compression}, 1 % of {size // GIB} GiB dirty, scattered"
                row = Row(work, "QEMU's backup job (drive-backup), to qcow2, `sync`", "ratio", 0.7, place.name)
                sides = [lambda ours=ours, daemon=daemon: timed([ours], [daemon.process.pid]), theirs]
                yield completed(row, *in_turn(sides, bench.rounds, clean))
        place.clear(*bench.kept)


def missing(work: str, program: str) -> Row:
    """A comparison with a program that is not installed here."""
    return Row(work, f"`{program}`", "missing", note="not installed here")


def idle(bench: Bench) -> Iterator[Row]:
    """A night in which nothing was written."""
    size = (4 * GIB) if bench.quick else TIB
    place = bench.tmpfs
    image, repository = place.path("idle.qcow2"), new_repository(place.path("repository"))
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size)])
    write_clusters(image, range(0, size // CLUSTER, size // CLUSTER // 1024), bench.pool())
    command = [PYBACKUP, *bench.configured(place, spot_check=0), "incremental", "--image", str(image)]
    night = [*command, "--bitmap", "b1", "--repo", str(repository)]
    run(night)
    run(["qemu-img", "bitmap", "--add", str(image), "idle"])
    look = ["nbdinfo", "--map=qemu:dirty-bitmap:idle", "--totals", "--"]
    look += ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", "idle", str(image), "]"]
    against = "`qemu-img info`, `nbdinfo --map --totals`"
    row = Row(f"incremental, nothing dirty, {size // GIB:,} GiB", against, "difference", 0.6, place.name)
    yield pair(row, bench, [night], [["qemu-img", "info", str(image)], look])


def reads(bench: Bench) -> Iterator[Row | Count]:
    """How much of a fragmented image's metadata is read for a plan: counted with strace in its qemu-nbd."""
    size = (16 * GIB) if bench.quick else TIB
    place = bench.tmpfs
    image, counted = place.path("fragmented.qcow2"), place.path("reads")
    dirty = {
        f"d{count}": scattered(count * CLUSTER / size, size // CLUSTER) if count else [] for count in (0, 10, 100, 1000)
    }
    apart(Layout, image, size, bench.pool(), chosen=even, bitmaps=dirty)
    found: dict[str, tuple[int, int]] = {}
    for name in [*dirty, "everything"]:
        bitmap = name if name in dirty else "d100"
        strace = ["strace", "-D", "-f", "-o", str(counted), "-e", "trace=pread64,preadv,preadv2"]
        with qemu_nbd("-r", "-f", "qcow2", "-B", bitmap, str(image), prefix=strace) as server:
            command = [*PLAN_ONLY, server.uri, bitmap] if name in dirty else ["nbdinfo", "--map", server.uri]
            timed([command])
        found[name] = count_reads(counted)
        yield Count(f"{name[1:]} dirty clusters" if name in dirty else "every allocation", *found[name])
    beyond = {name: found[name][0] - found["d0"][0] for name in found}
    worst = max(beyond[f"d{count}"] / count for count in (10, 100, 1000))
    yield Row(
        f"plan of 100 dirty clusters, {size // GIB:,} GiB, {size // CLUSTER:,} extents, no check of zeroes",
        "the same with every allocation read (`nbdinfo --map`)",
        "count",
        2.0,
        place.name,
        ours=[beyond["d100"]],
        theirs=[beyond["everything"]],
        unit="reads",
        value=worst,
        note="reads beyond those of opening the image, "
        + ", ".join(f"{beyond[f'd{count}']:,} for {count:,} dirty clusters" for count in (10, 100, 1000))
        + "; the value is the most for one dirty cluster",
    )


def count_reads(trace: Path) -> tuple[int, int]:
    """Number of reads in strace's output, and their bytes; waits until strace has written its end."""
    while "+++ exited" not in (text := trace.read_text()).rsplit("\n", 2)[-2]:
        time.sleep(0.1)
    sizes = [int(size) for size in re.findall(r"= (\d+)$", text, re.MULTILINE)]
    return len(sizes), sum(sizes)


def restore(bench: Bench) -> Iterator[Row]:
    """A chain of a full and five incrementals, brought back."""
    for place in bench.places:
        repository = nights(bench, place)
        target, copy = place.path("target"), place.path("copy")
        ours = [[PYBACKUP, "restore", str(newest_manifest(repository)), str(target)]]
        newest = newest_data_file(repository)
        convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-m", "16", "-W", newest, str(copy)]
        against = "`qemu-img convert -m 16 -W -O raw`, `sync FILE`"
        row = Row("restore of a full and 5 incrementals, digests verified", against, "ratio", 0.7, place.name)
        yield pair(row, bench, ours, [convert, ["sync", str(copy)]], clean=cleaner(target, copy))
        place.clear(*bench.kept)


def consolidate(bench: Bench) -> Iterator[Row]:
    """A full and five incrementals made one full, by copying what is compressed as it is."""
    for place in bench.places:
        repository = nights(bench, place)
        pruned, copy = place.path("pruned"), place.path("copy")
        prune = [PYBACKUP, "prune", "--repo", str(pruned), "--keep-last", "1", "--batch", "1"]

        def ours(repository: Path = repository, pruned: Path = pruned, prune: list[str] = prune) -> Usage:
            shutil.copytree(repository, pruned)  # a prune can be done once; the copy is not measured
            os.sync()
            return timed([prune])

        convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-c", "-m", "16", "-W"]
        convert += ["-o", "compression_type=zstd", newest_data_file(repository), str(copy)]
        sides = [ours, lambda convert=convert, copy=copy: timed([convert, ["sync", str(copy)]])]
        against = "`qemu-img convert -c -m 16 -W -o compression_type=zstd`, `sync FILE`"
        row = Row("prune: a full and 5 incrementals as one full, fsynced", against, "ratio", 0.2, place.name)
        yield completed(row, *in_turn(sides, bench.rounds, cleaner(pruned, copy)))
        place.clear(*bench.kept)


def nights(bench: Bench, place: Place) -> Path:
    """A repository with a full of the real file system and five incrementals, each of 1/64 of the disk."""
    image, repository = bench.image(place), new_repository(place.path("repository"))
    night = [PYBACKUP, "incremental", "--image", str(image), "--repo", str(repository), "--bitmap", "b1"]
    run(night)
    clusters = int(bench.size // CLUSTER)
    for number in range(1, 6):
        starts = range(number * 16, clusters - 16, 256)
        write_clusters(image, [start + index for start in starts for index in range(4)], bench.pool())
        run(night)
    remove(image)  # it is not what it was, and its room is needed
    return repository


def newest_data_file(repository: Path) -> str:
    """The data file of the newest point."""
    newest = newest_manifest(repository)
    return max(data_files(repository), key=lambda path: newest.stem in path)


def verify(bench: Bench) -> Iterator[Row]:
    """Every byte of a repository, read and hashed."""
    for place in bench.places:
        repository = new_repository(place.path("repository"))
        full = [PYBACKUP, "full", "--image", str(bench.image(place)), "--repo", str(repository)]
        run([*full, "--compression", "none"])
        loop = [*LOOPS, "blake3", *data_files(repository)]
        ours = [PYBACKUP, "verify", "--repo", str(repository)]
        size = sum(Path(path).stat().st_size for path in data_files(repository))
        work = f"verify of {size / GIB:.1f} GiB of data files"
        row = Row(work, "a bare loop over blake3 on all cores", "rate", 0.9, place.name)
        yield pair(row, bench, [ours], [loop])
        if shutil.which("b3sum"):
            yield pair(
                Row(work, "`b3sum`", "rate", 0.9, place.name), bench, [ours], [["b3sum", *data_files(repository)]]
            )
        place.clear(*bench.kept)
    if not shutil.which("b3sum"):
        yield missing("verify", "b3sum")


def cleaner(*paths: Path, points: Path | None = None) -> Callable[[], None]:
    """What removes outputs after each run, and all points of the repository `points`."""

    def clean() -> None:
        machines = [] if points is None else [path for path in points.iterdir() if path.is_dir()]
        for path in (*paths, *machines):
            remove(path)

    return clean
