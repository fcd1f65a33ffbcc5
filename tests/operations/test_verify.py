"""Verify finds every changed byte, says what is wrong with which point, and never finds fault with a sound one."""

import json
import os
import random
import time

import pytest
from forge import bless, flipped, replaced, rewrite
from lab import KIB, MIB, Night, call_pybackup, raw_copy, run, write
from places import machine_at

from backup.errors import Damaged, Failed, NotFound
from backup.operations.verify import Problem, exit_code, verify_machine


def verify(night, *what, deep=False):
    return call_pybackup(["verify", *what, "--json", "--repo", night.repository, *["--deep"] * deep])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three points of a machine in clusters of 4 KiB, so that files are short.  Tests put back what they change."""
    folder = tmp_path_factory.mktemp("small")
    config = folder / "c.yaml"
    config.write_text("cluster_size: 4K\nrequest_size: 64K\n")
    image = folder / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "256k")
    night = Night(image, folder / "repo")
    (folder / "noise").write_bytes(random.Random(3).randbytes(8 * KIB))
    command = ["--config", config, "full", "--image", image, "--repo", night.repository, "--bitmap", "b1"]
    for wanted, *commands in (
        ("full", f"write -s {folder / 'noise'} 0 8k", "write -P 5 64k 12k"),
        ("incremental", "write -P 6 68k 8k"),
        ("incremental", "write -z 0 4k", "write -P 7 100k 1k"),
    ):
        write(image, *commands)
        command[2] = wanted
        assert call_pybackup(command).rc == 0
    raw_copy(image, folder / "source.raw")
    return night


def points(night):
    """Manifests' paths by sequence."""
    found = {json.loads(path.read_bytes())["sequence"]: path for path in (night.repository / "disk").glob("*.json")}
    return [found[number] for number in sorted(found)]


def files(path, kind="file"):
    return path.parent / json.loads(path.read_bytes())["disks"][0]["data"][kind]


def test_a_sound_repository_has_no_problem(small):
    for deep in (False, True):
        done = verify(small, deep=deep)
        stored = sum(files(path).stat().st_size for path in points(small))
        assert done.rc == 0
        assert done.stderr == ""
        sums = {"points": 3, "files": 3, "bytes": stored, "skipped": 0, "sampled": 0}
        assert done.document == {**sums, "deep": deep, "problems": []}


def test_a_point_is_verified_with_its_chain_and_no_more(small):
    second = points(small)[1]
    for what in (second, f"disk/{second.stem}"):
        assert {key: verify(small, what).document[key] for key in ("points", "files")} == {"points": 1, "files": 2}
    with replaced(files(points(small)[2]), b""):
        assert verify(small, second).rc == 0
        assert verify(small, points(small)[2]).rc == 12


def interesting(content, sample):
    """Every byte that is not zero among the first clusters and some others: tables are mostly empty."""
    chosen = random.Random(4)
    structure = [at for at in range(min(len(content), 24 * KIB)) if content[at]]
    picked = chosen.sample(structure, min(len(structure), sample))
    return sorted({*picked, *chosen.sample(range(len(content)), min(len(content), sample)), 0, len(content) - 1})


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("kind", ["file", "digests", "manifest"])
def test_a_flipped_bit_anywhere_is_found_and_never_restored(small, tmp_path, number, kind):
    newest = points(small)[2]
    damaged = points(small)[number] if kind == "manifest" else files(points(small)[number], kind)
    content = damaged.read_bytes()
    expected = small.image.with_name("source.raw").read_bytes()
    machine = machine_at(newest.parent)
    for at in interesting(content, 90):
        with replaced(damaged, flipped(content, at, random.Random(at).randrange(8))):
            found = verify_machine(machine, deep=False, workers=1, progress=lambda _: None)
            assert exit_code(found.problems) == 12, f"byte {at} of {damaged.name}"
            if at % 5 == 0:
                target = tmp_path / "r.raw"
                done = call_pybackup(["restore", newest, target])
                assert done.rc == 12 or (done.rc == 0 and target.read_bytes() == expected), done
                target.unlink(missing_ok=True)
    assert verify(small).rc == 0


@pytest.mark.parametrize("change", ["cut", "longer", "empty", "zeroes"])
@pytest.mark.parametrize("kind", ["file", "digests", "manifest"])
def test_a_file_of_another_length_or_content_is_damage(small, tmp_path, kind, change):
    full, _, newest = points(small)
    damaged = full if kind == "manifest" else files(full, kind)
    content = damaged.read_bytes()
    other = {"cut": content[:-1], "longer": content + b"\0", "empty": b"", "zeroes": bytes(len(content))}[change]
    with replaced(damaged, other):
        done = verify(small)
        assert done.rc == 12
        assert any(damaged.name in problem["message"] for problem in done.document["problems"])
        assert call_pybackup(["restore", newest, tmp_path / "r.raw"]).rc == 12
    assert not (tmp_path / "r.raw").exists()


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("kind", ["file", "digests", "manifest"])
def test_a_missing_file_is_missing_and_not_damage(small, tmp_path, kind, number):
    path = points(small)[number]
    newest = points(small)[2]
    lost = path if kind == "manifest" else files(path, kind)
    lost.rename(tmp_path / "away")
    try:
        whole = verify(small)
        # A missing newest manifest is missed by nobody; FORMAT.md says so.
        assert whole.rc == (0 if lost == newest else 10)
        assert verify(small, newest).rc == 10
        assert call_pybackup(["restore", newest, tmp_path / "r.raw"]).rc == 10
    finally:
        (tmp_path / "away").rename(lost)
    assert not (tmp_path / "r.raw").exists()


def test_damage_counts_before_what_is_missing_and_all_of_it_is_told(small, tmp_path):
    full, second, newest = points(small)
    files(second).rename(tmp_path / "away")
    try:
        with replaced(files(full), b"x"):
            done = verify(small)
    finally:
        (tmp_path / "away").rename(files(second))
    assert done.rc == 12
    assert {(problem["point"], problem["code"]) for problem in done.document["problems"]} == {
        (full.stem, 12),
        (second.stem, 10),
    }
    assert len(done.stderr.splitlines()) == 2 * len(done.document["problems"])
    assert verify(small, newest).rc == 0


def test_swapped_manifests_are_refused_with_both_names(small):
    full, second, _ = points(small)
    with replaced(second, full.read_bytes()):
        done = verify(small)
        assert done.rc == 12
        assert any(
            second.stem in problem["message"] and full.stem in problem["message"]
            for problem in done.document["problems"]
        )


def test_swapped_data_files_are_damage(small):
    _, second, newest = points(small)
    one, other = files(second).read_bytes(), files(newest).read_bytes()
    with replaced(files(second), other), replaced(files(newest), one):
        assert verify(small).rc == 12


@pytest.fixture
def forged(small, tmp_path):
    """A copy to forge in: every digest is made to fit."""
    run("cp", "-r", small.repository, tmp_path / "repo")
    return Night(small.image, tmp_path / "repo")


def entry_offset(content, cluster):
    """Where the L2 entry of a guest cluster lies, by qcow2's layout; and the entry."""
    l1 = int.from_bytes(content[40:48], "big")
    table = int.from_bytes(content[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    at = table + 8 * cluster
    return at, int.from_bytes(content[at : at + 8], "big")


def test_structure_that_no_digest_betrays_is_checked_too(forged):
    full = points(forged)[0]
    data = files(full)
    content = data.read_bytes()
    # Noise did not compress: guest cluster 0 is stored raw.  Let cluster 1 share its bytes, as a bad writer would.
    at, entry = entry_offset(content, 0)
    data.write_bytes(content[: at + 8] + entry.to_bytes(8, "big") + content[at + 16 :])
    bless(full)
    done = verify(forged, full)
    assert done.rc == 12
    assert "host cluster" in done.document["problems"][0]["message"]


def test_deep_finds_a_frame_that_does_not_decode(forged):
    full = points(forged)[0]
    data = files(full)
    content = bytearray(data.read_bytes())
    _, entry = entry_offset(content, 16)
    assert entry >> 62 & 1, "guest cluster 16 is compressed"
    content[(entry & ((1 << 58) - 1)) + 12] ^= 0x40
    data.write_bytes(content)
    bless(full)
    assert verify(forged).rc == 0
    done = verify(forged, deep=True)
    assert done.rc == 12
    assert "guest cluster 16" in done.document["problems"][0]["message"]
    # QEMU sees it as well: the frame has a checksum.
    assert call_pybackup(["restore", full, forged.repository.parent / "r.raw"]).rc == 12


def test_a_head_that_does_not_fit_the_manifest_is_damage(forged):
    full, second, newest = points(forged)
    rewrite(full, lambda document: document["disks"][0].update(size=512 * KIB))
    assert "its size is" in verify(forged, full).document["problems"][0]["message"]
    run("cp", files(second), files(newest))
    bless(newest)
    assert verify(forged, newest).rc == 12, "the data file's parent is another one"


def test_two_entries_that_name_one_file_are_both_held_against_it(forged):
    full = points(forged)[0]
    copy = full.with_name("20200101T000000Z-00000000.json")
    copy.write_bytes(full.read_bytes())

    def change(document):
        document["point"] = copy.stem
        document["disks"][0]["data"]["digest"] = "0" * 64

    rewrite(copy, change)
    assert verify(forged).rc == 12


def test_a_damaged_manifest_in_the_middle_is_damage_to_all_that_build_on_it(small):
    full, second, newest = points(small)
    with replaced(second, second.read_bytes()[:-1]):
        done = verify(small, newest)
        assert done.rc == 12
        assert second.stem in done.document["problems"][0]["message"]
        assert newest.stem in done.document["problems"][0]["message"]
        assert verify(small, full).rc == 0


def test_more_blocks_than_one_are_all_read(tmp_path):
    night = Night.of(tmp_path, "16M")
    (tmp_path / "noise").write_bytes(random.Random(5).randbytes(10 * MIB))
    write(night.image, f"write -s {tmp_path / 'noise'} 1M 10M")
    night.full()
    data = next((night.repository / "disk").glob("*.qcow2"))
    size = data.stat().st_size
    assert size > 2 * 4 * MIB
    assert verify(night).document["bytes"] == size
    for at in (0, 4 * MIB - 1, 4 * MIB, 8 * MIB, size - 1):
        with data.open("r+b") as file:
            before = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([before[0] ^ 1]), at)
            [problem] = verify(night).document["problems"]
            low = at // (4 * MIB) * 4 * MIB
            assert f"between bytes {low} and {min(low + 4 * MIB, size)}" in problem["message"]
            os.pwrite(file.fileno(), before, at)
    assert verify(night).rc == 0


def test_a_machine_or_point_that_is_not_there(small):
    for what in ("nobody", "nobody/latest", "disk/20200101T000000Z-00000000", "nowhere.json", "a/b/c"):
        done = verify(small, what)
        assert (done.rc, done.document["error"]["code"]) == (10, 10), what


def test_the_worst_problem_makes_the_exit_code():
    def code(*errors):
        return exit_code([Problem("m", None, None, error("x", hint="y")) for error in errors])

    assert code() == 0
    assert code(NotFound) == 10
    assert code(NotFound, Failed) == 10
    assert code(Failed) == 1
    assert code(NotFound, Damaged, Failed) == 12


def test_a_large_file_is_checked_by_several_threads_and_each_fault_is_told(tmp_path):
    night = Night.of(tmp_path, "64M")
    (tmp_path / "noise").write_bytes(random.Random(6).randbytes(40 * MIB))
    write(night.image, f"write -s {tmp_path / 'noise'} 1M 40M")
    night.full()
    manifest = points(night)[0]
    data = files(manifest)
    machine = machine_at(manifest.parent)
    size = data.stat().st_size
    for workers in (1, 2, 5):
        told = []
        found = verify_machine(machine, deep=True, workers=workers, progress=told.append)
        assert (found.bytes, found.problems, found.files) == (size, (), 1)
        assert told == sorted(told)
        assert told[-1] == size
    with data.open("r+b") as file:
        for at in (5 * MIB, 17 * MIB):
            os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, at)[0] ^ 1]), at)
    for workers in (1, 2, 5):
        [problem] = verify_machine(machine, deep=False, workers=workers, progress=lambda _: None).problems
        assert "is damaged between bytes" in problem.error.message
        assert problem.error.exit_code == 12


def test_an_interrupted_verify_ends_at_once_and_closes_its_files(tmp_path, monkeypatch):
    night = Night.of(tmp_path, "32M")
    (tmp_path / "noise").write_bytes(random.Random(6).randbytes(20 * MIB))
    write(night.image, f"write -s {tmp_path / 'noise'} 1M 20M")
    night.full()

    def endless(reader, _codec):
        while True:
            reader.read(0, 512)
            time.sleep(0.01)

    def interrupt(_done):
        raise KeyboardInterrupt

    monkeypatch.setattr("backup.qcow2.check", endless)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        verify_machine(machine_at(points(night)[0].parent), deep=True, workers=2, progress=interrupt)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_fault_of_the_program_in_a_worker_is_raised_and_no_damage(small, monkeypatch):
    def fault(*_):
        raise MemoryError

    monkeypatch.setattr("backup.qcow2.check", fault)
    with pytest.raises(MemoryError):
        verify_machine(machine_at(points(small)[0].parent), deep=False, workers=2, progress=lambda _: None)
