"""FORMAT.md is the specification: its tables are held against the code."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import backup
from backup import qcow2
from backup.age import payload
from backup.model import digests, documents, manifest
from backup.model.manifest import (
    BitmapRecord,
    ByteCounts,
    DataFile,
    DiskEntry,
    Former,
    LowerFile,
    MachineFile,
    Manifest,
    Parent,
    SourceRecord,
)
from backup.repository import repository, verified

TEXT = (Path(backup.__file__).parent / "FORMAT.md").read_text()


def section(title):
    """The lines below a heading, up to the next one."""
    return re.split(r"^#+ .*$", TEXT.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def documented(title):
    return re.findall(r"^\| `(\w+)` \|", section(title), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("title", "value"),
    [
        ("An entry of `disks`", DiskEntry),
        ("`parent`", Parent),
        ("`replaces`", Former),
        ("`bitmap`", BitmapRecord),
        ("`data`", DataFile),
        ("`bytes`", ByteCounts),
        ("`source`", SourceRecord),
        ("An entry of `lower`", LowerFile),
        ("An entry of `machine_files`", MachineFile),
    ],
)
def test_fields_of_a_table_are_the_fields_of_the_value_in_order(title, value):
    assert documented(title) == [field.name for field in fields(value)]


def test_fields_of_the_manifest_are_what_is_written():
    assert documented("The manifest") == ["format", "version", *(field.name for field in fields(Manifest)), "digest"]


def test_fields_of_the_memory_are_what_is_written():
    record = verified.Record("0" * 64, "2026-11-22T01:00:00Z", None, 0, None)
    lines = verified.encode({"vda.20261122T010000Z-1f3a09c1.qcow2": record}).decode().splitlines()
    first, found, last = map(json.loads, lines)
    assert first == {"format": verified.FORMAT, "version": verified.VERSION}
    assert json.dumps(first) in section("What `verify` remembers")
    assert documented("A record of `verified`") == list(found)
    assert list(last) == ["digest"]
    assert f"`MACHINE/{verified.NAME}`" in TEXT


def test_bounds_of_documents_are_the_codes():
    assert f"A document has at most {documents.MAX_BYTES} bytes" in section("Documents")
    assert f"at most {documents.MAX_TEXT} characters" in section("Documents")
    assert f"at most {verified._MAX_BYTES} bytes" in " ".join(section("What `verify` remembers").split())


def test_names_and_versions_are_the_codes():
    assert f'"{manifest.FORMAT}"' in section("The manifest")
    assert f'"{repository.FORMAT}"' in section("The marker")
    assert re.search(rf"`version` \| integer \| {manifest.VERSION} ", section("The manifest"))
    versions = rf"`version` \| integer \| {repository.VERSION} .*, else {repository.PLAIN_VERSION};"
    assert re.search(versions, section("The marker"))
    assert f"1 to {repository.MOST_RECIPIENTS} strings" in section("The marker")
    assert f"version {manifest.VERSION}\n" in TEXT.splitlines(keepends=True)[0]


def test_files_of_the_machine_are_the_codes():
    rows = re.findall(
        r"^\| `(\w+)` \| `POINT\.(\w+)` \| .* \| (\d+) \|$", section("The files of a machine"), re.MULTILINE
    )
    assert {role: suffix for role, suffix, _ in rows} == manifest.SUFFIXES
    assert {role: int(size) for role, _, size in rows} == manifest.MAX_MACHINE_FILE


def test_sizes_are_the_codes():
    assert f"A block has {digests.BLOCK} bytes" in TEXT
    assert f"in parts of {qcow2.PART} bytes" in TEXT
    assert digests.BLOCK == qcow2.PART


def test_history_ends_with_the_version_that_is_written():
    rows = re.findall(r"^\| (\d+)(?:, marker (\d+))?", section("History"), flags=re.MULTILINE)
    assert int(rows[-1][0]) == manifest.VERSION
    assert [int(marker) for _, marker in rows if marker][-1] == repository.VERSION


def test_lengths_of_sealed_files_are_the_codes():
    text = " ".join(section("Sealed repositories").split())
    one, two = (payload.head_length(count) - 16 for count in (1, 2))
    assert f"{2 * one - two} + {two - one} N bytes" in text
    assert f"a chunk of {payload.SEALED_CHUNK} bytes for each {payload.CHUNK} bytes" in text
    assert f"exactly 64 chunks: {64 * payload.SEALED_CHUNK} bytes" in text
    assert 64 * payload.CHUNK == digests.BLOCK
