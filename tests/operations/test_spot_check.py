"""
The spot check: a bitmap that looks sound and lies is found out by the clusters that are read again.

The disks here have no more clusters than a spot check reads, so that it finds each lie; what it finds of a larger one
is in test_sample.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from lab import CLUSTER, KIB, MIB, Night, bitmaps, call_pybackup, make_image, restore_and_cmp, run, write
from lies import configured, data_file, flip, lie, lie_to, stored_at
from live import Machine, Nights, private_tmp
from servers import qemu_nbd

from backup.errors import SourceError
from backup.operations import disk_copy, spot_check
from backup.sources.resting import LockedMoment


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night.with_incremental(tmp_path)


@pytest.mark.parametrize(("offset", "of"), [(199 * KIB, 11), (2 * MIB + 66 * KIB, 11), (512 * KIB, 12)])
def test_a_write_that_the_bitmap_does_not_know_of_is_found_and_named(night, offset, of):
    """In data of the full, of the incremental, and where the chain holds nothing."""
    lie_to(night, f"write -P 0x99 {offset} 512")
    done = night.require_fallback(f"is wrong: 1 of {of} clean clusters", rehearsed=False)
    assert f"the first at byte {offset}" in done.stderr
    night.require_incremental()


def test_several_lies_are_counted_and_the_first_is_named(night):
    lie_to(night, "write -P 0x99 1M 512", "write -P 0x98 2M 512", "write -P 0x97 70k 512")
    night.require_fallback("is wrong: 3 of ", rehearsed=False)
    assert "the first at byte 71680" in night.newest["disks"][0]["reason"]


def test_a_disabled_bitmap_that_was_enabled_again(night):

    run("qemu-img", "bitmap", "--disable", night.image, night.own_bitmap)
    write(night.image, "write -P 0x97 1M 512")
    run("qemu-img", "bitmap", "--enable", night.image, night.own_bitmap)
    night.require_fallback("the first at byte 1048576", rehearsed=False)


def test_a_lie_without_the_check_of_zeroes(night, tmp_path):
    """Then clean clusters that are zero are among those that are read again."""
    config = configured(tmp_path, check_zeroes="false")
    lie_to(night, "write -z 1M 64k")
    done = call_pybackup([*config, *arguments(night)])
    assert done.rc == 3, done
    assert "the first at byte 1048576" in done.disk["reason"]
    night.require_restored()


def arguments(night: Night) -> list[str | Path]:
    return ["incremental", "--image", night.image, "--repo", night.repository, "--bitmap", "b1", "--json"]


def test_it_can_be_turned_off_and_a_dry_run_does_without(night, tmp_path, monkeypatch):
    lie_to(night, "write -P 0x99 1M 512")
    assert (night.incremental("--dry-run").rc, night.incremental("--dry-run").stderr) == (0, "")
    done = call_pybackup([*configured(tmp_path, spot_check=0), *arguments(night)])
    assert (done.rc, done.disk["kind"]) == (0, "incremental")
    # Nothing corrects what it did not see, but the next check sees it.
    night.require_fallback("is wrong", rehearsed=False)


def test_nothing_is_read_that_is_dirty_or_zero(night, monkeypatch):
    write(night.image, "write -P 0x22 3M 1k")
    seen = []
    differing = spot_check.differing

    def noted(export, clusters, *others):
        seen.append(clusters.tolist())
        return differing(export, clusters, *others)

    monkeypatch.setattr(disk_copy.spot_check, "differing", noted)
    night.require_incremental()
    # 0 to 200k and 1M to 1M+300k, of which 1100k to 1164k became zero: no whole cluster; 2M to 2M+70k.  3M is dirty.
    assert seen == [[0, 1, 2, 3, 16, 17, 18, 19, 20, 32, 33]]


def test_at_most_as_many_as_configured_are_read(night, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        disk_copy.spot_check,
        "differing",
        lambda _export, clusters, *_: seen.append(len(clusters)) or spot_check.Difference(0, 0),
    )
    assert call_pybackup([*configured(tmp_path, spot_check=3), *arguments(night)]).rc == 0
    assert seen == [3]


def test_a_lost_instant_is_no_lie_of_the_bitmap(night, monkeypatch):
    """What is read of an instant that is lost may be anything."""

    def lost(_moment):
        raise SourceError("the instant is lost", hint="")

    lie_to(night, "write -P 0x99 1M 512")
    monkeypatch.setattr(LockedMoment, "require_sound", lost)
    for options in (["--no-fallback"], []):
        done = night.incremental(*options)
        assert (done.rc, done.machine["error"]["message"]) == (13, "the instant is lost")


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_damaged_chain_is_no_lie_of_the_bitmap(tmp_path, compression):
    night = Night.of(tmp_path)
    night.full("--compression", compression)
    path = data_file(night.repository, night.newest)
    flip(path, stored_at(path, MIB) + 9)
    done = night.incremental("--compression", compression)
    assert (done.rc, done.disk["kind"]) == (3, "full")
    assert "the chain is broken" in done.disk["reason"]
    restore_and_cmp(night.repository, "disk/latest", night.image)


def test_an_honest_disk_of_odd_size_that_shrinks_and_grows(tmp_path):
    """What lies beyond an end is nobody's: no difference there is a lie."""
    night = Night.of(tmp_path, "4M")
    write(night.image, "write -P 0x31 0 4M")
    night.full()
    for size in (3 * MIB + 512, 6 * MIB):
        run("qemu-img", "resize", "-q", "--shrink", night.image, str(size))
        night.require_incremental("--no-fallback")
    night.require_incremental("--no-fallback")


def test_a_server_whose_bitmap_lies(tmp_path):
    image = make_image(tmp_path / "disk.qcow2", "2M")
    write(image, "write -P 1 0 2M")
    given = ["--repo", tmp_path / "repo", "--machine", "m", "--disk", "vda", "--json"]
    with qemu_nbd(image, "-t", "--shared=8") as uri:
        first = call_pybackup(["full", "--nbd", uri, *given])

    run("qemu-img", "bitmap", "--add", image, "b0")
    since = ["--bitmap", "b0", "--since", first.machine["point"]]
    lie(image, "b0", "write -P 2 1M 1k")
    with qemu_nbd(image, "-t", "--shared=8", "-B", "b0") as uri:
        done = call_pybackup(["incremental", "--nbd", uri, *given, *since])
    assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (3, "incremental", True)
    assert "bitmap b0 is wrong" in done.stderr
    assert "the first at byte 1048576" in done.stderr
    restore_and_cmp(tmp_path / "repo", "m/latest", image)


def test_a_running_machine_whose_bitmap_was_cleared(tmp_path):
    with Machine.of(tmp_path, "a", "b") as machine, private_tmp(machine.place):
        machine.start()
        for name in machine.disks:
            machine.write(name, 0, MIB, 0x11)
        nights = Nights.of(machine)
        nights.full()
        machine.write("b", 300_032, 1024, 0x99)
        machine.monitor("block-dirty-bitmap-clear", node="b", name=nights.own_bitmap)
        machine.write("a", 70_000, 1000, 0x12)
        done = nights.require_fallback("the first at byte 300032", only=["b"])
        assert "is wrong" in done.stderr
        machine.quit()
    assert list(bitmaps(tmp_path / "b.qcow2")) == [nights.own_bitmap]


def test_a_bad_sector_where_nothing_changed_is_a_warning_and_the_changes_are_backed_up(night, monkeypatch):
    def fails(*_):
        raise SourceError("reading failed: Input/output error", hint="")

    write(night.image, "write -P 0x22 3M 1k")
    monkeypatch.setattr(disk_copy.spot_check, "differing", fails)
    done = night.incremental("--no-fallback")
    assert (done.rc, done.disk["kind"], done.disk["dirty_bytes"]) == (3, "incremental", CLUSTER)
    assert "the spot check could not be made: reading failed" in done.stderr
    night.require_restored()
