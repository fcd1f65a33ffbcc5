"""
What people and scripts see.  Values in, text out; the only user of rich.

The rules of the output: results go to standard output, everything else to standard error.  `--json` puts one document
on standard output.  A bar is drawn on a terminal only; without one there are no escape codes and one line per disk.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backup.cli.streams import mute
from backup.errors import BackupError, Damaged, Interrupted, UsageError
from backup.model.names import without_password
from backup.units import counted, show_age, show_duration, show_rate, show_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from backup.guest.files import Entry, Fetched
    from backup.model.manifest import Manifest
    from backup.operations.audit import Audit, DiskAudit
    from backup.operations.backup import DiskReport, Report
    from backup.operations.copy import Replicated
    from backup.operations.prune import Report as PruneReport
    from backup.operations.remove import Removal
    from backup.operations.serve import Served
    from backup.operations.status import DiskStatus, Trust
    from backup.operations.verify import Problem
    from backup.planning.extent_map import Extent, MapTotals
    from backup.repository.salvage import Lost


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


def traceback(problem: BaseException) -> None:
    """Where an error comes from, for --debug."""
    from traceback import format_exception

    _err("".join(format_exception(problem)).rstrip())


def warning(text: str) -> None:
    """One line on standard error."""
    _err(f"pybackup: warning: {plain(text)}")


def note(text: str, *, to_stderr: bool) -> None:
    """One line that needs no action."""
    (_err if to_stderr else line)(f"pybackup: note: {plain(text)}")


def to_stderr(text: str) -> None:
    """One line on standard error."""
    _err(text)


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
    Failed
        It cannot be, or its reader is gone (ReaderGone); from then on it goes nowhere.
    """
    sys.stdout.flush()


def _out(text: str) -> None:
    sys.stdout.write(text)


def _err(text: str) -> None:
    try:
        sys.stderr.write(without_password(text) + "\n")
    except OSError:
        mute(sys.stderr)  # nobody is left to be told


def error_object(problem: BackupError | Interrupted) -> dict[str, Any]:
    """An error as scripts see it; of damage with the ranges of the disk that it affects, where they are known."""
    found = {"code": problem.exit_code, "message": problem.message, "hint": problem.hint}
    ranges = problem.ranges if isinstance(problem, Damaged) else ()
    return {**found, "ranges": [{"start": low, "length": high - low} for low, high in ranges]} if ranges else found


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


def audit_object(found: Audit) -> dict[str, Any]:
    """A machine's audit as scripts see it."""
    disks = [
        {
            **asdict(disk),
            "differences": [{"start": start, "length": end - start} for start, end in disk.differences],
            "verdict": disk.verdict,
        }
        for disk in found.disks
    ]
    return {"machine": found.machine, "warnings": list(found.warnings), "error": None, "disks": disks}


def audit_failure_object(machine: str, problem: BackupError) -> dict[str, Any]:
    """A machine whose audit failed, as scripts see it."""
    return {"machine": machine, "warnings": [], "error": error_object(problem), "disks": []}


def audit_lines(found: Audit) -> Iterator[str]:
    """One line per disk, and one for each range that differs."""
    for disk in found.disks:
        left_out = f", left out {show_size(disk.dirty_bytes)} that changed since" if disk.bitmap else ""
        yield (
            f"{found.machine}/{disk.name}: {_verdict(disk)}: compared with {disk.point}, read "
            f"{show_size(disk.read_bytes)} of {show_size(disk.size)} in {show_duration(disk.seconds)}{left_out}"
        )
        for start, end in disk.differences:
            yield f"{start:>16}  {end - start:>16}  differs"
        if not disk.complete:
            yield f"{'':>34}  and more"


def _verdict(disk: DiskAudit) -> str:
    if disk.differing_bytes:
        return f"{disk.differing_bytes} bytes differ"
    return "equal" if disk.size == disk.point_size else f"equal, but {disk.size - disk.point_size:+} bytes long"


def audit_problems(found: Audit, completed: Callable[[str], str]) -> None:
    """Two lines for each disk that is not known to be what the chain says; `completed` gives hints their options."""
    for disk in found.disks:
        if disk.verdict == "true":
            continue
        place = f"{found.machine}/{disk.name}"
        if disk.bitmap is not None:
            _err(
                f"pybackup: error: {plain(place)}: {disk.differing_bytes} bytes that bitmap {plain(disk.bitmap)} calls "
                f"clean differ from point {disk.point}: the bitmap lies, or the chain does"
            )
            hint = "`pybackup rescan` stores what differs and starts a new bitmap; keep older points"
        else:
            _err(
                f"pybackup: error: {plain(place)}: {_verdict(disk)}, and whether that changed since point {disk.point} "
                f"or was missed by it nobody can tell: {plain(disk.why or '')}"
            )
            hint = "`pybackup rescan` stores what differs; an audit after it can tell"
        _err(f"pybackup: hint: {completed(hint)}")


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
        "pinned": manifest.pinned,
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
            f"pinned; {disk.reason}" if point.pinned else disk.reason,
        )
        for point in manifests
        for disk in point.disks
    ]
    table(("MACHINE", "POINT", "DISK", "KIND", "SIZE", "STORED", "REASON"), rows, right=(4, 5))


def manifest_text(manifest: Manifest, path: Path, chains: Mapping[str, Sequence[str] | BackupError]) -> None:
    """A point for people."""
    pinned = ", pinned" if manifest.pinned else ""
    line(f"point {manifest.point} of machine {manifest.machine}, sequence {manifest.sequence}{pinned}")
    line(f"  manifest  {plain(path)}")
    line(f"  taken     {plain(manifest.started)} to {plain(manifest.finished)} by {plain(manifest.program)}")
    for disk in manifest.disks:
        line(f"disk {disk.name}: {disk.kind} ({plain(disk.reason)})")
        line(f"  size      {disk.size} bytes ({show_size(disk.size)})")
        source = disk.source
        line(
            f"  source    {plain(source.kind)} {plain(source.path)} ({plain(source.format)}, "
            f"{plain(source.consistency)}-consistent)"
        )
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


def pruned_object(report: PruneReport, *, dry_run: bool) -> dict[str, Any]:
    """A machine's prune as scripts see it."""
    return {**asdict(report), "dry_run": dry_run, "error": None}


def unpruned_object(machine: str, problem: BackupError, *, dry_run: bool) -> dict[str, Any]:
    """A machine whose prune failed, as scripts see it."""
    nothing: dict[str, Any] = {"machine": machine, "points": [], "rewrites": [], "freed_bytes": 0, "warnings": []}
    return {**nothing, "dry_run": dry_run, "error": error_object(problem)}


def prune_table(report: PruneReport) -> None:
    """What becomes of each point and why, and what is rewritten."""
    rows = [
        (report.machine, point.point, point.created, point.action, ", ".join(point.reasons)) for point in report.points
    ]
    table(("MACHINE", "POINT", "CREATED", "ACTION", "WHY"), rows)
    for rewrite in report.rewrites:
        line(
            f"rewrite {report.machine}/{rewrite.disk} of {rewrite.point} as {rewrite.kind}, with "
            f"{counted(len(rewrite.merged), 'point')} merged: read {show_size(rewrite.read_bytes)}, "
            f"{show_size(rewrite.stored_before)} before, {show_size(rewrite.stored_after)} after"
        )


def prune_line(report: PruneReport, *, dry_run: bool) -> str:
    """One line for a machine."""
    waiting = f", {report.waiting} waiting" if report.waiting else ""
    return (
        f"{report.machine}: {'would remove' if dry_run else 'removed'} {report.removed} of "
        f"{counted(len(report.points), 'point')}{waiting}, {counted(len(report.rewrites), 'data file')} rewritten, "
        f"{_freed_text(report.freed_bytes)}"
    )


def _freed_text(freed: int) -> str:
    return f"{show_size(freed)} freed" if freed >= 0 else f"{show_size(-freed)} more"


def removal_lines(removal: Removal, verb: str) -> Iterator[str]:
    """What is removed of a machine, and what follows from that."""
    if removal.point is not None:
        rewritten = counted(len(removal.rewrites), "data file")
        what = f"point {removal.point}: {rewritten} rewritten"
    else:
        damaged = f" and {counted(len(removal.damaged), 'damaged manifest')}" if removal.damaged else ""
        what = f"the machine with {counted(len(removal.removed), 'point')}{damaged}"
    yield f"{removal.machine}: {verb} {what}, {_freed_text(removal.freed_bytes)}"
    for text in removal.notes:
        yield f"pybackup: note: {plain(text)}"


def asked(question: str) -> bool:
    """Ask on the terminal; only y and yes mean yes."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        _err("")  # Ctrl-D: the shell's prompt begins a line of its own
    return answer.strip().lower() in {"y", "yes"}


def restored_line(name: str, target: str, size: int, seconds: float) -> str:
    """One line for a restored disk."""
    return (
        f"{name}: restored {show_size(size)} to {plain(target)} in {show_duration(seconds)}, {show_rate(size, seconds)}"
    )


def lost_lines(lost: Sequence[Lost]) -> Iterator[str]:
    """A line for each range of the disk that a salvage could not bring back: start, length, why."""
    for each in lost:
        yield f"{each.start:>16}  {each.length:>16}  not proven, {each.content}: {plain(each.why)}"


def served_object(point: Manifest, disk: str, served: Served, writable: bool) -> dict[str, Any]:
    """What is served, as scripts see it."""
    from backup.operations.serve import commands

    return {
        "machine": point.machine,
        "point": point.point,
        "disk": disk,
        "uri": served.uri,
        "size": served.size,
        "export_size": served.export_size,
        "writable": writable,
        "commands": commands(served.uri, served.address, writable=writable),
    }


def served_lines(point: Manifest, disk: str, served: Served, writable: bool) -> Iterator[str]:
    """What is served, and how to look inside."""
    from backup.operations.serve import commands

    how = "for writing (what is written is thrown away)" if writable else "read-only"
    yield f"serving {point.machine}/{disk} of point {point.point}, {show_size(served.size)}, {how}, until Ctrl-C"
    if served.export_size != served.size:
        yield f"the disk has {served.size} bytes; the export has {served.export_size}, the last of which are zeroes"
    if served.address.socket is None:
        yield f"anyone who can connect to {plain(served.uri)} can read it: NBD asks for no password"
    yield plain(served.uri)
    for command in commands(served.uri, served.address, writable=writable).values():
        yield f"  {plain(command)}"


def files_table(entries: Sequence[Entry]) -> None:
    """A guest's files, a line for each."""
    letters = {"directory": "d", "link": "l", "file": "-"}
    rows = [
        (
            f"{letters.get(entry.kind, '?')} {entry.mode:04o}",
            str(entry.size),
            entry.modified,
            entry.name if entry.target is None else f"{entry.name} -> {entry.target}",
        )
        for entry in entries
    ]
    table(("MODE", "SIZE", "MODIFIED", "NAME"), rows, right=(1,))


def fetched_line(path: str, target: Path, fetched: Fetched) -> str:
    """One line for what was brought back from a guest."""
    return f"{plain(path)}: {counted(fetched.files, 'file')}, {show_size(fetched.bytes)}, to {plain(target)}"


def status_object(found: Sequence[DiskStatus], code: int, summary: str, max_age: float | None) -> dict[str, Any]:
    """The state of the disks as scripts see it."""
    return {"code": code, "summary": summary, "max_age": max_age, "disks": [asdict(status) for status in found]}


def status_table(found: Sequence[DiskStatus], now: datetime) -> None:
    """The state of the disks, a line for each."""
    rows = [
        (
            status.machine,
            status.disk or "-",
            status.point or "-",
            "-" if status.age_seconds is None else show_age(status.age_seconds),
            "-" if status.chain_points is None else str(status.chain_points),
            "-" if status.stored_bytes is None else show_size(status.stored_bytes),
            "-" if status.logical_bytes is None else show_size(status.logical_bytes),
            "-" if status.verified is None else _trust_text(status.verified, now),
            status.next,
        )
        for status in found
    ]
    columns = ("MACHINE", "DISK", "NEWEST", "AGE", "CHAIN", "STORED", "SIZE", "VERIFIED", "NEXT")
    table(columns, rows, right=(3, 4, 5, 6))


def _trust_text(trust: Trust, now: datetime) -> str:
    from backup.model.documents import moment_of

    if trust.last is None:
        return "never"
    ago = f"{show_age(max((now - moment_of(trust.last)).total_seconds(), 0))} ago"
    return f"damaged, {ago}" if trust.code else f"{trust.files} of {trust.of}, {ago}"


def verified_text(sums: Mapping[str, int]) -> str:
    """What was verified."""
    text = f"{counted(sums['points'], 'point')}, {counted(sums['files'], 'data file')}, {show_size(sums['bytes'])}"
    if sums["sampled"]:
        text += f" (a sample of {counted(sums['sampled'], 'file')})"
    return text + (f", {sums['skipped']} left out" if sums["skipped"] else "")


def replicated_object(machine: str, other: str, done: Replicated, *, dry_run: bool) -> dict[str, Any]:
    """What was copied, or on a dry run would be, as scripts see it."""
    return {
        "machine": machine,
        "repository": other,
        "dry_run": dry_run,
        "copied": list(done.copied),
        "present": list(done.present),
        "bytes": done.bytes,
        "problems": problem_objects(done.problems),
    }


def replicated_line(machine: str, other: str, done: Replicated, seconds: float | None) -> str:
    """One line for a machine that was copied in so many seconds; None: it was not, only planned."""
    what = f"{counted(len(done.copied), 'point')}, {show_size(done.bytes)}, to {plain(other)}"
    if seconds is None:
        return f"{machine}: would copy {what}; {len(done.present)} are there"
    spent = f"in {show_duration(seconds)}, {show_rate(done.bytes, seconds)}"
    return f"{machine}: copied {what} {spent}; {len(done.present)} were there"


def problem_objects(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Problems as scripts see them."""
    return [{"machine": p.machine, "point": p.point, "disk": p.disk, **error_object(p.error)} for p in problems]


def problem(found: Problem) -> None:
    """Two lines for one problem that `verify` found."""
    place = "/".join(part for part in (found.machine, found.point, found.disk) if part)
    _err(f"pybackup: error: {plain(place)}: {plain(found.error.message)}")
    _err(f"pybackup: hint: {plain(found.error.hint)}")
