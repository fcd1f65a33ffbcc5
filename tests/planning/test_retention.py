"""Which points are kept, held against tables made by hand from restic's manual and its documented examples."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import accumulate, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backup.errors import UsageError
from backup.planning.retention import (
    DISORDER,
    FUTURE,
    RULES,
    UNCONFIRMED,
    DatedPoint,
    Duration,
    Policy,
    doubts,
    firsts_after_jumps,
    keep,
)


def moments(*times, disks=("vda",), pinned=()):
    """Points from the oldest to the newest, named by their times."""
    return [
        DatedPoint(text, i, datetime.fromisoformat(text).replace(tzinfo=UTC), disks, text in pinned)
        for i, text in enumerate(times, 1)
    ]


LATER = datetime(2030, 1, 1, tzinfo=UTC)
"""A clock by which none of these points lies in the future."""


def kept(points, now=LATER, **policy):
    return sorted(keep(points, Policy(**policy), now))


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
        ("weekly", [f"{year}-01-15" for year in range(2018, 2027)]),
        ("monthly", [f"{year}-01-15" for year in range(2018, 2027)]),
    ],
)
def test_the_same_hour_day_week_or_month_of_another_time_is_another(rule, times):
    assert kept(moments(*times), **{rule: 2}) == times[-2:]


def test_a_week_that_spans_two_years_is_one():
    assert kept(moments("2025-12-22", "2025-12-30", "2026-01-02"), weekly=2) == ["2025-12-22", "2026-01-02"]


def test_each_reason_is_said():
    assert keep(moments(*DAYS, pinned=[DAYS[0]]), Policy(last=2, daily=5, within=Duration(days=1)), LATER) == {
        DAYS[5]: ("newest", "within 1d", "last", "daily"),
        DAYS[4]: ("within 1d", "last", "daily"),
        DAYS[2]: ("daily",),
        DAYS[0]: ("daily", "pinned"),
    }
    assert keep(moments(*DAYS), Policy(weekly=3), LATER)[DAYS[0]] == ("oldest weekly",)


def test_the_order_is_the_sequences_and_not_the_clocks():
    points = moments("2026-03-03", "2026-03-01", "2026-03-02")
    assert keep(points, Policy(yearly=1), LATER) == {"2026-03-02": ("newest", "yearly"), "2026-03-03": (DISORDER,)}
    assert keep(points, Policy(last=1), LATER) == {"2026-03-02": ("newest", "last")}, "no time is asked for"
    # Within counts from the newest, whatever a clock once said.
    assert kept(points, within=Duration(hours=1)) == ["2026-03-02", "2026-03-03"]


def test_the_newest_point_of_each_disk_is_kept():
    old, new = moments("2026-01-01", "2026-01-02")
    points = [DatedPoint(old.point, 1, old.started, ("vda", "vdb")), DatedPoint(new.point, 2, new.started, ("vda",))]
    assert keep(points, Policy(last=1), LATER) == {"2026-01-02": ("newest", "last"), "2026-01-01": ("newest", "last")}
    assert keep(points, Policy(yearly=1), LATER)["2026-01-01"] == ("newest", "yearly")


def test_disks_that_separate_runs_back_up_do_not_take_each_others_places():
    times = [f"2026-01-0{day}T0{hour}:00" for day in range(1, 6) for hour in (1, 2)]
    points = [
        DatedPoint(p.point, p.sequence, p.started, ("vda",) if "T01" in p.point else ("vdb",)) for p in moments(*times)
    ]
    assert kept(points, daily=2) == times[-4:]


@pytest.mark.parametrize("policy", [Policy(), Policy(last=0)])
def test_nothing_given_is_no_wish_to_remove_everything(policy):
    with pytest.raises(UsageError, match="nothing says"):
        keep(moments(*DAYS), policy, LATER)


def test_no_points_are_no_trouble():
    assert keep([], Policy(last=1), LATER) == {}


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


REGULAR = st.tuples(
    st.sampled_from([1, 24, 168, 720]), st.lists(st.integers(1, 3), min_size=2, max_size=40), st.integers(0, 720)
).map(lambda drawn: list(accumulate((drawn[0] * times for times in drawn[1]), initial=drawn[2])))
"""Hours of nights without a jump."""


def at_hours(hours):
    start = datetime(2015, 1, 1, tzinfo=UTC)
    return [DatedPoint(str(hour), i, start + timedelta(hours=hour), ("vda",)) for i, hour in enumerate(hours, 1)]


@example({"yearly": 2}, [0, 2160, 4320, 5040, 5760, 6480, 7200, 7920])  # two jumps once the nights between are gone
@given(COUNTS, REGULAR)
def test_pruning_what_was_pruned_changes_nothing(counts, hours):
    points = at_hours(hours)
    assert doubts(points, LATER) == {}
    once = keep(points, Policy(**counts), LATER)
    assert set(keep([point for point in points if point.point in once], Policy(**counts), LATER)) == set(once)


@given(COUNTS, COUNTS, HOURS)
def test_a_rule_more_never_keeps_less(counts, more, hours):
    points = at_hours(hours)
    both = {rule: max(counts[rule], more[rule]) for rule in RULES}
    assert set(keep(points, Policy(**counts), LATER)) <= set(keep(points, Policy(**both), LATER))


# Clocks that were wrong

NOW = datetime(2026, 11, 28, 3, 0, 5, tzinfo=UTC)
WITHIN = Duration(days=30)


def nights(count, **elsewhere):
    """Points of so many nights up to NOW, oldest first; `n3` is three nights old.  Some have other times."""
    return [
        DatedPoint(
            f"n{ago}",
            count - ago,
            datetime.fromisoformat(elsewhere[f"n{ago}"]).replace(tzinfo=UTC)
            if f"n{ago}" in elsewhere
            else NOW - timedelta(days=ago, seconds=5),
            ("vda",),
        )
        for ago in reversed(range(count))
    ]


POLICIES = [
    {"within": WITHIN},
    {"last": 3},
    {"hourly": 4},
    {"daily": 7},
    {"weekly": 3},
    {"monthly": 2},
    {"yearly": 2},
    {"daily": 7, "weekly": 4, "monthly": 12, "yearly": 3, "within": Duration(days=3)},
]
BAD_CLOCKS = [
    "2099-01-01T03:00:00",  # far ahead
    "2027-02-01T03:00:00",  # some months
    "2026-12-05T03:00:00",  # a week
    "1970-01-01T00:00:05",  # no battery
    "2025-11-28T03:00:00",  # last year
]


TIMED = [policy for policy in POLICIES if "last" not in policy]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("clock", BAD_CLOCKS)
@pytest.mark.parametrize("ago", [0, 1, 5, 40])
def test_a_night_whose_clock_was_wrong_removes_no_other_point(policy, clock, ago):
    bad = f"n{ago}"
    right = {point for point in kept(nights(60), NOW, **policy) if point != bad}
    found = kept(nights(60, **{bad: clock}), NOW, **policy)
    assert right <= set(found)
    assert bad in found or policy == {"last": 3}, "and its own point stays, whatever it is good for"


@pytest.mark.parametrize("policy", TIMED, ids=str)
@pytest.mark.parametrize("clock", [text for text in BAD_CLOCKS if text > "2026-12-06"])
@pytest.mark.parametrize("count", range(1, 7))
def test_a_clock_that_is_ahead_tonight_and_so_is_now_removes_nothing_more(policy, clock, count):
    """The host believes it: no time lies in its future."""
    jump = datetime.fromisoformat(clock).replace(tzinfo=UTC)
    ahead = {f"n{ago}": f"{jump - timedelta(days=ago):%Y-%m-%dT%H:%M:%S}" for ago in range(count)}
    before = kept(nights(60)[:-count], NOW, **policy)
    found = keep(nights(60, **ahead), Policy(**policy), jump + timedelta(minutes=1))
    assert set(before) <= set(found)
    assert "n0" in found


@pytest.mark.parametrize("now", ["1970-01-01T00:00:00", "2026-11-01T03:00:00"])
def test_a_clock_that_is_behind_removes_nothing(now):
    points = nights(60)
    before = datetime.fromisoformat(now).replace(tzinfo=UTC)
    later = {point.point for point in points if point.started > before + timedelta(minutes=5)}
    for policy in TIMED:
        found = keep(points, Policy(**policy), before)
        assert later <= set(found)
        assert all(FUTURE in found[point] for point in later)


def test_a_pause_is_believed_when_a_week_of_points_followed():
    jump = NOW + timedelta(days=400)
    for count in (1, 6, 7, 20):
        points = [
            *nights(60),
            *(DatedPoint(f"p{i}", 100 + i, jump + timedelta(days=i), ("vda",)) for i in range(count)),
        ]
        found = keep(points, Policy(within=WITHIN), jump + timedelta(days=count))
        assert ("n10" in found) == (count < 7)
        assert (UNCONFIRMED in str(found.get("n10"))) == (count < 7)
        assert f"p{count - 1}" in found
    # Of seven points in a night nothing is believed.
    points = [*nights(60), *(DatedPoint(f"p{i}", 100 + i, jump + timedelta(hours=i), ("vda",)) for i in range(20))]
    assert "n10" in keep(points, Policy(within=WITHIN), jump + timedelta(days=1))


@pytest.mark.parametrize(
    "steps", [[1], [24], [168], [1, 1, 1, 15], [24, 24, 24, 24, 72], [24, 48], [168, 336], [24, 168], [720]]
)
def test_what_people_usually_do_is_no_jump(steps):
    hours = list(accumulate((steps[i % len(steps)] for i in range(60)), initial=0))
    for count in range(1, len(hours)):
        assert doubts(at_hours(hours[:count]), LATER) == {}
        assert firsts_after_jumps(at_hours(hours[:count])) == [], count


@pytest.mark.parametrize(
    "policy",
    [{"daily": 7, "weekly": 5, "monthly": 12, "yearly": 3}, {"daily": 3, "monthly": 3}, {"weekly": 2}, {"monthly": 2}],
    ids=str,
)
def test_what_a_nightly_prune_leaves_is_no_jump(policy):
    points = []
    for night in range(800):
        started = datetime(2024, 1, 1, 3, tzinfo=UTC) + timedelta(days=night)
        points.append(DatedPoint(str(night), night + 1, started, ("vda",)))
        found = keep(points, Policy(**policy), started)
        assert UNCONFIRMED not in str(found), night
        points = [point for point in points if point.point in found]


def test_small_steps_back_of_a_clock_are_no_doubt():
    points = moments("2026-01-01T03:00:05", "2026-01-01T03:00:02", "2026-01-02T03:00", "2026-01-02T01:59")
    assert doubts(points, LATER) == {}
    assert kept(points, daily=2) == ["2026-01-01T03:00:02", "2026-01-02T01:59"]


def test_of_two_points_that_contradict_each_other_both_stay():
    assert doubts(moments("2026-11-27T03:00", "1970-01-01"), NOW) == {"1970-01-01": DISORDER}, "the later is believed"
    for policy in TIMED:
        assert len(kept(moments("2026-11-27T03:00", "1970-01-01"), **policy)) == 2


@given(st.lists(st.integers(0, 400), max_size=30), st.integers(0, 400), st.sampled_from(TIMED))
def test_a_point_in_doubt_is_kept_and_changes_nothing_for_the_others(days, now, policy):
    start = datetime(2026, 1, 1, tzinfo=UTC)
    points = [DatedPoint(str(i), i, start + timedelta(days=day), ("vda",)) for i, day in enumerate(days)]
    clock = start + timedelta(days=now)
    doubtful = doubts(points, clock)
    found = keep(points, Policy(**policy), clock)
    assert doubtful.keys() <= found.keys()
    clear = [point for point in points if point.point not in doubtful]
    assert set(keep(clear, Policy(**policy), clock)) <= found.keys()
    times = [point.started for point in clear]
    assert all(later > earlier - timedelta(days=1) for earlier, later in pairwise(times))
    assert all(time <= clock + timedelta(minutes=5) for time in times)


def test_last_counts_points_by_their_order_whatever_their_times():
    assert keep(nights(10, n0="2099-01-01"), Policy(last=3, daily=1), NOW) == {
        "n0": ("newest", FUTURE, "last"),
        "n1": ("last", "daily"),
        "n2": ("last",),
    }


def test_pinned_points_say_nothing_of_how_far_apart_points_usually_are():
    days = [*range(3), *range(200, 204)]
    points = [
        replace(point, pinned=day < 3) for day, point in zip(days, at_hours([24 * day for day in days]), strict=True)
    ]
    assert firsts_after_jumps(points) == []
    assert firsts_after_jumps([replace(point, pinned=False) for point in points]) == [points[3]]
