"""
The common options, and how an error is shown with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backup.cli import hints, json_output, output
from backup.errors import BackupError, Interrupted, UsageError
from backup.runtime.failures import as_backup_error

if TYPE_CHECKING:
    from backup.config.settings import Config

COMMON = ("config", "verbose", "quiet", "debug", "json")
"""Options that are taken before the command's name and after it."""


@dataclass(slots=True)
class CommonOptions:
    """The common options, whether they stand before or after the command's name, and --repo, which hints repeat."""

    config: Path | None = None
    verbose: bool = False
    quiet: bool = False
    debug: bool = False
    json: bool = False
    """Results and errors are JSON documents."""
    repo: str | None = None
    loaded: Config | None = None
    """The configuration, once it has been read."""
    program: str = "pybackup"
    """What is being parsed: pybackup, or one of its commands, such as "pybackup list"."""

    def reset(self, *, json: bool) -> None:
        """Set all options to their defaults; `json` tells whether the arguments seem to contain --json."""
        self.config = self.repo = self.loaded = None
        self.verbose = self.quiet = self.debug = False
        self.json = json
        self.program = "pybackup"

    def take(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """
        Store the options that were given before the command's name, and those after it (empty until they are parsed).

        Raises
        ------
        UsageError
            The options contradict each other.
        """
        configs = [place["config"] for place in (before, after) if place.get("config") is not None]
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
            raise UsageError("--verbose together with --quiet", hint="give one of the two")
        if self.verbose or self.debug:
            import logging

            logging.basicConfig(level=logging.INFO, format="pybackup: %(message)s")


options = CommonOptions()


def given_twice(option: str) -> UsageError:
    """Return the error for an option that takes one value and was given two."""
    return UsageError(f"{option} is given twice", hint=f"give it once; see: {options.program} --help")


# Errors, as the user sees them


def fail(error: BackupError | Interrupted) -> int:
    """Show the error that ends the program, and return its exit code."""
    show_error(error)
    if options.json:
        json_output.write(json_output.Failure(error))
    return error.exit_code


def show_error(error: BackupError | Interrupted, of: str | None = None) -> None:
    """Show an error, with a traceback if --debug was given; `of` is the machine, if there are several."""
    if options.debug:
        output.traceback(error)
    output.error(error, of)


def user_error(error: Exception) -> BackupError:
    """Turn an exception into an error with two lines, whose hint repeats the user's options."""
    shown = as_backup_error(error)
    shown.hint = with_options(shown.hint)
    return shown


def with_options(text: str) -> str:
    """Return a hint, or another text with commands to run, with the --repo and --config that the user gave."""
    return hints.complete(text, options.repo, None if options.config is None else str(options.config))
