"""The command check-config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backup.cli import find, json_output, output
from backup.cli.context import options
from backup.cli.output import plain
from backup.errors import UsageError
from backup.units import counted

if TYPE_CHECKING:
    from backup.config.settings import Config


def check_config(
    example: Annotated[
        bool, typer.Option("--example", help="Print an example configuration with a comment on every key.")
    ] = False,
) -> None:
    """Check the configuration, and show a summary of it."""
    if example:
        _show_example()
        return
    config = find.config()
    if config.path is None:
        raise UsageError(
            "there is no configuration",
            hint="write one like that of `pybackup check-config --example`, and name it with --config",
        )
    _require_recipients(config)
    if options.json:
        json_output.write(ConfigDocument.of(config.path, config))
    elif not options.quiet:
        disks = sum(len(machine.disks) for machine in config.machines)
        output.line(
            f"{plain(config.path)}: {counted(len(config.machines), 'machine')}, {counted(disks, 'disk')}, "
            f"repository {plain(config.repository or 'not named')}"
        )


def _require_recipients(config: Config) -> None:
    """Refuse recipients of a second place that are no keys, or files without keys."""
    for copy in config.copies:
        if copy.recipients:
            from backup.age import key_files

            try:
                key_files.recipients(copy.recipients)
            except UsageError as error:
                raise UsageError(f"copies.{copy.name}.recipients: {error.message}", hint=error.hint) from None


def _show_example() -> None:
    from backup.config.reader import EXAMPLE

    text = EXAMPLE.read_text(encoding="utf-8")
    if options.json:
        json_output.write(ExampleDocument(text))
    else:
        output.line(text.rstrip())


# JSON


@dataclass(frozen=True, slots=True)
class ConfigDocument:
    """A configuration: its path, the repository, and the names of each machine's disks."""

    path: Path
    repository: Path | None
    machines: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, path: Path, config: Config) -> ConfigDocument:
        """Return the document of a configuration."""
        machines = {machine.name: [disk.name for disk in machine.disks] for machine in config.machines}
        return cls(path, config.repository, machines)


@dataclass(frozen=True, slots=True)
class ExampleDocument:
    """The text of the example configuration."""

    example: str
