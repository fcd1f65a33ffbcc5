"""
What people and scripts see.  Values in, text out; the only user of rich.

The rules of the output: results go to standard output, everything else to standard error.  `--json` puts one document
on standard output.  A bar is drawn on a terminal only; without one there are no escape codes and one line per disk.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from backup.errors import BackupError, Failed, Interrupted, UsageError
from backup.units import show_duration, show_rate, show_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from backup.create import DiskReport, Report
    from backup.manifest import Manifest
    from backup.mapping import Extent, MapTotals
    from backup.verify import Problem


_SPOOL = 1 << 20
"""Characters kept in memory before a document goes to a temporary file."""


def plain(text: object) -> str:
    """Text without control characters: names and messages may come from an untrusted manifest or image."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def error(problem: BackupError | Interrupted, of: str | None = None) -> None:
    """Two lines: what happened (to the machine `of`), what to do.  A list of problems has a line for each."""
    place = f"{of}: " if of else ""
    listed = isinstance(problem, UsageError) and problem.listed
    for text in problem.message.split("\n") if listed else [problem.message]:
        _err(f"pybackup: error: {plain(place + text)}")
    _err(f"pybackup: hint: {plain(problem.hint)}")


def warning(text: str) -> None:
    """One line on standard error."""
    _err(f"pybackup: warning: {plain(text)}")


def note(text: str, *, to_stderr: bool) -> None:
    """One line that needs no action."""
    (_err if to_stderr else line)(f"pybackup: note: {plain(text)}")


def line(text: str) -> None:
    """One line on standard output."""
    _out(text + "\n")


def document(value: object) -> None:
    """One JSON document on standard output."""
    import json

    _out(json.dumps(value, indent=2) + "\n")


def flush() -> None:
    """
    Have standard output written.

    Raises
    ------
    Failed, BrokenPipeError
        It cannot be, or its reader is gone; from then on it goes nowhere.
    """
    with _output():
        sys.stdout.flush()


def _out(text: str) -> None:
    with _output():
        sys.stdout.write(text)


@contextmanager
def _output() -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        _mute(sys.stdout)
        if isinstance(problem, BrokenPipeError):
            raise
        raise Failed(
            f"standard output cannot be written: {problem.strerror}",
            hint="what was to be done is done; only its report is lost",
        ) from None


def _err(text: str) -> None:
    try:
        sys.stderr.write(text + "\n")
    except OSError:
        _mute(sys.stderr)  # nobody is left to be told


def _mute(stream: TextIO) -> None:
    # What is still in the stream's buffer would fail again when Python exits, and change the exit code.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def error_object(problem: BackupError | Interrupted) -> dict[str, Any]:
    """An error as scripts see it."""
    return {"code": problem.exit_code, "message": problem.message, "hint": problem.hint}


def report_object(report: Report) -> dict[str, Any]:
    """A machine's backup as scripts see it."""
    return {
        "machine": report.machine,
        "point": report.point,
        "manifest": None if report.manifest is None else str(report.manifest),
        "warnings": list(report.warnings),
        "error": None,
        "disks": [asdict(disk) for disk in report.disks],
    }


def failure_object(machine: str, problem: BackupError) -> dict[str, Any]:
    """A machine whose backup failed, as scripts see it."""
    failed = error_object(problem)
    return {"machine": machine, "point": None, "manifest": None, "warnings": [], "error": failed, "disks": []}


def report_lines(report: Report, *, dry_run: bool) -> Iterator[str]:
    """One line per disk."""
    for disk in report.disks:
        yield f"{report.machine}/{disk.name}: {_disk_text(disk, report.point, dry_run=dry_run)}"


def _disk_text(disk: DiskReport, point: str | None, *, dry_run: bool) -> str:
    counts = (
        f"dirty {show_size(disk.dirty_bytes)}, data {show_size(disk.data_bytes)}, zero {show_size(disk.zero_bytes)}"
    )
    if dry_run:
        return f"would be {disk.kind}, {counts} ({plain(disk.reason)})"
    stored = f"stored {show_size(disk.stored_bytes)} in {show_duration(disk.seconds)}"
    return f"{disk.kind} {point}, {counts}, {stored} ({plain(disk.reason)})"


def point_object(manifest: Manifest, path: Path) -> dict[str, Any]:
    """A point of `list` as scripts see it."""
    return {
        "machine": manifest.machine,
        "point": manifest.point,
        "sequence": manifest.sequence,
        "manifest": str(path),
        "created": manifest.started,
        "disks": [
            {
                "name": disk.name,
                "kind": disk.kind,
                "reason": disk.reason,
                "size": disk.size,
                "parent": None if disk.parent is None else disk.parent.point,
                "dirty_bytes": disk.bytes.dirty,
                "data_bytes": disk.bytes.data,
                "zero_bytes": disk.bytes.zero,
                "stored_bytes": disk.bytes.stored,
            }
            for disk in manifest.disks
        ],
    }


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


def points_table(manifests: Sequence[Manifest]) -> None:
    """The points of `list`, a line for each disk."""
    rows = [
        (
            point.machine,
            point.point,
            disk.name,
            disk.kind,
            show_size(disk.size),
            show_size(disk.bytes.stored),
            disk.reason,
        )
        for point in manifests
        for disk in point.disks
    ]
    table(("MACHINE", "POINT", "DISK", "KIND", "SIZE", "STORED", "REASON"), rows, right=(4, 5))


def manifest_text(manifest: Manifest, path: Path, chains: Mapping[str, Sequence[str] | BackupError]) -> None:
    """A point for people."""
    line(f"point {manifest.point} of machine {manifest.machine}, sequence {manifest.sequence}")
    line(f"  manifest  {plain(path)}")
    line(f"  taken     {plain(manifest.started)} to {plain(manifest.finished)} by {plain(manifest.program)}")
    for disk in manifest.disks:
        line(f"disk {disk.name}: {disk.kind} ({plain(disk.reason)})")
        line(f"  size      {disk.size} bytes ({show_size(disk.size)})")
        line(f"  source    {plain(disk.source.kind)} {plain(disk.source.path)} ({plain(disk.source.format)})")
        line(f"  bitmap    read {plain(disk.bitmap.read or '-')}, started {plain(disk.bitmap.started or '-')}")
        line(
            f"  bytes     dirty {show_size(disk.bytes.dirty)}, data {show_size(disk.bytes.data)}, "
            f"zero {show_size(disk.bytes.zero)}, stored {show_size(disk.bytes.stored)}"
        )
        line(
            f"  data      {disk.data.file} ({plain(disk.data.compression)}, "
            f"clusters of {show_size(disk.data.cluster_size)})"
        )
        chain = chains[disk.name]
        if isinstance(chain, BackupError):
            line(f"  chain     broken: {plain(chain.message)}")
        else:
            line(f"  chain     {len(chain)} point{'s' if len(chain) > 1 else ''}: {' <- '.join(chain)}")


def map_table(extents: Iterable[Extent], bitmap: str | None) -> None:
    """The extents of `map`, a line each, as they come: there may be millions."""
    state = f"bitmap {plain(bitmap)}" if bitmap is not None else "bitmap -"
    width = max(len(state), 8)
    line(f"{'START':>16}  {'LENGTH':>16}  {state:<{width}}  CONTENT")
    for extent in extents:
        dirty = "-" if extent.dirty is None else "dirty" if extent.dirty else "clean"
        line(f"{extent.start:>16}  {extent.length:>16}  {dirty:<{width}}  {_content(extent)}")


def _content(extent: Extent) -> str:
    if extent.zero:
        return "zero (hole)" if extent.hole else "zero"
    return "data (hole)" if extent.hole else "data"


def map_objects(extents: Iterable[Extent]) -> None:
    """The extents of `map` as one JSON list; nothing of it when the source fails half-way.  There may be millions."""
    import json
    import tempfile

    with tempfile.SpooledTemporaryFile(_SPOOL, "w+") as spool:
        separator = "["
        for extent in extents:
            spool.write(f"{separator}\n{json.dumps(asdict(extent))}")
            separator = ","
        spool.write("[]" if separator == "[" else "\n]")
        spool.seek(0)
        while chunk := spool.read(_SPOOL):
            _out(chunk)
    line("")


def map_sums(totals: MapTotals) -> None:
    """The sums of `map --totals`."""
    for name, value in asdict(totals).items():
        if value is not None:
            line(f"{name.replace('_', ' and '):<16} {value:>20}  {show_size(value)}")


class Quiet:
    """Progress that nobody watches (a `progress.Progress`)."""

    def begin(self, disk: str, total: int) -> None:
        """Nothing."""

    def advance(self, done: int) -> None:
        """Nothing."""


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
def progress(*, wanted: bool) -> Iterator[Quiet | OnBar]:
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


def restored_line(name: str, target: str, size: int, seconds: float) -> str:
    """One line for a restored disk."""
    return (
        f"{name}: restored {show_size(size)} to {plain(target)} in {show_duration(seconds)}, {show_rate(size, seconds)}"
    )


def verified_text(sums: Mapping[str, int]) -> str:
    """What was verified."""
    return f"{sums['points']} points, {sums['files']} data files, {show_size(sums['bytes'])}"


def problem(found: Problem) -> None:
    """Two lines for one problem that `verify` found."""
    place = "/".join(part for part in (found.machine, found.point, found.disk) if part)
    _err(f"pybackup: error: {plain(place)}: {plain(found.error.message)}")
    _err(f"pybackup: hint: {plain(found.error.hint)}")
