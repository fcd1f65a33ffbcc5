"""
The life of a bitmap in an offline image: whatever makes it untrustworthy is noticed, and every point restores.

Each story ends in a restore that cmp finds identical with the image.  See docs/traps.md, traps 1 to 6, 19 to
30, 47, 48 and 50.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import (
    CLUSTER,
    MIB,
    Night,
    bitmaps,
    call_pybackup,
    check_repository,
    make_image,
    raw_copy,
    require_identical,
    restore_and_cmp,
    run,
    run_pybackup,
    write,
)

from backup.operations import backup as creating
from backup.operations import disk_copy
from backup.qemu import image_bitmaps, images, servers
from backup.sources.image import ImageSource
from backup.storage import folder
from backup.storage.folder import sync_folder


@pytest.fixture
def night(tmp_path: Path) -> Night:
    """An image with a full, a write after it, and so something to lose."""
    found = Night.of(tmp_path)
    found.full()
    write(found.image, "write -P 0x21 2M 70k", "write -P 0x22 100k 1k")
    return found


@contextmanager
def held_for_writing(image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the image open as a running machine has it."""
    address = image.parent / "machine.sock"
    command = ["qemu-storage-daemon"]
    command += ["--blockdev", f"driver=qcow2,node-name=disk,file.driver=file,file.filename={image}"]
    command += ["--nbd-server", f"addr.type=unix,addr.path={address}"]
    command += ["--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"]
    with subprocess.Popen(command) as machine:
        try:
            while not address.exists():
                assert machine.poll() is None
                time.sleep(0.01)
            yield machine
        finally:
            machine.kill()
            machine.wait()
            address.unlink(missing_ok=True)


def guest_writes(image: Path, *commands: str) -> None:
    """Write through the process that holds the image."""
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", "raw", *words, f"nbd+unix:///disk?socket={image.parent / 'machine.sock'}")


def bitmap(image: Path, *words: str) -> None:
    run("qemu-img", "bitmap", "-f", "qcow2", *words[:1], image, *words[1:])


# What goes well


def test_ten_nights_are_ten_incrementals_and_one_bitmap(night):
    for number in range(10):
        write(night.image, f"write -P {number + 1} {number * 300}k 100k")
        done = night.incremental()
        assert (done.rc, done.stderr, done.disk["kind"]) == (0, "", "incremental")
        assert list(bitmaps(night.image)) == [night.own_bitmap]
    night.require_restored()


def test_nothing_written_is_an_empty_incremental(night):
    night.require_incremental()
    disk = night.require_incremental().disk
    assert (disk["dirty_bytes"], disk["data_bytes"], disk["zero_bytes"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("command", "zero"),
    [
        ("write -z 1M 128k", 2 * CLUSTER),
        ("write -zu 1M 128k", 2 * CLUSTER),
        ("discard 1M 128k", 2 * CLUSTER),
        ("write -P 0 1M 128k", 0),
        ("write -P 0 1030k 40k", 0),
        ("write -z 1030k 40k", 0),
    ],
)
def test_what_became_zero_is_zero_after_a_restore(tmp_path, command, zero):
    night = Night.of(tmp_path)
    night.full()
    write(night.image, command)
    done = night.require_incremental()
    assert done.disk["zero_bytes"] == zero
    assert done.disk["dirty_bytes"] > 0


def test_a_trim_of_everything_costs_no_reading(night):
    write(night.image, "discard 0 4M")
    done = night.require_incremental()
    assert (done.disk["data_bytes"], done.disk["zero_bytes"]) == (0, 4 * MIB)


def test_compressed_clusters_of_the_source_are_data_like_others(tmp_path):
    night = Night.of(tmp_path)
    plain = raw_copy(night.image, tmp_path / "plain.raw")
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", plain, night.image)
    night.full()
    write(night.image, "write -c -P 0x51 2M 64k", "write -P 0x52 1050k 1k")
    assert night.require_incremental().disk["data_bytes"] == 2 * CLUSTER


def test_data_and_zeroes_that_overlap_at_their_edges(night):
    write(night.image, "write -P 0x61 1088k 64k", "write -z 1120k 64k", "write -P 0x62 1180k 64k", "write -z 1216k 8k")
    night.require_incremental()


@pytest.mark.parametrize("cluster_size", ["512", "4k", "2M"])
def test_any_cluster_size_of_the_source(tmp_path, cluster_size):
    night = Night.of(tmp_path, "5M", "-o", f"cluster_size={cluster_size}")
    night.full()
    write(night.image, "write -P 0x71 700k 512", "write -P 0x72 5100k 20k", "write -z 1M 100k")
    night.require_incremental()


def test_a_disk_of_no_bytes(tmp_path):
    """QEMU loses a bitmap of nothing, and qemu-img ends with 0."""
    image = make_image(tmp_path / "disk.qcow2", 0)
    night = Night(image, tmp_path / "repo")
    assert "image of no bytes" in night.full().stderr
    night.require_fallback("image of no bytes")


def test_the_end_of_max_chain_is_a_full_and_says_so(night, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("max_chain: 2\n")

    def incremental() -> tuple[int, str, str]:
        given = ["incremental", "--image", night.image, "--repo", night.repository, "--bitmap", "b1", "--json"]
        done = call_pybackup(["--config", config, *given])
        return done.rc, done.disk["kind"], done.disk["reason"]

    assert incremental()[:2] == (0, "incremental")
    rc, kind, reason = incremental()
    assert (rc, kind) == (0, "full")
    assert "max_chain" in reason
    assert incremental()[:2] == (0, "incremental")
    night.require_restored()


# What ends in a rescan, or a full, with the reason


def test_a_removed_bitmap(night):
    bitmap(night.image, "--remove", night.own_bitmap)
    night.require_fallback("is missing")
    write(night.image, "write -P 0x31 3M 5k")
    night.require_incremental()


def test_a_bitmap_removed_and_another_added_with_a_plain_name(night):
    bitmap(night.image, "--remove", night.own_bitmap)
    bitmap(night.image, "--add", "b1")
    night.require_fallback("is missing")
    assert "b1" in bitmaps(night.image), "it is not ours to remove"


def test_a_bitmap_removed_and_added_again_under_our_name_with_another_granularity(night):
    bitmap(night.image, "--remove", night.own_bitmap)
    write(night.image, "write -P 0x36 3M 9k")
    run("qemu-img", "bitmap", "--add", "-g", "4096", night.image, night.own_bitmap)
    night.require_fallback("granularity of 4096")


def test_a_bitmap_that_a_crash_left_inconsistent(night):
    with held_for_writing(night.image) as machine:
        guest_writes(night.image, "write -P 0x32 3M 9k")
        machine.kill()
        machine.wait()
    assert "in-use" in bitmaps(night.image)[night.own_bitmap]
    name = night.own_bitmap
    night.require_fallback("is inconsistent")
    assert list(bitmaps(night.image)) == [night.own_bitmap]
    assert night.own_bitmap != name
    write(night.image, "write -P 0x33 3M 1k")
    night.require_incremental()


def test_a_machine_that_ended_in_order_leaves_a_sound_bitmap(night):
    with held_for_writing(night.image) as machine:
        guest_writes(night.image, "write -P 0x34 3M 9k", "write -z 1M 64k")
        machine.terminate()
        machine.wait()
    night.require_incremental()


def test_a_disabled_bitmap(night):
    bitmap(night.image, "--disable", night.own_bitmap)
    write(night.image, "write -P 0x35 3M 9k")
    night.require_fallback("is disabled")


def test_an_overlay_made_over_the_image_hides_its_bitmap(night, tmp_path):
    """`qemu-nbd -B` would find the bitmap in the backing file, where the overlay's writes look clean."""
    base = tmp_path / "base.qcow2"
    night.image.rename(base)
    make_image(night.image, "4M", "-b", str(base), "-F", "qcow2")
    write(night.image, "write -P 0x36 3M 9k")
    night.require_fallback("backing chain")
    night.require_incremental()


def test_a_bitmap_in_a_backing_file_only_is_not_trusted(tmp_path):
    """The backing chain is as it was, so that nothing but the bitmap's place tells."""
    base = make_image(tmp_path / "base.qcow2", "4M")
    write(base, "write -P 0x12 1M 300k")
    image = make_image(tmp_path / "disk.qcow2", "4M", "-b", str(base), "-F", "qcow2")
    night = Night(image, tmp_path / "repo")
    night.full()
    name = night.own_bitmap
    status = base.stat()
    bitmap(base, "--add", name)
    bitmap(image, "--remove", name)
    write(image, "write -P 0x13 2M 9k")
    manifest = night.repository / "disk" / f"{night.newest['point']}.json"
    pretend_lower_is(manifest, base)
    assert base.stat().st_mtime_ns != status.st_mtime_ns
    night.require_fallback("only in a backing file")


def pretend_lower_is(manifest: Path, base: Path) -> None:
    """Write a manifest anew whose record of the backing file is the file as it is now."""
    from dataclasses import replace

    from backup.model import manifest as manifests

    found = manifests.decode(manifest.read_bytes(), "")
    [disk] = found.disks
    status = base.stat()
    lower = manifests.LowerFile(str(base), status.st_size, status.st_mtime_ns, status.st_ino)
    changed = replace(found, disks=(replace(disk, source=replace(disk.source, lower=(lower,))),))
    manifest.write_bytes(manifests.encode(changed))


def test_a_backing_file_that_was_written(tmp_path):
    base = make_image(tmp_path / "base.qcow2", "4M")
    write(base, "write -P 0x12 1M 300k")
    image = make_image(tmp_path / "disk.qcow2", "4M", "-b", "base.qcow2", "-F", "qcow2")
    night = Night(image, tmp_path / "repo")
    night.full()
    write(image, "write -P 0x13 2M 9k")
    night.require_incremental()
    write(base, "write -P 0x14 1M 1k")
    night.require_fallback(f"the backing file {base} changed")
    night.require_incremental()


def test_an_image_rebased_onto_another_file(tmp_path):
    for name in ("base", "other"):
        make_image(tmp_path / f"{name}.qcow2", "4M")
        write(tmp_path / f"{name}.qcow2", f"write -P {len(name)} 1M 300k")
    image = make_image(tmp_path / "disk.qcow2", "4M", "-b", "base.qcow2", "-F", "qcow2")
    night = Night(image, tmp_path / "repo")
    night.full()
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "other.qcow2", "-F", "qcow2", image)
    night.require_fallback("backing file")


def test_an_image_rolled_back_to_a_copy(night, tmp_path):
    """The copy's bitmap is of an older point: chain and disk would part silently."""
    copy = tmp_path / "copy"
    shutil.copy(night.image, copy)
    night.require_incremental()
    write(night.image, "write -P 0x37 3M 9k")
    night.require_incremental()
    shutil.copy(copy, night.image)
    night.require_fallback("rolled back")
    write(night.image, "write -P 0x38 3M 1k")
    night.require_incremental()


def test_an_image_rolled_back_to_a_copy_of_the_same_point_is_continued(night, tmp_path):
    night.require_incremental()
    write(night.image, "write -P 0x39 3M 9k")
    copy = tmp_path / "copy"
    shutil.copy(night.image, copy)
    write(night.image, "write -P 0x3a 1M 90k")
    shutil.copy(copy, night.image)
    night.require_incremental()


def test_an_image_restored_in_place(night):
    """A restored image has no bitmaps (trap 25)."""
    done = call_pybackup(
        ["restore", "disk/latest", night.image, "--format", "qcow2", "--force", "--repo", night.repository]
    )
    assert done.rc == 0, done.stderr
    write(night.image, "write -P 0x3b 3M 1k")
    night.require_fallback("is missing")


def test_a_full_without_a_bitmap_says_so_and_the_next_backup_has_none(night):
    done = night.backup("full")
    assert (done.rc, done.disk["kind"]) == (0, "full")
    assert "no bitmap was named" in done.stderr
    assert bitmaps(night.image) == {}
    night.require_fallback("without starting a bitmap")


def test_a_bitmap_of_another_family(night):
    done = night.backup("incremental", "--bitmap", "b2")
    assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (3, "incremental", True)
    assert "this run names another bitmap" in done.disk["reason"]
    assert list(bitmaps(night.image)) == [night.own_bitmap.replace("b1.", "b2.")]


# Whose bitmaps


def test_foreign_bitmaps_stay(night):
    point = night.newest["point"]
    foreign = ["b1", "b1.00000000." + point, f"b1.{night.repo8}.{point}x", f"libvirt-{night.repo8}", "x" * 1023]
    for name in foreign:
        bitmap(night.image, "--add", name)
    night.require_incremental()
    write(night.image, "write -P 0x3c 3M 1k")
    night.require_incremental()
    assert set(bitmaps(night.image)) == {*foreign, night.own_bitmap}


def test_two_repositories_on_one_disk_both_go_on(night, tmp_path):
    other = Night(night.image, tmp_path / "other")
    other.full()
    for number in range(2):
        write(night.image, f"write -P {number + 1} 3M {number + 1}k")
        night.require_incremental()
        write(night.image, f"write -P {number + 7} 1M {number + 1}k")
        other.require_incremental()
    assert set(bitmaps(night.image)) == {night.own_bitmap, other.own_bitmap}


def test_a_repository_copied_and_used_on_goes_wrong_with_neither(night, tmp_path):
    """Both copies have one id, so that each takes the other's bitmap for a leftover: rescans, and no wrong bytes."""
    shutil.copytree(night.repository, tmp_path / "copy")
    copy = Night(night.image, tmp_path / "copy")
    night.require_incremental()
    write(night.image, "write -P 0x3d 3M 1k")
    copy.require_fallback("missing")
    write(night.image, "write -P 0x3e 3100k 1k")
    night.require_fallback("missing")


def test_leftovers_of_a_killed_run_are_removed_by_the_next(night):
    """N's bitmap of a point that was never published, and an older point's that could not be removed."""
    stray = [f"b1.{night.repo8}.20200101T000000Z-0000000{n}" for n in range(2)]
    for name in stray:
        bitmap(night.image, "--add", name)
    leftover = night.repository / "disk" / "disk.20200101T000000Z-00000000.qcow2"
    leftover.write_bytes(b"half a file")
    night.require_incremental()
    assert list(bitmaps(night.image)) == [night.own_bitmap]
    assert not leftover.exists()


# Sizes


@pytest.mark.parametrize("grown", [6 * MIB, 4 * MIB + 1024, 5_000_192])
def test_growth_with_data_in_it(night, grown):
    resize(night.image, grown)
    write(night.image, f"write -P 0x41 {grown - 1024} 1k")
    night.require_incremental()


def test_growth_from_an_odd_size_shows_what_lay_behind_the_end(tmp_path):
    """Shrunk into a cluster and grown again, the rest of that cluster comes back, clean (trap 28)."""
    night = Night.of(tmp_path)
    write(night.image, "write -P 0x42 1M 512k")
    resize(night.image, 1 * MIB + 200 * 1024 + 512)
    night.full()
    resize(night.image, 4 * MIB)
    night.require_incremental()


def resize(image: Path, size: int) -> None:
    run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", image, str(size))


def test_a_shrunk_image(night):
    resize(night.image, 2 * MIB + 512)
    night.require_incremental()
    assert night.newest["disks"][0]["size"] == 2 * MIB + 512


@pytest.mark.parametrize("between", [(), ("write -P 0x43 1100k 1k",), ("write -P 0x43 0 1k", "write -P 0x44 3M 1k")])
@pytest.mark.parametrize("cluster", ["4k", "64k"])
def test_shrunk_and_grown_again_between_two_nights(tmp_path, between, cluster):
    """The size is as before and the bitmap clean where the data went: noticed, and recorded as it is."""
    night = Night.of(tmp_path)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", night.image, "4M")
    write(night.image, "write -P 0x45 1M 3M")
    night.full()
    resize(night.image, 1 * MIB + 512)
    resize(night.image, 4 * MIB)
    write(night.image, *between) if between else None
    night.require_fallback("bytes that were data and read as zeroes now")
    night.require_incremental()


def test_shrunk_for_a_night_and_grown_again(tmp_path):
    """The point between is short: nothing older shows through behind its end."""
    night = Night.of(tmp_path)
    write(night.image, "write -P 0x46 2M 2M")
    night.full()
    resize(night.image, 2 * MIB + 512)
    night.require_incremental()
    resize(night.image, 4 * MIB)
    night.require_incremental()
    write(night.image, "write -P 0x47 3M 1k")
    night.require_incremental()


# Images without bitmaps


def test_a_raw_image_is_always_read_whole_and_says_so(tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(1_000_001))
    night = Night(image, tmp_path / "repo")
    first = night.incremental()
    assert (first.rc, first.disk["kind"]) == (0, "full")
    assert "raw image cannot hold dirty bitmaps" in first.disk["reason"]
    assert "bitmap b1 cannot be started" in first.stderr
    assert "docs/raw-disks.md shows how a raw disk has incrementals" in first.stderr
    night.require_fallback("a raw image cannot hold dirty bitmaps")


def test_a_disk_that_can_never_hold_a_bitmap_is_a_warning_once(tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(MIB))
    night = Night(image, tmp_path / "repo")
    assert night.incremental().rc == 0
    night.require_fallback("a raw image cannot hold dirty bitmaps")
    for number in range(2):
        write(image, f"write -P {number + 1} 100k 3k", image_format="raw")
        done = night.incremental()
        assert (done.rc, done.stderr, done.disk["rescan"]) == (0, "", True), done
        assert "a raw image cannot hold dirty bitmaps" in done.disk["reason"]
        assert night.full().rc == 0
    assert night.incremental("--no-fallback").rc == 14
    assert night.incremental("--dry-run").rc == 0
    night.require_restored()


def test_a_qcow2_of_version_2_is_always_read_whole(tmp_path):
    night = Night.of(tmp_path, "4M", "-o", "compat=0.10")
    night.full()
    write(night.image, "write -P 0x48 3M 1k")
    night.require_fallback("version 2")


def test_an_external_data_file_is_read_whole(tmp_path):
    night = Night.of(tmp_path, "4M", "-o", f"data_file={tmp_path / 'data.bin'}")
    done = night.full()
    assert "external data file" in done.stderr
    assert bitmaps(night.image) == {}
    with (tmp_path / "data.bin").open("r+b") as data:
        data.write(b"past QEMU")
    night.require_fallback("external data file")


def test_an_external_data_file_below_the_image_is_read_whole(tmp_path):
    base = make_image(tmp_path / "base.qcow2", "4M", "-o", f"data_file={tmp_path / 'data.bin'},data_file_raw=on")
    write(base, "write -P 0x12 0 300k")
    image = make_image(tmp_path / "disk.qcow2", "4M", "-b", str(base), "-F", "qcow2")
    night = Night(image, tmp_path / "repo")
    night.full()
    with (tmp_path / "data.bin").open("r+b") as data:
        data.write(b"past QEMU")
    night.require_fallback("external data file")


def test_over_a_backing_file_that_cannot_be_watched_all_is_read(tmp_path):
    """A file on another host may change and nothing here shows it."""
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(MIB))
    address = tmp_path / "s"
    with subprocess.Popen(["qemu-nbd", "-r", "-t", "-e", "9", "-f", "raw", "-k", address, base]) as server:
        try:
            while not address.exists():
                assert server.poll() is None
                time.sleep(0.01)
            image = make_image(tmp_path / "disk.qcow2", "1M", "-b", f"nbd+unix:///?socket={address}", "-F", "raw")
            night = Night(image, tmp_path / "repo")
            night.full()
            night.require_fallback("cannot be watched")
        finally:
            server.terminate()


def test_a_raw_image_that_begins_with_a_qcow2_header_one_night_is_refused(tmp_path):
    """Its guest may have written the header, with a backing file of its choice: QEMU must not even open that."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    night = Night(image, tmp_path / "repo")
    assert night.backup("full").rc == 0
    with socket.socket(socket.AF_UNIX) as trap:
        trap.bind(str(tmp_path / "trap"))
        trap.listen()
        trap.setblocking(False)
        evil = tmp_path / "evil"
        run(
            "qemu-img",
            "create",
            "-u",
            "-f",
            "qcow2",
            "-b",
            f"nbd+unix:///?socket={tmp_path / 'trap'}",
            "-F",
            "raw",
            evil,
            "1M",
        )
        with image.open("r+b") as file:
            file.write(evil.read_bytes())
        before = night.state()
        refused = night.incremental()
        assert refused.rc == 2
        assert "begins with a qcow2 header now" in refused.stderr
        assert night.state() == before
        done = night.incremental("--image-format", "raw")
        with pytest.raises(BlockingIOError):
            trap.accept()
    assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (3, "incremental", True)
    restored = tmp_path / "restored"
    assert call_pybackup(["restore", "disk/latest", restored, "--repo", night.repository]).rc == 0
    require_identical(image, restored)


# Images that take no new bitmap

needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")
needs_loops = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="needs root and loop devices"
)


@pytest.fixture
def small_storage(tmp_path) -> Iterator[Night]:
    """A night whose image lies on a file system of 6 MiB."""
    (tmp_path / "store").mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=6M", "tmpfs", tmp_path / "store")
    try:
        image = make_image(tmp_path / "store" / "disk.qcow2", "16M")
        write(image, "write -P 1 0 3M")
        found = Night(image, tmp_path / "repo")
        found.full()
        write(image, "write -P 2 1M 64k")
        yield found
    finally:
        run("umount", tmp_path / "store")


def fill(folder: Path) -> Path:
    """Leave no byte free."""
    with (folder / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return folder / "other"


@needs_mounts
def test_full_storage_costs_neither_the_night_nor_the_bitmaps_that_are_there(small_storage):
    night = small_storage
    bitmap(night.image, "--add", "someone-elses")
    other = fill(night.image.parent)
    name = night.own_bitmap
    done = night.incremental()
    assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (3, "incremental", False), done
    assert "no bitmap was started: the image's storage has no room for it (0 bytes are free" in done.stderr
    night.require_restored()
    assert bitmaps(night.image) == {name: ["auto"], "someone-elses": ["auto"]}
    assert "no room" in night.newest["disks"][0]["bitmap"]["why_none"]
    done = night.incremental()
    assert (done.rc, done.disk["rescan"]) == (3, True)
    assert "the newest point was made without starting a bitmap: the image's storage has no room" in done.disk["reason"]
    other.unlink()
    done = night.incremental()
    assert (done.rc, done.disk["rescan"]) == (3, True)
    assert set(bitmaps(night.image)) == {night.own_bitmap, "someone-elses"}
    night.require_incremental()


@needs_mounts
def test_a_file_system_that_is_full_and_read_only_is_called_read_only(small_storage):
    """As a CD's is: it is a warning once, and no space that somebody could free."""
    fill(small_storage.image.parent)
    run("mount", "-o", "remount,ro", small_storage.image.parent)
    done = small_storage.incremental()
    assert (done.rc, "cannot be opened for writing (Read-only file system)" in done.stderr) == (3, True), done
    assert small_storage.incremental().rc == 0


@needs_mounts
def test_a_bitmap_that_qemu_loses_on_full_storage_does_not_cost_the_night(small_storage, monkeypatch):
    """The file system said that there is room: a quota, say.  qemu-img ends with 0, and all bitmaps are in use."""
    night = small_storage
    fill(night.image.parent)
    monkeypatch.setattr(image_bitmaps, "require_room", lambda *_: None)
    name = night.own_bitmap
    done = night.incremental()
    assert (done.rc, done.disk["rescan"]) == (3, True), done
    assert f"bitmap {name} was lost when QEMU tried to add a new one: the image's storage has no room" in done.stderr
    night.require_restored()
    assert bitmaps(night.image) == {night.own_bitmap: ["auto"]}, "the lost one's place was enough"
    (night.image.parent / "other").unlink()
    night.require_incremental()


@needs_loops
def test_a_volume_with_room_for_one_bitmap_is_backed_up_every_night(tmp_path):
    volume = tmp_path / "volume"
    volume.write_bytes(b"")
    os.truncate(volume, 3473408)
    device = Path(run("losetup", "-f", "--show", volume).strip())
    try:
        make_image(device, "3M")
        write(device, "write -P 1 0 2944k")
        night = Night(device, tmp_path / "repo")
        options = ("--machine", "disk", "--disk", "disk")
        night.full(*options)
        for _ in range(2):
            done = night.incremental(*options)
            assert (done.rc, done.disk["rescan"], "was lost" in done.disk["reason"]) == (3, True, True), done
            night.require_restored()
            assert bitmaps(device) == {night.own_bitmap: ["auto"]}
        write(device, "write -P 2 1M 64k")  # whose end loses the bitmap, for want of room
        done = night.incremental(*options)
        assert (done.rc, done.disk["rescan"]) == (3, True)
        night.require_restored()
        # Without room for any, too.
        bitmap(device, "--remove", night.own_bitmap)
        write(device, "write -P 9 2944k 128k")
        done = night.incremental(*options)
        assert (done.rc, "no bitmap was started: the image's storage has no room" in done.stderr) == (3, True), done
        night.require_restored()
        assert bitmaps(device) == {}
        done = night.incremental(*options)
        assert (done.rc, done.disk["rescan"]) == (3, True), "full storage can be mended: it stays a warning"
    finally:
        run("losetup", "-d", device)


@needs_mounts
def test_a_read_only_image_is_backed_up_and_is_a_warning_once(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    night = Night(make_image(store / "disk.qcow2", "4M"), tmp_path / "repo")
    write(night.image, "write -P 1 0 1M")
    run("mount", "--bind", store, store)
    try:
        run("mount", "-o", "remount,bind,ro", store)
        done = night.backup("full", "--bitmap", "b1")
        assert (done.rc, done.stderr.count("\n")) == (3, 1), done
        assert "no bitmap was started: the image cannot be opened for writing (Read-only file system)" in done.stderr
        for _ in range(2):
            done = night.incremental()
            assert (done.rc, done.stderr, done.disk["rescan"], done.disk["stored_bytes"] > 0) == (0, "", True, True)
            assert "cannot be opened for writing" in done.disk["reason"]
        night.require_restored()
    finally:
        run("umount", store)
    assert night.incremental().rc == 3
    night.require_incremental()


@needs_mounts
def test_an_image_that_became_read_only_is_continued_from_its_bitmap_once(night):
    store = night.image.parent / "store"
    store.mkdir()
    image = store / "disk.qcow2"
    shutil.copy(night.image, image)
    moved = Night(image, night.repository)
    run("mount", "--bind", store, store)
    try:
        run("mount", "-o", "remount,bind,ro", store)
        done = moved.incremental("--machine", "disk")
        assert (done.rc, done.disk["rescan"], done.stderr.count("\n")) == (3, False, 1), done
        done = moved.incremental("--machine", "disk")
        assert (done.rc, done.stderr, done.disk["rescan"]) == (0, "", True)
        moved.require_restored()
    finally:
        run("umount", store)


@pytest.fixture
def forgetful(tmp_path, monkeypatch) -> Path:
    """A qemu-img that adds no bitmap while a file is there, which has its exit code and what it says."""
    real = shutil.which("qemu-img")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "qemu-img"
    forget = tmp_path / "forget"
    add = f'if [ "$2" = --add ] && [ -e {forget} ]; then tail -n +2 {forget} >&2; exit "$(head -n 1 {forget})"; fi'
    program.write_text(f'#!/bin/sh\n{add}\nexec {real} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return forget


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, ""),
        (0, "Lost persistent bitmaps during inactivation of node: Input/output error"),
        (1, "Maximum number of persistent bitmaps is already reached"),
        (1, "qcow2: Image is corrupt; cannot be opened read/write"),
    ],
)
def test_a_bitmap_that_qemu_does_not_add_whatever_it_says_does_not_cost_the_night(night, forgetful, code, words):
    forgetful.write_text(f"{code}\nqemu-img: {words}\n" if words else f"{code}\n")
    name = night.own_bitmap
    done = night.incremental()
    assert (done.rc, done.disk["rescan"]) == (3, False), done
    assert "no bitmap was started: " in done.stderr
    assert words in done.stderr
    assert bitmaps(night.image) == {name: ["auto"]}, "it is of no use any more, and goes with the next night's success"
    night.require_restored()
    forgetful.unlink()
    done = night.incremental()
    assert (done.rc, done.disk["rescan"], "without starting a bitmap" in done.stderr) == (3, True, True)
    assert list(bitmaps(night.image)) == [night.own_bitmap]
    night.require_incremental()


def test_a_removal_in_which_qemu_loses_the_new_bitmap_is_a_warning(night, tmp_path, monkeypatch):
    """It stores all bitmaps of the image anew, and ends with 0 where it has no room for that."""
    real = shutil.which("qemu-img")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "qemu-img"
    names = f'{real} info -f qcow2 "$5" | sed -n "s/.*name: b1/b1/p"'
    loses = f'for name in $({names}); do {real} "$1" "$2" "$3" "$4" "$5" $name; done'
    complains = 'echo "qemu-img: Lost persistent bitmaps: No space left on device" >&2'
    program.write_text(f'#!/bin/sh\n[ "$2" = --remove ] || exec {real} "$@"\n{loses}\n{complains}\n')
    program.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        done = night.incremental()
    assert (done.rc, done.disk["rescan"], bitmaps(night.image)) == (3, False, {})
    assert "Lost persistent bitmaps: No space left on device" in done.stderr
    assert "the new bitmap was lost; the next backup is a rescan" in done.stderr
    night.require_restored()
    night.require_fallback("is missing")


def test_one_disk_without_room_for_a_bitmap_does_not_touch_its_neighbour(machine, tmp_path, forgetful):
    forgetful.write_text("1\nqemu-img: No space left on device\n")
    text = machine.read_text()
    machine.write_text(text.replace("    disks:\n", "    disks:\n      vdc: {image: %s}\n" % (tmp_path / "vdc.raw")))
    (tmp_path / "vdc.raw").write_bytes(os.urandom(MIB))
    done = call_pybackup(["--config", machine, "incremental", "--json"])
    assert (done.rc, done.stderr.count("no bitmap was started")) == (3, 2), done
    forgetful.unlink()
    for _ in range(2):
        done = call_pybackup(["--config", machine, "incremental", "--json"])
    assert {disk["name"]: disk["rescan"] for disk in done.machine["disks"]} == {"vdc": True, "vda": False, "vdb": False}
    assert done.rc == 0, done
    restored_both(tmp_path)


# Names


@pytest.mark.parametrize(
    "name", ["with space", "a:b", "-dash", "nbd:unix:x", "json:{}", "ünï😀", "a,b=c", "per%20cent"]
)
def test_image_names_that_mean_something_elsewhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    image = make_image(tmp_path / f"{name}.qcow2", "1M")
    write(image, "write -P 1 0 1k")
    given = [f"--image={name}.qcow2", "--repo", "repo", "--bitmap", "b1", "--machine", "m", "--disk", "d"]
    assert call_pybackup(["full", *given]).rc == 0
    write(image, "write -P 2 100k 1k")
    done = call_pybackup(["incremental", *given, "--json"])
    assert (done.rc, done.stderr, done.disk["kind"], done.disk["name"]) == (0, "", "incremental", "d")
    restore_and_cmp(tmp_path / "repo", "m/latest", image)
    check_repository(tmp_path / "repo")


def test_a_name_that_gives_no_machine_asks_for_one(tmp_path):
    image = make_image(tmp_path / "with space.qcow2", "1M")
    done = run_pybackup(["full", "--image", image, "--repo", tmp_path / "repo"])
    assert done.rc == 2
    assert "--machine" in done.stderr
    assert not list(tmp_path.glob("repo/*/"))


def test_another_image_of_the_same_stem_is_not_taken_for_the_machine(night, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    other = Night(make_image(tmp_path / "elsewhere" / "disk.qcow2", "4M"), night.repository)
    before = night.state(), other.state()
    refused = other.incremental()
    assert refused.rc == 2
    assert str(night.image) in refused.stderr
    assert "--machine" in refused.stderr
    assert (night.state(), other.state()) == before
    moved = other.incremental("--machine", "disk")
    assert (moved.rc, moved.disk["rescan"]) == (3, True)
    other.require_restored()


def test_an_image_keeps_the_name_that_the_machine_knows_it_by(night, tmp_path):
    """By whatever path it is named: three names would be three fulls of one image, every night."""
    link = tmp_path / "link.qcow2"
    link.symlink_to(night.image)
    for number, (image, *options) in enumerate(
        [(night.image, "--disk", "vda"), (link,), (link, "--disk", "vdb"), (night.image,)]
    ):
        write(night.image, f"write -P {number} 1M 10k")
        done = Night(image, night.repository).incremental("--machine", "disk", *options)
        assert (done.rc, done.disk["name"], done.disk["rescan"]) == (0, "disk", False), done
        assert done.stderr.count("\n") == (1 if options else 0)
        assert f"{image} is already disk disk of machine disk and keeps that name" in done.stderr or not options
        night.require_restored()


def test_an_image_through_another_folder_is_the_machine_that_its_name_says(night, tmp_path):
    (tmp_path / "pool").symlink_to(tmp_path)
    done = Night(tmp_path / "pool" / "disk.qcow2", night.repository).incremental()
    assert (done.rc, done.disk["kind"]) == (0, "incremental"), done


def test_a_disk_that_the_configuration_calls_by_another_name_is_a_new_one_with_a_warning(machine, tmp_path):
    machine.write_text(machine.read_text().replace("vda:", "sda:"))
    done = call_pybackup(["--config", machine, "incremental", "--json"])
    kinds = {disk["name"]: disk["kind"] for disk in done.machine["disks"]}
    assert (done.rc, kinds) == (3, {"sda": "full", "vdb": "incremental"})
    assert f"disk sda: {tmp_path / 'vda.qcow2'} was disk vda until now" in done.stderr
    assert call_pybackup(["--config", machine, "incremental"]).rc == 0


def test_an_image_that_was_moved_and_not_named_as_before_is_a_new_disk_with_a_warning(night):
    moved = Night(night.image.rename(night.image.with_name("moved.qcow2")), night.repository)
    done = moved.incremental("--machine", "disk")
    assert (done.rc, done.disk["name"], done.disk["kind"]) == (3, "moved", "full")
    assert "if the image was moved, name the disk disk again" in done.stderr
    restore_and_cmp(night.repository, "disk/latest", moved.image, disk="moved")


def test_an_image_that_was_moved_and_is_named_as_before_goes_on(night):
    moved = Night(night.image.rename(night.image.with_name("moved.qcow2")), night.repository)
    done = moved.incremental("--machine", "disk", "--disk", "disk")
    assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (0, "incremental", False), done
    moved.require_restored()


def test_a_raw_image_that_looks_like_a_qcow2_is_not_taken_for_a_new_disk(tmp_path):
    """Under another name its format would be guessed anew, by bytes that its guest wrote."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    night = Night(image, tmp_path / "repo")
    assert night.backup("full").rc == 0
    image.write_bytes(make_image(tmp_path / "evil.qcow2", "1M").read_bytes())
    for options in (["--disk", "other"], ["--machine", "disk", "--disk", "other"]):
        assert night.incremental(*options).rc == 2


def test_an_image_of_two_machines_is_not_called_rolled_back(night):
    assert night.incremental("--machine", "other").rc == 0
    night.require_fallback("the image has been backed up as machine other since")
    done = night.incremental("--machine", "other")
    assert "the image has been backed up as machine disk since" in done.disk["reason"]


# Several images


def two_images(folder: Path) -> list[Path]:
    images = [make_image(folder / f"{name}.qcow2", "4M") for name in ("a", "b")]
    for number, image in enumerate(images):
        write(image, f"write -P {number + 1} 0 1M")
    return images


def given(images: list[Path], repository: Path, *options: str | Path) -> list[str | Path]:
    named = [word for image in images for word in ("--image", image)]
    return [*named, "--repo", repository, "--bitmap", "b1", "--json", *options]


def test_several_images_are_the_disks_of_one_machine_at_one_instant(tmp_path):
    images = two_images(tmp_path)
    done = call_pybackup(["full", *given(images, tmp_path / "repo", "--machine", "two")])
    assert (done.rc, [disk["name"] for disk in done.machine["disks"]]) == (0, ["a", "b"]), done
    for number, image in enumerate(images):
        write(image, f"write -P {number + 5} 2M 10k")
    done = call_pybackup(["incremental", *given(images[::-1], tmp_path / "repo", "--machine", "two")])
    assert (done.rc, done.stderr, [disk["name"] for disk in done.machine["disks"]]) == (0, "", ["b", "a"]), done
    assert {disk["kind"] for disk in done.machine["disks"]} == {"incremental"}
    for image in images:
        restore_and_cmp(tmp_path / "repo", "two/latest", image, disk=image.stem)
        assert len(bitmaps(image)) == 1
    check_repository(tmp_path / "repo")


def test_no_byte_is_read_before_all_images_are_locked(tmp_path, monkeypatch):
    images = two_images(tmp_path)
    began = []
    monkeypatch.setattr(disk_copy.DiskCopies, "plan_all", lambda *_: began.append(1))
    with held_for_writing(images[1]):
        done = call_pybackup(["full", *given(images, tmp_path / "repo", "--machine", "two")])
    assert (done.rc, f"{images[1]} is in use" in done.stderr, began) == (13, True, [])
    assert bitmaps(images[0]) == {}


def test_names_and_formats_pair_with_several_images_in_their_order(tmp_path):
    [qcow2, _] = two_images(tmp_path)
    raw = tmp_path / "c.img"
    raw.write_bytes(qcow2.read_bytes())
    options = ["--machine", "two", "--disk", "vda", "--disk", "vdb", "--image-format", "qcow2", "--image-format", "raw"]
    done = call_pybackup(["full", *given([qcow2, raw], tmp_path / "repo", *options)])
    sizes = {disk["name"]: disk["size"] for disk in done.machine["disks"]}
    assert (done.rc, sizes) == (0, {"vda": 4 * MIB, "vdb": raw.stat().st_size}), done
    both = call_pybackup(
        ["full", *given([qcow2, raw], tmp_path / "other", "--machine", "two", "--image-format", "raw")]
    )
    assert {disk["size"] for disk in both.machine["disks"]} == {qcow2.stat().st_size, raw.stat().st_size}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "name the machine: --machine NAME"),
        (["--machine", "m", "--disk", "vda"], "--disk given 1 times and --image 2 times"),
        (["--machine", "m", *["--image-format", "raw"] * 3], "--image-format given 3 times"),
        (["--machine", "m", "--disk", "vda", "--disk", "vda"], "two disks are named vda"),
    ],
)
def test_several_images_that_cannot_be_told_apart_are_refused(tmp_path, options, words):
    done = call_pybackup(["full", *given(two_images(tmp_path), tmp_path / "repo", *options)])
    assert (done.rc, words in done.stderr) == (2, True), done
    assert not list(tmp_path.glob("repo/*/"))


def test_two_images_of_one_stem_and_one_image_by_two_paths_are_refused(tmp_path):
    images = two_images(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "link.qcow2").symlink_to(images[0])
    other = make_image(tmp_path / "x" / "a.qcow2", "1M")
    for second, words in ((other, "name each disk with --disk"), (tmp_path / "link.qcow2", "are the same file")):
        done = call_pybackup(["full", *given([images[0], second], tmp_path / "repo", "--machine", "m")])
        assert (done.rc, words in done.stderr) == (2, True), done


def test_a_second_image_that_was_backed_up_alone_keeps_its_name(tmp_path):
    images = two_images(tmp_path)
    assert call_pybackup(["full", *given(images[:1], tmp_path / "repo", "--machine", "m", "--disk", "vda")]).rc == 0
    done = call_pybackup(["incremental", *given(images, tmp_path / "repo", "--machine", "m")])
    assert {disk["name"]: disk["kind"] for disk in done.machine["disks"]} == {"vda": "incremental", "b": "full"}, done
    swapped = ["--machine", "m", "--disk", "vda", "--disk", "b"]
    done = call_pybackup(["incremental", *given(images[::-1], tmp_path / "repo", *swapped)])
    assert ([disk["rescan"] for disk in done.machine["disks"]], done.rc) == ([False, False], 0), done
    clash = given(
        [tmp_path / "new.qcow2", images[0]], tmp_path / "repo", "--machine", "m", "--disk", "vda", "--disk", "x"
    )
    make_image(tmp_path / "new.qcow2", "1M")
    done = call_pybackup(["incremental", *clash])
    assert (done.rc, "two disks are named vda" in done.stderr) == (2, True), done


def test_an_audit_knows_an_image_by_the_name_that_the_machine_knows(tmp_path):
    night = Night.of(tmp_path)
    night.full("--disk", "vda")
    audit = ["audit", "--image", night.image, "--repo", night.repository]
    assert call_pybackup(audit).rc == 0
    assert call_pybackup([*audit, "--disk", "disk"]).rc == 10


# In use


def test_an_image_in_use_is_left_alone(night):
    before = night.state()
    with held_for_writing(night.image):
        began = time.monotonic()
        for wanted in ("incremental", "full"):
            done = run_pybackup([wanted, "--image", night.image, "--repo", night.repository, "--bitmap", "b1"])
            assert done.rc == 13
            first, second = done.stderr.splitlines()
            assert first.startswith(f"pybackup: error: {night.image} is in use by another program")
            assert second.startswith("pybackup: hint: if a machine runs on it")
        assert time.monotonic() - began < 60, "a machine that runs for weeks must not stop the others' backups"
        guest_writes(night.image, "write -P 0x49 3M 9k")
    # held_for_writing ends by a kill
    assert night.state()[1] == before[1]
    night.require_fallback("is inconsistent")


def test_a_short_look_of_another_program_does_not_fail_a_run(night, monkeypatch):
    """Our own lock is asked for again while someone's qemu-img has the image."""

    machines = []
    pause = images.time.sleep

    def ends(seconds: float) -> None:
        if machines and seconds == images._LOCK_PAUSE:
            machines.pop().terminate()
        pause(seconds)

    monkeypatch.setattr(images.time, "sleep", ends)
    with held_for_writing(night.image) as machine:
        machines.append(machine)
        night.require_incremental()


def test_why_a_server_cannot_serve_is_told_when_it_is_started(night):
    """qemu-nbd listens before it opens the image; who only connects meets a refusal later, and never the reason."""
    from backup.errors import SourceError
    from backup.qemu import servers

    with (
        pytest.raises(SourceError, match="Bitmap 'absent' is not found"),
        servers.serve_image(night.image, "qcow2", ["absent"], 1),
    ):
        pass
    with (
        held_for_writing(night.image),
        pytest.raises(images.ImageLocked),
        servers.serve_image(night.image, "qcow2", [], 1),
    ):
        pass


class Restless(ImageSource):
    """An image to which a machine writes between the bitmaps' start and the lock, `times` times."""

    times = 1
    written = 0

    def start_bitmap(self, name: str) -> None:
        super().start_bitmap(name)
        if type(self).written < type(self).times:
            type(self).written += 1
            write(self.path, f"write -P {type(self).written} 3M {type(self).written}k")


@pytest.fixture
def restless(monkeypatch) -> type[Restless]:
    monkeypatch.setattr(Restless, "written", 0)
    monkeypatch.setattr("backup.sources.choose.ImageSource", Restless)
    return Restless


def test_a_write_between_the_bitmaps_start_and_the_lock_is_in_the_point(night, restless):
    done = night.incremental()
    assert (done.rc, done.disk["kind"], done.disk["dirty_bytes"]) == (0, "incremental", 4 * CLUSTER)
    assert restless.written == 1
    assert list(bitmaps(night.image)) == [night.own_bitmap]
    night.require_restored()
    clean = night.require_incremental()
    assert clean.disk["dirty_bytes"] == 0, "the new bitmap was started again"


def test_an_image_that_is_always_written_between_is_given_up(night, restless, monkeypatch):
    monkeypatch.setattr(restless, "times", 1000)
    before = night.state()
    done = night.incremental()
    assert done.rc == 13
    assert "kept changing" in done.stderr
    assert night.state() == before
    monkeypatch.setattr(restless, "times", 0)
    night.require_incremental()


def test_each_try_has_a_bitmap_name_of_its_own(night, monkeypatch):
    """A copy of the image from the first try must not hold a bitmap that claims to start at the second."""
    names = []
    start = ImageSource.start_bitmap

    def started(self: ImageSource, name: str) -> None:
        start(self, name)
        names.append(name)
        if len(names) == 1:
            write(self.path, "write -P 9 3M 1k")

    monkeypatch.setattr(ImageSource, "start_bitmap", started)
    assert night.incremental().rc == 0
    assert len(names) == len(set(names)) == 2
    assert names[1] == night.own_bitmap


# Failures


def test_a_run_that_fails_leaves_the_bitmap_and_no_trace(night, monkeypatch):
    from backup.errors import Failed
    from backup.repository.machine import Machine

    def full(self: Machine, manifest: object) -> Path:
        raise Failed("No space left on device", hint="")

    before = night.state()
    with monkeypatch.context() as patch:
        patch.setattr(Machine, "publish", full)
        assert night.incremental().rc == 1
    assert night.state() == before
    night.require_incremental()


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_fsync_that_fails_while_publishing_leaves_a_whole_point_or_none(night, monkeypatch, failing):
    """After the rename the point exists: taking its files away then would leave a damaged one."""

    sync = sync_folder
    calls = []

    def fails(path: Path) -> None:
        calls.append(path)
        if len(calls) == failing:
            raise OSError(5, "Input/output error", str(path))
        sync(path)

    before = night.state()
    with monkeypatch.context() as patch:
        patch.setattr(folder, "sync_folder", fails)
        assert night.incremental().rc == 1
    assert len(calls) >= failing
    assert night.state() == before
    night.require_incremental()


def test_an_error_just_after_the_point_is_published_leaves_a_whole_point_or_none(night, monkeypatch):
    """A signal may come at any instruction, so also between the manifest's rename and our notice of it."""
    from backup.errors import Interrupted
    from backup.repository.machine import Machine

    publish = Machine.publish

    def published(self: Machine, manifest: object) -> Path:
        publish(self, manifest)
        raise Interrupted(15)

    before = night.state()
    with monkeypatch.context() as patch:
        patch.setattr(Machine, "publish", published)
        assert night.incremental().rc == 143
    assert night.state() == before
    night.require_incremental()


def test_a_bitmap_that_cannot_be_removed_is_a_warning_and_tried_again(night, monkeypatch):
    from backup.errors import SourceError

    def refuse(self: ImageSource, name: str) -> None:
        raise SourceError("not now", hint="")

    old = night.own_bitmap
    with monkeypatch.context() as patch:
        patch.setattr(ImageSource, "remove_bitmap", refuse)
        done = night.incremental()
    assert done.rc == 3
    assert f"bitmap {old} could not be removed: not now" in done.stderr
    assert set(bitmaps(night.image)) == {old, night.own_bitmap}
    write(night.image, "write -P 0x4b 3M 1k")
    night.require_incremental()
    assert list(bitmaps(night.image)) == [night.own_bitmap]


def test_a_dry_run_changes_nothing_and_tells_the_numbers(night):
    before, content = night.state(), night.image.read_bytes()
    planned = night.incremental("--dry-run")
    assert (planned.rc, planned.machine["point"], planned.machine["manifest"]) == (0, None, None)
    assert night.state() == before
    assert night.image.read_bytes() == content
    done = night.require_incremental()
    for key in ("kind", "dirty_bytes", "data_bytes", "zero_bytes", "reason"):
        assert planned.disk[key] == done.disk[key]


def test_an_image_that_is_not_there(night):
    night.image.rename(night.image.with_name("away"))
    done = night.incremental()
    assert done.rc == 13
    assert "there is no image" in done.stderr


# Several disks


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The configuration of a machine with two disks that has a full."""
    for name in ("vda", "vdb"):
        write(make_image(tmp_path / f"{name}.qcow2", "2M"), f"write -P {ord(name[-1])} 0 100k")
    config = tmp_path / "c.yaml"
    disks = "".join(f"      {name}: {{image: {tmp_path / name}.qcow2}}\n" for name in ("vda", "vdb"))
    config.write_text(f"repository: {tmp_path / 'repo'}\nbitmap: b1\nmachines:\n  web1:\n    disks:\n{disks}")
    assert call_pybackup(["--config", config, "full", "web1"]).rc == 0
    for name in ("vda", "vdb"):
        write(tmp_path / f"{name}.qcow2", "write -P 7 1M 3k")
    return config


def restored_both(folder: Path) -> None:
    for name in ("vda", "vdb"):
        restore_and_cmp(folder / "repo", "web1/latest", folder / f"{name}.qcow2", disk=name)
    check_repository(folder / "repo")


def test_one_disk_falls_back_and_its_neighbour_stays_incremental(machine, tmp_path):
    [name] = bitmaps(tmp_path / "vda.qcow2")
    bitmap(tmp_path / "vda.qcow2", "--remove", name)
    refused = call_pybackup(["--config", machine, "incremental", "--no-fallback", "--json"])
    assert refused.rc == 14
    assert list(bitmaps(tmp_path / "vdb.qcow2")) == [name]
    done = call_pybackup(["--config", machine, "incremental", "--json"])
    assert done.rc == 3
    assert [(disk["name"], disk["rescan"]) for disk in done.machine["disks"]] == [("vda", True), ("vdb", False)]
    assert [warning[:8] for warning in done.machine["warnings"]] == ["disk vda"]
    restored_both(tmp_path)
    done = call_pybackup(["--config", machine, "incremental", "--json"])
    assert (done.rc, {disk["kind"] for disk in done.machine["disks"]}) == (0, {"incremental"})
    restored_both(tmp_path)


def test_one_disk_in_use_fails_the_machine_and_its_neighbour_keeps_its_bitmap(machine, tmp_path):
    before = bitmaps(tmp_path / "vda.qcow2")
    with held_for_writing(tmp_path / "vdb.qcow2") as running:
        assert call_pybackup(["--config", machine, "incremental"]).rc == 13
        running.terminate()
        running.wait()
    assert bitmaps(tmp_path / "vda.qcow2") == before
    assert call_pybackup(["--config", machine, "incremental", "--no-fallback"]).rc == 0
    restored_both(tmp_path)


def test_a_disk_added_to_a_machine_does_not_force_a_full_of_its_neighbours(machine, tmp_path):
    write(make_image(tmp_path / "vdc.qcow2", "1M"), "write -P 3 0 10k")
    text = machine.read_text()
    machine.write_text(text + f"      vdc: {{image: {tmp_path / 'vdc.qcow2'}}}\n")
    done = call_pybackup(["--config", machine, "incremental", "--json"])
    assert [disk["kind"] for disk in done.machine["disks"]] == ["incremental", "incremental", "full"]
    assert done.rc == 0, "a first point is no fallback"
    assert call_pybackup(["--config", machine, "incremental", "--no-fallback"]).rc == 0
    machine.write_text(text)
    assert call_pybackup(["--config", machine, "incremental", "--no-fallback"]).rc == 0
    restored_both(tmp_path)


def test_no_fallback_forbids_a_disks_first_full_too(machine, tmp_path):
    """Also that of a disk that was added: `on_unusable_bitmap: fail` does not, or no cron job could begin with it."""
    write(make_image(tmp_path / "vdc.qcow2", "1M"), "write -P 3 0 10k")
    text = machine.read_text()
    machine.write_text(text + f"      vdc: {{image: {tmp_path / 'vdc.qcow2'}}}\n")
    before = sorted((tmp_path / "repo").rglob("*"))
    refused = call_pybackup(["--config", machine, "incremental", "--no-fallback"])
    assert (refused.rc, "disk vdc of machine web1 has no point yet" in refused.stderr) == (14, True), refused
    assert (sorted((tmp_path / "repo").rglob("*")), bitmaps(tmp_path / "vdc.qcow2")) == (before, {})
    machine.write_text(machine.read_text() + "on_unusable_bitmap: fail\n")
    done = call_pybackup(["--config", machine, "incremental", "--json"])
    assert (done.rc, [disk["kind"] for disk in done.machine["disks"]]) == (0, ["incremental", "incremental", "full"])


def test_disks_that_are_exchanged_in_the_configuration_are_not_taken_for_each_other(machine, tmp_path):
    """Both have a sound bitmap of the newest point; of disks that hold the same, no spot check would tell."""
    vda, vdb = tmp_path / "vda.qcow2", tmp_path / "vdb.qcow2"
    for image in (vda, vdb):
        write(image, "write -P 9 0 2M")
    assert call_pybackup(["--config", machine, "incremental", "--no-fallback"]).rc == 0
    write(vda, "write -P 8 1M 3k")
    text = machine.read_text()
    machine.write_text(text.replace("vda.qcow2", "x").replace("vdb.qcow2", "vda.qcow2").replace("x}", "vdb.qcow2}"))
    done = call_pybackup(["--config", machine, "incremental", "--no-fallback"])
    assert (done.rc, "belongs to disk" in done.stderr) == (14, True), done
    done = call_pybackup(["--config", machine, "incremental"])
    assert (done.rc, done.stderr.count("belongs to disk")) == (3, 2), done
    for name, image in (("vda", vdb), ("vdb", vda)):
        restore_and_cmp(tmp_path / "repo", "web1/latest", image, disk=name)
    assert call_pybackup(["--config", machine, "incremental", "--no-fallback"]).rc == 0


def test_a_disk_left_out_for_a_night_continues_from_its_own_newest_point(machine, tmp_path):
    text = machine.read_text()
    machine.write_text("".join(line for line in text.splitlines(keepends=True) if "vdb:" not in line))
    assert call_pybackup(["--config", machine, "incremental", "--no-fallback"]).rc == 0
    write(tmp_path / "vdb.qcow2", "write -P 8 1500k 3k")
    machine.write_text(text)
    assert call_pybackup(["--config", machine, "incremental", "--no-fallback"]).rc == 0
    restored_both(tmp_path)


def test_the_story_is_told_for_the_last_step_too(night):
    """A point's manifest names the bitmaps: the one read, and the one that records from there on."""
    first = night.own_bitmap
    night.require_incremental()
    [disk] = night.newest["disks"]
    assert disk["bitmap"] == {
        "read": first,
        "started": night.own_bitmap,
        "granularity": CLUSTER,
        "claimed": False,
        "why_none": None,
    }
    assert disk["source"]["consistency"] == "crash"
    assert disk["reason"] == f"changes since {first.split('.')[2]}"
    assert json.dumps(disk)
    assert creating._SETTLE_TRIES > 1


def test_another_image_of_the_same_name_is_no_disk_of_the_same_machine(tmp_path):
    for name in ("p", "q"):
        (tmp_path / name).mkdir()
        make_image(tmp_path / name / "web1.qcow2", "1M")
    repo = ["--repo", tmp_path / "repo"]
    assert call_pybackup(["full", "--image", tmp_path / "p" / "web1.qcow2", *repo]).rc == 0
    done = call_pybackup(["full", "--image", tmp_path / "q" / "web1.qcow2", "--disk", "x", *repo])
    assert done.rc == 2
    assert "--machine" in done.stderr
    assert (
        call_pybackup(["full", "--image", tmp_path / "q" / "web1.qcow2", "--machine", "web1", "--disk", "x", *repo]).rc
        == 0
    )


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="needs root and loop devices")
def test_over_a_block_device_all_is_read(tmp_path):
    """Its stat does not show who wrote to it."""
    lower = tmp_path / "lower.raw"
    lower.write_bytes(b"\3" * MIB + bytes(3 * MIB))
    device = run("losetup", "-f", "--show", lower).strip()
    try:
        image = tmp_path / "disk.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", device, "-F", "raw", image)
        night = Night(image, tmp_path / "repo")
        assert night.full().rc == 0
        night.require_fallback("cannot be watched")
    finally:
        run("losetup", "-d", device)


def test_a_dry_run_refuses_what_a_run_refuses(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("cluster_size: 4K\n")
    image = make_image(tmp_path / "disk.qcow2", "9T")
    for options in ([], ["--dry-run"]):
        done = call_pybackup(
            ["--config", config, "full", "--image", image, "--repo", tmp_path / "repo", "--bitmap", "b1", *options]
        )
        assert done.rc == 2, done
    assert bitmaps(image) == {}


def test_clusters_that_are_too_small_for_the_disk_are_refused_with_the_next_full_only(tmp_path):
    night = Night(make_image(tmp_path / "disk.qcow2", "9T"), tmp_path / "repo")
    night.full()
    config = tmp_path / "c.yaml"
    config.write_text("cluster_size: 4K\n")
    options = ["--image", night.image, "--repo", night.repository, "--bitmap", "b1", "--json"]
    write(night.image, "write -P 1 8T 64k")
    done = call_pybackup(["--config", config, "incremental", *options])
    assert (done.rc, done.disk["kind"], done.disk["dirty_bytes"]) == (0, "incremental", 65536), done
    assert call_pybackup(["--config", config, "full", *options]).rc == 2
    (night.repository / "disk" / f"disk.{done.machine['point']}.qcow2").unlink()
    assert call_pybackup(["--config", config, "incremental", *options]).rc == 2  # which would have to be a full


def test_the_socket_of_a_served_image_lies_in_a_private_folder_that_goes_with_it(tmp_path):
    image = make_image(tmp_path / "disk.qcow2", "1M")
    with servers.serve_image(image, "qcow2", [], 2) as uri:
        folder = Path(uri.partition("socket=")[2]).parent
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_what_fails_while_a_server_starts_ends_the_server(tmp_path):
    from backup.errors import SourceError

    image = make_image(tmp_path / "disk.qcow2", "1M")

    def fail():
        raise SourceError("no", hint="no")

    with pytest.raises(SourceError, match="no"), servers.serve_image(image, "qcow2", [], 2, meanwhile=fail):
        pass
    image_bitmaps.add_bitmap(image, "b")  # nobody holds it
