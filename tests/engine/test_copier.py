"""The copier: every cluster once, in bounded memory; whatever fails or interrupts stops all threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from fakes import Disk, ModelSource
from hypothesis import given, settings
from hypothesis import strategies as st

from backup.engine import copier
from backup.engine.copy_settings import CopySettings
from backup.errors import Interrupted, SourceError
from backup.model.extents import Offsets
from backup.planning.plan import plan_full

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 4 * KIB
NO_LIMIT = 32 * MIB


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


class FakeLane:
    """A connection to a disk in memory.  Reads finish in any order, or never; the read number `fail_at` fails."""

    def __init__(self, content: bytes, *, fail_at: int | None = None, hangs: bool = False, seed: int = 0) -> None:
        self.content = content
        self.fail_at = fail_at
        self.hangs = hangs
        self.random = random.Random(seed)
        self.pending: list[tuple[int, memoryview, object]] = []
        self.lengths: list[int] = []
        self.buffers: set[int] = set()
        self.deepest = 0
        self.submitted = threading.Event()

    @property
    def in_flight(self) -> int:
        return len(self.pending)

    def submit(self, offset: int, view: memoryview, token: object) -> None:
        assert offset + len(view) <= len(self.content), "a read beyond the end of the disk"
        self.pending.append((offset, view, token))
        self.lengths.append(len(view))
        self.buffers.add(id(view.obj))
        self.deepest = max(self.deepest, len(self.pending))
        self.submitted.set()

    def wait(self, milliseconds: int, enough: int) -> list[object]:
        assert 1 <= enough <= len(self.pending), "waits for more answers than it asked for"
        if self.hangs:
            threading.Event().wait(milliseconds / 1000)
            return []
        self.random.shuffle(self.pending)
        count = self.random.randint(1, len(self.pending))  # fewer than enough: the time may be over
        done, self.pending = self.pending[:count], self.pending[count:]
        for offset, view, _ in done:
            if self.fail_at is not None:
                self.fail_at -= 1
                if self.fail_at < 0:
                    raise SourceError("the source fails", hint="-")
            view[:] = self.content[offset : offset + len(view)]
        return [token for _, _, token in done]


class MemorySink:
    """Holds clusters; each may come once, and none below what was said to be complete."""

    def __init__(self, *, fail_at: int | None = None, fail_zero: bool = False) -> None:
        self.clusters: dict[int, bytes | None] = {}
        self.fail_at = fail_at
        self.fail_zero = fail_zero
        self.complete = 0
        self.lock = threading.Lock()

    batch = 16 * CLUSTER

    def write(self, clusters: Offsets, data: memoryview) -> int:
        assert len(data) == len(clusters) * CLUSTER
        assert (np.diff(clusters) > 0).all()
        with self.lock:
            zeroes = 0
            for at in range(0, len(data), CLUSTER):
                if self.fail_at is not None:
                    self.fail_at -= 1
                    if self.fail_at < 0:
                        raise OSError("the sink fails")
                content = bytes(data[at : at + CLUSTER])
                self._put(int(clusters[at // CLUSTER]), content)
                zeroes += not any(content)
            return zeroes

    def zero(self, first_cluster: int, count: int) -> None:
        if self.fail_zero:
            raise OSError("the sink fails")
        with self.lock:
            for cluster in range(first_cluster, first_cluster + count):
                self._put(cluster, None)

    def _put(self, cluster: int, content: bytes | None) -> None:
        assert cluster not in self.clusters, f"cluster {cluster} came twice"
        assert cluster >= self.complete, f"cluster {cluster} came after it was said to be complete"
        self.clusters[cluster] = content

    def completed_below(self, cluster: int) -> None:
        with self.lock:
            assert set(range(self.complete, cluster)) <= self.clusters.keys(), "said to be complete, and is not"
            self.complete = max(self.complete, cluster)

    def content(self) -> bytes:
        assert sorted(self.clusters) == list(range(len(self.clusters)))
        return b"".join(self.clusters[at] or bytes(CLUSTER) for at in range(len(self.clusters)))


def content_of(size: int, seed: int = 0) -> bytes:
    """Clusters of data and of zeroes in short runs, a partial last one."""
    rng = np.random.default_rng(seed)
    runs = np.repeat(rng.integers(0, 2, size // CLUSTER + 2), rng.integers(1, 9, size // CLUSTER + 2))
    values = rng.integers(1, 256, size, dtype=np.uint8)
    return (values * np.repeat(runs, CLUSTER)[:size].astype(np.uint8)).tobytes()


def plan_of(content: bytes, *, blind: bool = False):
    """A full's plan; a blind one knows of no zeroes."""
    array = np.frombuffer(content, dtype=np.uint8)
    zero = np.zeros(len(content), dtype=np.int64) if blind else np.where(array == 0, 3, 0)
    return plan_full(ModelSource(Disk(zero)), CLUSTER)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % CLUSTER)


def ignore(done: int) -> None:
    del done


@settings(max_examples=60)
@given(
    size=st.integers(1, 200 * CLUSTER),
    lanes=st.integers(1, 4),
    requests=st.integers(1, 5),
    request_size=st.sampled_from([1, CLUSTER, 3 * CLUSTER, 64 * CLUSTER]),
    max_request=st.sampled_from([512, CLUSTER - 512, CLUSTER, 5 * CLUSTER + 512, NO_LIMIT]),
    workers=st.integers(1, 3),
    limit=st.sampled_from([1, 8 * CLUSTER, 64 * MIB]),
    seed=st.integers(0, 99),
)
def test_every_cluster_arrives_once(*, size, lanes, requests, request_size, max_request, workers, limit, seed):
    """Any number of lanes, requests and buffers, answers in any order, and requests smaller than a cluster."""
    content = content_of(size, seed)
    connections = [FakeLane(content, seed=seed + at) for at in range(lanes)]
    sink = MemorySink()
    made = plan_of(content)
    done: list[int] = []
    chosen = CopySettings(lanes, requests, request_size, workers, limit)
    copier.copy(made, connections, sink, chosen, max_request=max_request, progress=done.append)
    assert sink.content() == padded(content)
    assert done[-1] == made.totals.data
    assert done == sorted(done)
    assert sum(sum(lane.lengths) for lane in connections) == made.totals.data
    assert all(length <= max_request for lane in connections for length in lane.lengths)
    assert all(lane.deepest <= requests for lane in connections)


@pytest.mark.parametrize("size", [1, CLUSTER - 1, CLUSTER + 1, 7 * CLUSTER + 13])
def test_the_partial_last_cluster_is_padded_with_zeroes(size):
    """Also when its buffer held something else before: two buffers, each used many times."""
    content = b"\xff" * (40 * CLUSTER) + b"\xee" * size
    sink = MemorySink()
    copier.copy(
        plan_of(content),
        [FakeLane(content)],
        sink,
        CopySettings(1, 2, CLUSTER, 1, 2 * CLUSTER),
        max_request=NO_LIMIT,
        progress=ignore,
    )
    assert sink.content() == padded(content)


def test_zero_clusters_found_while_reading_are_counted():
    content = bytes(3 * CLUSTER) + b"x" * CLUSTER + bytes(100)
    found = copier.copy(
        plan_of(content, blind=True),
        [FakeLane(content)],
        MemorySink(),
        CopySettings(),
        max_request=NO_LIMIT,
        progress=ignore,
    )
    assert found == 4 * CLUSTER


def test_nothing_to_read_still_records_the_zeroes():
    sink, lane = MemorySink(), FakeLane(bytes(9 * CLUSTER))
    copier.copy(plan_of(lane.content), [lane], sink, CopySettings(), max_request=NO_LIMIT, progress=ignore)
    assert sink.clusters == dict.fromkeys(range(9))
    assert not lane.lengths


class Distant(FakeLane):
    """A server whose answers take 5 ms, however many there are: reads faster the more are in flight."""

    def wait(self, milliseconds: int, enough: int) -> list[object]:
        threading.Event().wait(0.005)
        return super().wait(milliseconds, enough)


def test_a_distant_server_is_read_through_all_connections():
    """One at a time would make a distant server many times slower, and nothing else would show it."""
    content = b"x" * (2000 * CLUSTER)
    lanes = [Distant(content, seed=at) for at in range(4)]
    chosen = CopySettings(connections=4, requests=16, request_size=CLUSTER, workers=1)
    copier.copy(plan_of(content), lanes, MemorySink(), chosen, max_request=NO_LIMIT, progress=ignore)
    assert [lane.deepest for lane in lanes] == [16, 16, 16, 16]


def test_a_single_connection_is_kept_busy_while_batches_are_stored():
    """The next batch is under way when one is handed over, as long as a thread is there to go on with it."""

    class Slow(MemorySink):
        def write(self, clusters: Offsets, data: memoryview) -> int:
            busy.append(lane.in_flight)
            threading.Event().wait(0.002)
            return super().write(clusters, data)

    content = b"x" * (1000 * CLUSTER)
    lane, busy = Distant(content), list[int]()
    chosen = CopySettings(connections=1, requests=32, request_size=CLUSTER, workers=3)
    copier.copy(plan_of(content), [lane], Slow(), chosen, max_request=NO_LIMIT, progress=ignore)
    assert lane.deepest > 16  # more than a batch
    assert sum(count > 0 for count in busy) > len(busy) / 2


def test_nothing_is_in_flight_that_no_thread_takes():
    """QEMU, which may have to stop its guest, waits for its answers to be taken, however long storing takes."""

    class Watched(Distant):
        taken = 0.0

        def submit(self, offset: int, view: memoryview, token: object) -> None:
            self.taken = self.taken if self.pending else time.monotonic()
            super().submit(offset, view, token)

        def wait(self, milliseconds: int, enough: int) -> list[object]:
            unseen.append(time.monotonic() - self.taken)
            done = super().wait(milliseconds, enough)
            self.taken = time.monotonic()
            return done

    class Slow(MemorySink):
        def write(self, clusters: Offsets, data: memoryview) -> int:
            threading.Event().wait(0.6)
            return super().write(clusters, data)

    content, unseen = b"x" * (128 * CLUSTER), list[float]()
    chosen = CopySettings(connections=2, requests=32, request_size=CLUSTER, workers=2)
    lanes = [Watched(content) for _ in range(2)]
    copier.copy(plan_of(content), lanes, Slow(), chosen, max_request=NO_LIMIT, progress=ignore)
    assert max(unseen) < 0.5


def test_a_copy_with_a_limit_leaves_no_answer_unread():
    """QEMU, which may have to stop its guest, waits for its answers to be taken."""

    class Punctual(FakeLane):
        oldest = 0.0
        asked = 0.0

        def submit(self, offset: int, view: memoryview, token: object) -> None:
            self.asked = self.asked if self.pending else time.monotonic()
            super().submit(offset, view, token)

        def wait(self, milliseconds: int, enough: int) -> list[object]:
            done = super().wait(milliseconds, enough)
            while self.pending:
                done += super().wait(milliseconds, 1)
            self.oldest = max(self.oldest, time.monotonic() - self.asked)
            return done

    content = b"x" * (16 * CLUSTER)
    lane = Punctual(content)
    chosen = CopySettings(1, 8, CLUSTER, 1, limit=20 * CLUSTER)
    copier.copy(plan_of(content), [lane], MemorySink(), chosen, max_request=NO_LIMIT, progress=ignore)
    assert lane.oldest < 0.2


def test_a_copy_with_a_limit_takes_its_time_and_is_whole():
    content = b"x" * (64 * CLUSTER)
    lanes = [FakeLane(content) for _ in range(2)]
    sink = MemorySink()
    chosen = CopySettings(2, 4, CLUSTER, 2, limit=2 * len(content))
    began = time.monotonic()
    copier.copy(plan_of(content), lanes, sink, chosen, max_request=NO_LIMIT, progress=ignore)
    assert time.monotonic() - began >= 0.5 * 63 / 64
    assert sink.content() == content


def test_a_copy_that_waits_for_its_pace_stops_at_once():
    content = b"x" * (64 * CLUSTER)
    began = time.monotonic()

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copier.copy(
            plan_of(content),
            [FakeLane(content)],
            MemorySink(),
            CopySettings(1, 4, CLUSTER, 1, limit=CLUSTER // 60),
            max_request=NO_LIMIT,
            progress=interrupt,
        )
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("limit", "most"), [(8 * CLUSTER, 8), (1, 1), (1 << 40, 4 + 2 * 5)])
def test_memory_is_bounded_by_the_buffers(limit, most):
    content = b"x" * (500 * CLUSTER)
    lanes = [FakeLane(content, seed=at) for at in range(2)]
    chosen = CopySettings(2, 5, CLUSTER, 3, limit)
    assert chosen.buffers(2, CLUSTER) == most
    copier.copy(plan_of(content), lanes, MemorySink(), chosen, max_request=NO_LIMIT, progress=ignore)
    assert len(lanes[0].buffers | lanes[1].buffers) <= most


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (1 << 30, 4 * MIB),  # much to do: what the sink takes best
        (16 * MIB, 2 * MIB),  # less: each of two workers gets four
        (MIB, 512 * KIB),  # little: one read
    ],
)
def test_a_batch_is_large_only_where_all_workers_get_some(data, expected):
    assert CopySettings(workers=2).batch(data, CLUSTER, 4 * MIB) == expected


def test_small_scattered_pieces_share_a_buffer():
    """A hand-over between threads for each 4 KiB would cost more than reading them."""
    content = (b"x" * CLUSTER + bytes(CLUSTER)) * 64
    lane, sink = FakeLane(content), MemorySink()
    writes: list[int] = []
    inner = sink.completed_below
    sink.completed_below = lambda cluster: (writes.append(cluster), inner(cluster))[1]
    chosen = CopySettings(1, 4, 16 * CLUSTER, 1)
    copier.copy(plan_of(content), [lane], sink, chosen, max_request=NO_LIMIT, progress=ignore)
    assert sink.content() == content
    assert len(writes) == 4
    assert len(lane.buffers) <= 4 + 2


def test_no_batch_is_left_behind_by_threads_that_find_no_more(monkeypatch):
    """Two batches become whole at once; another thread sees the connection's end before the second is handed over."""

    class Sudden(FakeLane):
        def submit(self, offset: int, view: memoryview, token: object) -> None:
            if not self.pending:
                threading.Event().wait(0.04)  # so that the other is idle, and two batches are asked for at once
            super().submit(offset, view, token)

        def wait(self, milliseconds: int, enough: int) -> list[object]:
            done: list[object] = []
            while self.pending:
                done += super().wait(milliseconds, 1)
            return done

    put = copier._Jobs.put
    monkeypatch.setattr(copier._Jobs, "put", lambda jobs, job: (put(jobs, job), time.sleep(0.01)))
    content = b"x" * (32 * CLUSTER)
    for _ in range(5):
        lane, sink = Sudden(content), MemorySink()
        chosen = CopySettings(connections=1, requests=16, request_size=CLUSTER, workers=1)
        copier.copy(plan_of(content), [lane], sink, chosen, max_request=NO_LIMIT, progress=ignore)
        assert sink.content() == content


@pytest.mark.parametrize("fail_at", [0, 1, 50])
@pytest.mark.parametrize("lanes", [1, 3])
def test_a_read_that_fails_stops_the_copy(lanes, fail_at):
    content = b"x" * (400 * CLUSTER)
    connections = [FakeLane(content, fail_at=fail_at), *(FakeLane(content) for _ in range(lanes - 1))]
    if lanes > 1:
        # The others answer nothing, so that the one that fails must be noticed beside them.
        for lane in connections[1:]:
            lane.hangs = True
    chosen = CopySettings(lanes, 4, CLUSTER, 2)
    with pytest.raises(SourceError, match="the source fails"):
        copier.copy(plan_of(content), connections, MemorySink(), chosen, max_request=NO_LIMIT, progress=ignore)


@pytest.mark.parametrize("fail_at", [0, 100])
def test_a_write_that_fails_stops_the_copy(fail_at):
    content = b"x" * (400 * CLUSTER)
    lanes = [FakeLane(content), FakeLane(content)]
    with pytest.raises(OSError, match="the sink fails"):
        copier.copy(
            plan_of(content),
            lanes,
            MemorySink(fail_at=fail_at),
            CopySettings(2, 4, CLUSTER, 2),
            max_request=NO_LIMIT,
            progress=ignore,
        )
    assert sum(len(lane.lengths) for lane in lanes) < 400


def test_a_zero_that_cannot_be_recorded_stops_the_copy():
    content = b"x" * CLUSTER + bytes(CLUSTER) + b"x" * CLUSTER
    with pytest.raises(OSError, match="the sink fails"):
        copier.copy(
            plan_of(content),
            [FakeLane(content), FakeLane(content)],
            MemorySink(fail_zero=True),
            CopySettings(2, 4, CLUSTER, 2),
            max_request=NO_LIMIT,
            progress=ignore,
        )


def test_the_first_error_is_the_one_that_is_raised():
    """The second comes while the copy is being stopped, and would lead astray."""
    content = b"x" * (64 * CLUSTER)
    failed = threading.Event()

    class First(FakeLane):
        waits = 0

        def wait(self, milliseconds: int, enough: int) -> list[object]:
            self.waits += 1
            if self.waits < 20:
                return super().wait(milliseconds, enough)
            failed.set()
            raise SourceError("first", hint="-")

    class Second(MemorySink):
        def write(self, clusters: Offsets, data: memoryview) -> int:
            failed.wait(5)
            threading.Event().wait(0.05)
            raise SourceError("second", hint="-")

    with pytest.raises(SourceError, match="first"):
        copier.copy(
            plan_of(content),
            [First(content)],
            Second(),
            CopySettings(1, 1, CLUSTER, 1),
            max_request=NO_LIMIT,
            progress=ignore,
        )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted(15), BrokenPipeError()])
def test_an_interrupt_in_the_calling_thread_stops_a_copy_whose_source_hangs(error):
    """Signals arrive in the main thread, which waits in ticks and draws the progress."""
    content = b"x" * (64 * CLUSTER)
    lanes = [FakeLane(content, hangs=True) for _ in range(3)]

    def interrupt(done: int) -> None:
        assert done == 0
        if lanes[0].submitted.is_set():
            raise error

    with pytest.raises(type(error)):
        copier.copy(
            plan_of(content),
            lanes,
            MemorySink(),
            CopySettings(3, 4, CLUSTER, 2),
            max_request=NO_LIMIT,
            progress=interrupt,
        )


def test_a_sink_slower_than_the_source_stops_too():
    """Workers in the middle of a write, lanes without a free buffer."""
    content = b"x" * (400 * CLUSTER)
    entered = threading.Event()

    class Slow(MemorySink):
        def write(self, clusters: Offsets, data: memoryview) -> int:
            entered.set()
            threading.Event().wait(0.02)
            return super().write(clusters, data)

    def interrupt(done: int) -> None:
        if entered.is_set():
            raise KeyboardInterrupt

    sink = Slow()
    with pytest.raises(KeyboardInterrupt):
        copier.copy(
            plan_of(content),
            [FakeLane(content)],
            sink,
            CopySettings(1, 4, CLUSTER, 1, 4 * CLUSTER),
            max_request=NO_LIMIT,
            progress=interrupt,
        )
    assert len(sink.clusters) < 400


def test_threads_that_wait_when_an_error_comes_all_end():
    """
    Several threads wait for work with one lane's failure under way.

    With a timeout in their wait, one in some hundred copies never ended (CPython's SimpleQueue.get).
    """
    content = b"x" * (64 * CLUSTER)
    chosen = CopySettings(connections=1, requests=16, request_size=CLUSTER, workers=7)
    for seed in range(30):
        lanes = [FakeLane(content, fail_at=seed, seed=seed)]
        with pytest.raises(SourceError, match="the source fails"):
            copier.copy(plan_of(content), lanes, MemorySink(), chosen, max_request=NO_LIMIT, progress=ignore)


@given(
    start=st.integers(0, 1 << 20),
    length=st.integers(1, 1 << 20),
    shift=st.integers(0, 16),
    blocks=st.integers(1, 8),
)
def test_no_request_exceeds_the_limit_when_it_is_rounded_out(start, length, shift, blocks):
    smallest = 1 << shift
    limit = smallest * blocks
    found = list(copier._cut(start, start + length, limit, smallest))
    assert [low for low, _ in found] == [start, *(high for _, high in found[:-1])]
    assert found[-1][1] == start + length
    for low, high in found:
        assert low < high
        assert -(-high // smallest) * smallest - low // smallest * smallest <= limit


def test_a_copy_that_stored_less_than_was_planned_is_no_copy():
    content = content_of(40 * CLUSTER)
    plan = plan_of(content)
    claimed = replace(plan, totals=replace(plan.totals, data=plan.totals.data + CLUSTER))
    with pytest.raises(RuntimeError, match=f"{plan.totals.data} bytes were stored of {claimed.totals.data}"):
        copier.copy(
            claimed, [FakeLane(content)], MemorySink(), CopySettings(), max_request=NO_LIMIT, progress=lambda _: None
        )
