"""
Prunes: whatever goes, what stays restores bit for bit, by pybackup and by QEMU alone, also of a prune that is cut off.

A prune is cut off in a process of its own, forked from this one, right before its nth call of what changes a file.
"""

from __future__ import annotations

import errno
import os
import random
import signal
from pathlib import Path

import pytest
from histories import History, counted, killed_before
from places import folder_of

import backup.engine.merge  # noqa: F401 - here, and not anew in each process that is killed
from backup.cli.output import Quiet
from backup.errors import Failed, Interrupted
from backup.operations.prune import Report, Request, prune
from backup.planning.retention import Batch, Policy


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody cuts the power here: what lasts is seen by the order of calls alone, and fsync takes most of a prune."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


FIRST, END = (int(number) for number in os.environ.get("PRUNE_SEEDS", "0:12").split(":"))


def any_request(rng: random.Random) -> Request:
    policy = Policy(last=rng.randint(1, 4), weekly=rng.choice([0, 0, 1, 3]), monthly=rng.choice([0, 0, 2]))
    return Request(policy, Batch(rng.choice([1, 1, 2, 4]), rng.choice([0, 25, 1000])), workers=1)


@pytest.mark.parametrize("seed", range(FIRST, END))
def test_whatever_is_pruned_all_that_stays_restores_bit_for_bit(tmp_path, seed):
    history = History.of(tmp_path, seed)
    rng = history.rng
    both = rng.random() < 0.4
    for _ in range(rng.randint(2, 4)):
        for _ in range(rng.randint(1, 5)):
            disks = rng.choice([["vda"], ["vdb"], ["vda", "vdb"], ["vda", "vdb"]]) if both else ["vda"]
            history.point(*disks, full=rng.random() < 0.15, pinned=rng.random() < 0.1)
        before = history.manifests()
        if not rng.random() < 0.3:
            history.require_whole(deep=False)  # QEMU sees what the model does before anything is merged
        request = any_request(rng)
        if rng.random() < 0.5:
            cut_off(history, request, rng.randint(1, 60))
            history.require_whole(deep=rng.random() < 0.3)
        report = prune(history.machine, request, Quiet())
        left = history.manifests()
        assert set(left) == {point.point for point in report.points if point.action != "remove"}
        assert all(left[name].pinned == before[name].pinned for name in left)
        assert {name for name in before if before[name].pinned} <= set(left)
        for name, manifest in left.items():
            for disk in manifest.disks:
                old = before[name].disk(disk.name)
                assert old is not None
                assert (disk.identity, disk.size) == (old.identity, old.size)
        history.newest = {disk: (newest[0], left[newest[0]].disk(disk)) for disk, newest in history.newest.items()}
        history.require_whole()
        history.require_tidy()


# A prune that is cut off


def cut_off(history: History, request: Request, nth: int) -> bool:
    """Prune in another process that is killed right before its nth change; False where it came to its end."""
    return killed_before(nth, lambda: prune(history.machine, request, Quiet()))


REQUEST = Request(Policy(last=2), Batch(1), workers=1)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> History:
    """A chain that ended, and one of two disks whose front goes, a link that was shorter in it, and a middle."""
    history = History.of(tmp_path_factory.mktemp("scene"), "scene", 4096)
    history.point("vda", full=True)  # a chain that ends here
    history.point("vda", "vdb", full=True, size=80_000)
    history.point("vda", size=50_001)
    history.point("vda", "vdb", size=80_000, pinned=True)
    history.point("vda", "vdb", size=80_000)
    for _ in range(3):
        history.point("vda", size=90_112)
    return history


@pytest.fixture
def copied(scene, tmp_path) -> History:
    """The scene, to be changed."""
    return scene.copied(tmp_path)


def total(scene: History, folder: Path) -> tuple[int, Report, set[str]]:
    """How many changes the scene's prune makes, its report, and the points that stay."""
    history = scene.copied(folder)
    last = 0

    def note(number: int) -> None:
        nonlocal last
        last = number

    undo = counted(note)
    try:
        report = prune(history.machine, REQUEST, Quiet())
    finally:
        undo()
    history.require_whole()
    return last, report, set(history.manifests())


def files(history: History) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_ino) for path in folder_of(history.machine).iterdir()}


def test_sigkill_before_any_change_leaves_every_point_whole_and_the_next_prune_goes_on(scene, tmp_path):
    last, report, stay = total(scene, tmp_path / "whole")
    assert len(report.rewrites) == 3, "two fronts and a middle"
    assert report.removed == 4
    assert last > 50
    states = set()
    for nth in range(1, last + 1):
        history = scene.copied(tmp_path / "cut")
        assert cut_off(history, REQUEST, nth)
        before = files(history)
        # Many changes lead to one state of names and manifests, as what waits is written: each is looked at once.
        state = (history.listing(), frozenset(before))
        if state in states:
            continue
        states.add(state)
        history.require_whole()
        assert stay <= set(history.manifests())
        assert files(history) == before, "a reader wrote"
        prune(history.machine, REQUEST, Quiet())
        assert set(history.manifests()) == stay
        history.require_tidy()
        if len(states) % 4 == 0:
            history.require_whole()
    assert len(states) > 20


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_a_disk_that_fails_at_any_change_leaves_every_point_whole(scene, tmp_path, lasting):
    last, _, stay = total(scene, tmp_path / "whole")
    states = set()
    for nth in range(2 + lasting, last + 1, 2):  # the first is the lock's content, which only says who holds it
        history = scene.copied(tmp_path / "failed")

        def fail(number: int, nth: int = nth) -> None:
            if number == nth or (lasting and number > nth):
                raise OSError(errno.ENOSPC, "No space left on device")

        undo = counted(fail)
        try:
            with pytest.raises(Failed, match="No space left"):
                prune(history.machine, REQUEST, Quiet())
        finally:
            undo()
        state = (history.listing(), frozenset(files(history)))
        if state in states:
            continue
        states.add(state)
        history.require_whole()
        assert stay <= set(history.manifests())
        prune(history.machine, REQUEST, Quiet())
        assert set(history.manifests()) == stay
        history.require_tidy()
    history.require_whole()


def test_a_signal_that_asks_leaves_every_point_whole_and_no_trace(scene, tmp_path):
    last, _, stay = total(scene, tmp_path / "whole")
    for nth in range(2, last + 1, 5):
        history = scene.copied(tmp_path / "asked")

        def stop(number: int, nth: int = nth) -> None:
            if number == nth:
                raise Interrupted(signal.SIGTERM)

        undo = counted(stop)
        try:
            with pytest.raises(Interrupted) as stopped:
                prune(history.machine, REQUEST, Quiet())
        finally:
            undo()
        assert stopped.value.hint == "all points that stay are complete; run the command again to continue"
        assert stay <= set(history.manifests())
        history.require_tidy()
    history.require_whole()


def test_a_backup_after_a_prune_that_was_cut_off_tidies_up_as_well(scene, tmp_path):
    from backup.repository.replacement import settle

    last, _, _ = total(scene, tmp_path / "whole")
    for nth in range(3, last, 3):
        history = scene.copied(tmp_path / "cut")
        assert cut_off(history, REQUEST, nth)
        with history.machine.lock():
            settle(history.machine)
        history.require_tidy()
    history.require_whole()


def test_each_step_of_an_exchange_lasts_before_the_next(copied, monkeypatch):
    """Power may fail at any time: what a rename makes count is on the disk before it."""
    done: list[str] = []
    names = {}

    def named(fd: int) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        return "folder" if path.is_dir() else path.name

    def noted(name, describe):
        original = names[name] = getattr(os, name)

        def call(*arguments, **keywords):
            done.append(f"{name} {describe(*arguments)}")
            return original(*arguments, **keywords)

        monkeypatch.setattr(os, name, call)

    noted("fsync", named)
    noted("rename", lambda source, target: f"{Path(source).name} to {Path(target).name}")
    noted("unlink", lambda path: Path(path).name)
    rewritten = prune(copied.machine, REQUEST, Quiet()).rewrites[-1].point
    first = done.index(f"fsync vda.{rewritten}.qcow2.new.part")
    assert done[first : first + 13] == [
        f"fsync vda.{rewritten}.qcow2.new.part",
        f"rename vda.{rewritten}.qcow2.new.part to vda.{rewritten}.qcow2.new",
        f"fsync vda.{rewritten}.1.b3",
        "fsync folder",
        f"fsync {rewritten}.json.tmp",
        f"rename {rewritten}.json.tmp to {rewritten}.json",
        "fsync folder",
        f"rename vda.{rewritten}.qcow2.new to vda.{rewritten}.qcow2",
        "fsync folder",
        f"fsync {rewritten}.json.tmp",
        f"rename {rewritten}.json.tmp to {rewritten}.json",
        "fsync folder",
        f"unlink vda.{rewritten}.b3",
    ]
    assert done[first + 13] == "fsync folder"
    removed = [index for index, text in enumerate(done) if text.startswith("unlink") and text.endswith(".json")]
    for index in removed:
        assert done[index + 1] == "fsync folder"
