"""Hints and notes name commands; each of these commands exists and has the options that the text gives it."""

import re
from pathlib import Path

import pytest
import typer

import backup
from backup.cli.app import COMMANDS, app

SOURCES = sorted(Path(backup.__file__).parent.rglob("*.py"))
SUGGESTED = sorted(
    {match for path in SOURCES for match in re.findall(r"`pybackup ([a-z-]+)([^`\n]*)`", path.read_text())}
)


def options_of(command: str) -> set[str]:
    """All options of a command, also the common ones."""
    program = typer.main.get_command(app)
    built = program.get_command(typer.Context(program), command)
    return {option for parameter in built.params for option in parameter.opts} | {"--help"}


@pytest.mark.parametrize(("command", "rest"), SUGGESTED)
def test_every_suggested_command_exists_with_its_options(command, rest):
    assert command in COMMANDS
    assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= options_of(command)


def test_the_texts_suggest_commands():
    assert ("list", " {request.machine}") in SUGGESTED
