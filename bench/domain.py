"""
A running domain of libvirt, backed up by pybackup and by virtnbdbackup in turn.

Install virtnbdbackup and have it in PATH; this part is skipped without it.  Debian has an older one (apt-get install
virtnbdbackup); the newest one comes by pip from https://github.com/abbbi/virtnbdbackup, into a venv that was made with
--system-site-packages.  virtnbdbackup takes no URI with a socket, so libvirtd runs in system mode in a mount namespace
of its own (tools/libvirtd-system), and virtnbdbackup in that namespace.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bars import completed
from inputs import Bench, Place, new_repository, remove
from measure import CLUSTER, GIB, MIB, PYBACKUP, Row, Usage, fail, in_turn, run, timed
from servers import HERE

PATIENCE = 30.0
"""Seconds that the daemon may take to answer."""
NAME = "bench"
WRITES = 10
"""Number of places at which the guest writes before an incremental of 1 %."""
PROGRAMS = ("libvirtd", "virsh", "qemu-system-x86_64", "nsenter", "unshare", "virtnbdbackup")


@dataclass
class Domain:
    """
    A running domain: the folder and the process of its daemon, the process of its QEMU, and how often the guest wrote.
    """

    folder: Path
    daemon: int
    qemu: int
    written: int = 0

    @property
    def uri(self) -> str:
        """The daemon's URI, from outside of its namespace."""
        return uri_of(self.folder)

    def write(self, size: int) -> None:
        """Have the guest write 1 % of `size` bytes at places that are evenly spread over them, others each time."""
        self.written += 1
        step = size // WRITES
        length = step // 100 // CLUSTER * CLUSTER
        for start in range(0, step * WRITES, step):
            place = start + self.written * length % step
            words = f"write -q -P {self.written} {place} {length}"
            line = f'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "{words}"'
            run(["virsh", "-q", "-c", self.uri, "qemu-monitor-command", NAME, "--hmp", line])

    def inside(self, command: Sequence[str]) -> list[str]:
        """A command in the daemon's namespace."""
        return ["nsenter", "-t", (self.folder / "pid").read_text().strip(), "-m", *command]


def uri_of(folder: Path) -> str:
    """The URI of the daemon that keeps its files in a folder."""
    return f"qemu+unix:///system?socket={folder}/run/libvirt-sock"


def why_not() -> str:
    """Why this cannot be measured here; empty if it can."""
    lacks = [program for program in PROGRAMS if not shutil.which(program)]
    if lacks:
        return f"this machine lacks {', '.join(lacks)}"
    if os.geteuid():
        return "only root can start libvirtd in a mount namespace"
    if subprocess.call([sys.executable, "-c", "import libvirt"], stderr=subprocess.DEVNULL):
        return "libvirt's Python binding is missing: tools/setup libvirt"
    return ""


def against_virtnbdbackup(bench: Bench) -> Iterator[Row]:
    """A full, an incremental of 1 % and one of nothing, each in pairs."""
    reason = why_not()
    if reason:
        yield Row("a domain of libvirt", "virtnbdbackup", "missing", note=f"not measured: {reason}")
        return
    for place in bench.places:
        for kind in KINDS:
            yield of_new_domain(bench, place, kind)
            place.clear(*bench.kept)


@dataclass(frozen=True)
class Kind:
    """A kind of backup, as both programs call it; `writes`: the guest writes 1 % before each pair."""

    work: str
    limit: float
    ours: str
    theirs: str
    writes: bool = False


KINDS = (
    Kind("full", 0.35, "full", "full"),
    Kind("incremental, 1 % dirty", 0.3, "incremental", "inc", writes=True),
    Kind("incremental, nothing dirty", 0.3, "incremental", "inc"),
)


def of_new_domain(bench: Bench, place: Place, kind: Kind) -> Row:
    """Pairs of one kind, of a new domain, so that neither program has bitmaps of an earlier kind."""
    image, repository, target = (place.path(name) for name in ("domain.qcow2", "repository", "virtnbdbackup"))
    data = bench.pool().stat().st_size
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(bench.pool()), str(image)])
    run(["qemu-img", "resize", "-q", "-f", "qcow2", str(image), str(2 * data)])
    new_repository(repository)

    def clean() -> None:
        """After a full: theirs needs a new folder, and of ours the newest is enough."""
        if kind.ours == "full":
            run([PYBACKUP, "prune", "--repo", str(repository), "--keep-last", "1"])
            remove(target)

    with running(image) as domain:

        def ours(command: str) -> list[str]:
            words = [PYBACKUP, command, "--libvirt", domain.uri, "--domain", NAME, "--bitmap", "b1"]
            return [*words, "--compression", "none", "--scratch", str(place.folder), "--repo", str(repository)]

        def theirs(level: str) -> list[str]:
            words = ["virtnbdbackup", "-U", "qemu:///system", "-d", NAME, "-l", level, "-o", str(target)]
            return domain.inside(words)

        def first() -> Usage:
            if kind.writes:
                domain.write(data)
            return timed([ours(kind.ours)], [domain.qemu], helpers=[domain.daemon])

        timed([ours("full"), theirs("full")])
        clean()

        def second() -> Usage:
            return timed([theirs(kind.theirs)], [domain.qemu], helpers=[domain.daemon])

        usages = in_turn([first, second], bench.rounds, clean)
    memory = statistics.median(usage.memory for usage in usages[1])
    row = Row(
        f"a domain of libvirt: {kind.work}, none, {data / GIB:g} GiB of data",
        f"`virtnbdbackup` {run(['virtnbdbackup', '--version']).split()[-1]}",
        "ratio",
        kind.limit,
        place.name,
        processor_limit=1.0,
        note=f"on {place.name}, virtnbdbackup takes {memory / MIB:.0f} MiB",
    )
    return completed(row, *usages)


@contextmanager
def running(image: Path) -> Iterator[Domain]:
    """Run a domain over an image, with a daemon of its own."""
    # Addresses of sockets have at most 107 bytes, so that the daemon gets a folder with a short name.
    with tempfile.TemporaryDirectory(prefix="lv-", dir="/tmp") as name:
        folder = Path(name)
        virsh = ["virsh", "-q", "-c", uri_of(folder)]
        with open(folder / "daemon.log", "wb") as log:
            daemon = subprocess.Popen(
                [str(HERE.parent / "tools/libvirtd-system"), name, "root"], stdout=log, stderr=log
            )
        try:
            wait_for(daemon, [*virsh, "list"], folder / "daemon.log")
            (folder / "domain.xml").write_text(xml(image))
            run([*virsh, "create", str(folder / "domain.xml")])
            pids = (int((folder / name).read_text()) for name in ("pid", f"run/qemu/{NAME}.pid"))
            yield Domain(folder, *pids)
        finally:
            subprocess.call([*virsh, "destroy", NAME], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            daemon.terminate()
            daemon.wait()


def wait_for(daemon: subprocess.Popen[bytes], command: Sequence[str], log: Path) -> None:
    """Wait until the daemon answers."""
    deadline = time.monotonic() + PATIENCE
    while subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        if daemon.poll() is not None or time.monotonic() > deadline:
            fail(command, daemon.returncode or 0, log.read_text()[-2000:])
        time.sleep(0.1)


def xml(image: Path) -> str:
    """A machine of one disk that idles in its firmware."""
    return (
        f"<domain type='qemu'><name>{NAME}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>"
        "<emulator>/usr/bin/qemu-system-x86_64</emulator>"
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>"
        f"<source file='{image}'/><target dev='vda' bus='virtio'/></disk>"
        "<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
    )
