"""Select the points that `pybackup list` shows.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from backup.errors import UsageError
from backup.model.documents import moment_of
from backup.model.manifest import Manifest
from backup.repository.named_files import NamedPoint
from backup.units import parse_duration


@dataclass(frozen=True, slots=True)
class Selection:
    """
    Which points of a machine are wanted.

    Parameters
    ----------
    last : int or None
        At most so many of the newest points.
    since : datetime or None
        Only points that began at this time or later.
    disk : str or None
        Only points that hold this disk.
    """

    last: int | None = None
    since: datetime | None = None
    disk: str | None = None

    def of(self, points: Iterable[Manifest]) -> list[Manifest]:
        """Return the wanted points of one machine, ascending by sequence number."""
        chosen = [
            point
            for point in points
            if (self.since is None or moment_of(point.started) >= self.since)
            and (self.disk is None or point.disk(self.disk) is not None)
        ]
        chosen.sort(key=lambda point: point.sequence)
        return chosen if self.last is None else chosen[-self.last :]

    def of_named(self, points: Iterable[NamedPoint]) -> list[NamedPoint]:
        """Return the wanted points of one machine, of which only the files' names are known, oldest first."""
        chosen = [
            point
            for point in points
            if (self.since is None or point.began >= self.since) and (self.disk is None or self.disk in point.disks)
        ]
        return chosen if self.last is None else chosen[-self.last :]


def parse_since(text: str, now: datetime) -> datetime:
    """
    Read the beginning of a period: a day in local time (2026-11-28), or a duration before `now` (7d).

    Raises
    ------
    UsageError
        The text is neither.
    """
    try:
        return datetime.combine(date.fromisoformat(text), time()).astimezone()
    except (ValueError, OverflowError, OSError):
        pass
    try:
        return now - timedelta(seconds=parse_duration(text))
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)
    except UsageError:
        raise UsageError(
            f"{text!r} is neither a day nor a duration", hint="write a day, 2026-11-28, or a duration, 7d"
        ) from None
