"""
Write the manual page docs/pybackup.1 from the command tree that --help shows, and from tables of docs/commands.md.

    make man

A test compares the committed file with what this script makes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

import backup
from backup.cli.app import app
from backup.cli.context import COMMON

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "pybackup.1"
PROGRAM = "pybackup"


@dataclass(frozen=True, slots=True)
class Parameter:
    """An option or an argument: the names of an option, how --help writes it, and what --help says of it."""

    names: tuple[str, ...]
    usage: str
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command as --help shows it; `common` are the options that every command has."""

    name: str
    usage: str
    text: str
    arguments: tuple[Parameter, ...]
    own: tuple[Parameter, ...]
    common: tuple[Parameter, ...]


def program() -> Command:
    """Return the program itself, whose own options stand before a command."""
    group: Any = typer.main.get_command(app)
    return _command(group, group.make_context(PROGRAM, [], resilient_parsing=True))


def commands() -> list[Command]:
    """Return the program's commands, in the order in which --help lists them."""
    group: Any = typer.main.get_command(app)
    context = group.make_context(PROGRAM, [], resilient_parsing=True)
    found = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        found.append(_command(command, command.context_class(command, info_name=name, parent=context)))
    return found


def _command(command: Any, context: Any) -> Command:
    arguments: list[Parameter] = []
    own: list[Parameter] = []
    common: list[Parameter] = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None:
            continue
        if parameter.param_type_name == "argument":
            arguments.append(Parameter((), parameter.metavar, record[1].replace("  [required]", "")))
        else:
            shared = parameter.name in {*COMMON, "help"} and context.parent is not None
            (common if shared else own).append(Parameter(tuple(parameter.opts), record[0], record[1]))
    usage = " ".join(command.collect_usage_pieces(context))
    return Command(context.info_name, usage, command.help, tuple(arguments), tuple(own), tuple(common))


def page() -> str:
    """Return the manual page."""
    whole, each = program(), commands()
    lines = [
        f'.TH PYBACKUP 1 "" "{PROGRAM} {backup.__version__}" "User Commands"',
        f'.\\" Made by tools/{Path(__file__).name} ("make man"): change the texts of --help and docs/commands.md.',
        ".nh",  # a word that is broken into two is not found by a search
        ".ad l",
        ".SH NAME",
        f"{PROGRAM} \\- {_prose(whole.text[0].lower() + whole.text[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
        *_usage(whole.usage),
        ".SH DESCRIPTION",
        *_paragraphs(whole.text),
        ".SH OPTIONS",
        "They stand before the command.",
        *_parameters(whole.own),
        ".SH COMMANDS",
    ]
    for command in each:
        lines += [f".SS {command.name}", *_usage(f"{command.name} {command.usage}")]
        lines += [".PP", *_paragraphs(command.text), *_parameters((*command.arguments, *command.own))]
    lines += [".SH COMMON OPTIONS", "Every command has these options as well.", *_parameters(each[0].common)]
    lines += [".SH EXAMPLES", *_examples()]
    for title, heading in (("EXIT STATUS", "Exit codes"), ("FILES", "Files"), ("ENVIRONMENT", "Environment")):
        lines += [f".SH {title}", *_table(heading)]
    lines += [".SH SEE ALSO", ".BR qemu\\-img (1),", ".BR qemu\\-nbd (8),", ".BR guestfish (1)"]
    return "\n".join(lines) + "\n"


def _usage(text: str) -> list[str]:
    return [f".B {PROGRAM}", _escaped(text)]


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        yield _prose(" ".join(paragraph.split()))


def _parameters(parameters: Sequence[Parameter]) -> Iterator[str]:
    for parameter in parameters:
        yield from (".TP", f"\\fB{_escaped(parameter.usage)}\\fR", _prose(" ".join(parameter.text.split())))


def _table(heading: str) -> Iterator[str]:
    """Yield the rows of a table of docs/commands.md: a term, and what it means."""
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for term, meaning in re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE)[1:]:
        yield from (".TP", f"\\fB{_escaped(term.replace('`', ''))}\\fR", _prose(meaning))


def _examples() -> Iterator[str]:
    """Yield the examples of docs/commands.md: what a command does, and the command."""
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    section = text.split("\n## Examples\n")[1].split("\n## ")[0]
    for command, meaning in re.findall(r"^(pybackup .+?) +# (.+)$", section, re.MULTILINE):
        yield from (".PP", f"{_prose(meaning[0].upper() + meaning[1:])}:", ".PP", ".RS 4", ".EX")
        yield from (_escaped(command), ".EE", ".RE")


def _prose(text: str) -> str:
    """Return a line of text; what stands in backticks is bold, and of a link the text stays."""
    plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    return re.sub(r"`([^`]+)`", r"\\fB\1\\fR", _escaped(plain))


def _escaped(text: str) -> str:
    """Return text that roff shows as it is."""
    found = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti").replace("^", "\\(ha")
    return f"\\&{found}" if found.startswith((".", "'")) else found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
