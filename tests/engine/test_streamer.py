"""restore ... -: a raw stream on standard output, and nothing else there."""

from __future__ import annotations

import os
import pty
import random
import signal
import subprocess

import pytest
from lab import MIB, PYBACKUP, Night, call_pybackup, raw_copy, require_identical, run_pybackup, write


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """
    A disk of an odd number of clusters, a shrink and regrowth in its chain; `source.raw` beside it is the disk.
    """
    folder = tmp_path_factory.mktemp("night")
    found = Night.of(folder, "21M")
    (folder / "noise").write_bytes(random.Random(1).randbytes(9 * MIB))
    write(found.image, f"write -s {folder}/noise 3M 9M", "write -P 7 20M 1M")
    found.full()
    subprocess.run(["qemu-img", "resize", "-q", "--shrink", found.image, "10M"], check=True)
    assert found.incremental().rc in {0, 3}
    subprocess.run(["qemu-img", "resize", "-q", found.image, "17900k"], check=True)
    write(found.image, "write -z 5M 1M", "write -P 9 16M 300k")
    assert found.incremental().rc in {0, 3}
    raw_copy(found.image, folder / "source.raw")
    return found


def command(night, *options):
    return [PYBACKUP, "restore", "disk", "-", "--repo", night.repository, *options]


def test_the_stream_is_the_disk_into_a_file_and_through_a_pipe(night, tmp_path):
    with (tmp_path / "file.raw").open("wb") as file:
        done = subprocess.run(command(night), stdout=file, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "restored" in done.stderr) == (0, True), done
    require_identical(night.image.with_name("source.raw"), tmp_path / "file.raw")
    with (tmp_path / "pipe.raw").open("wb") as file:
        with subprocess.Popen(command(night, "--quiet"), stdout=subprocess.PIPE) as writer:
            subprocess.run(["dd", "bs=7k", "status=none"], stdin=writer.stdout, stdout=file, check=True)
        assert writer.returncode == 0
    require_identical(night.image.with_name("source.raw"), tmp_path / "pipe.raw")


def test_a_long_chain_is_streamed_right(tmp_path):
    night = Night.of(tmp_path, "6M")
    night.full()
    for number in range(12):
        write(night.image, f"write -P {number + 1} {number * 400}k 500k")
        assert night.incremental().rc == 0
    done = subprocess.run(command(night), capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stdout == raw_copy(night.image, tmp_path / "source.raw").read_bytes()


def test_a_reader_that_goes_is_a_failure_of_two_lines(night):
    with subprocess.Popen(
        command(night, "--quiet"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as writer:
        writer.stdout.close()
        said = writer.stderr.read()
    assert writer.returncode == 1
    assert len(said.splitlines()) == 2
    assert "the reader has closed it" in said


def test_a_full_disk_behind_it_is_a_failure_of_two_lines(night):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command(night, "--quiet"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2)
    assert "No space left" in done.stderr


def test_a_terminal_is_refused(night):
    leader, follower = pty.openpty()
    done = subprocess.run(command(night), stdout=follower, stderr=subprocess.PIPE, text=True, check=False)
    os.close(follower)
    os.close(leader)
    assert (done.returncode, "terminal" in done.stderr) == (2, True)


@pytest.mark.parametrize("options", [["--json"], ["--salvage"], ["--format", "qcow2"]])
def test_what_does_not_go_with_a_stream_is_wrong_usage(night, options):
    done = run_pybackup(["restore", "disk", "-", "--repo", night.repository, *options])
    assert (done.rc, len(done.stderr.splitlines())) == (2, 2), done


def test_nothing_of_a_damaged_block_is_written_and_what_was_is_right(night, tmp_path):
    repo = tmp_path / "repo"
    subprocess.run(["cp", "-r", night.repository, repo], check=True)
    [full] = [path for path in repo.glob("disk/*.qcow2") if path.stat().st_size > 8 * MIB]
    content = bytearray(full.read_bytes())
    content[9 * MIB] ^= 1
    full.write_bytes(content)
    done = subprocess.run(
        [PYBACKUP, "--quiet", "restore", "disk", "-", "--repo", repo], capture_output=True, check=False
    )
    source = night.image.with_name("source.raw").read_bytes()
    assert done.returncode == 12
    assert len(done.stderr.splitlines()) == 2
    assert len(done.stdout) < len(source)
    assert source.startswith(done.stdout)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_stream_whose_reader_stands_still(night, number):
    with subprocess.Popen(
        command(night, "--quiet"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as writer:
        os.read(writer.stdout.fileno(), 1000)
        writer.send_signal(number)
        assert writer.wait(timeout=20) == 128 + number
        assert len(writer.stderr.read().splitlines()) == 2


def test_one_of_several_disks_must_be_named(tmp_path):
    for name in ("a", "b"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / f"{name}.qcow2", "1M"], check=True)
    config = tmp_path / "c.yaml"
    config.write_text("repository: repo\nmachines: {m: {disks: {vda: {image: a.qcow2}, vdb: {image: b.qcow2}}}}\n")
    assert call_pybackup(["--config", config, "full"]).rc == 0
    done = run_pybackup(["--config", config, "restore", "m", "-"])
    assert (done.rc, "--disk vda or vdb" in done.stderr) == (2, True)
    assert not (tmp_path / "-").exists()
