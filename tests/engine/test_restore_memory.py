"""What a restore and its cache keep: little, on a disk of any size, and never a thread that waits for ever."""

import threading
import time
from itertools import count

import pytest
from forge import point_id, store
from lab import GIB, KIB, MIB, call_pybackup, run
from places import create_repository, folder_of

from backup.engine import restorer
from backup.engine.targets import Qcow2File
from backup.errors import Failed, Interrupted
from backup.qcow2 import Writer
from backup.repository import checked_file
from backup.repository.checked_file import BlockCache

C = 64 * KIB
TABLES = 48
SIZE = TABLES * 512 * MIB


@pytest.fixture
def sparse(tmp_path, monkeypatch):
    """A point of 24 GiB with one cluster in every L2 table, restored in windows of 4 tables."""
    monkeypatch.setattr(restorer, "_WINDOW", 4 * C // 8)
    folder = create_repository(tmp_path / "repo").machine("m")
    with folder.lock():
        store(folder, 1, None, SIZE, {8192 * n + n: bytes([n + 1]) * C for n in range(TABLES)})
    return folder_of(folder) / f"{point_id(1)}.json"


def test_the_tables_of_a_qcow2_leave_memory_window_by_window(sparse, tmp_path, monkeypatch):
    kept, place = [], Writer._place

    def watched(writer, *args):
        jobs = place(writer, *args)
        kept.append(len(writer._live))
        return jobs

    monkeypatch.setattr(Writer, "_place", watched)
    target = tmp_path / "r.qcow2"
    done = call_pybackup(["restore", sparse, target, "--format", "qcow2"])
    assert done.rc == 0, done.stderr
    assert len(kept) == TABLES
    assert max(kept) <= 4
    assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", target)
    data = next(sparse.parent.glob("*.qcow2"))
    assert "Images are identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", data, target)


def test_no_write_is_under_way_or_follows_below_what_is_called_done(sparse, tmp_path, monkeypatch):
    """Slow writers: a promise that came too early would meet them."""
    done_below, under_way, real, promise = [0], set(), Qcow2File.write, Qcow2File.done_below

    def slow(target, offset, data):
        under_way.add(offset)
        time.sleep(0.01)
        assert offset >= done_below[-1]
        real(target, offset, data)
        under_way.discard(offset)

    def checked(target, offset):
        assert not under_way
        done_below.append(offset)
        promise(target, offset)

    monkeypatch.setattr(Qcow2File, "write", slow)
    monkeypatch.setattr(Qcow2File, "done_below", checked)
    done = call_pybackup(["restore", sparse, tmp_path / "r.qcow2", "--format", "qcow2"])
    assert done.rc == 0, done.stderr
    assert done_below == list(range(0, SIZE + 1, 2 * GIB))


def test_a_worker_that_fails_does_not_leave_the_feeder_waiting(sparse, tmp_path, monkeypatch):
    numbers, real = count(), Qcow2File.write

    def failing(target, offset, data):
        if next(numbers) == 6:
            raise Failed("the disk is full", hint="h")
        real(target, offset, data)

    monkeypatch.setattr(Qcow2File, "write", failing)
    began = time.monotonic()
    done = call_pybackup(["restore", sparse, tmp_path / "r.qcow2", "--format", "qcow2"])
    assert done.rc == 1
    assert "the disk is full" in done.stderr
    assert time.monotonic() - began < 20
    assert not list(tmp_path.glob("*r.qcow2*"))


def in_thread(action):
    """Start `action` in a thread; the thread and the list that gets its result."""
    found = []
    thread = threading.Thread(target=lambda: found.append(action()), daemon=True)
    thread.start()
    return thread, found


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(checked_file, "_PATIENCE", 0.2)


def cut_off(cache, monkeypatch, line):
    """Let a thread's get() end by a signal: before it begins to load, or around telling that it is done."""

    class Cut(threading.Event):
        def __init__(self):
            super().__init__()
            if line == "before loading":
                real, cache._loading = cache._loading, _Cutting(cache._loading, cache)
                assert real == {}

        def set(self):
            if line == "before forgetting":
                super().set()
            raise Interrupted(15)

    with monkeypatch.context() as patched:
        patched.setattr(checked_file.threading, "Event", Cut)
        with pytest.raises(Interrupted):
            cache.get((1, 1), lambda: b"cut")


class _Cutting(dict):
    """Takes the first key and is interrupted right after it."""

    def __init__(self, held, cache):
        super().__init__(held)
        self.cache = cache

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.cache._loading = dict(self)
        raise Interrupted(15)


@pytest.mark.parametrize("line", ["before loading", "before telling", "before forgetting"])
@pytest.mark.usefixtures("impatient")
def test_nobody_waits_for_ever_for_a_thread_that_a_signal_ended(monkeypatch, line):
    cache = BlockCache()
    cut_off(cache, monkeypatch, line)
    cache._blocks.clear()  # as if it had been pushed out meanwhile
    assert (1, 1) in cache._loading
    waiters = [in_thread(lambda: cache.get((1, 1), lambda: b"block")) for _ in range(3)]
    for thread, found in waiters:
        thread.join(10)
        assert found == [b"block"]
    assert cache._loading == {}


@pytest.mark.usefixtures("impatient")
def test_who_waits_too_long_loads_it_and_the_slow_one_still_ends():
    cache, go, began = BlockCache(), threading.Event(), threading.Event()

    def slow():
        began.set()
        assert go.wait(20)
        return b"slow"

    thread, found = in_thread(lambda: cache.get((1, 1), slow))
    assert began.wait(10)
    assert cache.get((1, 1), lambda: b"fast") == b"fast"
    go.set()
    thread.join(10)
    assert found == [b"slow"]
    assert cache._loading == {}


def test_several_threads_that_want_a_block_read_it_once():
    cache, loads = BlockCache(), []

    def load():
        loads.append(1)
        time.sleep(0.2)
        return b"block"

    threads = [in_thread(lambda: cache.get((1, 1), load)) for _ in range(8)]
    for thread, found in threads:
        thread.join(10)
        assert found == [b"block"]
    assert len(loads) == 1
