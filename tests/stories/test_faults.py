"""
Faults of servers, storage and space: the run says so in two lines, makes no point, leaves nothing behind and nothing
earlier touched, and the next run works.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from lab import KIB, MIB, PYBACKUP, Night, Result, bitmaps, call_pybackup, make_image, restore_and_cmp, run, write
from servers import nbdkit, qemu_nbd


@pytest.fixture
def content(tmp_path: Path) -> Path:
    path = tmp_path / "content.raw"
    path.write_bytes(random.Random(1).randbytes(3 * MIB) + bytes(MIB) + random.Random(2).randbytes(100))
    return path


@pytest.fixture
def repository(tmp_path: Path, content: Path) -> Path:
    """A repository that has a point of the disk already."""
    made = tmp_path / "repo"
    with nbdkit(tmp_path, "-r", "file", content) as uri:
        assert full(uri, made).rc == 0
    return made


def full(uri: str, repository: Path, *options: str) -> Result:
    return call_pybackup(["full", "--nbd", uri, "--machine", "m", "--disk", "d", "--repo", repository, *options])


def files(repository: Path) -> dict[str, bytes]:
    """Everything in a repository but its locks."""
    return {str(path): path.read_bytes() for path in repository.rglob("*") if path.is_file() and path.name != "lock"}


def require_failed(done: Result, rc: int, *words: str) -> None:
    """The code, two lines, and the words that tell what happened."""
    lines = done.stderr.splitlines()
    assert done.rc == rc, done
    assert [line.split(": ")[:2] for line in lines] == [["pybackup", "error"], ["pybackup", "hint"]], lines
    assert all(word in lines[0] for word in words), lines
    assert not done.stdout


def require_sound(repository: Path, machine: str = "m") -> None:
    done = call_pybackup(["verify", machine, "--deep", "--repo", repository])
    assert done.rc == 0, done


# Servers that fail: each entry is nbdkit's filters, and its parameters

SHELL_SIZE = "get_size=echo 4M"
"""An nbdkit plugin of shell commands; $4 is the offset of a read, and $PPID nbdkit itself."""

FAULTS = {
    "every read": (["--filter=error"], ["error-pread=EIO", "error-pread-rate=100%"]),
    "some reads": (["--filter=error"], ["error-pread=ENOMEM", "error-pread-rate=40%"]),
    "every block status": (["--filter=error"], ["error-extents=EIO", "error-extents-rate=100%"]),
    "one connection": (["--filter=multi-conn", "--filter=error"], ["multi-conn-mode=disable", "error-rate=60%"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_reports_errors(tmp_path, content, repository, fault):
    filters, parameters = FAULTS[fault]
    before = files(repository)
    # The reads are small and many, so that a rate below 100 % cannot be missed.
    config = tmp_path / "config.yaml"
    config.write_text("request_size: 64k\n")
    source = ["--nbd", "URI", "--machine", "m", "--disk", "d", "--repo", repository]
    with nbdkit(tmp_path, *filters, "-r", "file", content, *parameters) as uri:
        source[1] = uri
        require_failed(call_pybackup(["--config", config, "full", *source]), 13, uri)
    assert files(repository) == before
    require_sound(repository)
    with nbdkit(tmp_path, "-r", "file", content) as uri:
        assert full(uri, repository).rc == 0
    restore_and_cmp(repository, "m/latest", content)


DEATHS = {
    "in the handshake": ["open=kill -9 $PPID", "get_size=echo 1M", "pread=exit 1"],
    "asked for its size": ["get_size=kill -9 $PPID"],
    "during block status": [SHELL_SIZE, "can_extents=exit 0", "extents=kill -9 $PPID", "pread=exit 1"],
    "at the first read": [SHELL_SIZE, "pread=kill -9 $PPID"],
    "in the middle of reading": [
        SHELL_SIZE,
        'pread=if [ "$4" -ge 2097152 ]; then kill -9 $PPID; else head -c "$3" /dev/urandom; fi',
    ],
}


@pytest.mark.parametrize("moment", DEATHS)
def test_a_server_that_dies(tmp_path, content, repository, moment):
    """Trap 18: what it said until then counts for nothing."""
    before = files(repository)
    with nbdkit(tmp_path, "eval", *DEATHS[moment]) as uri:
        require_failed(full(uri, repository), 13, uri)
    assert files(repository) == before
    require_sound(repository)
    with nbdkit(tmp_path, "-r", "file", content) as uri:
        assert full(uri, repository).rc == 0
    restore_and_cmp(repository, "m/latest", content)


def test_a_block_status_that_fails_half_way_is_not_a_plan(tmp_path, repository):
    """The first half was answered, and was clean or zero."""
    before = files(repository)
    script = 'if [ "$4" -ge 2097152 ]; then echo EIO >&2; exit 1; fi; echo "$4 1M hole,zero"'
    with nbdkit(tmp_path, "eval", SHELL_SIZE, "can_extents=exit 0", f"extents={script}", "pread=exit 1") as uri:
        for options in ([], ["--dry-run"]):
            require_failed(full(uri, repository, *options), 13, uri)
        done = call_pybackup(["map", "--nbd", uri, "--totals"])
        assert (done.rc, done.stdout) == (13, "")
        done = call_pybackup(["map", "--nbd", uri, "--json"])
        assert (done.rc, done.document["error"]["code"]) == (13, 13)  # the error is the one document
    assert files(repository) == before


def test_a_server_that_ends_with_its_last_client_serves_a_whole_run(tmp_path, content):
    for mode in ("disable", "plugin"):
        filters = ["--filter=exitlast", "--filter=multi-conn"]
        with nbdkit(tmp_path, *filters, "-r", "file", content, f"multi-conn-mode={mode}") as uri:
            done = full(uri, tmp_path / "repo")
        assert (done.rc, done.stderr) == (0, "")
        restore_and_cmp(tmp_path / "repo", "m/latest", content)


HANGS = {
    "block status": ["delay-extents=100"],
    "reads": ["delay-read=100"],
    "the handshake": ["delay-open=100"],
}


@pytest.mark.parametrize("connections", ["disable", "plugin"])
@pytest.mark.parametrize("place", HANGS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_whose_server_hangs(tmp_path, content, repository, place, *, connections, number):
    """The server would answer in 100 s, the run must end long before; libnbd's blocking calls would not."""
    before = files(repository)
    filters = ["--filter=multi-conn", "--filter=delay"]
    with nbdkit(tmp_path, *filters, "-r", "file", content, f"multi-conn-mode={connections}", *HANGS[place]) as uri:
        command = [PYBACKUP, "full", "--nbd", uri, "--machine", "m", "--disk", "d", "--repo", repository]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                _wait_for_connection(uri, process)
                time.sleep(0.3)
                process.send_signal(number)
                stdout, stderr = process.communicate(timeout=30)
            finally:
                process.kill()
    require_failed(Result(process.returncode, stdout, stderr), 128 + number, "stopped")
    assert files(repository) == before


def _wait_for_connection(uri: str, process: subprocess.Popen[str]) -> None:
    """Until the run has a socket of its own: it has begun to talk to the server."""
    del uri
    folder = Path(f"/proc/{process.pid}/fd")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        for entry in folder.iterdir():
            try:
                if os.readlink(entry).startswith("socket:"):
                    return
            except OSError:
                continue
        time.sleep(0.02)
    raise AssertionError("it never connected")


# Storage below an image that is ours to serve


def test_an_image_that_cannot_be_read_keeps_its_old_bitmap(tmp_path):
    """P's bitmap stays, N's goes, and the next run continues from P.  The fault: a compressed cluster that is none."""
    base, image = tmp_path / "base.raw", tmp_path / "disk.qcow2"
    base.write_bytes(b"abcdefgh" * (256 * KIB))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", base, image)
    night = Night(image, tmp_path / "repo")
    night.full()
    kept = bitmaps(image)
    write(image, "write -P 1 64k 64k", "write -P 2 1M 64k")
    before = files(night.repository)
    with open(image, "r+b") as file:
        place = _compressed_cluster(file)
        file.seek(place)
        sound = file.read(16)
        file.seek(place)
        file.write(b"\xff" * 16)
    given = ["--image", image, "--repo", night.repository, "--bitmap", "b1"]
    require_failed(call_pybackup(["full", *given]), 13, "reading failed")
    assert files(night.repository) == before
    assert bitmaps(image) == kept
    with open(image, "r+b") as file:
        file.seek(place)
        file.write(sound)
    night.require_incremental()


def _compressed_cluster(file: IO[bytes]) -> int:
    """Where an image's first cluster lies in it (QEMU docs/interop/qcow2.txt, "Compressed Clusters Descriptor")."""
    file.seek(40)
    [table] = struct.unpack(">Q", file.read(8))
    file.seek(table)
    [first] = struct.unpack(">Q", file.read(8))
    file.seek(first & 0x00FFFFFFFFFFFE00)
    [entry] = struct.unpack(">Q", file.read(8))
    assert entry >> 62 & 1
    return entry & ((1 << 54) - 1)


# No space


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("wanted", ["full", "incremental"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_full_target_makes_no_point_and_the_old_bitmap_covers_the_failed_run(tmp_path, small, wanted, compression):
    image = make_image(tmp_path / "disk.qcow2", "32M")
    write(image, "write -P 1 0 1M")
    night = Night(image, small / "repo")
    night.full()
    kept = bitmaps(image)
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(4).randbytes(8 * MIB))
    write(image, f"write -s {noise} 2M 8M")
    before = files(night.repository)
    given = ["--image", image, "--repo", night.repository, "--bitmap", "b1", "--compression", compression]
    for _ in range(2):
        require_failed(call_pybackup([wanted, *given]), 1, "No space left")
        assert files(night.repository) == before
        assert bitmaps(image) == kept
    require_sound(night.repository, "disk")
    run("mount", "-o", "remount,size=40m", small)
    done = night.incremental("--compression", compression)
    assert (done.rc, done.stderr, done.disk["kind"]) == (0, "", "incremental"), done
    restored = tmp_path / "restored.raw"
    assert call_pybackup(["restore", "disk/latest", restored, "--repo", night.repository]).rc == 0
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, restored)


@pytest.mark.parametrize("free", [0, 64 * KIB, 130 * KIB, 200 * KIB])
def test_space_that_ends_near_the_end_of_a_run(tmp_path, small, free):
    """In the tables, the digests or the manifest: the last writes fail as cleanly as the first, or all of it fits."""
    image = make_image(tmp_path / "disk.qcow2", "4M")
    write(image, "write -P 1 0 1M")
    night = Night(image, small / "repo")
    night.full()
    kept = bitmaps(image)
    write(image, "write -P 3 1M 64k")
    filler = small / "filler"
    status = os.statvfs(small)
    filler.write_bytes(bytes(status.f_bavail * status.f_frsize - free))
    before = files(night.repository)
    done = call_pybackup(["incremental", "--image", image, "--repo", night.repository, "--bitmap", "b1"])
    if done.rc:
        require_failed(done, 1, "No space left")
        assert files(night.repository) == before
        assert bitmaps(image) == kept
    filler.unlink()
    require_sound(night.repository, "disk")
    night.require_incremental()


def test_the_same_fault_in_one_disk_of_a_server_is_told_by_its_uri(tmp_path):
    """Two lines are enough only when they say which server it was."""
    image = make_image(tmp_path / "disk.qcow2", "1M")
    with qemu_nbd(image) as uri:
        pass
    require_failed(full(uri, tmp_path / "repo"), 13, uri)
