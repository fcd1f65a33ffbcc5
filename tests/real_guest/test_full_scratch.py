"""
A scratch folder that fills up while a real guest writes: the backup fails, and the guest notices nothing.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from guest import NAMES, Guest, make_disks, started
from lab import PYBACKUP, init, run, run_pybackup


@pytest.fixture
def guest(system, tmp_path) -> Iterator[Guest]:
    with started(system, "write", *make_disks(tmp_path, ballast=system.kernel)) as guest:
        guest.wait_for(numbers=20, generations=1)
        yield guest
        guest.end()


@contextmanager
def small(folder: Path) -> Iterator[Path]:
    """A file system for much less than the guest overwrites in a while."""
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("a tmpfs can't be mounted here")
    try:
        yield folder
    finally:
        run("umount", "--lazy", folder)


def command(guest: Guest, folder: Path, scratch: Path) -> list[str | Path]:
    """A slow backup, without a reserve that would end it before the scratch folder is full."""
    config = folder / "config.yaml"
    config.write_text("scratch_reserve: 0\n")
    nodes = [word for name in NAMES for word in ("--node", f"node-{name}", "--disk", name)]
    names = ["--machine", "web1", "--bitmap", "b1", "--repo", folder / "repo", "--scratch", scratch, "--limit", "1M"]
    return ["--config", config, "full", "--qmp", guest.qmp, *nodes, *names]


def require_going_on(guest: Guest) -> None:
    assert guest.monitor("query-status")["status"] == "running"
    assert not guest.monitor("query-jobs")
    guest.wait_for(numbers=20, generations=1)


def stops(guest: Guest) -> list[str]:
    """Why QEMU stopped the guest, and that it did."""
    guest.monitor("query-status")  # takes in what came before
    return [event["event"] for event in guest.monitor.events if event["event"] in {"BLOCK_IO_ERROR", "STOP", "RESUME"}]


def test_a_backup_that_fills_its_scratch_folder_ends_and_the_guest_notices_nothing(guest, tmp_path):
    with small(tmp_path / "scratch") as scratch:
        done = run_pybackup(command(guest, tmp_path, scratch))
    assert done.rc == 13, done
    assert "ran out of space" in done.stderr or "lost what the guest overwrote" in done.stderr, done
    assert not stops(guest)
    require_going_on(guest)
    assert not list(tmp_path.glob("repo/*/*.qcow2*"))


def test_a_guest_whose_backup_was_killed_writes_on_when_the_scratch_folder_is_full(guest, tmp_path):
    arguments = command(guest, tmp_path, tmp_path / "scratch")
    init(arguments)
    with small(tmp_path / "scratch") as scratch:
        with subprocess.Popen([PYBACKUP, *arguments]) as process:
            guest.wait_until(lambda guest: guest.monitor("query-block-exports"), "export that the run reads from")
            process.kill()
        guest.wait_until(lambda _: os.statvfs(scratch).f_bavail == 0, "full scratch folder")
        guest.wait_for(numbers=20, generations=1)
        assert not stops(guest)
        done = run_pybackup(["clean", "--qmp", guest.qmp, "--repo", tmp_path / "repo"])
    assert done.rc == 0, done
    assert "job" in done.stdout
    require_going_on(guest)
