"""
From the command line and the configuration to what is kept of which machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from backup.cli import settings
from backup.config.reader import Config, Retention
from backup.errors import UsageError
from backup.operations import prune
from backup.operations.prune import Report, Request
from backup.planning.retention import MAX_COUNT, Batch, Duration, Policy
from backup.repository.repository import Repository
from backup.runtime.progress import Progress


@dataclass(frozen=True, slots=True)
class Keep:
    """The options of `prune`, as given; the --keep options take the place of the configuration's, all together."""

    policy: Policy
    batch: int | None

    @classmethod
    def of(cls, counts: Mapping[str, str | None], within: str | None, batch: str | None) -> Keep:
        """
        Read the options' texts.

        Raises
        ------
        UsageError
            One is no number, or no duration.
        """
        numbers = {rule: _number(f"--keep-{rule}", text, 0) for rule, text in counts.items() if text is not None}
        policy = Policy(**numbers, within=None if within is None else Duration.parse(within))
        if numbers and policy.empty:
            raise UsageError(
                "the --keep options keep nothing: every count is 0", hint="give one of them a higher count"
            )
        return cls(policy, None if batch is None else _number("--batch", batch, 1))

    def retention(self, config: Config, machine: str) -> Retention:
        """
        What counts for a machine.

        Raises
        ------
        UsageError
            Neither the options nor the configuration say what to keep.
        """
        found = config.retention_of(machine) or Retention(Policy(), Batch())
        if not self.policy.empty:
            found = replace(found, policy=self.policy)
        if found.policy.empty:
            raise UsageError(
                f"nothing says which points of machine {machine} to keep",
                hint="give --keep-last N or another --keep option, or `retention:` in the configuration",
            )
        return found if self.batch is None else replace(found, batch=replace(found.batch, points=self.batch))


def _number(option: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_COUNT)) and least <= int(text) <= MAX_COUNT):
        raise UsageError(f"{option} {text!r} is no count", hint=f"write a whole number from {least}")
    return int(text)


def prune_one(
    repository: Path, machine: str, wanted: Retention, config: Config, progress: Progress, *, dry_run: bool = False
) -> Report:
    """
    Prune one machine of the repository.

    Raises
    ------
    BackupError
        See `prune.prune`.
    """
    request = Request(wanted.policy, wanted.batch, settings.workers(config), dry_run)
    return prune.prune(Repository.open(repository, settings.modes(config)).machine(machine), request, progress)
