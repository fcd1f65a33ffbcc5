"""
Threads that share a stream of jobs, while the calling thread shows how far they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

_T = TypeVar("_T")
_TICK = 0.1
"""Seconds between looks at progress and signals."""


def in_threads(
    jobs: Iterable[_T],
    work: Callable[[_T], None],
    threads: int,
    show: Callable[[], None],
    stop: threading.Event | None = None,
) -> None:
    """
    Do all jobs; the first error, or a signal in this thread, stops them, and is raised when all threads have ended.

    Parameters
    ----------
    show : callable
        Called in this thread, again and again.
    stop : Event, optional
        Set when the jobs are to stop, for a long one to look at.
    """
    stop = stop or threading.Event()
    lock = threading.Lock()
    left = iter(jobs)
    errors: list[BaseException] = []

    def pull() -> None:
        try:
            while not stop.is_set():
                with lock:
                    if (job := next(left, None)) is None:
                        return
                work(job)
        except BaseException as error:  # noqa: BLE001 - carried to the calling thread, which raises it
            errors.append(error)
            stop.set()

    pool = [threading.Thread(target=pull) for _ in range(threads)]
    try:
        for thread in pool:
            thread.start()
        for thread in pool:
            while thread.is_alive():
                thread.join(_TICK)
                show()
    finally:
        stop.set()
        for thread in pool:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]
