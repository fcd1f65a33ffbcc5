"""
Work for the moments in which the main thread waits for another program, such as QEMU's or libvirt's.

Modules that take long to import are imported in such moments.  A thread of its own would not do: each thread that
waits for short answers would wait for Python's global lock as well, up to 5 ms for each answer.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module

_left: deque[Callable[[], object]] = deque()


def leave_imports(modules: Iterable[str]) -> None:
    """Leave it to such moments to import these modules, in this order; what is needed earlier is imported there."""
    _left.clear()
    _left.extend(partial(import_module, module) for module in modules)


def work(over: Callable[[], bool]) -> None:
    """Do what is left, piece by piece, until the wait is `over`.  Other threads than the main thread do nothing."""
    while _left and threading.current_thread() is threading.main_thread() and not over():
        _left.popleft()()
