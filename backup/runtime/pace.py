"""Keeps what several threads move below so many bytes a second, for production hours."""

from __future__ import annotations

import threading
import time


class Pace:
    """
    Spreads reads or writes over time.  Safe to use from several threads.

    Parameters
    ----------
    limit : int or None
        Bytes a second, of all threads together; None: no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._next = 0.0
        self._lock = threading.Lock()

    def keep(self, length: int, stop: threading.Event) -> bool:
        """Wait until `length` bytes may be moved; False where `stop` is set before."""
        seconds = self.wait(length, time.monotonic())
        return seconds <= 0 or not stop.wait(seconds)

    def due(self, length: int) -> float:
        """When (time.monotonic) `length` bytes may be moved; that time is taken now."""
        now = time.monotonic()
        return now + self.wait(length, now)

    def wait(self, length: int, now: float) -> float:
        """Seconds to wait at the time `now` (seconds) before `length` bytes are moved; their time is taken then."""
        if self._limit is None:
            return 0.0
        with self._lock:
            begin = max(now, self._next)
            self._next = begin + length / self._limit
            return begin - now
