"""
A real libvirtd of the tests' own, and domains without a guest whose disks the tests write to.

In session mode the daemon runs as an unprivileged user; in system mode as root, in mount namespaces of its own, where
QEMU runs as libvirt-qemu and libvirt changes the owner of each image (dynamic ownership).  Neither touches a libvirt of
this host.  The guest's writes go through the device (HMP qemu-io), above everything that a backup puts below it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lab import MIB, Result, call_pybackup, make_image, run

PATIENCE = 60.0
"""Seconds for what takes a second on an idle machine."""
NOBODY, NOGROUP = 65534, 65534
QEMU_USER = 64055
"""libvirt-qemu, as Debian numbers it."""
SNAPSHOTS_METADATA = 2
"""VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA"""
METADATA_ONLY = 2
"""VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY"""
STATES = ("no state", "running", "blocked", "paused", "in shutdown", "shut off", "crashed", "pmsuspended")
"""virDomainState, as virsh shows it."""
SYSTEM = Path(__file__).parents[2] / "tools/libvirtd-system"


def wait_until(done: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Daemon:
    """libvirtd in session mode."""

    def __init__(self) -> None:
        # Addresses of sockets have at most 107 bytes, and libvirt's folders are deep.
        self.place = Path(tempfile.mkdtemp(prefix="lv-", dir="/tmp"))
        self.place.chmod(0o755)
        self.privileged = os.geteuid() == 0
        for name in ("home", "run", "images"):
            (self.place / name).mkdir()
            self.give(self.place / name)
        self.process: subprocess.Popen[bytes] | None = None

    def give(self, path: Path) -> None:
        """Give a file to the user that the daemon and QEMU run as."""
        if self.privileged:
            os.chown(path, NOBODY, NOGROUP)

    @property
    def socket(self) -> Path:
        return self.place / "run/libvirt/libvirt-sock"

    @property
    def uri(self) -> str:
        return f"qemu+unix:///session?socket={self.socket}"

    @property
    def states(self) -> Path:
        """Where the daemon keeps the pid of each domain's QEMU."""
        return self.place / "run/libvirt/qemu/run"

    def command(self) -> list[str | Path]:
        dropped = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOGROUP), "--clear-groups"]
        home, folder = self.place / "home", self.place / "run"
        settings = [f"HOME={home}", f"XDG_RUNTIME_DIR={folder}", f"XDG_CONFIG_HOME={home}/c"]
        settings += [f"XDG_CACHE_HOME={home}/k", f"XDG_DATA_HOME={home}/d", "PATH=/usr/bin:/bin:/usr/sbin:/sbin"]
        return [*(dropped if self.privileged else []), "env", "-i", *settings, "libvirtd"]

    def start(self) -> Self:
        with (self.place / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(self.answers, "libvirtd")
        return self

    def answers(self) -> bool:
        if not self.socket.exists():
            return False
        done = subprocess.run(["virsh", "-c", self.uri, "list"], check=False, capture_output=True)
        return done.returncode == 0

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the daemon; its domains go on."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(PATIENCE)

    def restart(self) -> None:
        self.kill()
        self.start()

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """A connection of the tests' own, for what is done often: a virsh takes its time to start."""
        import libvirt

        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        connection = libvirt.open(self.uri)
        try:
            yield connection
        finally:
            connection.close()

    def virsh(self, *words: str | Path, fails: bool = False) -> str:
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri, *words], check=False, capture_output=True, text=True, timeout=PATIENCE
        )
        assert fails or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            for name in self.virsh("list", "--name", fails=True).split():
                self.virsh("destroy", name, fails=True)
            self.kill(signal.SIGTERM)
        for pid in self.place.glob("run/**/virtlogd.pid"):
            with suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGTERM)
        shutil.rmtree(self.place, ignore_errors=True)


class SystemDaemon(Daemon):
    """libvirtd in system mode; QEMU runs as libvirt-qemu."""

    def give(self, path: Path) -> None:
        """Leave it to root: the daemon gives images to QEMU's user while the domain is on."""

    @property
    def socket(self) -> Path:
        return self.place / "run/libvirt-sock"

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def states(self) -> Path:
        return self.place / "run/qemu"

    def command(self) -> list[str | Path]:
        return [SYSTEM, self.place, "libvirt-qemu"]

    @property
    def inside(self) -> list[str]:
        """What runs a command where the daemon is."""
        return ["nsenter", "-t", (self.place / "pid").read_text().strip(), "-m"]


@contextmanager
def daemon_of(kind: type[Daemon]) -> Iterator[Daemon]:
    daemon = kind()
    try:
        yield daemon.start()
    finally:
        daemon.close()


def make_bootable(image: Path, code: bytes, data: bytes = b"") -> None:
    """Write a boot sector into a qcow2 image: the code, which the firmware runs at 0x7c00, and the data at 0x7c44."""
    assert len(code) <= 0x44
    sector = image.with_suffix(".sector")
    sector.write_bytes((code.ljust(0x44, b"\0") + data).ljust(510, b"\0") + b"\x55\xaa")
    run("qemu-io", "-f", "qcow2", "-c", f"write -s {sector} 0 512", image)
    sector.unlink()


@dataclass
class Domain:
    """
    A domain; `disks` are the images by target (vda), and each device's type, format, bus and more is in `shapes`.

    `repository` gets its points; `night` makes one.
    """

    daemon: Daemon
    name: str
    folder: Path
    disks: dict[str, Path]
    repository: Path
    size: int = 8 * MIB
    shapes: dict[str, str] = field(default_factory=dict)
    devices: str = ""
    """More devices, as XML."""
    iothreads: bool = False
    os: str = ""
    """What it boots, as XML; else it idles in its firmware."""
    features: str = ""
    memory: int = 48

    @classmethod
    def of(cls, daemon: Daemon, repository: Path, name: str, *targets: str, size: int = 8 * MIB) -> Domain:
        """Of new qcow2 images."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=daemon.place / "images"))
        folder.chmod(0o755)
        daemon.give(folder)
        disks = {target: make_image(folder / f"{target}.qcow2", size) for target in targets}
        for image in disks.values():
            daemon.give(image)
        return cls(daemon, name, folder, disks, repository, size)

    # What it is

    def disk_xml(self, target: str) -> str:
        if target in self.shapes:
            return self.shapes[target]
        thread = " iothread='1'" if self.iothreads else ""
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'{thread}/>"
            f"<source file='{self.disks[target]}'/><target dev='{target}' bus='virtio'/></disk>"
        )

    @property
    def xml(self) -> Path:
        path = self.folder / "domain.xml"
        disks = "".join(map(self.disk_xml, {**self.disks, **self.shapes}))
        path.write_text(
            f"<domain type='qemu'><name>{self.name}</name><memory unit='MiB'>{self.memory}</memory><vcpu>1</vcpu>"
            f"{'<iothreads>1</iothreads>' if self.iothreads else ''}"
            f"<os><type arch='x86_64' machine='q35'>hvm</type>{self.os}</os>{self.features}<devices>"
            f"<emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}{self.devices}"
            "<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
        )
        return path

    def define(self) -> Self:
        with self.daemon.connected() as connection:
            connection.defineXML(self.xml.read_text())
        return self

    def start(self) -> Self:
        with self.found() as found:
            found.create()
        return self

    def create(self) -> Self:
        """Start it as a transient domain."""
        with self.daemon.connected() as connection:
            connection.createXML(self.xml.read_text())
        return self

    def destroy(self) -> None:
        with self.found() as found:
            found.destroy()

    @property
    def state(self) -> str:
        with self.found() as found:
            return STATES[found.state()[0]]

    @property
    def pid(self) -> int:
        return int((self.daemon.states / f"{self.name}.pid").read_text())

    def kill_qemu(self) -> None:
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.state != "running", "the end of the domain")

    def remove(self) -> None:
        with suppress(Exception), self.found() as found:  # a transient domain is gone when it is off
            for checkpoint in found.listAllCheckpoints(0):
                checkpoint.delete(METADATA_ONLY)
            if found.isActive():
                found.destroy()
            if found.hasManagedSaveImage(0):
                found.managedSaveRemove(0)
            found.undefineFlags(SNAPSHOTS_METADATA)

    # What is in it

    @contextmanager
    def found(self) -> Iterator[Any]:
        """The domain, as libvirt's binding has it."""
        with self.daemon.connected() as connection:
            yield connection.lookupByName(self.name)

    def io(self, target: str, *commands: str, fails: bool = False) -> None:
        """The guest writes: qemu-io commands, through the device."""
        import libvirt_qemu

        number = list({**self.disks, **self.shapes}).index(target)
        with self.found() as found:
            for command in commands:
                line = f'qemu-io -d /machine/peripheral/virtio-disk{number}/virtio-backend "{command}"'
                said = libvirt_qemu.qemuMonitorCommand(found, line, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
                assert fails or "rror" not in said, said

    def qmp(self, command: str, **arguments: object) -> Any:
        """Have QEMU execute a command, past pybackup."""
        import libvirt_qemu

        with self.found() as found:
            question = json.dumps({"execute": command, "arguments": arguments})
            said = json.loads(libvirt_qemu.qemuMonitorCommand(found, question, 0))
        assert "return" in said, (command, arguments, said)
        return said["return"]

    def hold(self) -> dict[str, Path]:
        """Copies of the disks as they are now; nothing but `io` writes to them."""
        held = {}
        for target, image in self.disks.items():
            held[target] = self.folder / f"{target}.held.raw"
            self._copy(target, image, held[target])
        return held

    def _copy(self, target: str, image: Path, copy: Path) -> None:
        image_format = "raw" if image.suffix == ".raw" else "qcow2"
        running = self.state == "running"
        with self.found() as found:
            if running:
                found.suspend()  # which flushes
            run("qemu-img", "convert", "-U", "-f", image_format, "-O", "raw", image, copy)
            if running:
                found.resume()

    def checkpoints(self) -> list[str]:
        """The checkpoints that libvirt has a record of."""
        with self.found() as found:
            return [checkpoint.getName() for checkpoint in found.listAllCheckpoints(0)]

    def job(self) -> str:
        """The XML of libvirt's backup job; empty without one."""
        with self.found() as found, suppress(Exception):
            return str(found.backupGetXMLDesc(0))
        return ""

    def leftovers(self) -> list[str]:
        """What a run has left in its places."""
        places = [self.folder, *self.daemon.place.glob("**/domain-*")]
        return [path.name for place in places for path in place.glob("pybackup-*")]

    # Backups

    def words(self, wanted: str, *options: str | Path) -> list[str | Path]:
        family = [] if wanted == "audit" else ["--bitmap", "b1"]
        source = ["--libvirt", self.daemon.uri, "--domain", self.name]
        return [wanted, "--repo", self.repository, *source, *family, "--json", *options]

    def night(self, wanted: str = "incremental", *options: str | Path) -> Result:
        return call_pybackup(self.words(wanted, *options))

    def require_night(self, *kinds: str, options: Sequence[str | Path] = ()) -> str:
        """Make an incremental point whose disks are of these kinds; its content is what the domain holds now."""
        held = self.hold()
        done = self.night("incremental", *options)
        assert done.rc in {0, 3}, done
        assert tuple(kind_of(disk) for disk in done.machine["disks"]) == kinds, done
        assert done.rc == (3 if "rescan" in kinds else 0), done
        point = str(done.machine["point"])
        self.require_holds(point, held)
        assert self.checkpoints() == []
        assert self.leftovers() == []
        return point

    def require_holds(self, point: str, held: dict[str, Path]) -> None:
        """qemu-img finds the point's disks identical with copies of the domain's."""
        names = {disk["name"] for disk in self.point(point)["disks"]}
        for target in names & set(held):
            restored = self.folder / "restored.raw"
            words = ["restore", f"{self.name}/{point}", restored, "--disk", target, "--force"]
            done = call_pybackup([*words, "--repo", self.repository])
            assert done.rc == 0, done
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", restored, held[target])
            restored.unlink()

    def point(self, point: str) -> dict[str, object]:
        done = call_pybackup(["show", f"{self.name}/{point}", "--repo", self.repository, "--json"])
        assert done.rc == 0, done
        return done.document


def kind_of(disk: dict[str, object]) -> str:
    """full, incremental or rescan."""
    return "rescan" if disk["rescan"] else str(disk["kind"])
