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
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

import backup
from backup.cli import output, process
from backup.cli.context import COMMON, explained, fail, given_twice, options, show_error
from backup.cli.streams import ReaderGone
from backup.errors import Failed, Interrupted, UsageError
from backup.runtime import timeouts

COMMANDS = {
    "init": "init:init",
    "full": "backup:full",
    "incremental": "backup:incremental",
    "rescan": "backup:rescan",
    "audit": "audit:audit",
    "map": "map:map_",
    "list": "list:list_",
    "show": "show:show",
    "restore": "restore:restore",
    "verify": "verify:verify",
    "copy": "copy:copy_",
    "serve": "serve:serve",
    "files": "files:files",
    "get": "files:get",
    "status": "status:status",
    "prune": "prune:prune",
    "remove": "remove:remove",
    "pin": "pin:pin",
    "unpin": "pin:unpin",
    "clean": "clean:clean",
    "check-config": "check_config:check_config",
}
"""Each command's module below `backup.cli.commands` and its function, in the order in which --help lists them."""

_STYLE: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


if TYPE_CHECKING:
    _Base = TyperCommand
else:
    _Base = object  # so that it goes before a command's class as well as before a group's


class _Parsed(_Base):
    """
    How the program and each of its commands are parsed.

    Parameters are taken as the parser found them: texts, lists of texts, flags.  typer would have pydantic convert
    each, also one that was not given, and the import of pydantic takes longer than that of typer.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the program, or those of a command; the common options go to `options`."""
        options.program = ctx.command_path
        parameters: list[Any] = self.get_params(ctx)  # with --help, which the context brings
        _require_once(self.make_parser(ctx).parse_args(list(args))[2])
        for parameter in parameters:
            parameter.process_value = functools.partial(_as_found, parameter, parameter.process_value)
        rest = super().parse_args(ctx, args)
        if ctx.parent is None:
            options.take(ctx.params, {})
        else:
            # A command's function has parameters for its own options only.
            common = {name: ctx.params.pop(name) for name in COMMON}
            options.take(ctx.parent.params, {**ctx.params, **common})
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options of --help: those that every command has stand in a section of their own."""
        shown: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], "Common options": []}
        for parameter in self.get_params(ctx):
            common = ctx.parent is not None and parameter.name in (*COMMON, "help")
            own = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if (record := parameter.get_help_record(ctx)) is not None:
                # typer names the type of an argument: "MACHINE <list[str]>".
                name = parameter.metavar if own == "Arguments" and parameter.metavar else record[0]
                shown["Common options" if common else own].append((name, record[1]))
        for title, records in shown.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class _Command(_Parsed, TyperCommand):
    """A command."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a broken pipe, which typer takes for standard output's, is one to somebody else."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise explained(error) from error


class _Made(UserDict[str, Any]):
    """Commands that are imported, and made by typer, when they are looked up: making all of them takes 0.03 s."""

    def __init__(self, places: Mapping[str, str], common: Sequence[Any]) -> None:
        super().__init__(places)
        self._common = common

    def __getitem__(self, name: str) -> Any:
        alone = typer.Typer(add_completion=False, **_STYLE)
        module, function = self.data[name].split(":")
        alone.command(name, cls=_Command)(getattr(import_module(f"backup.cli.commands.{module}"), function))
        command = typer.main.get_command(alone)
        command.params.extend(self._common)
        return command


class _Group(_Parsed, TyperGroup):
    """The program: one command of many."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Made(COMMANDS, [parameter for parameter in self.params if parameter.name in COMMON])

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, and after them the commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def _require_once(given: Sequence[Any]) -> None:
    """Refuse an option that takes one value and is given twice: the first value would be dropped in silence."""
    seen = set()
    for parameter in given:
        if parameter.param_type_name != "option" or parameter.multiple or parameter.is_flag:
            continue  # a flag that is given twice says the same twice
        if parameter.name in seen:
            raise given_twice(parameter.opts[0])
        seen.add(parameter.name)


def _as_found(parameter: Any, convert: Callable[[Any, Any], Any], context: Any, value: Any) -> Any:
    """A parameter's value; the error of a missing one, and what is done about flags, are typer's own matter."""
    if isinstance(value, bool) or (parameter.required and not value):
        return convert(context, value)
    found = list(value) if isinstance(value, tuple) else value
    return found if parameter.callback is None else parameter.callback(context, parameter, found)


app = typer.Typer(
    name="pybackup",
    cls=_Group,
    help="Incremental backups of QEMU/KVM disks with dirty bitmaps, stored as plain qcow2 files.",
    epilog="Exit codes: 0 done; 1 failed; 2 wrong usage or configuration; 3 done, with warnings; 10 not found; "
    "11 locked by another run; 12 damaged; 13 source cannot be read; 14 bitmap cannot be used; "
    "129, 130, 143 stopped by a signal.",
    **_STYLE,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pybackup {backup.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Configuration file.  Default: $PYBACKUP_CONFIG, ./config.yaml, then /etc/pybackup/config.yaml.",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what is done in more detail.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show warnings and errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Write the result as one JSON document to standard output.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Declare the options that the program and every command have (`COMMON`), which `_Parsed` reads, and --version."""


def main() -> NoReturn:
    """Run the command line; every end of the program goes through here."""
    process.prepare()
    try:
        code = _run(sys.argv[1:])
        output.flush()
    except ReaderGone as gone:
        code = gone.exit_code
    except Failed as error:
        code = error.exit_code
        show_error(error)
    process.end(code)


def _run(arguments: Sequence[str]) -> int:
    timeouts.set_limit(timeouts.LIMIT)
    timeouts.show_with(lambda text: output.note(text, to_stderr=True))
    options.reset(json="--json" in arguments)  # what fails before the options are parsed is a document, too
    try:
        command = typer.main.get_command(app)
        result = command.main(args=list(arguments), prog_name="pybackup", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except ReaderGone:
        raise
    except TyperException as error:
        message = " ".join(error.format_message().split())
        early = options.program == "pybackup" and message.startswith("No such option")
        hint = "an option of a command stands after the command; " if early else ""
        return fail(UsageError(message, hint=f"{hint}see: {options.program} --help"))
    except Interrupted as stopped:
        return fail(stopped)
    except typer.Abort:
        return fail(Interrupted(signal.SIGINT))
    except Exception as error:  # noqa: BLE001 - shown, and in the exit code
        return fail(explained(error))
