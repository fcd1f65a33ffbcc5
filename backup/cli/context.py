"""
The options that every command has, and how an error is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from backup.cli import hints, output
from backup.errors import BackupError, Interrupted, UsageError, merged_exit_code
from backup.runtime.failures import as_backup_error

if TYPE_CHECKING:
    from backup.config.settings import Config

COMMON = ("config", "verbose", "quiet", "debug", "json")
"""Options that are taken before the command and after it."""


@dataclass(slots=True)
class Options:
    """The common options, wherever they stood, and --repo, which hints repeat."""

    config: Path | None = None
    verbose: bool = False
    quiet: bool = False
    debug: bool = False
    json: bool = False
    """The command was asked for JSON: then errors are a document too."""
    repo: str | None = None
    loaded: Config | None = None
    """The configuration, once it was read."""
    program: str = "pybackup"
    """What is being parsed: pybackup, or one of its commands, such as pybackup list."""

    def reset(self, *, json: bool) -> None:
        """Nothing is parsed yet; `json`: whether --json seems to be among the arguments."""
        self.config = self.repo = self.loaded = None
        self.verbose = self.quiet = self.debug = False
        self.json = json
        self.program = "pybackup"

    def take(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """
        Take the options before the command, and after it once those are parsed as well.

        Raises
        ------
        UsageError
            They contradict each other.
        """
        configs = [found["config"] for found in (before, after) if found.get("config") is not None]
        self.config = Path(configs[0]) if configs else None
        self.verbose, self.quiet, self.debug = (
            bool(before[name] or after.get(name)) for name in ("verbose", "quiet", "debug")
        )
        if after:
            self.json = before["json"] or after["json"]
            self.repo = after.get("repo")
        if len(configs) > 1:
            raise given_twice("--config")
        if self.verbose and self.quiet:
            raise UsageError("--verbose together with --quiet", hint="choose one")
        if self.verbose or self.debug:
            import logging

            logging.basicConfig(level=logging.INFO, format="pybackup: %(message)s")


options = Options()


def given_twice(option: str) -> UsageError:
    """The error of an option that takes one value and was given two."""
    return UsageError(f"{option} is given twice", hint=f"it takes one value; see: {options.program} --help")


class Warned(Protocol):
    """What came of one machine."""

    @property
    def warnings(self) -> Sequence[str]:
        """One line each."""


def explained(error: Exception) -> BackupError:
    """What ends a command or a machine's backup, as an error of two lines, whose hint has the user's options."""
    found = as_backup_error(error)
    found.hint = completed(found.hint)
    return found


def completed(hint: str) -> str:
    """A hint, or another text with commands to run, with the options that the user gave."""
    return hints.complete(hint, options.repo, None if options.config is None else str(options.config))


def fail(error: BackupError | Interrupted) -> int:
    """Show what ends the program; the exit code."""
    show_error(error)
    if options.json:
        output.document({"error": output.error_object(error)})
    return error.exit_code


def show_error(error: BackupError | Interrupted, of: str | None = None) -> None:
    """Show an error; `of` is the machine, where there are several."""
    if options.debug:
        output.traceback(error)
    output.error(error, of)


def common_code(outcomes: Sequence[Warned | BackupError]) -> int:
    """Merge what came of several machines into the exit code of the command."""
    codes = [outcome.exit_code for outcome in outcomes if isinstance(outcome, BackupError)]
    warned = any(outcome.warnings for outcome in outcomes if not isinstance(outcome, BackupError))
    return merged_exit_code(codes, warned=warned)
