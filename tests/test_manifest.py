"""Manifests: what is written is read back, and nothing else is."""

import json
from dataclasses import asdict, replace

import pytest
from forge import signed
from hypothesis import given
from hypothesis import strategies as st

from backup import manifest
from backup.errors import BackupError, Damaged, Failed
from backup.manifest import (
    BitmapRecord,
    ByteCounts,
    DataFile,
    DiskEntry,
    Former,
    LowerFile,
    Manifest,
    Parent,
    SourceRecord,
    decode,
    digest_name,
    encode,
    generation,
    is_data_name,
)

POINT, OLDER = "20261122T010000Z-1f3a09c1", "20261121T010000Z-00000001"


def disk(name="vda", **changes):
    entry = DiskEntry(
        name=name,
        kind="incremental",
        reason="bitmap records",
        size=1_000_001,
        identity="1" * 32,
        parent=Parent(OLDER, "2" * 32),
        bitmap=BitmapRecord("b1.x", None, 65536, False),
        data=DataFile(f"{name}.{POINT}.qcow2", 393216, f"{name}.{POINT}.b3", "3" * 64, 65536, "zstd:1"),
        bytes=ByteCounts(1, 2, 3, 4, 5),
        source=SourceRecord("image", "/a/ö\n\x1b\udcff.qcow2", "qcow2", "crash", None, (LowerFile("/b", 1, -5, 7),)),
    )
    return replace(entry, **changes)


POINT_1 = Manifest(
    POINT, 7, "web1", "4" * 32, "2026", "2027", "pybackup 0", (disk(), disk("vdb", parent=None, kind="full"))
)


DOCUMENT = {"format": manifest.FORMAT, "version": 1, **asdict(POINT_1)}


def changed(path, value):
    document = json.loads(json.dumps(DOCUMENT))
    *outer, last = path
    inner = document
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return signed(document)


def test_what_is_written_is_read_back():
    assert decode(encode(POINT_1), "m") == POINT_1


def test_the_helper_signs_as_the_program_does():
    assert signed(DOCUMENT) == encode(POINT_1)


def test_it_is_ascii_and_indented_for_people():
    assert encode(POINT_1).isascii()
    assert b'\n  "sequence": 7,\n' in encode(POINT_1)


def test_every_flipped_bit_is_damage():
    content = encode(POINT_1)
    for at in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            with pytest.raises(Damaged):
                decode(bytes(flipped), "m")


def test_every_cut_is_damage():
    content = encode(POINT_1)
    for length in range(len(content)):
        with pytest.raises(Damaged):
            decode(content[:length], "m")


@pytest.mark.parametrize("more", [b"\n", b"\0", b"{}", encode(POINT_1)])
def test_anything_appended_is_damage(more):
    with pytest.raises(Damaged):
        decode(encode(POINT_1) + more, "m")


@given(st.binary(max_size=300))
def test_random_bytes_are_damage(content):
    with pytest.raises(Damaged):
        decode(content, "m")


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"[" * 200_000, b"{" * 200_000, b'{"a":' * 100_000, b"1" * 5000, b'{"format": NaN}', b"\xff"],
)
def test_other_json_is_damage(content):
    with pytest.raises(Damaged) as caught:
        decode(content, "m")
    assert len(caught.value.message) < 1000


def test_a_newer_version_is_refused_and_not_called_damaged():
    with pytest.raises(Failed, match="format version 3"):
        decode(changed(["version"], 3), "m")


def test_a_field_of_a_later_program_is_ignored():
    assert decode(changed(["disks", 0, "later"], {"x": [1]}), "m") == POINT_1


HUGE = 10**30
HOSTILE_NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "",
    ".",
    "..",
    ".hidden",
    "-rf",
    "a\n",
    "\x1b[2J",
    "x" * 65,
    "ä",
]
CASES = [
    *[(["disks", 0, "name"], name) for name in HOSTILE_NAMES],
    *[(["machine"], name) for name in HOSTILE_NAMES],
    *[
        (["disks", 0, "data", "file"], name)
        for name in [*HOSTILE_NAMES, f"../vda.{POINT}.qcow2", f"vda.{POINT}.qcow2\n"]
    ],
    *[
        (["disks", 0, "data", "digests"], name)
        for name in [*HOSTILE_NAMES, f"/vda.{POINT}.b3", "lock", "pybackup.json"]
    ],
    *[(["point"], point) for point in ["..", "", POINT + "\n", POINT.upper(), "٢" * 8 + POINT[8:]]],
    *[(["disks", 0, "parent", "point"], point) for point in ["../x", POINT + "/..", 5]],
    *[(["sequence"], number) for number in (0, -1, HUGE, 1.0, True, "1", None)],
    *[(["disks", 0, "size"], number) for number in (-1, HUGE, 1 << 63, 1.5, False, "9")],
    *[(["disks", 0, "data", "size"], number) for number in (0, -1, HUGE)],
    *[(["disks", 0, "data", "cluster_size"], size) for size in (0, 3, 2048, 65537, 4 << 20, -65536)],
    *[(["disks", 0, "identity"], text) for text in ("", "1" * 31, "g" * 32, "A" * 32, 1)],
    *[(["disks", 0, "data", "digest"], text) for text in ("", "1" * 63, "x" * 64)],
    *[(["disks", 0, "kind"], kind) for kind in ("full", "partial", None, [])],
    *[(["disks", 1, "kind"], kind) for kind in ("incremental",)],
    (["disks", 1, "name"], "vda"),
    (["disks"], []),
    (["disks"], {}),
    (["disks"], [None]),
    (["disks", 0, "source", "lower"], [5]),
    (["disks", 0, "bytes", "zero"], -1),
    (["disks", 0, "bitmap", "claimed"], "no"),
    (["version"], 0),
    (["version"], True),
    (["version"], "1"),
    (["format"], "pybackup repository"),
    (["repository"], "x"),
    (["disks", 0, "reason"], ["x" * 1_000_000]),
]


@pytest.mark.parametrize(("path", "value"), CASES, ids=lambda value: ascii(value)[:40])
def test_a_hostile_field_under_a_valid_digest_is_refused_briefly(path, value):
    with pytest.raises(BackupError) as caught:
        decode(changed(path, value), "m")
    assert caught.value.exit_code == 12
    assert len(caught.value.message) < 400


def missing_fields():
    yield from ([key] for key in DOCUMENT)
    yield from (["disks", 0, key] for key in DOCUMENT["disks"][0])
    for inner in ("parent", "bitmap", "data", "bytes", "source"):
        yield from (["disks", 0, inner, key] for key in DOCUMENT["disks"][0][inner])


NULLABLE = {"granularity", "read", "started", "qemu", "replaces", "pinned"}


@pytest.mark.parametrize("path", [path for path in missing_fields() if path[-1] not in NULLABLE], ids=str)
def test_a_missing_field_is_damage(path):
    document = json.loads(json.dumps(DOCUMENT))
    *outer, last = path
    inner = document
    for key in outer:
        inner = inner[key]
    del inner[last]
    with pytest.raises(Damaged):
        decode(signed(document), "m")


# What prune adds

DATA = DataFile(f"vda.{POINT}.qcow2", 7, f"vda.{POINT}.1.b3", "1" * 64, 65536, "none")
FORMER = Former("incremental", "why", Parent(OLDER, "2" * 32), disk().data)
REWRITTEN = POINT_1.with_disk(disk(kind="full", parent=None, data=DATA))
EXCHANGING = POINT_1.with_disk(disk(kind="full", parent=None, data=DATA, replaces=FORMER))


def test_a_manifest_says_the_lowest_version_that_can_express_it():
    assert [found.version for found in (POINT_1, replace(POINT_1, pinned=True), REWRITTEN, EXCHANGING)] == [1, 1, 2, 2]
    for found in (POINT_1, replace(POINT_1, pinned=True), REWRITTEN, EXCHANGING):
        assert json.loads(encode(found))["version"] == found.version
        assert decode(encode(found), "m") == found


def test_what_an_exchange_replaces_comes_back_whole():
    former = replace(disk(), reason="why")
    assert EXCHANGING.disks[0].restored() == replace(former, bytes=replace(former.bytes, stored=former.data.size))
    assert REWRITTEN.disks[0].restored() == REWRITTEN.disks[0]


def test_a_manifest_of_an_older_program_has_no_pin_and_replaces_nothing():
    document = json.loads(json.dumps(DOCUMENT))
    del document["pinned"], document["disks"][0]["replaces"]
    assert decode(signed(document), "m") == POINT_1


@pytest.mark.parametrize(
    "former",
    [
        {},
        [],
        {**asdict(Former("full", "", None, DATA)), "kind": "incremental"},
        {**asdict(Former("full", "", None, DATA)), "data": {}},
        {**asdict(Former("full", "", None, DATA)), "data": {**asdict(DATA), "file": "../x.qcow2"}},
        {**asdict(Former("full", "", None, DATA)), "data": {**asdict(DATA), "digests": DATA.file}},
    ],
    ids=str,
)
def test_a_hostile_exchange_is_damage(former):
    with pytest.raises(Damaged):
        decode(changed(["disks", 0, "replaces"], former), "m")


def test_names_of_digest_files_count_how_often_a_file_was_rewritten():
    for number in (0, 1, 12):
        assert generation(digest_name("a.b", POINT, number)) == number
    assert is_data_name(f"vda.{POINT}.qcow2.new")
    for text in (f"vda.{POINT}.0.b3", f"vda.{POINT}.b3.new", "vda.new", "x.1.b3"):
        assert not is_data_name(text)
