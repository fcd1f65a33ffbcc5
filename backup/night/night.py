"""
A night: the machines are backed up one after the other, and each is copied to second places and pruned after its backup
where that is configured.

A failure of one machine never prevents the backups of the others.  Every outcome is a value, which the command shows as
soon as the machine is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backup.errors import BackupError, merged_exit_code
from backup.operations.backup import Report, create
from backup.runtime.failures import attempt
from backup.runtime.progress import Progress, Quiet

if TYPE_CHECKING:
    from backup.config.settings import Config, Retention
    from backup.operations.copies import Outcome as CopyOutcome
    from backup.operations.copies import Target
    from backup.operations.prune import Report as PruneReport
    from backup.operations.request import Request
    from backup.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    The outcome of one machine: the result of its backup, and those of its copies and its prune if there were any.

    A backup or a copy that failed is a failure of the machine; the point that was made counts all the same.  A prune
    that failed is only a warning.
    """

    machine: str
    report: Report | BackupError
    pruned: PruneReport | BackupError | None = None
    copies: tuple[CopyOutcome, ...] = ()

    @property
    def exit_codes(self) -> tuple[int, ...]:
        """The exit codes that the backup and the copies alone would have."""
        made = self.report.exit_code if isinstance(self.report, BackupError) else 0
        return (made, *(copy.exit_code for copy in self.copies))

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
    How the machines of a night are backed up, copied and pruned.

    `open_repository` opens the repository anew for each machine: its disk may be gone since the machine before.
    `watch` shows the progress of one machine's backup.  `targets` are the places to which machines are copied after
    their backups.
    """

    open_repository: Callable[[], Repository]
    config: Config
    workers: int
    watch: Callable[[], AbstractContextManager[Progress]]
    targets: Sequence[Target] = ()

    def run(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """Back up and prune the machines, in this order; yield each machine's outcome when the machine is done."""
        seconds: dict[str, Repository] = {}
        for request in requests:
            yield self._one(request, seconds)

    def _one(self, request: Request, seconds: dict[str, Repository]) -> Outcome:
        """Back up, copy and prune one machine; `seconds` are the second places that are open."""
        report = attempt(lambda: self._back_up(request))
        if isinstance(report, BackupError) or request.dry_run:
            return Outcome(request.machine, report)
        wanted = [target for target in self.targets if target.wants(request.machine)]
        copied = tuple(self._copy(request.machine, target, seconds) for target in wanted)
        retention = self.config.retention_of(request.machine)
        if retention is None or not retention.after_backup:
            return Outcome(request.machine, report, copies=copied)
        pruned = attempt(lambda: self._prune(request.machine, retention))
        return Outcome(request.machine, report, pruned, copied)

    def _copy(self, machine: str, target: Target, seconds: dict[str, Repository]) -> CopyOutcome:
        from backup.operations import copies  # noqa: PLC0415 - a night without a copy need not import it

        copying = copies.Copying(self.workers, self.watch)
        source = attempt(self.open_repository)
        if isinstance(source, BackupError):
            return copies.Outcome(target.name, machine, source, 0.0)
        second = seconds.get(target.name) or copying.open(target, source)
        if isinstance(second, BackupError):
            return copies.Outcome(target.name, machine, second, 0.0)
        outcome = copying.one(target, second, copies.Job(source, source.machine(machine)))
        if isinstance(outcome.result, BackupError):
            seconds.pop(target.name, None)  # the place is opened anew for the next machine
        else:
            seconds[target.name] = second
        return outcome

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
    codes = [code for outcome in machines for code in outcome.exit_codes]
    return merged_exit_code(codes, warned=any(outcome.warnings for outcome in machines))
