"""
Speed, memory and growth, measured side by side with the programs that an administrator would use instead.

    make bench                                    everything; makes bench/results.json, bench/README.md and its plots
    make bench ARGS=--quick                       small inputs, one run each, nothing stored: does it still work?
    make bench ARGS='--only restore scale-chain'  some parts, merged into results.json

measure.py says what is measured, bars.py, domain.py, latency.py, memory.py, scale.py and nights.py are the parts,
inputs.py makes the disks, report.py makes the tables and plots of README.md from results.json alone.  It needs about
8 GiB of memory in --tmpfs and 16 GiB of room in --disk.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bars
import buckets
import domain
import latency
import memory
import nights
import scale
from inputs import Bench
from measure import GIB, Peak, run
from servers import HERE

RESULTS = HERE / "results.json"
Part = Callable[[Bench], Iterator[Any]]
PARTS: dict[str, Part] = {
    "version": bars.version,
    "idle": bars.idle,
    "plan": bars.plan,
    "reads": bars.reads,
    "read-only": bars.read_only,
    "full-none": bars.full_none,
    "full-zstd": bars.full_zstd,
    "scale-cores": scale.cores,
    "verify": bars.verify,
    "restore": bars.restore,
    "consolidate": bars.consolidate,
    "incremental": bars.incremental,
    "libvirt": domain.against_virtnbdbackup,
    "buckets": buckets.against_rclone,
    "guest-latency": latency.guest_latency,
    "memory-fragmented": memory.fragmented,
    "memory-huge": memory.huge,
    "scale-dirty": scale.dirty,
    "scale-fragmentation": scale.fragmentation,
    "scale-size": scale.disk_size,
    "scale-chain": scale.chain,
    "scale-nights": nights.thousand,
    "scale-connections": scale.connections,
}
"""In the order in which they run: those that read the image of a file system first, as long as it is there."""


def main() -> None:
    """Measure, print, and store unless --quick."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="small inputs, one run each, nothing stored")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--tmpfs", type=Path, default=Path("/dev/shm"), help="a folder in memory (default: %(default)s)"
    )
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="a folder on a disk (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="pairs of a bar (default: %(default)s)")
    options = parser.parse_args()
    # As after an installation, also where PYTHONDONTWRITEBYTECODE is set; else each start compiles what was edited.
    compileall.compile_dir(HERE.parent / "backup", quiet=1)
    os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    machine = describe_machine(options.tmpfs, options.disk)
    print("\n".join(machine.values()), flush=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and options.only else {"parts": {}}
    with (
        tempfile.TemporaryDirectory(prefix="pybackup-bench-", dir=options.tmpfs) as in_memory,
        tempfile.TemporaryDirectory(prefix="pybackup-bench-", dir=options.disk) as on_disk,
    ):
        os.chdir(on_disk)
        # The default configuration, whatever this machine's is.
        os.environ["PYBACKUP_CONFIG"] = f"{on_disk}/empty.yaml"
        Path("empty.yaml").write_text("{}\n")
        (Path(in_memory) / "tmpfs").mkdir()
        (Path(on_disk) / "disk").mkdir()
        bench = Bench(Path(in_memory) / "tmpfs", Path(on_disk) / "disk", rounds=options.rounds, quick=options.quick)
        for name in options.only or PARTS:
            results["parts"][name] = measure(name, bench)
            if not options.quick:
                results["machine"] = machine
                results["parts"] = {each: results["parts"][each] for each in PARTS if each in results["parts"]}
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        os.chdir("/")
    if not options.quick:
        subprocess.run([sys.executable, str(HERE / "report.py")], check=True)


def measure(name: str, bench: Bench) -> dict[str, Any]:
    """Run one part, and say when, on what and with what result."""
    print(name, flush=True)
    began, load, commit = time.monotonic(), os.getloadavg()[0], describe_commit()
    rows = []
    for row in PARTS[name](bench):
        print(row.text(), flush=True)
        rows.append({"is": type(row).__name__, **asdict(row)})
        if isinstance(row, Peak) and row.memory > row.limit:
            print(f"  more than the {row.limit} bytes that it may take", flush=True)
    for place in bench.places:
        place.clear(*bench.kept)
    took = round(time.monotonic() - began, 1)
    print(f"  {took} s in all", flush=True)
    return {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}Z", "commit": commit, "load": load, "took": took, "rows": rows}


def describe_commit() -> str:
    """The commit that is measured, and "-changed" where the program or the bench differ from it."""
    git = ["git", "-C", str(HERE.parent)]
    changed = subprocess.call([*git, "diff", "--quiet", "HEAD", "--", "backup", "bench/*.py"])
    return run([*git, "rev-parse", "--short=10", "HEAD"]).strip() + ("-changed" if changed else "")


def describe_machine(tmpfs: Path, disk: Path) -> dict[str, str]:
    """Processor, cores, memory, kernel, file systems and versions."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = models[0].split(": ")[1] if models else os.uname().machine
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    file_systems = [run(["stat", "-f", "-c", "%T", str(path)]).strip() for path in (tmpfs, disk)]
    programs = [name for name in ("qemu-img", "nbdcopy", "nbdkit", "b3sum") if shutil.which(name)]
    versions = [f"Python {sys.version.split()[0]}", *(run([name, "--version"]).splitlines()[0] for name in programs)]
    return {
        "hardware": f"{model}, {len(os.sched_getaffinity(0))} cores, {total:.0f} GiB of memory",
        "system": f"Linux {os.uname().release}",
        "folders": f"tmpfs is {tmpfs} ({file_systems[0]}), disk is {disk} ({file_systems[1]})",
        "programs": ", ".join(versions),
    }


if __name__ == "__main__":
    main()
