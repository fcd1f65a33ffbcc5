"""Too little room is found before the first byte is written, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess

import pytest
from lab import MIB, Night, call_pybackup, raw_copy, require_identical, write

from backup.engine import restorer
from backup.operations import restore_space


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A disk of 64 MiB with 8 MiB of data."""
    found = Night.of(tmp_path_factory.mktemp("night"), "64M")
    write(found.image, "write -P 7 16M 7M")
    found.full()
    return found


@pytest.fixture
def small(tmp_path, request):
    """A file system of so many MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}M", "none", place], check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.fixture
def written(monkeypatch):
    """Jobs that a restore began."""
    began, real = [], restorer.RestoreRun._do
    monkeypatch.setattr(restorer.RestoreRun, "_do", lambda self, *args: (began.append(1), real(self, *args))[1])
    return began


def restored(night, target, *options):
    return call_pybackup(["restore", "disk", target, "--repo", night.repository, *options])


@pytest.mark.parametrize("small", [4], indirect=True)
@pytest.mark.parametrize("target", ["out.raw", "out.qcow2", "new/folder/"])
def test_a_file_system_with_too_little_room_is_refused_before_a_byte_is_written(night, small, written, target):
    done = restored(night, f"{small}/{target}")
    assert (done.rc, len(done.stderr.splitlines())) == (1, 2), done
    assert f"{small} has 4 MiB free" in done.stderr
    assert not written
    assert os.listdir(small) == []


@pytest.mark.parametrize("small", [10], indirect=True)
def test_a_disk_larger_than_the_free_room_is_restored_where_its_data_fits(night, small, tmp_path):
    done = restored(night, small / "out.raw")
    assert done.rc == 0, done
    require_identical(raw_copy(night.image, tmp_path / "source.raw"), small / "out.raw")


@pytest.mark.parametrize("small", [4], indirect=True)
def test_room_that_runs_out_half_way_leaves_nothing(night, small, monkeypatch):
    monkeypatch.setattr(restore_space, "require", lambda *_: None)
    done = restored(night, small / "out.raw")
    assert (done.rc, "No space left" in done.stderr) == (1, True), done
    assert os.listdir(small) == []


def test_all_disks_of_a_folder_count_together(tmp_path, monkeypatch):
    for name in ("a", "b"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / f"{name}.qcow2", "8M"], check=True)
        write(tmp_path / f"{name}.qcow2", "write -P 1 0 5M")
    config = tmp_path / "c.yaml"
    config.write_text("repository: repo\nmachines: {m: {disks: {vda: {image: a.qcow2}, vdb: {image: b.qcow2}}}}\n")
    assert call_pybackup(["--config", config, "full"]).rc == 0
    monkeypatch.setattr(restore_space, "_compresses", lambda _: False)
    command = ["--config", config, "restore", "m"]
    monkeypatch.setattr(restore_space, "_free", lambda _: 9 * MIB)
    done = call_pybackup([*command, tmp_path / "out"])
    assert (done.rc, "needs 10 MiB" in done.stderr) == (1, True), done
    assert not (tmp_path / "out").exists()
    assert call_pybackup([*command, tmp_path / "one.raw", "--disk", "vda"]).rc == 0
    monkeypatch.setattr(restore_space, "_compresses", lambda _: True)
    assert call_pybackup([*command, tmp_path / "out"]).rc == 0


def test_a_file_system_that_compresses_is_known_by_its_kind(tmp_path, monkeypatch):
    kinds = {subprocess.run(["stat", "-f", "-c", "%t", tmp_path], capture_output=True, text=True, check=True).stdout}
    [kind] = kinds
    monkeypatch.setattr(restore_space, "_COMPRESSING", {int(kind, 16)})
    assert restore_space._compresses(tmp_path)
    monkeypatch.setattr(restore_space, "_COMPRESSING", {int(kind, 16) ^ 1})
    assert not restore_space._compresses(tmp_path)
