"""Restore onto fresh and used targets of every kind; cmp and qemu-img are the judges."""

import json
import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
from dissect.hypervisor.disk.qcow2 import QCow2
from lab import (
    MIB,
    PYBACKUP,
    Night,
    call_pybackup,
    check_repository,
    make_image,
    raw_copy,
    require_identical,
    run,
    write,
)
from targets import nbdkit, qemu_nbd

from backup.engine import restorer, targets
from backup.errors import Failed, UsageError
from backup.nbd.target import NbdTarget


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """
    A full and two incrementals: data, zeroes over data, a discarded range, a hole that was never written.

    `source.raw` beside it is the disk.  Made once: no test changes it.
    """
    folder = tmp_path_factory.mktemp("night")
    night = Night.of(folder, "12M")
    data = folder / "pattern"
    data.write_bytes(random.Random(1).randbytes(3 * MIB))
    write(night.image, f"write -s {data} 5M 3M")
    night.full()
    write(night.image, "write -P 0x33 100k 333k", "write -z 5M 1M")
    assert night.incremental().rc == 0
    write(night.image, "discard 6M 512k", "write -P 0 1M 64k", "write -P 0x44 11M 1M")
    assert night.incremental().rc == 0
    raw_copy(night.image, folder / "source.raw")
    return night


@pytest.fixture
def source(night):
    """The disk as QEMU reads it."""
    return night.image.with_name("source.raw")


def restore(night, target, *options):
    return call_pybackup(["restore", "disk/latest", target, "--repo", night.repository, *options])


def garbage(path, size):
    path.write_bytes(random.Random(2).randbytes(size))
    return path


def test_a_new_raw_file_is_sparse_private_and_equal(night, source, tmp_path):
    assert restore(night, tmp_path / "new.raw").rc == 0
    require_identical(source, tmp_path / "new.raw")
    status = (tmp_path / "new.raw").stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_blocks * 512 < 9 * MIB
    assert not list(tmp_path.glob(".*"))


def test_an_older_point_is_the_disk_as_it_was_then(tmp_path):
    night = Night.of(tmp_path)
    points = []
    for number in range(3):
        write(night.image, f"write -P {number + 1} {number * 64}k 128k")
        points.append((night.full() if number == 0 else night.incremental()).machine["point"])
        raw_copy(night.image, tmp_path / f"source{number}.raw")
    for number, point in enumerate(points):
        target = tmp_path / f"restored{number}.raw"
        assert call_pybackup(["restore", f"disk/{point}", target, "--repo", night.repository]).rc == 0
        require_identical(tmp_path / f"source{number}.raw", target)


def test_a_used_file_needs_force_and_is_replaced_whole(night, source, tmp_path):
    used = garbage(tmp_path / "used.raw", 13 * MIB)
    before = used.read_bytes()
    done = restore(night, used)
    assert done.rc == 2
    assert "--force" in done.stderr
    assert used.read_bytes() == before
    assert restore(night, used, "--force").rc == 0
    require_identical(source, used)


@pytest.mark.parametrize("used", [False, True])
def test_a_qcow2_stands_alone_and_is_equal(night, source, tmp_path, used):
    target = tmp_path / "r.qcow2"
    if used:
        garbage(target, MIB)
    assert restore(night, target, "--format", "qcow2", *["--force"] * used).rc == 0
    assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", target)
    assert "Images are identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", target, source)
    info = json.loads(run("qemu-img", "info", "--output=json", target))
    assert "backing-filename" not in info
    assert target.stat().st_mode & 0o777 == (0o644 if used else 0o600)
    with target.open("rb") as file:
        assert QCow2(file).open().read(12 * MIB) == (source).read_bytes()


@contextmanager
def loop_device(path):
    done = subprocess.run(["losetup", "-f", "--show", path], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    try:
        yield done.stdout.strip()
    finally:
        run("losetup", "-d", done.stdout.strip())


def test_a_used_block_device_gets_its_zeroes_written(night, source, tmp_path):
    with loop_device(garbage(tmp_path / "device", 12 * MIB)) as device:
        assert restore(night, device).rc == 2
        assert restore(night, device, "--format", "qcow2", "--force").rc == 2
        done = restore(night, device, "--force")
        assert done.rc == 0, done.stderr
    require_identical(source, tmp_path / "device")


def test_a_device_that_is_too_small_is_refused_before_a_byte_is_written(night, tmp_path):
    small = garbage(tmp_path / "device", 12 * MIB - 4096)
    before = small.read_bytes()
    with loop_device(small) as device:
        done = restore(night, device, "--force")
        assert (done.rc, "12578816 bytes" in done.stderr) == (1, True), done
    assert small.read_bytes() == before


@pytest.mark.parametrize("kernel", [True, False], ids=["zeroed-by-the-kernel", "zeroes-written"])
def test_a_device_is_zeroed_at_any_offset(tmp_path, monkeypatch, kernel):
    # A file stands for the device, which needs no root: the calls are the same.
    if not kernel:
        monkeypatch.setattr(targets, "_libc_fallocate", lambda: lambda *_: False)
    path = garbage(tmp_path / "device", 5 * MIB)
    expected = bytearray(path.read_bytes())
    fd = os.open(path, os.O_RDWR)
    device = targets.DeviceTarget(fd, path)
    for low, length in ((0, 4096), (10_000, 1), (MIB, 2 * MIB + 512), (5 * MIB - 513, 513)):
        device.zero(low, length)
        expected[low : low + length] = bytes(length)
    os.close(fd)
    assert path.read_bytes() == expected


SERVERS = {
    "plain": [],
    "no-zero": ["--filter=nozero"],
    "small-requests": ["--filter=blocksize-policy", "--", "blocksize-maximum=64k", "blocksize-error-policy=error"],
    "sectors": ["--filter=blocksize-policy", "--", "blocksize-minimum=512", "blocksize-error-policy=error"],
}


@pytest.mark.parametrize("kind", SERVERS)
def test_a_used_nbd_export_is_equal_afterwards(night, source, tmp_path, kind):
    used = garbage(tmp_path / "used.raw", 12 * MIB)
    filters, _, settings = " ".join(SERVERS[kind]).partition(" -- ")
    with nbdkit(*filters.split(), "file", str(used), *settings.split()) as uri:
        assert restore(night, uri).rc == 2
        done = restore(night, uri, "--force")
        assert done.rc == 0, done.stderr
    require_identical(source, used)


def test_a_qcow2_behind_qemu_nbd_and_larger_than_the_disk_is_equal_up_to_its_size(night, source, tmp_path):
    image = make_image(tmp_path / "t.qcow2", "13M")
    write(image, "write -P 0xee 0 13M")
    with qemu_nbd(image, image_format="qcow2") as uri:
        assert restore(night, uri, "--force").rc == 0
    found = raw_copy(image, tmp_path / "t.raw").read_bytes()
    assert found[: 12 * MIB] == (source).read_bytes()
    assert found[12 * MIB :] == b"\xee" * MIB


def test_an_export_too_small_or_read_only_is_refused_before_a_byte_is_written(night, tmp_path):
    small = garbage(tmp_path / "small.raw", 12 * MIB - 512)
    before = small.read_bytes()
    with nbdkit("file", str(small)) as uri:
        done = restore(night, uri, "--force")
        assert (done.rc, "12582400 bytes" in done.stderr) == (1, True), done
    assert small.read_bytes() == before
    with nbdkit("-r", "file", str(small)) as uri:
        assert "read-only" in restore(night, uri, "--force").stderr


@pytest.mark.parametrize("operation", ["pwrite", "zero"])
def test_an_error_of_the_target_ends_in_two_lines_and_no_zero(night, tmp_path, operation):
    used = garbage(tmp_path / "used.raw", 12 * MIB)
    with nbdkit(
        "--filter=error", "file", str(used), f"error-{operation}=ENOSPC", f"error-{operation}-rate=100%"
    ) as uri:
        done = restore(night, uri, "--force")
    assert done.rc == 1
    assert len(done.stderr.splitlines()) == 2
    assert "space" in done.stderr
    assert "bug" not in done.stderr


def test_an_export_nobody_serves_is_named(night, tmp_path):
    done = restore(night, f"nbd+unix:///?socket={tmp_path}/none", "--force")
    assert done.rc in {1, 13}
    assert len(done.stderr.splitlines()) == 2


def test_a_disk_of_an_odd_size_is_restored_to_the_byte_with_and_without_pybackup(tmp_path):
    source = garbage(tmp_path / "odd.raw", 1_000_001)
    repo = tmp_path / "repo"
    assert call_pybackup(["full", "--image", source, "--image-format", "raw", "--repo", repo]).rc == 0
    check_repository(repo)
    assert call_pybackup(["restore", "odd/latest", tmp_path / "r.raw", "--repo", repo]).rc == 0
    require_identical(source, tmp_path / "r.raw")
    raw_copy(next(repo.glob("odd/*.qcow2")), tmp_path / "by-qemu.raw")
    os.truncate(tmp_path / "by-qemu.raw", 1_000_001)
    require_identical(source, tmp_path / "by-qemu.raw")
    restored = call_pybackup(["restore", "odd/latest", tmp_path / "r.qcow2", "--format", "qcow2", "--repo", repo])
    assert restored.rc == 0
    assert "No errors were found" in run("qemu-img", "check", tmp_path / "r.qcow2")
    found = raw_copy(tmp_path / "r.qcow2", tmp_path / "r2.raw").read_bytes()
    assert found == source.read_bytes() + bytes(-1_000_001 % 512)


@pytest.mark.parametrize("smallest", [1, 512, 4096])
def test_a_disk_of_an_odd_size_fits_an_export_of_any_block_size(tmp_path, smallest):
    source = garbage(tmp_path / "odd.raw", 1_000_001)
    used = garbage(tmp_path / "used.raw", 1_003_520)
    repo = tmp_path / "repo"
    with nbdkit("file", str(source)) as uri:
        assert call_pybackup(["full", "--nbd", uri, "--machine", "odd", "--disk", "d", "--repo", repo]).rc == 0
    policy = [
        f"blocksize-minimum={smallest}",
        f"blocksize-preferred={max(smallest, 4096)}",
        "blocksize-error-policy=error",
    ]
    with nbdkit("--filter=blocksize-policy", "file", str(used), *policy) as uri:
        done = call_pybackup(["restore", "odd/latest", uri, "--force", "--repo", repo])
        assert done.rc == 0, done.stderr
    assert used.read_bytes()[:1_000_001] == source.read_bytes()


@pytest.mark.parametrize("filters", [[], ["--filter=nozero"]])
def test_a_server_whose_blocks_are_larger_than_the_clusters_keeps_what_lies_behind_the_disk(tmp_path, filters):
    """Each of its blocks is written by several threads, in parts: data, zeroes and the disk's end."""
    source = garbage(tmp_path / "small.raw", 2 * MIB + 4096)
    with source.open("r+b") as disk:
        for number in range(0, 512, 3):
            disk.seek(number * 4096)
            disk.write(bytes(4096))
    used = garbage(tmp_path / "used.raw", 3 * MIB)
    behind = used.read_bytes()[2 * MIB + 4096 :]
    repo = tmp_path / "repo"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"repository: {repo}\ncluster_size: 4K\nmachines: {{m: {{disks: {{d: {{image: {source}, format: raw}}}}}}}}\n"
    )
    assert call_pybackup(["init", repo]).rc == 0
    assert call_pybackup(["--config", config, "full"]).rc == 0
    sizes = ["blocksize-minimum=64K", "blocksize-preferred=64K", "blocksize-error-policy=error"]
    with nbdkit("--filter=blocksize-policy", *filters, "file", str(used), *sizes) as uri:
        done = call_pybackup(["restore", "m/latest", uri, "--force", "--repo", repo])
        assert done.rc == 0, done.stderr
    assert used.read_bytes() == source.read_bytes() + behind


@pytest.mark.parametrize("size", [1, 511, 513, 65536, 65537])
def test_disks_of_tiny_and_odd_sizes_come_back(tmp_path, size):
    source = garbage(tmp_path / "s.raw", size)
    repo = tmp_path / "repo"
    done = call_pybackup(["full", "--image", source, "--image-format", "raw", "--repo", repo])
    assert done.rc == 0, done.stderr
    assert call_pybackup(["restore", "s/latest", tmp_path / "r.raw", "--repo", repo]).rc == 0
    require_identical(source, tmp_path / "r.raw")
    assert call_pybackup(["restore", "s/latest", tmp_path / "r.qcow2", "--format", "qcow2", "--repo", repo]).rc == 0
    assert "No errors were found" in run("qemu-img", "check", tmp_path / "r.qcow2")
    check_repository(repo)


def read_by_dissect(folder, name, size):
    """The disk as dissect.hypervisor reads it, given each backing file in turn (it leaves those that it opens open)."""
    with ExitStack() as stack:

        def opened(name):
            file = stack.enter_context((folder / name).open("rb"))
            backing = QCow2(file, allow_no_backing_file=True).auto_backing_file
            return QCow2(file, backing_file=opened(backing).open() if backing else None)

        return opened(name).open().read(size)


@pytest.mark.parametrize("options", [[], ["--compression", "none"], ["--compression", "zstd:9"]])
def test_the_newest_data_file_alone_gives_qemu_and_dissect_the_disk(tmp_path, options):
    night = Night.of(tmp_path, "6M")
    night.full(*options)
    for number in (1, 2):
        write(night.image, f"write -P {number} {number}M 100k", "write -z 0 64k")
        assert night.incremental(*options).rc == 0
    expected = raw_copy(night.image, tmp_path / "source.raw")
    newest = night.repository / "disk" / night.newest["disks"][0]["data"]["file"]
    require_identical(expected, raw_copy(newest, tmp_path / "qemu.raw"))
    assert read_by_dissect(night.repository / "disk", newest.name, 6 * MIB) == expected.read_bytes()


@pytest.fixture
def two_disks(tmp_path):
    for name, pattern in (("a", 1), ("b", 2)):
        write(make_image(tmp_path / f"{name}.qcow2", "1M"), f"write -P {pattern} 0 300k")
    config = tmp_path / "c.yaml"
    config.write_text(
        "repository: repo\nbitmap: b1\nmachines: {web1: {disks: {vda: {image: a.qcow2}, vdb: {image: b.qcow2}}}}\n"
    )
    assert call_pybackup(["--config", config, "full"]).rc == 0
    return config


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("exists", [False, True])
def test_several_disks_go_into_a_new_or_empty_folder(two_disks, tmp_path, image_format, exists):
    target = tmp_path / "out"
    if exists:
        target.mkdir()
    done = call_pybackup(["--config", two_disks, "restore", "web1/latest", target, "--format", image_format, "--json"])
    assert done.rc == 0, done.stderr
    assert sorted(os.listdir(target)) == [f"vda.{image_format}", f"vdb.{image_format}"]
    assert [disk["name"] for disk in done.document["disks"]] == ["vda", "vdb"]
    for source, disk in (("a", "vda"), ("b", "vdb")):
        run(
            "qemu-img",
            "compare",
            "-f",
            "qcow2",
            "-F",
            image_format,
            tmp_path / f"{source}.qcow2",
            target / f"{disk}.{image_format}",
        )


def test_several_disks_are_refused_a_target_that_is_no_folder(two_disks, tmp_path):
    (tmp_path / "x").write_text("x")
    before = sorted(os.listdir(tmp_path))
    for target in (tmp_path / "x", f"{tmp_path}/x/", tmp_path / "new.raw", tmp_path / "new.img", "nbd://localhost:1"):
        done = call_pybackup(["--config", two_disks, "restore", "web1/latest", target, "--force"])
        assert (done.rc, "folder" in done.stderr) == (2, True), done
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_with_other_files_takes_disks_and_replaces_only_with_force(two_disks, tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "other").write_text("other")
    (folder / "vdb.raw").write_text("old")
    command = ["--config", two_disks, "restore", "web1", folder]
    assert call_pybackup(command).rc == 2
    assert sorted(os.listdir(folder)) == ["other", "vdb.raw"]  # vda was not begun
    assert call_pybackup([*command, "--force"]).rc == 0
    assert sorted(os.listdir(folder)) == ["other", "vda.raw", "vdb.raw"]
    require_identical(raw_copy(tmp_path / "b.qcow2", tmp_path / "expected.raw"), folder / "vdb.raw")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("options", [[], ["--format", "qcow2"]], ids=["raw", "qcow2"])
def test_one_disk_goes_into_a_folder_under_its_name(two_disks, tmp_path, exists, options):
    folder = tmp_path / "new" / "out"
    if exists:
        folder.mkdir(parents=True)
    done = call_pybackup(["--config", two_disks, "restore", "web1", f"{folder}/", "--disk", "vdb", *options, "--json"])
    assert done.rc == 0, done
    name = "vdb.qcow2" if options else "vdb.raw"
    assert os.listdir(folder) == [name]
    assert done.document["disks"][0]["target"] == str(folder / name)
    assert folder.stat().st_mode & 0o777 == (0o755 if exists else 0o700)


def test_a_folder_that_was_made_for_nothing_goes_again(two_disks, tmp_path):
    [data] = (tmp_path / "repo" / "web1").glob("vda.*.qcow2")
    data.write_bytes(data.read_bytes()[:-1])
    done = call_pybackup(["--config", two_disks, "restore", "web1", f"{tmp_path}/new/out/"])
    assert done.rc == 12, done
    assert not (tmp_path / "new").exists()


def format_of(path):
    return json.loads(run("qemu-img", "info", "--output=json", path))["format"]


@pytest.mark.parametrize(
    ("name", "options", "ends"),
    [
        ("out.qcow2", [], ("qcow2", 0)),
        ("out.QCOW2", [], ("qcow2", 0)),
        ("out.raw", [], ("raw", 0)),
        ("out.vmdk", [], ("raw", 0)),
        ("out", ["--format", "qcow2"], ("qcow2", 0)),
        ("out.img", ["--format", "qcow2"], ("qcow2", 0)),
        ("out.qcow2", ["--format", "qcow2"], ("qcow2", 0)),
        ("out.qcow2", ["--format", "raw"], ("raw", 3)),
        ("out.raw", ["--format", "qcow2"], ("qcow2", 3)),
    ],
)
def test_the_end_of_the_name_is_the_format_unless_told_and_a_contradiction_warns(night, tmp_path, name, options, ends):
    expected, code = ends
    done = restore(night, tmp_path / name, *options, "--json")
    assert done.rc == code, done
    assert format_of(tmp_path / name) == expected
    assert bool(done.document["warnings"]) == (code == 3) == ("pybackup: warning:" in done.stderr)


def test_a_loop_device_on_a_backup_is_no_target(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    [data] = night.repository.glob("disk/*.qcow2")
    before = data.read_bytes()
    with loop_device(data) as device:
        done = restore(night, device, "--force")
    assert (done.rc, "lies in the repository" in done.stderr) == (2, True), done
    assert data.read_bytes() == before


def test_one_of_several_disks_and_a_disk_that_is_not_there(two_disks, tmp_path):
    command = ["--config", two_disks, "restore", "web1/latest", tmp_path / "b.raw", "--disk"]
    assert call_pybackup([*command, "vdz"]).rc == 10
    assert call_pybackup([*command, "vdb"]).rc == 0
    require_identical(raw_copy(tmp_path / "b.qcow2", tmp_path / "expected.raw"), tmp_path / "b.raw")


def test_a_killed_restore_leaves_nothing_under_the_name(tmp_path):
    night = Night.of(tmp_path, "64M")
    pattern = garbage(tmp_path / "pattern", 32 * MIB)
    write(night.image, f"write -s {pattern} 0 32M")
    night.full()
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        target = tmp_path / f"r{int(number)}.raw"
        # Slowed at its first block, so that the signal is sure to come half-way.
        code = (
            "import os, time; from backup.engine import restorer; from backup.cli import app\n"
            "real = restorer.RestoreRun._do\n"
            "def slow(self, job, codec): real(self, job, codec); os.write(1, b'wrote\\n'); time.sleep(0.5)\n"
            "restorer.RestoreRun._do = slow; app.main()"
        )
        command = ["restore", "disk/latest", target, "--repo", night.repository]
        with subprocess.Popen(
            [PYBACKUP.with_name("python"), "-c", code, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == b"wrote\n"
            assert not target.exists()
            process.send_signal(number)
            _, errors = process.communicate(timeout=30)
        assert not target.exists()
        if number == signal.SIGKILL:
            assert process.returncode == -9
        else:
            assert process.returncode == 128 + number
            assert len(errors.splitlines()) == 2
            assert not list(tmp_path.glob(f".r{int(number)}*"))
    assert restore(night, tmp_path / "r9.raw").rc == 0


def test_a_target_made_meanwhile_is_not_replaced_without_force(tmp_path):
    with (  # noqa: PT012 - the error comes at the block's end
        pytest.raises(UsageError, match="exists"),
        targets.open_target(str(tmp_path / "t"), 10, "raw", cluster_size=4096, force=False) as target,
    ):
        target.write(0, b"x" * 10)
        (tmp_path / "t").write_text("another's")
    assert (tmp_path / "t").read_text() == "another's"
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("where", ["folder/that/is/not/there.raw", "file/below.raw"])
def test_a_place_that_cannot_be_written_is_a_failure_of_two_lines(night, tmp_path, where):
    (tmp_path / "file").write_text("x")
    done = restore(night, tmp_path / where)
    assert done.rc == 1
    assert len(done.stderr.splitlines()) == 2


def test_a_full_file_system_is_a_failure_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(Failed, match="No space left"),
        targets.open_target(str(tmp_path / "t"), 10, "raw", cluster_size=4096, force=False) as target,
    ):
        target.write(0, b"x" * 10)
    assert os.listdir(tmp_path) == []


def test_a_pipe_or_character_device_is_no_target(night, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", "/dev/null", "/dev/full", ""):
        done = restore(night, target)
        assert (done.rc, len(done.stderr.splitlines())) == (2, 2)
        assert "-" in done.stderr
        assert restore(night, target, "--force").rc == 2


def test_a_restore_does_not_replace_a_backup(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    point = night.newest["point"]
    data = night.repository / "disk" / f"disk.{point}.qcow2"
    before = data.read_bytes()
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "loop").symlink_to("loop")
    assert call_pybackup(["restore", "disk/latest", tmp_path / "loop", "--repo", night.repository]).rc == 2
    marker, other = night.repository / "pybackup.json", night.repository / "other" / "new.raw"
    for target in (data, tmp_path / "link", data.with_name("new.raw"), marker, other):
        done = call_pybackup(["restore", "disk/latest", target, "--repo", night.repository, "--force"])
        assert done.rc == 2, done
        assert "lies in the repository" in done.stderr
    assert data.read_bytes() == before
    assert not data.with_name("new.raw").exists()


def awaited(log, word):
    """Wait until nbdkit's log filter has seen a request of that kind."""
    deadline = time.monotonic() + 20
    while not (log.exists() and f" {word} " in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


ONE_CONNECTION = ["--filter=multi-conn", "multi-conn-mode=disable"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hanging", ["Write", "Zero"])
@pytest.mark.parametrize("mode", [[], ONE_CONNECTION], ids=["many", "one"])
def test_a_signal_stops_a_restore_onto_a_server_that_hangs(night, tmp_path, number, hanging, mode):
    log = tmp_path / "log"
    filters = [*mode[:1], "--filter=log", "--filter=delay"]
    with nbdkit(*filters, "memory", "64M", f"delay-{hanging.lower()}=600", f"logfile={log}", *mode[1:]) as uri:
        command = [PYBACKUP, "restore", "disk/latest", uri, "--force", "--repo", night.repository]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                awaited(log, hanging)
                time.sleep(0.3)
                sent = time.monotonic()
                process.send_signal(number)
                _, errors = process.communicate(timeout=8)
                took = time.monotonic() - sent
            finally:
                process.kill()
    assert process.returncode == 128 + number
    assert len(errors.splitlines()) == 2, errors
    assert took < 3


def test_a_signal_stops_a_restore_whose_server_stands_still_at_the_flush(night, tmp_path):
    # Nothing is under way on the other connections then, and no goodbye must be waited for on any of them.
    marker = tmp_path / "flushing"
    script = [f"flush=touch {marker}; exec sleep 20", "get_size=echo 16777216", "pwrite=cat >/dev/null", "zero=exit 0"]
    with nbdkit("eval", *script, "can_write=exit 0", "can_zero=exit 0", "can_flush=exit 0", "pread=exit 1") as uri:
        command = [PYBACKUP, "restore", "disk/latest", uri, "--force", "--repo", night.repository]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                deadline = time.monotonic() + 20
                while not marker.exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                sent = time.monotonic()
                process.terminate()
                process.communicate(timeout=8)
                took = time.monotonic() - sent
            finally:
                process.kill()
    assert process.returncode == 143
    assert took < 3


def in_threads(*calls):
    """Run all at once; the errors that they ended with."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.exception() for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize(("mode", "connections"), [([], 4), (ONE_CONNECTION, 1)], ids=["many", "one"])
def test_threads_write_at_once_as_far_as_the_server_allows(tmp_path, mode, connections):
    log = tmp_path / "log"
    used = garbage(tmp_path / "used.raw", 8 * MIB)
    pieces = [random.Random(number).randbytes(2 * MIB) for number in range(4)]
    filters = [*mode[:1], "--filter=log", "--filter=delay", "file", str(used), *mode[1:]]
    with nbdkit(*filters, f"logfile={log}", "wdelay=200ms") as uri:
        target = NbdTarget(uri)
        calls = [partial(target.write, number * 2 * MIB, piece) for number, piece in enumerate(pieces)]
        assert in_threads(*calls) == [None] * 4
        target.flush()
        target.close()
    assert used.read_bytes() == b"".join(pieces)
    assert log.read_text().count(" Connect ") == connections


def test_a_server_that_takes_fewer_connections_than_it_could_is_written_through_those(tmp_path):
    used = garbage(tmp_path / "used.raw", 8 * MIB)
    with qemu_nbd(used, "--shared=2") as uri:
        target = NbdTarget(uri)
        calls = [partial(target.write, low * 64 * 1024, bytes([low + 1]) * 64 * 1024) for low in range(128)]
        assert in_threads(*calls) == [None] * 128
        target.flush()
        target.close()
    assert used.read_bytes() == b"".join(bytes([low + 1]) * 64 * 1024 for low in range(128))


@pytest.mark.parametrize("mode", [[], ONE_CONNECTION], ids=["many", "one"])
def test_an_abandoned_target_lets_all_threads_go(mode):
    with nbdkit(*mode[:1], "--filter=delay", "memory", "8M", *mode[1:], "wdelay=600") as uri:
        target = NbdTarget(uri)
        began = time.monotonic()
        writes = [partial(target.write, number * MIB, bytes(MIB)) for number in range(3)]
        errors = in_threads(*writes, lambda: (time.sleep(0.5), target.abandon()))
        target.close()
        assert time.monotonic() - began < 3
    assert [type(error) for error in errors] == [Failed, Failed, Failed, type(None)]


def test_an_error_in_one_thread_does_not_wait_for_another_that_hangs(night, tmp_path):
    # The first write hangs and all others fail: the error must come out.
    script = f"cat >/dev/null; mkdir {tmp_path}/first 2>/dev/null && exec sleep 20; echo ENOSPC >&2; exit 1"
    with nbdkit(
        "eval", "get_size=echo 16777216", f"pwrite={script}", "zero=exit 0", "can_zero=exit 0", "can_write=exit 0",
        "pread=exit 1", "can_multi_conn=exit 0", "thread_model=echo parallel",
    ) as uri:  # fmt: skip
        began = time.monotonic()
        done = restore(night, uri, "--force")
        assert time.monotonic() - began < 8
    assert done.rc == 1
    assert "space" in done.stderr


def test_an_error_in_a_worker_ends_a_zero_request_of_the_main_thread_that_hangs(tmp_path, monkeypatch):
    # Windows of 1 MiB: the main thread is among the second one's zeroes while workers write the first one.
    monkeypatch.setattr(restorer, "_WINDOW", 16)
    night = Night.of(tmp_path, "2M")
    write(night.image, "write -P 7 0 1M")
    night.full()
    hang = f"touch {tmp_path}/zeroing; exec sleep 10"
    fail = f"cat >/dev/null; until [ -e {tmp_path}/zeroing ]; do sleep 0.1; done; echo ENOSPC >&2; exit 1"
    with nbdkit(
        "eval", "get_size=echo 2097152", f"pwrite={fail}", f"zero={hang}", "can_zero=exit 0", "can_write=exit 0",
        "pread=exit 1", "can_multi_conn=exit 0", "thread_model=echo parallel",
    ) as uri:  # fmt: skip
        began = time.monotonic()
        done = restore(night, uri, "--force")
        assert time.monotonic() - began < 5
    assert done.rc == 1
    assert "No space left" in done.stderr


def test_a_server_of_huge_requests_and_no_write_zeroes_gets_its_zeroes_in_small_ones(tmp_path):
    night = Night.of(tmp_path, "96M")
    write(night.image, "write -P 7 1M 200k")
    night.full()
    used = garbage(tmp_path / "used.raw", 96 * MIB)
    policy = ["blocksize-minimum=1", "blocksize-preferred=4096", "blocksize-maximum=4294967295"]
    with nbdkit("--filter=nozero", "--filter=blocksize-policy", "file", str(used), *policy) as uri:
        done = restore(night, uri, "--force")
        assert done.rc == 0, done.stderr
    require_identical(raw_copy(night.image, tmp_path / "source.raw"), used)


def test_a_target_that_nobody_serves_is_a_failure_and_not_the_sources(night, tmp_path):
    done = restore(night, f"nbd+unix:///?socket={tmp_path}/none", "--force")
    assert done.rc == 1
    assert "nbdinfo" in done.stderr
