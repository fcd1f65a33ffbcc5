"""
Copies of points to a bucket, and restores from there: against rclone, plain against sealed, bucket against folder.

The server is a real Ceph of this bench's own, with an OSD in memory (tests/support/rgw-start).  Install its packages
with `tools/setup ceph`, and rclone; this part is skipped without them.  The server's processor time is nobody's.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bars import completed
from inputs import AS, Bench, Place, new_repository, remove
from measure import GIB, PYBACKUP, Row, Usage, in_turn, run, timed
from servers import HERE

PATIENCE = 60.0
"""Seconds that the gateway may take to answer."""
PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "rclone", "age-keygen")
BUCKET = "bench"


@dataclass(frozen=True)
class Server:
    """A running Ceph: the gateway's URL, and the processes that work for it."""

    url: str
    processes: tuple[int, ...]

    def rclone(self, *words: str) -> list[str]:
        """A command of rclone that knows the server."""
        return ["rclone", "--s3-provider", "Ceph", "--s3-env-auth", "--s3-endpoint", self.url, *words]

    def forget(self, *prefixes: str) -> None:
        """Remove what lies below some prefixes; an empty one is no error."""
        for prefix in prefixes:
            command = self.rclone("purge", f":s3:{BUCKET}/{prefix}")
            subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def timed(self, command: Sequence[str]) -> Usage:
        """Run a command; the server's processes do not count, but are no other programs' either."""
        return timed([command], helpers=self.processes)


def against_rclone(bench: Bench) -> Iterator[Row]:
    """Copies and restores of a full and two incrementals, in pairs."""
    lacks = [program for program in PROGRAMS if not shutil.which(program)]
    if lacks:
        yield Row("a bucket", "rclone", "missing", note=f"not measured: this machine lacks {', '.join(lacks)}")
        return
    place = bench.tmpfs
    repository, points = chain(bench, place), "a full and two incrementals"
    stored = sum(path.stat().st_size for path in repository.glob("*/*.qcow2"))
    with running() as server:
        work = f"of {points}, {stored / GIB:.2f} GiB"
        yield copy_plain(bench, server, repository, work)
        yield copy_sealed(bench, place, server, repository, work)
        yield restore(bench, place, server, repository, work)
    remove(repository)


def chain(bench: Bench, place: Place) -> Path:
    """A repository of one machine with three points of a disk of real data."""
    repository = new_repository(place.path("repository"))
    image = place.path("image.qcow2")
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(bench.pool()), str(image)])
    size = bench.pool().stat().st_size
    for night in range(3):
        run([PYBACKUP, "incremental", "--image", str(image), *AS, "--bitmap", "b1", "--repo", str(repository)])
        run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P {night + 1} {night * size // 4} {size // 20}", str(image)])
    remove(image)
    return repository


def copy_plain(bench: Bench, server: Server, repository: Path, work: str) -> Row:
    """A copy to an empty prefix, against rclone's of the same files."""

    def ours() -> Usage:
        run([PYBACKUP, "--quiet", "init", "--copy-of", str(repository), f"s3://{BUCKET}/ours"])
        return server.timed([PYBACKUP, "copy", f"s3://{BUCKET}/ours", "--repo", str(repository)])

    def theirs() -> Usage:
        return server.timed(server.rclone("copy", str(repository), f":s3:{BUCKET}/theirs"))

    usages = in_turn([ours, theirs], bench.rounds, lambda: server.forget("ours", "theirs"))
    version = run(["rclone", "version"]).split()[1]
    row = Row(f"copy to a bucket {work}", f"`rclone copy` {version}", "ratio", 1.0, "tmpfs", processor_limit=0.6)
    return completed(row, *usages)


def copy_sealed(bench: Bench, place: Place, server: Server, repository: Path, work: str) -> Row:
    """A sealed copy against a plain one."""
    key = place.path("key")
    remove(key)
    recipient = run([PYBACKUP, "keygen", str(key)]).split()[-1]

    def copied(prefix: str, *sealing: str) -> Usage:
        run([PYBACKUP, "--quiet", "init", "--copy-of", str(repository), f"s3://{BUCKET}/{prefix}", *sealing])
        return server.timed([PYBACKUP, "copy", f"s3://{BUCKET}/{prefix}", "--repo", str(repository)])

    sides = [lambda: copied("sealed", "--recipient", recipient), lambda: copied("plain")]
    usages = in_turn(sides, bench.rounds, lambda: server.forget("sealed", "plain"))
    row = Row(f"sealed copy to a bucket {work}", "the same, plain", "ratio", 1.4, "tmpfs", processor_limit=1.4)
    return completed(row, *usages)


def restore(bench: Bench, place: Place, server: Server, repository: Path, work: str) -> Row:
    """A restore from the bucket against one from the folder; there is no line between client and server."""
    run([PYBACKUP, "--quiet", "init", "--copy-of", str(repository), f"s3://{BUCKET}/restored"])
    run([PYBACKUP, "--quiet", "copy", f"s3://{BUCKET}/restored", "--repo", str(repository)])
    target = place.path("restored.raw")

    def restored(location: str) -> Usage:
        return server.timed([PYBACKUP, "restore", "bench", str(target), "--format", "raw", "--repo", location])

    sides = [lambda: restored(f"s3://{BUCKET}/restored"), lambda: restored(str(repository))]
    usages = in_turn(sides, bench.rounds, lambda: remove(target))
    server.forget("restored")
    row = Row(f"restore from a bucket {work}, processor time", "the same from the folder", "ratio", 1.6, "tmpfs")
    wall = (statistics.median(usage.seconds for usage in side) for side in usages)
    row = replace(row, note="wall time {:.3f} s from the bucket, {:.3f} s from the folder".format(*wall))
    return processor_alone(completed(row, *usages))


def processor_alone(row: Row) -> Row:
    """Compare processor time only: the wall time depends on the line, and there is none here."""
    return replace(row, ours=row.ours_processor, theirs=row.theirs_processor, ours_processor=[], theirs_processor=[])


@contextmanager
def running() -> Iterator[Server]:
    """Run a Ceph with an empty bucket; the environment names it meanwhile."""
    with tempfile.TemporaryDirectory(prefix="rgw-", dir="/tmp") as name:
        folder, before = Path(name), dict(os.environ)
        port, monitor = free_port(), free_port()
        os.environ |= {
            "MON_PORT": str(monitor),
            "AWS_ACCESS_KEY_ID": "AKTEST",
            "AWS_SECRET_ACCESS_KEY": "SKTEST",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "XDG_STATE_HOME": str(folder / "state"),
        }
        os.environ.pop("AWS_CA_BUNDLE", None)  # with which older versions of rclone end
        try:
            with (folder / "log").open("wb") as log:
                start = str(HERE.parent / "tests/support/rgw-start")
                subprocess.run([start, name, str(port)], check=True, stdout=log, stderr=log)
            pids = tuple(int(path.read_text()) for path in (folder / "run").glob("*.pid"))
            server = Server(f"http://127.0.0.1:{port}", pids)
            make_bucket(server)
            yield server
        finally:
            for path in (folder / "run").glob("*.pid"):
                with suppress(ProcessLookupError, ValueError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
            os.environ.clear()
            os.environ.update(before)


def make_bucket(server: Server) -> None:
    """Make the bucket, as soon as the gateway answers."""
    deadline = time.monotonic() + PATIENCE
    command = server.rclone("--retries", "1", "--low-level-retries", "1", "mkdir", f":s3:{BUCKET}")
    while subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        if time.monotonic() > deadline:
            run(command)
        time.sleep(0.5)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
        return port
