"""The --keep options of `prune`, completed from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from backup.config.settings import Retention
from backup.errors import UsageError
from backup.planning.retention import MAX_COUNT, Batch, Duration, Policy
from backup.units import parse_count


@dataclass(frozen=True, slots=True)
class KeepOptions:
    """The --keep options and --batch, as given."""

    policy: Policy
    batch: int | None

    @classmethod
    def of(cls, counts: Mapping[str, str | None], within: str | None, batch: str | None) -> KeepOptions:
        """
        Read the texts of the options.

        Raises
        ------
        UsageError
            One is not a number or not a duration, or all counts are 0.
        """
        numbers = {
            rule: parse_count(f"--keep-{rule}", text, 0, MAX_COUNT) for rule, text in counts.items() if text is not None
        }
        policy = Policy(**numbers, within=None if within is None else Duration.parse(within))
        if numbers and policy.empty:
            raise UsageError(
                "the --keep options keep nothing: every count is 0", hint="give at least one count above 0"
            )
        return cls(policy, None if batch is None else parse_count("--batch", batch, 1, MAX_COUNT))

    def retention(self, configured: Retention | None, machine: str) -> Retention:
        """
        Return the retention of a machine: the options, completed from the configured one.

        Raises
        ------
        UsageError
            Neither the options nor the configuration say what to keep.
        """
        retention = configured or Retention(Policy(), Batch())
        if not self.policy.empty:
            retention = replace(retention, policy=self.policy)
        if retention.policy.empty:
            raise UsageError(
                f"nothing says which points of machine {machine} to keep",
                hint="give --keep-last N or another --keep option, or `retention:` in the configuration",
            )
        if self.batch is None:
            return retention
        return replace(retention, batch=replace(retention.batch, points=self.batch))
