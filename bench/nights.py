"""
A thousand nights of a small disk: does the thousandth cost what the hundredth did?

A night is what cron would run, as processes of their own: something is written to the image (qemu-io), `incremental`,
and with retention `prune`; all of them see a clock that is a day further on (libfaketime), since retention counts days.
Times are taken by this program, whose clock is the real one.  At the end programs that are not ours judge what came of
it; what they do not find right ends the bench.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from inputs import Bench, data_files, new_repository, remove
from measure import CLUSTER, MIB, PYBACKUP, Nights, Row, Usage, fail, largest, run, timed

SIZE = 64 * MIB
WRITTEN = 16 * MIB
"""Bytes of the disk that hold data, from the first night on: no night is to cost more because the disk is fuller."""
EACH_NIGHT = 4
"""Clusters written before a night."""
FIRST = datetime(2027, 1, 1, 3)  # noqa: DTZ001 - of a clock as cron has it
RETENTION = "{daily: 7, weekly: 5, monthly: 12, yearly: 3}"
RESTORED = 8
"""Points besides the newest that are restored at the end, chosen at random."""


def thousand(bench: Bench) -> Iterator[Nights | Row]:
    """With retention, and without: then all points stay, and a chain is begun anew where it has `max_chain` points."""
    if shutil.which("faketime") is None:
        yield Row("a thousand nights", "`faketime`", "missing", note="not installed here (apt-get install faketime)")
        return
    for line, retention in (("with retention", RETENTION), ("without", None)):
        yield from _Series.of(bench, line, retention).run(*((30, 10) if bench.quick else (1000, 100)))
        bench.tmpfs.clear(*bench.kept)


def on_night(night: int, *command: str) -> list[str]:
    """A command that sees the clock of a night.  Python waits by the monotonic clock, which must agree: no -m."""
    return ["faketime", "-f", f"@{FIRST + timedelta(days=night):%Y-%m-%d %H:%M:%S}", *command]


@dataclass
class _Series:
    """The machine of one series: its image, its repository, and for each point the sum of the disk's content then."""

    line: str
    folder: Path
    program: list[str]
    prunes: bool
    rng: random.Random = field(default_factory=lambda: random.Random("nights"))
    sums: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, bench: Bench, line: str, retention: str | None) -> _Series:
        """Make an image and a configuration."""
        folder = bench.tmpfs.folder
        keys = {} if retention is None else {"retention": retention}
        machines = f"{{web1: {{disks: {{vda: {{image: {folder / 'vda.qcow2'}}}}}}}}}"
        options = bench.configured(bench.tmpfs, repository=folder / "repo", bitmap="b1", machines=machines, **keys)
        made = cls(line, folder, [PYBACKUP, *options, "--quiet"], retention is not None)
        new_repository(made.repository)
        run(["qemu-img", "create", "-q", "-f", "qcow2", str(made.image), str(SIZE)])
        for start in range(0, WRITTEN, MIB):
            made.write([start // CLUSTER], MIB)
        return made

    @property
    def image(self) -> Path:
        """The disk."""
        return self.folder / "vda.qcow2"

    @property
    def repository(self) -> Path:
        """Where the points are."""
        return self.folder / "repo"

    def run(self, nights: int, bucket: int) -> Iterator[Nights]:
        """So many nights, a row for each bucket of them; and the judgement."""
        for first in range(1, nights + 1, bucket):
            used = [self.night(night) for night in range(first, first + bucket)]
            yield self.row(first, first + bucket - 1, [list(column) for column in zip(*used, strict=True)])
        self.judge(nights)

    def night(self, night: int) -> tuple[Usage, Usage]:
        """One night; what its backup and its prune took."""
        clusters = self.rng.sample(range(WRITTEN // CLUSTER), EACH_NIGHT)
        self.write(clusters, CLUSTER)
        before = set(self.points())
        backup = timed([on_night(night, *self.program, "incremental")])
        [point] = set(self.points()) - before
        self.sums[point] = self.sum_of(self.image)
        prune = timed([on_night(night, *self.program, "prune")]) if self.prunes else Usage(0, 0, 0)
        return backup, prune

    def write(self, clusters: Sequence[int], length: int) -> None:
        """Play the guest: other bytes each time, so many from the start of each of these clusters."""
        content = self.folder / "content"
        content.write_bytes(self.rng.randbytes(length))
        words = [word for at in clusters for word in ("-c", f"write -q -s {content} {at * CLUSTER} {length}")]
        run(["qemu-io", "-f", "qcow2", *words, str(self.image)])

    def points(self) -> list[str]:
        """Of the repository, in no order."""
        return [path.stem for path in self.repository.glob("web1/*.json")]

    def sum_of(self, image: Path) -> str:
        """SHA-256 of a disk's content as QEMU reads it."""
        raw = self.folder / "raw"
        run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(raw)])
        return run(["sha256sum", str(raw)]).split()[0]

    def row(self, first: int, last: int, used: Sequence[Sequence[Usage]]) -> Nights:
        """What some nights took, and what there is after them."""
        looks = {name: [timed([on_night(last, *self.program, name)]) for _ in range(3)] for name in ("list", "status")}
        backup, prune = used
        return Nights(
            line=self.line,
            first=first,
            last=last,
            backup=_middle(backup),
            prune=_middle(prune) if self.prunes else None,
            mean=statistics.mean(each.processor for each in (*backup, *prune)) * len(used),
            list=_middle(looks["list"]),
            status=_middle(looks["status"]),
            points=len(self.points()),
            stored=sum(Path(path).stat().st_size for path in data_files(self.repository)),
            memory=largest([*backup, *prune]),
        )

    def judge(self, nights: int) -> None:
        """Hold everything against programs that are not ours, or end the bench."""
        run([*self.program, "verify"])
        listed = json.loads(run([*self.program, "list", "--json"]))
        newest = max(listed, key=lambda point: point["sequence"])["point"]
        chain = self.repository / "web1" / f"vda.{newest}.qcow2"
        for path in data_files(self.repository):
            run(["qemu-img", "check", "-q", "-f", "qcow2", path])
        run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", str(chain), str(self.image)])
        older = sorted(set(self.points()) - {newest})
        for point in [newest, *self.rng.sample(older, min(RESTORED, len(older)))]:
            self.require_restored(point)
        print(f"  {self.line}: after {nights} nights all of {len(listed)} points are sound", flush=True)

    def require_restored(self, point: str) -> None:
        """A point comes back as the disk was in its night; the newest one also by cmp, byte for byte."""
        restored = self.folder / "restored"
        run([*self.program, "restore", f"web1/{point}", str(restored)])
        if run(["sha256sum", str(restored)]).split()[0] != self.sums[point]:
            fail(["sha256sum", str(restored)], 1, f"point {point} is not what the disk was in its night")
        if point == max(self.points()):
            self.sum_of(self.image)
            run(["cmp", str(self.folder / "raw"), str(restored)])
        remove(restored)


def _middle(used: Sequence[Usage]) -> list[float]:
    """Medians: wall seconds and processor seconds."""
    return [
        round(statistics.median(each.seconds for each in used), 4),
        round(statistics.median(each.processor for each in used), 4),
    ]
