"""The command check-config."""

from __future__ import annotations

from typing import Annotated

import typer

from backup.cli import find, output
from backup.cli.context import options
from backup.errors import UsageError


def check_config(
    example: Annotated[
        bool, typer.Option("--example", help="Print an example configuration with a comment on every key.")
    ] = False,
) -> None:
    """Check the configuration, and show a summary of it."""
    if example:
        from backup.config.reader import EXAMPLE

        text = EXAMPLE.read_text(encoding="utf-8")
        output.document({"example": text}) if options.json else output.line(text.rstrip())
        return
    config = find.config()
    if config.path is None:
        raise UsageError(
            "there is no configuration",
            hint="write one like that of `pybackup check-config --example` and name it with --config",
        )
    disks = sum(len(machine.disks) for machine in config.machines)
    if options.json:
        output.document(
            {
                "path": str(config.path),
                "repository": None if config.repository is None else str(config.repository),
                "machines": {machine.name: [disk.name for disk in machine.disks] for machine in config.machines},
            }
        )
    elif not options.quiet:
        output.line(
            f"{output.plain(config.path)}: {len(config.machines)} machine{'s' * (len(config.machines) != 1)}, "
            f"{disks} disk{'s' * (disks != 1)}, repository {output.plain(config.repository or 'not named')}"
        )
