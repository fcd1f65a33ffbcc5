"""
`pybackup remove`: what is left restores bit for bit, by pybackup and by QEMU alone, also where a removal is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import subprocess
import threading
from pathlib import Path

import pytest
from forge import signed
from histories import History, counted, killed_before
from lab import PYBACKUP, Night, call_pybackup, run_pybackup, write
from places import folder_of

from backup.cli.output import Quiet
from backup.errors import BackupError, Failed
from backup.operations.remove import Removal, plan, remove
from backup.repository.machine import SEQUENCE, Machine

FIELDS = ["machine", "point", "removed", "rewrites", "damaged", "freed_bytes", "notes", "dry_run", "error"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody cuts the power here: what lasts is seen by the order of calls alone, and fsync takes most of a removal."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> History:
    """A chain that ended, one of two disks with a link that was shorter, and a point of one disk only."""
    history = History.of(tmp_path_factory.mktemp("scene"), "remove", 4096)
    history.point("vda", full=True)
    history.point("vda", "vdb", full=True, size=80_000)
    history.point("vda", size=50_001)
    history.point("vda", "vdb", size=80_000)
    history.point("vda", "vdb", size=80_000)
    history.point("vda", size=90_112)
    return history


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> History:
    """One chain of two disks, with a link that was shorter, to be killed at each step."""
    history = History.of(tmp_path_factory.mktemp("short"), "short", 4096)
    history.point("vda", "vdb", full=True, size=40_000)
    history.point("vda", size=20_001)
    history.point("vda", "vdb", size=40_000)
    return history


@pytest.fixture
def copied(scene, tmp_path) -> History:
    """The scene, to be changed."""
    return scene.copied(tmp_path)


def points(history: History) -> list[str]:
    return [found.point for found in sorted(history.manifests().values(), key=lambda found: found.sequence)]


def take_away(machine: Machine, point: str | None) -> Removal:
    return remove(machine, plan(machine, point, workers=1), workers=1, progress=Quiet())


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_ino) for path in folder.rglob("*")}


def command(history: History, what: str, *options: str):
    return call_pybackup(["remove", what, "--repo", folder_of(history.machine).parent, *options])


@pytest.mark.parametrize("number", range(6))
def test_whichever_point_goes_all_others_restore_bit_for_bit(copied, number):
    before = points(copied)
    planned = plan(copied.machine, before[number], workers=1)
    done = take_away(copied.machine, before[number])
    assert points(copied) == before[:number] + before[number + 1 :]
    assert [(rewrite.point, rewrite.disk) for rewrite in planned.rewrites] == [
        (rewrite.point, rewrite.disk) for rewrite in done.rewrites
    ]
    assert done.notes == planned.notes
    copied.require_whole()
    folder_of(copied.machine).joinpath(SEQUENCE).unlink(missing_ok=number != 5)
    copied.require_tidy()


@pytest.mark.parametrize("number", [0, 1, 2, None], ids=["front", "middle", "newest", "machine"])
def test_sigkill_before_any_change_leaves_whole_what_is_left_and_the_next_removal_goes_on(short, tmp_path, number):
    scene, ids = short, points(short)
    point = None if number is None else ids[number]
    changes = 0

    def note(count: int) -> None:
        nonlocal changes
        changes = count

    undo = counted(note)
    try:
        take_away(scene.copied(tmp_path / "whole").machine, point)
    finally:
        undo()
    assert changes > 5
    states = set()
    for nth in range(1, changes + 1):
        history = scene.copied(tmp_path / "cut")
        assert killed_before(nth, lambda history=history: take_away(history.machine, point))
        left = (
            frozenset(path.name for path in folder_of(history.machine).glob("*")) if history.machine.exists() else None
        )
        found = (left, left and history.listing())
        if found in states:
            continue
        states.add(found)
        history.require_whole(deep=False)
        if point is not None:
            assert set(history.manifests()) >= set(ids) - {point}
            if point in history.manifests():
                take_away(history.machine, point)
            else:
                with history.machine.lock():
                    from backup.repository.replacement import settle

                    settle(history.machine)
            assert set(history.manifests()) == set(ids) - {point}
            if len(states) % 3 == 0:
                history.require_whole(deep=False)
            folder_of(history.machine).joinpath(SEQUENCE).unlink(missing_ok=number != 2)
            history.require_tidy()
        elif history.machine.exists():
            assert points(history) == ids[: len(points(history))], "the newest go first"
            take_away(history.machine, None)
            assert not history.machine.exists()
    assert len(states) > 3


def test_the_newest_point_may_go_and_what_follows_is_said_before(tmp_path):
    night = Night.of(tmp_path)
    older = night.full().machine["point"]
    write(night.image, "write -P 0x31 3M 70k")
    newest = night.incremental().machine["point"]
    second = tmp_path / "second"
    assert call_pybackup(["copy", "disk", second, "--repo", night.repository]).rc == 0
    for options in (["--dry-run"], ["--yes"]):
        done = call_pybackup(["remove", f"disk/{newest}", "--repo", night.repository, "--json", *options])
        assert (done.rc, done.stderr, list(done.document)) == (0, "", FIELDS)
        [note] = done.document["notes"]
        assert note.startswith(f"point {newest} is the newest of disk disk")
        assert note.endswith("the next backup of that disk reads everything (a rescan)")
    assert [path.stem for path in (night.repository / "disk").glob("*.json")] == [older]
    write(night.image, "write -P 0x32 0 70k")
    done = night.incremental()
    assert (done.rc, done.disk["rescan"]) == (3, True)
    night.require_restored()
    assert night.incremental().rc == 0
    # A second place that still has the removed point takes the new one for its latest.
    assert call_pybackup(["copy", "disk", second, "--repo", night.repository]).rc == 0
    latest = call_pybackup(["show", "disk/latest", "--repo", second, "--json"]).document["point"]
    assert latest == night.newest["point"]
    assert call_pybackup(["verify", "--repo", second]).rc == 0


def test_a_whole_machine_goes_with_its_folder(copied):
    before = set(os.listdir(folder_of(copied.machine).parent))
    done = command(copied, "m", "--yes", "--json")
    assert (done.rc, done.document["removed"]) == (0, points_of(done))
    assert len(done.document["removed"]) == 6
    assert set(os.listdir(folder_of(copied.machine).parent)) == before - {"m"}
    assert command(copied, "m", "--yes").rc == 10


def points_of(done) -> list[str]:
    return sorted(done.document["removed"])


def test_a_dry_run_changes_nothing_and_says_what_a_run_does(copied):
    before = state(folder_of(copied.machine))
    point = points(copied)[3]
    planned = command(copied, f"m/{point}", "--dry-run", "--json")
    assert (planned.rc, planned.stderr, list(planned.document)) == (0, "", FIELDS)
    assert command(copied, "m", "--dry-run").stdout.startswith("m: would remove the machine with 6 points, ")
    assert state(folder_of(copied.machine)) == before
    done = command(copied, f"m/{point}", "--yes", "--json")
    assert done.rc == 0
    assert [rewrite["point"] for rewrite in done.document["rewrites"]] == [
        rewrite["point"] for rewrite in planned.document["rewrites"]
    ]


def test_a_pinned_point_and_its_machine_are_refused(copied):
    point = points(copied)[2]
    assert call_pybackup(["pin", f"m/{point}", "--repo", folder_of(copied.machine).parent]).rc == 0
    before = state(folder_of(copied.machine))
    for what in (f"m/{point}", "m"):
        done = command(copied, what, "--yes")
        assert done.rc == 1
        assert f"point {point} of machine m is pinned" in done.stderr
        assert f"pybackup unpin m/{point}" in done.stderr
    assert state(folder_of(copied.machine)) == before


def test_a_point_that_is_served_and_a_machine_that_is_locked_are_refused(copied):
    ids = points(copied)
    before = state(folder_of(copied.machine))
    [digests] = folder_of(copied.machine).glob(f"vda.{ids[3]}*.b3")
    with open(digests, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        for what in (f"m/{ids[3]}", "m"):
            done = command(copied, what, "--yes")
            assert (done.rc, "cannot be removed: in use" in done.stderr) == (11, True), done
    with open(folder_of(copied.machine) / "lock", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert command(copied, f"m/{ids[3]}", "--yes").rc == 11
        assert command(copied, "m", "--yes").rc == 11
    assert state(folder_of(copied.machine)) == before


def test_what_names_no_point_or_machine(copied):
    before = state(folder_of(copied.machine))
    for what, code in (("m/", 2), ("m/latest", 2), ("m/20200101T000000Z-00000000", 10), ("nobody", 10), ("../m", 2)):
        assert command(copied, what, "--yes").rc == code, what
    assert state(folder_of(copied.machine)) == before


def test_without_a_terminal_it_asks_for_yes(copied):
    before = state(folder_of(copied.machine))
    done = run_pybackup(["remove", "m", "--repo", folder_of(copied.machine).parent])
    assert (done.rc, "--yes" in done.stderr, done.stdout) == (2, True, "")
    assert state(folder_of(copied.machine)) == before


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"\n", 1), (b"\x04", 1), (b"\x03", 130), (b"y\n", 0)])
def test_on_a_terminal_it_asks(copied, answer, code):
    ours, theirs = pty.openpty()
    point = points(copied)[5]
    process = subprocess.Popen(
        [PYBACKUP, "remove", f"m/{point}", "--repo", folder_of(copied.machine).parent],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, 0x540E, 0)),  # noqa: PLW1509 - TIOCSCTTY: Ctrl-C is a signal
    )
    asked = b""
    while b"[y/N]" not in asked and (part := os.read(process.stderr.fileno(), 4096)):
        asked += part
    assert f"m: this removes point {point}".encode() in asked
    assert b"reads everything (a rescan)" in asked, "said before it is asked"
    assert point in copied.manifests()
    os.write(ours, answer)
    _, stderr = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == code, stderr
    assert (point in copied.manifests()) == (code != 0)


def test_a_damaged_manifest_keeps_points_but_not_the_machine(copied):
    ids = points(copied)
    with open(folder_of(copied.machine) / f"{ids[4]}.json", "ab") as file:
        file.write(b"x")
    before = state(folder_of(copied.machine))
    for point in (ids[0], ids[4]):
        assert command(copied, f"m/{point}", "--yes").rc == 12
    assert state(folder_of(copied.machine)) == before
    done = command(copied, "m", "--yes")
    assert (done.rc, "5 points and 1 damaged manifest" in done.stdout) == (0, True), done
    assert not copied.machine.exists()


def test_a_newer_programs_point_is_not_removed(copied):
    path = folder_of(copied.machine) / f"{points(copied)[5]}.json"
    document = json.loads(path.read_bytes())
    path.write_bytes(signed({**document, "version": 99}))
    before = state(folder_of(copied.machine))
    assert command(copied, "m", "--yes").rc == 1
    assert state(folder_of(copied.machine)) == before


def test_a_folder_with_other_peoples_files_stays(copied):
    (folder_of(copied.machine) / "README").write_text("mine")
    done = command(copied, "m", "--yes")
    assert done.rc == 0
    assert "stays, as it holds what is not pybackup's: README" in done.stdout
    assert sorted(os.listdir(folder_of(copied.machine))) == ["README", "lock"]


def test_points_that_came_after_the_question_are_not_removed(copied):
    planned = plan(copied.machine, None, workers=1)
    copied.point("vda", size=90_112)
    with pytest.raises(Failed, match="changed meanwhile"):
        remove(copied.machine, planned, workers=1, progress=Quiet())
    assert len(points(copied)) == 7


def test_who_waits_for_the_lock_of_a_machine_that_is_removed_gets_one_that_counts(copied):
    machine = copied.machine
    failed: list[BackupError] = []
    waiting = threading.Event()

    def back_up() -> None:
        waiting.set()
        try:
            with machine.lock(), open(folder_of(machine) / "lock", "rb") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BackupError as error:
            failed.append(error)

    thread = threading.Thread(target=back_up)
    with open(folder_of(machine) / "lock", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread.start()
        waiting.wait()
        threading.Event().wait(0.2)  # it has opened the file, and waits for the lock
        (folder_of(machine) / "lock").unlink()
    thread.join()
    assert not failed
