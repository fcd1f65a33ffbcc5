"""MANIFEST by other names: a machine, a day, a part of a point's id, a data file; and what is ambiguous is refused."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import pytest
from lab import Night, call_pybackup

from backup.model import manifest as manifests

IDS = ["20261127T220000Z-aaaa0001", "20261128T010000Z-aaaa0002", "20261128T230000Z-bbbb0001"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    night = Night.of(tmp_path_factory.mktemp("night"))
    night.full()
    return night


@pytest.fixture
def repository(made, tmp_path):
    """Machine `web1` with three points, and `db1` with the first of them under another id."""
    path = tmp_path / "repo"
    shutil.copytree(made.repository, path)
    [old] = path.glob("disk/*.json")
    read = manifests.decode(old.read_bytes(), "x")
    old.unlink()
    (path / "disk").rename(path / "web1")
    (path / "db1").mkdir()
    for sequence, point in enumerate(IDS, 1):
        place(path / "web1", read, point, sequence)
    place(path / "db1", read, "20261128T020000Z-cccc0001", 1)
    return path


def place(folder, read, point, sequence):
    began = f"{point[:4]}-{point[4:6]}-{point[6:8]}T{point[9:11]}:{point[11:13]}:{point[13:15]}Z"
    [disk] = read.disks
    data = replace(disk.data, file=f"disk.{point}.qcow2", digests=f"disk.{point}.b3")
    changed = replace(
        read,
        point=point,
        sequence=sequence,
        machine=folder.name,
        started=began,
        finished=began,
        disks=(replace(disk, data=data),),
    )
    (folder / f"{point}.json").write_bytes(manifests.encode(changed))


def shown(repository, text):
    done = call_pybackup(["show", text, "--json", "--repo", repository])
    return (done.document["machine"], done.document["point"]) if done.rc == 0 else (done.rc, done.stderr)


@pytest.fixture(params=["UTC", "Asia/Tokyo", "America/New_York"])
def zone(request, monkeypatch):
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("web1", IDS[2]),
        ("web1/", IDS[2]),
        ("web1/latest", IDS[2]),
        (f"web1/{IDS[0]}", IDS[0]),
        ("web1/aaaa0002", IDS[1]),
        ("web1/20261127", IDS[0]),
        ("web1/20261128T01", IDS[1]),
        ("web1/0002", IDS[1]),
        ("aaaa0002", IDS[1]),
        ("20261128T23", IDS[2]),
        (IDS[1], IDS[1]),
    ],
)
def test_a_point_is_found_by_its_machine_or_by_a_part_of_its_id(repository, text, point):
    assert shown(repository, text) == ("web1", point)


def test_a_part_of_an_id_finds_the_only_machine_that_has_it(repository):
    assert shown(repository, "cccc0001") == ("db1", "20261128T020000Z-cccc0001")


@pytest.mark.parametrize("text", ["web1/2026", "web1/0001", "20261128T0", "0001"])
def test_what_fits_several_points_is_wrong_usage_and_lists_them(repository, text):
    code, said = shown(repository, text)
    assert (code, len(said.splitlines())) == (2, 2)
    assert said.count("20261") >= 2


def test_a_day_is_the_newest_point_at_its_end_in_local_time(repository, zone):
    of_day = {
        "UTC": {"26": 10, "27": IDS[0], "28": IDS[2], "29": IDS[2]},
        "Asia/Tokyo": {"26": 10, "27": 10, "28": IDS[1], "29": IDS[2]},
        "America/New_York": {"26": 10, "27": IDS[1], "28": IDS[2], "29": IDS[2]},
    }[zone]
    for day, expected in of_day.items():
        found = shown(repository, f"web1/2026-11-{day}")
        assert found[0 if expected == 10 else 1] == expected, (day, found)


def test_of_a_day_the_highest_sequence_counts_and_not_the_latest_time(repository, made):
    read = manifests.decode((repository / "web1" / f"{IDS[2]}.json").read_bytes(), "x")
    place(repository / "web1", read, "20261128T000000Z-dddd0001", 9)  # a clock that was turned back
    assert shown(repository, "web1/2026-11-28")[1] == "20261128T000000Z-dddd0001"


@pytest.mark.parametrize("text", ["web1/2026-13-01", "web1/2026-02-30", "web1/9999-12-31", "web1/0000-01-01"])
def test_a_day_that_is_none_is_wrong_usage(repository, text):
    code, said = shown(repository, text)
    assert (code, len(said.splitlines())) == (2, 2)


@pytest.mark.parametrize(
    "text", ["nobody", "web1/ffff", "web1/x*", "nobody/latest", "a/b/c", "/latest", "web1/2025-01-01"]
)
def test_what_is_not_there_is_10(repository, text):
    code, said = shown(repository, text)
    assert (code, len(said.splitlines())) == (10, 2)


def test_a_data_file_or_digest_file_finds_its_manifest(made):
    [data] = made.repository.glob("disk/*.qcow2")
    for path in (data, data.with_suffix(".b3")):
        done = call_pybackup(["show", path, "--json"])
        assert (done.rc, done.document["point"]) == (0, made.newest["point"])
        assert call_pybackup(["verify", path, "--quiet"]).rc == 0


def test_another_file_is_no_manifest(made):
    done = call_pybackup(["show", made.image, "--repo", made.repository])
    assert (done.rc, "neither a manifest nor a data file" in done.stderr) == (2, True)


def test_a_damaged_manifest_that_may_be_meant_is_damage_and_one_that_is_not_does_no_harm(repository):
    (repository / "web1" / f"{IDS[1]}.json").write_text("{}")
    assert shown(repository, "web1")[0] == 12
    assert shown(repository, "web1/2026-11-28") == ("web1", IDS[2])
    assert shown(repository, "web1/aaaa0002")[0] == 12
    assert shown(repository, "web1/aaaa0001") == ("web1", IDS[0])
    (repository / "web1" / f"{IDS[1]}.json").unlink()
    (repository / "web1" / f"{IDS[2]}.json").write_text("{}")
    assert shown(repository, "web1/2026-11-28")[0] == 12
    assert shown(repository, "web1/20261127") == ("web1", IDS[0])


@pytest.mark.parametrize("command", ["verify", "copy", "restore", "pin"])
def test_every_command_that_takes_a_point_takes_a_part_of_its_id(made, tmp_path, command):
    part = made.newest["point"][-8:]
    other = {"copy": [tmp_path / "second"], "restore": [tmp_path / "r.raw"]}.get(command, [])
    done = call_pybackup([command, part, *other, "--repo", made.repository])
    assert done.rc == 0, done


def test_verify_of_a_machine_is_of_all_its_points(made):
    made.full()
    done = call_pybackup(["verify", "disk", "--json", "--repo", made.repository])
    assert (done.rc, done.document["points"]) == (0, 2)
