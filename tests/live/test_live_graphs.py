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
from lab import KIB, MIB, call_pybackup, make_image, run
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
        done = nights.backup_of(wanted, "--node", name, "--disk", "a", "--exclude", "b")
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


def test_a_disk_of_no_bytes(tmp_path):
    """QEMU loses a bitmap of nothing when it ends."""
    with Machine.of(tmp_path, "x", size=0) as machine, private_tmp(machine.place):
        nights = Nights.of(machine.start())
        assert "empty image" in nights.backup("full").stderr
        nights.require_incremental("--no-fallback")
        audited = call_pybackup([*nights.arguments("audit")])
        assert audited.rc == 0, audited
        machine.restart()
        nights.require_fallback("empty image")


def test_a_disk_that_the_guest_may_only_read_is_backed_up(tmp_path):
    image = make_image(tmp_path / "x.qcow2", MIB)
    with Machine(tmp_path) as machine, private_tmp(machine.place):
        machine.start()
        disk = Disk("x", image, bytearray(MIB))
        machine.disks["x"] = disk
        plug_read_only(machine, "x")
        nights = Nights.of(machine)
        done = nights.backup("full")
        assert (done.rc, "open read-only" in done.stderr) == (3, True), done
        nights.require_incremental("--no-fallback")


def plug_read_only(machine: Machine, name: str) -> None:
    disk = machine.disks[name]
    machine.monitor("blockdev-add", **blockdev(disk), read_only=True)
    machine.monitor("device_add", driver="scsi-cd", drive=disk.node, id=disk.device)


def test_a_disk_that_is_read_only_for_some_nights(tmp_path):
    """The image's own bitmap can't be removed meanwhile, and says nothing of the nights between."""
    with Machine.of(tmp_path, "x") as machine, private_tmp(machine.place):
        nights = Nights.of(machine.start())
        nights.full()
        machine.write("x", MIB, 1000, 0x21)
        machine.unplug("x")
        plug_read_only(machine, "x")
        nights.require_incremental("--no-fallback")
        nights.require_incremental("--no-fallback")
        machine.unplug("x")
        machine.plug("x")
        machine.write("x", 2 * MIB, 1000, 0x22)
        nights.require_rescans("is missing")
        nights.require_sound()
        nights.require_own_bitmap_alone()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_qemu_that_runs_as_another_user_may_open_neither_the_scratch_file_nor_the_socket(tmp_path):
    """It is passed both; only its images are its own."""
    with tempfile.TemporaryDirectory(prefix="live-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o711)
        with Machine.of(folder, "a", "b") as machine, private_tmp(machine.place):
            machine.user = 65534
            nights = Nights.of(machine.start())
            assert os.stat(f"/proc/{machine.process.pid}").st_uid == 65534
            machine.write("a", 0, MIB, 0x21)
            nights.full()
            machine.write("b", 0, 2 * MIB, 0x22)
            nights.require_incremental("--no-fallback")
            private = tmp_path / "scratch"
            private.mkdir(mode=0o700)
            step, held = Step("PartFile.put", "before", module="backup.repository.data_file_writer"), machine.held()
            with stopped_at(step, nights.arguments("full", "--scratch", private)) as run_:
                machine.write("a", 0, MIB, 0x23)
                run_.send_signal(signal.SIGCONT)
                assert run_.wait(60) == 0
            [new] = nights.points() - set(nights.references)
            nights.references[new] = held
            with stopped_at(step, nights.arguments("incremental")) as run_:
                run_.kill()
            nights.require_cleaned()
            machine.crash()
            nights.require_rescans("is missing", "inconsistent")
            nights.require_sound()


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="needs root and loop devices")
def test_a_block_device_needs_a_scratch_folder(tmp_path):
    """Its own, /dev, is in memory, which a guest that writes much would fill."""
    backing = make_image(tmp_path / "backing.tmp", MIB, image_format="raw")
    device = run("losetup", "-f", "--show", backing).strip()
    try:
        with Machine(tmp_path, Disk("x", Path(device), bytearray(MIB), "raw")) as machine, private_tmp(machine.place):
            nights = Nights.of(machine.start())
            refused = nights.backup("full")
            assert (refused.rc, "--scratch" in refused.stderr, device in refused.stderr) == (13, True, True), refused
            done = nights.backup_of("full", "--node", device, "--disk", "x", "--scratch", machine.place)
            assert done.rc == 3, done
            machine.write("x", 70_000, 1000, 0x22)
            nights.options = ("--scratch", machine.place)
            nights.require_incremental("--no-fallback")
    finally:
        run("losetup", "-d", device)


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


def test_a_paused_machine_is_backed_up_beside_another_one_again_and_again(machine, tmp_path):
    """A paused QEMU 7.2 closes no descriptor that it was passed, a QEMU 10 does; those are in nobody's way."""
    nights = Nights.of(machine)
    other_folder = tmp_path / "other.tmp"
    other_folder.mkdir()
    with Machine.of(other_folder, "c") as other:
        other.start().monitor("stop")
        given = ["--qmp", other.qmp, "--machine", "n", "--bitmap", "b1", "--repo", nights.repository, "--node", "c"]
        assert call_pybackup(["full", *given]).rc == 0
        assert all(left.startswith("fdset ") for left in other.leftovers())
        with stopped_at(Step("transaction", "after"), nights.arguments("full")):
            again = call_pybackup(["incremental", *given])
            assert (again.rc, again.stderr) == (0, ""), again
            cleaned = call_pybackup(["clean", "--qmp", other.qmp, "--repo", nights.repository])
            assert (cleaned.rc, cleaned.stderr) == (0, ""), cleaned
        assert other.monitor("query-status")["status"] == "paused"
        other.monitor("cont")
        assert call_pybackup(["incremental", *given]).rc == 0
        assert other.leftovers() == []
