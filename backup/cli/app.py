"""
The command line: the table of commands, how arguments are parsed, and how the program ends.

`main` is the only place that catches errors.  Modules that take long to import (numpy, libnbd, rich) are imported by
the commands that need them: a cron job over a hundred idle disks starts the program a hundred times.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

import backup
from backup.cli import output, process
from backup.cli.context import COMMON, fail, given_twice, options, show_error, user_error
from backup.cli.streams import ReaderGone
from backup.errors import Failed, Interrupted, UsageError
from backup.runtime import timeouts

COMMANDS = {
    "init": "init:init",
    "keygen": "keygen:keygen",
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


# The program and its commands, as typer knows them


class _Command(TyperCommand):
    """One command, which takes the common options beside its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments after the command's name; the common options among them go to `options`."""
        _prepare(self, ctx, args)
        rest = super().parse_args(ctx, args)
        # The command's function has no parameters for the common options.
        common = {name: ctx.params.pop(name) for name in COMMON}
        options.take(ctx.parent.params, {**ctx.params, **common})
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options of --help."""
        _write_options(self, ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a broken pipe becomes an error, for which typer would exit without a message."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise user_error(error) from error


class _Program(TyperGroup):
    """The program: common options, and one command of many."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        names: dict[str, Any] = dict.fromkeys(COMMANDS)
        self.commands = names

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and build a command when it is needed; to build all of them takes 0.03 s."""
        del ctx
        if cmd_name in COMMANDS and self.commands[cmd_name] is None:
            common = [parameter for parameter in self.params if parameter.name in COMMON]
            self.commands[cmd_name] = _built(cmd_name, common)
        return self.commands.get(cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments before the command's name; they are common options."""
        _prepare(self, ctx, args)
        rest = super().parse_args(ctx, args)
        options.take(ctx.params, {})
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options of --help, and the commands below them."""
        _write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


def _built(name: str, common: Sequence[Any]) -> Any:
    """Import a command's function and have typer build the command, with the common options after its own."""
    module, function = COMMANDS[name].split(":")
    single = typer.Typer(add_completion=False, **_STYLE)
    single.command(name, cls=_Command)(getattr(import_module(f"backup.cli.commands.{module}"), function))
    command = typer.main.get_command(single)
    command.params.extend(common)
    return command


class _AsWritten:
    """Keeps the value of a parameter as the user wrote it (typer's RuntimeParam)."""

    @staticmethod
    def coerce(value: Any, param: Any, ctx: Any) -> Any:
        """Return the value."""
        del param, ctx
        return value


def _prepare(command: Any, ctx: Any, args: Sequence[str]) -> None:
    """
    Prepare the parsing of arguments by typer.

    typer builds a pydantic adapter for each parameter, also for texts, which need no conversion, and the import of
    pydantic takes longer than that of typer.  typer has no setting for that: `get_runtime_param` is replaced.
    """
    options.program = ctx.command_path
    for parameter in command.get_params(ctx):  # these include --help, which is not among `command.params`
        parameter.get_runtime_param = _AsWritten
    _require_once(command.make_parser(ctx).parse_args(list(args))[2])


def _require_once(given: Sequence[Any]) -> None:
    """Refuse an option that takes one value and is given twice: typer would drop the first value in silence."""
    seen = set()
    for parameter in given:
        if parameter.param_type_name != "option" or parameter.multiple or parameter.is_flag:
            continue
        if parameter.name in seen:
            raise given_twice(parameter.opts[0])
        seen.add(parameter.name)


def _write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """Write the parameters of --help in sections; the common options of a command have their own section."""
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], "Common options": []}
    for parameter in command.get_params(ctx):
        common = ctx.parent is not None and parameter.name in (*COMMON, "help")
        own = "Arguments" if parameter.param_type_name == "argument" else "Options"
        if (record := parameter.get_help_record(ctx)) is not None:
            # typer writes the type of an argument after its name: "MACHINE <list[str]>".
            name = parameter.metavar if own == "Arguments" and parameter.metavar else record[0]
            sections["Common options" if common else own].append((name, record[1]))
    for title, records in sections.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


# The common options, and the program itself


app = typer.Typer(
    name="pybackup",
    cls=_Program,
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
    """Declare the common options (`COMMON`), which `_Command` and `_Program` read, and --version."""


# How the program runs and ends


def main() -> NoReturn:
    """Run the command line, and end the process with its exit code."""
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
    options.reset(json="--json" in arguments)  # an error before the options are parsed is a document as well
    try:
        command = typer.main.get_command(app)
        result = command.main(args=list(arguments), prog_name="pybackup", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except ReaderGone:
        raise
    except TyperException as error:
        message = " ".join(error.format_message().split())
        early = options.program == "pybackup" and message.startswith("No such option")
        hint = "give the options of a command after its name; " if early else ""
        return fail(UsageError(message, hint=f"{hint}see: {options.program} --help"))
    except Interrupted as stopped:
        return fail(stopped)
    except typer.Abort:
        return fail(Interrupted(signal.SIGINT))
    except Exception as error:  # noqa: BLE001 - shown, and in the exit code
        return fail(user_error(error))
