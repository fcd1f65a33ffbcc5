"""
The whole life of a machine on a storage in memory, and a fault at every call that a change of the repository makes.

A fault is an error instead of a call, or a kill after one; after the kill the power may fail as well.  Afterwards
another process, which knows nothing, must find every listed point whole.  Real kills of real processes are tested in
test_kills.py and test_histories.py.
"""

from __future__ import annotations

import copy as copying
import errno
import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from memory_source import MemoryHost, MemorySource

from backup.cli.output import Quiet
from backup.errors import BackupError, Failed
from backup.model.manifest import DEFINITION, NVRAM
from backup.operations import copy, prune, remove, serve, verify
from backup.operations.backup import create
from backup.operations.request import Request
from backup.operations.restore import restore_disk
from backup.planning.decision import FULL, INCREMENTAL, RESCAN
from backup.planning.retention import Batch, Policy
from backup.repository import machine_files
from backup.repository.machine import Machine
from backup.repository.replacement import settle
from backup.repository.repository import Repository
from backup.sources.base import MachineState
from backup.storage.memory import KILL, Call, Killed, Memory, MemoryStorage, no_fault

KIB = 1 << 10
SIZE = 512 * KIB
CHANGES = frozenset(
    {
        "barrier",
        "create",
        "discard",
        "finish",
        "lock",
        "publish",
        "put",
        "remove",
        "remove_folder",
        "take_name",
        "update",
        "write",
    }
)
"""The calls that change what a storage holds."""
NEWEST = prune.Request(Policy(last=1), Batch(1), workers=1)


def machine_of(disk: MemorySource) -> dict[str, bytes]:
    """The small files of the machine while its disk has this content."""
    return {DEFINITION: b"<domain/>" + disk.content[:256].hex().encode(), NVRAM: bytes(disk.content[256:512]) or b"0"}


@dataclass
class Story:
    """A machine with one disk in memory, its points, and what each must hold."""

    memory: Memory = field(default_factory=Memory)
    disk: MemorySource = field(default_factory=lambda: MemorySource(SIZE))
    contents: dict[str, bytes] = field(default_factory=dict)
    rng: random.Random = field(default_factory=lambda: random.Random("memory"))

    def open(self, fault=no_fault) -> Repository:
        """The repository as a new process has it."""
        return Repository.open(MemoryStorage(self.memory, fault))

    def machine(self, fault=no_fault) -> Machine:
        return self.open(fault).machine("m")

    def back_up(self, wanted: str, fault=no_fault) -> None:
        host = MemoryHost([self.disk], machine=MachineState(machine_of(self.disk)))
        content = bytes(self.disk.content)
        report = create(partial(self.open, fault), Request("m", host, host.requests(), wanted, "b1"), Quiet())
        assert report.point is not None
        self.contents[report.point] = content

    def live(self) -> None:
        """A day of the machine."""
        for _ in range(3):
            sectors = self.rng.randint(1, 200)
            offset = self.rng.randrange(SIZE // 512 - sectors) * 512
            data = self.rng.choice([bytes(512 * sectors), self.rng.randbytes(512 * sectors)])
            self.disk.write(offset, data)

    @property
    def points(self) -> list[str]:
        """The ids of the points, oldest first."""
        contents = self.machine().contents()
        assert not contents.damaged
        return sorted(contents.manifests, key=lambda point: contents.manifests[point].sequence)

    def require_whole(self, target: Path) -> None:
        """Every point that is listed restores to what the disk held, and a deep verify finds nothing."""
        machine = self.machine()
        for point in self.points:
            restore_disk(
                machine, point, "vd0", str(target), image_format="raw", force=True, workers=1, progress=Quiet()
            )
            assert target.read_bytes() == self.contents[point], point
            self.require_machine(machine, point)
        done = verify.verify_machine(machine, deep=True, workers=1, progress=lambda _: None)
        assert done.problems == ()

    def require_machine(self, machine: Machine, point: str) -> None:
        """The machine's files are those of the point's instant."""
        disk = MemorySource(SIZE)
        disk.content[:] = self.contents[point]
        files = machine.contents().manifests[point].machine_files
        assert {file.role: machine_files.load(machine.files, file) for file in files} == machine_of(disk)

    def require_tidy(self) -> None:
        """The machine's folder holds what the manifests name, and nothing else."""
        machine = self.machine()
        named = {"lock", "verified", "sequence"}
        for manifest in machine.contents(raw=True).manifests.values():
            assert all(disk.replaces is None for disk in manifest.disks)
            named |= {f"{manifest.point}.json"}
            named |= {name for disk in manifest.disks for name in (disk.data.file, disk.data.digests)}
            named |= {f"{manifest.point}.xml", f"{manifest.point}.nvram"}
        assert set(machine.listing()) <= named

    def copied(self) -> Story:
        """The same story, from here on its own."""
        made = Story(Memory(), MemorySource(SIZE), dict(self.contents), copying.deepcopy(self.rng))
        made.disk.content[:] = self.disk.content
        made.disk.bitmaps = {name: dirty.copy() for name, dirty in self.disk.bitmaps.items()}
        storage = MemoryStorage(made.memory)
        for folder, files in self.memory.snapshot().items():
            if folder:
                with storage.files(folder).lock():
                    pass
            for name, content in files.items():
                storage.files(folder).publish(name, content)
        storage.files().barrier()
        return made


@pytest.fixture(scope="module")
def told() -> Story:
    """A full and three incrementals."""
    story = Story()
    Repository.create(MemoryStorage(story.memory))
    for wanted in (FULL, INCREMENTAL, INCREMENTAL, INCREMENTAL):
        story.live()
        story.back_up(wanted)
    return story


def test_a_machine_lives_on_a_storage_in_memory(told, tmp_path):
    story = told.copied()
    story.require_whole(tmp_path / "disk.raw")
    first, _, third, newest = story.points
    assert prune.set_pin(story.machine(), third, pinned=True)
    assert prune.prune(story.machine(), NEWEST, Quiet()).removed == 2
    assert story.points == [third, newest]
    assert first not in story.points
    story.live()
    story.back_up(RESCAN)
    story.require_whole(tmp_path / "disk.raw")
    story.require_tidy()


def test_points_are_copied_between_storages_of_two_kinds(told, tmp_path):
    from backup.storage.folder import FolderStorage

    story = told.copied()
    second = copy.make_second(FolderStorage(tmp_path / "second"), story.open())
    done = copy.replicate(
        story.machine(), second.machine("m"), None, workers=2, begin=lambda _: None, advance=lambda _: None
    )
    assert (len(done.copied), done.problems) == (4, ())
    back = Story(contents=story.contents)
    third = copy.make_second(MemoryStorage(back.memory), second)
    copy.replicate(
        second.machine("m"), third.machine("m"), None, workers=1, begin=lambda _: None, advance=lambda _: None
    )
    back.require_whole(tmp_path / "disk.raw")
    with pytest.raises(BackupError, match="the repository itself"):
        copy.open_second(MemoryStorage(story.memory), story.open())


def test_what_needs_a_local_folder_says_so_in_two_lines(told):
    story = told.copied()
    with (
        pytest.raises(Failed, match="memory/m is not a folder of this host") as stopped,
        serve.serving(story.machine(), story.points[0], "vd0", None, writable=False),
    ):
        pass
    assert "pybackup copy" in stopped.value.hint


# Faults


def back_up(story: Story, fault) -> None:
    story.live()
    story.back_up(INCREMENTAL, fault)


def prune_all(story: Story, fault) -> None:
    prune.prune(story.machine(fault), NEWEST, Quiet())


def remove_newest(story: Story, fault) -> None:
    remove_point(story, fault, -1)


def remove_middle(story: Story, fault) -> None:
    remove_point(story, fault, 1)


def remove_point(story: Story, fault, number: int) -> None:
    point = story.points[number]
    planned = remove.plan(story.machine(), point, workers=1)
    remove.remove(story.machine(fault), planned, workers=1, progress=Quiet())


def remove_machine(story: Story, fault) -> None:
    remove.remove(story.machine(fault), remove.plan(story.machine(), None, workers=1), workers=1, progress=Quiet())


def pin(story: Story, fault) -> None:
    prune.set_pin(story.machine(fault), story.points[0], pinned=True)


ACTIONS = [back_up, prune_all, remove_newest, remove_middle, remove_machine, pin]
EFFECTS = ["error", "kill", "power cut"]


def changes(story: Story, action: Callable[[Story, object], None]) -> list[Call]:
    """The calls by which an action changes the storage."""
    calls: list[Call] = []

    def note(call: Call) -> None:
        if call.method in CHANGES:
            calls.append(call)

    action(story, note)
    return calls


def struck(nth: int, effect: str):
    """A fault at the nth change."""
    count = 0

    def fault(call: Call) -> OSError | str | None:
        nonlocal count
        if call.method not in CHANGES:
            return None
        count += 1
        if count != nth:
            return None
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), call.name) if effect == "error" else KILL

    return fault


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_a_fault_at_any_change_leaves_every_listed_point_whole(told, tmp_path, action, effect):
    target = tmp_path / "disk.raw"
    before = told.points
    calls = changes(told.copied(), action)
    assert len(calls) > 1
    for nth in range(1, len(calls) + 1):
        story = told.copied()
        with suppress(BackupError, OSError, Killed):
            action(story, struck(nth, effect))
        if effect == "power cut":
            story.memory.lose_power()
        if action is back_up:  # a point that was published just then is whole, though nobody was told
            for point in set(story.points) - set(before):
                story.contents.setdefault(point, bytes(story.disk.content))
            assert set(before) <= set(story.points), calls[nth - 1]
        assert set(story.points) <= {*before, *story.contents}, calls[nth - 1]
        if before[-1] not in story.points:
            assert action in (remove_newest, remove_machine), calls[nth - 1]
        story.require_whole(target)
        if action is remove_machine and not story.machine().exists():
            continue
        with story.machine().lock():  # the next run
            settle(story.machine())
        story.require_tidy()
        story.require_whole(target)


@pytest.mark.parametrize("effect", ["kill", "power cut"])
def test_a_prune_that_was_cut_off_anywhere_is_gone_on_with(told, tmp_path, effect):
    calls = changes(told.copied(), prune_all)
    for nth in range(1, len(calls) + 1):
        story = told.copied()
        with suppress(Killed):
            prune_all(story, struck(nth, effect))
        if effect == "power cut":
            story.memory.lose_power()
        prune_all(story, no_fault)
        assert story.points == [told.points[-1]]
        story.require_whole(tmp_path / "disk.raw")
        story.require_tidy()


def test_a_killed_writer_reaches_the_storage_no_more_and_its_locks_are_free():
    memory = Memory()
    writer = MemoryStorage(memory, struck(2, "kill"))
    files = writer.files("m")
    with suppress(Killed), files.lock():
        files.publish("a", b"1")
        raise AssertionError("the kill comes after the call")
    assert writer.killed
    for action in (partial(files.publish, "b", b""), partial(files.read, "a", 1), files.barrier):
        with pytest.raises(Killed):
            action()
    other = MemoryStorage(memory).files("m")
    with other.lock():
        assert other.read("a", 1) == b"1"


def test_what_no_barrier_made_durable_is_lost_without_power():
    memory = Memory()
    files = MemoryStorage(memory).files("m")
    with files.lock():
        files.write("lost", b"")
        files.publish("kept", b"1")  # durable, and a barrier
        files.write("new", b"")
        files.remove("kept")
        memory.lose_power()
    assert sorted(files.listing()) == ["kept", "lock", "lost"]
