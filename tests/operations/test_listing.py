"""Which points `list` shows, and how."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from lab import Night, call_pybackup

from backup.errors import UsageError
from backup.operations.listing import parse_since

NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)


@pytest.fixture
def in_kiritimati(monkeypatch):
    """14 hours before UTC: a day begins there at 10:00 UTC of the day before."""
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_a_day_begins_in_local_time_and_a_duration_ends_now(in_kiritimati):
    assert parse_since("2026-11-28", NOW) == datetime(2026, 11, 27, 10, 0, tzinfo=UTC)
    assert parse_since("7d", NOW) == NOW - timedelta(days=7)
    assert parse_since("999999999w", NOW) < NOW - timedelta(days=365_000)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-02-30", "7", "-1d", "2026-11-28T01:00"])
def test_what_is_neither_a_day_nor_a_duration_is_refused(text):
    with pytest.raises(UsageError, match="neither a day nor a duration"):
        parse_since(text, NOW)


@pytest.fixture
def night(tmp_path):
    made = Night.of(tmp_path)
    made.full()
    for _ in range(2):
        assert made.incremental().rc == 0
    return made


def listed(night: Night, *options: str) -> list[str]:
    done = call_pybackup(["list", "--json", "--repo", night.repository, *options])
    assert done.rc == 0, done
    return [point["point"] for point in done.document]


def test_points_are_selected(night):
    points = listed(night)
    assert len(points) == 3
    assert listed(night, "--last", "2") == points[1:]
    assert listed(night, "--last", "9") == points
    assert listed(night, "--since", "1h") == points
    assert listed(night, "--since", "2100-01-01") == []
    assert listed(night, "--disk", "disk") == points
    assert listed(night, "--disk", "other") == []


@pytest.mark.parametrize("count", ["0", "-1", "x", "9" * 30])
def test_a_count_that_is_none_is_refused(night, count):
    done = call_pybackup(["list", "--repo", night.repository, f"--last={count}"])
    assert (done.rc, len(done.stderr.splitlines())) == (2, 2), done


def test_a_line_for_each_point_fits_into_80_columns(night):
    assert call_pybackup(["pin", "disk", "--repo", night.repository]).rc == 0
    done = call_pybackup(["list", "--repo", night.repository])
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["MACHINE", "POINT", "TAKEN", "AGE", "KIND", "STORED"]
    assert [line.split()[6] for line in lines] == ["full", "incr", "incr"]
    assert lines[2].endswith("  pinned")
    assert max(map(len, lines[:2])) <= 80
    taken = datetime.strptime(" ".join(lines[0].split()[2:4]), "%Y-%m-%d %H:%M").astimezone()
    assert abs((datetime.now(UTC) - taken).total_seconds()) < 300
    long = call_pybackup(["list", "--long", "--repo", night.repository]).stdout.splitlines()
    assert long[0].endswith("REASON")
    assert long[1].endswith("asked for")
