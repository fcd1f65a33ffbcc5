"""Status says of each disk how old its newest point is and what to do next, in words and by its exit code."""

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import pytest
from forge import entry, manifest, replaced, rewrite
from lab import Night, call_pybackup, run, run_pybackup, write

from backup.errors import Damaged
from backup.model import digests
from backup.operations import status
from backup.repository import verified
from backup.repository.machine import Contents
from backup.repository.verified import Record

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
FIELDS = [
    "machine", "disk", "point", "finished", "age_seconds", "chain_points", "stored_bytes", "logical_bytes",
    "verified", "code", "next",
]  # fmt: skip


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A full and an incremental."""
    night = Night.of(tmp_path_factory.mktemp("status"))
    night.full()
    write(night.image, "write -P 3 2M 10k")
    assert night.incremental().rc == 0
    return night


def ask(night, *options):
    return call_pybackup(["status", "--repo", night.repository, "--json", *options])


def newest_path(night):
    return night.repository / "disk" / f"{night.newest['point']}.json"


def aged(path, **ago):
    """A manifest whose point was finished so long ago."""
    before = path.read_bytes()
    finished = datetime.now(UTC) - timedelta(**ago)
    rewrite(path, lambda document: document.update(finished=f"{finished:%Y-%m-%dT%H:%M:%SZ}"))
    after = path.read_bytes()
    path.write_bytes(before)
    return replaced(path, after)


def test_a_fresh_disk_is_well(night):
    done = ask(night, "--max-age", "1h")
    assert (done.rc, done.stderr) == (0, "")
    assert list(done.document) == ["code", "summary", "max_age", "disks"]
    assert (done.document["code"], done.document["max_age"]) == (0, 3600)
    [disk] = done.document["disks"]
    assert list(disk) == FIELDS
    stored = sum(path.stat().st_size for path in (night.repository / "disk").glob("*.qcow2"))
    assert (disk["machine"], disk["disk"], disk["point"]) == ("disk", "disk", night.newest["point"])
    assert (disk["chain_points"], disk["stored_bytes"], disk["logical_bytes"]) == (2, stored, 4 << 20)
    assert disk["finished"] == night.newest["finished"]
    assert 0 <= disk["age_seconds"] < 3600
    assert disk["verified"] == {"last": None, "files": 0, "of": 2, "code": 0, "problem": None}
    assert disk["next"] == "never verified: run pybackup verify disk"


def test_the_first_line_says_it_all_and_a_table_follows(night):
    done = run_pybackup(["status", "--repo", night.repository])
    assert (done.rc, done.stderr) == (0, "")
    first, head, row = done.stdout.splitlines()
    assert first.startswith("OK: 1 disk of 1 machine,")
    assert head.split() == ["MACHINE", "DISK", "NEWEST", "AGE", "CHAIN", "STORED", "SIZE", "VERIFIED", "NEXT"]
    assert row.split()[:3] == ["disk", "disk", night.newest["point"]]


def test_too_old_is_exit_1(night):
    with aged(newest_path(night), hours=27):
        done = ask(night, "--max-age", "26h")
        assert done.rc == done.document["code"] == 1
        [disk] = done.document["disks"]
        assert disk["next"] == "too old (limit 26 h): run pybackup incremental"
        assert 27 * 3600 <= disk["age_seconds"] < 27.1 * 3600
        assert ask(night, "--max-age", "28h").rc == 0
        assert ask(night).rc == 0
        said = run_pybackup(["--quiet", "status", "--repo", night.repository, "--max-age", "26h"])
        assert (said.rc, said.stdout) == (1, "")
        assert "WARNING: 1 of 1 disk: disk/disk: too old" in said.stderr


def test_a_point_from_the_future_has_no_age(night):
    with aged(newest_path(night), minutes=-4):
        assert ask(night, "--max-age", "26h").document["disks"][0]["age_seconds"] == 0
        assert ask(night, "--max-age", "26h").rc == 0
    with aged(newest_path(night), minutes=-6):
        done = ask(night, "--max-age", "26h")
        assert done.rc == 1
        assert "check the clock" in done.document["disks"][0]["next"]
        assert ask(night).rc == 0


def test_a_point_that_cannot_be_of_its_time_is_named_and_no_fault(night):
    """Prune keeps it for ever: a repository must not grow without a word."""
    full = next(path for path in (night.repository / "disk").glob("*.json") if path != newest_path(night))

    def future(document):
        document.update(started="2099-01-01T00:00:00Z")

    before = full.read_bytes()
    rewrite(full, future)
    try:
        done = ask(night, "--max-age", "26h")
    finally:
        full.write_bytes(before)
    assert (done.rc, done.document["disks"][0]["code"]) == (0, 0)
    said = done.document["disks"][0]["next"]
    assert f"the time of point {full.stem} cannot be right (its time is in the future)" in said
    assert f"pybackup remove disk/{full.stem}" in said
    assert "cannot be right" not in ask(night).document["disks"][0]["next"]


def test_newest_is_the_highest_sequence_and_not_the_latest_time(night):
    full = next(path for path in (night.repository / "disk").glob("*.json") if path != newest_path(night))
    with aged(newest_path(night), days=3), aged(full, days=0):
        assert ask(night, "--max-age", "26h").rc == 1


def test_a_damaged_manifest_is_exit_12_and_the_rest_is_shown(night):
    path = newest_path(night)
    with replaced(path, path.read_bytes()[:-2]):
        done = ask(night, "--max-age", "26h")
        assert done.rc == 12
        whole, disk = done.document["disks"]
        assert (whole["disk"], whole["code"]) == (None, 12)
        assert path.name in whole["next"]
        assert whole["next"].startswith("damaged: ")
        assert (disk["code"], disk["chain_points"]) == (0, 1)
        assert done.document["summary"].startswith("CRITICAL: 1 of 2 ")


def test_a_missing_or_short_file_of_the_chain_is_seen_without_reading_it(night, tmp_path):
    for kind in ("file", "digests"):
        path = night.repository / "disk" / night.newest["disks"][0]["data"][kind]
        path.rename(tmp_path / "away")
        assert (ask(night).rc, ask(night).document["disks"][0]["next"]) == (10, f"missing: {path} is missing")
        (tmp_path / "away").rename(path)
    path = night.repository / "disk" / night.newest["disks"][0]["data"]["file"]
    with replaced(path, path.read_bytes()[:-1]):
        assert ask(night).rc == 12


def test_where_nothing_is_there(night, tmp_path):
    assert ask(night, "nobody").rc == 10
    assert ask(Night(night.image, tmp_path / "none")).rc == 10
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "pybackup.json").write_bytes((night.repository / "pybackup.json").read_bytes())
    assert ask(Night(night.image, empty)).rc == 10


def test_the_configurations_machines_and_disks_are_expected(night, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"repository: {night.repository}\nmachines:\n"
        "  disk: {disks: {disk: {image: a}, second: {image: b}}}\n  other: {disks: {vda: {image: c}}}\n"
    )
    done = call_pybackup(["--config", config, "status", "--json"])
    assert done.rc == 1
    found = {(each["machine"], each["disk"]): each["next"] for each in done.document["disks"]}
    assert found["disk", "disk"].startswith("never verified")
    assert found["disk", "second"] == found["other", "vda"] == "no point yet: run pybackup incremental"
    assert call_pybackup(["--config", config, "status", "other"]).rc == 1
    # Of another repository the configuration says nothing.
    config.write_text(config.read_text().replace(str(night.repository), "elsewhere"))
    assert call_pybackup(["--config", config, "status", "--repo", night.repository]).rc == 0


def test_a_machine_that_the_configuration_does_not_name_is_said_once_and_is_no_fault(night, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"repository: {night.repository}\nmachines: {{other: {{disks: {{vda: {{image: a}}}}}}}}\n")
    remark = "not in the configuration: pybackup remove disk removes the machine and its points"
    with aged(newest_path(night), days=40):
        found = call_pybackup(["--config", config, "status", "--max-age", "26h", "--json"]).document["disks"]
        assert [(each["machine"], each["code"]) for each in found] == [("disk", 0), ("other", 1)]
        assert found[0]["next"].endswith(remark)
        assert ask(night, "--max-age", "26h").rc == 1, "without a configuration each machine is held to its age"
    with replaced(newest_path(night), b""):
        found = call_pybackup(["--config", config, "status", "--json"]).document["disks"]
        assert [(each["disk"], each["code"]) for each in found] == [(None, 12), ("disk", 0), ("vda", 1)]


def test_an_empty_machine_that_the_configuration_does_not_name_is_no_fault(night, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"repository: {night.repository}\nmachines: {{disk: {{disks: {{disk: {{image: a}}}}}}}}\n")
    (night.repository / "mistyped").mkdir()
    try:
        done = call_pybackup(["--config", config, "status", "--json"])
    finally:
        (night.repository / "mistyped").rmdir()
    assert done.rc == 0
    assert done.document["disks"][1]["next"].startswith("no point, and not in the configuration")


def test_a_disk_that_the_configuration_names_no_more_is_never_too_old(night, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"repository: {night.repository}\nmachines: {{disk: {{disks: {{new: {{image: a}}}}}}}}\n")
    with aged(newest_path(night), days=40):
        found = call_pybackup(["--config", config, "status", "--max-age", "26h", "--json"]).document["disks"]
    assert [(each["disk"], each["code"]) for each in found] == [("disk", 0), ("new", 1)]


def test_a_machine_whose_first_backup_failed_has_no_point(night):
    (night.repository / "fresh").mkdir()
    try:
        done = ask(night)
        assert done.rc == 1
        assert done.document["disks"][1]["next"].startswith("no point yet")
    finally:
        (night.repository / "fresh").rmdir()


@pytest.mark.parametrize("text", ["26", "26m", "h", "-1h", "1 month", ""])
def test_an_age_has_a_number_and_a_unit(night, text):
    assert ask(night, f"--max-age={text}").rc == 2


# The decision, without files


def assess(contents, remembered=None, max_age=3600.0, problem=None):
    limits = status.Limits(NOW, max_age)
    evidence = status.Evidence(contents, remembered or {}, lambda chain: problem)
    return status.assess("m", evidence, None, limits)


def two_points():
    full, newer = manifest(1, entry(1)), manifest(2, entry(2, 1))
    return Contents({each.point: each for each in (full, newer)}, {})


def read_from(kind, entry):
    return replace(entry, source=replace(entry.source, kind=kind))


@pytest.mark.parametrize("kind", ["libvirt", "qmp", "image"])
def test_a_disk_that_a_machine_no_longer_has_is_not_held_to_its_age_where_the_machine_finds_its_disks(kind):
    first = manifest(1, *(read_from(kind, entry(1, name=name)) for name in ("vda", "vdb")))
    second = manifest(2, read_from(kind, entry(2, 1)))
    vda, vdb = assess(Contents({each.point: each for each in (first, second)}, {}))
    assert (vda.disk, vda.code) == ("vda", 1)
    assert (vdb.code, "not in the machine's newest point" in vdb.next) == ((1, False) if kind == "image" else (0, True))


def test_a_disk_that_is_gone_and_damaged_is_a_fault():
    first = manifest(1, *(read_from("libvirt", entry(1, name=name)) for name in ("vda", "vdb")))
    second = manifest(2, read_from("libvirt", entry(2, 1)))
    contents = Contents({each.point: each for each in (first, second)}, {})
    assert [found.code for found in assess(contents, problem=Damaged("x", hint="y"))] == [12, 12]


def record(code=0, problem=None, digest="0" * 64, checked="2026-11-20T00:00:00Z"):
    return Record(digest, checked, None, code, problem)


def test_what_is_broken_comes_before_what_is_old():
    [old] = assess(two_points())
    assert (old.code, old.next[:7]) == (1, "too old")
    [broken] = assess(two_points(), problem=Damaged("x", hint="y"))
    assert (broken.code, broken.next) == (12, "damaged: x")


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ([], 10),
        ([0], 0),
        ([0, 1], 1),
        ([10, 1, 0], 10),
        ([10, 12], 12),
        ([12, 10, 1], 12),
        ([1, 12, 0], 12),
        ([0, 10], 10),
    ],
)
def test_the_exit_code_is_damaged_before_missing_before_too_old(codes, worst):
    found = [status._without_point("m", "vda", code, "") for code in codes]
    assert status.exit_code(found) == worst
    assert status.exit_code(found[::-1]) == worst


def test_one_disk_missing_and_another_damaged_is_exit_12(night, tmp_path):
    run("cp", "-r", night.repository, tmp_path / "repo")
    run("cp", "-r", tmp_path / "repo" / "disk", tmp_path / "repo" / "second")
    next((tmp_path / "repo" / "disk").glob("*.qcow2")).unlink()
    copied = Night(night.image, tmp_path / "repo")
    assert ask(copied).rc == 10
    newest = tmp_path / "repo" / "second" / newest_path(night).name
    newest.write_bytes(newest.read_bytes()[:-2])
    assert ask(copied).rc == 12


def test_damage_that_verify_found_is_remembered_until_the_file_is_another():
    name = entry(1).data.file
    [found] = assess(two_points(), {name: record(12, "bits")}, max_age=None)
    assert (found.code, found.next[:27], found.verified.problem) == (12, "damaged when verified: bits", "bits")
    assert "pybackup verify m" in found.next, "the file may be back from a copy by now"
    [found] = assess(two_points(), {name: record(10, "gone")}, max_age=None)
    assert (found.code, found.next[:27]) == (10, "missing when verified: gone")
    [found] = assess(two_points(), {name: record(12, "bits", digest="1" * 64)}, max_age=None)
    assert (found.code, found.verified.last) == (0, None)


def test_a_chain_is_as_verified_as_its_files():
    older, newer = (entry(number).data.file for number in (1, 2))
    [part] = assess(two_points(), {older: record()}, max_age=None)
    assert (part.verified.files, part.verified.of, part.next) == (1, 2, "nothing")
    [whole] = assess(two_points(), {older: record(), newer: record(checked="2026-11-21T00:00:00Z")}, max_age=None)
    assert (whole.verified.files, whole.verified.last) == (2, "2026-11-21T00:00:00Z")


def test_a_memory_that_was_changed_or_is_of_another_version_is_none():
    known = {entry(1).data.file: record(), entry(2).data.file: record(12, "it\nis")}
    content = verified.encode(known)
    assert verified.decode(content) == known
    for at in range(len(content)):
        changed = content[:at] + bytes([content[at] ^ 2]) + content[at + 1 :]
        assert verified.decode(changed) == {}, at
    for other in (
        signed_lines(content.replace(b'"version": 2', b'"version": 3')),
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"format": 1}',
        content[:-3],
        b"[" * 100_000,
    ):
        assert verified.decode(other) == {}


def signed_lines(content):
    """A memory whose lines were changed, with a valid digest."""
    head = content[: content.rindex(b'{"digest"')]
    return head + json.dumps({"digest": digests.digest(head).hex()}).encode() + b"\n"


def version_1(files):
    """A memory as programs before 2026-11-29 wrote it."""
    digest = digests.digest(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hex()
    document = {"format": verified.FORMAT, "version": 1, "files": files, "digest": digest}
    return (json.dumps(document, indent=2) + "\n").encode()


def test_a_memory_of_an_older_program_is_read():
    known = {entry(1).data.file: record(), entry(2).data.file: record(12, "it\nis")}
    assert verified.decode(version_1({name: asdict(found) for name, found in known.items()})) == known


ODD_RECORDS = [
    {"deep": 5},
    {"deep": "yesterday"},
    {"checked": None},
    {"checked": "0001-01-01T00:00:00+14:00"},
    {"checked": "2026-02-30T00:00:00Z"},
    {"code": 256, "problem": "damaged"},
    {"code": 1 << 70, "problem": "x"},
    {"code": -1, "problem": "x"},
    {"code": 12.0, "problem": "x"},
    {"code": True, "problem": "x"},
    {"code": 12},
    {"problem": "sound, and yet"},
    {"code": 12, "problem": ["x"]},
    {"code": 12, "problem": "a\0b"},
    {"code": 12, "problem": "\ud800"},
    {"digest": "0" * 63},
]


@pytest.mark.parametrize("odd", ODD_RECORDS, ids=ascii)
@pytest.mark.parametrize("version", [1, 2])
def test_a_record_that_verify_does_not_write_is_no_memory_under_a_valid_digest(odd, version):
    name = entry(1).data.file
    fields = {**asdict(record()), **odd}
    if version == 1:
        assert verified.decode(version_1({name: fields})) == {}
    else:
        content = verified.encode({name: record()})
        before = json.dumps({"file": name, **asdict(record())}).encode()
        changed = signed_lines(content.replace(before, json.dumps({"file": name, **fields}).encode()))
        assert changed != content
        assert verified.decode(changed) == {}


@pytest.mark.parametrize("name", ["", "a.qcow2", "../" + entry(1).data.file, entry(1).data.file + "\0", "lock"])
def test_a_record_of_what_is_no_data_file_is_no_memory(name):
    assert verified.decode(version_1({name: asdict(record())})) == {}


def test_a_memory_of_a_hundred_thousand_files_is_read_within_bounds():
    known = {entry(number).data.file: record() for number in range(100_000)}
    content = verified.encode(known)
    assert len(content) < verified._MAX_BYTES
    assert verified.decode(content) == known
