"""A limit holds over any time, for all threads together; and every command that moves much data keeps to one."""

import threading
import time

import pytest
from lab import Night, call_pybackup, run, write

from backup.runtime.pace import Pace


def test_a_pace_keeps_to_its_limit_and_does_not_make_up_for_a_pause():
    pace = Pace(1000)
    assert [pace.wait(500, 10.0) for _ in range(3)] == [0.0, 0.5, 1.0]
    assert pace.wait(500, 11.5) == 0.0
    assert pace.wait(500, 60.0) == 0.0
    assert pace.wait(500, 60.0) == 0.5
    assert Pace(None).wait(1 << 40, 0.0) == 0.0


def test_several_threads_share_one_limit():
    pace, stop = Pace(1000), threading.Event()
    threads = [threading.Thread(target=lambda: [pace.keep(50, stop) for _ in range(3)]) for _ in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began >= 0.55


def test_who_waits_is_stopped_at_once():
    pace, stop = Pace(1), threading.Event()
    assert pace.keep(1000, stop)
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    assert not pace.keep(1000, stop)
    assert time.monotonic() - began < 5


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A full of 12 MiB of data that does not shrink."""
    folder = tmp_path_factory.mktemp("night")
    image = folder / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    run("dd", "if=/dev/urandom", f"of={folder / 'noise'}", "bs=1M", "count=12", "status=none")
    write(image, f"write -s {folder / 'noise'} 0 12M")
    night = Night(image, folder / "repository")
    assert call_pybackup(["full", "--image", image, "--repo", night.repository]).rc == 0
    return night


LIMITED = {
    "verify": lambda target: ["verify", "disk"],
    "copy": lambda target: ["copy", "disk", target],
    "restore": lambda target: ["restore", "disk/latest", target],
    "full": lambda target: ["full", "--image", target.with_name("disk.qcow2"), "--machine", "another"],
}


@pytest.mark.parametrize("command", ["verify", "copy", "restore"])
def test_what_moves_a_disks_bytes_keeps_to_a_limit(night, tmp_path, command):
    """12 MiB take 4 s, less the first and the last that are moved: 4 MiB each, at the most."""
    began = time.monotonic()
    assert call_pybackup([*LIMITED[command](tmp_path / "target"), "--repo", night.repository, "--limit", "3M"]).rc == 0
    assert time.monotonic() - began >= 1.2


def test_the_configurations_limit_holds_but_for_a_restore(night, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("limit: 1M\n")
    took = {}
    for name, more in (("verify", ["--limit", "3M"]), ("copy", ["--limit", "1G"]), ("restore", [])):
        arguments = [*LIMITED[name](tmp_path / name), *more, "--repo", night.repository]
        began = time.monotonic()
        assert call_pybackup(["--config", config, *arguments]).rc == 0
        took[name] = time.monotonic() - began
    config.write_text("limit: 3M\n")
    began = time.monotonic()
    assert call_pybackup(["--config", config, "verify", "--repo", night.repository]).rc == 0
    assert time.monotonic() - began >= 1.2
    assert took["verify"] >= 1.2
    assert max(took["copy"], took["restore"]) < 8, "the option wins, and a restore waits for none but its own"


@pytest.mark.parametrize("command", LIMITED)
def test_a_limit_that_makes_no_sense_is_refused(night, tmp_path, command):
    run("cp", night.image, tmp_path / "disk.qcow2")
    done = call_pybackup([*LIMITED[command](tmp_path / "target"), "--repo", night.repository, "--limit", "1"])
    assert done.rc == 2
    assert "--limit 1 is out of bounds" in done.stderr
    assert not (tmp_path / "target").is_file()
    assert not list((tmp_path / "target").glob("*/*"))
