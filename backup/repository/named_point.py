"""Find the point of a machine that a text names: the newest, one by its id or a part of the id, or one by a day."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, date, datetime, time, timedelta

from backup.errors import Damaged, NotFound, UsageError
from backup.model import chain as chains
from backup.model.documents import moment_of
from backup.model.manifest import Manifest, is_point_id
from backup.repository.machine import Contents

LATEST = ("", "latest")
"""The texts that mean the newest point: MACHINE alone, and MACHINE/latest."""
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_PART_OF_ID = re.compile(r"[0-9TZa-f-]+")
_SHOWN = 10


def pick(machine: str, contents: Contents, text: str) -> Manifest:
    """
    Return the point of a machine that `text` names.

    Raises
    ------
    NotFound
        The machine has no such point.
    UsageError
        Several points fit, or the text is no valid day.
    Damaged
        The manifest cannot be read, or a manifest that cannot be read may be the point that is meant.
    """
    if text in LATEST:
        return _newest(machine, contents, None)
    if _DAY.fullmatch(text):
        return _newest(machine, contents, _end_of(text))
    ids = [*contents.manifests, *(name.removesuffix(".json") for name in contents.damaged)]
    fitting = matching(ids, text)
    if not fitting:
        raise NotFound(f"machine {machine} has no point {text}", hint=f"see: `pybackup list {machine}`")
    if len(fitting) > 1:
        raise ambiguous(text, fitting)
    damaged = contents.damaged.get(f"{fitting[0]}.json")
    if damaged is not None:
        raise damaged
    return contents.manifests[fitting[0]]


def matching(points: Iterable[str], text: str) -> list[str]:
    """Return the point id that equals `text`, or else all ids that begin or end with `text`."""
    ids = sorted(point for point in points if is_point_id(point))
    if text in ids:
        return [text]
    if not _PART_OF_ID.fullmatch(text):
        return []
    return [point for point in ids if point.startswith(text) or point.endswith(text)]


def ambiguous(text: str, found: list[str]) -> UsageError:
    """Return the error for a text that fits several points; it lists them."""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return UsageError(
        f"{text!r} fits {len(found)} points: {', '.join(found[:_SHOWN])}{more}",
        hint="write more of the point's id; its last eight characters are random and nearly always unique",
    )


def _newest(machine: str, contents: Contents, end: datetime | None) -> Manifest:
    """Return the newest point (by sequence) of those that began before `end`, or of all if `end` is None."""
    some = [point for point in contents.manifests.values() if end is None or moment_of(point.started) < end]
    newest = chains.newest_manifest(some)
    for name, error in contents.damaged.items():
        # The damaged manifest may have the highest sequence; an older point must not pass for the newest.
        if end is None or (_in_id(name) < end and (newest is None or name > f"{newest.point}.json")):
            raise Damaged(
                f"machine {machine} has a manifest that cannot be read, which may be "
                f"{'its latest point' if end is None else 'the point that is meant'}: {error.message}",
                hint=f"name a point: `pybackup list {machine}`",
            )
    if newest is not None:
        return newest
    if end is None or not contents.manifests:
        raise NotFound(f"machine {machine} has no point", hint=f"see: `pybackup list {machine}`")
    oldest = min(contents.manifests.values(), key=lambda point: point.sequence)
    raise NotFound(
        f"machine {machine} has no point that began before {end:%Y-%m-%d %H:%M:%S %Z}",
        hint=f"its oldest point is {oldest.point}; see `pybackup list {machine}`",
    )


def _in_id(name: str) -> datetime:
    """Return the time in a point's id, the only evidence of when a damaged manifest was made."""
    try:
        return datetime.strptime(f"{name[:15]}+0000", "%Y%m%dT%H%M%S%z")
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)


def _end_of(day: str) -> datetime:
    """Return the end of a day, local time."""
    try:
        return datetime.combine(date.fromisoformat(day) + timedelta(days=1), time()).astimezone()
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"{day!r} is not a day", hint="write it as 2026-11-28; MACHINE/2026-11-28") from None
