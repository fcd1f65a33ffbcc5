"""
The servers that the bench starts, each on a Unix socket of its own: qemu-nbd, nbdkit, a storage daemon, the simulation.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from measure import processor_of

HERE = Path(__file__).parent
PATIENCE = 30.0
"""Seconds that a server may take to listen."""


@dataclass(frozen=True)
class Server:
    """A running server: its URI, and the process whose processor time counts."""

    uri: str
    process: subprocess.Popen[str]

    @property
    def id(self) -> int:
        """Its process id."""
        return self.process.pid

    def reading(self, patience: float) -> bool:
        """Did a simulated disk say, within so many seconds, that the first read came?"""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], patience)[0])


@contextmanager
def qemu_nbd(*arguments: str, prefix: Sequence[str] = ()) -> Iterator[Server]:
    """Serve an image with qemu-nbd, started through `prefix` (taskset, strace) if any."""
    with _socket() as address:
        command = [*prefix, "qemu-nbd", "-t", "--shared=16", f"--socket={address}", *arguments]
        with _running(command, address) as process:
            yield Server(f"nbd+unix:///?socket={quote(address)}", process)


@contextmanager
def nbdkit(*arguments: str) -> Iterator[Server]:
    """Serve with nbdkit."""
    with _socket() as address, _running(["nbdkit", "-f", "-U", address, *arguments], address) as process:
        yield Server(f"nbd+unix:///?socket={quote(address)}", process)


@contextmanager
def simulated(size: int) -> Iterator[Server]:
    """Simulate a disk of `size` bytes of which every second cluster is dirty; it prints a line at the first read."""
    program = [sys.executable, str(HERE / "simulated_disk.py")]
    with _socket() as address, _running([*program, address, str(size)], address) as process:
        yield Server(f"nbd+unix:///?socket={quote(address)}", process)


class Monitor:
    """A QMP connection to a QEMU or a storage daemon."""

    def __init__(self, address: str) -> None:
        self._socket = _connected(address)
        self._lines = self._socket.makefile("r")
        self._lines.readline()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; what it returned."""
        message = {"execute": command, "arguments": {name.replace("_", "-"): each for name, each in arguments.items()}}
        self._socket.sendall(json.dumps(message).encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                sys.exit(f"bench: error: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()


class Daemon(Monitor):
    """A qemu-storage-daemon with one image open read-only as the node "disk0", spoken to over QMP."""

    def __init__(self, address: str, process: subprocess.Popen[str]) -> None:
        super().__init__(address)
        self.process = process

    @property
    def processor(self) -> float:
        """Processor seconds that it has used so far."""
        return processor_of(self.process.pid)

    def serve(self, bitmap: str) -> str:
        """Export disk0 with a bitmap; the URI."""
        address = tempfile.mktemp(prefix="bench-", suffix=".nbd")
        self.ask("nbd-server-start", addr={"type": "unix", "data": {"path": address}}, max_connections=16)
        bitmaps = [{"node": "disk0", "name": bitmap}]
        self.ask("block-export-add", type="nbd", id="export", node_name="disk0", name="", bitmaps=bitmaps)
        return f"nbd+unix:///?socket={quote(address)}"

    def back_up(self, target: Path, bitmap: str) -> None:
        """QEMU's own incremental backup into an existing qcow2 file: the block job of drive-backup."""
        file = {"driver": "file", "filename": str(target)}
        self.ask("blockdev-add", driver="qcow2", node_name="target", file=file)
        job = {"job_id": "job", "device": "disk0", "target": "target", "auto_dismiss": False}
        self.ask("blockdev-backup", **job, sync="bitmap", bitmap=bitmap, bitmap_mode="never")
        while (found := self.ask("query-jobs")[0])["status"] != "concluded":
            time.sleep(0.005)
        if "error" in found:
            sys.exit(f"bench: error: blockdev-backup: {found['error']}")
        self.ask("job-dismiss", id="job")
        self.ask("blockdev-del", node_name="target")


def _connected(address: str) -> socket.socket:
    """Connect; the socket has its name a moment before the server listens."""
    deadline = time.monotonic() + 5
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except ConnectionRefusedError:
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


@contextmanager
def storage_daemon(image: Path) -> Iterator[Daemon]:
    """Run a storage daemon over an image."""
    with _socket() as address:
        file = f"driver=file,node-name=file0,filename={image},read-only=on"
        command = ["qemu-storage-daemon", "--blockdev", file]
        command += ["--blockdev", "driver=qcow2,node-name=disk0,file=file0,read-only=on"]
        command += ["--chardev", f"socket,id=monitor,path={address},server=on,wait=off"]
        command += ["--monitor", "chardev=monitor"]
        with _running(command, address) as process:
            yield Daemon(address, process)


class Machine(Monitor):
    """A QEMU without processor or guest that has one image open as "disk0"; `disk` is a file that writes to it."""

    def __init__(self, place: Path, process: subprocess.Popen[str]) -> None:
        super().__init__(f"{place}/socket")
        self.process, self.qmp, self.disk = process, place / "qmp", place / "disk"
        self.disk.touch()
        export = {"type": "fuse", "id": "guest", "node_name": "disk0", "mountpoint": str(self.disk)}
        self.ask("block-export-add", **export, writable=True)

    def begin_backup(self, target: Path) -> None:
        """Start QEMU's own full backup into an existing qcow2 file: the block job of drive-backup."""
        self.ask("blockdev-add", driver="qcow2", node_name="target", file={"driver": "file", "filename": str(target)})
        self.ask("blockdev-backup", job_id="job", device="disk0", target="target", sync="full", auto_dismiss=False)

    def backup_ended(self) -> bool:
        """Has that job ended?"""
        [job] = self.ask("query-jobs")
        if "error" in job:
            sys.exit(f"bench: error: blockdev-backup: {job['error']}")
        return bool(job["status"] == "concluded")

    def forget_backup(self) -> None:
        """Let go of that job and its target."""
        self.ask("job-dismiss", id="job")
        self.ask("blockdev-del", node_name="target")


def why_no_machine() -> str:
    """Why a `machine` cannot run here; empty if it can."""
    needed = ["qemu-system-x86_64", *(["fusermount3"] if os.geteuid() else [])]
    lacks = [name for name in needed if not shutil.which(name)]
    if not os.access("/dev/fuse", os.W_OK):
        lacks.append("/dev/fuse")
    return f"this machine lacks {', '.join(lacks)}" if lacks else ""


@contextmanager
def machine(image: Path) -> Iterator[Machine]:
    """Run a QEMU over an image."""
    with _socket() as address:
        place = Path(address).parent
        command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S"]
        command += ["-blockdev", f"driver=qcow2,node-name=disk0,file.driver=file,file.filename={image}"]
        command += ["-qmp", f"unix:{place}/qmp,server=on,wait=off", "-qmp", f"unix:{address},server=on,wait=off"]
        with _running(command, address) as process, closing(Machine(place, process)) as running:
            yield running
            running.ask("quit")  # a signal would be complained about
            process.wait()


@contextmanager
def _socket() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield f"{folder}/socket"


@contextmanager
def _running(command: Sequence[str], address: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not os.path.exists(address):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"bench: error: it does not serve: {' '.join(command)}")
            time.sleep(0.01)
        yield process
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
