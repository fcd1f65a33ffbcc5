"""
Tables and plots of README.md, from results.json alone: it can be run again without measuring.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import MIB, Count, Latency, Nights, Peak, Point, Row

HERE = Path(__file__).parent
KINDS: dict[str, type] = {
    "Row": Row,
    "Peak": Peak,
    "Point": Point,
    "Count": Count,
    "Latency": Latency,
    "Nights": Nights,
}
STEEPER = 1.3
"""From this factor on, a further unit of work that costs more than those before it is called worse than linear."""
NOTICEABLE = 0.1
"""Seconds; smaller differences are noise."""


@dataclass(frozen=True)
class Series:
    """How a series is shown: `axis` names x, `unit` what the cost per unit is counted in, `work` is x being work."""

    title: str
    axis: str
    unit: str
    text: str
    work: bool = True


SERIES = {
    "scale-dirty": Series(
        "Dirty share",
        "dirty share of the disk in %",
        "MiB dirty",
        "Incrementals of a fully allocated disk of 4 GiB (laid out, see below), of which a share of the clusters "
        "is dirty, chosen at random; with 100 % it is all of them.",
    ),
    "scale-fragmentation": Series(
        "Fragmentation",
        "dirty runs",
        "MiB dirty",
        "Incrementals of a fully allocated disk of 64 GiB (laid out) with 256 MiB dirty, in one run of 256 MiB "
        "or in up to 4,096 runs of one cluster, evenly spread.",
    ),
    "scale-size": Series(
        "Disk size",
        "size of the disk in GiB",
        "GiB of the disk",
        "Whole nights over an offline image (`--image`, qcow2) that holds 64 MiB of data in 1,024 clusters, "
        "evenly spread; before an incremental with something dirty, all of them are written again. The rest of "
        "the disk is unallocated. The full is one run.",
    ),
    "scale-chain": Series(
        "Chain length",
        "points in the chain",
        "points",
        "A disk of 1 GiB of which a quarter holds data; 4 MiB in 64 clusters are written before each night. A "
        "night is the one that makes the chain that long (one run; the first is a full), the restore is of its "
        "newest point.",
    ),
    "scale-connections": Series(
        "Connections and latency",
        "connections",
        "MiB",
        "Fulls without compression of 1 GiB of real data, served by nbdkit's file plugin with its delay filter "
        "(`rdelay`), over Unix sockets, 16 requests of 1 MiB in flight on each connection.",
        work=False,
    ),
    "scale-cores": Series(
        "Cores",
        "cores",
        "MiB of the disk",
        "`taskset` binds the client and the qemu-nbd that it starts to so many cores. The image is the file "
        "system of 4 GiB that the bars use.",
        work=False,
    ),
}

NIGHTS = Series(
    "A thousand nights",
    "night",
    "nights",
    "A disk of 64 MiB of which 16 MiB hold data, on tmpfs. Each night 256 KiB of it are written (qemu-io), and "
    "commands run as cron would run them, with a clock that is a day further on each time (libfaketime): "
    "`incremental`, and in the series with retention (`daily: 7`, `weekly: 5`, `monthly: 12`, `yearly: 3`) `prune`. "
    "Without it all points stay, and a new chain begins every 100 nights (`max_chain`). Seconds are medians of the "
    "nights of a row; the mean is of all of a night's processor time, as few prunes rewrite a full. `list` and "
    "`status` run after the row's last night. At the end `verify` and `qemu-img check` find no fault, `qemu-img "
    "compare` finds no difference between the newest point and the image, and eight older points, chosen at random, "
    "restore to what the disk was in their nights (SHA-256); otherwise there would be no figures. The plot is of "
    "processor time, backup and prune.",
)

BARS = (
    "read-only",
    "full-none",
    "full-zstd",
    "plan",
    "incremental",
    "libvirt",
    "buckets",
    "idle",
    "reads",
    "restore",
    "consolidate",
    "verify",
    "version",
)
"""The parts with bars, in the order of the table."""

LATENCY = """
How long a guest's write takes while its disk is backed up. A disk of 1 GiB of real data in a QEMU that has no processor
to run; the guest is a process that writes 4 KiB at random places of the disk's FUSE export past the page cache, one
write after the other, one each 2 ms at most. (Not an NBD export: QEMU has one NBD server, which the backup needs.) FUSE
adds the same to all rows. The values are medians over the rounds (of few writes the 99th percentile is the longest),
the number of writes is that of all rounds. Ours counts from the start of the command to its end, QEMU's job until all
is copied, uncompressed. What makes a write wait is that the first one to a cluster has the old content copied away, and
that the backup keeps the cores busy.
""".strip()

HOW = """
## How it is measured

Ours and theirs run in turn, so that what else the machine does hits both; a value is the median over the pairs
(their number is in the table) of the quotient or the difference within a pair, and the seconds are medians of their
own. A run counts only if other processes took at most 15 % of the cores meanwhile, and is done again otherwise, for
four minutes in all; *others took* is their share in the middle pair (the larger one of the pair). Before each run all
is written back (`sync`), after it its output is removed. Every time is that of whole
processes, start included, except for the bare loop over zstandard. *Processor* is user and system time of the
processes, their children and the servers that work for them. *MiB* is the largest resident set of a single process
of ours (`wait4`): pybackup, or its qemu-nbd where that is larger; it is an upper bound, since Linux counts the
starting program too, about 22 MiB. The page cache is warm: what is measured is the program and the writing of its
output, not the reading of a cold disk.

- **The file system** is an ext4 of 4 GiB, 85 % full of files of /usr of 32 KiB and more, converted to qcow2 by
  qemu-img.
- **Laid-out disks.** A fully allocated disk of 64 GiB, or one of 1 TiB in millions of extents, does not fit here.
  `inputs.py` writes qcow2 images whose L2 tables map all of the guest onto a pool of 1 GiB of real data, over and
  over, as if snapshots shared the clusters. Block status calls all of it data, the tables have their real size, and
  `qemu-img check` finds no error. The page cache flatters both sides: the pool fits into it.
- **The parent** of an incremental over NBD is a full of an empty disk of the same size.
- **Read only** plans a full, reads it through the copier without compression, and hashes each part of the data file
  that would be, which is then thrown away (`read_only.py`).
- **The bare loop over zstandard** compresses the clusters of the same qcow2 file in memory, one frame with a
  checksum each, level 1, with one thread for each core; neither start, reading, writing nor digests count there.
- **The plan** compares whole processes: `plan_only.py`, with the check of zeroes off, and nbdinfo that prints to
  /dev/null.
- **The incremental of 1 %** runs against one qemu-storage-daemon, which holds the image open: QEMU's side is its
  backup job with a bitmap (what drive-backup runs) inside of it, from `qemu-img create` of the target to its
  `sync`; ours reads the daemon's NBD export of an identical bitmap. With `none` both store the same bytes.
- **A domain of libvirt** has one disk of 2 GiB with 1 GiB of real data, and idles in its firmware (QEMU without KVM, 64
  MiB). libvirtd runs in system mode in a mount namespace of its own (`domain.py`). Ours runs with its defaults, except
  for `--compression none`: spot check, digests and fsync are included; virtnbdbackup's data is not synced. Before each
  pair of 1 % the guest writes at 10 places. *Processor* is that of the tool and of the domain's QEMU.
- **Buckets** are in a Ceph of the bench's own, with an OSD in memory (`buckets.py`). The processor time is that of the
  client. Neither side has anything in its place before a copy; pybackup checks each block against its digest. Nothing
  delays the line between client and server.
- **Prune** merges a full and five incrementals into one full, in a copy of the repository that is made before each run
  and not measured.
- **Idle**: the image is sparse and holds 64 MiB of data in 1,024 places. `spot_check: 0`, as wherever the
  parent is an empty one, which a spot check would see.
- **Reads of metadata** are counted by strace in the image's qemu-nbd (pread64, preadv); those of a plan of nothing
  (opening the image and its bitmap) are taken off.
- **16 TiB** cannot be held by a real server here. `simulated_disk.py` speaks NBD and computes its block status: all
  data, every second cluster dirty. The plan is made whole, with the default configuration; the copy is interrupted
  (SIGINT) after some seconds, and the peak is the one until then.
- A bar that says *not installed* has no figure: this machine lacks the program.
"""


def main() -> None:
    """Write README.md and the plots."""
    results = json.loads((HERE / "results.json").read_text())
    parts = {name: [revived(row) for row in part["rows"]] for name, part in results["parts"].items()}
    sections = [head(results), bars(parts), memory(parts), *latency(parts)]
    sections += [series(name, shown, parts[name]) for name, shown in SERIES.items() if name in parts]
    sections += nights(parts)
    sections += [HOW, runs(results)]
    (HERE / "README.md").write_text("\n\n".join(section.strip() for section in sections) + "\n")


def revived(row: dict[str, Any]) -> Any:
    """A stored row as the value that it was."""
    return KINDS[row.pop("is")](**row)


def table(titles: list[str], rows: list[list[str]], numbers: int = 1) -> str:
    """A table; columns from number `numbers` on are aligned to the right."""
    rule = ["---" if index < numbers else "--:" for index in range(len(titles))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [titles, rule, *rows])


def head(results: dict[str, Any]) -> str:
    """What was measured, where and when."""
    parts = results["parts"].values()
    dates = sorted(part["date"] for part in parts)
    commit, _ = Counter(part["commit"] for part in parts).most_common(1)[0]
    when = dates[0] if dates[0][:10] == dates[-1][:10] else f"{dates[0][:10]} to {dates[-1][:10]}"
    machine = "\n".join(f"- {line}" for line in results["machine"].values())
    load = statistics.median(part["load"] for part in parts)
    return (
        f"# Measurements\n\nMade by `make bench` on {when}, commit {commit}, in "
        f"{sum(part['took'] for part in parts) / 60:.0f} minutes; when each part ended stands below.\n\n"
        f"{machine}\n- load {load:.1f} when the parts began (the bench's own earlier parts included)"
    )


def bars(parts: dict[str, list[Any]]) -> str:
    """The table of the bars."""
    rows = [row for name in BARS for row in parts.get(name, []) if isinstance(row, Row)]
    titles = [
        "work",
        "on",
        "against",
        "bar",
        "measured",
        "met",
        "ours s",
        "theirs s",
        "processor s, ours / theirs",
        "MiB",
        "others took",
        "pairs",
    ]
    lines = [bar(row) for row in rows]
    met = sum(row.met is True for row in rows)
    judged = sum(row.met is not None for row in rows)
    notes = "\n".join(f"- {row.work}: {row.note}." for row in rows if row.note and row.kind != "missing")
    counts = [count for found in parts.values() for count in found if isinstance(count, Count)]
    reads = table(["plan of", "reads", "MiB read"], [[c.label, f"{c.reads:,}", f"{c.bytes / MIB:.1f}"] for c in counts])
    return (
        f"## The bars\n\n{met} of {judged} are met. A quotient (×) is ours / theirs and wants to be small; a rate (%) "
        f"is our share of theirs and wants to be large.\n\n{table(titles, lines, 3)}\n\n{notes}\n\n"
        f"Reads of the image's file in the row that counts them, opening it included:\n\n{reads}"
    )


def bar(row: Row) -> list[str]:
    """A row of the bars' table."""
    if row.kind == "missing":
        return [row.work, "", row.against, "", row.note, "", "", "", "", "", "", ""]
    limit = {
        "ratio": f"≤ {row.limit:.2f} ×",
        "rate": f"≥ {row.limit:.0%} of the rate",
        "difference": f"≤ {row.limit:.2f} s more",
        "count": f"≤ {row.limit:g} reads a cluster",
    }[row.kind]
    measured = {"ratio": f"{row.measured:.2f} ×", "rate": f"{row.measured:.0%}", "difference": f"{row.measured:+.3f} s"}
    shown = measured.get(row.kind, f"{row.measured:.2f}")
    times = [f"{statistics.median(values):.3f}" for values in (row.ours, row.theirs)]
    processor = ""
    if row.kind == "count":
        times = [f"{values[0]:,.0f} reads" for values in (row.ours, row.theirs)]
    elif row.ours_processor:
        processor = " / ".join(f"{statistics.median(v):.2f}" for v in (row.ours_processor, row.theirs_processor))
    if row.processor_limit is not None:
        limit += f", processor ≤ {row.processor_limit:.2f} ×"
        shown += f", processor {row.processor_ratio:.2f} ×"
    peak = f"{row.memory / MIB:.0f}" if row.memory else ""
    return [
        row.work,
        row.place,
        row.against,
        limit,
        shown,
        "yes" if row.met else "**no**",
        *times,
        processor,
        peak,
        row.others,
        str(len(row.ours)),
    ]


def memory(parts: dict[str, list[Any]]) -> str:
    """The table of the runs that are about memory, and the largest of all others."""
    peaks = [peak for found in parts.values() for peak in found if isinstance(peak, Peak)]
    lines = [
        [p.work, p.note, f"{p.memory / MIB:.0f}", "yes" if p.memory <= p.limit else "**no**", f"{p.seconds:.1f}"]
        for p in peaks
    ]
    others = [(row.memory, row.work) for found in parts.values() for row in found if isinstance(row, Row)]
    series = [(name, row) for name, found in parts.items() for row in found if isinstance(row, Point | Nights)]
    others += [(row.memory, f"{name}, {row.line}") for name, row in series]
    largest, where = max(others, default=(0, "nothing"))
    return (
        "## Memory\n\nThe default configuration may take 300 MiB. One run each.\n\n"
        + table(["work", "", "peak MiB", "within 300 MiB", "s"], lines, 2)
        + f"\n\nThe largest peak of all other runs, bars and series: {largest / MIB:.0f} MiB ({where})."
    )


def latency(parts: dict[str, list[Any]]) -> list[str]:
    """The table of a guest's writes, if they were measured."""
    rows = parts.get("guest-latency", [])
    lines = [[row.work, row.place, *(row.shown if row.writes else ["not measured", "", "", ""])] for row in rows]
    titles = ["meanwhile", "on", "median", "99th percentile", "longest", "writes"]
    return [f"## A running machine's writes\n\n{LATENCY}\n\n{table(titles, lines, 2)}"] if rows else []


def series(name: str, shown: Series, points: list[Point]) -> str:
    """The section of a series: text, plot, table, and what grows faster than the work."""
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(point.line, []).append(point)
    plot(name, shown, lines)
    rows = [
        [line, each.label, f"{middle(each):.3f}", number(1000 * middle(each) / each.units), f"{each.memory / MIB:.0f}"]
        for line, found in lines.items()
        for each in found
    ]
    steep = [text for line, found in lines.items() for text in steeper(line, found)] if shown.work else []
    verdict = "No line grows worse than linearly."
    if steep:
        verdict = "Worse than linear:\n\n" + "\n".join(f"- {text}" for text in steep)
    text = f"## {shown.title}\n\n{shown.text}\n\n![{shown.title}](plots/{name}.svg)\n\n"
    text += table(["", shown.axis, "s", f"ms for each of the {shown.unit}", "MiB"], rows, 1)
    return text + (f"\n\n{verdict}" if shown.work else "")


def nights(parts: dict[str, list[Any]]) -> list[str]:
    """The section of the thousand nights, if they were measured: text, plot, table, and how the last compare."""
    measured = parts.get("scale-nights", [])
    rows = [row for row in measured if isinstance(row, Nights)]
    if not rows:
        return [f"## {NIGHTS.title}\n\nNot measured: {row.against}, {row.note}." for row in measured]
    lines: dict[str, list[Nights]] = {}
    for row in rows:
        lines.setdefault(row.line, []).append(row)
    plot("scale-nights", NIGHTS, {line: [night(row) for row in found] for line, found in lines.items()})
    titles = ["", "nights", "backup s", "processor s", "prune s", "processor s", "mean processor s"]
    titles += ["`list` processor s", "`status` processor s", "points", "MiB stored", "MiB"]
    shown = [[line, *night_cells(row)] for line, found in lines.items() for row in found]
    verdicts = "\n".join(f"- {verdict(line, found)}" for line, found in lines.items() if len(found) > 2)
    head = f"## {NIGHTS.title}\n\n{NIGHTS.text}\n\n![{NIGHTS.title}](plots/scale-nights.svg)"
    return [f"{head}\n\n{table(titles, shown, 2)}\n\n{verdicts}"]


def night(row: Nights) -> Point:
    """Some nights as a point of a plot: the processor time of one, backup and prune."""
    return Point(row.line, row.last, row.label, [row.processor], 1.0, row.memory)


def night_cells(row: Nights) -> list[str]:
    """A row of the nights' table."""
    pruned = [f"{value:.3f}" for value in row.prune] if row.prune else ["", ""]
    looks = [f"{value:.3f}" for value in (*row.backup, row.mean, row.list[1], row.status[1])]
    there = [f"{row.points:,}", f"{row.stored / MIB:,.0f}", f"{row.memory / MIB:.0f}"]
    return [row.label, *looks[:2], *pruned, *looks[2:], *there]


def verdict(line: str, rows: list[Nights]) -> str:
    """How the last nights compare with the second ones: among the first are a first full and the youngest chain."""
    early, late = rows[1], rows[-1]
    return (
        f"{line}: from nights {early.label} to {late.label} a night's processor time went from {early.processor:.3f} s "
        f"to {late.processor:.3f} s ({late.processor / early.processor:.2f} ×), the points from {early.points:,} to "
        f"{late.points:,}."
    )


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def middle(point: Point) -> float:
    """The median of its runs, in seconds."""
    return statistics.median(point.seconds)


def steeper(line: str, points: list[Point]) -> list[str]:
    """
    Where a line gets steeper: the price of one more unit of x between two points, held against that of all before.

    A fixed cost of starting therefore hides nothing.  Where nothing noticeable was paid before, time must have grown by
    a larger factor than x.  A point above a later one is noise: its time counts as the later one's.
    """
    times = [min(map(middle, points[index:])) for index in range(len(points))]
    found = []
    for index in range(1, len(points) - 1):
        before, after = points[index], points[index + 1]
        rise, past = times[index + 1] - times[index], times[index] - times[0]
        price, known = rise / (after.x - before.x), past / (before.x - points[0].x)
        steep = price > known * STEEPER if past > NOTICEABLE else times[index + 1] / times[index] > after.x / before.x
        if rise > NOTICEABLE and steep:
            found.append(
                f"{line}: from {before.label} to {after.label}, {times[index]:.2f} s became {times[index + 1]:.2f} s; "
                f"one more on the axis costs {1000 * price:.3g} ms, and {1000 * known:.3g} ms before"
            )
    return found


def plot(name: str, shown: Series, lines: dict[str, list[Point]]) -> None:
    """Draw a series as plots/NAME.svg."""
    import matplotlib as mpl  # noqa: PLC0415 - the tables do without

    mpl.use("svg")
    import matplotlib.pyplot as plt  # noqa: PLC0415 - see above

    mpl.rcParams["svg.hashsalt"] = "pybackup"  # the same figures make the same file
    figure, axes = plt.subplots(figsize=(7, 4))
    for line, points in lines.items():
        axes.plot([each.x for each in points], [middle(each) for each in points], marker="o", label=line)
    every = [each for points in lines.values() for each in points]
    values = [each.x for each in every]
    if max(values) / min(values) > 20:  # fewer are readable on a linear axis
        axes.set_xscale("log")
    if shown.work and math.log10(max(map(middle, every))) > 1:
        axes.set_yscale("log")
    axes.set_ylim(bottom=None if axes.get_yscale() == "log" else 0)
    axes.set_xlabel(shown.axis)
    axes.set_ylabel("s")
    axes.grid(alpha=0.3)
    axes.legend()
    (HERE / "plots").mkdir(exist_ok=True)
    figure.savefig(HERE / "plots" / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def runs(results: dict[str, Any]) -> str:
    """When each part ended, and how long it took."""
    rows = [
        [name, part["date"], part["commit"], f"{part['load']:.1f}", f"{part['took']:.0f}"]
        for name, part in results["parts"].items()
    ]
    return "## The parts\n\n" + table(["part (`--only`)", "ended", "commit", "load before", "s"], rows, 3)


if __name__ == "__main__":
    main()
