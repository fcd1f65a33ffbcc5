"""
What a night costs does not grow with the machine's age, counted and not timed; and sixty nights with their dates.

The clock alone is not real here: `make bench ARGS='--only scale-nights'` has a thousand nights of real processes.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from histories import History
from lab import CLUSTER, Night, call_pybackup, check_repository, raw_copy, require_identical, run, write

from backup.model import chain
from backup.operations import backup, prune
from backup.operations.prune import Request
from backup.planning.retention import Policy
from backup.qcow2 import Reader
from backup.storage import locks
from backup.storage.folder import FolderFiles

AS = ["--machine", "m", "--disk", "vda"]


class Costs:
    """Files of a repository that the program opens, by their suffix, and looks into tables of data files."""

    def __init__(self, monkeypatch) -> None:
        self.count: Counter[str] = Counter()
        self._watch(monkeypatch, FolderFiles, "read", lambda _files, name, _: Path(name).suffix)
        self._watch(monkeypatch, FolderFiles, "open", lambda _files, name: Path(name).suffix)
        self._watch(monkeypatch, Reader, "allocated", lambda *_: "tables")
        self._watch(monkeypatch, locks, "_why_held", lambda *_: "held")

    def _watch(self, monkeypatch, owner, name: str, kind) -> None:
        real = getattr(owner, name)

        def watched(*args, **keywords):
            self.count[kind(*args)] += 1
            return real(*args, **keywords)

        monkeypatch.setattr(owner, name, watched)

    def of(self, action) -> Counter[str]:
        self.count.clear()
        action()
        return Counter(self.count)


def aged_night(folder: Path, points: int, links: int) -> Night:
    """A disk with so many points, of which only the newest `links` are its chain's."""
    folder.mkdir()
    history = History.of(folder, "aged", CLUSTER)
    for number in range(points - links):
        history.point("vda", full=number % 5 == 0, size=20 * CLUSTER)
    night = Night.of(folder)
    night.full(*AS)
    for number in range(links - 1):
        a_night(night, number)
    return night


def a_night(night: Night, number: int) -> None:
    write(night.image, f"write -P {number + 1} {number % 20 * CLUSTER} 64k", f"write -P {number + 1} 2M 64k")
    done = night.incremental(*AS)
    assert (done.rc, done.disk["kind"]) == (0, "incremental"), done


def test_points_that_are_no_part_of_the_chain_cost_a_night_one_look_at_their_manifest_each(tmp_path, monkeypatch):
    young, old = (aged_night(tmp_path / str(points), points, 3) for points in (15, 60))
    costs = Costs(monkeypatch)
    few, many = (costs.of(lambda night=night: a_night(night, 9)) for night in (young, old))
    assert many[".json"] - few[".json"] == 60 - 15
    assert few[".json"] == 15 + 2  # and the marker, before anything is done and at the machine's beginning
    del few[".json"], many[".json"]
    assert many == few
    assert few[".qcow2"] >= 3


def test_a_longer_chain_costs_a_night_a_few_looks_at_each_link(tmp_path, monkeypatch):
    short, long = (aged_night(tmp_path / str(links), links, links) for links in (4, 16))
    costs = Costs(monkeypatch)
    few, many = (costs.of(lambda night=night: a_night(night, 30)) for night in (short, long))
    assert many[".qcow2"] - few[".qcow2"] == 3 * 12  # to decide, to plan, to check spots
    assert 0 < many["tables"] - few["tables"] <= 2 * 12  # to plan, to check spots, however many those are


def test_a_prune_looks_at_each_link_once(tmp_path, monkeypatch):
    looks = Counter()
    for points in (10, 40):
        history = History.of(tmp_path / str(points), "chain", 4096)
        for number in range(points):
            history.point("vda", full=number == 0, size=20 * 4096)
        real = chain.parent_link

        def watched(*args, points=points, real=real):
            looks[points] += 1
            return real(*args)

        with monkeypatch.context() as patched:
            patched.setattr(chain, "parent_link", watched)
            report = prune.prune(history.machine, Request(Policy(last=points), dry_run=True), None)
        assert len(report.points) == points
    assert looks == {10: 9, 40: 39}


class Clock(datetime):
    """The time of day is real, and the day is moved on."""

    days = 0

    @classmethod
    def now(cls, tz=None):
        return datetime(2027, 1, 1, 3, tzinfo=UTC) + timedelta(days=cls.days)


@pytest.fixture
def nights(tmp_path, monkeypatch) -> Night:
    """A disk that is backed up and pruned by a configuration, on the days of `Clock`."""
    monkeypatch.setattr(backup, "datetime", Clock)
    monkeypatch.setattr(prune, "datetime", Clock)
    monkeypatch.setattr(Clock, "days", 0)
    night = Night.of(tmp_path)
    (tmp_path / "config.yaml").write_text(
        f"repository: {night.repository}\n"
        "bitmap: b1\n"
        "retention: {daily: 4, weekly: 3, monthly: 2, batch: 3, share: 1000, after_backup: true}\n"
        f"machines: {{m: {{disks: {{vda: {{image: {night.image}}}}}}}}}\n"
    )
    return night


def next_night(night: Night) -> str:
    """The point of one more night."""
    Clock.days += 1
    done = call_pybackup(["--config", night.image.with_name("config.yaml"), "incremental", "--json"])
    assert (done.rc, done.disk["kind"]) == (0, "full" if Clock.days == 1 else "incremental"), done
    return done.machine["point"]


def test_sixty_nights_with_retention_cost_the_same_and_what_is_kept_restores(nights, tmp_path, monkeypatch):
    rng = random.Random("sixty nights")
    costs = Costs(monkeypatch)
    spent, sums, kept = [], {}, []
    for number in range(60):
        write(nights.image, *(f"write -P {number + 1} {rng.randrange(64) * CLUSTER} 64k" for _ in range(2)))
        points = []
        spent.append(costs.of(lambda points=points: points.append(next_night(nights))))
        sums[points[0]] = run("sha256sum", raw_copy(nights.image, tmp_path / "now.raw")).split()[0]
        kept.append(len(list(nights.repository.glob("m/*.json"))))
    # Three weeks in which as many points are kept as in the three that end the sixty nights.
    for what in (".json", ".qcow2", ".b3", "tables", "held"):
        assert max(cost[what] for cost in spent[39:]) <= 1.2 * max(cost[what] for cost in spent[18:39]), what
    assert max(kept[39:]) <= max(kept[18:39]) <= 4 + 3 + 2 + 2 + 1
    check_repository(nights.repository)
    assert call_pybackup(["verify", "m", "--deep", "--repo", nights.repository]).rc == 0
    points = [json.loads(path.read_bytes()) for path in nights.repository.glob("m/*.json")]
    newest = max(points, key=lambda point: point["sequence"])
    assert newest["sequence"] == 60
    require_newest_is(nights, newest["point"], tmp_path)
    for point in (found["point"] for found in points):
        restored = tmp_path / f"{point}.raw"
        assert call_pybackup(["restore", f"m/{point}", restored, "--repo", nights.repository]).rc == 0
        assert run("sha256sum", restored).split()[0] == sums[point]


def require_newest_is(night: Night, point: str, folder: Path) -> None:
    """QEMU and cmp find the image in the newest point."""
    data = night.repository / "m" / f"vda.{point}.qcow2"
    run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", data, night.image)
    raw = folder / "restored.raw"
    assert call_pybackup(["restore", "m/latest", raw, "--repo", night.repository]).rc == 0
    require_identical(raw_copy(night.image, folder / "expected.raw"), raw)
