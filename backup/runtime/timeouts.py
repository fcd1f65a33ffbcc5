"""
Waiting for a server, for QEMU or for a program: how long, and what the user reads meanwhile.

After half a minute without progress a message tells the user what the program waits for.  After the limit the wait ends
with an error, so that one hanging peer costs the backup of one machine and not those of all machines after it.

Time in which this process was stopped (SIGSTOP, a suspended host) does not count.  The limit and the receiver of the
messages belong to the whole process: the command line sets them once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import ClassVar

from backup.errors import SourceError
from backup.units import show_duration

LIMIT = 300.0
"""Default limit in seconds without progress; `timeout` in the configuration changes the limit."""
_NOTE_SECONDS = 30.0
"""Seconds until the first message; each further message comes after twice the time."""
_LONGEST_LOOK = 1.0
"""
Seconds that count at most between two calls of `Wait.look`.  A running process makes ten calls a second, so that a
longer gap means that the process was stopped.
"""


class TimedOut(SourceError):
    """A peer did not answer, or did not make progress, within the limit."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(
            f"no answer within {show_duration(seconds)}: waiting for {what}",
            hint="does the peer, or the storage below it, hang? `timeout` in the configuration sets the limit",
        )


class _Settings:
    """The settings of the process, and when each message was last shown."""

    limit: float = LIMIT
    show: Callable[[str], None] = staticmethod(lambda _text: None)
    shown: ClassVar[dict[str, float]] = {}
    lock = threading.Lock()


def set_limit(seconds: float) -> None:
    """Set how long each wait without progress may last."""
    _Settings.limit = seconds


def limit_within(most: float | None = None) -> float:
    """Return the limit in seconds, or `most` (seconds) if that is shorter."""
    return _Settings.limit if most is None else min(_Settings.limit, most)


def show_with(show: Callable[[str], None]) -> None:
    """Set the function that shows the user what the program waits for.  Any thread may call the function."""
    _Settings.show = show


class Wait:
    """
    One wait for `what`; it ends with an error after `seconds` without progress.  Used by one thread at a time.

    Call `look` several times a second while nothing arrives, `progressed` when something arrives, and `resume` before
    the first look after a pause in which the program did not wait.
    """

    __slots__ = ("_next_note", "_seconds", "_seen", "_waited", "_what")

    def __init__(self, what: str, seconds: float | None = None) -> None:
        self._what = what
        self._seconds = limit_within(seconds)
        self._waited = 0.0
        self._next_note = _NOTE_SECONDS
        self._seen = time.monotonic()

    def resume(self) -> None:
        """Continue after a pause: the time since the last look does not count."""
        self._seen = time.monotonic()

    def progressed(self) -> None:
        """Start the time anew, because something arrived."""
        self._waited, self._next_note = 0.0, _NOTE_SECONDS

    def look(self) -> None:
        """
        Count the time in which nothing arrived.

        Raises
        ------
        TimedOut
            The limit is reached.
        """
        now = time.monotonic()
        self._waited += min(now - self._seen, _LONGEST_LOOK)
        self._seen = now
        if self._waited >= self._seconds:
            raise TimedOut(self._what, self._seconds)
        if self._waited >= self._next_note:
            self._next_note *= 2
            _show_once(f"waiting for {self._what} since {show_duration(self._waited)}")


def _show_once(text: str) -> None:
    """Show a message once, even if several connections wait for the same thing."""
    with _Settings.lock:
        now = time.monotonic()
        if now - _Settings.shown.get(text, -_NOTE_SECONDS) < _NOTE_SECONDS:
            return
        _Settings.shown[text] = now
    _Settings.show(text)
