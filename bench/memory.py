"""
Memory at its worst: disks with as many extents as there can be.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from inputs import ALTERNATELY, AS, Bench, Layout, apart, empty_parent, even, new_repository, newest_manifest, remove
from measure import CLUSTER, GIB, PYBACKUP, TIB, Peak, fail, timed, waited
from servers import qemu_nbd, simulated


def fragmented(bench: Bench) -> Iterator[Peak]:
    """A disk of which every second cluster holds data, and then every second cluster is dirty."""
    size = (1 if bench.quick else 64) * GIB
    place = bench.disk
    image, repository, pool = (place.path(name) for name in ("fragmented.qcow2", "repository", "little"))
    apart(make_little_data, pool)
    apart(Layout, image, size, pool, chosen=even, bitmaps={"b": ALTERNATELY})
    with qemu_nbd("-r", "-f", "qcow2", "-B", "b", str(image)) as server:
        common = ["--nbd", server.uri, *AS, "--repo", str(new_repository(repository))]
        used = timed([[PYBACKUP, "full", *common]])
        yield Peak(f"full of {size // GIB} GiB, {size // CLUSTER:,} extents", used.seconds, used.memory)
        since = newest_manifest(repository).stem
        used = timed([[PYBACKUP, "incremental", *common, "--bitmap", "b", "--since", since]])
        yield Peak(f"incremental of {size // GIB} GiB, {size // CLUSTER // 2:,} dirty runs", used.seconds, used.memory)


def make_little_data(path: Path) -> None:
    """64 clusters with 512 random bytes each: read whole, and compressed in no time."""
    path.write_bytes(b"".join(os.urandom(512) + bytes(CLUSTER - 512) for _ in range(64)))


def huge(bench: Bench) -> Iterator[Peak]:
    """
    A simulated disk of 16 TiB, every second cluster dirty: planned whole; copied for some seconds, then interrupted.

    To copy it all would take 8 TiB of room.
    """
    size = (64 * GIB) if bench.quick else (16 * TIB)
    patience = 1 if bench.quick else 10
    repository = bench.disk.path("repository")
    since = empty_parent(repository, size)
    with simulated(size) as server:
        command = [PYBACKUP, *bench.configured(bench.disk, spot_check=0), "incremental", "--nbd", server.uri, *AS]
        command += ["--repo", str(repository), "--since", since]
        start = time.perf_counter()
        with open("complaints", "w+") as complaints:
            process = subprocess.Popen([*command, "--bitmap", "b"], stdout=subprocess.DEVNULL, stderr=complaints)
            # The server says when the first read comes; a client that fails before that would let us wait for ever.
            while not server.reading(1.0):
                if process.poll() is not None:
                    fail(command, process.returncode, Path("complaints").read_text())
            planned = time.perf_counter() - start
            time.sleep(patience)
            process.send_signal(signal.SIGTERM)
            used = waited(process)
        if process.returncode != 143:
            fail(command, process.returncode, Path("complaints").read_text())
    what = f"incremental of {size / TIB:g} TiB (simulated), {size // CLUSTER // 2:,} dirty runs"
    note = f"planned whole in {planned:.1f} s; interrupted after {patience} s of copying"
    yield Peak(what, time.perf_counter() - start, used.memory, note=note)
    remove(repository)
