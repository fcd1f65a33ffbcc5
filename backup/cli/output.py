"""
What people and scripts see.  Values in, text out; the only user of rich.

The rules of the output: results go to standard output, everything else to standard error.  `--json` puts one document
on standard output.  A bar is drawn on a terminal only; without one there are no escape codes and one line per disk.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from backup.cli.streams import mute
from backup.errors import BackupError, Damaged, Interrupted, UsageError
from backup.model.names import without_password
from backup.runtime.progress import Progress, Quiet
from backup.units import show_rate, show_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from backup.operations.verify import Problem


SPOOL = 1 << 20
"""Characters kept in memory before a document goes to a temporary file."""


def plain(text: object) -> str:
    """Text without control characters: names and messages may come from an untrusted manifest or image."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def error(problem: BackupError | Interrupted, of: str | None = None) -> None:
    """Two lines: what happened (to the machine `of`), what to do.  A list of problems has a line for each."""
    place = f"{of}: " if of else ""
    listed = isinstance(problem, UsageError) and problem.listed
    for text in problem.message.split("\n") if listed else [problem.message]:
        err(f"pybackup: error: {plain(place + text)}")
    err(f"pybackup: hint: {plain(problem.hint)}")


def traceback(problem: BaseException) -> None:
    """Where an error comes from, for --debug."""
    from traceback import format_exception

    err("".join(format_exception(problem)).rstrip())


def warning(text: str) -> None:
    """One line on standard error."""
    err(f"pybackup: warning: {plain(text)}")


def note(text: str, *, to_stderr: bool) -> None:
    """One line that needs no action."""
    (err if to_stderr else line)(f"pybackup: note: {plain(text)}")


def to_stderr(text: str) -> None:
    """One line on standard error."""
    err(text)


def line(text: str) -> None:
    """One line on standard output."""
    out(text + "\n")


def document(value: object) -> None:
    """One JSON document on standard output."""
    import json

    out(json.dumps(value, indent=2) + "\n")


def flush() -> None:
    """
    Have standard output written.

    Raises
    ------
    Failed
        It cannot be, or its reader is gone (ReaderGone); from then on it goes nowhere.
    """
    sys.stdout.flush()


def out(text: str) -> None:
    """Write text to standard output as it is."""
    sys.stdout.write(text)


def err(text: str) -> None:
    """Write a line to standard error, without passwords."""
    try:
        sys.stderr.write(without_password(text) + "\n")
    except OSError:
        mute(sys.stderr)  # nobody is left to be told


def error_object(problem: BackupError | Interrupted) -> dict[str, Any]:
    """An error as scripts see it; of damage with the ranges of the disk that it affects, where they are known."""
    found = {"code": problem.exit_code, "message": problem.message, "hint": problem.hint}
    ranges = problem.ranges if isinstance(problem, Damaged) else ()
    return {**found, "ranges": [{"start": low, "length": high - low} for low, high in ranges]} if ranges else found


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Columns as wide as their content; plain text, so that it can be cut and searched."""
    cells = [list(columns), *([plain(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        aligned = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line("  ".join(aligned).rstrip())


class OnBar:
    """Progress on a terminal's bar (a `progress.Progress`)."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._began = 0.0

    def begin(self, disk: str, total: int) -> None:
        """Start the next bar."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._began = time.monotonic()
        self._task = self._bar.add_task(plain(disk), total=total, rate="")

    def advance(self, done: int) -> None:
        """Move it."""
        if self._task is not None:
            # rich's own column of the rate counts in powers of ten, beside sizes in powers of two.
            rate = show_rate(done, time.monotonic() - self._began)
            self._bar.update(self._task, completed=done, rate=rate)


@contextmanager
def progress(*, wanted: bool) -> Iterator[Progress]:
    """A bar with bytes, rate and time left where standard error is a terminal; nothing elsewhere."""
    if not wanted or not sys.stderr.isatty():
        yield Quiet()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=console.is_dumb_terminal) as bar:
        yield OnBar(bar)


def problem_objects(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Problems as scripts see them."""
    return [{"machine": p.machine, "point": p.point, "disk": p.disk, **error_object(p.error)} for p in problems]


def problem(found: Problem) -> None:
    """Two lines for one problem that `verify` found."""
    place = "/".join(part for part in (found.machine, found.point, found.disk) if part)
    err(f"pybackup: error: {plain(place)}: {plain(found.error.message)}")
    err(f"pybackup: hint: {plain(found.error.hint)}")


def freed_text(freed: int) -> str:
    """Say how much space was freed, or how much more is used: bytes, negative where a rewrite grew."""
    return f"{show_size(freed)} freed" if freed >= 0 else f"{show_size(-freed)} more"
