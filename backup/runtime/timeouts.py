"""
Patience: how long the program waits for somebody else, and what it says meanwhile.

A wait for a server, for QEMU or for a program is looked at every moment.  After half a minute without progress the user
is told what the program waits for; after the limit the wait is over, so that a peer that has fallen silent costs one
machine's backup and not those of all machines after it.

Only time in which the program really waited counts: a process that was stopped itself (SIGSTOP, a suspended host) finds
a patient clock.  The limit belongs to the process, as the standard error stream does: the command line sets both once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import ClassVar

from backup.errors import SourceError
from backup.units import show_duration

LIMIT = 300.0
"""Seconds without progress, unless the configuration's `timeout` says otherwise."""
_NOTE_SECONDS = 30.0
"""Seconds until the user is told; told again after twice as long, and so on."""
_LONGEST_LOOK = 1.0
"""Seconds between two looks that count at most: looks come ten times a second while the process runs."""


class Silent(SourceError):
    """Whatever the program waited for did not come."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(
            f"no answer within {show_duration(seconds)}: waiting for {what}",
            hint="see whether it, or the storage below it, hangs; `timeout` in the configuration sets the limit",
        )


class _State:
    """The process's settings, and what was said when."""

    limit: float = LIMIT
    say: Callable[[str], None] = staticmethod(lambda _text: None)
    said: ClassVar[dict[str, float]] = {}
    lock = threading.Lock()


def set_limit(seconds: float) -> None:
    """Set how long each wait without progress may last."""
    _State.limit = seconds


def limit(most: float | None = None) -> float:
    """Return the limit of a wait (seconds) that never lasts longer than `most`."""
    return _State.limit if most is None else min(_State.limit, most)


def told_by(say: Callable[[str], None]) -> None:
    """Set who tells the user what the program waits for; called from any thread."""
    _State.say = say


class Wait:
    """
    A wait for `what`, which ends after `seconds` without progress.  Used by one thread at a time.

    `look` is to be called several times a second while nothing comes, `resume` before a first look that may come long
    after the last one, `progressed` when something came.
    """

    __slots__ = ("_next_note", "_seconds", "_seen", "_waited", "_what")

    def __init__(self, what: str, seconds: float | None = None) -> None:
        self._what = what
        self._seconds = limit(seconds)
        self._waited = 0.0
        self._next_note = _NOTE_SECONDS
        self._seen = time.monotonic()

    def resume(self) -> None:
        """Begin to listen: the time since the last look was not spent on waiting."""
        self._seen = time.monotonic()

    def progressed(self) -> None:
        """Begin anew: something came."""
        self._waited, self._next_note = 0.0, _NOTE_SECONDS

    def look(self) -> None:
        """
        Note that still nothing came.

        Raises
        ------
        Silent
            The limit is reached.
        """
        now = time.monotonic()
        self._waited += min(now - self._seen, _LONGEST_LOOK)
        self._seen = now
        if self._waited >= self._seconds:
            raise Silent(self._what, self._seconds)
        if self._waited >= self._next_note:
            self._next_note *= 2
            _tell(f"waiting for {self._what} since {show_duration(self._waited)}")


def _tell(text: str) -> None:
    """Tell the user once, however many connections wait for the same."""
    with _State.lock:
        now = time.monotonic()
        if now - _State.said.get(text, -_NOTE_SECONDS) < _NOTE_SECONDS:
            return
        _State.said[text] = now
    _State.say(text)
