"""
Chains made without a disk to back up: data files by the product's own maker, and what each point holds as plain bytes.

What a point holds is kept by a model of a few lines, and QEMU is asked before anything is done to a chain whether it
sees the same.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from places import create_repository, folder_of, repository_at

from backup.cli.output import Quiet
from backup.model.manifest import BitmapRecord, ByteCounts, DiskEntry, Manifest, Parent, SourceRecord, new_point_id
from backup.operations import restore as restoring
from backup.repository import data_file_writer
from backup.repository.machine import Machine


@dataclass
class History:
    """A machine's points, made one after the other; `contents` are the bytes of each disk at each point."""

    rng: random.Random
    machine: Machine
    repository: str
    cluster: int = 4096
    contents: dict[tuple[str, str], bytes] = field(default_factory=dict)
    newest: dict[str, tuple[str, DiskEntry]] = field(default_factory=dict)
    count: int = 0
    started: datetime = datetime(2026, 1, 1, 1, tzinfo=UTC)

    @classmethod
    def of(cls, folder: Path, seed: object, cluster: int | None = None) -> History:
        rng = random.Random(f"history {seed}")
        repository = create_repository(folder / "repo")
        machine = repository.machine("m")
        with machine.lock():
            pass
        return cls(rng, machine, repository.id, cluster or rng.choice([4096, 4096, 8192, 65536]))

    def copied(self, folder: Path) -> History:
        """A copy in another folder, made anew where there is one."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder_of(self.machine).parent, folder / "repo")
        return replace(self, machine=repository_at(folder / "repo").machine("m"), newest=dict(self.newest))

    def listing(self) -> str:
        """What all manifests say, as they are."""
        found = self.machine.contents(raw=True)
        assert not found.damaged
        return repr(sorted(found.manifests.items()))

    def point(self, *disks: str, full: bool = False, size: int | None = None, pinned: bool = False) -> str:
        """Take a point of these disks, a day after the one before."""
        self.count += 1
        name = new_point_id(self.started + timedelta(days=self.count), f"{self.count:08x}")
        entries = []
        for disk in disks or ("vda",):
            entry, content = self._disk(disk, name, full=full, size=size)
            entries.append(entry)
            self.contents[name, disk] = content
            self.newest[disk] = (name, entry)
        when = f"{self.started + timedelta(days=self.count):%Y-%m-%dT%H:%M:%SZ}"
        self.machine.publish(
            Manifest(name, self.count, "m", self.repository, when, when, "test", tuple(entries), pinned)
        )
        return name

    def any_size(self) -> int:
        return self.rng.randint(1, 40) * self.cluster + self.rng.choice([0, 0, 512, 1024, self.cluster // 2, 1, 700])

    def any_level(self) -> int | None:
        return self.rng.choice([None, 1, 1, -3])

    def _disk(self, disk: str, point: str, *, full: bool, size: int | None) -> tuple[DiskEntry, bytes]:
        before = None if full else self.newest.get(disk)
        old = b"" if before is None else self.contents[before[0], disk]
        if size is None:
            size = len(old) if old and self.rng.random() < 0.6 else self.any_size()
        # QEMU sees a parent rounded up to a sector, so that one that grows from within a sector holds that cluster, as
        # a real backup does.
        must = {len(old) // self.cluster} if len(old) % 512 and size > len(old) else set()
        content = bytearray(old[:size].ljust(size, b"\0"))
        parent = None if before is None else Parent(before[0], before[1].identity)
        level = self.any_level()
        made = data_file_writer.DataFileMaker(
            self.machine.files,
            f"{disk}.{point}",
            size=size,
            cluster_size=self.cluster,
            backing=None if before is None else before[1].data.file,
            level=level,
            written=[],
        )
        with made:
            self._fill(made, content, must, everything=before is None)
            data = made.finish("none" if level is None else f"zstd:{level}")
        entry = DiskEntry(
            name=disk,
            kind="full" if before is None else "incremental",
            reason="test",
            size=size,
            identity=self.rng.randbytes(16).hex(),
            parent=parent,
            bitmap=BitmapRecord(None, None, None, claimed=False),
            data=data,
            bytes=ByteCounts(0, 0, 0, 0, data.size),
            source=SourceRecord("image", "/x", "qcow2", "crash", None, ()),
        )
        return entry, bytes(content)

    def _fill(
        self, made: data_file_writer.DataFileMaker, content: bytearray, must: set[int], *, everything: bool
    ) -> None:
        clusters = -(-len(content) // self.cluster)
        share = self.rng.choice([0.0, 0.1, 0.5, 1.0]) if not everything else self.rng.choice([0.3, 0.9])
        import numpy as np

        for cluster in range(clusters):
            if cluster not in must and self.rng.random() >= share:
                continue
            start, end = cluster * self.cluster, min(len(content), (cluster + 1) * self.cluster)
            kind = self.rng.choice(["zero", "text", "text", "text", "noise", "noise", "nothing"])
            match kind:
                case "zero":
                    content[start:end] = bytes(end - start)
                    made.zero(cluster, 1)
                    continue
                case "text":
                    content[start:end] = (b"%d of %d." % (cluster, self.count) * self.cluster)[: end - start]
                case "noise":
                    content[start:end] = self.rng.randbytes(end - start)
                case _:
                    content[start:end] = bytes(end - start)
            made.write(np.array([cluster]), memoryview(bytes(content[start:end]).ljust(self.cluster, b"\0")))

    def manifests(self) -> dict[str, Manifest]:
        """The machine's manifests as readers get them, of which none may be damaged."""
        contents = self.machine.contents()
        assert not contents.damaged, contents.damaged
        return dict(contents.manifests)

    def require_whole(self, *, deep: bool = True) -> None:
        """Every point that there is restores to what it held, by pybackup and by QEMU, and every file is sound."""
        for point, manifest in self.manifests().items():
            for disk in manifest.disks:
                expected = self.contents[point, disk.name]
                self.require_converted(point, disk.name, expected)
                if deep:
                    self.require_restored(point, disk.name, expected)
                checked = run("qemu-img", "check", "-f", "qcow2", str(folder_of(self.machine) / disk.data.file))
                assert "No errors were found" in checked

    def require_restored(self, point: str, disk: str, expected: bytes) -> None:
        target = folder_of(self.machine).parent.parent / "restored.raw"
        restoring.restore_disk(
            self.machine, point, disk, str(target), image_format="raw", force=True, workers=1, progress=Quiet()
        )
        assert_same(target.read_bytes(), expected, f"{point} {disk} by pybackup")

    def require_converted(self, point: str, disk: str, expected: bytes) -> None:
        target = folder_of(self.machine).parent.parent / "converted.raw"
        run("qemu-img", "convert", "-O", "raw", str(folder_of(self.machine) / f"{disk}.{point}.qcow2"), str(target))
        content = target.read_bytes()
        assert len(content) == -(-len(expected) // 512) * 512
        assert_same(content[: len(expected)], expected, f"{point} {disk} by qemu-img")

    def require_tidy(self) -> None:
        """Nothing lies about that no manifest names, and no exchange is under way."""
        named = {"lock"}
        for path in folder_of(self.machine).glob("*.json"):
            named.add(path.name)
            document = json.loads(path.read_bytes())
            for disk in document["disks"]:
                assert disk["replaces"] is None
                named.update((disk["data"]["file"], disk["data"]["digests"]))
        assert {path.name for path in folder_of(self.machine).iterdir()} == named
        for path in folder_of(self.machine).iterdir():
            assert path.stat().st_mode & 0o777 == 0o600, path


def assert_same(found: bytes, expected: bytes, what: str) -> None:
    """Bit for bit; where it is not, which sectors."""
    if found == expected:
        return
    assert len(found) == len(expected), (what, len(found), len(expected))
    wrong = [at for at in range(0, len(expected), 512) if found[at : at + 512] != expected[at : at + 512]]
    raise AssertionError(f"{what}: {len(wrong)} sectors differ, from {wrong[0]} to {wrong[-1]}: {wrong[:20]}")


def run(*command: str) -> str:
    """Run a program that must succeed; its standard output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


CHANGES = ("fsync", "rename", "unlink", "rmdir", "pwrite")
"""All by which the program changes the repository, but for the lock's content: functions of `os`."""


def counted(strike: Callable[[int], None]) -> Callable[[], None]:
    """Have every change call `strike` first, with its number; returns what undoes that."""
    before = {name: getattr(os, name) for name in CHANGES}
    calls = 0

    def wrapped(original):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            strike(calls)
            return original(*arguments, **keywords)

        return call

    for name, original in before.items():
        setattr(os, name, wrapped(original))
    return lambda: [setattr(os, name, original) for name, original in before.items()] and None


def killed_before(nth: int, action: Callable[[], object]) -> bool:
    """Act in another process that is killed right before its nth change; False where it came to its end."""
    child = os.fork()
    if not child:
        try:
            counted(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == nth else None)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False
