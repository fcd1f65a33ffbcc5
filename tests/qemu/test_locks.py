"""
Nobody writes to an image while it is backed up, also not to a raw one, nor to what lies below it (trap 33).

QEMU's programs are the other side: a storage daemon that has an image open as a running machine has it, and qemu-io.
"""

from __future__ import annotations

import errno
import fcntl
import subprocess
import time
from pathlib import Path

import pytest
from lab import MIB, call_pybackup, make_image, write
from servers import running

from backup.qemu import locks
from backup.qemu.images import ImageLocked


def writing(image: Path) -> str:
    """What qemu-io says when it is to write to a raw image; nothing where it could."""
    command = ["qemu-io", "-f", "raw", "-c", "write -q -P 2 0 4k", image]
    return subprocess.run(command, check=False, capture_output=True, text=True).stderr


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    image = make_image(tmp_path / "disk.raw", MIB, image_format="raw")
    write(image, "write -P 1 0 1M", image_format="raw")
    return image


@pytest.mark.parametrize("command", ["full", "incremental", "rescan", "map"])
def test_a_running_machines_raw_image_is_refused(raw, tmp_path, command):
    options = [] if command == "map" else ["--repo", tmp_path / "repo", "--bitmap", "b1"]
    with running(raw, "raw"):
        done = call_pybackup([command, "--image", raw, "--image-format", "raw", *options])
    assert done.rc == 13
    assert f"{raw} is in use by another program" in done.stderr
    assert "use --qmp" in done.stderr
    assert not list((tmp_path / "repo").glob("*/*.json"))


def test_a_machine_that_only_reads_does_no_harm(raw, tmp_path):
    with running(raw, "raw", writable=False):
        assert call_pybackup(["full", "--image", raw, "--image-format", "raw", "--repo", tmp_path / "repo"]).rc == 0


def test_a_raw_file_below_the_image_is_as_safe(raw, tmp_path):
    top = make_image(tmp_path / "top.qcow2", MIB, "-b", str(raw), "-F", "raw")
    full = ["full", "--image", top, "--repo", tmp_path / "repo"]
    with running(raw, "raw"):
        done = call_pybackup(full)
    assert (done.rc, f"{raw} is in use" in done.stderr) == (13, True), done
    assert call_pybackup(full).rc == 0


@pytest.mark.parametrize("below", [False, True])
def test_nobody_can_write_while_it_is_read(raw, tmp_path, monkeypatch, below):
    """Looked at from within a run, after its first byte and before its last."""
    from backup.engine import copier

    image = make_image(tmp_path / "top.qcow2", MIB, "-b", str(raw), "-F", "raw") if below else raw
    real, said = copier.copy, []

    def copy(*args, **named):
        said.append(writing(raw))
        return real(*args, **named)

    monkeypatch.setattr(copier, "copy", copy)
    form = "qcow2" if below else "raw"
    done = call_pybackup(["full", "--image", image, "--image-format", form, "--repo", tmp_path / "repo"])
    assert done.rc == 0, done
    assert ['Failed to get "write" lock' in each for each in said] == [True]
    assert writing(raw) == ""


def test_several_may_read_at_once(raw):
    with locks.no_writers([str(raw), str(raw)]), locks.no_writers([str(raw)]):
        assert "lock" in writing(raw)
    assert writing(raw) == ""


def test_what_is_no_local_file_is_left_to_qemu(tmp_path):
    with locks.no_writers([str(tmp_path / "absent"), "json:{}", "nbd://host/export", str(tmp_path)]):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_has_none_for_qemu_either(raw, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with locks.no_writers([str(raw)]):
        pass


def test_any_other_programs_lock_there_is_respected(raw, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with raw.open("rb+") as file:
        asked = locks._FLOCK.pack(fcntl.F_WRLCK, 0, 201, 1, 0)
        fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, asked)
        with pytest.raises(ImageLocked, match="is in use"), locks.no_writers([str(raw)]):
            pass
