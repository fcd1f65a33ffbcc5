"""
Which points to keep: the words and the meaning are restic's (its manual, "Removing snapshots according to a policy").

The rules go through the points from the newest to the oldest.  `daily: 7` keeps the newest point of each of the last
seven days that have a point; days without a point do not count.  A point that one rule keeps counts for the other rules
as well.  `within` keeps every point that is at most so much older than the newest one.  If there are fewer days than
the rule asks for, the oldest point is kept as well, so that the history grows to its full length.

The rules judge each disk by the points that hold it: where separate runs back up the disks of a machine, a point of one
disk does not take the place of a point of another.  The newest point of each disk is always kept, and so is every
pinned point.

A clock that was wrong for a night must not remove any point:

- A point whose time cannot be right is kept and takes no other point's place.  Its time is after now, or does not fit
  the order of the points that their sequence numbers give (the largest set of points whose times are in order counts as
  right).  A difference of less than a day is ignored: two hosts' clocks differ, or summer time begins.
- The clock may be years ahead, and the times of new points then agree with "now".  So at a jump in time the rules are
  applied once more, only to the points before the jump, and their results are kept as well.  A jump is a distance
  between two points of more than eight days and more than four times the usual distance.  The usual distance is the
  second shortest of the five distances before; if there are fewer than two, a jump is longer than 62 days.  Seven or
  more points over a week confirm that the jump was only a pause.

`last` does not depend on times: a policy of `last` alone doubts no time.

Pure.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise

from backup.errors import UsageError

RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
"""The rules that count points, in the order in which reasons are shown."""

MAX_COUNT = 1_000_000_000
"""Largest number of points that a rule may keep."""

_DURATION = re.compile(r"(?:([0-9]{1,4})y)?(?:([0-9]{1,5})m)?(?:([0-9]{1,5})w)?(?:([0-9]{1,6})d)?(?:([0-9]{1,7})h)?")


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of time by the calendar: a month has 28 to 31 days."""

    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0

    @classmethod
    def parse(cls, text: str) -> Duration:
        """
        Read "30d", "12h", "2w", "6m" (months), "1y", or several of them from long to short: "1y6m".

        Raises
        ------
        UsageError
            The text is anything else, or a duration of 0.
        """
        match = _DURATION.fullmatch(text)
        years, months, weeks, days, hours = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0, 0)
        duration = cls(years, months, 7 * weeks + days, hours)
        if duration == cls():
            raise UsageError(
                f"{text!r} is not a duration",
                hint="write 30d, 12h, 2w, 6m (months), 1y, or several of them from long to short, for example 1y6m",
            )
        return duration

    def before(self, moment: datetime) -> datetime:
        """
        Return the time that lies this duration before `moment`; the earliest possible time where the calendar ends.

        A day that the month does not have counts on into the next month, as in restic: a month before 31 March is 3
        March.
        """
        years, month = divmod(moment.year * 12 + moment.month - 1 - self.years * 12 - self.months, 12)
        try:
            first = moment.replace(year=years, month=month + 1, day=1)
            return first + timedelta(days=moment.day - 1) - timedelta(days=self.days, hours=self.hours)
        except (ValueError, OverflowError):
            return datetime.min.replace(tzinfo=UTC)

    def __str__(self) -> str:
        parts = ((self.years, "y"), (self.months, "m"), (self.days, "d"), (self.hours, "h"))
        return "".join(f"{number}{unit}" for number, unit in parts if number)


@dataclass(frozen=True, slots=True)
class Policy:
    """How many points each rule keeps, and for how long all points are kept; 0 and None: the rule keeps nothing."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Duration | None = None

    @property
    def empty(self) -> bool:
        """Whether no rule keeps anything.  Such a policy must not remove every point: the user wrote no policy."""
        return self == Policy()


@dataclass(frozen=True, slots=True)
class Batch:
    """
    When a full is merged with the points that follow it.  Without a batch, a prune each night would rewrite a full.

    A full is merged when `points` points can go at once, or when the incrementals among them have stored more than
    `share` percent of what the full has stored.
    """

    points: int = 7
    share: int = 25


@dataclass(frozen=True, slots=True)
class DatedPoint:
    """
    A point as retention sees it: its id, its place in the order, the time at which its backup began, its disks, and
    whether it is pinned.
    """

    point: str
    sequence: int
    started: datetime
    disks: tuple[str, ...]
    pinned: bool = False


TOLERANCE = timedelta(minutes=5)
"""A time that is less than this in the future is accepted: two hosts' clocks differ."""
_SAME = timedelta(days=1)
"""A time that is less than this before the preceding point's time counts as the same time."""
_DISTANCES, _USUAL, _LEAST, _UNKNOWN = 5, 4, timedelta(days=8), timedelta(days=62)
"""A jump is longer than _LEAST and than _USUAL times the usual of _DISTANCES distances; than _UNKNOWN with too few."""
_CONFIRMED, _WEEK = 7, timedelta(days=6)
"""This number of points, over seven nights at least, confirms a jump."""

FUTURE = "its time is in the future"
DISORDER = "its time does not fit the order of the points"
UNCONFIRMED = "not counting those after a jump in time"


def doubts(points: Iterable[DatedPoint], now: datetime) -> dict[str, str]:
    """Find the points of one disk whose times cannot be right; return the reason for each point's id."""
    ordered = sorted(points, key=lambda point: point.sequence)
    past = [point for point in ordered if point.started <= now + TOLERANCE]
    reasons = {point.point: FUTURE for point in ordered if point.started > now + TOLERANCE}
    times = _smoothed([point.started for point in past])
    fitting = _longest_in_order(times)
    reasons.update({point.point: DISORDER for i, point in enumerate(past) if i not in fitting})
    return reasons


def firsts_after_jumps(points: Iterable[DatedPoint]) -> list[DatedPoint]:
    """Find the first point of one disk after each unconfirmed jump; the times of the points must be in order."""
    # A pinned point stays while its neighbours go, so that it does not show how far apart points usually are.
    ordered = sorted((point for point in points if not point.pinned), key=lambda point: point.sequence)
    return [ordered[-after] for after in _after_jumps(_smoothed([point.started for point in ordered]))]


def _smoothed(times: Sequence[datetime]) -> list[datetime]:
    """Return the times without the small steps back that clocks make."""
    smoothed: list[datetime] = []
    for time in times:
        steps_back = bool(smoothed) and timedelta() < smoothed[-1] - time < _SAME
        smoothed.append(smoothed[-1] if steps_back else time)
    return smoothed


def _longest_in_order(times: Sequence[datetime]) -> set[int]:
    """Return the indexes of a longest subsequence that never decreases; of several, one that ends latest."""
    ends: list[datetime] = []
    lengths = []
    for time in times:
        at = bisect_right(ends, time)
        ends[at : at + 1] = [time]
        lengths.append(at + 1)
    chosen: set[int] = set()
    wanted, limit = len(ends), datetime.max.replace(tzinfo=UTC)
    last = max((time for time, length in zip(times, lengths, strict=True) if length == wanted), default=limit)
    for i in reversed(range(len(times))):
        if lengths[i] == wanted and (times[i] == last if wanted == len(ends) else times[i] <= limit):
            chosen.add(i)
            wanted, limit = wanted - 1, times[i]
    return chosen


def _after_jumps(times: Sequence[datetime]) -> Iterator[int]:
    """For each unconfirmed jump, newest first, count the times that follow it."""
    gaps = [later - earlier for earlier, later in pairwise(times)]
    for after in range(1, len(times)):
        if after >= _CONFIRMED and times[-1] - times[-after] >= _WEEK:
            return
        if _is_jump(gaps[-after], gaps[-after - _DISTANCES : -after]):
            yield after


def _is_jump(gap: timedelta, before: Sequence[timedelta]) -> bool:
    """Tell whether a distance is a jump; some distances before it may be long because points were pruned."""
    if len(before) < 2:
        return gap > _UNKNOWN
    return gap > max(_LEAST, _USUAL * sorted(before)[1])


def keep(points: Iterable[DatedPoint], policy: Policy, now: datetime) -> dict[str, tuple[str, ...]]:
    """
    Decide which points to keep; `now` is the time by this host's clock.

    Returns
    -------
    dict
        The ids of the points to keep, each with at least one reason; all other points are to be removed.

    Raises
    ------
    UsageError
        The policy is empty.
    """
    if policy.empty:
        raise UsageError(
            "nothing says which points to keep",
            hint="give --keep-last N or another --keep option, or `retention:` in the configuration",
        )
    newest_first = sorted(points, key=lambda point: point.sequence, reverse=True)
    reasons: dict[str, dict[str, None]] = {point.point: {} for point in newest_first}
    for disk in dict.fromkeys(disk for point in newest_first for disk in point.disks):
        of_disk = [point for point in newest_first if disk in point.disks]
        for point, why in _of_disk(of_disk, policy, now):
            reasons[point][why] = None
    for pinned in (point.point for point in newest_first if point.pinned):
        reasons[pinned]["pinned"] = None
    return {point: tuple(why_kept) for point, why_kept in reasons.items() if why_kept}


def _of_disk(points: Sequence[DatedPoint], policy: Policy, now: datetime) -> Iterable[tuple[str, str]]:
    """Yield the points to keep and the reasons, of the points of one disk, newest first."""
    yield points[0].point, "newest"
    timed = replace(policy, last=0)
    doubtful = {} if timed.empty else doubts(points, now)
    yield from doubtful.items()
    dated = [point for point in points if point.point not in doubtful]
    by_rules = list(_by_rules(points, dated, policy))
    yield from by_rules
    kept = {point for point, _ in by_rules}
    for jumped in firsts_after_jumps(dated):
        before = [point for point in dated if point.sequence < jumped.sequence]
        yield from (
            (point, f"{why}, {UNCONFIRMED}") for point, why in _by_rules((), before, timed) if point not in kept
        )


def _by_rules(points: Sequence[DatedPoint], dated: Sequence[DatedPoint], policy: Policy) -> Iterable[tuple[str, str]]:
    """Yield the points to keep and the reasons, newest first: `points` by the rule `last`, `dated` by the others."""
    if dated and policy.within is not None:
        start = policy.within.before(dated[0].started)
        yield from ((point.point, f"within {policy.within}") for point in dated if point.started > start)
    for rule in RULES:
        yield from _counted(points if rule == "last" else dated, rule, getattr(policy, rule))


def _counted(dated: Sequence[DatedPoint], rule: str, left: int) -> Iterable[tuple[str, str]]:
    """Yield the newest point of each period until `left` are kept; and the oldest of all, if fewer are kept."""
    period = _PERIODS[rule]()
    latest: object = None
    for number, point in enumerate(dated, start=1):
        if not left:
            return
        current = period(point.started)
        if current != latest:
            yield point.point, rule
        elif number == len(dated):
            yield point.point, f"oldest {rule}"
        else:
            continue
        latest, left = current, left - 1


def _each() -> Callable[[datetime], object]:
    numbers = count()
    return lambda _: next(numbers)


def _by(form: str) -> Callable[[], Callable[[datetime], object]]:
    return lambda: lambda moment: moment.strftime(form)


_PERIODS: Mapping[str, Callable[[], Callable[[datetime], object]]] = {
    "last": _each,
    "hourly": _by("%Y%m%d%H"),
    "daily": _by("%Y%m%d"),
    "weekly": _by("%G%V"),
    "monthly": _by("%Y%m"),
    "yearly": _by("%Y"),
}
"""For each rule, a maker of a function that names the period of a time; ISO weeks begin on Mondays."""
