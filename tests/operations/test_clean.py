"""
`clean` lists our bitmaps and takes them out, of images and running machines, and touches nothing else.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from lab import MIB, bitmaps, call_pybackup, make_image, run
from live import Machine, Nights, Step, private_tmp, remove_empty_folders, stopped_at

POINT = "20261122T010000Z-1f3a09c1"
GONE = "deadbeef"
FOREIGN = [
    "b1",
    "backup-vda",
    f"b1.{GONE}",
    f"b1.{GONE}.{POINT}x",
    f"b.1.{GONE}.{POINT}",
    f"b1.DEADBEEF.{POINT}",
    f"b1.{GONE}0.{POINT}",
    f"b1.{GONE}.latest",
]
"""Names that look like ours."""


def add(image: Path, *names: str) -> None:
    for name in names:
        run("qemu-img", "bitmap", "--add", image, name)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with the bitmap of a point, one of a repository that is gone, and others' bitmaps."""
    made = make_image(tmp_path / "x.qcow2", MIB)
    given = ["full", "--image", made, "--machine", "m", "--bitmap", "b1", "--repo", tmp_path / "repo"]
    assert call_pybackup(given).rc == 0
    add(made, f"b1.{GONE}.{POINT}", f"other-family.{GONE}.{POINT}", *FOREIGN)
    return made


def own(image: Path) -> set[str]:
    return set(bitmaps(image)) - set(FOREIGN) - {f"b1.{GONE}.{POINT}", f"other-family.{GONE}.{POINT}"}


def clean(*options: object):
    return call_pybackup(["clean", *map(str, options)])


def test_without_a_repository_bitmaps_are_listed_and_none_is_removed(image, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = bitmaps(image)
    [name] = own(image)
    done = clean("--image", image, "--json")
    assert (done.rc, done.stderr) == (0, ""), done
    listed = [(found["place"], found["name"], found["repository"]) for found in done.document["bitmaps"]]
    ours = {name: name.split(".")[1], f"b1.{GONE}.{POINT}": GONE, f"other-family.{GONE}.{POINT}": GONE}
    assert sorted(listed) == sorted((f"image {image}", name, short_id) for name, short_id in ours.items())
    assert not any(found["selected"] or found["removed"] for found in done.document["bitmaps"])
    said = clean("--image", image).stdout
    assert "nothing was removed" in said
    assert "--repository ID" in said
    refused = clean("--image", image, "--bitmaps", "--yes")
    assert (refused.rc, "--repository ID" in refused.stderr) == (2, True), refused
    assert bitmaps(image) == before


@pytest.mark.parametrize("selected", ["bitmaps", "gone", "both"])
def test_the_selected_bitmaps_are_listed_first_and_removed_with_yes(image, tmp_path, selected):
    before, ours = bitmaps(image), own(image)
    options = ["--image", image, "--repo", tmp_path / "repo"]
    options += ["--bitmaps"] * (selected != "gone") + ["--repository", GONE] * (selected != "bitmaps")
    wanted = (ours if selected != "gone" else set()) | (
        {f"b1.{GONE}.{POINT}", f"other-family.{GONE}.{POINT}"} if selected != "bitmaps" else set()
    )
    done = clean(*options, "--json")
    assert {found["name"] for found in done.document["bitmaps"] if found["selected"]} == wanted
    assert bitmaps(image) == before
    assert "--yes" in clean(*options).stdout
    done = clean(*options, "--yes", "--json")
    assert (done.rc, done.stderr) == (0, ""), done
    assert {found["name"] for found in done.document["bitmaps"] if found["removed"]} == wanted
    after = bitmaps(image)
    assert set(after) == set(before) - wanted
    assert all(after[name] == before[name] for name in after)
    assert "No errors" in run("qemu-img", "check", image)


def test_after_it_an_image_goes_back_to_an_internal_snapshot_and_the_next_backup_reads_everything(tmp_path):
    """qemu-img refuses to go back while there is any bitmap."""
    image = make_image(tmp_path / "x.qcow2", MIB)
    run("qemu-img", "snapshot", "-c", "before", image)
    given = ["--image", image, "--machine", "m", "--bitmap", "b1", "--repo", tmp_path / "repo"]
    assert call_pybackup(["full", *given]).rc == 0
    refused = subprocess.run(["qemu-img", "snapshot", "-a", "before", image], capture_output=True, check=False)
    assert b"active dirty bitmaps" in refused.stderr
    assert clean("--image", image, "--bitmaps", "--repo", tmp_path / "repo", "--yes").rc == 0
    run("qemu-img", "snapshot", "-a", "before", image)
    done = call_pybackup(["incremental", *given, "--json"])
    assert (done.rc, done.machine["disks"][0]["rescan"]) == (3, True), done


def test_several_images_raw_ones_too(image, tmp_path):
    raw = make_image(tmp_path / "r.raw", MIB, image_format="raw")
    other = make_image(tmp_path / "y.qcow2", MIB)
    add(other, f"b1.{GONE}.{POINT}")
    done = clean("--image", image, "--image", raw, "--image", other, "--repository", GONE, "--yes", "--json")
    assert done.rc == 0, done
    removed = [found["place"] for found in done.document["bitmaps"] if found["removed"]]
    assert removed == [f"image {image}"] * 2 + [f"image {other}"]
    assert bitmaps(other) == {}


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--qmp", "/nowhere", "--image", "x.qcow2"],
        ["--image", "x.qcow2", "--repository", "DEADBEEF"],
        ["--image", "x.qcow2", "--repository", "dead"],
        ["--qmp", "/nowhere", "--yes"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_said_before_anything_is_looked_at(options):
    done = clean(*options)
    assert (done.rc, len(done.stderr.splitlines())) == (2, 2), done


def test_an_image_that_is_not_there_and_one_that_a_run_reads(image, tmp_path):
    done = clean("--image", tmp_path / "none.qcow2")
    assert (done.rc, len(done.stderr.splitlines())) == (13, 2), done
    step = Step("PartFile.put", "after", module="backup.repository.data_file_writer")
    given = ["incremental", "--image", image, "--machine", "m", "--bitmap", "b1", "--repo", tmp_path / "repo"]
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", image)
    before = bitmaps(image)
    with stopped_at(step, given):
        done = clean("--image", image, "--bitmaps", "--repo", tmp_path / "repo", "--yes")
        assert done.rc == 11, done
        done = clean("--image", image, "--repository", GONE, "--yes")
        assert (done.rc, "in use" in done.stderr) == (3, True), done
    assert set(before) <= set(bitmaps(image))


# Running machines


@pytest.fixture
def nights(tmp_path: Path):
    with Machine.of(tmp_path, "a", "b") as machine, private_tmp(machine.place):
        machine.start().write("a", 0, 200_000, 0x11)
        found = Nights.of(machine)
        found.full()
        for name in (f"b1.{GONE}.{POINT}", *FOREIGN):
            machine.monitor("block-dirty-bitmap-add", node="b", name=name, persistent=True)
        yield found


def test_bitmaps_of_a_running_machine_are_listed_and_removed_with_yes(nights):
    machine, name = nights.machine, nights.own_bitmap
    options = ["--qmp", machine.qmp, "--repo", nights.repository, "--bitmaps"]
    done = clean(*options, "--json")
    assert done.rc == 0, done
    shown = {(found["place"], found["name"], found["selected"]) for found in done.document["bitmaps"]}
    assert shown == {("node a", name, True), ("node b", name, True), ("node b", f"b1.{GONE}.{POINT}", False)}
    assert name in machine.bitmaps("a")
    done = clean(*options, "--yes")
    assert (done.rc, done.stderr) == (0, ""), done
    assert machine.bitmaps("a") == {}
    assert set(machine.bitmaps("b")) == {f"b1.{GONE}.{POINT}", *FOREIGN}
    done = clean("--qmp", machine.qmp, "--repository", GONE, "--yes")
    assert (done.rc, done.stderr) == (0, ""), done
    assert set(machine.bitmaps("b")) == set(FOREIGN)
    nights.require_rescans("is missing")


def test_after_it_a_machine_goes_back_to_an_internal_snapshot(nights):
    """loadvm is refused while there is any bitmap, and leaves the guest stopped."""
    machine = nights.machine
    for name in FOREIGN:
        machine.monitor("block-dirty-bitmap-remove", node="b", name=name)
    assert machine.monitor("human-monitor-command", command_line="savevm s") == ""
    assert "active dirty bitmaps" in machine.monitor("human-monitor-command", command_line="loadvm s")
    assert machine.monitor("query-status")["status"] == "restore-vm"
    machine.monitor("cont")
    assert machine.monitor("query-status")["status"] == "running"
    options = ["--qmp", machine.qmp, "--repo", nights.repository, "--bitmaps", "--repository", GONE]
    assert clean(*options, "--yes").rc == 0
    assert machine.monitor("human-monitor-command", command_line="loadvm s") == ""


def test_what_a_killed_run_of_a_repository_that_is_gone_left_goes_too(nights):
    """Its jobs keep an administrator from resizing the disk, and no run of it will come."""
    machine, short_id = nights.machine, nights.repo8
    with stopped_at(Step("transaction", "after"), nights.arguments("incremental")) as killed:
        killed.kill()
        killed.wait(30)
    assert machine.leftovers()
    done = clean("--qmp", machine.qmp, "--repository", short_id, "--yes")
    assert (done.rc, done.stderr) == (0, ""), done
    remove_empty_folders()
    nights.require_nothing_left()
    assert set(machine.bitmaps("a")) == set()


def test_a_bitmap_that_cannot_be_removed_is_told_and_the_others_go(nights):
    machine, name = nights.machine, nights.own_bitmap
    machine.monitor("nbd-server-start", addr={"type": "unix", "data": {"path": str(machine.place / "foreign")}})
    machine.monitor("block-dirty-bitmap-disable", node="a", name=name)
    machine.monitor("block-export-add", type="nbd", id="x", node_name="a", name="x", bitmaps=[name])
    done = clean("--qmp", machine.qmp, "--repo", nights.repository, "--bitmaps", "--yes")
    assert (done.rc, "in use" in done.stderr, name in done.stderr) == (3, True, True), done
    assert list(machine.bitmaps("a")) == [name]
    assert name not in machine.bitmaps("b")
    machine.monitor("block-export-del", id="x")
    machine.monitor("nbd-server-stop")


def test_a_run_under_way_keeps_its_bitmaps(nights):
    with stopped_at(Step("transaction", "after"), nights.arguments("incremental")):
        done = clean("--qmp", nights.machine.qmp, "--repo", nights.repository, "--bitmaps", "--yes")
        assert done.rc in {11, 13}, done  # the run holds the machine and the socket
        assert nights.own_bitmap in nights.machine.bitmaps("a")
