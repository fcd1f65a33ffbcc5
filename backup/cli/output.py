"""
What people see: lines, tables, errors and the progress bar.  The only user of rich.

Results go to standard output, everything else to standard error.  A bar is drawn on a terminal only; without a terminal
there are no escape codes, and one line for each disk.  With --json, `json_output` writes the result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from backup.cli.streams import mute
from backup.errors import BackupError, Interrupted, UsageError
from backup.model.names import without_password
from backup.runtime.progress import Progress, Quiet
from backup.units import counted, show_rate, show_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from backup.operations.prune import Report as PruneReport
    from backup.operations.verify import Problem


# Text


def plain(text: object) -> str:
    """Replace control characters: names and messages may come from an untrusted manifest or image."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def out(text: str) -> None:
    """Write text to standard output as it is."""
    sys.stdout.write(text)


def line(text: str) -> None:
    """Write a line to standard output."""
    out(text + "\n")


def err(text: str) -> None:
    """Write a line to standard error, without passwords."""
    try:
        sys.stderr.write(without_password(text) + "\n")
    except OSError:
        mute(sys.stderr)  # there is no other place for messages


def flush() -> None:
    """
    Write what standard output still buffers.

    Raises
    ------
    Failed
        Standard output cannot be written, or its reader has ended (ReaderGone).  Later output is discarded.
    """
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Write a table in plain text, for `cut` and `grep`; `right` are the columns that are aligned to the right."""
    cells = [list(columns), *([plain(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        aligned = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line("  ".join(aligned).rstrip())


def freed_text(freed: int) -> str:
    """Say how many bytes were freed, or, if `freed` is negative, how many more are used."""
    return f"{show_size(freed)} freed" if freed >= 0 else f"{show_size(-freed)} more"


def pruned_line(report: PruneReport, *, dry_run: bool) -> str:
    """Return one line for a machine that was pruned, or would be."""
    waiting = f", {report.waiting} waiting" if report.waiting else ""
    return (
        f"{report.machine}: {'would remove' if dry_run else 'removed'} {report.removed} of "
        f"{counted(len(report.points), 'point')}{waiting}, {counted(len(report.rewrites), 'data file')} rewritten, "
        f"{freed_text(report.freed_bytes)}"
    )


# Messages


def error(shown: BackupError | Interrupted, of: str | None = None) -> None:
    """Write what happened (to the machine `of`) and what to do; a list of problems has a line for each."""
    listed = isinstance(shown, UsageError) and shown.listed
    _error_lines(of, shown.message.split("\n") if listed else [shown.message], shown.hint)


def problem(shown: Problem) -> None:
    """Write a problem of `verify` or `copy`: where, what is wrong, and what to do."""
    place = "/".join(part for part in (shown.machine, shown.point, shown.disk) if part)
    _error_lines(place, [shown.error.message], shown.error.hint)


def _error_lines(place: str | None, messages: Sequence[str], hint: str) -> None:
    for message in messages:
        err(f"pybackup: error: {plain(f'{place}: {message}' if place else message)}")
    err(f"pybackup: hint: {plain(hint)}")


def traceback(shown: BaseException) -> None:
    """Write where an error comes from, for --debug."""
    from traceback import format_exception

    err("".join(format_exception(shown)).rstrip())


def warning(text: str) -> None:
    """Write a warning to standard error."""
    err(f"pybackup: warning: {plain(text)}")


def note(text: str, *, to_stderr: bool) -> None:
    """Write a line that needs no action."""
    (err if to_stderr else line)(f"pybackup: note: {plain(text)}")


# Progress


class OnBar:
    """Progress as a bar on a terminal (a `runtime.progress.Progress`)."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._began = 0.0

    def begin(self, disk: str, total: int) -> None:
        """Replace the bar by one for the next disk."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._began = time.monotonic()
        self._task = self._bar.add_task(plain(disk), total=total, rate="")

    def advance(self, done: int) -> None:
        """Move the bar to `done` bytes, and update the rate."""
        if self._task is not None:
            # rich's own column of the rate counts in powers of ten, beside sizes in powers of two.
            rate = show_rate(done, time.monotonic() - self._began)
            self._bar.update(self._task, completed=done, rate=rate)


@contextmanager
def progress(*, wanted: bool) -> Iterator[Progress]:
    """Show a bar with bytes, rate and time left if standard error is a terminal, and nothing elsewhere."""
    if not wanted or not sys.stderr.isatty():
        yield Quiet()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console, transient=True, disable=console.is_dumb_terminal) as bar:
        yield OnBar(bar)
