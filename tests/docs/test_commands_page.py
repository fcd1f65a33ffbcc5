"""docs/commands.md has the commands, options and exit codes of the program."""

from __future__ import annotations

import re
from pathlib import Path

from manpage import commands

from backup import errors
from backup.errors import BackupError, Interrupted

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
SIGNALS = {1, 2, 15}
"""SIGHUP, SIGINT and SIGTERM."""


def rows(title: str, cells: int) -> list[tuple[str, ...]]:
    """The cells of the first table below a heading."""
    section = re.split(r"^#+ ", PAGE.split(f"# {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert all(len(line) == cells for line in lines)
    return [tuple(cell.strip() for cell in line) for line in lines]


def test_every_command_is_in_the_table_in_the_order_of_help():
    named = [re.match(r"`pybackup ([a-z-]+)", command)[1] for command, _ in rows("Commands", 2)]
    assert named == [command.name for command in commands()]


def test_every_option_is_in_the_table_with_the_commands_that_have_it():
    documented = {
        (re.match(r"`(--[a-z-]+)", option)[1], command)
        for option, names, _ in rows("Options of commands", 3)
        for command in names.split(", ")
    }
    there = {(name, command.name) for command in commands() for option in command.own for name in option.names}
    assert documented == there


def test_every_common_option_is_in_its_table():
    documented = {
        name for option, _ in rows("Options that every command has", 2) for name in re.findall(r"`(-[a-z-]+)", option)
    }
    for command in commands():
        assert documented == {name for option in command.common for name in option.names}


def test_the_exit_codes_are_those_of_the_program():
    documented = {int(code) for codes, _ in rows("Exit codes", 2) for code in codes.split(", ")}
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, BackupError)]
    codes = {error.exit_code for error in classes} | {Interrupted(number).exit_code for number in SIGNALS}
    assert documented == codes | {0, errors.WARNINGS_EXIT_CODE}
