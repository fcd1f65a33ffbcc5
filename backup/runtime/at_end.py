"""Functions that run just before the process ends, however its work ended: to give back what a server holds for it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from backup.errors import BackupError
from backup.runtime.ignoring import ignoring

_log = logging.getLogger(__name__)
_functions: list[Callable[[], None]] = []


def call(function: Callable[[], None]) -> None:
    """Call `function` when the process ends; its errors are only logged."""
    _functions.append(function)


def forget(function: Callable[[], None]) -> None:
    """Do not call `function`; no error if it was not to be called."""
    if function in _functions:
        _functions.remove(function)


def run() -> None:
    """Call the functions, the last first, each once."""
    while _functions:
        function = _functions.pop()
        with ignoring(_log, "at the end of the process", OSError, BackupError):
            function()
