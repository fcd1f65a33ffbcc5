"""Extents as columns, held against lists of single bytes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from fakes import MANNERS, Disk, FakeBinding, as_list, naive_runs
from hypothesis import given
from hypothesis import strategies as st

from backup.errors import SourceError
from backup.model import extents
from backup.model.extents import Runs
from backup.nbd.replies import extents_from_reply

FLAGS = st.lists(st.integers(0, 7), min_size=1, max_size=60)
BASE = st.sampled_from([0, 7, 1 << 40])


def runs_of(flags: list[int], base: int = 0, cuts: frozenset[int] = frozenset()) -> Runs:
    """Runs made from one value per byte, by way of unmerged pieces."""
    rows = []
    for start, end, value in naive_runs(flags, base):
        edges = [start, *sorted(cut + base for cut in cuts if start < cut + base < end), end]
        rows.extend((low, value) for low in edges[:-1])
    starts, values = zip(*rows, strict=True)
    return Runs.of(np.array(starts, dtype=np.int64), base + len(flags), np.array(values, dtype=np.uint32))


@given(FLAGS, BASE, st.frozensets(st.integers(1, 59)))
def test_neighbours_with_equal_flags_are_one_run(flags, base, cuts):
    runs = runs_of(flags, base, cuts)
    assert as_list(runs) == naive_runs(flags, base)
    assert runs.start == base


@given(FLAGS, BASE, st.integers(0, 7))
def test_a_mask_keeps_its_bits_and_merges_what_became_equal(flags, base, mask):
    assert as_list(runs_of(flags, base).masked(mask)) == naive_runs([value & mask for value in flags], base)


@given(FLAGS, BASE, st.sampled_from([1, 2, 4]))
def test_runs_having_a_bit_touch_nowhere_and_cover_exactly_it(flags, base, bit):
    starts, ends = runs_of(flags, base).having(bit)
    expected = [(start, end) for start, end, set_ in naive_runs([bool(value & bit) for value in flags], base) if set_]
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=60), BASE)
def test_an_overlay_has_each_bytes_flags_of_both(pairs, base):
    first, second = (list(column) for column in zip(*pairs, strict=True))
    found = extents.overlay(runs_of(first, base), runs_of(second, base), 2)
    assert as_list(Runs.of(found.starts, found.end, found.flags)) == naive_runs(
        [one | other << 2 for one, other in pairs], base
    )


@given(FLAGS, st.integers(0, 70))
def test_everything_from_an_offset_on_is_dirty(flags, offset):
    flags = [value & 1 for value in flags]
    found = extents.with_dirty_from(runs_of(flags), offset)
    assert as_list(found) == naive_runs([1 if at >= offset else value for at, value in enumerate(flags)])


@given(FLAGS, st.lists(st.integers(1, 59), max_size=5))
def test_parts_join_to_the_whole(flags, cuts):
    edges = sorted({0, len(flags), *(cut for cut in cuts if cut < len(flags))})
    parts = [runs_of(flags[low:high], low) for low, high in pairwise(edges)]
    assert as_list(extents.joined(parts)) == naive_runs(flags)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 30))
def test_windows_cover_a_range_once_and_end_at_multiples(start, length, step):
    found = list(extents.windows(start, start + length, step))
    covered = [byte for low, high in found for byte in range(low, high)]
    assert covered == list(range(start, start + length))
    assert all(high % step == 0 or high == start + length for _, high in found)


@pytest.mark.parametrize("manner", MANNERS, ids=str)
def test_the_fake_server_keeps_to_the_protocol(manner):
    """The fake itself: its replies, put together as the protocol says, tell the disk and nothing else."""
    rng = np.random.default_rng(1)
    disk = Disk(np.repeat(rng.integers(0, 4, 40), 25), {"b": np.repeat(rng.integers(0, 2, 20), 50)})
    server = FakeBinding(disk, manner)
    for turn, context in enumerate(disk.contexts()):
        told: list[int] = []
        while len(told) < disk.size:
            entries = server.entries(context, len(told), disk.size - len(told), turn=turn)
            assert entries
            lengths, flags = entries[::2], entries[1::2]
            assert sum(lengths) > 0
            told.extend(value & 3 for length, value in zip(lengths, flags, strict=True) for _ in range(length))
        assert told[: disk.size] == disk.flags(context).tolist()


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([10, 1, 10, 1, 5, 0], [(100, 120, 1), (120, 125, 0)]),
        ([10, 1], [(100, 110, 1)]),
        ([0, 3, 10, 1, 0, 2, 10, 1], [(100, 120, 1)]),
        ([60, 1], [(100, 150, 1)]),
        ([40, 1, 60, 0, 7, 3], [(100, 140, 1), (140, 150, 0)]),
        ([50, 1, 60, 0], [(100, 150, 1)]),
        ([0xFFFFFFFF, 2], [(100, 150, 2)]),
    ],
)
def test_a_reply_is_merged_and_clipped(entries, expected):
    assert as_list(extents_from_reply(entries, 100, 150, "nbd://x")) == expected


def test_many_extents_of_almost_four_gib_do_not_overflow():
    entries = [0xFFFF0000, 0, 0xFFFF0000, 1] * 4
    found = extents_from_reply(entries, 0, 1 << 40, "nbd://x")
    assert found.end == 8 * 0xFFFF0000
    assert len(found.starts) == 8


@pytest.mark.parametrize("entries", [[], [0, 0], [0, 1, 0, 3]])
def test_a_reply_without_progress_is_an_error_and_no_endless_loop(entries):
    with pytest.raises(SourceError, match="no extent"):
        extents_from_reply(entries, 0, 4096, "nbd://x")
