"""A limit of bytes a second that several threads share, for backups during working hours."""

from __future__ import annotations

import threading
import time


class Pace:
    """
    Spreads reads or writes over time, so that they stay below a limit.  Safe to use from several threads.

    Parameters
    ----------
    limit : int or None
        Bytes a second, for all threads together.  None: no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._next = 0.0
        self._lock = threading.Lock()

    def keep(self, length: int, stop: threading.Event) -> bool:
        """Wait until `length` more bytes may be moved.  Return False if `stop` was set during the wait."""
        seconds = self.wait(length, time.monotonic())
        return seconds <= 0 or not stop.wait(seconds)

    def due(self, length: int) -> float:
        """Reserve the time for `length` bytes; return when (time.monotonic) they may be moved."""
        now = time.monotonic()
        return now + self.wait(length, now)

    def wait(self, length: int, now: float) -> float:
        """Reserve the time for `length` bytes; return how many seconds after `now` (seconds) they may be moved."""
        if self._limit is None:
            return 0.0
        with self._lock:
            begin = max(now, self._next)
            self._next = begin + length / self._limit
            return begin - now
