"""Errors: one exit code each, two lines, and the same table in the module and the code."""

import errno
import os
import re
import sys

import pytest
from places import files_at

from backup import errors
from backup.cli import output
from backup.cli.context import user_error
from backup.errors import BackupError, Interrupted
from backup.qemu import programs
from backup.repository.manifests import read_manifest
from backup.runtime import shortage
from backup.storage.refusals import open_file

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and BackupError in value.__bases__]


def test_every_error_has_an_exit_code_of_its_own():
    codes = [error.exit_code for error in CLASSES]
    assert sorted(codes) == [1, 2, 10, 11, 12, 13, 14]
    assert errors.WARNINGS_EXIT_CODE == 3


def test_the_tree_in_the_module_is_the_code():
    documented = dict(re.findall(r"^    (?:\+-- )?(\w+) +(\d+) ", errors.__doc__, flags=re.MULTILINE))
    assert documented == {**{error.__name__: str(error.exit_code) for error in CLASSES}, "Interrupted": "129"}


def test_a_signal_ends_as_the_shell_says():
    assert [Interrupted(number).exit_code for number in (1, 2, 15)] == [129, 130, 143]


def test_a_signal_is_not_taken_for_an_error_that_may_be_passed_over():
    assert not issubclass(Interrupted, Exception)


@pytest.mark.parametrize(
    ("codes", "worst", "warned", "merged"),
    [
        ([], (), False, 0),
        ([0, 0], (), True, 3),
        ([13, 0, 13], (), True, 13),
        ([13, 11], (), False, 1),
        ([13, 10, 12], (12, 10), False, 12),
        ([13, 10, 1], (12, 10), True, 10),
        ([13, 1], (12, 10), False, 1),
    ],
)
def test_several_exit_codes_become_one(codes, worst, warned, merged):
    assert errors.merged_exit_code(codes, worst=worst, warned=warned) == merged


@pytest.mark.parametrize("hostile", ["\x1b[2J", "a\nb", "a\rb", "\x9b31m", "a\u2028b", "\x85", "\u202e", "\udc80"])
def test_an_error_is_two_printable_lines_whatever_its_values(hostile, capsys):
    output.error(errors.Damaged(f"disk {hostile} is damaged", hint=f"look at {hostile}"))
    lines = capsys.readouterr().err.split("\n")
    assert [line.split(" ")[1] for line in lines[:-1]] == ["error:", "hint:"]
    assert lines[-1] == ""
    assert all(line.isprintable() for line in lines)


def test_a_list_of_configuration_problems_has_a_line_for_each(capsys):
    output.error(errors.UsageError("c.yaml: 2 problems\n  line 1: one\n  line 2: two", hint="h", listed=True))
    assert capsys.readouterr().err.splitlines() == [
        "pybackup: error: c.yaml: 2 problems",
        "pybackup: error:   line 1: one",
        "pybackup: error:   line 2: two",
        "pybackup: hint: h",
    ]


def test_the_hint_of_a_signal_says_nothing_of_points_that_nobody_wanted_to_make():
    """It shows for list and verify as well; a backup says that it made none."""
    assert Interrupted(15).hint == "no point was damaged; run the command again"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "LimitNOFILE"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOMEM, "MemoryMax"),
        (errno.EAGAIN, "TasksMax"),
    ],
)
def test_what_keeps_a_program_from_being_started_is_named_by_the_hint(number, words, monkeypatch):
    def refused(*_args, **_options):
        raise OSError(number, os.strerror(number), "qemu-img")

    monkeypatch.setattr(programs.subprocess, "Popen", refused)
    with pytest.raises(errors.Failed) as caught:
        programs.stdout_of(["qemu-img", "info"])
    assert os.strerror(number) in caught.value.message
    assert words in user_error(caught.value).hint
    with pytest.raises(OSError, match="qemu-img") as bare:  # guestfish, of whose start nobody else speaks
        programs.converse(["qemu-img"], sys.stderr, {}, ())
    assert words in user_error(bare.value).hint


def test_what_could_not_be_looked_at_is_not_called_damaged():
    found = user_error(errors.Damaged("x.b3 cannot be read: Cannot allocate memory", hint="bring it back"))
    assert (type(found), found.message) == (errors.Failed, "x.b3 cannot be read: Cannot allocate memory")


@pytest.mark.parametrize("number", sorted(shortage.NOT_DAMAGE), ids=errno.errorcode.get)
def test_a_file_that_cannot_be_opened_for_want_of_something_is_not_called_damaged(number, tmp_path, monkeypatch):
    path = tmp_path / "20260101T000000Z-00000000.json"
    path.write_text("{}")

    def refused(*_args, **_options):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refused)
    for read in (read_manifest, open_file):
        with pytest.raises(errors.Failed, match=os.strerror(number)):
            read(files_at(path.parent), path.name)
