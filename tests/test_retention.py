"""Which points are kept, held against tables made by hand from restic's manual and its documented examples."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup.errors import UsageError
from backup.retention import RULES, Duration, Moment, Policy, keep, parse_time


def moments(*times, disks=("vda",), pinned=()):
    """Points from the oldest to the newest, named by their times."""
    return [
        Moment(text, i, datetime.fromisoformat(text).replace(tzinfo=UTC), disks, text in pinned)
        for i, text in enumerate(times, 1)
    ]


def kept(points, **policy):
    return sorted(keep(points, Policy(**policy)))


SUNDAYS = ["2014-09-07", "2014-09-14", "2014-09-21", "2014-09-28", "2014-10-05", "2014-10-12", "2014-10-19",
           "2014-10-26", "2014-11-02", "2014-11-09", "2014-11-16", "2014-11-23", "2014-11-30"]  # fmt: skip
"""The example of restic's manual: one point each Sunday from September to November 2014."""


def test_the_manuals_example_daily_four_keeps_the_last_four_days_that_have_one():
    assert kept(moments(*SUNDAYS), daily=4) == SUNDAYS[-4:]


def test_the_manuals_example_monthly_and_weekly_together():
    # Eight weekly ones, and for each month its newest: 28 September, 26 October, 30 November.
    assert kept(moments(*SUNDAYS), weekly=8) == SUNDAYS[-8:]
    assert kept(moments(*SUNDAYS), monthly=2) == ["2014-10-26", "2014-11-30"]
    assert kept(moments(*SUNDAYS), monthly=3) == ["2014-09-28", "2014-10-26", "2014-11-30"]


DAYS = ["2026-01-30T01:00", "2026-01-31T01:00", "2026-01-31T23:00", "2026-02-01T01:00", "2026-02-01T01:30",
        "2026-02-02T01:00"]  # fmt: skip

TABLE = [
    ("last", {"last": 1}, DAYS[-1:]),
    ("last beyond what there is", {"last": 99}, DAYS),
    ("hourly: the newest of each hour", {"hourly": 2}, [DAYS[4], DAYS[5]]),
    ("daily: the newest of each day", {"daily": 3}, [DAYS[2], DAYS[4], DAYS[5]]),
    ("daily, and the oldest as some are left", {"daily": 5}, [DAYS[0], DAYS[2], DAYS[4], DAYS[5]]),
    ("weekly: ISO weeks, Monday 2 February begins one", {"weekly": 2}, [DAYS[4], DAYS[5]]),
    ("weekly, and the oldest as one is left", {"weekly": 3}, [DAYS[0], DAYS[4], DAYS[5]]),
    ("monthly: the newest of each month", {"monthly": 2}, [DAYS[2], DAYS[5]]),
    ("monthly, and the oldest as one is left", {"monthly": 3}, [DAYS[0], DAYS[2], DAYS[5]]),
    ("yearly, and the oldest as one is left", {"yearly": 2}, [DAYS[0], DAYS[5]]),
    ("rules add up", {"last": 2, "daily": 2, "monthly": 2}, [DAYS[2], DAYS[4], DAYS[5]]),
    ("within a day of the newest, its first moment out", {"within": Duration(days=1)}, [DAYS[4], DAYS[5]]),
    ("within hours", {"within": Duration(hours=25)}, [DAYS[3], DAYS[4], DAYS[5]]),
    ("within a month", {"within": Duration(months=1)}, DAYS),
]


@pytest.mark.parametrize(("policy", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_policy_keeps_what_restics_would(policy, expected):
    assert kept(moments(*DAYS), **policy) == expected


@pytest.mark.parametrize(
    ("rule", "times"),
    [
        ("hourly", ["2026-01-01T05:10", "2026-01-02T05:10", "2026-01-03T05:10"]),
        ("daily", ["2026-01-15", "2026-02-15", "2026-03-15"]),
        ("weekly", ["2024-01-15", "2025-01-15", "2026-01-15"]),
        ("monthly", ["2024-01-15", "2025-01-15", "2026-01-15"]),
    ],
)
def test_the_same_hour_day_week_or_month_of_another_time_is_another(rule, times):
    assert kept(moments(*times), **{rule: 2}) == times[1:]


def test_a_week_that_spans_two_years_is_one():
    assert kept(moments("2025-12-22", "2025-12-30", "2026-01-02"), weekly=2) == ["2025-12-22", "2026-01-02"]


def test_each_reason_is_said():
    assert keep(moments(*DAYS, pinned=[DAYS[0]]), Policy(last=2, daily=5, within=Duration(days=1))) == {
        DAYS[5]: ("newest", "within 1d", "last", "daily"),
        DAYS[4]: ("within 1d", "last", "daily"),
        DAYS[2]: ("daily",),
        DAYS[0]: ("daily", "pinned"),
    }
    assert keep(moments(*DAYS), Policy(weekly=3))[DAYS[0]] == ("oldest weekly",)


def test_the_order_is_the_sequences_and_not_the_clocks():
    points = moments("2026-03-03", "2026-03-01", "2026-03-02")
    assert kept(points, last=1) == ["2026-03-02"]
    # Within counts from the newest, whatever a clock once said; what was later than it is within.
    assert kept(points, within=Duration(hours=1)) == ["2026-03-02", "2026-03-03"]


def test_the_newest_point_of_each_disk_is_kept():
    old, new = moments("2026-01-01", "2026-01-02")
    points = [Moment(old.point, 1, old.started, ("vda", "vdb")), Moment(new.point, 2, new.started, ("vda",))]
    assert keep(points, Policy(last=1)) == {"2026-01-02": ("newest", "last"), "2026-01-01": ("newest", "last")}
    assert keep(points, Policy(yearly=1))["2026-01-01"] == ("newest", "yearly")


def test_disks_that_separate_runs_back_up_do_not_take_each_others_places():
    times = [f"2026-01-0{day}T0{hour}:00" for day in range(1, 6) for hour in (1, 2)]
    points = [
        Moment(p.point, p.sequence, p.started, ("vda",) if "T01" in p.point else ("vdb",)) for p in moments(*times)
    ]
    assert kept(points, daily=2) == times[-4:]


def test_a_point_whose_time_cannot_be_read_is_kept():
    assert parse_time("yesterday") is None
    assert parse_time("2026-11-23T02:30:00Z") == datetime(2026, 11, 23, 2, 30, tzinfo=UTC)
    points = [Moment("a", 1, None, ("vda",)), *moments("2026-01-01", "2026-01-02")]
    assert keep(points, Policy(last=1))["a"] == ("its time cannot be read",)


@pytest.mark.parametrize("policy", [Policy(), Policy(last=0)])
def test_nothing_given_is_no_wish_to_remove_everything(policy):
    with pytest.raises(UsageError, match="nothing says"):
        keep(moments(*DAYS), policy)


def test_no_points_are_no_trouble():
    assert keep([], Policy(last=1)) == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("30d", Duration(days=30)),
        ("12h", Duration(hours=12)),
        ("2w", Duration(days=14)),
        ("6m", Duration(months=6)),
        ("1y", Duration(years=1)),
        ("1y5m7d2h", Duration(1, 5, 7, 2)),
    ],
)
def test_durations_are_restics(text, found):
    assert Duration.parse(text) == found
    assert Duration.parse(str(found)) == found


@pytest.mark.parametrize("text", ["", "0d", "d", "7", "-1d", "1d1y", "1 d", "1.5d", "1D", "forever", "٣d"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UsageError, match="is not a duration"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "moment", "before"),
    [
        ("1m", "2026-03-31", "2026-03-03"),  # Go's AddDate, which restic uses: there is no 31 February
        ("1m", "2026-01-15", "2025-12-15"),
        ("1y", "2024-02-29", "2023-03-01"),
        ("13m", "2026-01-15", "2024-12-15"),
        ("1d2h", "2026-01-15", "2026-01-13T22:00"),
        ("9999y", "2026-01-15", "0001-01-01"),
    ],
)
def test_durations_count_as_the_calendar_does(text, moment, before):
    start = datetime.fromisoformat(moment).replace(tzinfo=UTC)
    assert Duration.parse(text).before(start) == datetime.fromisoformat(before).replace(tzinfo=UTC)


COUNTS = st.fixed_dictionaries({rule: st.integers(0, 5) for rule in RULES}).filter(lambda counts: any(counts.values()))
HOURS = st.lists(st.integers(0, 20_000), min_size=1, max_size=40, unique=True).map(sorted)


@given(COUNTS, HOURS)
def test_pruning_what_was_pruned_changes_nothing(counts, hours):
    points = [
        Moment(str(hour), hour + 1, datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hour), ("vda",))
        for hour in hours
    ]
    once = keep(points, Policy(**counts))
    assert set(keep([point for point in points if point.point in once], Policy(**counts))) == set(once)


@given(COUNTS, COUNTS, HOURS)
def test_a_rule_more_never_keeps_less(counts, more, hours):
    points = [
        Moment(str(hour), hour + 1, datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hour), ("vda",))
        for hour in hours
    ]
    both = {rule: max(counts[rule], more[rule]) for rule in RULES}
    assert set(keep(points, Policy(**counts))) <= set(keep(points, Policy(**both)))
