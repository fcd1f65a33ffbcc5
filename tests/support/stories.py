"""
Stories: machines with real images that guests write to, the real commands as processes, and a model of what each point
must hold.

The model is a raw copy of the source, made by qemu-img (or cp, of a raw image) right before each backup.  Which points
must stay is decided here again, from restic's manual.  A command is run in a process of its own, forked from this one
(a start of Python takes longer than the command), and may be struck: killed or refused a system call by strace, or
killed at some moment.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from lab import bitmaps, init, run
from places import machine_at

import backup.engine.merge
import backup.operations.audit
import backup.operations.backup
import backup.operations.copy
import backup.operations.prune
import backup.operations.restore
import backup.operations.verify
from backup.cli import app
from backup.cli.output import Quiet
from backup.planning.retention import DatedPoint, firsts_after_jumps

KIB = 1 << 10
EPOCH = datetime(2026, 1, 1, 0, 30, tzinfo=UTC)
DATA_CALLS = ("pwrite64", "write", "fsync", "ftruncate")
NAME_CALLS = ("rename", "unlink", "openat")
CALLS = (*NAME_CALLS, *DATA_CALLS)
"""System calls by which the program changes a repository, and those by which it begins to: each is a step."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code, or minus the signal that ended it."""

    args: tuple[str, ...]
    rc: int
    stdout: str
    stderr: str
    struck: bool = False
    calls: Mapping[str, int] = field(default_factory=dict)

    def require(self, *codes: int) -> Ended:
        assert self.rc in codes, f"{' '.join(self.args)}: exit {self.rc}\n{self.stdout}{self.stderr}"
        return self

    @property
    def document(self):
        return json.loads(self.stdout)


@dataclass(frozen=True, slots=True)
class Strike:
    """
    What strace does to the nth call of one kind in a thread: `effect` is strace's (signal=SIGKILL, error=ENOSPC).
    """

    call: str
    nth: int
    effect: str = "signal=SIGKILL"
    lasting: bool = False
    alone: bool = False
    """Whether only the process's first thread is struck, and no program that it starts."""

    def __str__(self) -> str:
        return f"{self.effect} at {self.call} {self.nth}{'+' if self.lasting else ''}"

    def options(self) -> list[str]:
        when = f"{self.nth}{'+' if self.lasting else ''}"
        return ["-e", f"trace={self.call}", "-e", f"inject={self.call}:{self.effect}:when={when}"]


def spawn(args: Sequence[str], output: tuple[int, int], *, stopped: bool, clock: datetime | None) -> int:
    """
    Start a command in a process of its own; with `stopped` it waits for SIGCONT before it begins.
    """
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()  # qemu-nbd and the like are in its session
        os.dup2(output[0], 1)
        os.dup2(output[1], 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["pybackup", *args]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if clock is not None:
            backup.operations.backup.datetime = _Clock.of(clock)
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        app.main()
    finally:
        os._exit(99)


class _Clock(datetime):
    """A host's clock that stands days away from ours."""

    moment: datetime

    @classmethod
    def of(cls, moment: datetime) -> type[_Clock]:
        return type("Clock", (cls,), {"moment": moment})

    @classmethod
    def now(cls, tz=None):
        return datetime.fromtimestamp(cls.moment.timestamp(), tz)


@contextmanager
def traced(pid: int, strike: Strike, log: Path) -> Iterator[None]:
    """strace holds a stopped process and lets it go on."""
    command = ["strace", *([] if strike.alone else ["-f"]), "-o", str(log), *strike.options(), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        try:
            said = tracer.stderr.readline()
            assert "attached" in said, said
            os.kill(pid, signal.SIGCONT)
            yield
            tracer.communicate(timeout=20)
        finally:
            tracer.kill()


def command(
    args: Sequence[str | Path],
    *,
    clock: datetime | None = None,
    strike: Strike | None = None,
    kill_after: float | None = None,
    while_stopped: Callable[[], object] | None = None,
) -> Ended:
    """Run a command to its end, or until it is struck; `while_stopped` where what strikes is SIGSTOP."""
    words = tuple(str(arg) for arg in args)
    init(words)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.NamedTemporaryFile() as log:
        pid = spawn(words, (out.fileno(), err.fileno()), stopped=strike is not None, clock=clock)
        try:
            if strike is not None:
                os.waitpid(pid, os.WUNTRACED)  # it waits for strace
                with traced(pid, strike, Path(log.name)):
                    status = _ended(pid, while_stopped)
            else:
                status = _ended(pid, kill_after=kill_after)
        except BaseException:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise
        out.seek(0)
        err.seek(0)
        seen = log.read()
        struck = b"INJECTED" in seen or b"killed by SIGKILL" in seen or b"--- SIGTERM" in seen or status < 0
        calls = call_counts(seen.decode(errors="replace"))
        ended = Ended(words, status, out.read().decode(), err.read().decode(), struck, calls)
    assert "Traceback" not in ended.stderr, ended
    assert ended.rc != 99, ended
    return ended


@contextmanager
def started(args: Sequence[str]) -> Iterator[IO[str]]:
    """A command that goes on until the block ends; what it says."""
    reading, writing = os.pipe()
    pid = spawn(args, (writing, writing), stopped=False, clock=None)
    os.close(writing)
    try:
        with open(reading, encoding="utf-8") as said:
            yield said
    finally:
        os.kill(pid, signal.SIGTERM)
        _ended(pid)


@contextmanager
def apart(body: Callable[[], None]) -> Iterator[None]:
    """Call `body` in a process of its own, which ends within the block or soon after it; its failure is ours."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            code = 1
            try:
                os.setsid()
                body()
                code = 0
            except BaseException:  # noqa: BLE001 - told to the parent
                traceback.print_exc(file=said)
                said.flush()
            finally:
                os._exit(code)
        try:
            yield
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except BaseException:
            os.killpg(child, signal.SIGKILL)
            raise
        said.seek(0)
        assert status == 0, said.read()


def alone(mounted: Path, body: Callable[[], None], size: str = "40M") -> None:
    """Call `body` in a process and a name space of its own, where a small file system is mounted."""

    def mount_first() -> None:
        _mount(mounted, size)
        body()

    try:
        with apart(mount_first):
            pass
    finally:
        if os.path.ismount(mounted):  # in a chroot, see _mount
            run("umount", "--lazy", mounted)


def _mount(folder: Path, size: str) -> None:
    """Mount a small file system that only this process and its children see, but for chroots below a shared mount."""
    new_name_space = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(new_name_space):
        raise OSError(ctypes.get_errno(), "unshare")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    if any(line.split()[4] == "/" for line in mounts):
        run("mount", "--make-rprivate", "/")
    # In a chroot "/" is often no mount point, and then what it lies on can be made private from outside only.
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder)


def _ended(
    pid: int, while_stopped: Callable[[], object] | None = None, kill_after: float | None = None, limit: float = 60
) -> int:
    """Wait for a process; its exit code, or minus the signal that ended it."""
    began = time.monotonic()
    while (lasted := time.monotonic() - began) < limit:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if found and os.WIFSTOPPED(status):
            if while_stopped is not None:
                while_stopped()
            os.kill(pid, signal.SIGCONT)
        elif found:
            return os.waitstatus_to_exitcode(status)
        if kill_after is not None and lasted > kill_after:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    raise AssertionError("a command hangs")


def may_trace() -> str | None:
    """Why strace is of no use here; None: it is."""
    if shutil.which("strace") is None:
        return "there is no strace"
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return f"strace may not trace: {done.stderr.strip()}" if done.returncode else None


# Which points stay: the model's own opinion


@dataclass(frozen=True, slots=True)
class Kept:
    """What the model knows of a point."""

    point: str
    sequence: int
    started: datetime
    disks: frozenset[str]
    pinned: bool

    def pinned_as(self, pinned: bool) -> Kept:
        return replace(self, pinned=pinned)


PERIODS: Mapping[str, Callable[[Kept], object]] = {
    "last": lambda point: point.sequence,
    "hourly": lambda point: (point.started.date(), point.started.hour),
    "daily": lambda point: point.started.date(),
    "weekly": lambda point: point.started.isocalendar()[:2],
    "monthly": lambda point: (point.started.year, point.started.month),
    "yearly": lambda point: point.started.year,
}


def must_stay(points: Sequence[Kept], rules: Mapping[str, int], within_days: int = 0) -> set[str]:
    """By restic's words: the newest point of each of the last n periods that have one, and the oldest while fewer."""
    stay = {point.point for point in points if point.pinned}
    for disk in {disk for point in points for disk in point.disks}:
        held = sorted((point for point in points if disk in point.disks), key=lambda point: -point.sequence)
        stay.add(held[0].point)
        newest = held[0].started
        stay |= {point.point for point in held if within_days and point.started > newest - timedelta(days=within_days)}
        for rule, number in rules.items():
            stay |= _of_rule(held, rule, number)
        for jump in firsts_after_jumps(DatedPoint(p.point, p.sequence, p.started, (disk,), p.pinned) for p in held):
            before = [point for point in held if point.sequence < jump.sequence]
            for rule, number in rules.items():
                stay |= _of_rule(before, rule, number) if rule != "last" else set()
            if within_days:
                start = before[0].started - timedelta(days=within_days)
                stay |= {point.point for point in before if point.started > start}
    return stay


def _of_rule(held: Sequence[Kept], rule: str, number: int) -> set[str]:
    """What one rule keeps of points, newest first."""
    runs: list[Kept] = []
    for point in held:
        if not runs or PERIODS[rule](point) != PERIODS[rule](runs[-1]):
            runs.append(point)
    oldest = {held[-1].point} if held and len(runs) < number else set()
    return {point.point for point in runs[:number]} | oldest


# A machine's story


@dataclass
class Image:
    """A disk's image, and whether it was made shorter and then longer since its last backup (which no bitmap sees)."""

    path: Path
    format: str
    size: int
    shrunk: bool = False
    regrown: bool = False

    def copy_to(self, target: Path) -> Path:
        """The disk as it is now."""
        if self.format == "raw":
            shutil.copyfile(self.path, target)
        else:
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.path, target)
        return target

    def play(self, *commands: str) -> None:
        """Play the guest, with qemu-io's words."""
        words = [word for text in commands for word in ("-c", text)]
        said = run("qemu-io", "-d", "unmap", "-f", self.format, *words, self.path)
        assert "failed" not in said, said

    @property
    def resizable(self) -> bool:
        """A bitmap that was just being written when its program was killed forbids it (until the next backup)."""
        return self.format == "raw" or all("in-use" not in flags for flags in bitmaps(self.path).values())

    def resize(self, size: int) -> None:
        """Change the size, as the machine's owner."""
        run("qemu-img", "resize", "-q", "-f", self.format, "--shrink", self.path, str(size))
        self.regrown |= self.shrunk and size > self.size
        self.shrunk |= size < self.size
        self.size = size

    def grow_back(self, size: int) -> None:
        """Get longer again, after a backup has seen the shorter disk."""
        self.shrunk = False
        self.resize(size)


@dataclass
class Story:
    """A machine m, its images, its repository, and what each point must hold (files `known/POINT.DISK.raw`)."""

    folder: Path
    rng: random.Random
    images: dict[str, Image]
    known: dict[str, Kept] = field(default_factory=dict)
    ever: dict[str, Kept] = field(default_factory=dict)
    place: str = "repo"
    now: datetime = EPOCH
    told: list[str] = field(default_factory=list)
    compression: str = "zstd:1"

    @classmethod
    def of(
        cls, folder: Path, seed: object, *, disks: int | None = None, cluster: str | None = None, place: str = "repo"
    ) -> Story:
        rng = random.Random(f"story {seed}")
        (folder / "known").mkdir(parents=True)
        images = {}
        for name in ("vda", "vdb")[: disks or rng.choice([1, 1, 2])]:
            kind = rng.choice(["qcow2"] * 5 + ["raw"]) if disks is None else "qcow2"
            size = rng.randint(300, 2000) * KIB
            options = ["-o", f"cluster_size={rng.choice([4, 64, 64, 128])}K"] if kind == "qcow2" else []
            run("qemu-img", "create", "-q", "-f", kind, *options, folder / f"{name}.img", str(size))
            images[name] = Image(folder / f"{name}.img", kind, size)
        story = cls(folder, rng, images, place=place, compression=rng.choice(["zstd:1", "zstd:1", "none", "zstd:-3"]))
        story._configure(cluster or rng.choice(["4K", "16K", "64K", "64K"]), 100 if disks else rng.choice([3, 5, 100]))
        return story

    def _configure(self, cluster: str, max_chain: int) -> None:
        disks = "".join(
            f"      {name}: {{image: {image.path.name}, format: {image.format}}}\n"
            for name, image in self.images.items()
        )
        self.config.write_text(
            f"repository: {self.place}\nbitmap: b1\ncluster_size: {cluster}\nmax_chain: {max_chain}\n"
            f"compression: {self.compression}\nworkers: 2\nmachines:\n  m:\n    disks:\n{disks}"
        )
        self.told.append(f"cluster {cluster}, max_chain {max_chain}, {self.compression}")

    @property
    def config(self) -> Path:
        return self.folder / "c.yaml"

    @property
    def repository(self) -> Path:
        return self.folder / self.place

    def at(self, place: str) -> Story:
        """The same machine's points in another repository."""
        return replace(self, place=place)

    @property
    def machine(self) -> Path:
        return self.repository / "m"

    def run(
        self,
        *args: str | Path,
        strike: Strike | None = None,
        kill_after: float | None = None,
        while_stopped: Callable[[], object] | None = None,
    ) -> Ended:
        """Run a command of the machine's, now."""
        words = ["--config", self.config, *args]
        how = {"strike": strike, "kill_after": kill_after, "while_stopped": while_stopped}
        ended = command(words, clock=self.now, **how)
        self.told.append(f"{' '.join(map(str, args))}: {strike or ''} {ended.rc}")
        return ended

    def copied(self, folder: Path) -> Story:
        """The whole of it in another folder, made anew where there is one; what points hold is shared."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in (self.config, *(image.path for image in self.images.values())):
            shutil.copy(path, folder)
        if self.repository.exists():
            shutil.copytree(self.repository, folder / self.place)
        (folder / "known").symlink_to((self.folder / "known").resolve())
        images = {name: replace(image, path=folder / image.path.name) for name, image in self.images.items()}
        known, ever = dict(self.known), dict(self.ever)
        return replace(self, folder=folder, images=images, known=known, ever=ever, told=list(self.told))

    def moved_to(self, repository: Path) -> Story:
        """With its repository elsewhere."""
        shutil.move(self.repository, repository)
        text = self.config.read_text()
        self.config.write_text(text.replace(f"repository: {self.place}\n", f"repository: {repository}\n"))
        return replace(self, place=str(repository))

    # What guests and owners do

    def live(self) -> None:
        """A day of the machine's life: writes, zeroes, discards, and now and then another size."""
        rng = self.rng
        for image in self.images.values():
            if rng.random() < 0.15 and image.resizable:
                size = min(max(100 * KIB, image.size + rng.randint(-1200, 1200) * rng.choice([512, 1024])), 3000 * KIB)
                image.resize(size)
            if rng.random() < 0.9:
                image.play(*(self._deed(image.size) for _ in range(rng.randint(1, 5))))

    def _deed(self, size: int) -> str:
        rng = self.rng
        length = min(rng.choice([512, 4096, 65536, 300 * 512, 700 * 1024]), size)
        start = rng.randint(0, (size - length) // 512) * 512
        word = rng.choice(["write -P {}", "write -P {}", "write -P {}", "write -z", "write -zu", "discard"])
        return f"{word.format(rng.randint(1, 255))} {start} {length}"

    # Backups

    def back_up(self, wanted: str, disks: Sequence[str] = (), **how: object) -> Ended:
        """Take a point of all disks, or of these; afterwards it is known, if it came into being."""
        self.now += timedelta(minutes=self.rng.choice([7, 55, 60 * 9, 60 * 25, 60 * 24 * 6]))
        chosen = list(disks) or list(self.images)
        for name in chosen:
            self.images[name].copy_to(self.folder / "known" / f"next.{name}.raw")
        ended = self.run(wanted, *self._words(disks), **how)
        self.require_nobody()
        new = self.listed() - set(self.known)
        assert len(new) <= 1, new
        if ended.rc in {0, 3}:
            assert new, ended
        for point in new:
            document = self.manifest(point)
            assert {disk["name"] for disk in document["disks"]} == set(chosen)
            kept = Kept(point, document["sequence"], self.now, frozenset(chosen), pinned=False)
            self.known[point] = self.ever[point] = kept
            for name in chosen:
                os.rename(self.folder / "known" / f"next.{name}.raw", self.folder / "known" / f"{point}.{name}.raw")
                self.images[name].shrunk = self.images[name].regrown = False
        return ended

    def take(self, disks: Sequence[str] = (), **how: object) -> Ended:
        """An incremental; a rescan where no bitmap could see what happened."""
        lies = any(self.images[name].regrown for name in disks or self.images)
        return self.back_up("rescan" if lies else "incremental", disks, **how)

    def _words(self, disks: Sequence[str]) -> list[str | Path]:
        """A machine of which only some disks are backed up is named by its images."""
        if not disks:
            return ["m"]
        words: list[str | Path] = ["--machine", "m"]
        for name in disks:
            image = self.images[name]
            words += ["--image", image.path, "--disk", name, "--image-format", image.format]
        return words

    def prune(self, *options: str, **how: object) -> Ended:
        return self.run("prune", "m", "--json", *options, **how)

    def forget(self, stay: set[str]) -> None:
        """Points that are gone are gone."""
        self.known = {point: kept for point, kept in self.known.items() if point in stay}

    # What must be

    def listed(self) -> set[str]:
        """The points that `list` shows."""
        if not self.repository.exists():
            return set()
        ended = command(["list", "--repo", self.repository, "--json"])
        if ended.rc == 10:
            return set()
        return {point["point"] for point in ended.require(0).document}

    def manifest(self, point: str) -> dict:
        return json.loads((self.machine / f"{point}.json").read_bytes())

    def state(self) -> tuple[object, ...]:
        """What a run that was cut off left: the manifests' bytes, and the files' names and what they build on."""
        found: list[object] = []
        for name in sorted(names(self.machine) - {"lock", "verified"}):
            path = self.machine / name
            content = path.read_bytes() if name.endswith(".json") else path.read_bytes()[:256]
            found.append((name, hashlib.sha256(content).hexdigest(), name.endswith(".new") and path.stat().st_size))
        return tuple(found)

    def awaited(self, point: str, disk: str) -> Path:
        """What a point holds; its file gets its name right after the point, when the backup's process has ended."""
        path = self.folder / "known" / f"{point}.{disk}.raw"
        until = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < until, path
            time.sleep(0.01)
        return path

    def require_nobody(self) -> None:
        """No program that a killed run started has an image any more."""
        names = [str(image.path) for image in self.images.values()]
        until = time.monotonic() + 20
        while found := [line for line in _command_lines() if any(name in line for name in names)]:
            assert time.monotonic() < until, found
            time.sleep(0.01)

    def require_whole(self, *, deep: bool = False) -> set[str]:
        """
        Each point that `list` shows is known and restores to what it held, by pybackup and by QEMU; every data file is
        sound, and `verify` says so as well.  Nobody writes by looking.
        """
        before = names(self.machine)
        listed = self.listed()
        assert listed <= set(self.known), "a point came from nowhere"
        for point in listed:
            for disk in self.known[point].disks:
                expected = self.folder / "known" / f"{point}.{disk}.raw"
                require_converted(self.machine, f"{disk}.{point}.qcow2", expected)
                self._require_restored(point, disk, expected)
        if listed:
            words = ["verify", "m", "--repo", self.repository, *(["--deep"] if deep else [])]
            command(words).require(0)
        assert names(self.machine) - {"verified"} == before - {"verified"}
        return listed

    def _require_restored(self, point: str, disk: str, expected: Path) -> None:
        target = self.folder / "restored.raw"
        backup.operations.restore.restore_disk(
            machine_at(self.machine),
            point,
            disk,
            str(target),
            image_format="raw",
            force=True,
            workers=1,
            progress=Quiet(),
        )
        assert same(target, expected), f"pybackup restores {point} {disk} to something else"

    def stored(self) -> int:
        """Bytes of the data files that there are."""
        return sum(path.stat().st_size for path in self.machine.glob("*.qcow2"))

    def require_tidy(self) -> None:
        """No file lies about that no manifest names; each has the length that its manifest says, and no exchange."""
        named = {"lock", "verified"}
        for path in self.machine.glob("*.json"):
            named.add(path.name)
            for disk in json.loads(path.read_bytes())["disks"]:
                assert disk["replaces"] is None
                named.update((disk["data"]["file"], disk["data"]["digests"]))
                assert (self.machine / disk["data"]["file"]).stat().st_size == disk["data"]["size"]
        assert names(self.machine) | {"verified"} == named | {"verified"}


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.exists() else set()


def same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if line.startswith(("qemu", "/usr/bin/qemu", "setpriv")):
            yield line


def require_converted(folder: Path, name: str, expected: Path) -> None:
    """
    QEMU reads in a data file and its own backing chain what was backed up, and finds neither an error nor a leak.

    What QEMU says depends on nothing but these files' bytes, so it is asked once.
    """
    _ask_qemu(folder, name, _chain_of(folder, name), expected.resolve())


_asked: set[tuple[tuple[str, ...], Path]] = set()


def _ask_qemu(folder: Path, name: str, chain: tuple[str, ...], expected: Path) -> None:
    if (chain, expected) in _asked:
        return
    with tempfile.NamedTemporaryFile(dir=expected.parent) as target:
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", folder / name, target.name)
        found, wanted = Path(target.name).read_bytes(), expected.read_bytes()
    assert len(found) == -(-len(wanted) // 512) * 512
    assert found[: len(wanted)] == wanted, f"qemu-img reads something else in {name}"
    assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", folder / name)
    _asked.add((chain, expected))


def _chain_of(folder: Path, name: str) -> tuple[str, ...]:
    """Digests of a data file and of what it builds on, as its heads say."""
    found = []
    while name:
        content = (folder / name).read_bytes()
        found.append(hashlib.sha256(content).hexdigest())
        offset, length = int.from_bytes(content[8:16]), int.from_bytes(content[16:20])
        name = content[offset : offset + length].decode() if offset else ""
    return tuple(found)


def call_counts(log: str) -> Mapping[str, int]:
    """Of each system call, how many one thread made at most; `log` is strace's."""
    counts: dict[tuple[str, str], int] = {}
    for match in re.finditer(r"^(\d*) *(\w+)\(", log, re.MULTILINE):
        counts[match[1], match[2]] = counts.get((match[1], match[2]), 0) + 1
    most: dict[str, int] = {}
    for (_, call), number in counts.items():
        most[call] = max(most.get(call, 0), number)
    return most
