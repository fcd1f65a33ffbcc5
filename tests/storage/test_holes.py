"""Unused space in a data file takes no space on disk: forty idle disks must not store gigabytes of nothing a year."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
from lab import make_image, restore_and_cmp, run, run_pybackup, write

from backup.storage.folder import FolderStorage

KIB = 1 << 10


def stored(path: Path) -> int:
    """Bytes of disk that a file takes."""
    return path.stat().st_blocks * 512


def test_an_idle_point_of_a_large_disk_takes_24_kib(tmp_path):
    image, repository = make_image(tmp_path / "disk.qcow2", "1T"), tmp_path / "repo"
    write(image, "write -P 1 700G 64k")
    command = ["incremental", "--image", image, "--bitmap", "b1", "--repo", repository]
    for _ in range(2):
        assert run_pybackup(command).rc == 0
    newest = max((repository / "disk").glob("*.json"), key=os.path.getmtime).stem
    files = list((repository / "disk").glob(f"*{newest}*"))
    assert len(files) == 3
    assert sum(map(stored, files)) <= 24 * KIB
    data = repository / "disk" / f"disk.{newest}.qcow2"
    assert "No errors were found" in run("qemu-img", "check", data)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", image, data)
    assert run_pybackup(["verify", "--deep", "disk", "--repo", repository]).rc == 0


def test_the_holes_are_the_zeroes(tmp_path):
    image, repository = make_image(tmp_path / "disk.qcow2", "3M"), tmp_path / "repo"
    command = ["incremental", "--image", image, "--bitmap", "b1", "--compression", "none", "--repo", repository]
    for text in ("write -P 1 0 64k", "write -P 2 68k 4k", "write -P 3 1M 1M"):
        write(image, text)
        assert run_pybackup(command).rc == 0
        restore_and_cmp(repository, "disk", image)


@pytest.mark.parametrize("data", [bytes(64 * KIB), b"x" + bytes(64 * KIB), bytes(60 * KIB) + b"x" * 5000])
def test_a_part_of_zeroes_is_a_hole_and_the_size_is_right(tmp_path, data):
    files = FolderStorage(tmp_path).files()
    with closing(files.create("a", 4 << 20)) as writer:
        writer.put(0, data)
        writer.finish()
    assert (tmp_path / "a").read_bytes() == data
    assert stored(tmp_path / "a") <= 8 * KIB
