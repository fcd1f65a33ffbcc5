"""
Restore over what is there (trap 63): nothing that a QEMU has open is replaced or overwritten, and a file that is
replaced keeps its owner, mode, ACL and attributes.

QEMU's programs are the other side: a storage daemon that has an image open as a running machine has it, and qemu-io.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import MIB, Night, call_pybackup, make_image, raw_copy, require_identical, run, write
from servers import running

from backup.engine import block_devices, replaced_file, restorer, targets
from backup.errors import Failed


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A repository with one full; `source.raw` beside it is the disk.  No test changes it."""
    folder = tmp_path_factory.mktemp("night")
    found = Night.of(folder)
    found.full()
    raw_copy(found.image, folder / "source.raw")
    return found


def restored(night, target, *options):
    return call_pybackup(["restore", "disk/latest", target, "--force", "--repo", night.repository, *options])


def format_of(path):
    return "qcow2" if path.read_bytes()[:4] == b"QFI\xfb" else "raw"


@pytest.fixture(params=["qcow2", "raw"])
def image(request, tmp_path):
    """An image with a pattern in it."""
    path = make_image(tmp_path / f"vm.{request.param}", "4M", image_format=request.param)
    write(path, "write -P 9 0 1M", image_format=request.param)
    return path


def name_of(image, way):
    """The image by another name."""
    other = image.with_name(f"other.{format_of(image)}")
    if way == "link":
        other.symlink_to(image)
    elif way == "hard link":
        os.link(image, other)
    return other if way else image


@pytest.mark.parametrize("way", ["", "link", "hard link"])
@pytest.mark.parametrize("writable", [True, False], ids=["writes", "only-reads"])
def test_an_image_that_a_qemu_has_open_is_refused_also_with_force(night, image, way, writable):
    target = name_of(image, way)
    before, inode = image.read_bytes(), image.stat().st_ino
    with running(image, format_of(image), writable=writable):
        done = restored(night, target, "--format", format_of(image))
    assert (done.rc, "is in use by another program" in done.stderr) == (1, True), done
    assert "--force does not override this" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert (image.read_bytes(), image.stat().st_ino) == (before, inode)
    assert not list(image.parent.glob(".*"))
    done = restored(night, target, "--format", format_of(image))
    assert done.rc == 0, done.stderr


@pytest.fixture
def device(tmp_path):
    """A loop device of 4 MiB."""
    file = tmp_path / "device.raw"
    file.write_bytes(bytes(4 * MIB))
    done = subprocess.run(["losetup", "-f", "--show", file], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    yield Path(done.stdout.strip())
    run("losetup", "-d", done.stdout.strip())


@contextmanager
def own_node(device: Path, folder: Path) -> Iterator[Path]:
    """Another node of the device, as libvirt makes them for its machines; QEMU's locks are not seen through it."""
    node = folder / "node"
    run("mknod", node, "b", str(os.major(device.stat().st_rdev)), str(os.minor(device.stat().st_rdev)))
    yield node
    node.unlink()


def test_a_block_device_that_a_qemu_has_open_is_refused(night, device, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(device)
    with own_node(device, tmp_path) as node:
        for opened, target in ((device, device), (device, link), (node, device)):
            own = tmp_path / "machine"
            own.symlink_to(opened)
            with running(own, "raw", file_driver="host_device"):
                done = restored(night, target)
            own.unlink()
            assert done.rc == 1, done
            assert "in use by another" in done.stderr or "open for writing in qemu-storage-da" in done.stderr
    assert (tmp_path / "device.raw").read_bytes() == bytes(4 * MIB)
    assert restored(night, device).rc == 0
    require_identical(night.image.with_name("source.raw"), tmp_path / "device.raw")


def test_writers_of_a_device_are_found_and_readers_are_not(device):
    number = device.stat().st_rdev
    code = "import os, sys; fd = os.open(sys.argv[1], int(sys.argv[2])); print('open', flush=True); sys.stdin.read()"
    for flags, count in ((os.O_RDWR, 1), (os.O_RDONLY, 0)):
        with subprocess.Popen(
            ["python3", "-c", code, device, str(flags)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == b"open\n"
            found = block_devices.writers(number)
            process.stdin.close()
        assert len(found) == count, found
        assert all(f"({process.pid})" in name for name in found)


def refused_writing(image):
    command = ["qemu-io", "-f", format_of(image), "-c", "write -q -P 2 0 4k", image]
    return "lock" in subprocess.run(command, check=False, capture_output=True, text=True).stderr


def test_no_qemu_can_open_the_image_while_it_is_replaced(night, image, monkeypatch):
    real, seen = restorer.RestoreRun._do, []

    def looking(self, job, hand):
        seen.append(refused_writing(image))
        return real(self, job, hand)

    monkeypatch.setattr(restorer.RestoreRun, "_do", looking)
    assert restored(night, image, "--format", format_of(image)).rc == 0
    assert seen
    assert all(seen)
    assert not refused_writing(image)


def test_a_file_that_came_under_the_name_meanwhile_is_looked_at_before_the_rename(tmp_path):
    image = make_image(tmp_path / "vm.raw", "1M", image_format="raw")
    other = make_image(tmp_path / "new.raw", "1M", image_format="raw")
    with running(other, "raw"):
        with (  # noqa: PT012 - the error comes at the block's end
            pytest.raises(Failed, match="in use by another program"),
            targets.open_target(str(image), 10, "raw", cluster_size=4096, force=True) as target,
        ):
            target.write(0, b"x" * 10)
            os.rename(other, image)
        assert image.stat().st_size == MIB
    assert os.listdir(tmp_path) == ["vm.raw"]


def test_the_former_that_counts_is_the_one_at_the_end(tmp_path):
    image, other = tmp_path / "vm.raw", tmp_path / "new.raw"
    image.write_text("x")
    other.write_text("y")
    other.chmod(0o640)
    with targets.open_target(str(image), 10, "raw", cluster_size=4096, force=True) as target:
        target.write(0, b"x" * 10)
        os.rename(other, image)
    assert image.stat().st_mode & 0o777 == 0o640
    assert image.read_bytes() == b"x" * 10


@pytest.fixture
def used(tmp_path):
    path = tmp_path / "used.raw"
    path.write_text("x")
    return path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("mode", [0o660, 0o400])
def test_a_file_that_is_replaced_keeps_its_owner_and_mode(night, used, mode):
    os.chown(used, 65534, 12)
    used.chmod(mode)
    assert restored(night, used).rc == 0
    status = used.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (65534, 12, mode)


def test_attributes_and_acl_are_kept_and_none_is_added(night, used, tmp_path):
    acl = bytes.fromhex("02000000 01000600ffffffff 02000600d2040000 04000400ffffffff 10000600ffffffff 20000000ffffffff")
    folder_acl = acl.replace(bytes.fromhex("d2040000"), bytes.fromhex("e8030000"))
    try:
        os.setxattr(used, "user.purpose", b"database")
        os.setxattr(used, "system.posix_acl_access", acl)
        os.setxattr(tmp_path, "system.posix_acl_default", folder_acl)
    except OSError as error:
        pytest.skip(f"no extended attributes here: {error}")
    plain = tmp_path / "plain.raw"
    plain.write_text("x")
    os.removexattr(plain, "system.posix_acl_access")
    mode = used.stat().st_mode
    for target in (used, plain):
        assert restored(night, target).rc == 0
    assert os.getxattr(used, "system.posix_acl_access") == acl
    assert os.getxattr(used, "user.purpose") == b"database"
    assert used.stat().st_mode == mode
    assert "system.posix_acl_access" not in os.listxattr(plain)


def test_an_owner_that_cannot_be_kept_is_told_before_a_byte_is_written(tmp_path, used, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", refuse)
    with (
        pytest.raises(Failed, match="cannot keep the former's owner"),
        targets.open_target(str(used), 10, "raw", cluster_size=4096, force=True),
    ):
        pytest.fail("the target was opened")
    assert used.read_text() == "x"
    assert os.listdir(tmp_path) == ["used.raw"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_file_that_this_user_may_not_look_at_is_refused(tmp_path, used):
    used.chmod(0)
    tmp_path.chmod(0o777)
    os.seteuid(65534)
    try:
        with pytest.raises(Failed, match="cannot be opened to see"), replaced_file.ReplacedFile(used) as found:
            found.claim()
    finally:
        os.seteuid(0)


def test_a_hard_link_of_a_data_file_loses_only_its_name(night, tmp_path):
    [data] = night.repository.glob("disk/*.qcow2")
    before = data.read_bytes()
    link = tmp_path / "link.raw"
    os.link(data, link)
    assert restored(night, link).rc == 0
    assert data.read_bytes() == before
    require_identical(night.image.with_name("source.raw"), link)
