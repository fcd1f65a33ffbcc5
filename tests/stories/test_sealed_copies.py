"""Sealed second places from the first copy to the restore; the host that copies has no identity."""

from __future__ import annotations

import errno
import os
import random
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from lab import Night, call_pybackup, raw_copy
from memory_source import MemoryHost, MemorySource
from places import repository_at

from backup.age.keys import NO_IDENTITIES, Identities, Identity
from backup.cli.output import Quiet
from backup.errors import BackupError
from backup.operations import copy, verify
from backup.operations.backup import create
from backup.operations.request import Request
from backup.operations.restore import restore_disk
from backup.planning.decision import FULL, INCREMENTAL
from backup.repository.repository import Repository
from backup.storage.folder import FolderStorage
from backup.storage.memory import KILL, Call, Killed, Memory, MemoryStorage, no_fault

pytest.importorskip("cryptography", reason="the extra `seal` is missing: tools/setup")

OURS = Identity.new()
NAMED = Identities((OURS,), "key.txt")


def sealed_copy_of(night: Night, place: Path) -> Repository:
    return Repository.create(FolderStorage(place), repository_at(night.repository).id, [OURS.recipient])


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_no_backup_is_made_to_a_sealed_place(tmp_path, options):
    night = Night.of(tmp_path)
    night.full()
    sealed_copy_of(night, tmp_path / "sealed")
    before = night.state()
    for wanted in ("full", "incremental"):
        done = Night(night.image, tmp_path / "sealed").backup(wanted, "--bitmap", "b1", *options)
        assert done.rc == 2
        assert "is sealed, and takes only copies of points" in done.stdout + done.stderr
    assert night.state() == before
    assert sorted(path.name for path in (tmp_path / "sealed").iterdir()) == ["RECOVERY.txt", "pybackup.json"]
    night.require_incremental()


def test_from_the_key_pair_to_the_restored_disk(tmp_path, monkeypatch):
    monkeypatch.delenv("PYBACKUP_IDENTITY", raising=False)
    night, place, key, wrong = Night.with_incremental(tmp_path), tmp_path / "away", tmp_path / "key", tmp_path / "wrong"
    [recipient, _] = [call_pybackup(["keygen", path]).stdout.strip() for path in (key, wrong)]
    said = [call_pybackup(["init", "--copy-of", night.repository, place, "--recipient", recipient])]
    said += [call_pybackup(["copy", "disk", place, "--repo", night.repository], made=False) for _ in range(2)]
    assert [done.rc for done in said] == [0, 0, 0]
    assert "copied 2 points" in said[1].stdout
    assert "copied 0 points" in said[2].stdout
    for identity in ([], ["--identity", wrong]):
        reading = [["show", "disk"], ["verify"], ["restore", "disk", tmp_path / "r.raw"]]
        for command in [*reading, *([["list"], ["status"]] if identity else [])]:
            done = call_pybackup([*command, "--repo", place, *identity], made=False)
            said.append(done)
            assert done.rc == 2, command
            text = done.stdout + done.stderr
            assert (
                "no identity is named" in text if not identity else f"the identity file {wrong} does not open" in text
            )
    for command in (["list"], ["verify", "--deep"], ["restore", "disk", tmp_path / "r.raw"]):
        done = call_pybackup([*command, "--repo", place, "--identity", key], made=False)
        said.append(done)
        assert done.rc == 0, done.stderr
    assert (tmp_path / "r.raw").read_bytes() == raw_copy(night.image, tmp_path / "expected.raw").read_bytes()
    monkeypatch.setenv("PYBACKUP_IDENTITY", str(key))
    assert call_pybackup(["list", "--repo", place], made=False).rc == 0
    secrets = [path.read_text().split("\n")[2] for path in (key, wrong)]
    assert not [done for done in said for secret in secrets if secret[20:40] in done.stdout + done.stderr]
    # A secret in the place of a recipient is not repeated either.
    done = call_pybackup(["init", "--copy-of", night.repository, tmp_path / "b", "--recipient", secrets[0]])
    assert (done.rc, secrets[0] in done.stderr) == (2, False)
    assert not (tmp_path / "b").exists()


# Faults, in memory


SIZE = 256 << 10
CHANGES = {"barrier", "discard", "finish", "lock", "publish", "remove", "stream", "update", "write"}


@dataclass
class Source:
    """A repository in memory with three points of a disk, and what each of them holds."""

    memory: Memory = field(default_factory=Memory)
    contents: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def made(cls) -> Source:
        source, disk, rng = cls(), MemorySource(SIZE), random.Random("sealed")
        host = MemoryHost([disk])
        Repository.create(MemoryStorage(source.memory))
        for wanted in (FULL, INCREMENTAL, INCREMENTAL):
            disk.write(rng.randrange(100) * 512, rng.randbytes(100_000))
            report = create(source.open, Request("m", host, host.requests(), wanted, "b1"), Quiet())
            source.contents[report.point] = bytes(disk.content)
        return source

    def open(self) -> Repository:
        return Repository.open(MemoryStorage(self.memory))


@dataclass
class Sealed:
    """A sealed second place in memory."""

    source: Source
    memory: Memory = field(default_factory=lambda: Memory("sealed"))

    @classmethod
    def of(cls, source: Source) -> Sealed:
        made = cls(source)
        Repository.create(MemoryStorage(made.memory), source.open().id, [OURS.recipient])
        return made

    def copy(self, fault=no_fault, identities: Identities = NO_IDENTITIES) -> None:
        second = Repository.open(MemoryStorage(self.memory, fault), identities)
        done = copy.replicate(
            self.source.open().machine("m"),
            second.machine("m"),
            None,
            workers=1,
            begin=lambda _: None,
            advance=lambda _: None,
        )
        assert done.problems == ()

    def points(self) -> list[str]:
        contents = Repository.open(MemoryStorage(self.memory), NAMED).machine("m").contents()
        assert not contents.damaged
        return sorted(contents.manifests)

    def require_whole(self, target: Path) -> None:
        machine = Repository.open(MemoryStorage(self.memory), NAMED).machine("m")
        for point in self.points():
            restore_disk(
                machine, point, "vd0", str(target), image_format="raw", force=True, workers=1, progress=Quiet()
            )
            assert target.read_bytes() == self.source.contents[point]
        assert verify.verify_machine(machine, deep=True, workers=1, progress=lambda _: None).problems == ()


@pytest.fixture(scope="module")
def source() -> Source:
    return Source.made()


@pytest.mark.parametrize("effect", ["error", "kill", "power cut"])
@pytest.mark.parametrize("identities", [NO_IDENTITIES, NAMED], ids=["host", "with identity"])
def test_a_fault_at_any_change_leaves_every_listed_point_whole_and_the_next_copy_completes(
    source, tmp_path, effect, identities
):
    calls: list[Call] = []

    def note(call: Call) -> None:
        if call.method in CHANGES:
            calls.append(call)

    Sealed.of(source).copy(note, identities)
    assert len(calls) > 15
    for nth in range(1, len(calls) + 1):
        count = 0

        def strike(call: Call, nth: int = nth) -> OSError | str | None:
            nonlocal count
            count += call.method in CHANGES
            if count != nth or call.method not in CHANGES:
                return None
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), call.name) if effect == "error" else KILL

        sealed = Sealed.of(source)
        with suppress(BackupError, OSError, Killed):
            sealed.copy(strike, identities)
        if effect == "power cut":
            sealed.memory.lose_power()
        sealed.require_whole(tmp_path / "disk.raw")
        sealed.copy(identities=identities)
        assert sealed.points() == sorted(source.contents), calls[nth - 1]
        sealed.require_whole(tmp_path / "disk.raw")
        held = {name for name in sealed.memory.snapshot()["m"] if name not in {"lock", "verified.age"}}
        named = {f"{name}.age" for name in source.memory.snapshot()["m"] if name != "lock"}
        assert held == named, calls[nth - 1]


def test_no_byte_of_a_sealed_place_is_one_of_the_disk(source):
    """A stretch of the disk, a path, a digest: nothing of that is found in what the place holds."""
    sealed = Sealed.of(source)
    sealed.copy()
    held = b"".join(sealed.memory.snapshot()["m"].values())
    plain = source.memory.snapshot()["m"]
    for name, content in plain.items():
        for at in range(0, len(content) - 16, max(16, len(content) // 50)):
            assert content[at : at + 16] == bytes(16) or content[at : at + 16] not in held, name
