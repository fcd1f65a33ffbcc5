"""
Running machines without a guest: QEMU with disks and a processor that sleeps, and the lab as its guest.

The guest's writes go through its devices (HMP qemu-io), above whatever a backup puts between device and disk, as those
of a real guest do, and leave QEMU's only NBD server alone.  What each disk must hold is known without asking QEMU: a
model of bytes in memory gets each write that succeeded.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lab import CLUSTER, MIB, Chained, Result, call_pybackup, check_repository, init, make_image, restore_and_cmp, run

QEMU = os.environ.get("QEMU", "qemu-system-x86_64")
PATIENCE = 30.0
"""Seconds for what takes milliseconds on an idle machine."""
SLEEPY_BIOS = bytes(0xFFF0) + b"\xfa\xf4\xeb\xfd" + bytes(12)
"""At the reset vector: cli, hlt, and hlt again.  The machine runs, which matters to QEMU, and takes no time."""
OURS = "pybackup-"
"""What names of nodes, jobs and exports of the program begin with."""


class Refused(Exception):
    """QEMU answered a command with an error."""


class Qmp:
    """The lab's own monitor; knows nothing of the program's."""

    def __init__(self, path: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(PATIENCE)
        self._connection.connect(str(path))
        self._lines = self._connection.makefile("rwb")
        self._lock = threading.Lock()
        self.events: list[dict[str, Any]] = []
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Execute a command; underscores in the names of arguments are QMP's dashes."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        with self._lock:
            self._lines.write(json.dumps({"execute": command, "arguments": given}).encode() + b"\n")
            self._lines.flush()
            while True:
                line = self._lines.readline()
                if not line:
                    raise EOFError(command)
                said = json.loads(line)
                if "event" in said:
                    self.events.append(said)
                elif "error" in said:
                    raise Refused(f"{command}: {said['error']['desc']}")
                else:
                    return said["return"]

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


@dataclass
class Disk:
    """A disk: the node `name`, the device `dev-NAME` on it, its image, and what it holds."""

    name: str
    image: Path
    model: bytearray
    format: str = "qcow2"
    node: str = ""
    """The node of the image's format; another name than the disk's after a restart by that name."""

    def __post_init__(self) -> None:
        self.node = self.node or self.name

    @property
    def device(self) -> str:
        return f"dev-{self.name}"


NOTES = ("pybackup: note: removed ", "pybackup: note: the guest's file systems were frozen for ")
"""What a run may say that goes well."""

Held = dict[str, bytes]
"""Content by disk, at one instant."""


class Machine:
    """A machine that runs from `start` on; `qmp` is the socket for the program, `monitor` is the lab's."""

    iothread = False
    """Do the disks have an iothread?  Then HMP's qemu-io cannot play the guest: QEMU 7.2 aborts at some of it."""
    user: int | None = None
    """The user that QEMU runs as, with no right but its own; None: ours."""
    werror = "auto"
    """What the devices do when a write fails; QEMU's own way is to stop the guest where there is no space."""
    more: Sequence[str] = ()
    """Arguments of QEMU's beside those for the disks."""
    awaited = False
    """Does it wait, when it is started, for another one to be migrated to it?"""

    def __init__(self, folder: Path, *disks: Disk) -> None:
        self.folder = folder
        self.disks = {disk.name: disk for disk in disks}
        # Names of unix sockets have at most 107 bytes, and those of pytest's folders are long.
        self.place = Path(tempfile.mkdtemp(prefix="live-", dir="/tmp"))
        self.qmp = self.place / "qmp"
        self.log = self.place / "log"
        """What HMP's qemu-io says."""
        self.errors = self.place / "errors"
        """What QEMU complains of, of NBD clients for example."""

    @classmethod
    def of(cls, folder: Path, *names: str, size: int = 4 * MIB) -> Machine:
        """Of new qcow2 images with a little data in them."""
        images = [make_image(folder / f"{name}.qcow2", size) for name in names]
        return cls(folder, *(Disk(name, image, bytearray(size)) for name, image in zip(names, images, strict=True)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "monitor"):
            self.process.kill()
            self._gone()
        shutil.rmtree(self.place, ignore_errors=True)

    # Life and death

    @property
    def gate(self) -> str:
        """Where another machine comes in."""
        return f"unix:{self.place}/gate"

    def migrate(self, to: Machine) -> str:
        """Migrate to a machine that awaits it; how that ends."""
        self.monitor("migrate", uri=to.gate)
        ends = {"completed", "failed", "cancelled"}
        wait_until(lambda: self.monitor("query-migrate").get("status") in ends, "end of the migration")
        return str(self.monitor("query-migrate")["status"])

    @property
    def running(self) -> bool:
        return hasattr(self, "process") and self.process.poll() is None

    def start(self) -> Self:
        """Start QEMU on the images."""
        assert not self.running
        sockets = [self.place / "lab", self.qmp]
        bios = self.place / "bios"
        bios.write_bytes(SLEEPY_BIOS)
        # stdbuf: what HMP's qemu-io says goes to standard output; setpriv: no QEMU is left when the tests are killed.
        command: list[str | Path] = ["setpriv", "--pdeathsig", "KILL"]
        if self.user is not None:
            command += [f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups"]
            for path in (self.place, *(disk.image for disk in self.disks.values())):
                os.chown(path, self.user, self.user)
        command += ["stdbuf", "-oL", QEMU]
        command += ["-machine", "q35", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"]
        command += ["-bios", bios]
        for address in sockets:
            address.unlink(missing_ok=True)
            command += ["-qmp", f"unix:{address},server=on,wait=off"]
        if self.iothread:
            command += ["-object", "iothread,id=iothread0", "-device", "virtio-scsi-pci,iothread=iothread0"]
        else:
            command += ["-device", "virtio-scsi-pci"]
        if self.awaited:
            command += ["-incoming", self.gate]
        for disk in self.disks.values():
            command += ["-blockdev", json.dumps(blockdev(disk))]
            command += ["-device", f"scsi-hd,drive={disk.node},id={disk.device},werror={self.werror}"]
        command += self.more
        with self.log.open("wb") as log, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=errors)
        self.said = 0
        wait_until(lambda: all(address.exists() for address in sockets) or not self.running, "QEMU's sockets")
        assert self.running, self.errors.read_text()
        self.monitor = Qmp(sockets[0])
        return self

    def quit(self) -> None:
        """End as after a guest's poweroff: the bitmaps are stored.  Then each image holds what its model says."""
        with suppress(EOFError, ConnectionError):
            self.monitor("quit")
        self._gone()
        self.require_true_models()

    def kill(self) -> None:
        """SIGKILL, after a flush: what the guest wrote is there, the bitmaps are not."""
        self.flush()
        self.process.kill()
        self._gone()

    def restart(self) -> None:
        self.quit()
        self.start()

    def crash(self) -> None:
        self.kill()
        self.start()

    def _gone(self) -> None:
        self.process.wait(PATIENCE)
        self.monitor.close()

    # The guest

    def guest(self, name: str, command: str) -> None:
        """A qemu-io command through the guest's device."""
        path = f"/machine/peripheral/{self.disks[name].device}"
        answer = self.monitor("human-monitor-command", command_line=f'qemu-io -d {path} "{command}"')
        with self.log.open("rb") as log:
            log.seek(self.said)
            said = log.read()
        self.said += len(said)
        if answer or b"failed" in said.replace(b"option negotiation failed", b""):  # that is of an NBD client
            raise OSError(f"{name}: {command}: {answer}{said.decode()}")

    def write(self, name: str, offset: int, length: int, pattern: int) -> None:
        """Write `length` bytes of the value `pattern`."""
        self.guest(name, f"write -q -P {pattern} {offset} {length}")
        self.disks[name].model[offset : offset + length] = bytes([pattern]) * length

    def zero(self, name: str, offset: int, length: int, *, discard: bool = False) -> None:
        """
        Write zeroes without data, or discard whole clusters.

        QEMU drops a discard while a backup's filter lies on the disk: it is a hint.
        """
        self.guest(name, f"{'discard' if discard else 'write -z'} -q {offset} {length}")
        self.disks[name].model[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        for name in self.disks:
            self.guest(name, "flush")

    def resize(self, name: str, size: int) -> None:
        """What grows is zero; but after a shrink to a part of a cluster see `learn`."""
        self.monitor("block_resize", node_name=self.disks[name].node, size=size)
        model = self.disks[name].model
        del model[size:]
        model.extend(bytes(size - len(model)))

    def learn(self, name: str) -> None:
        """Take for the model what qemu-img reads: where QEMU decides what a disk holds (trap 28)."""
        self.flush()
        disk, raw = self.disks[name], self.folder / "learned.tmp"
        run("qemu-img", "convert", "-U", "-f", disk.format, "-O", "raw", disk.image, raw)
        disk.model[:] = raw.read_bytes()
        raw.unlink()

    def held(self) -> Held:
        """What the disks hold now."""
        return {name: bytes(disk.model) for name, disk in self.disks.items()}

    def require_true_models(self) -> None:
        """The models are what qemu-img reads from the images, which no one has open."""
        for disk in self.disks.values():
            path = self.folder / "model.tmp"
            path.write_bytes(disk.model)
            run("qemu-img", "compare", "-q", "-f", disk.format, "-F", "raw", disk.image, path)
            path.unlink()

    # Hot-plug

    def unplug(self, name: str) -> None:
        """Take a disk out of the running machine; its image is closed and its bitmaps stored."""
        disk = self.disks[name]
        self.monitor("device_del", id=disk.device)
        wait_until(lambda: self._closed(disk.node), f"the end of node {disk.node}")

    def _closed(self, node: str) -> bool:
        # The device lets go of its node a moment after its deletion.
        with suppress(Refused):
            self.monitor("blockdev-del", node_name=node)
            return True
        return False

    def plug(self, name: str) -> None:
        disk = self.disks[name]
        self.monitor("blockdev-add", **blockdev(disk))
        self.monitor("device_add", driver="scsi-hd", drive=disk.node, id=disk.device)

    # What is seen from outside

    def nodes(self) -> dict[str, Any]:
        return {node["node-name"]: node for node in self.monitor("query-named-block-nodes", flat=True)}

    def bitmaps(self, node: str) -> dict[str, Any]:
        """A node's bitmaps by name."""
        found = self.nodes()[node].get("dirty-bitmaps", [])
        return {bitmap["name"]: bitmap for bitmap in found if "name" in bitmap}

    def leftovers(self) -> list[str]:
        """All that a backup may have in QEMU but bitmaps; also an NBD server, which QEMU does not list."""
        found = [f"job {job['id']}" for job in self.monitor("query-jobs")]
        found += [f"export {export['id']}" for export in self.monitor("query-block-exports")]
        found += [f"node {name}" for name in self.nodes() if name.startswith(OURS)]
        found += [f"fdset {fdset}" for fdset in self.monitor("query-fdsets")]
        address = {"type": "unix", "data": {"path": str(self.place / "probe")}}
        try:
            self.monitor("nbd-server-start", addr=address)
            self.monitor("nbd-server-stop")
        except Refused as error:
            found.append(str(error))
        return found


def below_the_guest(machine: Machine, name: str) -> None:
    """Take an external snapshot: the guest goes on in an overlay."""
    disk = machine.disks[name]
    overlay = disk.image.with_name("top.qcow2.tmp")
    machine.monitor(
        "blockdev-snapshot-sync",
        node_name=disk.node,
        snapshot_file=str(overlay),
        snapshot_node_name=f"{name}-top",
        format="qcow2",
    )
    disk.node = f"{name}-top"


def blockdev(disk: Disk) -> dict[str, Any]:
    """The disk's node, for blockdev-add; QEMU takes its names of options with dashes or underscores."""
    driver = "host_device" if disk.image.is_block_device() else "file"
    storage = {"driver": driver, "node-name": f"{disk.node}-file", "filename": str(disk.image), "discard": "unmap"}
    return {"driver": disk.format, "node-name": disk.node, "file": storage, "discard": "unmap"}


def wait_until(done: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE} s"
        time.sleep(0.005)


# A guest that never stops writing


class Writer:
    """
    Writes numbers 0, 1, 2 ... each first to one disk and then to another, in a ring of slots, until told to stop.

    Number n is the value n // SLOTS + 1 in slot n % SLOTS, so that a disk's ring tells how many numbers it holds, and
    no two instants look alike.
    """

    SLOTS = 112
    LENGTH = 4096
    BASE = MIB
    """Where the ring begins; a slot begins at each cluster."""
    END = BASE + SLOTS * CLUSTER

    def __init__(self, machine: Machine, first: str, second: str) -> None:
        self._machine = machine
        self._names = (first, second)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.written = 0
        """Numbers that both disks have."""
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def wait_for(self, more: int) -> None:
        """Wait until so many more numbers are written."""
        wanted = self.written + more
        wait_until(lambda: self.written >= wanted or self.error, f"{more} more numbers")
        assert self.error is None, self.error

    def _write(self) -> None:
        try:
            while not self._stopping.is_set():
                assert self.written < 255 * self.SLOTS, "the ring's values are used up"
                for name in self._names:
                    slot, value = self.written % self.SLOTS, self.written // self.SLOTS + 1
                    self._machine.write(name, self.BASE + slot * CLUSTER, self.LENGTH, value)
                self.written += 1
                if self.written > 128 * self.SLOTS:
                    self._stopping.wait(0.005)  # a slow run must not use up the values
        except Exception as error:  # noqa: BLE001 - the test's thread asserts that there was none
            self.error = error

    @classmethod
    def count(cls, content: bytes) -> int:
        """How many numbers a disk's ring holds, which must be one instant of it: consecutive, none half written."""
        values = []
        for slot in range(cls.SLOTS):
            begin = cls.BASE + slot * CLUSTER
            held = content[begin : begin + cls.LENGTH]
            assert held == held[:1] * cls.LENGTH, f"slot {slot} is torn"
            values.append(held[0])
        rounds = values[-1]
        new = sum(value == rounds + 1 for value in values)
        assert values == [rounds + 1] * new + [rounds] * (cls.SLOTS - new), f"no instant of the ring: {values}"
        return rounds * cls.SLOTS + new


# The machine's nights


@dataclass
class Nights(Chained):
    """A running machine "m", its repository beside it, and what each published point must restore to."""

    of_machine = "m"
    machine: Machine
    repository: Path
    references: dict[str, Held] = field(default_factory=dict)
    options: tuple[str | Path, ...] = ()
    """Added to each backup."""

    @classmethod
    def of(cls, machine: Machine) -> Nights:
        return cls(machine, machine.folder / "repo")

    def arguments(self, wanted: str, *options: str | Path) -> list[str | Path]:
        disks = self.machine.disks.values()
        named = [word for disk in disks for word in ("--node", disk.node, "--disk", disk.name)]
        return self.bare(wanted, *named, *options)

    def bare(self, wanted: str, *options: str | Path) -> list[str | Path]:
        """Arguments without the disks."""
        given: list[str | Path] = [wanted, "--qmp", self.machine.qmp, "--machine", "m", "--bitmap", "b1"]
        return [*given, "--repo", self.repository, *self.options, *options]

    def backup(self, wanted: str, *options: str | Path) -> Result:
        """Take a backup while nobody writes; a point that it publishes must restore to what the disks hold now."""
        return self._noted(call_pybackup([*self.arguments(wanted, *options), "--json"]))

    def backup_of(self, wanted: str, *options: str | Path) -> Result:
        """The same with the disks among the options."""
        return self._noted(call_pybackup([*self.bare(wanted, *options), "--json"]))

    def _noted(self, done: Result) -> Result:
        for point in self.points() - set(self.references):
            self.references[point] = self.machine.held()
        return done

    def full(self, *options: str | Path) -> Result:
        done = self.backup("full", *options)
        assert (done.rc, done.stderr) == (0, ""), done
        return done

    def require_incremental(self, *options: str | Path) -> Result:
        """All disks are incrementals, without a word on standard error; nothing is left and all points restore."""
        assert not own_folders()
        done = self.require_making_up(*options)
        assert not done.stderr, done
        return done

    def require_making_up(self, *options: str | Path) -> Result:
        """
        The same after a run that was cut off: what it left and is removed now may be said.

        A folder of its in /tmp may stay, with no more than a socket in it: nothing names it any more.
        """
        done = self.backup("incremental", *options)
        assert (done.rc, kinds(done)) == (0, {"incremental"}), done
        assert all(line.startswith(NOTES) for line in done.stderr.splitlines()), done
        remove_empty_folders()
        self.require_sound()
        return done

    def require_fallback(self, *reasons: str, only: Sequence[str] | None = None) -> Result:
        """
        The disks (or `only` these) are rescans, each for one of the reasons, and say so; then they are incrementals.

        First --no-fallback must refuse for such a reason, and publish nothing.
        """
        before = self.points()
        refused = self.backup("incremental", "--no-fallback")
        assert refused.rc == 14, refused
        assert any(reason in refused.machine["error"]["message"] for reason in reasons), refused
        assert self.points() == before
        self.require_nothing_left()
        done = self.require_rescans(*reasons, only=only)
        self.require_incremental()
        return done

    def require_rescans(self, *reasons: str, only: Sequence[str] | None = None) -> Result:
        """The disks (or `only` these) are rescans, each for one of the reasons, and say so."""
        done = self.backup("incremental")
        assert done.rc == 3, done
        for disk in done.machine["disks"]:
            fell_back = only is None or disk["name"] in only
            assert (disk["kind"], disk["rescan"]) == ("incremental", fell_back), done
            if fell_back:
                assert any(reason in disk["reason"] for reason in reasons), done
                assert disk["reason"].removeprefix("rescan: ") in done.stderr
        self.require_nothing_left()
        return done

    def require_cleaned(self) -> None:
        """`clean` succeeds, leaves nothing in QEMU, and keeps what continues the chain."""
        done = call_pybackup(["clean", "--qmp", self.machine.qmp, "--repo", self.repository])
        assert done.rc == 0, done
        remove_empty_folders()
        self.require_nothing_left()

    def require_sound(self) -> None:
        self.require_nothing_left()
        self.require_restored()

    def require_nothing_left(self) -> None:
        """No job, export, node, server or descriptor in QEMU; no file of a run beside the images or in /tmp."""
        if self.machine.running:
            assert not (found := self.machine.leftovers()), found
        left = {path.name for path in self.machine.folder.iterdir()} - {self.repository.name}
        images = {disk.image.name for disk in self.machine.disks.values()}
        assert not (found := {name for name in left if not name.endswith((".tmp", ".yaml"))} - images), found
        assert not own_folders(), own_folders()

    def require_restored(self) -> None:
        """Each published point restores to what the disks held at its instant."""
        assert self.points() == set(self.references)
        for point, held in self.references.items():
            self.require_point(point, held)
        check_repository(self.repository)

    def require_point(self, point: str, held: Held) -> None:
        expected = self.machine.folder / "expected.tmp.raw"
        for name in disks_of(self.repository, point):
            expected.write_bytes(held[name])
            restore_and_cmp(self.repository, f"m/{point}", expected, disk=name)
            expected.unlink()

    def points(self) -> set[str]:
        return {path.stem for path in self.repository.glob("m/*.json")}

    def require_own_bitmap_alone(self) -> None:
        """Each disk has the bitmap of the newest point and no other of ours."""
        for disk in self.machine.disks.values():
            found = [name for name in self.machine.bitmaps(disk.node) if name.startswith("b1.")]
            assert found == [self.own_bitmap]


def own_folders() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"{OURS}*"))


def remove_empty_folders() -> None:
    """Remove the program's folders, which must not hold more than a socket."""
    for folder in own_folders():
        for path in folder.iterdir():
            assert path.is_socket(), path
            path.unlink()
        folder.rmdir()


def kinds(done: Result) -> set[str]:
    return {disk["kind"] for disk in done.machine["disks"]}


def disks_of(repository: Path, point: str) -> list[str]:
    manifest = json.loads((repository / "m" / f"{point}.json").read_bytes())
    return [disk["name"] for disk in manifest["disks"]]


@contextmanager
def private_tmp(place: Path) -> Iterator[Path]:
    """Let this process, and those that it starts, have their temporary files where the test can look for them."""
    folder = place / "t"
    folder.mkdir(exist_ok=True)
    before, os.environ["TMPDIR"], tempfile.tempdir = os.environ.get("TMPDIR"), str(folder), str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = None
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before


# A run that is stopped at a step

DRIVER = r"""
import importlib, json, os, sys

spec, *sys.argv[1:] = sys.argv[1:]
spec = json.loads(spec)
calls = 0

def strike():
    global calls
    calls += 1
    if calls == spec["nth"]:
        os.kill(os.getpid(), spec["signal"])

def wrap(module, path, name_of):
    *parents, name = path.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)

    def wrapped(*args, **keywords):
        called = name_of(args)
        if "record" in spec:
            with open(spec["record"], "a") as record:
                print(called, file=record)
        struck = spec["step"] in {called, "*"}
        if struck and spec["when"] == "before":
            strike()
        try:
            return original(*args, **keywords)
        finally:  # QEMU's refusal is an answer too
            if struck and spec["when"] == "after":
                strike()

    setattr(owner, name, wrapped)

if spec["module"]:
    wrap(spec["module"], spec["step"], lambda args: spec["step"])
else:
    wrap("backup.qmp.monitor", "Monitor.command", lambda args: args[1])
    wrap("backup.qmp.monitor", "Monitor.pass_fd", lambda args: args[2])
from backup.cli.app import main
main()
"""


@dataclass(frozen=True, slots=True)
class Step:
    """
    Where a run is struck: before or after the nth time of a QMP command ("*": any), or of a function of a `module`.

    `published`: the point exists by then.
    """

    name: str
    when: str
    nth: int = 1
    published: bool = False
    module: str = ""

    def __str__(self) -> str:
        return f"{self.when} {self.name} {self.nth}"

    def command(self, number: int, arguments: Sequence[str | Path]) -> list[str]:
        spec = {"module": self.module, "step": self.name, "when": self.when, "nth": self.nth, "signal": int(number)}
        return [sys.executable, "-c", DRIVER, json.dumps(spec), *map(str, arguments)]


def commands_of(arguments: Sequence[str | Path], record: Path) -> list[str]:
    """The QMP commands of a run that nothing strikes, in order."""
    spec = {"module": "", "step": "", "when": "", "nth": 0, "signal": 0, "record": str(record)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(spec), *map(str, arguments)], check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return record.read_text().split()


@contextmanager
def lost_in_the_handshake(kind: type | None = None, end: str = "_remove") -> Iterator[None]:
    """
    The instant is lost when a disk is being opened: a client is connected, and has said nothing yet.

    `kind` opens the disks (QMP's Instant), and its method `end` ends the instant.
    """
    from backup.errors import SourceError
    from backup.qmp.clients import Clients
    from backup.qmp.instant import Instant

    opener: Any = kind or Instant
    opened, dial, instants = opener.open, Clients.dial, list[Any]()

    def open_(self: Any, number: int) -> Any:
        instants.append(self)
        return opened(self, number)

    def dial_and_lose(self: Clients) -> int:
        fd = dial(self)
        instants[0].lost = SourceError("lost in the handshake", hint="a test")
        getattr(instants[0], end)()
        return fd

    opener.open, Clients.dial = open_, dial_and_lose  # type: ignore[method-assign]
    try:
        yield
    finally:
        opener.open, Clients.dial = opened, dial  # type: ignore[method-assign]


@contextmanager
def stopped_at(step: Step, arguments: Sequence[str | Path]) -> Iterator[subprocess.Popen[str]]:
    """A run that stands still at the step (SIGSTOP); killed at the end if it is still there."""
    init(arguments)
    # Files and no pipes: what a run leaves behind would keep a pipe open.
    command = step.command(signal.SIGSTOP, arguments)
    init(command)
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=said, stderr=said, text=True) as process,
    ):
        try:
            wait_until(lambda: stopped(process), f"halt {step}")
            if process.poll() is not None:
                said.seek(0)
                raise AssertionError(f"it did not come to {step}: {said.read()}")
            yield process
        finally:
            process.kill()


def stopped(process: subprocess.Popen[str]) -> bool:
    """Does it stand still, or has it ended?"""
    found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG)
    return found is not None
