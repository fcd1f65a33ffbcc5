"""
Plans, held against a model of disks byte by byte: the parent's bytes and a plan's regions give the disk, whatever the
manner in which a server tells about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
from fakes import MANNERS, Disk, FakeBinding, Manner, ModelSource
from hypothesis import given, settings
from hypothesis import strategies as st

from backup.errors import SourceError
from backup.nbd import export
from backup.nbd.export import Export
from backup.planning import plan
from backup.planning.plan import DATA, PARENT, ZERO, Plan, plan_audit, plan_full, plan_incremental, plan_of, plan_rescan

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CLUSTER = 4 * KIB
CLEAN_DATA, CLEAN_ZERO, DIRTY_DATA, DIRTY_ZERO = "cd", "cz", "dd", "dz"


@dataclass(frozen=True, slots=True)
class Chain:
    """A parent chain (`plan.ChainData`) with these bytes; it may hold explicit zeroes as data, as a real one may."""

    content: np.ndarray
    cluster_size: int

    def holds_data(self, first: int, count: int) -> np.ndarray:
        found = np.zeros(count, dtype=np.bool_)
        for at in range(count):
            low = (first + at) * self.cluster_size
            found[at] = self.content[low : low + self.cluster_size].any()
        return found


def regions_of(made: Plan) -> list[tuple[int, int, int]]:
    """Start, length and kind of each run of clusters that is stored, cut at windows."""
    runs = (plan.cluster_runs(first, kinds, made.cluster_size, made.size) for first, kinds in made.windows())
    return [region for window in runs for region in window]


def disk_of(*runs: tuple[int, str]) -> Disk:
    """A disk from (length, state) pairs."""
    lengths = [length for length, _ in runs]
    zero = np.repeat([3 if state[1] == "z" else 0 for _, state in runs], lengths)
    dirty = np.repeat([state[0] == "d" for _, state in runs], lengths).astype(np.int64)
    return Disk(zero, {"b": dirty})


def exported(monkeypatch: pytest.MonkeyPatch, disk: Disk, manner: Manner, **server: object) -> Export:
    """The disk as the program sees it through its NBD client, from a fake server of that manner."""
    monkeypatch.setattr(export, "load_binding", lambda: FakeBinding(disk, manner, **server))
    return Export("nbd://fake", ["b"])


def kinds_of(made: Plan) -> dict[int, int]:
    """Kind of each cluster that is not PARENT."""
    found = {}
    for start, length, kind in regions_of(made):
        assert start % made.cluster_size == 0
        assert (start + length) % made.cluster_size == 0 or start + length == made.size
        for cluster in range(start // made.cluster_size, -(-(start + length) // made.cluster_size)):
            assert cluster not in found
            found[cluster] = kind
    return found


def naive_kinds(
    disk: Disk, cluster_size: int, *, grown: int | None = None, held: Chain | None = None, full: bool = False
) -> dict[int, int]:
    """The rules of plan.py, one cluster after the other."""
    found = {}
    for cluster in range(-(-disk.size // cluster_size)):
        low, high = cluster * cluster_size, min((cluster + 1) * cluster_size, disk.size)
        zero = bool((disk.allocation[low:high] & 2).all())
        dirty = full or bool(disk.bitmaps["b"][low:high].any()) or (grown is not None and high > grown)
        if dirty:
            found[cluster] = ZERO if zero else DATA
        elif zero and held is not None and held.holds_data(cluster, 1)[0]:
            found[cluster] = ZERO
    return found


def naive_dirty_from(size: int, parent: int, cluster: int) -> int | None:
    """From which byte on all is dirty: a disk that grew, or was cut where no sector ends."""
    if size > parent:
        return parent // cluster * cluster
    return size // cluster * cluster if size < parent and size % 512 else None


def naive_totals(kinds: dict[int, int], cluster_size: int, size: int) -> tuple[int, int]:
    """Bytes of data and of zeroes, clipped at the disk's end."""
    sums = {DATA: 0, ZERO: 0}
    for cluster, kind in kinds.items():
        sums[kind] += min((cluster + 1) * cluster_size, size) - cluster * cluster_size
    return sums[DATA], sums[ZERO]


def applied(made: Plan, parent: np.ndarray, disk: np.ndarray) -> np.ndarray:
    """What a reader of the parent's bytes and the plan's regions gets."""
    result = np.zeros(made.size, dtype=np.uint8)
    common = min(len(parent), made.size)
    result[:common] = parent[:common]
    for start, length, kind in regions_of(made):
        result[start : start + length] = disk[start : start + length] if kind == DATA else 0
    return result


CASES = {
    "dirty data": [(CLUSTER, CLEAN_DATA), (CLUSTER, DIRTY_DATA), (CLUSTER, CLEAN_DATA)],
    "dirty zero is a zero and no omission": [(CLUSTER, CLEAN_DATA), (2 * CLUSTER, DIRTY_ZERO), (CLUSTER, CLEAN_DATA)],
    "a partly dirty cluster": [(CLUSTER - 512, CLEAN_DATA), (513, DIRTY_DATA), (CLUSTER - 1, CLEAN_DATA)],
    "a partly zero cluster is read": [(CLUSTER, DIRTY_DATA), (CLUSTER - 1, DIRTY_ZERO), (1, DIRTY_DATA)],
    "zero dirty and zero clean in one cluster": [(2048, DIRTY_ZERO), (2048, CLEAN_ZERO), (CLUSTER, CLEAN_DATA)],
    "zero dirty beside clean data in one cluster": [(2048, DIRTY_ZERO), (2048, CLEAN_DATA), (CLUSTER, CLEAN_ZERO)],
    "one byte": [(5 * CLUSTER, CLEAN_DATA), (1, DIRTY_DATA), (5 * CLUSTER, CLEAN_ZERO)],
    "a dirty partial last cluster": [(3 * CLUSTER, CLEAN_DATA), (100, DIRTY_DATA)],
    "a zero partial last cluster": [(3 * CLUSTER, CLEAN_DATA), (100, DIRTY_ZERO)],
    "a zero partial last cluster within a run": [(CLUSTER, CLEAN_DATA), (2 * CLUSTER + 100, DIRTY_ZERO)],
    "less than a cluster": [(700, DIRTY_ZERO)],
    "all clean": [(4 * CLUSTER, CLEAN_DATA)],
    "all dirty": [(4 * CLUSTER + 1, DIRTY_DATA)],
    "many small ones": [(512, (CLEAN_DATA, DIRTY_DATA, CLEAN_ZERO, DIRTY_ZERO)[i * 7 % 4]) for i in range(64)],
}


@pytest.mark.parametrize("manner", MANNERS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_an_incremental_is_right_however_the_server_answers(monkeypatch, case, manner):
    disk = disk_of(*CASES[case])
    with exported(monkeypatch, disk, manner) as source:
        made = plan_incremental(source, CLUSTER, "b", parent_size=disk.size, chain=None)
    expected = naive_kinds(disk, CLUSTER)
    assert kinds_of(made) == expected
    assert (made.totals.data, made.totals.zero) == naive_totals(expected, CLUSTER, disk.size)
    assert made.totals.dirty == int(disk.bitmaps["b"].sum())


@pytest.mark.parametrize("manner", MANNERS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_full_is_right_however_the_server_answers(monkeypatch, case, manner):
    disk = disk_of(*CASES[case])
    with exported(monkeypatch, disk, manner) as source:
        made = plan_full(source, CLUSTER)
    expected = naive_kinds(disk, CLUSTER, full=True)
    assert kinds_of(made) == expected
    assert (made.totals.data, made.totals.zero) == naive_totals(expected, CLUSTER, disk.size)
    assert made.totals.dirty == disk.size


@pytest.mark.parametrize("manner", [MANNERS[0], MANNERS[-1]], ids=str)
@pytest.mark.parametrize("multi_conn", [False, True])
def test_a_clean_zero_over_data_of_the_chain_is_recorded(monkeypatch, manner, multi_conn):
    """Trap 4; over a hole of the chain, or partly over one, nothing need be."""
    disk = disk_of((2 * CLUSTER, CLEAN_ZERO), (CLUSTER, CLEAN_DATA), (CLUSTER, CLEAN_ZERO), (99, CLEAN_ZERO))
    parent = np.zeros(disk.size, dtype=np.uint8)
    parent[CLUSTER + 17] = 1
    parent[-1] = 1
    with exported(monkeypatch, disk, manner, multi_conn=multi_conn) as source:
        made = plan_incremental(source, CLUSTER, "b", parent_size=disk.size, chain=Chain(parent, CLUSTER))
    assert kinds_of(made) == {1: ZERO, 4: ZERO}
    assert made.totals.zero == made.totals.missed == CLUSTER + 99


@pytest.mark.parametrize("flags", [0, 1])
def test_a_hole_that_is_not_zero_is_read(flags):
    """Trap 2: its content is undefined by the protocol."""
    source = ModelSource(Disk(np.full(3 * CLUSTER, flags), {"b": np.ones(3 * CLUSTER, dtype=np.int64)}))
    assert kinds_of(plan_full(source, CLUSTER)) == {0: DATA, 1: DATA, 2: DATA}
    made = plan_incremental(source, CLUSTER, "b", parent_size=source.size, chain=None)
    assert kinds_of(made) == {0: DATA, 1: DATA, 2: DATA}


def test_zero_without_hole_is_zero():
    source = ModelSource(Disk(np.full(2 * CLUSTER, 2), {"b": np.ones(2 * CLUSTER, dtype=np.int64)}))
    assert kinds_of(plan_full(source, CLUSTER)) == {0: ZERO, 1: ZERO}


@pytest.mark.parametrize("old", [1, CLUSTER - 1, CLUSTER, CLUSTER + 1, 3 * CLUSTER - 512, 4 * CLUSTER - 1])
def test_everything_from_the_old_end_rounded_down_is_dirty_after_growth(old):
    """Trap 28: the bitmap calls the grown part clean, whatever lies there."""
    disk = disk_of((4 * CLUSTER, CLEAN_DATA))
    made = plan_incremental(ModelSource(disk), CLUSTER, "b", parent_size=old, chain=None)
    assert kinds_of(made) == dict.fromkeys(range(old // CLUSTER, 4), DATA)
    assert made.totals.dirty == 4 * CLUSTER - old // CLUSTER * CLUSTER


@pytest.mark.parametrize("old", [4 * CLUSTER, 4 * CLUSTER + 1, 9 * CLUSTER])
def test_a_disk_that_shrank_or_stayed_has_nothing_dirty_at_its_end(old):
    disk = disk_of((4 * CLUSTER, CLEAN_DATA))
    assert not kinds_of(plan_incremental(ModelSource(disk), CLUSTER, "b", parent_size=old, chain=None))


def test_the_cluster_in_which_a_disk_was_cut_is_read_unless_a_qcow2_file_can_end_there():
    for size, expected in ((3 * CLUSTER - 700, {2: DATA}), (3 * CLUSTER - 512, {}), (3 * CLUSTER, {})):
        source = ModelSource(disk_of((size, CLEAN_DATA)))
        assert kinds_of(plan_incremental(source, CLUSTER, "b", parent_size=4 * CLUSTER, chain=None)) == expected
    zero = ModelSource(disk_of((CLUSTER, CLEAN_DATA), (700, CLEAN_ZERO)))
    assert kinds_of(plan_incremental(zero, CLUSTER, "b", parent_size=4 * CLUSTER, chain=None)) == {1: ZERO}


@st.composite
def _changes(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray, Disk, bool]:
    """Cluster size, the parent's bytes, the disk's now, what a server says of it, and whether zeroes were missed."""
    cluster = draw(st.sampled_from([4 * KIB, 16 * KIB, 64 * KIB]))
    sizes = st.integers(1, 6 * cluster)
    old, new = draw(sizes), draw(sizes)
    if draw(st.booleans()):
        new = old
    granularity = draw(st.sampled_from([512, 4 * KIB, 64 * KIB, 2 * MIB]))
    places = st.tuples(st.integers(0, 6 * cluster), st.integers(1, 2 * cluster), st.integers(0, 3))
    parent = np.zeros(old, dtype=np.uint8)
    for start, length, value in draw(st.lists(places, max_size=6)):
        parent[start : start + length] = value
    now = np.full(new, draw(st.integers(0, 1)), dtype=np.uint8)  # 1: stale bytes in the grown part
    common = min(old, new)
    now[:common] = parent[:common]
    dirty = np.zeros(new, dtype=np.int64)
    for start, length, value in draw(st.lists(places, max_size=6)):
        if start < new:
            end = min(start + length, new)
            now[start:end] = value
            dirty[start // granularity * granularity : -(-end // granularity) * granularity] = 1
    missed = draw(st.booleans())
    if missed:
        first = draw(st.integers(0, 5)) * cluster
        now[first : first + cluster] = 0
    # A server may call zeroes data, data a hole, and zeroes a hole or not; never data zero.
    zeroes, data = draw(st.sampled_from([0, 2, 3])), draw(st.sampled_from([0, 1]))
    if missed:
        zeroes = 3
    allocation = np.where(now == 0, zeroes, data).astype(np.int64)
    for start, length, _ in draw(st.lists(places, max_size=2)):
        region = allocation[start : start + length]
        if not missed:
            region[region == 3] = 2
            region[region == 0] = 1
    return cluster, parent, now, Disk(allocation, {"b": dirty}), missed


@settings(max_examples=150)
@given(_changes(), st.sampled_from([1, 3, 100]), st.booleans())
def test_the_parent_and_a_plan_give_the_disk(case, window, check):
    """The law: for an incremental over any growth, granularity and cluster size, also cut in small windows."""
    cluster, parent, now, disk, missed = case
    held = Chain(parent, cluster) if check or missed else None
    with mock.patch.object(plan, "WINDOW", window * cluster):
        made = plan_incremental(ModelSource(disk), cluster, "b", parent_size=len(parent), chain=held)
    grown = naive_dirty_from(len(now), len(parent), cluster)
    expected = naive_kinds(disk, cluster, grown=grown, held=held)
    assert np.array_equal(applied(made, parent, now), now)
    assert kinds_of(made) == expected
    assert (made.totals.data, made.totals.zero) == naive_totals(expected, cluster, len(now))
    dirty = disk.bitmaps["b"].copy()
    if grown is not None:
        dirty[grown:] = 1
    assert made.totals.dirty == int(dirty.sum())


@settings(max_examples=60)
@given(_changes(), st.sampled_from([1, 3, 100]))
def test_a_full_plan_gives_the_disk_from_nothing(case, window):
    cluster, _, now, disk, _ = case
    with mock.patch.object(plan, "WINDOW", window * cluster):
        made = plan_full(ModelSource(disk), cluster)
    assert np.array_equal(applied(made, np.zeros(0, dtype=np.uint8), now), now)
    assert kinds_of(made) == naive_kinds(disk, cluster, full=True)
    assert made.totals.data + made.totals.zero == made.totals.dirty == len(now)


def test_a_disk_of_no_bytes_has_plans_of_nothing():
    empty = _Sparse(0, [])
    plans = [
        plan_full(empty, CLUSTER),
        plan_incremental(empty, CLUSTER, "b", parent_size=0, chain=None),
        plan_rescan(empty, CLUSTER, Chain(np.zeros(0), CLUSTER)),
        plan_audit(empty, CLUSTER, "b", parent_size=0, chain=Chain(np.zeros(0), CLUSTER)),
    ]
    assert [regions_of(made) for made in plans] == [[]] * 4
    assert not plan.any_dirty(empty, "b")


@pytest.mark.parametrize("cluster", [4 * KIB, 64 * KIB, 2 * MIB])
def test_cluster_sizes_from_4_kib_to_2_mib_round_out_dirty_and_in_zero(cluster):
    size = 5 * cluster + 333
    disk = disk_of(
        (cluster - 1, CLEAN_DATA), (2, DIRTY_DATA), (cluster, CLEAN_ZERO), (size - 2 * cluster - 1, DIRTY_ZERO)
    )
    made = plan_incremental(ModelSource(disk), cluster, "b", parent_size=size, chain=None)
    assert kinds_of(made) == {0: DATA, 1: DATA, 2: ZERO, 3: ZERO, 4: ZERO, 5: ZERO}
    assert made.totals.zero == 3 * cluster + 333


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=40), st.integers(0, 1 << 20))
def test_few_runs_come_back_from_a_packed_window(runs, first):
    kinds = np.repeat(np.array([kind for kind, _ in runs], dtype=np.uint8), [length for _, length in runs])
    packed = plan._Packed.of(first, kinds)
    assert np.array_equal(packed.unpacked(), kinds)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000, 65_535, 65_536, 65_537])
def test_many_runs_come_back_from_bit_planes(count):
    kinds = np.arange(count, dtype=np.int64) % 3
    packed = plan._Packed.of(5, kinds.astype(np.uint8))
    assert (packed.starts is None) == (count >= 1000)
    assert np.array_equal(packed.unpacked(), kinds)
    assert packed.unpacked().dtype == np.uint8


def test_a_window_costs_two_bits_per_cluster_at_most():
    """So that a fragmented disk of 16 TiB needs 64 MiB."""
    kinds = (np.arange(1 << 16) % 2).astype(np.uint8)
    packed = plan._Packed.of(0, kinds)
    assert packed.kinds.nbytes <= (1 << 16) // 4
    few = plan._Packed.of(0, np.zeros(1 << 16, dtype=np.uint8))
    assert few.starts is not None
    assert few.kinds.nbytes + few.starts.nbytes < 100


class _Sparse:
    """A huge disk with few runs, without an array of its bytes; counts what it is asked about allocation."""

    def __init__(self, size: int, dirty: list[tuple[int, int]]) -> None:
        self.size = size
        self._dirty = dirty
        self.allocation_asked: list[tuple[int, int]] = []
        self.expected: list[tuple[str, int, int]] = []

    def allocation(self, start: int, end: int):
        assert 0 <= start < end <= self.size
        assert end - start < 1 << 32
        self.allocation_asked.append((start, end))
        return plan.Runs.uniform(start, end, 0)

    def expect_allocation(self, start: int, end: int) -> None:
        self.expected.append(("allocation", start, end))

    def expect_dirty(self, bitmap: str, start: int, end: int) -> None:
        self.expected.append(("dirty", start, end))

    def dirty(self, bitmap: str, start: int, end: int):
        assert end - start < 1 << 32
        edges, flags = [start], [0]
        for low, high in self._dirty:
            low, high = max(low, start), min(high, end)
            if low < high:
                edges += [low, high]
                flags += [1, 0]
        keep = [at for at in range(len(edges)) if at + 1 == len(edges) or edges[at] < edges[at + 1]]
        keep = [at for at in keep if edges[at] < end]
        starts = np.array([edges[at] for at in keep], dtype=np.int64)
        return plan.Runs.of(starts, end, np.array([flags[at] for at in keep], dtype=np.uint32))


def test_allocation_is_asked_only_near_what_is_dirty_when_zeroes_are_not_checked():
    near = [(9 * GIB, 9 * GIB + 5), (9 * GIB + 10 * MIB, 9 * GIB + 10 * MIB + 1)]
    source = _Sparse(40 * GIB + 7, [*near, (30 * GIB, 30 * GIB + 70_000), (40 * GIB + 1, 40 * GIB + 7)])
    made = plan_incremental(source, 64 * KIB, "b", parent_size=source.size, chain=None)
    assert source.allocation_asked == [
        (9 * GIB, 9 * GIB + 10 * MIB + 64 * KIB),
        (30 * GIB, 30 * GIB + 128 * KIB),
        (40 * GIB, 40 * GIB + 7),
    ]
    assert regions_of(made) == [
        (9 * GIB, 64 * KIB, DATA),
        (9 * GIB + 10 * MIB, 64 * KIB, DATA),
        (30 * GIB, 128 * KIB, DATA),
        (40 * GIB, 7, DATA),
    ]
    assert made.totals.data == 4 * 64 * KIB + 7


def test_nothing_dirty_asks_nothing_about_allocation():
    source = _Sparse(9 * GIB, [])
    made = plan_incremental(source, 64 * KIB, "b", parent_size=source.size, chain=None)
    assert source.allocation_asked == []
    assert made.totals == plan.Totals(0, 0, 0)
    assert not list(made.windows())


def test_a_dirty_run_across_windows_of_almost_four_gib_is_whole():
    """Lengths have 32 bits (trap 11): sizes beyond are asked about in pieces."""
    low, high = plan.WINDOW - 100, 2 * plan.WINDOW + 100
    source = _Sparse(20 * GIB, [(low, high)])
    made = plan_incremental(source, 2 * MIB, "b", parent_size=source.size, chain=None)
    regions = regions_of(made)
    assert regions[0][0] == low // (2 * MIB) * 2 * MIB
    assert sum(length for _, length, _ in regions) == made.totals.data
    assert [one[0] + one[1] for one in regions[:-1]] == [other[0] for other in regions[1:]]
    assert regions[-1][0] + regions[-1][1] >= high
    assert made.totals.dirty == high - low


def test_a_bitmap_that_the_server_leaves_out_is_an_error_and_not_clean(monkeypatch):
    """Trap 14; with the context negotiated and then missing from a reply, as well."""
    disk = disk_of((4 * CLUSTER, DIRTY_DATA))
    missing = exported(monkeypatch, disk, MANNERS[0], missing=["qemu:dirty-bitmap:b"])
    with missing, pytest.raises(SourceError, match="no dirty bitmap 'b'"):
        plan_incremental(missing, CLUSTER, "b", parent_size=disk.size, chain=None)
    silent = exported(monkeypatch, disk, MANNERS[0], reply=lambda context, start, length: None)
    with silent, pytest.raises(SourceError, match="without qemu:dirty-bitmap:b"):
        plan_incremental(silent, CLUSTER, "b", parent_size=disk.size, chain=None)


def test_without_allocation_everything_is_read(monkeypatch):
    disk = disk_of((4 * CLUSTER, CLEAN_ZERO))
    with exported(monkeypatch, disk, MANNERS[0], missing=["base:allocation"]) as source:
        assert kinds_of(plan_full(source, CLUSTER)) == dict.fromkeys(range(4), DATA)


def test_an_empty_reply_is_an_error_and_no_endless_loop(monkeypatch):
    disk = disk_of((4 * CLUSTER, CLEAN_DATA))
    with (
        exported(monkeypatch, disk, MANNERS[0], reply=lambda context, start, length: [0, 0]) as source,
        pytest.raises(SourceError, match="no extent"),
    ):
        plan_full(source, CLUSTER)


def test_parent_is_what_no_region_covers():
    assert PARENT == 0
    disk = disk_of((CLUSTER, DIRTY_DATA), (CLUSTER, CLEAN_DATA), (CLUSTER, DIRTY_DATA))
    made = plan_incremental(ModelSource(disk), CLUSTER, "b", parent_size=disk.size, chain=None)
    assert [kinds.tolist() for _, kinds in made.windows()] == [[DATA, PARENT, DATA]]
    assert regions_of(made) == [(0, CLUSTER, DATA), (2 * CLUSTER, CLUSTER, DATA)]


class _Nothing:
    """A parent chain that holds only zeroes; notes the clusters that it is asked about."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def holds_data(self, first: int, count: int) -> np.ndarray:
        self.asked.append((first, first + count))
        return np.zeros(count, dtype=np.bool_)


@pytest.mark.parametrize("held", [None, _Nothing()], ids=["near", "everywhere"])
def test_the_server_is_never_asked_about_allocation_that_it_was_not_told_to_expect(held):
    source = _Sparse(9 * GIB, [(GIB, GIB + 5), (5 * GIB, 5 * GIB + 1)])
    plan_incremental(source, 64 * KIB, "b", parent_size=source.size, chain=held)
    windows = list(plan.extents.windows(0, source.size, plan.WINDOW))
    assert [at for what, *at in source.expected if what == "dirty"] == [list(window) for window in windows[1:]]
    assert [(low, high) for what, low, high in source.expected if what == "allocation"] == source.allocation_asked


def test_a_windows_allocation_is_under_way_while_the_next_windows_bitmap_is_read():
    source = _Sparse(9 * GIB, [(GIB, GIB + 5), (5 * GIB, 5 * GIB + 1)])
    story: list[str] = []
    for name in ("dirty", "allocation", "expect_allocation"):
        method = getattr(source, name)
        setattr(source, name, lambda *a, name=name, method=method: (story.append(name), method(*a))[1])
    plan_incremental(source, 64 * KIB, "b", parent_size=source.size, chain=None)
    assert story[:4] == ["dirty", "expect_allocation", "dirty", "expect_allocation"]


def test_the_chain_is_asked_only_near_what_is_clean_and_zero():
    # One zero run in a disk of data: the chain's tables elsewhere are not needed, however much they hold.
    class OneZero(_Sparse):
        def allocation(self, start: int, end: int):
            starts = np.array([0, GIB, GIB + 64 * KIB])
            flags = np.array([0, 3, 0], dtype=np.uint32)
            return plan.Runs.of(starts, end, flags) if start == 0 else plan.Runs.uniform(start, end, 0)

    source, held = OneZero(9 * GIB, [(5 * GIB, 5 * GIB + 1)]), _Nothing()
    plan_incremental(source, 64 * KIB, "b", parent_size=source.size, chain=held)
    assert held.asked == [(16384, 16385)]


@pytest.mark.parametrize("seed", range(12))
def test_ranges_become_masks_and_masks_spans_however_many_there_are(seed):
    rng = np.random.default_rng(seed)
    count, many = int(rng.integers(1, 3000)), int(rng.choice([0, 1, 5, plan._FEW, plan._FEW + 1, 900]))
    firsts = np.sort(rng.integers(0, count, many))
    ends = np.minimum(firsts + rng.integers(0, 4, many), count)
    mask = plan._fill(firsts, ends, count)
    expected = np.zeros(count, dtype=np.bool_)
    for low, high in zip(firsts, ends, strict=True):
        expected[low:high] = True
    assert mask.dtype == np.bool_
    assert mask.tolist() == expected.tolist()
    for near in (1, 2, 7):
        spans: list[list[int]] = []
        for at in np.flatnonzero(expected).tolist():
            if spans and at - spans[-1][1] < near:
                spans[-1][1] = at + 1
            else:
                spans.append([at, at + 1])
        assert [list(span) for span in plan._spans(mask, near)] == spans


@pytest.mark.parametrize(("dirty", "found"), [([], False), ([(9 * GIB - 1, 9 * GIB)], True), ([(0, 1)], True)])
def test_any_dirty_range_is_found_wherever_it_is(dirty, found):
    assert plan.any_dirty(_Sparse(9 * GIB, dirty), "b") is found


# Rescan, audit, spot check


def reads_as_zero(disk: Disk, cluster: int) -> list[bool]:
    """Which clusters the server says are wholly zero."""
    return [bool((disk.allocation[at : at + cluster] & 2).all()) for at in range(0, disk.size, cluster)]


@settings(max_examples=100)
@given(_changes(), st.sampled_from([1, 3, 100]))
def test_a_rescan_reads_what_is_not_zero_and_records_zeroes_over_data(case, window):
    cluster, parent, _, disk, _ = case
    held = Chain(parent, cluster)
    with mock.patch.object(plan, "WINDOW", window * cluster):
        made = plan_rescan(ModelSource(disk), cluster, held)
    expected = {}
    for number, zero in enumerate(reads_as_zero(disk, cluster)):
        if not zero:
            expected[number] = DATA
        elif held.holds_data(number, 1)[0]:
            expected[number] = ZERO
    assert kinds_of(made) == expected
    assert (made.totals.data, made.totals.zero) == naive_totals(expected, cluster, disk.size)
    assert made.totals.dirty == disk.size


@settings(max_examples=100)
@given(_changes(), st.sampled_from([1, 3, 100]), st.booleans())
def test_an_audit_compares_all_that_is_clean_and_not_zero_on_both_sides(case, window, asked):
    cluster, parent, _, disk, _ = case
    held = Chain(parent, cluster)
    with mock.patch.object(plan, "WINDOW", window * cluster):
        made = plan_audit(ModelSource(disk), cluster, "b" if asked else None, parent_size=len(parent), chain=held)
    dirty = disk.bitmaps["b"].copy() if asked else np.zeros(disk.size, dtype=np.int64)
    if asked and disk.size > len(parent):
        dirty[len(parent) // cluster * cluster :] = 1
    expected = {}
    for number, zero in enumerate(reads_as_zero(disk, cluster)):
        clean = not dirty[number * cluster : (number + 1) * cluster].any()
        if clean and not (zero and not held.holds_data(number, 1)[0]):
            expected[number] = DATA
    assert kinds_of(made) == expected
    assert made.totals.dirty == dirty.sum()
    assert made.totals.data == naive_totals(expected, cluster, disk.size)[0]


class Noting:
    """A sampler that takes all."""

    def __init__(self) -> None:
        self.found: set[int] = set()

    def offer(self, base: int, mask: np.ndarray) -> None:
        offered = {base + at for at in np.flatnonzero(mask).tolist()}
        assert not offered & self.found
        self.found |= offered


@settings(max_examples=100)
@given(_changes(), st.sampled_from([1, 3, 100]), st.booleans())
def test_a_spot_check_may_look_at_what_is_clean_and_not_compared_as_zero(case, window, check):
    cluster, parent, _, disk, _ = case
    held = Chain(parent, cluster) if check else None
    sampler = Noting()
    with mock.patch.object(plan, "WINDOW", window * cluster):
        made = plan_incremental(ModelSource(disk), cluster, "b", parent_size=len(parent), chain=held, sampler=sampler)
        plain = plan_incremental(ModelSource(disk), cluster, "b", parent_size=len(parent), chain=held)
    assert kinds_of(made) == kinds_of(plain)
    grown = naive_dirty_from(disk.size, len(parent), cluster)
    expected = {
        number
        for number, zero in enumerate(reads_as_zero(disk, cluster))
        if (grown is None or number < grown // cluster)
        and not disk.bitmaps["b"][number * cluster : (number + 1) * cluster].any()
        and not (check and zero)
    }
    assert sampler.found == expected


@pytest.mark.parametrize("clusters", [[], [0], [7], [0, 1, 2, 5, 6, 7], [3, 4]])
def test_a_plan_of_clusters_reads_these(clusters):
    with mock.patch.object(plan, "WINDOW", 3 * CLUSTER):
        made = plan_of(np.array(clusters, dtype=np.int64), 7 * CLUSTER + 5, CLUSTER)
    assert kinds_of(made) == dict.fromkeys(clusters, DATA)
    assert made.totals.data == len(clusters) * CLUSTER - (CLUSTER - 5 if 7 in clusters else 0)
