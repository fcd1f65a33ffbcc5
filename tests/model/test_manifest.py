"""Manifests: what is written is read back, and nothing else is."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import forge
import pytest
from forge import signed, signed_bytes
from hypothesis import given
from hypothesis import strategies as st
from lab import PEAK_KIB

from backup.errors import BackupError, Damaged, Failed, UsageError
from backup.model import documents, manifest
from backup.model.manifest import (
    BitmapRecord,
    ByteCounts,
    DataFile,
    DataFileClaim,
    DiskEntry,
    Former,
    LowerFile,
    MachineFile,
    Manifest,
    Parent,
    SourceRecord,
    decode,
    digest_name,
    encode,
    generation,
    is_data_name,
)
from backup.qcow2 import layout

POINT, OLDER = "20261122T010000Z-1f3a09c1", "20261121T010000Z-00000001"


def disk(name="vda", **changes):
    entry = DiskEntry(
        name=name,
        kind="incremental",
        reason="bitmap \x1b records, ö",
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
    POINT,
    7,
    "web1",
    "4" * 32,
    "2026-11-22T01:00:00Z",
    "2026-11-22T02:00:00Z",
    "pybackup 0",
    (disk(), disk("vdb", parent=None, kind="full")),
)


FILE = {"role": "definition", "file": f"{POINT}.xml", "size": 9, "digest": "5" * 64}
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
    with pytest.raises(Failed, match="format version 4"):
        decode(changed(["version"], 4), "m")


def test_a_field_of_a_later_program_is_ignored():
    assert decode(changed(["disks", 0, "later"], {"x": [1]}), "m") == POINT_1


HUGE = 10**30
ODD_TEXTS = ["a\0b", "\ud800", "\udc00x", "x" * 70_000, 5, ["x"], {}]
ODD_TIMES = [
    "",
    "2026",
    "2026-11-22T01:00:00",
    "2026-11-22T01:00:00+00:00",
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-14:00",
    "2026-11-22 01:00:00Z",
    "2026-02-30T00:00:00Z",
    "0000-01-01T00:00:00Z",
    "2026-11-22T25:00:00Z",
    "2026-11-22T01:00:00Z\n",
    "٢026-11-22T01:00:00Z",
    1764000000,
    None,
]
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
    *[(["started"], time) for time in ODD_TIMES],
    *[(["finished"], time) for time in ODD_TIMES],
    *[(["program"], text) for text in ("", " ", "a\n", "\x1b[2J", "x" * 65, "ä", 5)],
    *[(["disks", 0, "source", key], text) for key in ("kind", "format", "consistency") for text in ("", "a\n", 5)],
    *[(["disks", 0, "source", key], text) for key in ("path", "qemu") for text in ODD_TEXTS],
    *[(["disks", 0, "bitmap", key], text) for key in ("read", "started") for text in ODD_TEXTS],
    *[(["disks", 0, "bitmap", "granularity"], number) for number in (0, -65536, HUGE, "65536", 1.0, True)],
    *[(["disks", 0, "source", "lower", 0, "path"], text) for text in ODD_TEXTS],
    *[(["disks", 0, "source", "lower", 0, "inode"], number) for number in (-1, 1 << 64, 1.5, "7")],
    *[(["disks", 0, "source", "lower", 0, "mtime_ns"], number) for number in (HUGE, -HUGE, 1.5, None)],
    *[(["disks", 0, "reason"], text) for text in ODD_TEXTS],
    *[(["disks", 0, "data", "compression"], text) for text in ("", "zstd:", "zstd:x", "lzma", "none\n", 1)],
    (["disks", 0, "size"], (2 << 50) + 1),  # clusters of 64 KiB end at 2 PiB
    (["disks", 0, "data", "size"], 1 << 57),
    # The files of another point or disk, which a prune of this point would remove.
    (["disks", 0, "data", "file"], f"vda.{OLDER}.qcow2"),
    (["disks", 0, "data", "file"], f"vdb.{POINT}.qcow2"),
    (["disks", 0, "data", "digests"], f"vda.{OLDER}.b3"),
    (["disks", 0, "data", "digests"], f"vdb.{POINT}.b3"),
    (["pinned"], 1),
    (["pinned"], "no"),
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


@pytest.mark.parametrize(("path", "value"), CASES, ids=lambda value: ascii(value)[:60])
def test_a_hostile_field_under_a_valid_digest_is_refused_briefly(path, value):
    with pytest.raises(BackupError) as caught:
        decode(changed(path, value), "m")
    assert caught.value.exit_code == 12
    assert len(caught.value.message) < 400


FILES = [
    *[{**FILE, "file": name} for name in [*HOSTILE_NAMES, f"{OLDER}.xml", f"{POINT}.nvram", "lock", 5]],
    *[{**FILE, "role": role} for role in ("nvram", "kernel", "", 5, None)],
    *[{**FILE, "size": size} for size in (0, -1, (4 << 20) + 1, HUGE, "9", True)],
    *[{**FILE, "digest": digest} for digest in ("", "x" * 64, None)],
]


@pytest.mark.parametrize("value", [*([file] for file in FILES), [FILE, FILE], {}, [None], "x"], ids=range(34))
def test_a_hostile_file_of_the_machine_is_refused_briefly(value):
    assert decode(changed(["machine_files"], [FILE]), "m").machine_files
    with pytest.raises(Damaged) as caught:
        decode(changed(["machine_files"], value), "m")
    assert len(caught.value.message) < 400


def missing_fields():
    yield from ([key] for key in DOCUMENT)
    yield from (["disks", 0, key] for key in DOCUMENT["disks"][0])
    for inner in ("parent", "bitmap", "data", "bytes", "source"):
        yield from (["disks", 0, inner, key] for key in DOCUMENT["disks"][0][inner])


NULLABLE = {
    "granularity",
    "read",
    "started",
    "why_none",
    "qemu",
    "replaces",
    "pinned",
    "plaintext",
    "trusted_data_file",
    "machine_files",
}


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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"sequence": 7', b'"sequence": 7, "sequence": 7'),
        (b'"sequence": 7', b'"sequence": 7, "later": NaN'),
        (b'"sequence": 7', b'"sequence": 7, "later": -Infinity'),
        (b'"sequence": 7', b'"sequence": ' + b"9" * 5000),
        (b'"sequence": 7', b'"sequence": 7, "later": ' + b"[" * 100_000 + b"]" * 100_000),
        (b'"sequence": 7', '"sequence": 7, "later": "ö"'.encode()),
        (b'"sequence": 7', b'"sequence": 7, "later": "\xff"'),
        (b"{\n", b"[\n{\n"),
    ],
    ids=["twice", "nan", "infinity", "digits", "deep", "utf-8", "bytes", "list"],
)
def test_what_only_some_parsers_take_is_damage_under_a_valid_digest(before, after):
    content = encode(POINT_1)
    assert before in content
    with pytest.raises(Damaged) as caught:
        decode(signed_bytes(content.replace(before, after, 1)), "m")
    assert len(caught.value.message) < 400
    assert "digest" not in caught.value.message


def test_of_bytes_that_are_not_what_was_written_nothing_is_parsed(monkeypatch):
    monkeypatch.setattr(documents, "parse", lambda _: pytest.fail("the parser saw them"))
    for content in (b"[]", b"[" * 1000, encode(POINT_1)[:-1], encode(POINT_1).replace(b"web1", b"web2")):
        with pytest.raises(Damaged, match="do not match its digest"):
            decode(content, "m")


def test_the_largest_manifest_takes_less_than_300_mib():
    """The worst that a parser can be given are lists in lists."""
    code = (
        "import sys\n"
        "from forge import signed_bytes\n"
        "from backup.model import documents, manifest\n"
        "from backup.errors import Damaged\n"
        "text = b'[' + b'[[[[[[[[]]]]]]]],' * (documents.MAX_BYTES // 17 - 10) + b'[]]'\n"
        "content = signed_bytes(b'{\\n  \"x\": ' + text + b',\\n  \"digest\": \"' + b'0' * 64 + b'\"\\n}\\n')\n"
        "assert documents.MAX_BYTES - 300 < len(content) <= documents.MAX_BYTES\n"
        "try: manifest.decode(content, 'm')\n"
        "except Damaged as error: assert 'format' in error.message, error.message\n"
        "else: sys.exit(1)\n"
        f"print({PEAK_KIB} >> 10)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=Path(forge.__file__).parent
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300


def test_a_larger_document_is_refused_unread():
    with pytest.raises(Damaged, match="more than"):
        decode(b" " * (documents.MAX_BYTES + 1), "m")


def test_the_largest_disk_is_the_largest_that_a_data_file_can_hold():
    for cluster_size in (4096, 65536, 2 << 20):
        size = manifest.max_disk_size(cluster_size)
        layout.require_writable(layout.Image(size, cluster_size, None, True))
        with pytest.raises(UsageError):
            layout.require_writable(layout.Image(size + 1, cluster_size, None, True))


def test_more_disks_than_a_manifest_can_hold_are_an_error_before_anything_is_written():
    many = replace(POINT_1, disks=tuple(disk(f"vd{number}") for number in range(6000)))
    with pytest.raises(Failed, match="6000 disks of machine web1"):
        encode(many)


def test_each_of_thousands_of_disks_is_found_at_once():
    many = replace(POINT_1, disks=tuple(disk(f"vd{number}") for number in range(2000)))
    assert decode(encode(many), "m") == many
    assert [many.disk(f"vd{number}") for number in range(2000)] == list(many.disks)
    assert many.disk("vda") is None
    began = time.process_time()
    for _ in range(50):
        for entry in many.disks:
            many.disk(entry.name)
    assert time.process_time() - began < 1  # a search of the list takes 5 s and more


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


def test_files_of_the_machine_raise_the_version():
    """An older program would drop the field when it pins the point, and would not copy the files."""
    files = (MachineFile(**FILE), MachineFile("nvram", f"{POINT}.nvram", 64 << 20, "6" * 64))
    for before in (POINT_1, REWRITTEN, EXCHANGING):
        found = replace(before, machine_files=files)
        assert (found.version, json.loads(encode(found))["version"]) == (3, 3)
        assert decode(encode(found), "m") == found
        assert [file.role for file in found.machine_files if found.machine_file(file.role) == file] == [
            "definition",
            "nvram",
        ]
        assert set(before.files) < set(found.files)
    assert POINT_1.machine_file("definition") is None


def test_names_of_the_machines_files_are_those_of_no_other_file():
    for role in ("definition", "nvram", "tpm"):
        name = manifest.machine_file_name(role, POINT)
        assert manifest.is_machine_file_name(name)
        assert not is_data_name(name)
        assert manifest.point_of(name) is None
    for name in (f"{POINT}.json", f"vda.{POINT}.qcow2", f"{POINT}.xml.tmp", f"x{POINT}.xml", f"{POINT}.xml\n", "lock"):
        assert not manifest.is_machine_file_name(name)


def test_what_an_exchange_replaces_comes_back_whole():
    former = replace(disk(), reason="why")
    assert EXCHANGING.disks[0].restored() == replace(former, bytes=replace(former.bytes, stored=former.data.size))
    assert REWRITTEN.disks[0].restored() == REWRITTEN.disks[0]


def test_plaintext_of_an_encrypted_disk_is_recorded():
    entry = disk()
    plain = POINT_1.with_disk(replace(entry, source=replace(entry.source, plaintext=True)))
    assert json.loads(encode(plain))["disks"][0]["source"]["plaintext"] is True
    assert decode(encode(plain), "m") == plain


def test_the_users_statement_about_a_data_file_is_recorded():
    entry = disk()
    claim = DataFileClaim("/dev/vg0/web1", "uuid LVM-x")
    trusting = POINT_1.with_disk(replace(entry, source=replace(entry.source, trusted_data_file=claim)))
    recorded = json.loads(encode(trusting))
    assert (recorded["version"], recorded["disks"][0]["source"]["trusted_data_file"]) == (1, asdict(claim))
    assert decode(encode(trusting), "m") == trusting
    del recorded["disks"][0]["source"]["trusted_data_file"]["file_id"]
    with pytest.raises(Damaged):
        decode(signed(recorded), "m")


def test_a_manifest_of_an_older_program_has_no_pin_replaces_nothing_and_lacks_later_fields_of_the_source():
    document = json.loads(json.dumps(DOCUMENT))
    del document["pinned"], document["disks"][0]["replaces"]
    del document["disks"][0]["source"]["plaintext"], document["disks"][0]["source"]["trusted_data_file"]
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
    assert is_data_name(f"vda.{POINT}.qcow2.part")
    assert is_data_name(f"vda.{POINT}.qcow2.new.part")
    for text in (
        f"vda.{POINT}.0.b3",
        f"vda.{POINT}.b3.new",
        f"vda.{POINT}.b3.part",
        f"vda.{POINT}.part",
        "vda.new",
        "x.1.b3",
    ):
        assert not is_data_name(text)
