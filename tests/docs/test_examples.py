"""What the documents print as commands and their output is what happens in a fresh folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(page: str, heading: str) -> list[str]:
    """The blocks of code of a section."""
    section = (ROOT / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in bash, with this checkout's pybackup."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-e", "-c", command],
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("page", ["README.md", "docs/bitmaps.md"])
def test_the_worked_example_prints_what_the_page_shows(page, tmp_path):
    [session] = blocks(page, "What QEMU recorded")
    steps = re.findall(r"^\$ (.*)\n((?:[^$\n].*\n)*)", session, re.MULTILINE)
    assert len(steps) >= 5
    for command, expected in steps:
        done = shell(command, tmp_path)
        assert done.returncode == 0, done
        if expected:
            assert done.stdout == expected


def test_the_first_backup_of_the_quickstart_succeeds(tmp_path):
    [commands] = blocks("docs/quickstart.md", "The first backup")
    done = shell(commands, tmp_path)
    assert done.returncode == 0, done
    assert "Images are identical" in done.stdout
    assert re.search(r"incremental \S+, dirty 64 KiB, data 64 KiB", done.stdout), "as the text below says"


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_configuration_of_the_nightly_set_up_is_right(page, tmp_path):
    [text] = re.findall(r"^ *```yaml\n(.*?)^ *```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = text.splitlines(keepends=True)
    (tmp_path / "config.yaml").write_text("".join(line.removeprefix("   ") for line in lines))
    done = shell("pybackup check-config", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_line_of_the_documents_is_one_that_pybackup_takes():
    """By the parser: each option that a page gives to a command is one of its own."""
    from manpage import commands

    options = {
        command.name: {name for p in (*command.own, *command.common) for name in p.names} for command in commands()
    }
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    lines = [line for page in pages for line in re.sub(r"\\\n *", "", page.read_text()).splitlines()]
    found = 0
    for line in lines:
        for name, rest in re.findall(r"pybackup (?:--quiet )?([a-z-]+)((?: +[^`|#]*)?)", line):
            given = set(re.findall(r"(?<!\S)(--[a-z-]+)", rest.split(" # ")[0]))
            if name in options:
                found += len(given)
                assert given <= options[name], line
    assert found > 60
