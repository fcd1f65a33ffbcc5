"""A raw file written past the page cache and through it: the same bytes, and holes where nothing was written."""

from __future__ import annotations

import errno
import mmap
import os
import random

import pytest
from lab import KIB, MIB

from backup.engine import targets
from backup.errors import Failed

SIZE = 11 * MIB + 12_345


@pytest.fixture
def place(tmp_path):
    """A folder on a file system that has O_DIRECT."""
    (tmp_path / "probe").touch()
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no O_DIRECT here")
    (tmp_path / "probe").unlink()
    return tmp_path


def aligned(content):
    memory = memoryview(mmap.mmap(-1, max(1, len(content))))[: len(content)]
    memory[:] = content
    return memory


def restored(folder, in_memory=aligned):
    """Write some pieces, large and small, one to the odd end; what the file must hold and what it is."""
    expected = bytearray(SIZE)
    pieces = {0: 2 * MIB, 3 * MIB: 64 * KIB, 4 * MIB: MIB + 64 * KIB, 10 * MIB: SIZE - 10 * MIB}
    path = folder / "r.raw"
    with targets.open_target(str(path), SIZE, "raw", cluster_size=64 * KIB, force=False) as target:
        for offset, length in pieces.items():
            content = random.Random(offset).randbytes(length)
            expected[offset : offset + length] = content
            target.write(offset, in_memory(content))
    assert path.read_bytes() == expected
    assert path.stat().st_blocks * 512 < 5 * MIB
    assert os.listdir(folder) == ["r.raw"]


@pytest.fixture
def writes(monkeypatch):
    """(bytes, with O_DIRECT) of each pwrite; `refuse` says which of the direct ones fail."""
    import fcntl

    class Writes(list):
        def refuse(self, length):
            return None

    seen, real = Writes(), os.pwrite

    def watched(fd, data, offset):
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        seen.append((len(data), direct))
        code = seen.refuse(len(data)) if direct else None
        if code is not None:
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    return seen


def test_large_pieces_go_past_the_cache_and_the_odd_end_through_it(place, writes):
    restored(place)
    end = SIZE - 10 * MIB
    assert writes == [
        (2 * MIB, True),
        (64 * KIB, False),
        (MIB + 64 * KIB, True),
        (end // 4096 * 4096, True),
        (end % 4096, False),
    ]


def test_memory_on_no_page_is_written_as_well(place):
    restored(place, in_memory=lambda content: memoryview(b"x" + content)[1:])


def test_a_file_system_without_it_is_written_through_the_cache(tmp_path, monkeypatch, writes):
    real = os.open

    def refusing(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refusing)
    restored(tmp_path)
    assert not any(direct for _, direct in writes)


def test_a_refusal_at_the_first_write_is_the_last_attempt(place, writes):
    writes.refuse = lambda _: errno.EINVAL
    restored(place)
    assert [direct for _, direct in writes] == [True, False, False, False, False]


@pytest.mark.parametrize("taken", [8192, 512])
def test_a_short_direct_write_is_completed(place, monkeypatch, taken):
    real, first = os.pwrite, iter([taken])
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[: next(first, len(data))], offset))
    restored(place)


def test_a_thread_may_give_it_up_while_another_is_half_way(place, monkeypatch):
    with targets.open_target(str(place / "r.raw"), 2 * MIB, "raw", cluster_size=64 * KIB, force=False) as target:
        real = os.pwrite

        def half(fd, data, offset):
            target._output._direct = None
            return real(fd, data[:MIB], offset)

        monkeypatch.setattr(os, "pwrite", half)
        target.write(0, aligned(b"x" * 2 * MIB))
    assert (place / "r.raw").read_bytes() == b"x" * 2 * MIB


def test_a_full_disk_is_told_and_not_tried_again(place, writes):
    writes.refuse = lambda _: errno.ENOSPC
    with pytest.raises(Failed, match="No space left"):
        restored(place)
    assert len(writes) == 1
    assert os.listdir(place) == []
