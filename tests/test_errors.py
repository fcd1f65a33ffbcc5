"""Errors: one exit code each, two lines, and the same table in the code and the README."""

import re
from pathlib import Path

import pytest

from backup import errors
from backup.cli import render
from backup.errors import BackupError, Interrupted

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, BackupError) and value is not BackupError
]


def test_every_error_has_an_exit_code_of_its_own():
    codes = [error.exit_code for error in CLASSES]
    assert sorted(codes) == [1, 2, 10, 11, 12, 13, 14]
    assert errors.WARNINGS_EXIT_CODE == 3


def test_the_tree_in_the_module_is_the_code():
    documented = dict(re.findall(r"^    (?:\+-- )?(\w+) +(\d+) ", errors.__doc__, flags=re.MULTILINE))
    assert documented == {**{error.__name__: str(error.exit_code) for error in CLASSES}, "Interrupted": "130"}


def test_a_signal_ends_as_the_shell_says():
    assert [Interrupted(number).exit_code for number in (2, 15)] == [130, 143]


def test_a_signal_is_not_taken_for_an_error_that_may_be_passed_over():
    assert not issubclass(Interrupted, Exception)


def test_the_readme_documents_every_exit_code():
    text = (Path(errors.__file__).parents[1] / "README.md").read_text()
    documented = set(map(int, re.findall(r"\b(\d+)\b", "\n".join(re.findall(r"^\| *\d[\d, ]*\|", text, re.MULTILINE)))))
    assert {0, 1, 2, 3, 10, 11, 12, 13, 14, 130, 143} <= documented


@pytest.mark.parametrize("hostile", ["\x1b[2J", "a\nb", "a\rb", "\x9b31m", "a\u2028b", "\x85", "\u202e", "\udc80"])
def test_an_error_is_two_printable_lines_whatever_its_values(hostile, capsys):
    render.error(errors.Damaged(f"disk {hostile} is damaged", hint=f"look at {hostile}"))
    lines = capsys.readouterr().err.split("\n")
    assert [line.split(" ")[1] for line in lines[:-1]] == ["error:", "hint:"]
    assert lines[-1] == ""
    assert all(line.isprintable() for line in lines)


def test_a_list_of_configuration_problems_has_a_line_for_each(capsys):
    render.error(errors.UsageError("c.yaml: 2 problems\n  line 1: one\n  line 2: two", hint="h", listed=True))
    assert capsys.readouterr().err.splitlines() == [
        "pybackup: error: c.yaml: 2 problems",
        "pybackup: error:   line 1: one",
        "pybackup: error:   line 2: two",
        "pybackup: hint: h",
    ]


def test_the_hint_of_a_signal_says_nothing_of_points_that_nobody_wanted_to_make():
    """It shows for list and verify as well; a backup says that it made none."""
    assert Interrupted(15).hint == "no point was harmed by that; run the command again"
