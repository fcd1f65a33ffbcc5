"""
The life of a bitmap in a running machine: whatever makes it untrustworthy is noticed, and every point restores.

As tests/test_bitmap_life.py for images; here QEMU shows what there is, and the disk that the guest writes to may move.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lab import KIB, MIB, call_pybackup, make_image, run, run_pybackup
from live import (
    Disk,
    Machine,
    Nights,
    Step,
    below_the_guest,
    blockdev,
    kinds,
    private_tmp,
    remove_empty_folders,
    stopped_at,
    wait_until,
)

from backup.operations import backup as creating


@pytest.fixture
def machine(tmp_path: Path):
    with Machine.of(tmp_path, "a", "b") as found, private_tmp(found.place):
        yield found.start()


@pytest.fixture
def nights(machine: Machine) -> Nights:
    """Two disks with a full, and writes after it: something to lose."""
    machine.write("a", 0, 200_000, 0x11)
    machine.write("b", MIB, 300_000, 0x12)
    found = Nights.of(machine)
    found.full()
    dirty(machine)
    return found


def dirty(machine: Machine) -> None:
    machine.write("a", 2 * MIB, 70_000, 0x21)
    machine.write("b", 100_000, 1000, 0x22)
    machine.zero("b", MIB, 100_000)


# Disks that take no new bitmap


@pytest.mark.parametrize("which", [0, 1])
def test_a_disk_that_takes_no_new_bitmap_costs_neither_its_night_nor_its_neighbours(nights, monkeypatch, which):
    """QEMU refuses the whole transaction, without a word on the disk: here one has a bitmap of that name already."""
    decided = creating._Backup._decided

    def and_in_the_way(self: Any, *, start_bitmaps: bool) -> list[Any]:
        disks = decided(self, start_bitmaps=start_bitmaps)
        if not self.refusals:
            node = list(nights.machine.disks.values())[which].node
            nights.machine.monitor("block-dirty-bitmap-add", node=node, name=disks[which].started)
        return disks

    with monkeypatch.context() as patch:
        patch.setattr(creating._Backup, "_decided", and_in_the_way)
        done = nights.backup("incremental")
    assert (done.rc, kinds(done), [disk["rescan"] for disk in done.machine["disks"]]) == (
        3,
        {"incremental"},
        [False] * 2,
    )
    [warning] = done.machine["warnings"]
    name = list(nights.machine.disks)[which]
    assert warning.startswith(f"disk {name}: no bitmap was started: Bitmap already exists: b1.")
    started = [disk["bitmap"]["started"] for disk in nights.newest["disks"]]
    assert [found is None for found in started] == [number == which for number in range(2)]
    nights.require_sound()
    dirty(nights.machine)
    nights.require_rescans("without starting a bitmap: Bitmap already exists", only=[name])
    nights.require_incremental("--no-fallback")


# What goes well


def test_five_nights_are_five_incrementals_and_one_bitmap(nights):
    for night in range(5):
        nights.machine.write("a", night * 500_000, 100_000, night + 1)
        nights.machine.zero("b", night * 500_000, 70_000, discard=night % 2 == 0)
        done = nights.backup("incremental")
        assert (done.rc, done.stderr, kinds(done)) == (0, "", {"incremental"}), done
        nights.require_own_bitmap_alone()
    nights.require_sound()


def test_nothing_written_is_an_empty_incremental(nights):
    nights.require_incremental()
    for disk in nights.require_incremental().machine["disks"]:
        assert (disk["dirty_bytes"], disk["data_bytes"], disk["zero_bytes"]) == (0, 0, 0)


def test_bitmaps_outlive_a_clean_end_of_the_machine(nights):
    for _ in range(2):
        nights.machine.restart()
        dirty(nights.machine)
        nights.require_incremental("--no-fallback")


def test_the_chain_goes_on_between_a_running_machine_and_its_images(nights):
    """The same repository, and the bitmaps in the images: off or on, a night is an incremental."""
    machine = nights.machine
    machine.quit()
    config = machine.folder / "c.yaml"
    disks = ", ".join(f"{disk.name}: {{image: {disk.image}}}" for disk in machine.disks.values())
    config.write_text(f"repository: {nights.repository}\nbitmap: b1\nmachines:\n  m:\n    disks: {{{disks}}}\n")
    done = nights._noted(run_pybackup(["--config", config, "incremental", "--json"]))
    assert (done.rc, kinds(done)) == (0, {"incremental"}), done
    machine.start()
    dirty(machine)
    nights.require_incremental("--no-fallback")


@pytest.mark.parametrize("way", ["device", "image", "node"])
def test_a_disk_is_named_by_its_node_its_device_or_its_image(nights, way):
    named = []
    for disk in nights.machine.disks.values():
        text = {"device": disk.device, "image": disk.image, "node": disk.node}[way]
        named += ["--node", text, "--disk", disk.name]
    done = nights.backup_of("incremental", "--no-fallback", *named)
    assert (done.rc, done.stderr, kinds(done)) == (0, "", {"incremental"}), done
    nights.require_sound()


def test_a_node_with_another_name_after_a_restart_is_found_by_its_image(nights):
    machine = nights.machine
    machine.quit()
    for disk in machine.disks.values():
        disk.node = f"other-{disk.name}"
    machine.start()
    dirty(machine)
    named = [word for disk in machine.disks.values() for word in ("--node", disk.image, "--disk", disk.name)]
    done = nights.backup_of("incremental", "--no-fallback", *named)
    assert (done.rc, done.stderr, kinds(done)) == (0, "", {"incremental"}), done
    nights.require_sound()


def test_an_image_is_found_by_a_relative_path_and_through_a_link(nights):
    machine = nights.machine
    link = machine.folder / "link.tmp"
    link.symlink_to(machine.disks["a"].image)
    done = nights.backup_of("incremental", "--no-fallback", "--node", link, "--disk", "a", "--exclude", "b")
    assert (done.rc, kinds(done)) == (0, {"incremental"}), done
    nights.require_sound()


def test_one_disk_left_out_keeps_its_bitmap_for_later(nights):
    machine = nights.machine
    first = nights.own_bitmap
    done = nights.backup_of("incremental", "--no-fallback", "--node", "a", "--disk", "a", "--exclude", "b")
    assert (done.rc, kinds(done)) == (0, {"incremental"}), done
    assert first in machine.bitmaps("b")
    assert list(machine.bitmaps("a")) == [nights.own_bitmap]
    dirty(machine)
    nights.require_incremental("--no-fallback")
    nights.require_own_bitmap_alone()


def test_a_disk_that_was_unplugged_and_plugged_again_goes_on(nights):
    machine = nights.machine
    machine.unplug("b")
    machine.plug("b")
    dirty(machine)
    nights.require_incremental("--no-fallback")


def test_foreign_bitmaps_are_left_alone(nights):
    machine = nights.machine
    foreign = ["b1", "x", f"b1.{nights.repo8}", "b1.00000000.20261123T021838Z-0b0f4d49", f"b1.{nights.repo8}.abc"]
    for name in foreign:
        machine.monitor("block-dirty-bitmap-add", node="a", name=name, persistent=True)
    machine.monitor("block-dirty-bitmap-disable", node="a", name="x")
    dirty(machine)
    before = {name: machine.bitmaps("a")[name] for name in foreign}
    for _ in range(2):
        nights.require_incremental()
    after = machine.bitmaps("a")
    assert {name: after[name] for name in foreign} == before
    assert set(after) == {*foreign, nights.own_bitmap}


def test_two_repositories_back_up_one_machine_and_neither_disturbs_the_other(nights):
    other = Nights(nights.machine, nights.machine.folder / "other.tmp")
    other.full()
    for _ in range(2):
        for each in (nights, other):
            dirty(nights.machine)
            done = each.backup("incremental", "--no-fallback")
            assert (done.rc, done.stderr, kinds(done)) == (0, "", {"incremental"}), done
    nights.require_restored()
    other.require_restored()
    assert set(nights.machine.bitmaps("a")) == {nights.own_bitmap, other.own_bitmap}


def test_a_paused_machine_is_backed_up(nights):
    nights.machine.monitor("stop")
    done = nights.backup("incremental", "--no-fallback")
    assert (done.rc, done.stderr, kinds(done)) == (0, "", {"incremental"}), done
    nights.require_restored()
    # QEMU 7.2 closes passed descriptors only while the machine runs.
    nights.machine.monitor("cont")
    dirty(nights.machine)
    nights.require_incremental("--no-fallback")


def test_map_shows_what_is_dirty_and_changes_nothing(nights):
    machine = nights.machine
    before = machine.bitmaps("a")
    done = run_pybackup(["map", "--qmp", machine.qmp, "--node", "a", "--bitmap", nights.own_bitmap, "--json"])
    assert (done.rc, done.stderr) == (0, ""), done
    shown = [(each["start"], each["length"]) for each in done.document if each["dirty"]]
    assert shown == [(2 * MIB, 2 * 64 * KIB)]
    assert sum(each["length"] for each in done.document) == 4 * MIB
    assert machine.bitmaps("a") == before
    nights.require_nothing_left()
    nights.require_incremental("--no-fallback")


def test_a_dry_run_estimates_and_changes_nothing(nights):
    machine = nights.machine
    before, files = machine.bitmaps("a"), sorted(nights.repository.rglob("*"))
    dry = nights.backup("incremental", "--dry-run")
    assert (dry.rc, dry.stderr, kinds(dry)) == (0, "", {"incremental"}), dry
    assert machine.bitmaps("a") == before
    assert sorted(nights.repository.rglob("*")) == files
    nights.require_nothing_left()
    done = nights.require_incremental()
    for estimate, disk in zip(dry.machine["disks"], done.machine["disks"], strict=True):
        for key in ("dirty_bytes", "data_bytes", "zero_bytes"):
            assert estimate[key] == disk[key]


# What ends in a full, with the reason


def test_a_missing_bitmap_of_one_disk_makes_that_disks_backup_a_full(nights):
    nights.machine.monitor("block-dirty-bitmap-remove", node="a", name=nights.own_bitmap)
    nights.require_fallback("is missing", only=["a"])


def test_a_bitmap_removed_and_a_plain_one_added(nights):
    nights.machine.monitor("block-dirty-bitmap-remove", node="a", name=nights.own_bitmap)
    nights.machine.monitor("block-dirty-bitmap-add", node="a", name="b1", persistent=True)
    nights.require_fallback("is missing", only=["a"])
    assert "b1" in nights.machine.bitmaps("a"), "it is not ours to remove"


def test_a_bitmap_removed_and_added_again_by_a_user_who_forgot_to_make_it_persistent(nights):
    nights.machine.monitor("block-dirty-bitmap-remove", node="a", name=nights.own_bitmap)
    nights.machine.monitor("block-dirty-bitmap-add", node="a", name=nights.own_bitmap)
    nights.require_fallback("persistent", only=["a"])


def test_a_bitmap_removed_and_added_again_under_our_name_with_another_granularity(nights):
    machine, name = nights.machine, nights.own_bitmap
    machine.monitor("block-dirty-bitmap-remove", node="a", name=name)
    machine.write("a", 3 * MIB, 1000, 0x36)
    machine.monitor("block-dirty-bitmap-add", node="a", name=name, persistent=True, granularity=4096)
    nights.require_fallback("granularity of 4096", only=["a"])


def test_a_disabled_bitmap(nights):
    nights.machine.monitor("block-dirty-bitmap-disable", node="b", name=nights.own_bitmap)
    nights.require_fallback("is disabled", only=["b"])


def test_bitmaps_that_a_crash_left_inconsistent(nights):
    nights.machine.restart()
    dirty(nights.machine)
    nights.machine.crash()
    dirty(nights.machine)
    nights.require_fallback("is inconsistent")
    nights.require_own_bitmap_alone()


def test_bitmaps_that_a_crash_lost(nights):
    nights.machine.crash()
    nights.require_fallback("is missing")


def test_a_bitmap_that_another_operation_holds(nights):
    """A foreign backup job uses it: it cannot be merged, and the disk is read whole beside that job."""
    machine = nights.machine
    target = make_image(machine.folder / "target.tmp", 4 * MIB)
    machine.monitor("blockdev-add", driver="qcow2", node_name="t", file={"driver": "file", "filename": str(target)})
    machine.write("a", 0, 4 * MIB, 0x33)  # long enough for a job at a byte per second
    busy = {"bitmap": nights.own_bitmap, "bitmap-mode": "never", "sync": "bitmap"}
    machine.monitor("blockdev-backup", device="a", target="t", job_id="foreign", speed=1, **busy)
    done = nights.backup("incremental", "--no-fallback")
    assert done.rc == 14, done
    assert f"bitmap {nights.own_bitmap} is in use by another operation" in done.machine["error"]["message"]
    done = nights.backup("incremental")
    assert (done.rc, "is in use by another operation" in done.stderr) == (3, True), done
    assert [job["id"] for job in machine.monitor("query-jobs")] == ["foreign"]
    machine.monitor("job-cancel", id="foreign")
    nights.require_restored()


def test_a_bitmap_below_an_external_snapshot_is_not_taken_for_the_disks(nights):
    machine = nights.machine
    below_the_guest(machine, "a")
    machine.write("a", 3 * MIB, 100_000, 0x31)  # what the bitmap of the lower node does not see
    nights.require_fallback("backing", only=["a"])


@pytest.mark.parametrize("text", ["a", "dev-a", "image"])
def test_any_name_below_an_external_snapshot_means_the_node_that_the_guest_writes_to(nights, text):
    machine = nights.machine
    lower = machine.disks["a"].image
    below_the_guest(machine, "a")
    machine.write("a", 3 * MIB, 100_000, 0x31)
    named = lower if text == "image" else text
    done = nights.backup_of("full", "--node", named, "--disk", "a", "--node", "b", "--disk", "b")
    assert (done.rc, kinds(done)) == (0, {"full"}), done
    assert nights.own_bitmap in machine.bitmaps("a-top")
    machine.write("a", 3 * MIB, 1000, 0x32)
    nights.require_incremental("--no-fallback")


def test_disks_whose_nodes_names_are_exchanged_after_a_restart_are_not_taken_for_each_other(nights):
    """Both have a sound bitmap of the newest point; of disks that hold the same, no spot check would tell."""
    machine = nights.machine
    for name in machine.disks:
        machine.write(name, 0, 4 * MIB, 0x31)
    nights.require_incremental("--no-fallback")
    machine.write("a", MIB, 1000, 0x32)
    machine.quit()
    a, b = machine.disks.values()
    a.node, b.node = b.node, a.node
    machine.start()
    # The program is told the same as before, by the names of nodes.
    a.name, b.name, machine.disks = "b", "a", {"a": b, "b": a}
    nights.require_fallback("belongs to disk")


# A disk moves to other files while it runs


def finish(machine: Machine, job: str) -> None:
    """Have a job that copied all let the guest go on in its target, and wait for its end."""

    def status() -> str:
        return next((found["status"] for found in machine.monitor("query-jobs") if found["id"] == job), "gone")

    wait_until(lambda: status() == "ready", f"copy of job {job}")
    machine.monitor("job-complete", id=job)
    wait_until(lambda: status() == "gone", f"end of job {job}")


@pytest.mark.parametrize("between", [False, True], ids=["no backup meanwhile", "a backup meanwhile"])
def test_what_was_written_above_an_external_snapshot_is_not_lost_when_that_is_committed(nights, between):
    """A commit is recorded by the lower image's bitmap; of a point that was taken above it that has none."""
    machine, disk = nights.machine, nights.machine.disks["a"]
    below_the_guest(machine, "a")
    machine.write("a", 3 * MIB, 100_000, 0x31)
    if between:
        nights.require_rescans("backing", only=["a"])
        machine.write("a", 3 * MIB, 50_000, 0x32)
    machine.monitor("block-commit", device=disk.node, base_node="a", job_id="commit")
    finish(machine, "commit")
    disk.node = "a"
    machine.write("a", MIB, 1000, 0x33)
    if between:
        nights.require_rescans("backing", only=["a"])
    nights.require_incremental("--no-fallback")
    nights.require_own_bitmap_alone()
    machine.quit()


def test_a_backing_file_that_is_exchanged_while_the_machine_runs_is_noticed(nights):
    machine, disk = nights.machine, nights.machine.disks["a"]
    below_the_guest(machine, "a")
    nights.require_rescans("backing", only=["a"])
    other = machine.folder / "other.qcow2.tmp"
    run("qemu-img", "convert", "-U", "-O", "qcow2", disk.image, other)
    run("qemu-io", "-c", "write -P 0x41 1M 64k", other)
    storage = {"driver": "file", "filename": str(other)}
    machine.monitor("blockdev-add", driver="qcow2", node_name="other", read_only=True, file=storage)
    [top] = [node for name, node in machine.nodes().items() if name == disk.node]
    file = next(name for name, node in machine.nodes().items() if node["drv"] == "file" and node["file"] == top["file"])
    reopened = {"driver": "qcow2", "node-name": disk.node, "file": file, "backing": "other"}
    machine.monitor("blockdev-reopen", options=[reopened])
    disk.model[MIB : MIB + 65536] = b"\x41" * 65536
    nights.require_fallback("backing file", only=["a"])


def test_a_disk_that_was_mirrored_to_another_image_is_read_there(nights):
    """Bitmaps do not go along."""
    machine, disk = nights.machine, nights.machine.disks["a"]
    target = make_image(machine.folder / "moved.qcow2.tmp", 4 * MIB)
    machine.monitor("blockdev-add", **blockdev(Disk("moved", target, bytearray())))
    machine.monitor("blockdev-mirror", device="a", target="moved", sync="full", job_id="mirror")
    finish(machine, "mirror")
    disk.node = "moved"
    machine.write("a", MIB, 1000, 0x51)
    done = nights.backup_of("incremental", "--node", disk.device, "--disk", "a")
    assert (done.rc, "is missing" in done.stderr) == (3, True), done
    machine.write("a", 0, 1000, 0x52)
    nights.require_incremental("--no-fallback")


# Raw images hold no bitmaps


def test_a_raw_disks_bitmap_lasts_as_long_as_the_machine_runs_and_that_is_said(tmp_path):
    image = make_image(tmp_path / "r.raw", 4 * MIB, image_format="raw")
    with Machine(tmp_path, Disk("r", image, bytearray(4 * MIB), "raw")) as machine, private_tmp(machine.place):
        nights = Nights.of(machine.start())
        machine.write("r", 70_000, MIB, 0x41)
        done = nights.backup("full")
        assert done.rc == 3, done
        assert "restart" in done.stderr
        for night in range(3):
            machine.write("r", night * 100_000, 5, 0x42 + night)
            machine.zero("r", 3 * MIB, 5)
            nights.require_incremental("--no-fallback")
        machine.restart()
        machine.write("r", 0, 10, 0x46)
        nights.require_fallback("is missing")


def test_a_raw_disk_that_looks_like_a_qcow2_when_the_machine_is_off_is_refused(tmp_path):
    """Its guest wrote that header, and may have named any file of the host in it."""
    image = make_image(tmp_path / "r.raw", 4 * MIB, image_format="raw")
    with Machine(tmp_path, Disk("r", image, bytearray(4 * MIB), "raw")) as machine, private_tmp(machine.place):
        nights = Nights.of(machine.start())
        assert nights.backup("full").rc == 3
        machine.quit()
    image.write_bytes(make_image(tmp_path / "guests.qcow2", 4 * MIB).read_bytes())
    offline = ["incremental", "--image", image, "--machine", "m", "--disk", "r", "--bitmap", "b1"]
    done = call_pybackup([*offline, "--repo", nights.repository])
    assert done.rc == 2, done
    assert "was raw at point" in done.stderr


# Nights on which the machine is off


def test_one_chain_takes_nights_on_which_the_machine_runs_and_on_which_it_is_off(tmp_path):
    with Machine.of(tmp_path, "a") as machine, private_tmp(machine.place):
        nights = Nights.of(machine.start())
        nights.full()
        offline = ["incremental", "--machine", "m", "--disk", "a", "--bitmap", "b1", "--no-fallback"]
        for night in range(2):
            machine.write("a", night * 100_000, 70_000, 0x61 + night)
            held = machine.held()
            machine.quit()
            done = call_pybackup([*offline, "--image", machine.disks["a"].image, "--repo", nights.repository, "--json"])
            assert (done.rc, done.disk["kind"]) == (0, "incremental"), done
            nights.references[done.machine["point"]] = held
            machine.start().write("a", MIB + night * 100_000, 70_000, 0x71 + night)
            nights.require_incremental("--no-fallback")
        nights.require_own_bitmap_alone()


# Sizes


@pytest.mark.parametrize("size", [6 * MIB, 4 * MIB + 512, 4 * MIB + 64 * KIB])
def test_a_disk_that_grew_is_an_incremental_of_the_new_size(nights, size):
    nights.machine.resize("a", size)
    nights.machine.write("a", size - 512, 512, 0x51)
    done = nights.require_incremental("--no-fallback")
    assert done.machine["disks"][0]["size"] == size
    nights.require_incremental("--no-fallback")


@pytest.mark.parametrize("size", [2 * MIB, 2 * MIB + 512], ids=["by whole clusters", "to a part of a cluster"])
def test_a_disk_that_shrank_and_another_night_grew(nights, size):
    """After a shrink to a part of a cluster, growth brings back what the rest of the cluster held."""
    machine = nights.machine
    machine.resize("a", size)
    nights.require_incremental("--no-fallback")
    machine.resize("a", 5 * MIB)
    machine.learn("a")
    assert (machine.disks["a"].model[size : size + 512] == bytes(512)) == (size == 2 * MIB)
    nights.require_incremental("--no-fallback")


def test_a_disk_that_shrank_and_grew_again_between_two_nights_is_found_out(tmp_path):
    with Machine.of(tmp_path, "a") as machine, private_tmp(machine.place):
        nights = Nights.of(machine.start())
        machine.write("a", 3 * MIB, 300_000, 0x61)
        nights.full()
        machine.resize("a", 2 * MIB)
        machine.resize("a", 4 * MIB)
        done = nights.backup("incremental")
        assert (done.rc, done.disk["rescan"]) == (3, True), done
        assert "shrunk" in done.stderr
        nights.require_sound()
        nights.require_incremental("--no-fallback")


# An NBD server that is not ours


@pytest.mark.parametrize("wanted", ["full", "incremental"])
def test_a_foreign_nbd_server_is_an_error_and_goes_on_serving(nights, wanted):
    machine = nights.machine
    address, before = machine.place / "foreign", machine.bitmaps("a")
    machine.monitor("nbd-server-start", addr={"type": "unix", "data": {"path": str(address)}})
    machine.monitor("block-export-add", type="nbd", id="foreign", node_name="b", name="theirs")
    points = nights.points()
    done = nights.backup(wanted)
    assert done.rc == 13, done
    assert "NBD server" in done.machine["error"]["message"]
    assert done.machine["error"]["hint"]
    assert nights.points() == points
    assert machine.bitmaps("a") == before
    assert [
        export["export-name"] for export in json.loads(run("nbdinfo", "--list", "--json", uri(address)))["exports"]
    ] == ["theirs"]
    left = machine.leftovers()
    assert [text.split(":")[0] for text in left] == ["export foreign", "nbd-server-start"], left
    machine.monitor("block-export-del", id="foreign")
    machine.monitor("nbd-server-stop")
    nights.require_incremental("--no-fallback")


def test_a_foreign_nbd_server_that_began_after_a_killed_run_is_left_alone_and_the_leftovers_are_not(nights):
    """The killed run had not yet started a server; the one that is there now is not its."""
    machine = nights.machine
    with stopped_at(Step("transaction", "after"), nights.arguments("incremental")) as stopped:
        stopped.kill()
        stopped.wait(30)
    address = machine.place / "foreign"
    machine.monitor("nbd-server-start", addr={"type": "unix", "data": {"path": str(address)}})
    assert nights.backup("incremental").rc == 13
    run("nbdinfo", "--list", uri(address))
    left = machine.leftovers()
    assert [text.split(":")[0] for text in left] == ["nbd-server-start"], left
    machine.monitor("nbd-server-stop")
    remove_empty_folders()
    nights.require_incremental("--no-fallback")
    nights.require_own_bitmap_alone()


def uri(address: Path) -> str:
    return f"nbd+unix:///?socket={address}"
