"""
Which points to keep: the words and the meaning are restic's (its manual, "Removing snapshots according to a policy").

Points are looked at from the newest to the oldest.  `daily: 7` keeps the newest point of each of the last seven days
that have one; days without any don't count.  A point that one rule keeps counts for the others as well.  `within` keeps
what is no older than so long before the newest point.  Where there are fewer days than are asked for, the oldest point
is kept besides, so that the history grows to its full length.

Each disk is judged by the points that hold it: of a machine whose disks are backed up by separate runs, none takes the
other's place.  Its newest point is always kept, and so is what is pinned.  Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count

from backup.errors import UsageError

RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
"""What can be counted, in the order in which reasons are shown."""

MAX_COUNT = 1_000_000_000

_DURATION = re.compile(r"(?:([0-9]{1,4})y)?(?:([0-9]{1,5})m)?(?:([0-9]{1,5})w)?(?:([0-9]{1,6})d)?(?:([0-9]{1,7})h)?")


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of time as the calendar counts it: a month is as long as it is."""

    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0

    @classmethod
    def parse(cls, text: str) -> Duration:
        """
        Read "30d", "12h", "2w", "6m" (months), "1y", or several from long to short: "1y6m".

        Raises
        ------
        UsageError
            Anything else, or no time at all.
        """
        match = _DURATION.fullmatch(text)
        years, months, weeks, days, hours = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0, 0)
        found = cls(years, months, 7 * weeks + days, hours)
        if found == cls():
            raise UsageError(
                f"{text!r} is not a duration",
                hint="write 30d, 12h, 2w, 6m (months), 1y, or several from long to short, as 1y6m",
            )
        return found

    def before(self, moment: datetime) -> datetime:
        """
        The moment so long before; the earliest there is, where the calendar ends.

        A day that the month lacks counts on into the next month, as restic has it: a month before 31 March is 3 March.
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
    """How many points to keep by each rule, and for how long all of them; 0 and None: that rule keeps nothing."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Duration | None = None

    @property
    def empty(self) -> bool:
        """Does no rule keep anything?  Such a policy is no wish to remove everything."""
        return self == Policy()


@dataclass(frozen=True, slots=True)
class Batch:
    """
    When a full is merged with what follows it: when so many points can go at once, or when the incrementals among
    these have stored more than `share` percent of what the full has.  A prune each night would else write the full anew
    each night.
    """

    points: int = 7
    share: int = 25


@dataclass(frozen=True, slots=True)
class Moment:
    """
    A point as retention sees it: its id, its place in the order, when it began (None: its manifest does not say so
    that it could be read), the disks it holds, and whether it is pinned.
    """

    point: str
    sequence: int
    started: datetime | None
    disks: tuple[str, ...]
    pinned: bool = False


def parse_time(text: str) -> datetime | None:
    """Read a manifest's time, UTC; None where it is none."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def keep(points: Iterable[Moment], policy: Policy) -> dict[str, tuple[str, ...]]:
    """
    Decide which points to keep.

    Returns
    -------
    dict
        The ids of the points to keep, each with its reasons, at least one; the others are to go.

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
        held = [point for point in newest_first if disk in point.disks]
        for point, why in _of_disk(held, policy):
            reasons[point][why] = None
    for pinned in (point.point for point in newest_first if point.pinned):
        reasons[pinned]["pinned"] = None
    return {point: tuple(found) for point, found in reasons.items() if found}


def _of_disk(points: Sequence[Moment], policy: Policy) -> Iterable[tuple[str, str]]:
    """Points to keep and why, of those that hold one disk, newest first."""
    yield points[0].point, "newest"
    dated = [(point.point, point.started) for point in points if point.started is not None]
    for point in points:
        if point.started is None:
            yield point.point, "its time cannot be read"
    if dated and policy.within is not None:
        start = policy.within.before(dated[0][1])
        yield from ((point, f"within {policy.within}") for point, started in dated if started > start)
    for rule in RULES:
        yield from _counted(dated, rule, getattr(policy, rule))


def _counted(dated: Sequence[tuple[str, datetime]], rule: str, left: int) -> Iterable[tuple[str, str]]:
    """The newest point of each period, until so many are kept; and the oldest of all, where some are left."""
    period = _PERIODS[rule]()
    latest: object = None
    for number, (point, started) in enumerate(dated, start=1):
        if not left:
            return
        found = period(started)
        if found != latest:
            yield point, rule
        elif number == len(dated):
            yield point, f"oldest {rule}"
        else:
            continue
        latest, left = found, left - 1


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
"""For each rule a maker of what names a moment's period; weeks are ISO's, which begin on Mondays."""
