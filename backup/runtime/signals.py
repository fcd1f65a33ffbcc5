"""
SIGINT, SIGTERM and SIGHUP as `Interrupted`, raised between two lines of the main thread.

A library that calls back into Python may print and swallow what is raised there; around such a call `held` keeps the
signal until the call is over.  Python itself swallows what is raised where an object ends (a weak reference's callback,
a generator's close); then it is raised once more, a moment later.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from backup.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_A_MOMENT = 0.01
"""Seconds."""


class _State:
    """The one handler's state, of a process that has one main thread."""

    held = False
    waiting: int | None = None
    came = 0
    """The number of the signal that came."""


def catch() -> None:
    """Install the handler, but for signals that our parent had ignored (a shell's background job, nohup)."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    sys.unraisablehook = _swallowed


@contextmanager
def held() -> Iterator[None]:
    """
    Keep a signal back until the block ends; only in the main thread, and only around what takes moments.

    A block within another one changes nothing.
    """
    outer, _State.held = _State.held, True
    try:
        yield
    finally:
        _State.held = outer
        if not outer:
            waiting, _State.waiting = _State.waiting, None
            if waiting is not None:
                raise Interrupted(waiting)


def to_the_end(tidy_up: Callable[[], None]) -> None:
    """Tidy up, and once more where a signal cut it off, which is raised then: no second signal comes (`_handle`)."""
    try:
        tidy_up()
    except Interrupted:
        tidy_up()
        raise


def _handle(number: int, _frame: object) -> None:
    # One signal is enough: what follows is tidying up, which a second one must not cut off.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    _State.came = number
    # Python says so of a coroutine that was made and, now, is not run.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    _deliver()


def _deliver() -> None:
    if _State.held:
        _State.waiting = _State.came
    else:
        raise Interrupted(_State.came)


def _swallowed(found: sys.UnraisableHookArgs) -> None:
    if not isinstance(found.exc_value, Interrupted):
        sys.__unraisablehook__(found)
        return
    signal.signal(signal.SIGALRM, lambda *_: _deliver())
    signal.setitimer(signal.ITIMER_REAL, _A_MOMENT)
