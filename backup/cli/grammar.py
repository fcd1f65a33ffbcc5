"""
The command line by typer, made of what the commands declare: help, completion, and what is wrong with a line.

The only user of typer, imported where `words.read` gives up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from backup.cli.words import Argument, Declared, Option, declared


class Refused(Exception):
    """Typer's message about a line that it does not take."""


class Aborted(Exception):
    """The user ended the program while typer ran."""


def run(
    arguments: Sequence[str],
    before: Callable[..., Any],
    commands: Mapping[str, Callable[..., Any]],
    show_version: Callable[[], None],
) -> object:
    """
    Read a line and call what it names; what the command returned, or an exit code.

    Raises
    ------
    Refused, Aborted
        Instead of typer's own errors.
    """
    app = build(before, commands, show_version)
    try:
        return typer.main.get_command(app).main(args=list(arguments), prog_name="pybackup", standalone_mode=False)
    except TyperException as error:
        raise Refused(" ".join(error.format_message().split())) from None
    except typer.Abort:
        raise Aborted from None


def build(
    before: Callable[..., Any], commands: Mapping[str, Callable[..., Any]], show_version: Callable[[], None]
) -> typer.Typer:
    """Tell typer what the functions declare."""
    app = typer.Typer(
        name="pybackup",
        help="Incremental backups of QEMU/KVM disks, by dirty bitmaps, into chains of plain qcow2 files.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def version(wanted: bool) -> bool:
        if wanted:
            show_version()
            raise typer.Exit
        return wanted

    app.callback()(_for_typer(before, {"callback": version, "is_eager": True}))
    for name, command in commands.items():
        app.command(name)(_for_typer(command, {}))
    return app


def _for_typer(function: Callable[..., Any], of_version: Mapping[str, Any]) -> Callable[..., Any]:
    """The function with the signature that typer wants."""

    @functools.wraps(function)
    def called(*args: Any, **values: Any) -> Any:
        return function(*args, **values)

    parameters = [_parameter(each, of_version if each.name == "version" else {}) for each in declared(function)]
    called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # as inspect.signature looks for it
    called.__annotations__ = {}
    return called


def _parameter(each: Declared, more: Mapping[str, Any]) -> Parameter:
    marker = each.marker
    info: Any
    match marker:
        case Option():
            info = typer.Option(marker.name, metavar=marker.metavar, help=marker.help, readable=marker.readable, **more)
        case Argument():
            info = typer.Argument(metavar=marker.metavar, help=marker.help, show_default=False)
    return Parameter(
        each.name, Parameter.POSITIONAL_OR_KEYWORD, default=each.default, annotation=Annotated[each.annotation, info]
    )
