"""
A virtual machine that works on two disks, as seen from outside: its console, QEMU's monitor and the guest's agent.

It runs without hardware's help (TCG), as a machine for tests is often virtual itself.  QEMU=... chooses the program.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from initrd import System
from lab import CLUSTER, MIB, run
from live import QEMU, Qmp, Refused

PATIENCE = 240.0
"""Seconds that the guest may take for what takes a few seconds on an idle machine."""
FILE_SYSTEM = 96 * MIB
MARKER = 100 * MIB
"""Where the newest number lies on vda, beyond the file system."""
SLOTS = 256
"""Blocks of the ring on vdb, of a cluster each; number n is in block n % SLOTS."""
NAMES = ("vda", "vdb")


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of a machine."""

    path: Path
    format: str


@dataclass(frozen=True, slots=True)
class Progress:
    """The newest number and the newest generation of files that the guest is known to have on its disks."""

    number: int
    generation: int


class Guest:
    """
    A running machine: `qmp` and `agent` are the sockets for the program under test, `monitor` is the tests' own.

    The agent serves one client after the other, so that the tests' connection to it is made for each question.
    """

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.qmp, self.agent, self._console = folder / "qmp", folder / "agent", folder / "console"
        self.wait_until(lambda _: (folder / "monitor").exists() and self.agent.exists(), "sockets")
        self.monitor = Qmp(folder / "monitor")
        self._probe = folder / "probe"

    @property
    def console(self) -> str:
        """All that the guest said, and QEMU."""
        return self._console.read_text(errors="replace")

    @property
    def progress(self) -> Progress:
        said = self.console
        found = (re.findall(rf"^{word} (\d+)\r?\n", said, re.MULTILINE) for word in ("number", "generation"))
        return Progress(*(int(numbers[-1]) if numbers else 0 for numbers in found))

    def wait_until(self, condition: Callable[[Guest], Any], what: str) -> None:
        """Wait until something is true of this guest."""
        deadline = time.monotonic() + PATIENCE
        while not condition(self):
            assert self.process.poll() is None, f"QEMU ended ({self.process.returncode}): {self.console[-3000:]}"
            assert time.monotonic() < deadline, f"no {what} within {PATIENCE} s: {self.console[-3000:]}"
            time.sleep(0.05)

    def wait_for(self, numbers: int, generations: int) -> None:
        """Wait until it has written so many more."""
        number, generation = self.progress.number + numbers, self.progress.generation + generations
        self.wait_until(lambda guest: guest.progress.number >= number, f"number {number}")
        self.wait_until(lambda guest: guest.progress.generation >= generation, f"generation {generation}")

    def ask_agent(self, command: str) -> Any:
        """Ask the guest's agent; what it returned."""
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rwb") as stream:
            connection.settimeout(PATIENCE)
            connection.connect(str(self.agent))
            number = random.getrandbits(32)
            stream.write(b"\xff" + _line({"execute": "guest-sync-delimited", "arguments": {"id": number}}))
            stream.flush()
            while json.loads(stream.readline().rpartition(b"\xff")[2]) != {"return": number}:
                pass  # what an earlier client did not wait for
            stream.write(_line({"execute": command}))
            stream.flush()
            return json.loads(stream.readline())["return"]

    def left(self) -> dict[str, Any]:
        """What a backup must not leave in QEMU or in the guest."""
        return {
            "jobs": self.monitor("query-jobs"),
            "exports": self.monitor("query-block-exports"),
            "nodes": sorted(name for name in self._nodes() if not name.startswith(("node-", "#block"))),
            "descriptors": self.monitor("query-fdsets"),
            "server": self._runs_nbd_server(),
            "file systems": self.ask_agent("guest-fsfreeze-status"),
        }

    def bitmaps(self) -> dict[str, list[str]]:
        """Names of each disk's bitmaps; those that jobs use for themselves have none."""
        found = {name: self._nodes()[f"node-{name}"].get("dirty-bitmaps", []) for name in NAMES}
        return {name: [bitmap["name"] for bitmap in found[name] if "name" in bitmap] for name in NAMES}

    def _nodes(self) -> dict[str, Any]:
        return {node["node-name"]: node for node in self.monitor("query-named-block-nodes", flat=True)}

    def _runs_nbd_server(self) -> bool:
        """QEMU does not tell, but has at most one."""
        try:
            self.monitor("nbd-server-start", addr={"type": "unix", "data": {"path": str(self._probe)}})
        except Refused:
            return True
        self.monitor("nbd-server-stop")
        return False

    def end(self) -> None:
        """Switch the machine off as its owner does, so that its images are closed well."""
        self.monitor("quit")
        assert self.process.wait(PATIENCE) == 0, self.console[-3000:]


def _line(question: object) -> bytes:
    return json.dumps(question).encode() + b"\n"


@contextmanager
def started(system: System, mode: str, *disks: Disk) -> Iterator[Guest]:
    """Start a guest on these disks, in a mode of init.sh; if it still runs, it is ended with the block."""
    # Names of unix sockets have at most 107 bytes, and those of pytest's folders are long.
    with tempfile.TemporaryDirectory(prefix="guest-") as place:
        folder = Path(place)
        with (folder / "console").open("wb") as console:
            command = _command(system, mode, disks, folder)
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        try:
            guest = Guest(folder, process)
            with closing(guest.monitor):
                yield guest
        finally:
            process.kill()
            process.wait()


def _command(system: System, mode: str, disks: Sequence[Disk], folder: Path) -> list[str | Path]:
    # setpriv: no QEMU is left when the tests are killed.
    command: list[str | Path] = ["setpriv", "--pdeathsig", "KILL", QEMU]
    command += ["-machine", "q35,usb=off", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "192"]
    command += ["-nodefaults", "-display", "none", "-no-reboot", "-kernel", system.kernel, "-initrd", system.initrd]
    command += [
        "-append",
        f"console=ttyS0 quiet panic=-1 random.trust_cpu=on no_timer_check mode={mode} marker={MARKER}",
    ]
    command += ["-serial", "stdio"]
    command += [word for name in ("qmp", "monitor") for word in ("-qmp", f"unix:{folder}/{name},server=on,wait=off")]
    command += ["-chardev", f"socket,id=agent,path={folder}/agent,server=on,wait=off", "-device", "virtio-serial-pci"]
    command += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    for name, disk in zip(NAMES, disks, strict=False):
        file = f"file.driver=file,file.filename={disk.path},file.discard=unmap"
        command += ["-blockdev", f"driver={disk.format},node-name=node-{name},discard=unmap,{file}"]
        command += ["-device", f"virtio-blk-pci,drive=node-{name},id=dev-{name}"]
    return command


def make_disks(folder: Path, ballast: Path) -> list[Disk]:
    """
    Make a disk with a file system that holds the ballast, and a disk with the ring's first round.

    The ballast is never written again: a restored disk that has it was read down to the full.
    """
    place = folder / "files/ballast"
    place.mkdir(parents=True)
    shutil.copy(ballast, place / "file")
    (place / "SUMS").write_text(run("md5sum", place / "file").replace(f"{place}/", ""))
    files, ring = (folder / f"{name}.raw" for name in NAMES)
    files.touch()
    os.truncate(files, MARKER + MIB)
    run("mke2fs", "-q", "-t", "ext4", "-d", folder / "files", files, f"{FILE_SYSTEM // 1024}k")
    ring.write_bytes(b"".join((b"%d\n" % n * CLUSTER)[:CLUSTER] for n in [SLOTS, *range(1, SLOTS)]))
    disks = [Disk(folder / f"{name}.qcow2", "qcow2") for name in NAMES]
    for raw, disk in zip([files, ring], disks, strict=True):
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk.path)
    return disks


def verdict_of(system: System, disk: Disk) -> str:
    """Boot a disk, have its files checked, and wait until the guest has ended the machine; what it said."""
    with started(system, "check", disk) as guest:
        assert guest.process.wait(PATIENCE) == 0, guest.console
        verdicts = re.findall(r"^verdict (.*?)\r?\n", guest.console, re.MULTILINE)
    assert len(verdicts) == 1, guest.console
    return str(verdicts[0])
