"""
How the bench measures: wall time, processor time and peak memory of commands, ours and theirs in turn.

Wall time is from the start of the first command to the end of the last.  Processor time is that of the commands, their
children that ended, and what separate servers used meanwhile.  Memory is the peak of the resident set as the kernel
counts it (wait4), of the largest single process among a command and its children.  Linux counts what a process was
before exec as well, that is this program, which therefore stays small: no numpy, no matplotlib, no long lists here.

A run counts only if other processes took little of the cores meanwhile (`FOREIGN`); otherwise it is done again, as long
as `GATE_SECONDS` allow.  Their share is shown beside each figure.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
CLUSTER = 64 * KIB
"""Of qcow2 images and their bitmaps, QEMU's default.  Bytes."""
MEMORY_LIMIT = 300 * MIB
"""What a run with the default configuration may take.  Bytes."""
OWN_LIMIT = 64 * MIB
"""What this program itself may take before it spoils what it measures.  Bytes."""

BIN = Path(sys.executable).parent
PYBACKUP = str(BIN / "pybackup")
TICKS = os.sysconf("SC_CLK_TCK")
FOREIGN = 0.15
"""The largest share of all cores that other processes may take during a run that counts."""
GATE_SECONDS = 240.0
"""How long the runs of one row are repeated because of other processes; then the runs count as they are."""


@dataclass(frozen=True)
class Usage:
    """
    What some commands took: wall and processor seconds, bytes of memory at the peak.

    `foreign` is the share of all cores that other processes took meanwhile (0: not measured).
    """

    seconds: float
    processor: float
    memory: int
    foreign: float = 0.0


class Watch:
    """Tells how busy the machine is from now on: processor time of all processes, and what a hypervisor takes away."""

    def __init__(self) -> None:
        self._start, self._busy, self._self = time.perf_counter(), busy(), time.process_time()

    def foreign(self, processor: float) -> float:
        """Return the share of all cores that others took, where the measured processes took `processor` seconds."""
        cores = os.cpu_count() or 1
        own = processor + time.process_time() - self._self + cores / TICKS  # the kernel counts whole ticks
        return max(0.0, busy() - self._busy - own) / (cores * (time.perf_counter() - self._start))


def busy() -> float:
    """Processor seconds of all processes and interrupts since the start of the machine, and what others stole."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, words)
    return (user + nice + system + interrupts + soft + stolen) / TICKS


@dataclass(frozen=True)
class Row:
    """
    One bar: ours against theirs, one value of each pair in the lists.

    `kind` says how the two are compared: "ratio" (ours / theirs, at most `limit`), "rate" (theirs / ours, at least
    `limit`: our share of their rate), "difference" (ours - theirs, at most `limit`), "count" (`value`, at most
    `limit`) or "missing" (not measured; `note` says why).  Values are seconds unless `unit` says otherwise, `memory`
    is bytes, and `processor_limit` bounds the ratio of processor times.
    """

    work: str
    against: str
    kind: str
    limit: float = 0.0
    place: str = ""
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    ours_processor: list[float] = field(default_factory=list)
    theirs_processor: list[float] = field(default_factory=list)
    processor_limit: float | None = None
    memory: int = 0
    unit: str = "s"
    value: float = 0.0
    note: str = ""
    foreign: list[float] = field(default_factory=list)
    """For each pair, the larger share of the cores that other processes took."""

    @property
    def measured(self) -> float:
        """What is held against the limit: the median over the pairs."""
        pairs = list(zip(self.ours, self.theirs, strict=True))
        if self.kind in ("count", "missing"):
            return self.value
        if self.kind == "difference":
            return statistics.median(one - other for one, other in pairs)
        if self.kind == "rate":
            return statistics.median(other / one for one, other in pairs)
        return statistics.median(one / other for one, other in pairs)

    @property
    def processor_ratio(self) -> float | None:
        """Our processor time as a multiple of theirs, or None where it was not measured."""
        pairs = list(zip(self.ours_processor, self.theirs_processor, strict=True))
        return statistics.median(one / max(other, 1 / TICKS) for one, other in pairs) if pairs else None

    @property
    def met(self) -> bool | None:
        """Is the bar met?  None where nothing was measured, or where there is no bar."""
        if self.kind == "missing" or not self.limit:
            return None
        good = self.measured >= self.limit if self.kind == "rate" else self.measured <= self.limit
        ratio = self.processor_ratio
        return good and (self.processor_limit is None or (ratio is not None and ratio <= self.processor_limit))

    @property
    def others(self) -> str:
        """The share of the cores that other processes took in the middle pair; empty where it was not measured."""
        return f"{statistics.median(self.foreign):.0%}" if self.foreign else ""

    def text(self) -> str:
        """A line for the terminal."""
        if self.kind == "missing":
            return f"  {self.work}: {self.note}"
        mark = {True: "met", False: "NOT MET", None: "no bar"}[self.met]
        return (
            f"  {self.work} [{self.place}]: {self.measured:.2f} (bar {self.limit:g}, {mark}) "
            f"{statistics.median(self.ours):.3f} against {statistics.median(self.theirs):.3f} {self.unit}, "
            f"processor {self.processor_ratio or 0:.2f}, {self.memory / MIB:.0f} MiB, others took {self.others}  "
            f"({self.against})"
        )


@dataclass(frozen=True)
class Peak:
    """One run whose memory was measured.  Seconds and bytes."""

    work: str
    seconds: float
    memory: int
    limit: int = MEMORY_LIMIT
    note: str = ""

    def text(self) -> str:
        """A line for the terminal."""
        return f"  {self.work}: {self.memory / MIB:.0f} MiB, {self.seconds:.1f} s"


@dataclass(frozen=True)
class Point:
    """
    One measurement of a series.

    `line` is the curve that it belongs to, `x` its place on the axis and `label` how that is shown, `seconds` one value
    per run, `units` the amount of work that the cost per unit is counted in, `memory` the largest peak in bytes.
    """

    line: str
    x: float
    label: str
    seconds: list[float]
    units: float
    memory: int

    def text(self) -> str:
        """A line for the terminal."""
        return f"  {self.line}, {self.label}: {statistics.median(self.seconds):.3f} s, {self.memory / MIB:.0f} MiB"


@dataclass(frozen=True)
class Count:
    """Reads of an image's file by its server, and their bytes, for a plan as labelled."""

    label: str
    reads: int
    bytes: int

    def text(self) -> str:
        """A line for the terminal."""
        return f"  {self.label}: {self.reads:,} reads, {self.bytes / MIB:.1f} MiB"


@dataclass(frozen=True)
class Latency:
    """
    How long a guest's writes took in a situation, one value per round: the median, the 99th percentile, the longest.

    Seconds.  Without values `work` says why it could not be measured.
    """

    work: str
    place: str
    median: list[float]
    nearly_all: list[float]
    longest: list[float]
    writes: int

    def text(self) -> str:
        """A line for the terminal."""
        return f"  {self.work} [{self.place}]: " + (", ".join(self.shown) if self.writes else "not measured")

    @property
    def shown(self) -> list[str]:
        """Milliseconds of the middle round: median, 99th percentile, longest; and the number of writes."""
        values = (self.median, self.nearly_all, self.longest)
        return [*(f"{statistics.median(each) * 1000:.2f} ms" for each in values), f"{self.writes:,}"]


@dataclass(frozen=True)
class Nights:
    """
    Nights `first` to `last` of a series, and what there is after them.

    `backup` and `prune` (None: there is none) are the medians of one night, `list` and `status` those of the commands
    after the last night: wall and processor seconds.  `mean` is the processor seconds of a night, prune included, on
    average: few prunes rewrite a full.  `points` are in the repository, with `stored` bytes of data files; `memory` is
    the largest peak in bytes.
    """

    line: str
    first: int
    last: int
    backup: list[float]
    prune: list[float] | None
    mean: float
    list: list[float]
    status: list[float]
    points: int
    stored: int
    memory: int

    @property
    def label(self) -> str:
        """Which nights."""
        return f"{self.first:,}–{self.last:,}"

    @property
    def processor(self) -> float:
        """Processor seconds of a night, backup and prune."""
        return self.backup[1] + (self.prune[1] if self.prune else 0.0)

    def text(self) -> str:
        """A line for the terminal."""
        prune = f", prune {self.prune[0]:.3f} s, processor {self.prune[1]:.3f}" if self.prune else ""
        backup = f"backup {self.backup[0]:.3f} s, processor {self.backup[1]:.3f}"
        return (
            f"  {self.line}, nights {self.label}: {backup}{prune}, mean processor {self.mean:.3f}; "
            f"list {self.list[1]:.3f}, status {self.status[1]:.3f}; {self.points} points, {self.stored / MIB:.0f} MiB"
        )


def timed(
    commands: Iterable[Sequence[str]],
    servers: Sequence[int] = (),
    codes: Sequence[int] = (0,),
    helpers: Sequence[int] = (),
) -> Usage:
    """
    Run commands, one after the other, their output thrown away.

    `servers` are the process ids of servers that work for them and live on; `helpers` too, whose time does not count,
    but is no other program's either; `codes` are the exit codes that are good.
    """
    before, helped = sum(map(processor_of, servers)), sum(map(processor_of, helpers))
    watch, start = Watch(), time.perf_counter()
    processor, memory = 0.0, 0
    for command in commands:
        # A file and no pipe for complaints: what waits for a reader would be measured too.
        with open("complaints", "w+") as complaints:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=complaints)
            used = waited(process)
            if process.returncode not in codes:
                complaints.seek(0)
                fail(command, process.returncode, complaints.read(2000))
        processor += used.processor
        memory = max(memory, used.memory)
    seconds = time.perf_counter() - start
    processor += sum(map(processor_of, servers)) - before
    return Usage(seconds, processor, memory, watch.foreign(processor + sum(map(processor_of, helpers)) - helped))


def waited(process: subprocess.Popen[bytes]) -> Usage:
    """Wait for a process; what it and its children took.  The wall time is that of the waiting."""
    start = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB > OWN_LIMIT:
        sys.exit("bench: error: the bench itself takes so much memory that it hides what it measures")
    return Usage(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * KIB)


def processor_of(process: int) -> float:
    """Processor seconds that a living process has used so far, all its threads together."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(") ", maxsplit=1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # utime and stime, proc(5)


def in_turn(
    sides: Sequence[Callable[[], Usage]], rounds: int, clean: Callable[[], None], patience: float = GATE_SECONDS
) -> list[list[Usage]]:
    """
    Run all sides in turn, `rounds` times, so that what else the machine does hits all; one list of usages per side.

    Before each run everything is written back (sync), so that nobody pays for what another left in the page cache;
    after each, `clean` removes what it made.  A run during which other processes took much of the cores is repeated,
    for `patience` seconds in all; with a single round, which is a trial of the bench, no run is.
    """
    usages: list[list[Usage]] = [[] for _ in sides]
    deadline = time.monotonic() + (patience if rounds > 1 else 0)
    for _ in range(rounds):
        for side, found in zip(sides, usages, strict=True):
            found.append(_quiet(side, clean, deadline))
    return usages


def _quiet(side: Callable[[], Usage], clean: Callable[[], None], deadline: float) -> Usage:
    """Run a side until other processes took little of the cores meanwhile, or the deadline has passed."""
    while True:
        os.sync()
        used = side()
        clean()
        if used.foreign <= FOREIGN or time.monotonic() > deadline:
            return used
        time.sleep(0.3)


def seconds(usages: Sequence[Usage]) -> list[float]:
    """Their wall times."""
    return [round(usage.seconds, 4) for usage in usages]


def processors(usages: Sequence[Usage]) -> list[float]:
    """Their processor times."""
    return [round(usage.processor, 3) for usage in usages]


def largest(usages: Sequence[Usage]) -> int:
    """The largest of their peaks of memory."""
    return max(usage.memory for usage in usages)


def run(command: Sequence[str]) -> str:
    """Run a command that must succeed, not measured; what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(command, done.returncode, done.stderr)
    return done.stdout


def fail(command: Sequence[str], code: int, complaints: str) -> None:
    """End the bench because a command failed."""
    sys.exit(f"bench: error: exit {code}: {' '.join(command)[:500]}\n{complaints}")
