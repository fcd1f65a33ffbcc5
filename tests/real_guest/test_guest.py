"""
A real guest is backed up while it works: Linux with a file system on one disk and a ring of numbers on the other.

Points are taken of the running machine, then restored, and judged by e2fsck, by the numbers that the guest wrote, and
by a guest that boots what was restored.  The guest says on its console what it has on its disks, so that each
point's instant can be held against what was there when the run began and when it had ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from guest import NAMES, SLOTS, Disk, Guest, Progress, make_disks, started, verdict_of
from initrd import System
from judges import journal_is_clean, marker_of, require_sound, require_sound_after_replay, ring_of
from lab import PYBACKUP, Result, bitmaps, check_repository, raw_copy, restore_and_cmp, run, run_pybackup

pytestmark = pytest.mark.timeout(900)  # an emulated machine, on cores that others use as well

KEPT = 8
"""Generations of files that stay on the disk; one more while one comes or goes."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A point that is taken, and how it is restored."""

    kind: str
    node: str
    frozen: bool
    format: str
    after_kill: bool = False


# The disks are named in each way that there is: by node, by device, by the image's path.
WANTED = (
    Wanted("full", node="node-{name}", frozen=True, format="raw"),
    Wanted("incremental", node="dev-{name}", frozen=True, format="qcow2"),
    Wanted("incremental", node="{folder}/{name}.qcow2", frozen=False, format="raw"),
    Wanted("incremental", node="node-{name}", frozen=True, format="raw", after_kill=True),
)


@dataclass(frozen=True, slots=True)
class Point:
    """A point that was taken, what the guest had written before and after, and what was found in QEMU afterwards."""

    wanted: Wanted
    done: Result
    before: Progress
    after: Progress
    left: dict[str, Any]
    bitmaps: dict[str, list[str]]

    @property
    def manifest(self) -> Any:
        return json.loads(Path(self.done.machine["manifest"]).read_bytes())


@dataclass(frozen=True, slots=True)
class Night:
    """What came of it all."""

    system: System
    folder: Path
    disks: list[Disk]
    points: list[Point]

    @property
    def repository(self) -> Path:
        return self.folder / "repo"


@pytest.fixture(scope="module")
def night(system, tmp_path_factory) -> Night:
    """The points of a guest that works on, and then is switched off."""
    folder = tmp_path_factory.mktemp("night")
    (folder / "scratch").mkdir()
    disks = make_disks(folder, ballast=system.kernel)
    points = []
    with started(system, "write", *disks) as guest:
        for wanted in WANTED:
            guest.wait_for(numbers=20, generations=KEPT)
            if wanted.after_kill:
                kill_a_run(guest, wanted, folder)
            points.append(take(guest, wanted, folder))
        guest.end()
    return Night(system, folder, disks, points)


def take(guest: Guest, wanted: Wanted, folder: Path) -> Point:
    """Take a point of both disks."""
    before = guest.progress
    done = run_pybackup(command(guest, wanted, folder))
    assert done.rc in ((0, 3) if wanted.after_kill else (0,)), f"{wanted}: {done}"
    return Point(wanted, done, before, guest.progress, left_by(guest, folder), guest.bitmaps())


def command(guest: Guest, wanted: Wanted, folder: Path) -> list[str | Path]:
    """The arguments for a point of both disks, copied so slowly that the guest writes much meanwhile."""
    nodes = [word for name in NAMES for word in ("--node", wanted.node.format(name=name, folder=folder))]
    disks = [word for name in NAMES for word in ("--disk", name)]
    frozen = ["--freeze", "--agent", guest.agent] if wanted.frozen else []
    names = ["--machine", "web1", "--bitmap", "b1", "--repo", folder / "repo", "--scratch", folder / "scratch"]
    return [wanted.kind, "--qmp", guest.qmp, *nodes, *disks, *names, *frozen, "--limit", "6M", "--json"]


def kill_a_run(guest: Guest, wanted: Wanted, folder: Path) -> None:
    """Kill a run in mid-copy, and leave the guest frozen as a run does that is killed a moment earlier."""
    with subprocess.Popen([PYBACKUP, *command(guest, wanted, folder)], stdout=subprocess.DEVNULL) as process:
        guest.wait_until(lambda guest: guest.monitor("query-block-exports"), "export that the run reads from")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    left = left_by(guest, folder)
    assert left["jobs"], "there is nothing that the next run would have to clean up"
    if left["file systems"] == "thawed":
        guest.ask_agent("guest-fsfreeze-freeze")


def left_by(guest: Guest, folder: Path) -> dict[str, Any]:
    """What a run must not leave behind, wherever."""
    return {**guest.left(), "scratch files": os.listdir(folder / "scratch")}


@pytest.fixture(scope="module", params=range(len(WANTED)), ids=["full", "frozen", "crash", "after-kill"])
def point(request, night) -> Point:
    return night.points[request.param]


@pytest.fixture(scope="module")
def restored(night, point, tmp_path_factory) -> list[Disk]:
    """A point's disks as `restore` makes them."""
    folder = tmp_path_factory.mktemp("restored")
    wanted = ["--format", point.wanted.format, "--repo", night.repository]
    done = run_pybackup(["restore", f"web1/{point.manifest['point']}", folder / "disks", *wanted])
    assert done.rc == 0, done
    return [Disk(folder / f"disks/{name}.{point.wanted.format}", point.wanted.format) for name in NAMES]


@pytest.fixture(scope="module")
def raw(restored, tmp_path_factory) -> Iterator[list[Path]]:
    """The restored disks for those judges that read raw images only."""
    folder = tmp_path_factory.mktemp("raw")
    yield [raw_copy(disk.path, folder / f"{disk.path.stem}.raw", image_format=disk.format) for disk in restored]
    shutil.rmtree(folder)


def test_each_point_is_of_the_kind_that_was_asked_for_and_says_how_consistent_it_is(point):
    disks = point.manifest["disks"]
    assert [(disk["name"], disk["kind"]) for disk in disks] == [(name, point.wanted.kind) for name in NAMES]
    expected = "filesystem" if point.wanted.frozen else "crash"
    assert [disk["source"]["consistency"] for disk in disks] == [expected] * len(NAMES)
    if not point.wanted.after_kill:
        assert point.done.machine["warnings"] == []


def test_nothing_is_left_but_the_bitmap_that_continues_each_disk(point):
    own = {disk["name"]: [disk["bitmap"]["started"]] for disk in point.manifest["disks"]}
    assert point.bitmaps == own
    for found, left in point.left.items():
        assert left == "thawed" if found == "file systems" else not left, found


def test_the_guest_goes_on_writing_while_it_is_backed_up(point, raw):
    newest = max(ring_of(raw[1]))
    assert point.before.number <= newest <= point.after.number + 1
    # The copying is slow and comes after the instant: some of what it read, the guest overwrote meanwhile (much of it,
    # where nothing else wants the cores).
    assert point.after.number - newest >= 2


def test_the_ring_of_numbers_is_unbroken(raw):
    numbers = ring_of(raw[1])
    assert numbers == list(range(numbers[0], numbers[0] + SLOTS))


def test_both_disks_are_of_one_instant(raw):
    assert marker_of(raw[0]) - max(ring_of(raw[1])) in (0, 1)


def test_the_file_system_needs_no_mending_and_no_replay_if_it_was_frozen(point, raw):
    assert journal_is_clean(raw[0]) == point.wanted.frozen
    if point.wanted.frozen:
        require_sound(raw[0])
    else:
        require_sound_after_replay(raw[0])


def test_a_guest_boots_the_restored_disk_and_finds_its_files_whole(night, point, restored, tmp_path):
    verdict, *found = verdict_of(night.system, restored[0]).split()
    assert verdict == "good", found
    count, newest = (int(number) for number in found)
    assert KEPT <= count <= KEPT + 1
    assert point.before.generation <= newest <= point.after.generation + 1
    require_sound(raw_copy(restored[0].path, tmp_path / "after.raw", image_format=restored[0].format))


def test_a_guest_boots_the_newest_data_file_without_pybackup(night, tmp_path):
    newest = night.points[-1]
    [held] = [disk["data"]["file"] for disk in newest.manifest["disks"] if disk["name"] == "vda"]
    data_file = night.repository / "web1" / held
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", data_file, "-F", "qcow2", overlay)
    assert verdict_of(night.system, Disk(overlay, "qcow2")).startswith("good ")


def test_every_data_file_is_sound_and_so_are_the_disks_that_were_backed_up(night):
    check_repository(night.repository)
    for disk in night.disks:
        assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", disk.path)
    done = run_pybackup(["verify", "--repo", night.repository, "--deep"])
    assert done.rc == 0, done


@pytest.mark.parametrize("name", NAMES)
def test_the_chain_goes_on_when_the_machine_is_off_and_equals_the_disk_bit_for_bit(night, name, tmp_path):
    [disk] = [disk for disk in night.disks if disk.path.stem == name]
    [newest] = [each for each in night.points[-1].manifest["disks"] if each["name"] == name]
    assert bitmaps(disk.path) == {newest["bitmap"]["started"]: ["auto"]}
    repository = Path(shutil.copytree(night.repository, tmp_path / "repo"))  # the other tests' stays as it is
    source = ["--image", disk.path, "--machine", "web1", "--disk", name]
    done = run_pybackup(["incremental", *source, "--bitmap", "b1", "--repo", repository, "--json"])
    assert (done.rc, done.stderr, done.disk["kind"]) == (0, "", "incremental"), done
    restore_and_cmp(repository, "web1/latest", disk.path)
