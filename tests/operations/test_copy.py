"""A second place holds the same bytes, point by point, restores by itself, and is never given what is damaged."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
from forge import flipped, replaced, rewrite
from kills import DATA, DRIVER, FOLDER, REPOSITORY, Step
from lab import (
    MIB,
    Night,
    call_pybackup,
    check_repository,
    init,
    make_image,
    raw_copy,
    require_whole,
    restore_and_cmp,
    run,
    run_pybackup,
    write,
)
from places import machine_at, repository_at

from backup.errors import Failed
from backup.model.names import MARKER
from backup.operations import copy as replicate
from backup.storage.folder import FolderStorage


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """Three points, the first of several blocks of 4 MiB, and the disk as it was at each: 0.raw, 1.raw, 2.raw."""
    night = Night.of(tmp_path_factory.mktemp("replicate"), "16M")
    (night.image.with_name("noise")).write_bytes(random.Random(7).randbytes(9 * MIB))
    write(night.image, f"write -s {night.image.with_name('noise')} 2M 9M")
    for number, change in enumerate(("write -P 1 0 1k", "write -P 0x21 3M 200k", "write -z 4M 1M")):
        write(night.image, change)
        assert (night.incremental() if number else night.full()).rc == 0
        raw_copy(night.image, night.image.with_name(f"{number}.raw"))
    return night


def manifests(repository, machine="disk"):
    """Paths by sequence."""
    found = {json.loads(path.read_bytes())["sequence"]: path for path in (repository / machine).glob("*.json")}
    return [found[number] for number in sorted(found)]


def copy(night, what, other):
    return call_pybackup(["copy", what, other, "--repo", night.repository, "--json"])


def require_same_files(night, other, points):
    """Of these points, all files are the same bytes; of others there is none."""
    for path in manifests(night.repository):
        held = json.loads(path.read_bytes())
        for name in (path.name, *(disk["data"][kind] for disk in held["disks"] for kind in ("file", "digests"))):
            if held["point"] in points:
                run("cmp", path.parent / name, other / "disk" / name)
            else:
                assert not (other / "disk" / name).exists()
    check_repository(other)


def points(night):
    return [path.stem for path in manifests(night.repository)]


def require_restoring(night, other):
    """What is there restores to the disk as it was, and verifies, without the first place."""
    away = night.repository.rename(night.repository.with_name("away"))
    try:
        for path in manifests(other):
            number = json.loads(path.read_bytes())["sequence"] - 1
            restore_and_cmp(other, f"disk/{path.stem}", night.image.with_name(f"{number}.raw"))
        assert call_pybackup(["verify", "--deep", "--repo", other]).rc == 0
    finally:
        away.rename(night.repository)


def test_a_dry_run_tells_what_a_run_copies_and_makes_nothing(night, tmp_path):
    other = tmp_path / "other"
    given = ["copy", "disk", other, "--repo", night.repository]
    told = call_pybackup([*given, "--dry-run", "--json"])
    assert (told.rc, told.document["dry_run"], told.document["copied"]) == (0, True, points(night))
    assert "disk: would copy 3 points, " in call_pybackup([*given, "--dry-run"]).stdout
    assert not (other / "disk").exists()
    assert copy(night, f"disk/{points(night)[0]}", other).rc == 0
    before = sorted(other.rglob("*"))
    told = call_pybackup([*given, "--dry-run", "--json"]).document
    assert sorted(other.rglob("*")) == before
    done = copy(night, "disk", other).document
    assert (told.pop("dry_run"), done.pop("dry_run")) == (True, False)
    assert (told, told["copied"], told["present"]) == (done, points(night)[1:], points(night)[:1])
    assert call_pybackup(["copy", "disk", night.repository, "--dry-run", "--repo", night.repository]).rc == 2


def test_a_machine_is_copied_byte_for_byte_and_only_once(night, tmp_path):
    other = tmp_path / "new" / "other"
    done = copy(night, "disk", other)
    assert (done.rc, done.stderr) == (0, "")
    stored = sum(path.stat().st_size for path in (night.repository / "disk").glob("*.qcow2"))
    assert done.document == {
        "machine": "disk",
        "repository": str(other),
        "dry_run": False,
        "copied": points(night),
        "present": [],
        "bytes": stored,
        "problems": [],
    }
    require_same_files(night, other, points(night))
    run("cmp", night.repository / "pybackup.json", other / "pybackup.json")
    assert {oct(path.stat().st_mode & 0o777) for path in other.rglob("*") if path.is_file()} == {"0o600"}
    require_restoring(night, other)
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*.*")}
    again = copy(night, "disk", other)
    assert (again.rc, again.document["copied"], again.document["bytes"]) == (0, [], 0)
    assert again.document["present"] == sorted(points(night))
    assert {path: path.stat().st_mtime_ns for path in other.rglob("*.*")} == before


def test_a_point_is_copied_with_its_chain_and_the_rest_later(night, tmp_path):
    other = tmp_path / "other"
    first, second, third = points(night)
    assert copy(night, f"disk/{second}", other).document["copied"] == [first, second]
    require_same_files(night, other, {first, second})
    require_restoring(night, other)
    assert copy(night, manifests(night.repository)[0], other).document["present"] == [first]
    done = copy(night, "disk/latest", other)
    assert (done.document["copied"], done.document["present"]) == ([third], [])
    require_same_files(night, other, {first, second, third})


def test_what_people_see(night, tmp_path):
    done = run_pybackup(["copy", "disk", tmp_path / "other", "--repo", night.repository])
    assert (done.rc, done.stderr) == (0, "")
    assert done.stdout.startswith("disk: copied 3 points, ")


def test_fields_of_a_later_program_are_copied_too(night, tmp_path):
    run("cp", "-r", night.repository, tmp_path / "repo")
    here = Night(night.image, tmp_path / "repo")
    rewrite(manifests(here.repository)[0], lambda document: document["disks"][0].update(later=[1]))
    assert copy(here, "disk", tmp_path / "other").rc == 0
    require_same_files(here, tmp_path / "other", points(here))


@pytest.mark.parametrize("at", [0, 5 * MIB, 9 * MIB])
def test_a_damaged_file_and_what_builds_on_it_are_not_copied(night, tmp_path, at):
    other = tmp_path / "other"
    first, second, third = points(night)
    data = night.repository / "disk" / f"disk.{first}.qcow2"
    with replaced(data, flipped(data.read_bytes(), at, 3)):
        done = copy(night, "disk", other)
    assert done.rc == 12
    assert done.document["copied"] == []
    assert [(problem["point"], problem["code"]) for problem in done.document["problems"]] == [
        (first, 12),
        (second, 10),
        (third, 10),
    ]
    assert f"between bytes {at // (4 * MIB) * 4 * MIB} and" in done.document["problems"][0]["message"]
    assert sorted(path.name for path in (other / "disk").iterdir()) == ["lock"]
    assert copy(night, "disk", other).document["copied"] == [first, second, third]
    require_same_files(night, other, {first, second, third})


@pytest.mark.parametrize("kind", ["digests", "manifest", "missing"])
def test_damage_in_the_middle_leaves_what_is_before_it(night, tmp_path, kind):
    other = tmp_path / "other"
    first, second, _ = points(night)
    suffix = {"digests": f"disk.{second}.b3", "manifest": f"{second}.json", "missing": f"disk.{second}.qcow2"}[kind]
    path = night.repository / "disk" / suffix
    before = path.read_bytes()
    try:
        path.unlink() if kind == "missing" else path.write_bytes(flipped(before, len(before) // 2, 0))
        done = copy(night, "disk", other)
    finally:
        path.write_bytes(before)
        path.chmod(0o600)
    assert done.rc == (10 if kind == "missing" else 12)
    assert done.document["copied"] == [first]
    assert len(done.stderr.splitlines()) == 2 * len(done.document["problems"]) == 4
    require_same_files(night, other, {first})
    require_restoring(night, other)


def test_where_no_copy_may_go(night, tmp_path):
    stranger = Night.of(tmp_path)
    stranger.full()
    state = stranger.state()
    for place in (night.repository, night.repository / "disk", night.repository / "disk" / "new", stranger.repository):
        done = copy(night, "disk", place)
        assert (done.rc, len(done.stderr.splitlines())) == (2, 2), place
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = copy(night, "disk", tmp_path / "full")
    assert (done.rc, done.stderr.count(f"pybackup init --copy-of {night.repository} {tmp_path / 'full'}")) == (10, 1)
    assert os.listdir(tmp_path / "full") == ["file"]
    assert stranger.state() == state
    check_repository(night.repository)


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["copy", "dry run"])
@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_a_place_that_is_not_mounted_does_not_become_a_second_place(night, tmp_path, there, options):
    mount_point = tmp_path / "mnt"
    if there:
        mount_point.mkdir()
    for what in ("disk", "disk/latest"):
        given = ["copy", what, mount_point, "--repo", night.repository, *options]
        done = call_pybackup(given, made=False)
        assert (done.rc, len(done.stderr.splitlines())) == (10, 2), done
        assert f"pybackup init --copy-of {night.repository} {mount_point}" in done.stderr
    assert not mount_point.exists() or os.listdir(mount_point) == []


def test_init_makes_a_second_place_with_the_first_ones_id_and_nothing_else_becomes_one(night, tmp_path):
    other = tmp_path / "other"
    made = ["init", "--copy-of", night.repository, other]
    done = call_pybackup(made)
    assert (done.rc, done.stderr) == (0, "")
    run("cmp", night.repository / MARKER, other / MARKER)
    before = {path: path.read_bytes() for path in other.iterdir()}
    again = call_pybackup(made)
    assert (again.rc, len(again.stderr.splitlines())) == (2, 2)
    assert {path: path.read_bytes() for path in other.iterdir()} == before
    assert call_pybackup(["copy", "disk", other, "--repo", night.repository], made=False).rc == 0
    assert call_pybackup(["init", "--copy-of", tmp_path / "none", tmp_path / "third"]).rc == 10
    for inside in (night.repository / "disk" / "new", other / "new"):
        assert call_pybackup(["init", "--copy-of", night.repository, inside]).rc == 2
        assert not inside.exists()
    assert not (tmp_path / "third").exists()


def test_another_point_of_the_same_name_is_never_overwritten(night, tmp_path):
    other = tmp_path / "other"
    assert copy(night, "disk", other).rc == 0
    second = manifests(other)[1]
    rewrite(second, lambda document: document["disks"][0].update(identity="0" * 32))
    before = {path: path.read_bytes() for path in (other / "disk").iterdir()}
    done = copy(night, "disk", other)
    assert done.rc == 12
    assert second.stem in done.document["error"]["message"]
    assert {path: path.read_bytes() for path in (other / "disk").iterdir()} == before


def test_a_second_place_that_was_backed_up_to_is_refused(night, tmp_path):
    other = tmp_path / "other"
    first = points(night)[0]
    assert copy(night, f"disk/{first}", other).rc == 0
    image = make_image(tmp_path / "disk.qcow2", "1M")
    assert call_pybackup(["full", "--image", image, "--machine", "disk", "--repo", other]).rc == 0
    done = copy(night, "disk", other)
    assert done.rc == 1
    assert "has its sequence number" in done.document["error"]["message"]
    assert len(manifests(other)) == 2


def test_a_damaged_manifest_there_stops_it(night, tmp_path):
    other = tmp_path / "other"
    assert copy(night, "disk", other).rc == 0
    path = manifests(other)[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert copy(night, "disk", other).rc == 12


def test_a_point_that_is_stored_otherwise_there_is_kept_and_built_upon(night, tmp_path):
    """As after a consolidation: the second point is a full there, and the first is gone."""
    other, making = tmp_path / "other", tmp_path / "making"
    first, second, third = points(night)
    full = ["full", "--image", night.image.with_name("1.raw"), "--image-format", "raw", "--machine", "disk"]
    assert copy(night, f"disk/{first}", other).rc == 0
    assert call_pybackup([*full, "--disk", "disk", "--repo", making]).rc == 0
    [made] = manifests(making)
    for path in (other / "disk").glob(f"*{first}*"):
        path.unlink()
    for suffix in ("qcow2", "b3"):
        (making / "disk" / f"disk.{made.stem}.{suffix}").rename(other / "disk" / f"disk.{second}.{suffix}")
    made = made.rename(other / "disk" / f"{second}.json")
    source = json.loads(manifests(night.repository)[1].read_bytes())

    def change(document):
        document.update({name: source[name] for name in ("point", "sequence", "repository")})
        [disk] = document["disks"]
        disk["identity"] = source["disks"][0]["identity"]
        disk["data"].update(file=f"disk.{second}.qcow2", digests=f"disk.{second}.b3")

    rewrite(made, change)
    before = made.read_bytes()
    done = copy(night, "disk/latest", other)
    assert (done.rc, done.document["copied"]) == (0, [third])
    assert made.read_bytes() == before
    require_restoring(night, other)
    check_repository(other)


def test_it_waits_for_nobody_there(night, tmp_path):
    other = tmp_path / "other"
    with replicate.make_second(FolderStorage(other), _opened(night)).machine("disk").lock():
        assert copy(night, "disk", other).rc == 11
    # The first place may be locked: it is only read.
    with machine_at(night.repository / "disk").lock():
        assert copy(night, "disk", other).rc == 0


def _opened(night):
    return repository_at(night.repository)


def test_a_full_disk_there_leaves_whole_points_and_nothing_else(night, tmp_path, monkeypatch):
    from backup.repository.data_file_writer import CopiedFile

    other, finish, calls = tmp_path / "other", CopiedFile.finish, []

    def full(self):
        calls.append(self)
        if len(calls) == 2:
            raise Failed("no space", hint="x")
        return finish(self)

    monkeypatch.setattr(CopiedFile, "finish", full)
    assert copy(night, "disk", other).rc == 1
    require_same_files(night, other, points(night)[:1])
    assert copy(night, "disk", other).document["copied"] == points(night)[1:]


def test_a_place_without_room_is_refused_before_anything_is_written(night, tmp_path, monkeypatch):
    other, stored = tmp_path / "other", sum(path.stat().st_size for path in (night.repository / "disk").glob("*.qcow2"))

    def with_free(free):
        return lambda _: SimpleNamespace(f_bavail=free, f_frsize=1)

    monkeypatch.setattr(os, "statvfs", with_free(stored))
    done = copy(night, "disk", other)
    assert (done.rc, len(done.stderr.splitlines())) == (1, 2)
    assert f"and {stored} (" in done.stderr
    assert [path.name for path in (other / "disk").iterdir()] == ["lock"]
    first = points(night)[0]
    monkeypatch.undo()
    assert copy(night, f"disk/{first}", other).rc == 0
    monkeypatch.setattr(os, "statvfs", with_free(stored))
    assert copy(night, "disk", other).rc == 0, "only what is missing needs room"
    monkeypatch.setattr(os, "statvfs", with_free(0))
    assert copy(night, "disk", other).rc == 0


@pytest.mark.parametrize("named", [False, True])
def test_a_point_that_was_pruned_meanwhile_is_no_damage_unless_it_was_asked_for(night, tmp_path, monkeypatch, named):
    run("cp", "-r", night.repository, tmp_path / "repo")
    here, other = Night(night.image, tmp_path / "repo"), tmp_path / "other"
    first, second, third = points(here)
    original = replicate._Run.copy

    def pruned(self, point):
        if point == second:
            prune = ["prune", "disk", "--keep-last", "1", "--batch", "1", "--repo", here.repository]
            assert run_pybackup(prune).rc == 0
            assert points(here) == [third]
        original(self, point)

    monkeypatch.setattr(replicate._Run, "copy", pruned)
    done = copy(here, f"disk/{second}" if named else "disk", other)
    assert done.document["copied"] == ([first] if named else [first, third])
    assert done.rc == (10 if named else 0), done.stderr
    restore_and_cmp(other, "disk/latest", night.image.with_name("0.raw" if named else "2.raw"))
    check_repository(other)


def test_a_machine_of_which_no_manifest_can_be_read_is_damaged_and_not_empty(night, tmp_path):
    run("cp", "-r", night.repository, tmp_path / "repo")
    here = Night(night.image, tmp_path / "repo")
    for path in manifests(here.repository):
        path.write_bytes(path.read_bytes()[:-1])
    assert copy(here, "disk", tmp_path / "other").rc == 12


def test_a_point_that_is_swapped_while_it_is_opened_is_opened_again(night, tmp_path, monkeypatch):
    read, calls = replicate.read_manifest_whole, []

    def reading(files, name):
        manifest, content = read(files, name)
        calls.append(name)
        return manifest, content + b" " * (len(calls) == 1)

    monkeypatch.setattr(replicate, "read_manifest_whole", reading)
    assert copy(night, f"disk/{points(night)[0]}", tmp_path / "other").rc == 0
    assert len(calls) == 3
    require_same_files(night, tmp_path / "other", points(night)[:1])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_point_that_prune_is_exchanging_is_copied_as_it_is_stored(night, tmp_path, when):
    """Its manifest lists two files, of which one has the name; the copy's lists that one."""
    repository, other = tmp_path / "repo", tmp_path / "other"
    run("cp", "-r", night.repository, repository)
    spec = Step(FOLDER, "os.rename", when, nth=3).spec(signal.SIGKILL)
    prune = ["prune", "disk", "--keep-last", "1", "--batch", "1", "--repo", repository]
    subprocess.run([sys.executable, "-c", DRIVER, spec, *prune], check=False, capture_output=True, timeout=60)
    assert any(json.loads(path.read_bytes())["disks"][0].get("replaces") for path in manifests(repository))
    here = Night(night.image, repository)
    done = copy(here, "disk", other)
    assert (done.rc, done.document["copied"]) == (0, points(night))
    assert not any(json.loads(path.read_bytes())["disks"][0].get("replaces") for path in manifests(other))
    check_repository(other)
    require_restoring(here, other)


STEPS = [
    Step(REPOSITORY, "Machine.remove_leftovers", "before"),
    Step(DATA, "CopiedFile.write", "before", 2),
    Step(DATA, "CopiedFile.write", "after", 4),
    Step(DATA, "CopiedFile.finish", "after"),
    Step("backup.operations.copy", "write_digests", "before", 2),
    Step("backup.operations.copy", "write_digests", "after"),
    Step(REPOSITORY, "Machine.publish", "before", 2),
    Step(FOLDER, "os.rename", "before"),  # of a data file, which is complete
    Step(FOLDER, "os.rename", "after"),
    Step(FOLDER, "os.rename", "before", 2),  # of a manifest
    Step(FOLDER, "os.rename", "after", 2),
    Step(REPOSITORY, "Machine.publish", "after", 2),
]


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_copy_that_is_cut_off_is_resumed(night, tmp_path, step, number):
    other = tmp_path / "other"
    command = [sys.executable, "-c", DRIVER, step.spec(number), "copy", "disk", other, "--repo", night.repository]
    init(command)
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(command, check=False, stdout=said, stderr=said, timeout=60)
        said.seek(0)
        text = said.read()
    assert done.returncode == (-number if number == signal.SIGKILL else 128 + number)
    require_whole(other)
    whole = [path.stem for path in manifests(other)] if (other / "disk").exists() else []
    assert whole == points(night)[: len(whole)]
    if number == signal.SIGTERM and whole:
        assert "the points that were copied are complete and stay" in text
        require_same_files(night, other, whole)
    for path in whole:
        restore_and_cmp(other, f"disk/{path}", night.image.with_name(f"{points(night).index(path)}.raw"))
    again = copy(night, "disk", other)
    assert (again.rc, again.document["copied"]) == (0, points(night)[len(whole) :])
    require_same_files(night, other, points(night))
    assert not list(other.rglob("*.tmp"))
