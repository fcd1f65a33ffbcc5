"""
Disks of running machines as they come: below filters, read-only, of odd sizes and names, busy with other work.

Either the backup is right, or it is refused before anything is changed.
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest
from lab import KIB, MIB, call_pybackup, make_image
from live import Disk, Machine, Nights, Step, blockdev, kinds, private_tmp, stopped_at


@pytest.fixture
def machine(tmp_path: Path):
    with Machine.of(tmp_path, "a", "b") as found, private_tmp(found.place):
        found.start().write("a", 0, 200_000, 0x11)
        yield found


def test_a_throttled_disk_is_backed_up_below_its_filter(machine):
    nights = Nights.of(machine)
    machine.unplug("a")
    machine.monitor("blockdev-add", **blockdev(machine.disks["a"]))
    machine.monitor("object-add", qom_type="throttle-group", id="g", **{"x-iops-total": 10_000})
    machine.monitor("blockdev-add", driver="throttle", node_name="slow", file="a", throttle_group="g")
    machine.monitor("device_add", driver="scsi-hd", drive="slow", id="dev-a")
    for wanted, name in (("full", "slow"), ("incremental", "dev-a"), ("incremental", "a"), ("incremental", "slow")):
        machine.write("a", MIB, 1000, 0x21)
        done = nights.backup_of(wanted, "--node", name, "--disk", "a")
        assert (done.rc, done.stderr, kinds(done)) == (0, "", {wanted}), done
    assert list(machine.bitmaps("a")) == [nights.own_bitmap]
    nights.require_sound()


@pytest.mark.parametrize("again", ["a", "dev-a"])
def test_one_disk_under_two_names_is_refused_before_anything_is_changed(machine, again):
    nights = Nights.of(machine)
    done = nights.backup_of("full", "--node", "a", "--disk", "a", "--node", again, "--disk", "x")
    assert done.rc == 2, done
    assert f"a and {again} are the same disk" in done.stderr
    assert machine.bitmaps("a") == {}


@pytest.mark.parametrize("name", ["a:b.qcow2", "a b,c=d.qcow2", "ä-%41.qcow2"])
def test_an_image_of_an_odd_name_is_found_and_backed_up(tmp_path, name):
    image = make_image(tmp_path / name, MIB)
    with Machine(tmp_path, Disk("x", image, bytearray(MIB))) as machine, private_tmp(machine.place):
        nights = Nights.of(machine.start())
        for wanted in ("full", "incremental"):
            machine.write("x", 70_000, 1000, 0x22)
            done = nights.backup_of(wanted, "--node", image, "--disk", "x")
            assert (done.rc, done.stderr, kinds(done)) == (0, "", {wanted}), done
        nights.require_sound()


@pytest.mark.parametrize("cluster_size", ["512", "2M"])
def test_any_cluster_size_of_the_image(tmp_path, cluster_size):
    image = make_image(tmp_path / "x.qcow2", 5 * MIB, "-o", f"cluster_size={cluster_size}")
    with Machine(tmp_path, Disk("x", image, bytearray(5 * MIB))) as machine, private_tmp(machine.place):
        nights = Nights.of(machine.start())
        nights.full()
        machine.write("x", 700 * KIB, 512, 0x23)
        machine.write("x", 5 * MIB - 20_480, 20_480, 0x24)
        machine.zero("x", MIB, 100 * KIB)
        nights.require_incremental("--no-fallback")


@pytest.mark.parametrize("size", [4 * MIB + 512, MIB + 100])
def test_a_raw_disk_whose_size_is_no_whole_number_of_clusters(tmp_path, size):
    """QEMU shows a machine whole sectors only."""
    image = make_image(tmp_path / "r.raw", size, image_format="raw")
    whole = size - size % -512
    with Machine(tmp_path, Disk("r", image, bytearray(whole), "raw")) as machine, private_tmp(machine.place):
        nights = Nights.of(machine.start())
        machine.write("r", size // 512 * 512 - 512, 512, 0x25)
        assert nights.backup("full").rc == 3
        machine.write("r", size // 512 * 512 - 1024, 512, 0x26)
        nights.require_incremental("--no-fallback")


def test_a_disk_that_the_guest_may_only_read_is_backed_up(tmp_path):
    image = make_image(tmp_path / "x.qcow2", MIB)
    with Machine(tmp_path) as machine, private_tmp(machine.place):
        machine.start()
        disk = Disk("x", image, bytearray(MIB))
        machine.monitor("blockdev-add", **blockdev(disk), read_only=True)
        machine.monitor("device_add", driver="scsi-cd", drive="x", id="dev-x")
        machine.disks["x"] = disk
        nights = Nights.of(machine)
        nights.full()
        nights.require_incremental("--no-fallback")


def test_a_disk_that_another_job_copies_is_refused_for_that_reason_and_the_job_goes_on(machine):
    nights = Nights.of(machine)
    nights.full()
    target = make_image(machine.folder / "mirror.tmp", 4 * MIB)
    machine.monitor("blockdev-add", driver="qcow2", node_name="t", file={"driver": "file", "filename": str(target)})
    machine.monitor("blockdev-mirror", device="a", target="t", sync="full", job_id="foreign", speed=1)
    machine.write("b", 0, 1000, 0x27)
    done = nights.backup("incremental", "--no-fallback")
    assert done.rc == 13, done
    assert "mirror" in done.machine["error"]["message"]
    nights.require_restored()
    assert [job["id"] for job in machine.monitor("query-jobs")] == ["foreign"]
    machine.monitor("block-job-cancel", device="foreign", force=True)
    machine.write("a", 0, 1000, 0x28)
    nights.require_incremental("--no-fallback")


def test_a_temporary_folder_whose_sockets_would_have_too_long_names(machine, monkeypatch):
    long = machine.place / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    nights = Nights.of(machine)
    done = nights.backup("full")
    assert "a bug" not in done.stderr, done
    assert not os.listdir(long)
    nights.require_nothing_left()


def test_two_runs_at_once_the_second_names_the_first(machine):
    nights = Nights.of(machine)
    nights.full()
    with stopped_at(Step("transaction", "after"), nights.arguments("incremental")) as first:
        second = call_pybackup(nights.arguments("incremental"))
        assert second.rc == 11, second
        assert f"pid {first.pid}" in second.stderr


def test_two_machines_of_one_repository_are_backed_up_one_beside_the_other(machine, tmp_path):
    """What one run has in its QEMU is not what another one's recovery is for."""
    nights = Nights.of(machine)
    other_folder = tmp_path / "other.tmp"
    other_folder.mkdir()
    with Machine.of(other_folder, "c") as other:
        other.start().write("c", 0, 1000, 0x29)
        nights.full()
        given = ["full", "--qmp", other.qmp, "--machine", "n", "--bitmap", "b1", "--repo", nights.repository]
        with stopped_at(Step("transaction", "after"), nights.arguments("incremental")) as first:
            second = call_pybackup([*given, "--node", "c"])
            assert (second.rc, second.stderr) == (0, ""), second
            first.send_signal(signal.SIGCONT)
            assert first.wait(60) == 0
        nights.references.update(dict.fromkeys(nights.points() - set(nights.references), machine.held()))
        nights.require_sound()
        assert other.leftovers() == []
