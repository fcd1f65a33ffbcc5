"""
What is known of scratch files: lengths that they need, and each witness of a copy that was lost.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lab import KIB, MIB, run

from backup.qmp import scratch
from backup.qmp.monitor import Event
from backup.qmp.scratch import LostCopy, Witness

OWN = "pybackup-0a1b2c3d-4e5f6071-"
BAD = {
    "type": "write",
    "node-name": f"{OWN}s2",
    "sector-num": 1,
    "sectors-count": 8,
    "error": "No space left on device",
}


class Told:
    """Stands for a monitor: tells each batch of events once."""

    def __init__(self, *batches: list[Event]) -> None:
        self._batches = list(batches)

    def events(self) -> list[Event]:
        return self._batches.pop(0) if self._batches else []


@pytest.mark.parametrize(
    ("name", "data", "lost"),
    [
        ("QUORUM_REPORT_BAD", BAD, LostCopy(2, "write", "No space left on device")),
        ("QUORUM_REPORT_BAD", {**BAD, "type": "read"}, LostCopy(2, "read", "No space left on device")),
        ("QUORUM_REPORT_BAD", {"type": "flush", "node-name": f"{OWN}s0"}, LostCopy(0, "flush", "no reason given")),
        ("QUORUM_FAILURE", {"reference": f"{OWN}q11", "sector-num": 1}, LostCopy(11, "access", "no reason given")),
        ("QUORUM_REPORT_BAD", {**BAD, "node-name": "pybackup-0a1b2c3d-ffffffff-s2"}, None),
        ("QUORUM_REPORT_BAD", {**BAD, "node-name": "mirror0"}, None),
        ("QUORUM_REPORT_BAD", {}, None),
        ("BLOCK_IO_ERROR", {"node-name": f"{OWN}s2"}, None),
    ],
)
def test_a_lost_copy_is_what_an_event_says_of_our_own_scratch_file(name, data, lost):
    assert Witness(Told([Event(name, data)]), OWN).lost() == lost


def test_what_was_lost_once_stays_lost_and_the_first_is_told(tmp_path):
    other = Event("QUORUM_REPORT_BAD", {**BAD, "node-name": f"{OWN}s0"})
    witness = Witness(Told([Event("STOP", {})], [Event("QUORUM_REPORT_BAD", BAD), other], [other]), OWN)
    assert witness.lost() is None
    assert [witness.lost(), witness.lost(), witness.lost()] == [LostCopy(2, "write", "No space left on device")] * 3
    assert witness.events() == {"STOP", "QUORUM_REPORT_BAD"}


def test_an_event_that_another_thread_is_just_taking_is_waited_for():
    """Else it is in neither hand: gone from the monitor, and not yet known."""
    taken, go_on = threading.Event(), threading.Event()

    class Slow:
        def events(self) -> list[Event]:
            if taken.is_set():
                return []
            taken.set()
            assert go_on.wait(30)
            return [Event("QUORUM_REPORT_BAD", BAD)]

    witness, found = Witness(Slow(), OWN), list[LostCopy | None]()
    watching = threading.Thread(target=witness.events)
    watching.start()
    assert taken.wait(30)
    asking = threading.Thread(target=lambda: found.append(witness.lost()))
    asking.start()
    asking.join(0.2)
    go_on.set()
    for thread in (watching, asking):
        thread.join(30)
    assert found == [LostCopy(2, "write", "No space left on device")]


def scratch_file(folder: Path, size: int) -> int:
    path = folder / "scratch.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
    return os.open(path, os.O_RDWR)


@pytest.mark.parametrize("size", [0, 512, MIB, 100 * 1024 * MIB])
def test_a_scratch_file_has_room_for_all_of_a_disk_and_takes_none_of_it(tmp_path, size):
    fd = scratch_file(tmp_path, size)
    length = scratch.lengthen(fd, size)
    full = run("qemu-img", "measure", "--size", str(size), "-O", "qcow2", "-o", "preallocation=full")
    needed = int(full.partition("fully allocated size: ")[2].split()[0])
    assert os.fstat(fd).st_size == length
    assert length % (64 * KIB) == 0
    assert length >= needed
    assert os.fstat(fd).st_blocks * 512 < MIB
    assert "No errors" in run("qemu-img", "check", tmp_path / "scratch.qcow2")
    os.close(fd)


def test_where_the_file_system_has_no_file_of_that_length_it_is_a_short_one(tmp_path):
    """As on ext4 beyond 16 TiB: here the process itself may not make it."""
    fd = scratch_file(tmp_path, MIB)
    code = (
        "import os, resource, sys\n"
        "from backup.qmp import scratch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 20, 32 << 20))\n"
        "print(scratch.lengthen(int(sys.argv[1]), 1 << 30), os.fstat(int(sys.argv[1])).st_size)\n"
    )
    command = [sys.executable, "-c", code, str(fd)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, pass_fds=[fd])
    length, size = done.stdout.split()
    assert length == size
    assert int(length) % (64 * KIB) == 0
    assert MIB < int(length) < 32 * MIB
    assert "No errors" in run("qemu-img", "check", tmp_path / "scratch.qcow2")
    os.close(fd)


@pytest.fixture
def thin(tmp_path):
    """A file system of 64 MiB on storage that has room for 8, which shows only when it writes back."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs root and loop devices")
    under, place = tmp_path / "under", tmp_path / "thin"
    for folder in (under, place):
        folder.mkdir()
    mounted = []
    try:
        run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", under)
        mounted.append(under)
        with (under / "storage").open("wb") as storage:
            storage.truncate(64 * MIB)
        run("mkfs.ext4", "-q", "-O", "^has_journal", under / "storage")
        run("mount", "-o", "loop", under / "storage", place)
        mounted.append(place)
        yield place
    finally:
        for folder in reversed(mounted):
            subprocess.run(["umount", folder], check=True)


def test_a_write_that_fails_only_when_it_is_written_back_is_found(thin):
    fd = os.open(thin / "scratch", os.O_RDWR | os.O_CREAT)
    assert scratch.write_back_error(fd) is None
    os.pwrite(fd, bytes([1]) * (32 * MIB), 0)
    subprocess.run(["sync"], check=False)
    error = scratch.write_back_error(fd)
    os.close(fd)
    assert error is not None
    assert error.strerror


def test_a_file_that_was_written_back_has_no_error(tmp_path):
    fd = os.open(tmp_path / "scratch", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, bytes(MIB), 0)
    os.fsync(fd)
    assert scratch.write_back_error(fd) is None
    os.close(fd)
