"""
Copies of several machines, to one place or several; what fails for one machine or place does not stop the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from backup.errors import BackupError, NotFound, merged_exit_code
from backup.operations import copy, verify
from backup.operations.copy import Replicated
from backup.repository.machine import Machine, points_named
from backup.repository.repository import Repository
from backup.runtime.failures import attempt
from backup.runtime.progress import Progress


@dataclass(frozen=True, slots=True)
class Target:
    """
    A place to copy to.

    Attributes
    ----------
    name : str
        The place as people know it.
    open : callable
        Opens the place as a copy of a repository.
    wants : callable
        Tells whether a machine is copied there when no machine is named.
    limit : int or None
        The greatest number of bytes that are copied in a second.
    """

    name: str
    open: Callable[[Repository], Repository]
    wants: Callable[[str], bool] = lambda _: True
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A machine to copy, all of it or one point and those that it builds on."""

    source: Repository
    machine: Machine
    point: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one machine in one place; `machine` is None where the place as a whole could not be used."""

    place: str
    machine: str | None
    result: Replicated | BackupError
    seconds: float

    @property
    def exit_code(self) -> int:
        """The exit code that this outcome alone would have."""
        if isinstance(self.result, BackupError):
            return self.result.exit_code
        return verify.exit_code(self.result.problems)


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """Merge the outcomes into one exit code."""
    return merged_exit_code(outcome.exit_code for outcome in outcomes)


@dataclass(frozen=True, slots=True)
class Copying:
    """How machines are copied; `watch` shows the progress of one machine."""

    workers: int
    watch: Callable[[], AbstractContextManager[Progress]]
    dry_run: bool = False

    def to_place(self, target: Target, source: Repository, jobs: Sequence[Job] | None) -> Iterator[Outcome]:
        """
        Copy machines to a place; yield each machine's outcome when the machine is done.

        `jobs` are None for all machines of `source` that the place wants and that have a point.
        """
        began = time.monotonic()
        second = self.open(target, source)
        if isinstance(second, BackupError):
            yield Outcome(target.name, None, second, time.monotonic() - began)
            return
        chosen = attempt(lambda: jobs if jobs is not None else _wanted(target, source))
        if isinstance(chosen, BackupError):
            yield Outcome(target.name, None, chosen, time.monotonic() - began)
            return
        for job in chosen:
            yield self.one(target, second, job)

    def one(self, target: Target, second: Repository, job: Job) -> Outcome:
        """Copy one machine to a place that is open."""
        began = time.monotonic()
        result = attempt(lambda: self._copied(target, second, job))
        return Outcome(target.name, job.machine.name, result, time.monotonic() - began)

    def open(self, target: Target, source: Repository) -> Repository | BackupError:
        """Open a place, or return why it cannot be used."""

        def opened() -> Repository:
            second = target.open(source)
            if not self.dry_run:
                second.tidy()
            return second

        return attempt(opened)

    def _copied(self, target: Target, second: Repository, job: Job) -> Replicated:
        machine = second.machine(job.machine.name)
        if not points_named(job.machine.listing()):
            raise NotFound(f"machine {job.machine.name} has no point", hint="see: `pybackup list`")
        if self.dry_run:
            return copy.rehearse(job.machine, machine, job.point)
        with self.watch() as progress:
            return copy.replicate(
                job.machine,
                machine,
                job.point,
                workers=self.workers,
                begin=lambda total: progress.begin(job.machine.name, total),
                advance=progress.advance,
                limit=target.limit,
            )


def _wanted(target: Target, source: Repository) -> list[Job]:
    machines = (source.machine(name) for name in source.machine_names() if target.wants(name))
    return [Job(source, machine) for machine in machines if _has_points(machine)]


def _has_points(machine: Machine) -> bool:
    """Tell whether a machine has a point; a folder that cannot be listed is reported when it is copied."""
    points = attempt(lambda: points_named(machine.listing()))
    return isinstance(points, BackupError) or bool(points)
