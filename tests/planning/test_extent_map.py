"""`map`: every extent with its bitmap state, whatever the manner in which a server tells about it."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from fakes import MANNERS, Disk, FakeBinding, naive_runs

from backup.errors import SourceError
from backup.nbd import export
from backup.nbd.export import Export
from backup.planning import extent_map
from backup.planning.extent_map import Extent, MapTotals


def _disk() -> Disk:
    rng = np.random.default_rng(3)
    return Disk(
        np.repeat(rng.integers(0, 4, 60), rng.integers(1, 900, 60)),
        {"b": np.zeros(1, dtype=np.int64)},
    )


@pytest.fixture
def disk() -> Disk:
    made = _disk()
    made.bitmaps["b"] = (np.arange(made.size) // 4096 % 3 == 1).astype(np.int64)
    return made


def _export(monkeypatch, disk: Disk, manner, bitmap: str | None) -> Export:
    monkeypatch.setattr(export, "load_binding", lambda: FakeBinding(disk, manner))
    return Export("nbd://fake", [bitmap] if bitmap else [])


def _expected(disk: Disk, bitmap: str | None) -> list[Extent]:
    dirty = disk.bitmaps[bitmap] if bitmap else np.zeros(disk.size, dtype=np.int64)
    return [
        Extent(start, end - start, bool(flags & 4) if bitmap else None, not flags & 2, bool(flags & 2), bool(flags & 1))
        for start, end, flags in naive_runs(disk.allocation | dirty << 2)
    ]


@pytest.mark.parametrize("bitmap", [None, "b"])
@pytest.mark.parametrize("manner", MANNERS, ids=str)
def test_a_map_covers_the_disk_without_gaps_and_tells_each_byte(monkeypatch, disk, manner, bitmap):
    with _export(monkeypatch, disk, manner, bitmap) as source:
        assert list(extent_map.read_map(source, bitmap)) == _expected(disk, bitmap)


def test_neighbours_are_merged_across_windows(monkeypatch, disk):
    with _export(monkeypatch, disk, MANNERS[0], "b") as source, mock.patch.object(extent_map, "WINDOW", 1000):
        assert list(extent_map.read_map(source, "b")) == _expected(disk, "b")


@pytest.mark.parametrize("bitmap", [None, "b"])
def test_the_totals_are_the_sums_of_the_map(monkeypatch, disk, bitmap):
    with _export(monkeypatch, disk, MANNERS[-1], bitmap) as source, mock.patch.object(extent_map, "WINDOW", 5000):
        found = extent_map.map_totals(source, bitmap)
    rows = _expected(disk, bitmap)
    assert found == MapTotals(
        size=disk.size,
        data=sum(row.length for row in rows if row.data),
        zero=sum(row.length for row in rows if row.zero),
        hole=sum(row.length for row in rows if row.hole),
        dirty=sum(row.length for row in rows if row.dirty) if bitmap else None,
        dirty_data=sum(row.length for row in rows if row.dirty and row.data) if bitmap else None,
        dirty_zero=sum(row.length for row in rows if row.dirty and row.zero) if bitmap else None,
    )


def test_a_bitmap_that_is_not_there_is_an_error(monkeypatch, disk):
    with _export(monkeypatch, disk, MANNERS[0], "other") as source, pytest.raises(SourceError) as caught:
        list(extent_map.read_map(source, "other"))
    assert "offers: b;" in caught.value.hint
