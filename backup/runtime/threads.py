"""
Threads: workers that are started together, stopped by the first error or signal, and joined before the caller
continues; and single calls that go on while the caller does something else.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")
_TICK = 0.1
"""Seconds between two calls that show progress, and between two chances to notice a signal."""


def run_threads(
    work: Callable[[], None],
    threads: int,
    show: Callable[[], None],
    halt: Callable[[], None],
    feed: Callable[[], None] = lambda: None,
) -> None:
    """
    Call `work` in several threads and wait until all of them have ended.

    Parameters
    ----------
    show : callable
        Shows progress.  Called in this thread, ten times a second.
    halt : callable
        Makes all threads return soon.  Called at the first error, and when an error or a signal interrupts this thread.
    feed : callable
        Produces the work.  Called in this thread after the others have started; must return soon after `halt`.

    Raises
    ------
    BaseException
        The first error of any thread, or the signal.  By then all threads have ended.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the calling thread raises it
            errors.append(error)
            halt()

    pool = [threading.Thread(target=guarded) for _ in range(threads)]
    try:
        for thread in pool:
            thread.start()
        feed()
        for thread in pool:
            # With a time limit, since a thread that waits in join() does not notice signals.
            while thread.is_alive():
                thread.join(_TICK)
                show()
    except Exception:
        # The error of a thread may be the cause of this one, and is more exact.
        if not errors:
            raise
    finally:
        if any(thread.is_alive() for thread in pool):
            halt()
        for thread in pool:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]


def in_threads(
    jobs: Iterable[_T],
    work: Callable[[_T], None],
    threads: int,
    show: Callable[[], None],
    stop: threading.Event | None = None,
) -> None:
    """
    Do all jobs of a stream in several threads, each job in the next free thread.

    The first error, or a signal in this thread, stops the threads after their present jobs.

    Parameters
    ----------
    show : callable
        Shows progress.  Called in this thread, ten times a second.
    stop : Event, optional
        Is set when the jobs must stop.  A long job should check the event from time to time.

    Raises
    ------
    BaseException
        The first error of any job, or the signal.  By then all threads have ended.
    """
    stopped = stop or threading.Event()
    lock = threading.Lock()
    stream = iter(jobs)

    def pull() -> None:
        while not stopped.is_set():
            with lock:
                if (job := next(stream, None)) is None:
                    return
            work(job)

    run_threads(pull, threads, show, stopped.set)


class Turns:
    """
    Lets the threads of `in_threads` do one step of their jobs in the order of the jobs, which are numbered from 0.

    Parameters
    ----------
    stop : Event
        The event of `in_threads`; when it is set, no turn comes any more.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._next = 0
        self._changed = threading.Condition()

    def take(self, number: int, step: Callable[[], None]) -> None:
        """Wait for the steps of all jobs before `number`, and do this one's; skip it where the jobs must stop."""
        with self._changed:
            while self._next != number:
                if self._stop.is_set():
                    return
                self._changed.wait(_TICK)
        step()
        with self._changed:
            self._next = number + 1
            self._changed.notify_all()


class Begun(Generic[_T]):
    """
    A call in a thread of its own, which has begun; the process does not wait for its end.

    Parameters
    ----------
    name : str
        The thread's.
    """

    def __init__(self, call: Callable[[], _T], name: str) -> None:
        self._answers: queue.SimpleQueue[Callable[[], _T]] = queue.SimpleQueue()
        self._answer: Callable[[], _T] | None = None
        threading.Thread(target=self._work, args=(call,), name=name, daemon=True).start()

    def _work(self, call: Callable[[], _T]) -> None:
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 - raised where the result is asked for
            self._answers.put(_raising(error))
        else:
            self._answers.put(lambda: result)

    def ends_within(self, seconds: float) -> bool:
        """Wait for the end of the call, but no longer than `seconds`; tell whether the call has ended."""
        if self._answer is None:
            with suppress(queue.Empty):
                self._answer = self._answers.get(timeout=seconds)
        return self._answer is not None

    def result(self, look: Callable[[], None]) -> _T:
        """
        Wait for the end of the call and return its result, or raise its error; signals are noticed meanwhile.

        `look` is called ten times a second, and may raise an error to end the waiting.
        """
        while self._answer is None:
            try:
                self._answer = self._answers.get(timeout=_TICK)
            except queue.Empty:
                look()
        return self._answer()


def _raising(error: Exception) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer
