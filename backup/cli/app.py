"""
The command line: the commands by their names, how they are parsed, and how the program ends.

`main` is the only place that catches errors.  Modules that cost time to import (numpy, libnbd, rich) are imported by
the command that needs them: a cron job over a hundred idle disks is a hundred starts.
"""

from __future__ import annotations

import functools
import signal
import sys
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

import backup
from backup.cli import backups, inside, points, process, render
from backup.cli.find import path_of
from backup.cli.state import explained, fail, options, show_error
from backup.errors import Failed, Interrupted, UsageError

COMMANDS: dict[str, Callable[..., None]] = {
    "full": backups.full,
    "incremental": backups.incremental,
    "rescan": backups.rescan,
    "audit": backups.audit,
    "map": backups.map_,
    "list": points.list_,
    "show": points.show,
    "restore": points.restore,
    "verify": points.verify,
    "copy": points.copy_,
    "serve": inside.serve,
    "files": inside.files,
    "get": inside.get,
    "status": points.status,
    "prune": points.prune,
    "pin": points.pin,
    "unpin": points.unpin,
    "clean": backups.clean,
    "check-config": backups.check_config,
}
"""In the order in which --help lists them."""

_STYLE: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class _Made(UserDict[str, Any]):
    """Commands that typer makes of their functions when they are looked up: making all of them takes 0.03 s."""

    def __getitem__(self, name: str) -> Any:
        alone = typer.Typer(add_completion=False, **_STYLE)
        alone.command(name)(self.data[name])
        return _unconverted(typer.main.get_command(alone))


class _Group(TyperGroup):
    """The program: one command of many."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Made(COMMANDS)


app = typer.Typer(
    name="pybackup",
    cls=_Group,
    help="Incremental backups of QEMU/KVM disks, by dirty bitmaps, into chains of plain qcow2 files.",
    **_STYLE,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pybackup {backup.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    config: Annotated[str | None, typer.Option("--config", metavar="FILE", help="The configuration.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but warnings and errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version
    if verbose and quiet:
        raise UsageError("--verbose together with --quiet", hint="choose one")
    options.config = path_of(config)
    options.verbose, options.quiet, options.debug = verbose, quiet, debug
    if verbose or debug:
        import logging

        logging.basicConfig(level=logging.INFO, format="pybackup: %(message)s")


def main() -> NoReturn:
    """Run the command line; every end of the program goes through here."""
    process.prepare()
    try:
        code = _run(sys.argv[1:])
        render.flush()
    except BrokenPipeError:
        code = 1  # the reader has gone (pybackup list | head): not our error, and nothing can be said any more
    except Failed as error:
        code = error.exit_code
        show_error(error)
    process.end(code)


def _run(arguments: Sequence[str]) -> int:
    options.json = "--json" in arguments  # until the command says it: what fails before is a document, too
    try:
        command = _unconverted(typer.main.get_command(app))
        result = command.main(args=list(arguments), prog_name="pybackup", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        raise
    except TyperException as error:
        return fail(UsageError(" ".join(error.format_message().split()), hint="see: pybackup --help"))
    except Interrupted as stopped:
        return fail(stopped)
    except typer.Abort:
        return fail(Interrupted(signal.SIGINT))
    except Exception as error:  # noqa: BLE001 - shown, and in the exit code
        return fail(explained(error))


def _unconverted(command: Any) -> Any:
    """
    A command whose parameters are taken as the parser found them: texts, lists of them, flags.

    typer would have pydantic convert each, also one that was not given; its import takes longer than typer's own.
    """
    command.parse_args = functools.partial(_parse, command, command.parse_args)
    return command


def _parse(command: Any, parse: Callable[[Any, list[str]], Any], context: Any, arguments: list[str]) -> Any:
    for parameter in command.get_params(context):  # with --help, which the context brings
        parameter.process_value = functools.partial(_as_found, parameter, parameter.process_value)
    return parse(context, arguments)


def _as_found(parameter: Any, convert: Callable[[Any, Any], Any], context: Any, value: Any) -> Any:
    """A parameter's value; the error of a missing one, and what is done about flags, are typer's own matter."""
    if isinstance(value, bool) or (parameter.required and not value):
        return convert(context, value)
    found = list(value) if isinstance(value, tuple) else value
    return found if parameter.callback is None else parameter.callback(context, parameter, found)
