"""
SIGINT, SIGTERM and SIGHUP, raised as `Interrupted` between two lines of the main thread.

Two kinds of code would lose such an exception.  A C library that calls back into Python may print the exception and
drop it: `deferred` delays the signal until such a call is over.  Python itself drops exceptions where an object ends
(in the callback of a weak reference, in the close of a generator): a timer raises `Interrupted` again a moment later.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from backup.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RAISE_AGAIN_SECONDS = 0.01
"""Delay before a dropped `Interrupted` is raised again."""


class _Handler:
    """State of the signal handler.  There is one, since a process has one main thread."""

    deferring = False
    waiting: int | None = None
    """The signal that arrived while signals were deferred."""
    arrived = 0
    """The signal that arrived."""


def catch() -> None:
    """Install the handler, except for signals that the parent process ignores (a shell's background job, nohup)."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    sys.unraisablehook = _raise_again


@contextmanager
def deferred() -> Iterator[None]:
    """
    Delay signals until the end of the block.  Use this only in the main thread, and only for calls that are short.

    Blocks may be nested; the outermost one ends the delay.
    """
    outer, _Handler.deferring = _Handler.deferring, True
    try:
        yield
    finally:
        _Handler.deferring = outer
        if not outer:
            waiting, _Handler.waiting = _Handler.waiting, None
            if waiting is not None:
                raise Interrupted(waiting)


def to_the_end(tidy_up: Callable[[], None]) -> None:
    """
    Call `tidy_up`, which a signal must not leave half done.

    If a signal interrupts the call, the call is repeated and the signal is raised afterwards.  Once is enough, because
    the handler ignores all further signals (`_handle`).
    """
    try:
        tidy_up()
    except Interrupted:
        tidy_up()
        raise


def _handle(number: int, _frame: object) -> None:
    # Later signals are ignored: the program now tidies up, and a second signal must not interrupt that.
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    _Handler.arrived = number
    # Python would warn about each coroutine that was created and now never runs.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    _deliver()


def _deliver() -> None:
    if _Handler.deferring:
        _Handler.waiting = _Handler.arrived
    else:
        raise Interrupted(_Handler.arrived)


def _raise_again(dropped: sys.UnraisableHookArgs) -> None:
    """Raise an `Interrupted` that Python dropped once more, from a timer (a hook of sys.unraisablehook)."""
    if not isinstance(dropped.exc_value, Interrupted):
        sys.__unraisablehook__(dropped)
        return
    signal.signal(signal.SIGALRM, lambda *_: _deliver())
    signal.setitimer(signal.ITIMER_REAL, _RAISE_AGAIN_SECONDS)
