"""Reading once: the right bytes, whatever the kernel and the file system can do, and nothing left in the page cache."""

import errno
import os
import threading

import pytest
from lab import MIB, Night, call_pybackup, run, write

from backup.runtime import direct_io
from backup.runtime.direct_io import ReadOnce

CAN = "the kernel (6.14) and the file system can read past the page cache"


@pytest.fixture
def noise(tmp_path):
    path = tmp_path / "noise"
    path.write_bytes(os.urandom(3 * MIB + 5))
    return path


@pytest.fixture
def fd(noise):
    fd = os.open(noise, os.O_RDONLY)
    yield fd
    os.close(fd)


def cached(path):
    """Bytes of a file that are in the page cache, as util-linux' fincore counts them."""
    return int(run("fincore", "--bytes", "--noheadings", "--output", "RES", path))


def forget(path):
    """Have the kernel drop a file from its page cache."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path):
        pytest.skip("a file system that lives in the page cache")


def require_past_the_cache(path):
    with open(path, "rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, direct_io._DONTCACHE)
        except OSError as error:
            pytest.skip(f"not here: {CAN} ({error.strerror})")


def test_the_bytes_are_the_files_and_fewer_where_it_ends(fd, noise):
    content = noise.read_bytes()
    reads = ReadOnce(fd, MIB)
    for offset, length in ((0, MIB), (7, 11), (3 * MIB, MIB), (len(content), 5)):
        assert reads.read(offset, length) == content[offset : offset + length]


def test_each_thread_has_memory_of_its_own(fd, noise):
    content = noise.read_bytes()
    reads = ReadOnce(fd, MIB)
    mine = reads.read(0, MIB)
    other = threading.Thread(target=reads.read, args=(MIB, MIB))
    other.start()
    other.join()
    assert mine == content[:MIB]
    reads.read(MIB, MIB)
    assert mine == content[MIB : 2 * MIB]  # as it says: the same thread's next read


def test_a_kernel_that_does_not_know_the_flag_is_asked_once(fd, noise, monkeypatch):
    asked = []
    real = os.preadv

    def old(fd, buffers, offset, flags=0):
        asked.append(flags)
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", old)
    reads = ReadOnce(fd, MIB)
    for _ in range(3):
        assert reads.read(0, MIB) == noise.read_bytes()[:MIB]
    assert asked == [direct_io._DONTCACHE, 0, 0, 0]


def test_a_failing_disk_is_an_error(fd, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match="Input/output error"):
        ReadOnce(fd, MIB).read(0, MIB)


def test_verify_and_copy_leave_nothing_in_the_page_cache_that_was_not_there(tmp_path):
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    (tmp_path / "noise").write_bytes(os.urandom(32 * MIB))
    write(image, f"write -s {tmp_path / 'noise'} 0 32M")
    night = Night(image, tmp_path / "repository")
    assert call_pybackup(["full", "--image", image, "--repo", night.repository]).rc == 0
    (data,) = (night.repository / "disk").glob("*.qcow2")
    require_past_the_cache(data)
    repo = ["--repo", night.repository]
    for command in (["verify", *repo], ["copy", "disk", tmp_path / "2", *repo]):
        forget(data)
        assert call_pybackup(command).rc == 0
        assert cached(data) <= 8 * MIB  # a block that two threads read at the same moment stays
    data.read_bytes()
    assert call_pybackup(["verify", *repo]).rc == 0
    assert cached(data) > 20 * MIB  # what others use stays, but for what this verify met twice
