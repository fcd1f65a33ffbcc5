"""
The command line as words: how the commands declare their options, and the quick way to read a plain line.

A command's options stand in its signature, `Annotated[TYPE, Option(...)]`.  typer is made of them (backup.cli.grammar)
for help, completion and whatever is wrong with a line; importing it and what it needs (pydantic) takes longer than many
a command.  A line in which nothing is unusual is read here, to the same call: `read` gives up at the first word that it
is not certain about.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

COMPLETION = "_PYBACKUP_COMPLETE"
"""Set by a shell that wants to complete a line: typer answers it."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option; of a path, `readable` has an existing one refused that this user cannot read."""

    name: str
    metavar: str | None = None
    help: str | None = None
    readable: bool = True


@dataclass(frozen=True, slots=True)
class Argument:
    """A word that is no option; of a list, all of them."""

    metavar: str
    help: str | None = None


@dataclass(frozen=True, slots=True)
class Declared:
    """One parameter of a command.  `type` is bool, str, Path, or list for a list of str."""

    name: str
    type: type
    annotation: Any
    marker: Option | Argument
    default: Any


@dataclass(frozen=True, slots=True)
class Call:
    """A line that was read: the options before the command, and the command with its own (None for --version)."""

    before: Mapping[str, Any]
    command: Callable[..., Any] | None
    values: Mapping[str, Any]


class _Unsure(Exception):
    """The line is not a plain one."""


def declared(function: Callable[..., Any]) -> list[Declared]:
    """The parameters of a command, in order."""
    hints = get_type_hints(function, include_extras=True)
    return [_declared(parameter, hints[name]) for name, parameter in signature(function).parameters.items()]


def _declared(parameter: Parameter, hint: Any) -> Declared:
    annotation, marker = get_args(hint)
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    kind = kinds[0] if kinds and get_origin(annotation) is not list else annotation
    return Declared(parameter.name, get_origin(kind) or kind, annotation, marker, parameter.default)


def read(
    arguments: Sequence[str], before: Callable[..., Any], commands: Mapping[str, Callable[..., Any]]
) -> Call | None:
    """
    Read a plain line; None for any other, which may be right or wrong.

    Parameters
    ----------
    before : callable
        Declares the options before the command; one of them is `version`, which needs no command.
    commands : mapping
        The commands by name.
    """
    try:
        if COMPLETION in os.environ:
            return None
        "\n".join(arguments).encode()
        first, rest = _options(declared(before), arguments, to_the_end=False)
        if first.get("version"):
            return Call(first, None, {})
        if not rest or rest[0] not in commands:
            return None
        command = commands[rest[0]]
        parameters = declared(command)
        values, words = _options(parameters, rest[1:], to_the_end=True)
        return Call(first, command, {**values, **_arguments(parameters, words)})
    except (_Unsure, UnicodeEncodeError):
        return None


def _options(
    parameters: Sequence[Declared], words: Sequence[str], *, to_the_end: bool
) -> tuple[dict[str, Any], list[str]]:
    """Values of the options, and the words that are none; `to_the_end` looks for options behind such words too."""
    by_name = {parameter.marker.name: parameter for parameter in parameters if isinstance(parameter.marker, Option)}
    values: dict[str, Any] = {}
    others: list[str] = []
    left = list(words)
    while left:
        if not left[0].startswith("-"):
            if not to_the_end:
                break
            others.append(left.pop(0))
            continue
        name, equals, value = left.pop(0).partition("=")
        parameter = by_name.get(name)
        if parameter is None or parameter.name in values or (equals and parameter.type is bool):
            raise _Unsure
        if parameter.type is not bool and not equals:
            value = left.pop(0) if left else ""
        values[parameter.name] = True if parameter.type is bool else _value(parameter, value)
    return values, others + left


def _arguments(parameters: Sequence[Declared], words: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for parameter in parameters:
        if isinstance(parameter.marker, Argument):
            count = len(words) if parameter.type is list else 1
            taken, words = words[:count], words[count:]
            if "" in taken or (not taken and parameter.default is Parameter.empty):
                raise _Unsure
            if taken:
                values[parameter.name] = taken if parameter.type is list else taken[0]
    if words:
        raise _Unsure
    return values


def _value(parameter: Declared, text: str) -> str | Path:
    """An option's value; one that is empty or looks like an option is not certain."""
    assert isinstance(parameter.marker, Option)
    if not text or text.startswith("-"):
        raise _Unsure
    if parameter.type is not Path:
        return text
    if parameter.marker.readable and not os.access(text, os.R_OK):
        raise _Unsure
    return Path(text)
