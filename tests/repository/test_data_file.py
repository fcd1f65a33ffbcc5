"""Writing a data file: past the page cache where that is possible, and the same bytes where it is not."""

from __future__ import annotations

import errno
import os
import random
import stat
from pathlib import Path

import pytest
from places import files_at

from backup.errors import Failed
from backup.model import digests
from backup.repository.data_file_writer import PartFile
from backup.runtime import direct_io
from backup.runtime.direct_io import pages

PAGE = 4096


def part(seed: int, length: int = digests.BLOCK) -> memoryview:
    memory = pages(length)
    memory[:] = random.Random(seed).randbytes(length)
    return memory


def write(path: Path, parts: list[memoryview]) -> bytes:
    file = PartFile(files_at(path.parent), path.name)
    for number in reversed(range(len(parts))):
        file.put(number, parts[number])
    return file.finish()


@pytest.fixture
def real_path(tmp_path):
    """On a real file system: tmpfs takes O_DIRECT for a hint."""
    return tmp_path / "a"


@pytest.mark.parametrize("last", [512, PAGE - 1, PAGE, 3 * PAGE + 512, digests.BLOCK])
def test_parts_of_any_length_arrive_as_they_are(real_path, last):
    parts = [part(0), part(1), part(2, last)]
    listed = write(real_path, parts)
    assert real_path.read_bytes() == b"".join(parts)
    assert listed == b"".join(digests.digest(one) for one in parts)
    assert stat.S_IMODE(real_path.stat().st_mode) == 0o600


def test_memory_that_does_not_begin_on_a_page_is_written_all_the_same(real_path):
    memory = part(3, digests.BLOCK + 1)
    write(real_path, [memory[1:]])
    assert real_path.read_bytes() == bytes(memory[1:])


def test_a_file_system_without_direct_writes_gets_plain_ones(real_path, monkeypatch):
    monkeypatch.setattr(direct_io, "_open_direct", lambda path: None)
    parts = [part(0), part(1, PAGE)]
    write(real_path, parts)
    assert real_path.read_bytes() == b"".join(parts)


def test_direct_writes_that_are_refused_are_done_plainly(real_path, monkeypatch):
    """Some file systems open a file so and refuse the write, or take a part of it."""
    inner, refused = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        direct = os.readlink(f"/proc/self/fd/{fd}") == f"{real_path}.part" and fd in direct_fds
        if direct:
            refused.append(offset)
            if len(refused) == 2:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            data = data[:PAGE]
        return inner(fd, data, offset)

    direct_fds = set()
    opened = direct_io._open_direct

    def remember(path: Path) -> int | None:
        fd = opened(path)
        direct_fds.add(fd)
        return fd

    monkeypatch.setattr(direct_io, "_open_direct", remember)
    monkeypatch.setattr(os, "pwrite", pwrite)
    parts = [part(0), part(1), part(2)]
    write(real_path, parts)
    assert len(refused) == 2  # then it is given up
    assert real_path.read_bytes() == b"".join(parts)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_other_errors_of_a_direct_write_are_errors(real_path, monkeypatch, number):
    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(Failed, match=os.strerror(number)):
        write(real_path, [part(0)])


def test_writing_goes_past_the_page_cache(real_path):
    """Where the file system can: a host full of machines keeps its cache for them."""
    try:
        os.close(os.open(real_path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    real_path.unlink()
    file = PartFile(files_at(real_path.parent), real_path.name)
    try:
        assert file._file._output._direct is not None
    finally:
        file.close()
    assert file._file._output._direct is None


def test_a_file_has_its_name_only_when_it_is_complete_and_lasts(tmp_path, monkeypatch):
    path, done = tmp_path / "vda.qcow2", []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append((old, new)), rename(old, new)))
    file = PartFile(files_at(path.parent), path.name)
    file.put(0, part(0))
    file.close()
    assert os.listdir(tmp_path) == ["vda.qcow2.part"]
    (tmp_path / "vda.qcow2.part").unlink()
    write(path, [part(0), part(1)])
    assert done == [f"{path}.part", (Path(f"{path}.part"), path)]
    assert os.listdir(tmp_path) == ["vda.qcow2"]


@pytest.mark.parametrize("taken", ["vda.qcow2", "vda.qcow2.part"])
def test_what_is_there_is_never_overwritten(tmp_path, taken):
    """Two disks whose names differ in case only have one data file, where the file system knows no case."""
    (tmp_path / taken).write_text("mine")
    with pytest.raises(Failed, match="File exists"):
        PartFile(files_at(tmp_path), "vda.qcow2")
    assert (os.listdir(tmp_path), (tmp_path / taken).read_text()) == ([taken], "mine")
