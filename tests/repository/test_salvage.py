"""
Salvage: whatever is damaged, every byte outside of the ranges that are listed is the disk's, and the list is no longer
than the damage makes it; cmp with QEMU's own copy of the disk is the judge.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from lab import CLUSTER, MIB, Night, call_pybackup, raw_copy, require_identical, run, write
from targets import qemu_nbd

from backup.model import manifest
from backup.model.digests import digest
from backup.repository import salvage

BLOCK = 4 * MIB


@dataclass(frozen=True, slots=True)
class Stored:
    """A point's data file before it is damaged, and how many clusters it allocates."""

    data: Path
    digests: Path
    manifest: Path
    held: int


@dataclass(frozen=True, slots=True)
class Victim:
    """A chain of points, newest first, in a repository that will be damaged; `source.raw` in `folder` is the disk."""

    folder: Path
    night: Night
    points: tuple[Stored, ...]

    @classmethod
    def of(cls, night):
        folder = night.image.parent
        raw_copy(night.image, folder / "source.raw")
        machine = night.repository / "disk"
        found = [(json.loads(path.read_bytes()), path) for path in machine.glob("*.json")]
        points = []
        for read, path in sorted(found, key=lambda pair: -pair[0]["sequence"]):
            data = machine / read["disks"][0]["data"]["file"]
            held = sum(length for _, length, _, _ in guest_map(data)) // CLUSTER
            points.append(Stored(data, machine / read["disks"][0]["data"]["digests"], path, held))
        return cls(folder, night, tuple(points))

    @property
    def size(self):
        return (self.folder / "source.raw").stat().st_size

    def not_held_above(self, number):
        """Clusters of the disk that no point newer than this one may hold (here they never overlap)."""
        return self.size // CLUSTER - sum(point.held for point in self.points[:number])

    def restore(self, name, *options):
        given = ["restore", self.points[0].manifest, self.folder / name, "--repo", self.night.repository]
        return call_pybackup([*given, *options])

    def salvaged(self):
        """The ranges that are listed; what is outside of them is the disk's, and zeroes are where it says so."""
        plain = self.restore("plain.raw", "--force")
        done = self.restore("salvaged.raw", "--salvage", "--json", "--force")
        assert done.rc in {0, 12}, done
        assert plain.rc in {0, 10, 12}
        assert (plain.rc != 0) or (done.rc == 0)
        [disk] = done.document["disks"]
        assert (done.rc == 12) == bool(disk["lost"]) == (done.document["error"] is not None)
        source = (self.folder / "source.raw").read_bytes()
        found = bytearray((self.folder / "salvaged.raw").read_bytes())
        assert len(found) == len(source)
        at = 0
        for lost in disk["lost"]:
            low, high = lost["start"], lost["start"] + lost["length"]
            assert at <= low < high <= len(source)
            if lost["content"] == "zeroes":
                assert not any(found[low:high])
            found[low:high] = source[low:high]
            at = high
        (self.folder / "patched.raw").write_bytes(found)
        require_identical(self.folder / "source.raw", self.folder / "patched.raw")
        return disk["lost"]


def guest_map(path):
    """What qemu-img says that a data file holds itself: (start, length, offset in the file or None, compressed)."""
    out = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", path))
    allocated = [each for each in out if each["depth"] == 0 and each["present"]]
    return [(each["start"], each["length"], each.get("offset"), each.get("compressed", False)) for each in allocated]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """
    A full with compressed and raw data over several blocks, and two incrementals with data and zeroes.
    """
    folder = tmp_path_factory.mktemp("original")
    found = Night.of(folder, "24M")
    noise = folder / "noise"
    noise.write_bytes(random.Random(1).randbytes(9 * MIB))
    text = folder / "text"
    words = random.Random(2).choices(["alpha", "beta", "gamma", "delta", "of", "the", "and"], k=2 * MIB)
    text.write_text(" ".join(words)[: 8 * MIB])
    write(found.image, f"write -s {noise} 4M 9M", f"write -s {text} 13M 8M")
    found.full()
    write(found.image, "write -P 0x33 5M 300k", "write -z 6M 1M", "write -P 0x34 14M 200k")
    assert found.incremental().rc == 0
    write(found.image, f"write -s {text} 1M 200k", "write -P 0x44 23M 1M", "write -z 2M 128k")
    assert found.incremental().rc == 0
    return found


@pytest.fixture
def victim(original, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(original.repository, tmp_path / "repo")
    shutil.copy(original.image, tmp_path / "disk.qcow2")
    return Victim.of(Night(tmp_path / "disk.qcow2", tmp_path / "repo"))


def damage(path, offset, length=8):
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(length)
        file.seek(offset)
        file.write(bytes(byte ^ 0x5A for byte in before))


def clusters(lost):
    return sum(each["length"] for each in lost) // CLUSTER


def kinds(lost):
    return {each["content"] for each in lost}


def test_nothing_damaged_is_nothing_lost(victim):
    assert victim.salvaged() == []


def raw_cluster(path):
    """
    Where an uncompressed cluster lies in a data file, beyond its first block, and on the disk, where no newer point
    holds any.
    """
    extents = [each for each in guest_map(path) if each[2] is not None and not each[3]]
    return next(
        (offset + place - start, place)
        for place in range(12 * MIB, 7 * MIB, -CLUSTER)
        for start, length, offset, _ in extents
        if start <= place < start + length and offset + place - start >= BLOCK
    )


def frames(path):
    """Offsets of the zstd frames in a data file."""
    return [match.start() for match in re.finditer(re.escape(bytes.fromhex("28b52ffd")), path.read_bytes())]


def test_of_a_damaged_block_the_uncompressed_clusters_are_listed_and_written_as_they_are_stored(victim):
    full = victim.points[2].data
    offset, start = raw_cluster(full)
    damage(full, offset + 100)
    lost = victim.salvaged()
    assert any(each["start"] <= start < each["start"] + each["length"] for each in lost)
    assert kinds(lost) == {"as stored"}
    assert clusters(lost) <= BLOCK // CLUSTER
    low = offset // BLOCK * BLOCK
    assert all(f"is damaged between bytes {low} and " in each["why"] for each in lost)
    differ = run("bash", "-c", f"cmp -l {victim.folder}/source.raw {victim.folder}/salvaged.raw | wc -l")
    assert int(differ) == 8


def test_of_a_damaged_block_of_frames_only_the_damaged_frames_are_lost(tmp_path):
    night = Night.of(tmp_path, "8M")
    words = random.Random(2).choices(["alpha", "beta", "gamma", "delta"], k=2 * MIB)
    (tmp_path / "text").write_text(" ".join(words)[: 8 * MIB])
    write(night.image, f"write -s {tmp_path}/text 0 8M")
    night.full()
    victim = Victim.of(night)
    full = victim.points[0].data
    found = frames(full)
    assert len(found) == 128
    damage(full, found[60] + 2000)
    [lost] = victim.salvaged()
    assert (lost["length"], lost["content"]) == (CLUSTER, "zeroes")
    damage(full, found[100] + 40, 1)
    assert clusters(victim.salvaged()) == 2


@pytest.mark.parametrize("number", [0, 1, 2], ids=["newest", "middle", "full"])
@pytest.mark.parametrize("part", ["missing", "flipped", "cut"])
def test_a_digest_file_is_made_anew_from_an_undamaged_data_file(victim, number, part):
    listed = victim.points[number].digests
    if part == "missing":
        listed.unlink()
    elif part == "flipped":
        damage(listed, 20, 1)
    else:
        listed.write_bytes(listed.read_bytes()[:-1])
    assert victim.salvaged() == []


def test_a_digest_file_and_another_block_damaged_at_once_lose_that_block_only(victim):
    full = victim.points[2].data
    offset, _ = raw_cluster(full)
    damage(full, offset)
    damage(victim.points[2].digests, ((offset // BLOCK + 1) % 3) * 32 + 8, 1)
    lost = victim.salvaged()
    assert all(f"between bytes {offset // BLOCK * BLOCK} and" in each["why"] for each in lost)
    assert 1 <= clusters(lost) <= BLOCK // CLUSTER


def test_without_any_digest_frames_and_a_structure_that_accounts_for_itself_still_prove(victim):
    middle = victim.points[1].data
    victim.points[1].digests.unlink()
    damage(middle, frames(middle)[1] + 30, 1)
    assert clusters(victim.salvaged()) == 1


@pytest.mark.parametrize("number", [0, 1], ids=["newest", "middle"])
def test_a_small_incremental_with_a_damaged_frame_loses_that_cluster_only(victim, number):
    path = victim.points[number].data
    assert path.stat().st_size < BLOCK
    damage(path, frames(path)[0] + 30, 1)
    assert clusters(victim.salvaged()) == 1


def offsets_of(path):
    """Where the head's size field, the L1 table, its first L2 table and the refcount table are in a data file."""
    content = path.read_bytes()
    l1 = int.from_bytes(content[40:48], "big")
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & ((1 << 56) - 512)
    return {"head": 24, "l1": l1, "l2": l2, "refcounts": int.from_bytes(content[48:56], "big")}


@pytest.mark.parametrize(("before", "after"), [(1, 0), (0, 1)], ids=["zero-to-unallocated", "unallocated-to-zero"])
def test_a_table_that_hides_or_shows_an_older_point_is_not_believed(victim, before, after):
    # No refcount changes: only the manifest's count of zero clusters tells it from what was written.
    path = victim.points[1].data
    content = bytearray(path.read_bytes())
    table = offsets_of(path)["l2"]
    entries = range(table, table + victim.size // CLUSTER * 8, 8)
    place = [at for at in entries if int.from_bytes(content[at : at + 8], "big") == before][3]
    content[place : place + 8] = after.to_bytes(8, "big")
    path.write_bytes(content)
    lost = victim.salvaged()
    assert kinds(lost) == {"zeroes"}
    assert clusters(lost) == victim.not_held_above(1)


@pytest.mark.parametrize("what", ["head", "l1", "l2", "refcounts"])
@pytest.mark.parametrize("number", [0, 1, 2], ids=["newest", "middle", "full"])
def test_behind_a_damaged_head_or_table_nothing_older_is_shown(victim, what, number):
    path = victim.points[number].data
    damage(path, offsets_of(path)[what])
    lost = victim.salvaged()
    assert "zeroes" in kinds(lost)
    assert clusters(lost) == victim.not_held_above(number)


@pytest.fixture(scope="module")
def many_tables(tmp_path_factory):
    """Clusters of 4 KiB: each L2 table maps 2 MiB of the disk, and lies among the data."""
    folder = tmp_path_factory.mktemp("tables")
    night = Night.of(folder, "24M")
    (folder / "noise").write_bytes(random.Random(3).randbytes(22 * MIB))
    write(night.image, f"write -s {folder}/noise 1M 22M")
    config = folder / "c.yaml"
    config.write_text("cluster_size: 4k\n")
    full = ["full", "--image", night.image, "--repo", night.repository]
    done = call_pybackup(["--config", config, *full])
    assert done.rc == 0, done.stderr
    return night


@pytest.mark.parametrize("hit", ["table", "data"])
def test_a_damaged_table_costs_its_own_range_and_a_sound_one_beside_damage_costs_nothing(many_tables, tmp_path, hit):
    shutil.copytree(many_tables.repository, tmp_path / "repo")
    shutil.copy(many_tables.image, tmp_path / "disk.qcow2")
    victim = Victim.of(Night(tmp_path / "disk.qcow2", tmp_path / "repo"))
    path = victim.points[0].data
    content = path.read_bytes()
    l1 = offsets_of(path)["l1"]
    tables = [int.from_bytes(content[l1 + 8 * n : l1 + 8 * n + 8], "big") & ((1 << 56) - 512) for n in range(12)]
    number = next(n for n, at in enumerate(tables) if BLOCK <= at < l1 // BLOCK * BLOCK)
    block = tables[number] // BLOCK * BLOCK
    inside = [n for n, at in enumerate(tables) if block <= at < block + BLOCK]
    if hit == "table":
        damage(path, tables[number] + 160)
    else:
        data = next(at for at in range(block, block + BLOCK, 4096) if at not in tables)
        damage(path, data)
    lost = victim.salvaged()
    zeroes = sum(each["length"] for each in lost if each["content"] == "zeroes")
    assert zeroes == (2 * MIB * len(inside) if hit == "table" else 0)
    assert 0 < sum(each["length"] for each in lost if each["content"] == "as stored") <= BLOCK


def test_a_missing_data_file_loses_what_no_newer_one_holds(victim):
    victim.points[1].data.unlink()
    lost = victim.salvaged()
    assert clusters(lost) == victim.not_held_above(1)
    assert all("is missing" in each["why"] for each in lost)


def test_a_data_file_that_is_cut_off_loses_what_no_newer_one_holds(victim):
    path = victim.points[1].data
    path.write_bytes(path.read_bytes()[:-CLUSTER])
    assert clusters(victim.salvaged()) == victim.not_held_above(1)


@pytest.mark.parametrize("how", ["missing", "damaged"])
@pytest.mark.parametrize("number", [1, 2], ids=["middle", "full"])
def test_the_manifest_of_an_older_point_is_not_needed(victim, how, number):
    path = victim.points[number].manifest
    if how == "missing":
        path.unlink()
    else:
        damage(path, 100)
    assert victim.salvaged() == []


def test_below_two_missing_manifests_damage_is_still_found(victim):
    full = victim.points[2].data
    for point in victim.points[1:]:
        point.manifest.unlink()
    offset, _ = raw_cluster(full)
    damage(full, offset)
    assert 1 <= clusters(victim.salvaged()) <= BLOCK // CLUSTER


def test_a_missing_manifest_with_a_damaged_head_or_digest_file_loses_what_no_newer_point_holds(victim):
    victim.points[1].manifest.unlink()
    damage(victim.points[1].digests, 3, 1)
    assert clusters(victim.salvaged()) == victim.not_held_above(1)


def test_a_manifest_and_its_data_file_missing_lose_what_no_newer_point_holds(victim):
    victim.points[1].manifest.unlink()
    victim.points[1].data.unlink()
    assert clusters(victim.salvaged()) == victim.not_held_above(1)


def test_the_bytes_of_a_foreign_parent_are_never_shown(victim):
    # Its manifest and its files are right in themselves; only the identity tells that it is another chain's.
    read = manifest.decode(victim.points[1].manifest.read_bytes(), "middle")
    [disk] = read.disks
    foreign = replace(read, disks=(replace(disk, identity="0" * 32),))
    victim.points[1].manifest.write_bytes(manifest.encode(foreign))
    assert clusters(victim.salvaged()) == victim.not_held_above(1)


def test_a_file_that_only_this_process_cannot_open_is_not_taken_for_lost(victim, monkeypatch):
    real = os.open

    def refusing(path, *args, **named):
        if os.fspath(path).endswith(victim.points[1].data.name):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *args, **named)

    monkeypatch.setattr(os, "open", refusing)
    done = victim.restore("t.raw", "--salvage")
    assert (done.rc, "Too many open files" in done.stderr) == (1, True), done
    assert not (victim.folder / "t.raw").exists()


def test_the_points_own_manifest_is_needed(victim):
    damage(victim.points[0].manifest, 100)
    done = victim.restore("t.raw", "--salvage")
    assert (done.rc, len(done.stderr.splitlines())) == (12, 2)
    assert not (victim.folder / "t.raw").exists()


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_anywhere_changes_no_byte_that_is_not_listed(victim, seed):
    rng = random.Random(seed)
    for _ in range(rng.randrange(1, 4)):
        point = rng.choice(victim.points)
        path = rng.choice([point.data, point.data, point.data, point.digests])
        damage(path, rng.randrange(path.stat().st_size), rng.choice([1, 8, 512, 4096]))
    victim.salvaged()


def test_a_shrunken_point_hides_what_is_below_it_also_where_its_own_file_is_gone(tmp_path):
    night = Night.of(tmp_path, "4M")
    write(night.image, "write -P 7 0 4M")
    night.full()
    run("qemu-img", "resize", "--shrink", "-q", night.image, "2M")
    assert night.incremental().rc in {0, 3}
    run("qemu-img", "resize", "-q", night.image, "4M")
    assert night.incremental().rc in {0, 3}
    victim = Victim.of(night)
    victim.points[1].data.unlink()
    lost = victim.salvaged()
    assert lost
    assert max(each["start"] + each["length"] for each in lost) <= 2 * MIB


def test_what_is_lost_is_zeroes_on_a_used_target_too(victim):
    victim.points[1].data.unlink()
    used = victim.folder / "used.raw"
    used.write_bytes(b"\xee" * victim.size)
    with qemu_nbd(used) as uri:
        done = call_pybackup(
            ["restore", victim.points[0].manifest, uri, "--salvage", "--force", "--repo", victim.night.repository]
        )
        assert done.rc == 12, done
    victim.salvaged()
    require_identical(victim.folder / "salvaged.raw", used)


def test_a_qcow2_is_salvaged_as_well(victim):
    victim.points[1].data.unlink()
    victim.salvaged()
    assert victim.restore("s.qcow2", "--salvage", "--format", "qcow2").rc == 12
    require_identical(raw_copy(victim.folder / "s.qcow2", victim.folder / "c.raw"), victim.folder / "salvaged.raw")


def test_people_get_the_ranges_as_lines_and_an_error_of_two(victim):
    victim.points[1].data.unlink()
    done = victim.restore("t.raw", "--salvage")
    first, *rows = done.stdout.splitlines()
    assert "restored 24 MiB" in first
    assert rows
    assert all(re.fullmatch(r" *\d+ +\d+  not proven, zeroes: .*is missing", row) for row in rows)
    assert len(done.stderr.splitlines()) == 2
    assert "could not be proven" in done.stderr


def pairs(found):
    return [(each["start"], each["start"] + each["length"]) for each in found["ranges"]]


def test_restore_and_verify_name_the_ranges_of_the_disk_that_a_damaged_block_holds(victim):
    full = victim.points[2].data
    maps = [guest_map(point.data) for point in victim.points]
    offset, _ = raw_cluster(full)
    low, high = offset // BLOCK * BLOCK, offset // BLOCK * BLOCK + BLOCK
    expected = {
        cluster
        for start, length, at, packed in maps[2]
        if at is not None and not packed
        for cluster in range(start, start + length, CLUSTER)
        if low <= at + cluster - start < high
    }
    newer = {each for some in maps[:2] for start, length, *_ in some for each in range(start, start + length, CLUSTER)}
    damage(full, offset)
    done = victim.restore("t.raw", "--json")
    ranges = pairs(done.document["error"])
    assert done.rc == 12
    found = {each for start, end in ranges for each in range(start, end, CLUSTER)}
    assert expected - newer <= found
    assert not found & newer
    assert f"affected bytes of the disk: {ranges[0][0]} to {ranges[0][1]}" in done.stderr
    checked = call_pybackup(["verify", "--json", "--repo", victim.night.repository])
    [problem] = checked.document["problems"]
    assert expected <= {each for start, end in pairs(problem) for each in range(start, end, CLUSTER)}
    assert sum(end - start for start, end in pairs(problem)) < victim.size // 2
    assert "affected bytes of the disk:" in problem["message"]


def test_verify_names_all_damaged_places_of_a_file_in_one_problem(victim):
    full = victim.points[2].data
    for number in range(3):
        damage(full, number * BLOCK + MIB)
    done = call_pybackup(["verify", "--json", "--repo", victim.night.repository])
    [problem] = done.document["problems"]
    assert "and 2 more places" in problem["message"]
    assert sum(end - start for start, end in pairs(problem)) >= 8 * MIB


def test_an_audit_names_the_ranges_too(victim):
    offset, start = raw_cluster(victim.points[2].data)
    damage(victim.points[2].data, offset)
    machine = ["--image", victim.night.image, "--machine", "disk", "--disk", "disk"]
    done = call_pybackup(["audit", *machine, "--repo", victim.night.repository, "--json"])
    assert done.rc == 12, done
    assert any(low <= start < high for low, high in pairs(done.document[0]["error"]))


def test_a_list_of_stored_and_recomputed_digests_is_mixed_to_the_right_one():
    right = [digest(bytes([number])) for number in range(4)]
    made, stored = list(right), list(right)
    made[1], stored[3] = b"\0" * 32, b"\1" * 32
    assert b"".join(right) in list(salvage._mixes(b"".join(made), b"".join(stored)))
