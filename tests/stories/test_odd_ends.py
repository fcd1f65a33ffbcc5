"""
A disk that was cut where no qcow2 file can end: what QEMU reads from the data files is the disk all the same.

A file's size is a multiple of 512, so that QEMU shows up to 511 bytes of an odd disk's parent behind its end, unless
the last cluster is stored anew; and they would be shown again in the middle of a disk that has grown later (trap 45).
"""

import json
import os
from pathlib import Path

import pytest
from lab import CLUSTER, call_pybackup, check_repository, require_identical, run

from backup.planning.plan import cut_cluster


class Disk:
    """A raw disk, and its points with what the disk was at each."""

    def __init__(self, folder: Path, size: int) -> None:
        self.image, self.repository = folder / "disk.raw", folder / "repo"
        self.image.write_bytes(b"\xaa" * size)
        self.points: dict[Path, bytes] = {}

    def back_up(self) -> None:
        """Take a point: a full, a rescan with the warning that there will be no bitmap, then rescans without it."""
        rc = 3 if len(self.points) == 1 else 0
        args = ["incremental", "--image", self.image, "--image-format", "raw", "--bitmap", "b1", "--json"]
        done = call_pybackup([*args, "--repo", self.repository])
        assert done.rc == rc, done
        self.points[Path(done.machine["manifest"])] = self.image.read_bytes()

    def resized(self, size: int) -> None:
        os.truncate(self.image, size)
        self.back_up()

    def require_all(self, folder: Path) -> None:
        """Every point, by QEMU alone and by a restore, is what the disk was, and zeroes up to the next 512 bytes."""
        for manifest, content in self.points.items():
            newest = manifest.parent / json.loads(manifest.read_bytes())["disks"][0]["data"]["file"]
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", newest, folder / "converted")
            assert (folder / "converted").read_bytes() == content + bytes(-len(content) % 512)
            (folder / "expected").write_bytes(content)
            assert call_pybackup(["restore", manifest, folder / "restored", "--force"]).rc == 0
            require_identical(folder / "expected", folder / "restored")
        check_repository(self.repository)
        assert call_pybackup(["verify", "--deep", "--repo", self.repository]).rc == 0


@pytest.mark.parametrize("cut", [1000, 1, 511, CLUSTER - 1, CLUSTER + 1000, 3 * CLUSTER - 513])
def test_what_was_behind_the_end_of_a_cut_disk_is_never_seen_again(tmp_path, cut):
    disk = Disk(tmp_path, 3 * CLUSTER)
    disk.back_up()
    disk.resized(cut)
    disk.resized(3 * CLUSTER)
    disk.require_all(tmp_path)


def test_nor_where_the_disk_is_cut_again_and_again(tmp_path):
    disk = Disk(tmp_path, 2 * CLUSTER)
    disk.back_up()
    for size in (CLUSTER + 1000, CLUSTER + 900, 1000, CLUSTER + 999, 1001, 2 * CLUSTER):
        disk.resized(size)
    disk.require_all(tmp_path)
    done = call_pybackup(["prune", "--keep-last", "2", "--batch", "1", "--repo", disk.repository])
    assert done.rc == 0, done
    disk.points = {manifest: content for manifest, content in disk.points.items() if manifest.exists()}
    assert len(disk.points) == 2
    disk.require_all(tmp_path)


def test_a_cluster_of_zeroes_in_which_the_disk_was_cut_hides_its_parents_too(tmp_path):
    disk = Disk(tmp_path, 2 * CLUSTER)
    disk.back_up()
    with disk.image.open("rb+") as file:
        file.write(bytes(2 * CLUSTER))
        file.truncate(1000)
    disk.back_up()
    disk.resized(2 * CLUSTER)
    disk.require_all(tmp_path)


def test_that_nothing_differs_is_said_all_the_same(tmp_path):
    disk = Disk(tmp_path, CLUSTER)
    disk.back_up()
    disk.resized(1000)
    [entry] = json.loads(list(disk.points)[-1].read_bytes())["disks"]
    assert "nothing differs" in entry["reason"]
    assert entry["bytes"]["dirty"] == 0


def test_a_disk_cut_at_a_multiple_of_512_needs_nothing_stored(tmp_path):
    disk = Disk(tmp_path, CLUSTER)
    disk.back_up()
    disk.resized(1024)
    newest = list(disk.points)[-1]
    file = newest.with_name(json.loads(newest.read_bytes())["disks"][0]["data"]["file"])
    assert '"depth": 0' not in run("qemu-img", "map", "--output=json", "-f", "qcow2", file)
    disk.require_all(tmp_path)


@pytest.mark.parametrize(
    ("size", "parent", "expected"),
    [(1000, CLUSTER, 0), (CLUSTER + 1, 2 * CLUSTER, 1), (1000, 1000, None), (1000, 999, None), (1024, CLUSTER, None)],
)
def test_which_cluster_is_stored_whatever_it_holds(size, parent, expected):
    assert cut_cluster(size, parent, CLUSTER) == expected
