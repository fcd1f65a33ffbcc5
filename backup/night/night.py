"""
A night: the machines are backed up one after the other, and each is pruned after its backup where that is configured.

A failure of one machine never prevents the backups of the others.  Every outcome is a value, which the command shows as
soon as the machine is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backup.errors import BackupError, merged_exit_code
from backup.operations.backup import Report, create
from backup.runtime.failures import attempt
from backup.runtime.progress import Progress, Quiet

if TYPE_CHECKING:
    from backup.config.settings import Config, Retention
    from backup.operations.prune import Report as PruneReport
    from backup.operations.request import Request
    from backup.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    The outcome of one machine: the result of its backup, and of its prune if there was one.

    A backup that failed is a failure of the machine; a prune that failed is only a warning, since the point is made.
    """

    machine: str
    report: Report | BackupError
    pruned: PruneReport | BackupError | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of the backup, then those of the prune."""
        if isinstance(self.report, BackupError):
            return ()
        if self.pruned is None:
            return self.report.warnings
        if isinstance(self.pruned, BackupError):
            return (*self.report.warnings, f"not pruned: {self.pruned.message}")
        return (*self.report.warnings, *self.pruned.warnings)


@dataclass(frozen=True, slots=True)
class Night:
    """
    How the machines of a night are backed up and pruned.

    `open_repository` opens the repository anew for each machine: its disk may be gone since the machine before.
    `watch` shows the progress of one machine's backup.
    """

    open_repository: Callable[[], Repository]
    config: Config
    workers: int
    watch: Callable[[], AbstractContextManager[Progress]]

    def run(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """Back up and prune the machines, in this order; yield each machine's outcome when the machine is done."""
        for request in requests:
            yield self._one(request)

    def _one(self, request: Request) -> Outcome:
        report = attempt(lambda: self._back_up(request))
        retention = self.config.retention_of(request.machine)
        if isinstance(report, BackupError) or request.dry_run or retention is None or not retention.after_backup:
            return Outcome(request.machine, report)
        return Outcome(request.machine, report, attempt(lambda: self._prune(request.machine, retention)))

    def _back_up(self, request: Request) -> Report:
        with self.watch() as progress:
            return create(self.open_repository, request, progress)

    def _prune(self, machine: str, retention: Retention) -> PruneReport:
        from backup.operations import prune  # noqa: PLC0415 - a night without a prune need not import it

        request = prune.Request(retention.policy, retention.batch, self.workers)
        return prune.prune(self.open_repository().machine(machine), request, Quiet())


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """Merge the outcomes of all machines into one exit code."""
    machines = list(outcomes)
    codes = [outcome.report.exit_code for outcome in machines if isinstance(outcome.report, BackupError)]
    return merged_exit_code(codes, warned=any(outcome.warnings for outcome in machines))
