"""The policy of a night, over machines whose disks lie in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Self

import pytest
from memory_source import MemoryHost, MemorySource
from places import create_repository, repository_at

from backup.config.settings import Config, Retention
from backup.errors import BackupError, Failed, SourceError
from backup.night.night import Night, Outcome, exit_code
from backup.operations.request import Request
from backup.planning.decision import FULL
from backup.planning.retention import Batch, Policy
from backup.runtime.progress import Quiet

SIZE = 256 << 10


class Unreachable(MemoryHost):
    """A machine that cannot be connected to."""

    error: Exception = SourceError("nothing listens", hint="start it")

    def __enter__(self) -> Self:
        raise self.error


class Faulty(Unreachable):
    """A machine that meets a bug of pybackup's."""

    error = ZeroDivisionError("division by zero")


def request(machine: str, host: MemoryHost, **options: object) -> Request:
    return Request(machine, host, host.requests(), FULL, "b1", **options)


def disks() -> list[MemorySource]:
    return [MemorySource(SIZE)]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    create_repository(tmp_path / "repository")
    return tmp_path / "repository"


@contextmanager
def unwatched() -> Iterator[Quiet]:
    yield Quiet()


def night(repository: Path, *, after_backup: bool = False) -> Night:
    retention = Retention(Policy(last=1), Batch(1), after_backup=after_backup)
    return Night(partial(repository_at, repository), Config(retention=retention), 1, unwatched)


def test_machines_come_in_their_order_and_none_keeps_the_others_from_their_backups(repository):
    machines = [
        request("zebra", MemoryHost(disks())),
        request("unreachable", Unreachable(disks())),
        request("faulty", Faulty(disks())),
        request("ant", MemoryHost(disks())),
    ]
    zebra, unreachable, faulty, ant = outcomes = list(night(repository).run(machines))
    assert [outcome.machine for outcome in outcomes] == ["zebra", "unreachable", "faulty", "ant"]
    assert (zebra.report.point is None, ant.report.point is None) == (False, False)
    assert isinstance(unreachable.report, SourceError)
    assert isinstance(faulty.report, Failed)
    assert "a bug in pybackup: ZeroDivisionError" in faulty.report.message
    assert exit_code(outcomes) == 1


def test_an_outcome_is_there_before_the_next_machine_begins(repository):
    host = MemoryHost(disks())
    outcomes = night(repository).run([request("first", MemoryHost(disks())), request("second", host)])
    assert next(outcomes).machine == "first"
    assert host.opened == []
    assert next(outcomes).machine == "second"
    assert len(host.opened) == 1


@pytest.mark.parametrize("after_backup", [False, True])
def test_a_machine_is_pruned_after_its_backup_where_that_is_configured(repository, after_backup):
    host = MemoryHost(disks())
    for _ in range(2):
        [outcome] = night(repository, after_backup=after_backup).run([request("machine", host)])
    assert (outcome.pruned is not None) == after_backup
    points = repository_at(repository).machine("machine").contents().manifests
    assert len(points) == (1 if after_backup else 2)
    assert exit_code([outcome]) == 0


def test_nothing_is_pruned_after_a_failure_or_on_a_dry_run(repository):
    host = MemoryHost(disks())
    for _ in range(2):
        list(night(repository).run([request("machine", host)]))
    pruning = night(repository, after_backup=True)
    outcomes = [*pruning.run([request("machine", Unreachable(disks())), request("machine", host, dry_run=True)])]
    assert [outcome.pruned for outcome in outcomes] == [None, None]
    assert len(repository_at(repository).machine("machine").contents().manifests) == 2


def test_a_prune_that_fails_is_a_warning_and_the_point_stands(repository, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("backup.operations.prune.prune", fails)
    [outcome] = night(repository, after_backup=True).run([request("machine", MemoryHost(disks()))])
    assert outcome.report.point is not None
    assert isinstance(outcome.pruned, BackupError)
    assert outcome.warnings == ("not pruned: No space left on device",)
    assert exit_code([outcome]) == 3


def test_failures_of_one_kind_keep_their_code_and_others_become_one():
    source, failed = SourceError("", hint=""), Failed("", hint="")
    assert exit_code([]) == 0
    assert exit_code([Outcome("a", source), Outcome("b", source)]) == 13
    assert exit_code([Outcome("a", source), Outcome("b", failed)]) == 1
