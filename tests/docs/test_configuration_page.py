"""docs/configuration.md has every key that the configuration's reader takes, and each default is the program's."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from lab import call_pybackup

from backup.config import reader

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
EXAMPLE = (Path(__file__).parents[2] / "config.example.yaml").read_text()
UNKNOWN = "zzzzzzzz"
SECTIONS = {
    "The file": "{}",
    "A machine": "machines: {{m: {{disks: {{vda: {{image: a}}}}, {}}}}}",
    "A disk": "machines: {{m: {{disks: {{vda: {{image: a, {}}}}}}}}}",
    "Retention": "retention: {{within: 1d, {}}}",
}
"""Titles of the page, and a configuration with one more key in that place."""


def documented(title: str) -> dict[str, str]:
    """Keys of a table, and what it says of their defaults."""
    section = re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| [^|]+ \|$", section, re.MULTILINE)
    assert len(dict(rows)) == len(rows)
    return dict(rows)


@pytest.mark.parametrize("title", SECTIONS)
def test_the_keys_of_a_table_are_those_that_the_reader_takes(title, tmp_path):
    """Of a key that is unlike any other, the reader's error lists those that it knows."""
    path = tmp_path / "c.yaml"
    path.write_text(SECTIONS[title].format(f"{UNKNOWN}: 1"))
    done = call_pybackup(["check-config", "--config", path])
    [line] = [line for line in done.stderr.splitlines() if f"{UNKNOWN}: unknown key" in line]
    assert set(documented(title)) == set(line.split("expected one of ")[1].split(", "))


def test_the_example_has_the_same_keys():
    keys = set(re.findall(r"^ *(?:# )?(\w+): ", EXAMPLE, re.MULTILINE) + re.findall(r"[{,] ?(\w+): ", EXAMPLE))
    keys |= set(re.findall(r"^ *(\w+):$", EXAMPLE, re.MULTILINE))
    assert {key for title in SECTIONS for key in documented(title)} <= keys


@pytest.mark.parametrize("title", ["The file", "Retention"])
def test_a_default_is_what_holds_without_the_key(title, tmp_path):
    path = tmp_path / "c.yaml"

    def load(text: str) -> reader.Config:
        path.write_text(text)
        return reader.load(path)

    place = SECTIONS[title]
    without = load("" if title == "The file" else place.format(""))
    written = {key: value.strip("`") for key, value in documented(title).items() if value.startswith("`")}
    assert len(written) > 5
    for key, value in written.items():
        assert load(place.format(f"{key}: {value}")) == without, key
    if title == "The file":
        unset = {field.name for field in fields(without) if getattr(without, field.name) in {None, ()}} - {"path"}
        unset = {"bitmap" if name == "bitmap_family" else name for name in unset}
        assert unset == set(documented(title)) - set(written)


@pytest.mark.parametrize("title", ["The file", "Retention"])
def test_the_bounds_of_numbers_are_the_readers(title, tmp_path):
    rows = re.findall(r"^\| `(\w+)` \| number, (\d+) to (\d+) \|", PAGE.split(f"\n## {title}\n")[1], re.MULTILINE)
    assert len(rows) > 1
    path = tmp_path / "c.yaml"
    for key, low, high in rows:
        path.write_text(SECTIONS["Retention" if key in {"batch", "share"} else "The file"].format(f"{key}: -1"))
        done = call_pybackup(["check-config", "--config", path])
        assert f"{key}: expected a whole number from {low} to {high}, got" in done.stderr
