"""The quick way to read a command line reads what typer reads, and leaves to typer whatever it is not certain about."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backup.cli import app, grammar, words

VALUES = ["x", "a b", "disk.qcow2", "/tmp", "nbd://h/e", "é", "0", "True", "a=b", "*", "'", "b1,b2", "\\", "~", "."]
STRANGE = ["", "-", "--", "-x", "--x=", "--bogus", "--repo=", "--json=1", "--no-json", "-h", "--help", "\udcff", "-1"]


def by_typer(line):
    """What typer calls for a line: the options before the command, the command and its own; None where it refuses."""
    calls = []

    def recorder(function):
        @functools.wraps(function)
        def record(**values):
            calls.append((function, values))

        return record

    commands = {name: recorder(command) for name, command in app._commands.items()}
    try:
        grammar.run(line, recorder(app._global), commands, lambda: calls.append((None, {})))
    except (grammar.Refused, UnicodeEncodeError):
        return None
    if calls and calls[0][0] is None:
        return words.Call({}, None, {})
    return words.Call(calls[0][1], *calls[1]) if len(calls) == 2 else None  # --help calls nothing


def with_defaults(function, values):
    """All parameters, as the function sees them; typer gives [] or () where a list has no words, and so do we none."""
    every = {each.name: values.get(each.name, each.default) for each in words.declared(function)}
    return {name: value or None if isinstance(value, list | tuple) else value for name, value in every.items()}


def require_same(line):
    quick = words.read(line, app._global, app._commands)
    if quick is None:
        return False
    slow = by_typer(line)
    assert slow is not None, "typer refuses it"
    assert quick.command is slow.command
    if quick.command is not None:
        assert with_defaults(app._global, quick.before) == with_defaults(app._global, slow.before)
        ours, theirs = with_defaults(quick.command, quick.values), with_defaults(slow.command, slow.values)
        assert ours == theirs
        assert {name: type(value) for name, value in ours.items()} == {
            name: type(value) for name, value in theirs.items()
        }
    return True


@st.composite
def lines(draw, values, most):
    """Options of the command line in any order, with words between them."""
    name = draw(st.sampled_from(sorted(app._commands)))
    line = []
    for function, chance in ((app._global, 2), (app._commands[name], most)):
        parameters = words.declared(function)
        options = [each for each in parameters if isinstance(each.marker, words.Option)]
        for each in draw(st.lists(st.sampled_from(options), max_size=chance)) if options else []:
            value = draw(st.sampled_from(values))
            if each.type is bool:
                line.append([each.marker.name])
            else:
                line.append(draw(st.sampled_from([[each.marker.name, value], [f"{each.marker.name}={value}"]])))
        if function is app._global:
            line.append([name])
    for word in draw(st.lists(st.sampled_from(values), max_size=3)):
        line.insert(draw(st.integers(0, len(line))), [word])
    return [word for part in line for word in part]


@settings(max_examples=300, deadline=None)
@given(lines(VALUES, 4))
def test_a_plain_line_is_read_as_typer_reads_it(line):
    require_same(line)


@settings(max_examples=300, deadline=None)
@given(lines([*VALUES[:3], *STRANGE], 3))
def test_a_strange_line_is_read_as_typer_reads_it_or_left_to_it(line):
    require_same(line)


@pytest.mark.parametrize("name", app._commands)
def test_each_option_of_each_command_is_read_quickly(name):
    for function, place in ((app._global, 0), (app._commands[name], None)):
        for each in words.declared(function):
            if isinstance(each.marker, words.Option):
                arguments = ["m/latest", "out"][: {"restore": 2, "show": 1}.get(name, 0)]
                option = [each.marker.name] if each.type is bool else [each.marker.name, "/"]
                line = [*option, name, *arguments] if place == 0 else [name, *arguments, *option]
                assert require_same(line), line


@pytest.mark.parametrize(
    "line",
    [
        [], ["bogus"], ["list", "--bogus"], ["list", "--json", "--json"], ["list", "--repo"], ["list", "--repo", ""],
        ["list", "--repo", "--json"], ["list", "--json=1"], ["restore", "one"], ["show", "one", "two"], ["--help"],
        ["list", "-h"], ["list", "--", "m"], ["list", "\udcff"], ["check-config", "m"],
        ["--config", "/no/such", "list"],
    ],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_typer(line):
    assert words.read(line, app._global, app._commands) is None


def test_completion_is_left_to_typer(monkeypatch):
    monkeypatch.setenv("_PYBACKUP_COMPLETE", "complete_bash")
    assert words.read(["list"], app._global, app._commands) is None


def loaded_by(line, folder):
    code = (
        "import sys\n"
        "from backup.cli.app import _run\n"
        f"code = _run({line!r})\n"
        "print(code, *sorted(name for name in sys.modules if '.' not in name), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    code, *names = done.stderr.splitlines()[-1].split()
    return int(code), set(names)


DEAR = {"numpy", "rich", "nbd", "yaml", "zstandard", "blake3", "typer", "pydantic"}


@pytest.mark.parametrize("line", [["--version"], ["--verbose", "--version"]])
def test_the_version_is_shown_without_what_costs_time_to_import(line, tmp_path):
    code, names = loaded_by(line, tmp_path)
    assert (code, names & DEAR) == (0, set())


def test_a_command_that_reads_manifests_only_is_run_without_what_costs_time_to_import(tmp_path):
    Path(tmp_path / "repo").mkdir()
    Path(tmp_path / "repo" / "pybackup.json").write_text(
        '{"format": "pybackup repository", "version": 1, "id": "' + "0" * 32 + '"}'
    )
    code, names = loaded_by(["list", "--repo", "repo"], tmp_path)
    assert (code, names & (DEAR - {"blake3"})) == (0, set())  # a manifest has a digest
