"""
Speed and memory, measured side by side with the programs that an administrator would use instead.

    make bench                  everything, about ten minutes; makes bench/results.json and bench/README.md
    make bench ARGS=--quick     small inputs, one run each, nothing stored: does it still work?

Each comparison is run in pairs, ours and then theirs, so that what else the machine does hits both; the middle of the
pairs' times is shown.  "Theirs" ends with `sync FILE` where ours calls fsync.  Memory is the peak of the resident set,
as the kernel counts it (wait4).  The files lie in TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbd

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
PYBACKUP = str(BIN / "pybackup")
MIB, GIB = 1 << 20, 1 << 30
CLUSTER = 65536
MEMORY_LIMIT = 300 * MIB

BLAKE3_LOOP = """
import sys
from blake3 import blake3
for name in sys.argv[1:]:
    with open(name, "rb", buffering=0) as file:
        while block := file.read(4 << 20):
            blake3(block).digest()
"""


@dataclass(frozen=True)
class Row:
    """One comparison.  Seconds, one of each pair."""

    what: str
    theirs_is: str
    ours: list[float]
    theirs: list[float]

    def text(self) -> str:
        """A row of the table."""
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        ratio = statistics.median(one / other for one, other in zip(self.ours, self.theirs, strict=True))
        return f"| {self.what} | {ours:.3f} | {theirs:.3f} | {ratio:.2f} | {self.theirs_is} |"


@dataclass(frozen=True)
class Peak:
    """One run whose memory was measured.  Seconds and bytes."""

    what: str
    seconds: float
    memory: int

    def text(self) -> str:
        """A row of the table."""
        return f"| {self.what} | {self.memory / MIB:.0f} | {self.seconds:.1f} |"


def main() -> None:
    """Measure, print, and store unless --quick."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="small inputs, one run each, nothing stored")
    quick = parser.parse_args().quick
    os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    machine = describe_machine()
    print(machine, flush=True)
    with tempfile.TemporaryDirectory(prefix="pybackup-bench-") as folder:
        os.chdir(folder)
        peaks = list(shown(measure_memory(4 * GIB if quick else 64 * GIB)))
        rows = list(shown(compare(64 * MIB if quick else GIB, 1 if quick else 5)))
        os.chdir("/")
    if not quick:
        store(machine, peaks, rows)
    if any(peak.memory > MEMORY_LIMIT for peak in peaks):
        sys.exit(f"bench: error: more than {MEMORY_LIMIT // MIB} MiB of memory")


def shown(rows: Iterator[Any]) -> Iterator[Any]:
    """Print each row as it comes."""
    for row in rows:
        print(row.text(), flush=True)
        yield row


def measure_memory(size: int) -> Iterator[Peak]:
    """
    Back up a disk of which every second cluster was written: 64 GiB have 1,048,576 extents, 524,288 of them data.

    512 bytes are written to each such cluster, so that the image needs little space and is still read whole, 32 GiB.
    The bitmap was there before the writes, so that it has as many runs.
    """
    made = [
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}", "many.qcow2", str(size)],
        ["qemu-img", "bitmap", "--add", "-g", str(CLUSTER), "many.qcow2", "b"],
    ]
    for command in made:
        run(command)
    with served("-f", "qcow2", "--cache=unsafe", "many.qcow2") as uri:
        write_alternately(uri, size)
    with served("-r", "-f", "qcow2", "--shared=16", "-B", "b", "many.qcow2") as uri:
        with Path("map.json").open("w+") as file:  # a list of them here would count: see peak_of
            subprocess.run([PYBACKUP, "map", "--nbd", uri, "--json"], stdout=file, check=True)
            file.seek(0)
            extents = sum('"start"' in line for line in file)
        common = ["--nbd", uri, "--machine", "many", "--disk", "vda", "--repo", "repo"]
        yield peak_of(f"full of {size // GIB} GiB, {extents:,} extents", [PYBACKUP, "full", *common])
        since = json.loads(run([PYBACKUP, "list", "many", "--repo", "repo", "--json"]))[0]["point"]
        command = [PYBACKUP, "incremental", *common, "--bitmap", "b", "--since", since]
        yield peak_of(f"incremental of {size // GIB} GiB, {size // CLUSTER // 2:,} dirty runs", command)
    shutil.rmtree("repo")
    Path("many.qcow2").unlink()


def write_alternately(uri: str, size: int) -> None:
    """Write 512 bytes to every second cluster."""
    handle: Any = nbd.NBD()
    handle.connect_uri(uri)
    data = bytearray(os.urandom(512))
    for offset in range(0, size, 2 * CLUSTER):
        while handle.aio_in_flight() >= 64:
            handle.poll(-1)
        handle.aio_pwrite(data, offset, lambda _error: 1)  # 1: the request is done and forgotten
    while handle.aio_in_flight():
        handle.poll(-1)
    handle.flush()
    handle.shutdown()


def compare(size: int, pairs: int) -> Iterator[Row]:
    """Ours and theirs, on a file system of real files."""
    make_file_system(size)
    for level, theirs, what in (
        ("zstd:1", ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-c", "-m", "16", "-W", "-o"], "-c zstd"),
        ("none", ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-m", "16", "-W", "-o"], "no compression"),
    ):
        ours = [PYBACKUP, "full", "--image", "disk.qcow2", "--repo", "repo", "--compression", level]
        options = "compression_type=zstd" if level != "none" else "cluster_size=64k"
        convert = [[*theirs, options, "disk.qcow2", "copy"], ["sync", "copy"]]
        yield pair(f"full, {level}", f"qemu-img convert {what}, sync", [ours], convert, pairs)
        if level == "none":
            with served("-r", "-f", "qcow2", "--shared=16", "disk.qcow2") as uri:
                nbdcopy = [["nbdcopy", uri, "copy"], ["sync", "copy"]]
                ours = [PYBACKUP, "full", "--nbd", uri, "--machine", "disk", "--disk", "disk", "--repo", "repo"]
                ours += ["--compression", level]
                yield pair("full over NBD, none", "nbdcopy to a raw file, sync", [ours], nbdcopy, pairs)
    yield from compare_chain(pairs)
    yield pair("--version", "python -c pass", [[PYBACKUP, "--version"]], [[sys.executable, "-c", "pass"]], 4 * pairs)


def compare_chain(pairs: int) -> Iterator[Row]:
    """A full and five incrementals, then what is done with them."""
    night = [PYBACKUP, "incremental", "--image", "disk.qcow2", "--repo", "chain", "--bitmap", "b1"]
    run(night)
    size = json.loads(run(["qemu-img", "info", "--output=json", "disk.qcow2"]))["virtual-size"]
    for number in range(1, 6):
        writes = [f"write -P {number} {at} 256k" for at in range(number * MIB, size - MIB, 16 * MIB)]
        run(["qemu-io", "-f", "qcow2", *[word for write in writes for word in ("-c", write)], "disk.qcow2"])
        run(night)
    newest = json.loads(run([PYBACKUP, "list", "--repo", "chain", "--json"]))[-1]
    folder = Path(newest["manifest"]).parent
    data_file = str(folder / f"disk.{newest['point']}.qcow2")
    restore = [[PYBACKUP, "restore", newest["manifest"], "restored"]]
    convert = [
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-W", "-m", "16", data_file, "copy"],
        ["sync", "copy"],
    ]
    yield pair("restore of a full and 5 incrementals", "qemu-img convert, sync", restore, convert, pairs)
    loop = [[sys.executable, "-c", BLAKE3_LOOP, *map(str, sorted(folder.glob("*.qcow2")))]]
    yield pair(
        "verify of these", "a loop over blake3, one thread", [[PYBACKUP, "verify", "--repo", "chain"]], loop, pairs
    )
    run(["qemu-img", "bitmap", "--add", "disk.qcow2", "idle"])
    serve = ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", "idle", "disk.qcow2", "]"]
    look = [
        ["qemu-img", "info", "disk.qcow2"],
        ["nbdinfo", "--map=qemu:dirty-bitmap:idle", "--totals", "--", *serve],
    ]
    yield pair("incremental, nothing dirty", "qemu-img info, nbdinfo --map --totals", [night], look, pairs)


def make_file_system(size: int) -> None:
    """Make disk.qcow2, an ext4 with files of /usr of about `size` bytes."""
    total, tree = 0, Path("tree")
    for path in sorted(Path("/usr").rglob("*")):
        if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
            length = path.stat().st_size
            if total + length > size * 0.85:
                continue
            copy = tree / path.relative_to("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            total += length
    run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", "tree", "disk.raw", f"{size // MIB}M"])
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"])
    shutil.rmtree(tree)
    Path("disk.raw").unlink()


def pair(what: str, theirs_is: str, ours: list[list[str]], theirs: list[list[str]], pairs: int) -> Row:
    """Run both in turn, after one turn that is not counted where there are several."""
    times = []
    for _ in range(pairs + (pairs > 1)):
        times.append((timed(ours), timed(theirs)))
        for name in ("copy", "restored"):
            Path(name).unlink(missing_ok=True)
        shutil.rmtree("repo", ignore_errors=True)
    counted = times[-pairs:]
    return Row(what, theirs_is, [one for one, _ in counted], [other for _, other in counted])


def timed(commands: list[list[str]]) -> float:
    """Seconds of wall time for the commands, one after the other."""
    start = time.perf_counter()
    for command in commands:
        run(command)
    return time.perf_counter() - start


def peak_of(what: str, command: list[str]) -> Peak:
    """
    Run a command and ask the kernel for its peak of resident memory.

    Linux counts what the process was before exec as well, so that this program must stay small itself.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"bench: error: exit {process.returncode}: {' '.join(command)}")
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > usage.ru_maxrss * 0.8:
        sys.exit("bench: error: the bench itself takes so much memory that it hides what it measures")
    return Peak(what, time.perf_counter() - start, usage.ru_maxrss * 1024)


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """Serve an image with qemu-nbd; its URI."""
    address = Path("nbd.sock").absolute()
    server = subprocess.Popen(["qemu-nbd", "-t", f"--socket={address}", *arguments])
    try:
        while not address.exists():
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={quote(str(address))}"
    finally:
        server.terminate()
        server.wait()
        address.unlink(missing_ok=True)


def run(command: list[str]) -> str:
    """Run a command that must succeed; what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench: error: exit {done.returncode}: {' '.join(command)[:300]}\n{done.stderr}")
    return done.stdout


def describe_machine() -> str:
    """Processor, cores, memory, kernel and versions."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = models[0].split(": ")[1] if models else os.uname().machine
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    versions = ", ".join(run([name, "--version"]).splitlines()[0] for name in ("qemu-img", "nbdcopy"))
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Linux {os.uname().release}, "
        f"Python {sys.version.split()[0]}, {versions}, load {os.getloadavg()[0]:.1f} at the start"
    )


def store(machine: str, peaks: list[Peak], rows: list[Row]) -> None:
    """Write results.json and README.md."""
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    results = {
        "date": date,
        "machine": machine,
        "memory": [asdict(p) for p in peaks],
        "pairs": [asdict(r) for r in rows],
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        f"# Measurements\n\nMade by `make bench` on {date}; what is measured, and how, is in run.py.\n\n{machine}\n",
        f"Memory, one run each; the limit is {MEMORY_LIMIT // MIB} MiB.\n\n| what | peak MiB | s |\n|---|--:|--:|",
        *[peak.text() for peak in peaks],
        "\nTime, the median of paired runs; below 1.00 ours is faster.\n",
        "| what | ours s | theirs s | ours / theirs | theirs is |\n|---|--:|--:|--:|---|",
        *[row.text() for row in rows],
    ]
    (HERE / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
