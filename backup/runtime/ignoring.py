"""Errors that do not matter: the program continues, and the log shows them at the debug level."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import Logger


@contextmanager
def ignoring(log: Logger, what: str, *kinds: type[Exception]) -> Iterator[None]:
    """End the block at an error of one of these kinds, and log the error; `what` says what was attempted."""
    try:
        yield
    except kinds as error:
        log.debug("%s: %s: %s", what, type(error).__name__, error)
