"""Chains: proven contiguous, clipped at every point's size; judged by QEMU where files are made."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from forge import entry, manifest, point_id, store
from lab import KIB, MIB, Night, call_pybackup, raw_copy, require_identical, run, write
from places import create_repository, folder_of

from backup.errors import Damaged, NotFound
from backup.model.chain import Chain, Link, build, newest_manifest
from backup.repository.cluster_index import NOBODY, Index

C = 64 * KIB


def machine(*manifests):
    return {found.point: found for found in manifests}


THREE = machine(manifest(1, entry(1)), manifest(2, entry(2, 1)), manifest(3, entry(3, 2)))


def test_a_chain_goes_from_its_point_down_to_the_full():
    assert [link.point for link in build(THREE, point_id(3), "vda").links] == [point_id(n) for n in (3, 2, 1)]
    assert [link.point for link in build(THREE, point_id(2), "vda").links] == [point_id(n) for n in (2, 1)]


def test_a_gap_is_missing_and_names_both_points():
    broken = {point: found for point, found in THREE.items() if point != point_id(2)}
    with pytest.raises(NotFound) as caught:
        build(broken, point_id(3), "vda")
    assert point_id(3) in caught.value.message
    assert point_id(2) in caught.value.message


def test_an_unreadable_parent_is_damage_and_names_both_points():
    broken = {point: found for point, found in THREE.items() if point != point_id(2)}
    damaged = {f"{point_id(2)}.json": Damaged(f"manifest {point_id(2)}.json is damaged", hint="h")}
    with pytest.raises(Damaged) as caught:
        build(broken, point_id(3), "vda", damaged)
    assert point_id(3) in caught.value.message
    assert point_id(2) in caught.value.message


@pytest.mark.parametrize(
    ("parent", "why"),
    [
        (manifest(2, replace(entry(2, 1), identity="f" * 32)), "identity"),
        (manifest(2, entry(2, 1, name="vdb")), "no disk"),
        (manifest(2, entry(2, 1), sequence=3), "sequence"),
        (manifest(2, entry(2, 1), sequence=9), "sequence"),
        (manifest(2, entry(2, 1, cluster=128 * KIB)), "clusters"),
    ],
    ids=["identity", "disk", "same-sequence", "later-sequence", "cluster-size"],
)
def test_a_swapped_or_foreign_parent_is_damage_and_names_both_points(parent, why):
    with pytest.raises(Damaged, match=why) as caught:
        build({**THREE, parent.point: parent}, point_id(3), "vda")
    assert point_id(3) in caught.value.message
    assert point_id(2) in caught.value.message


def test_a_cycle_of_parents_is_damage_and_no_endless_loop():
    cycle = machine(manifest(1, entry(1, 3)), manifest(2, entry(2, 1)), manifest(3, entry(3, 2)))
    with pytest.raises(Damaged, match="sequence"):
        build(cycle, point_id(3), "vda")


def test_a_point_or_disk_that_is_not_there_is_missing():
    with pytest.raises(NotFound, match="no point"):
        build(THREE, point_id(9), "vda")
    with pytest.raises(NotFound, match="no disk 'vdz'"):
        build(THREE, point_id(3), "vdz")


def test_newest_means_the_highest_sequence_that_holds_the_disk():
    points = [
        replace(manifest(9, entry(9)), sequence=1, started="2030"),
        replace(manifest(1, entry(1)), sequence=3, started="2020"),
        replace(manifest(5, entry(5, name="vdb")), sequence=4),
    ]
    assert newest_manifest(points).sequence == 4
    assert newest_manifest(points, "vda").point == point_id(1)
    assert newest_manifest(points, "vdz") is None


class FakeFile:
    """Codes of the clusters as entries: 0 unallocated, 1 zero, 2 data."""

    def __init__(self, codes):
        self.codes = codes
        self.asked = 0

    def allocated_tables(self):
        return np.array([any(self.codes[at : at + C // 8]) for at in range(0, len(self.codes), C // 8)], dtype=bool)

    def allocated(self, first, count):
        assert first + count <= len(self.codes), "asked beyond the file's end"
        self.asked += count
        codes = np.array(self.codes[first : first + count], dtype=np.uint64)
        return codes.nonzero()[0], codes[codes != 0]

    def kinds(self, entries):
        return entries.astype(np.uint8)


def resolve(*links, first=0, count=None):
    """Holders, for (size in bytes, codes) of each link, newest first."""
    parts = [Link(point_id(9 - n), 9 - n, entry(9 - n, size=size)) for n, (size, _) in enumerate(links)]
    index = Index(Chain("vda", tuple(parts)), [FakeFile(codes) for _, codes in links])
    clusters = -(-links[0][0] // C)
    return index.resolve(first, clusters - first if count is None else count)[0].tolist()


def test_the_newest_holder_wins_and_a_zero_hides_what_is_older():
    assert resolve((4 * C, [0, 2, 1, 0]), (4 * C, [2, 2, 2, 0])) == [1, 0, NOBODY, NOBODY]


def test_a_point_that_was_shorter_hides_all_that_is_older():
    # 64 clusters, shrunk to 32 and a sector, grown again (trap 45).
    full, shrunk, grown = (4 * MIB, [2] * 64), (2 * MIB + 512, [0] * 33), (4 * MIB, [0] * 64)
    assert resolve(grown, shrunk, full) == [2] * 33 + [NOBODY] * 31
    assert resolve(grown, shrunk, full, first=40, count=5) == [NOBODY] * 5
    assert resolve(grown, (0, []), full) == [NOBODY] * 64


def test_limits_fall_from_the_newest_down():
    links = tuple(Link(point_id(n), n, entry(n, size=size)) for n, size in ((4, 9), (3, 5), (2, 7), (1, 3)))
    assert Chain("vda", links).limits == (9, 5, 5, 3)


def test_an_old_tail_does_not_come_back_when_a_disk_shrinks_and_grows(tmp_path):
    night = Night.of(tmp_path, "4M")
    write(night.image, "write -P 0xaa 0 4M")
    night.full()
    run("qemu-img", "resize", "-q", "--shrink", night.image, str(2 * MIB + 512))
    assert night.incremental().rc == 0
    run("qemu-img", "resize", "-q", night.image, "4M")
    assert night.incremental().rc == 0
    write(night.image, "write -P 0xbb 3M 64k")
    assert night.incremental().disk["kind"] == "incremental"
    night.require_restored()
    newest = night.repository / "disk" / night.newest["disks"][0]["data"]["file"]
    require_identical(raw_copy(night.image, tmp_path / "source.raw"), raw_copy(newest, tmp_path / "qemu.raw"))


def require_restored(folder, link, expected):
    """QEMU's reading of the newest file, and a restore onto a used file, are the expected raw file."""
    require_identical(expected, raw_copy(folder_of(folder) / link.data.file, expected.with_name("qemu.raw")))
    target = expected.with_name("r.raw")
    target.write_bytes(b"old" * 100)
    done = call_pybackup(["restore", folder_of(folder) / f"{link.data.file.split('.')[1]}.json", target, "--force"])
    assert done.rc == 0, done.stderr
    require_identical(expected, target)


def test_a_cluster_that_a_shorter_point_cuts_is_zero_behind_the_cut(tmp_path):
    folder = create_repository(tmp_path / "repo").machine("m")
    size, cut = 4 * MIB, 2 * MIB + 512
    with folder.lock():
        full = store(folder, 1, None, size, dict.fromkeys(range(size // C), b"\xaa" * C))
        shrunk = store(folder, 2, full, cut, {})
        grown = store(folder, 3, shrunk, size, {60: b"\xbb" * C})
    expected = bytearray(b"\xaa" * cut + bytes(size - cut))
    expected[60 * C : 61 * C] = b"\xbb" * C
    (tmp_path / "expected.raw").write_bytes(expected)
    require_restored(folder, grown, tmp_path / "expected.raw")


def test_sixty_points_open_in_qemu_and_restore(tmp_path):
    random = Random(60)
    folder = create_repository(tmp_path / "repo").machine("m")
    disk = [bytes(C)] * 128
    link = None
    with folder.lock():
        for number in range(1, 61):
            changed = {}
            # Each point holds other clusters, two of them zero.
            for place, cluster in enumerate(random.sample(range(len(disk)), 7 if link else len(disk))):
                changed[cluster] = bytes(C) if link and place < 2 else random.randbytes(16) * (C // 16)
                disk[cluster] = changed[cluster]
            link = store(folder, number, link, len(disk) * C, changed)
    (tmp_path / "expected.raw").write_bytes(b"".join(disk))
    require_restored(folder, link, tmp_path / "expected.raw")
    assert call_pybackup(["verify", "m", "--deep", "--repo", tmp_path / "repo"]).rc == 0


def large_index(*links):
    """An index over disks of two L2 tables (1 GiB), and its files; `links` are the clusters that each holds."""
    clusters = 2 * C // 8
    parts = tuple(Link(point_id(9 - n), 9 - n, entry(9 - n, size=clusters * C)) for n in range(len(links)))
    files = [FakeFile([2 * (cluster in held) for cluster in range(clusters)]) for held in links]
    return Index(Chain("vda", parts), files), files


def test_a_link_costs_nothing_where_it_has_no_tables():
    index, (newest, middle, full) = large_index((), (9000,), (5, 9000, 9001))
    assert not index.holds_data(6, 2)[0]
    assert (newest.asked, middle.asked, full.asked) == (0, 0, 2)
    holders = index.resolve(0, 16384)[0]
    assert np.flatnonzero(holders != NOBODY).tolist() == [5, 9000, 9001]
    assert holders[[5, 9000, 9001]].tolist() == [2, 1, 2]
    assert (newest.asked, middle.asked, full.asked) == (0, 8192, 2 + 16384)


def test_where_no_link_has_a_table_nobody_is_asked():
    index, files = large_index((), (1,))
    assert index.holds_data(8192, 8192).tolist() == [False] * 8192
    assert index.holds_data(8191, 2).tolist() == [False] * 2
    assert [file.asked for file in files] == [0, 1]
    assert index.holds_data(0, 3).tolist() == [False, True, False]


def test_a_range_that_begins_and_ends_inside_tables_is_whole():
    index, _ = large_index((8000, 8191, 8192, 8300), (7999, 8001, 8192, 8301))
    holders, found = index.resolve(8000, 301)
    assert np.flatnonzero(holders == 0).tolist() == [0, 191, 192, 300]
    assert np.flatnonzero(holders == 1).tolist() == [1]
    assert np.flatnonzero(found).tolist() == [0, 1, 191, 192, 300]


@pytest.mark.parametrize(("gap", "walks"), [(1, 1), (4, 1), (5, 2)])
def test_tables_that_lie_near_are_walked_over_at_once(gap, walks):
    per = C // 8
    codes = [0] * ((gap + 2) * per)
    codes[7] = codes[(gap + 1) * per + 7] = 2
    file = FakeFile(codes)
    index = Index(Chain("vda", (Link(point_id(1), 1, entry(1, size=len(codes) * C)),)), [file])
    assert np.flatnonzero(index.holds_data(0, len(codes))).tolist() == [7, (gap + 1) * per + 7]
    assert file.asked == (len(codes) if walks == 1 else 2 * per)


def is_held(links, cluster):
    """Cluster by cluster: does the first link that says anything, of those that reach so far, say data?"""
    for number, (_, codes) in enumerate(links):
        if cluster * C >= min(size for size, _ in links[: number + 1]):
            return False
        if codes[cluster]:
            return codes[cluster] == 2
    return False


@pytest.mark.parametrize("seed", range(20))
def test_whether_data_is_held_is_whether_there_is_a_holder(seed):
    rng = np.random.default_rng(seed)
    links = []
    for _ in range(int(rng.integers(1, 6))):
        clusters = int(rng.integers(1, 3 * C // 8))
        codes = rng.choice(3, clusters, p=[0.6, 0.2, 0.2])
        codes[: int(rng.integers(0, clusters))] = 0
        links.append((clusters * C - int(rng.integers(0, C)), codes.tolist()))
    parts = [Link(point_id(9 - n), 9 - n, entry(9 - n, size=size)) for n, (size, _) in enumerate(links)]
    index = Index(Chain("vda", tuple(parts)), [FakeFile(codes) for _, codes in links])
    for _ in range(20):
        first = int(rng.integers(0, len(links[0][1])))
        count = int(rng.integers(1, len(links[0][1]) - first + 1))
        held = index.holds_data(first, count).tolist()
        assert held == (index.resolve(first, count)[0] != NOBODY).tolist()
        assert held == [is_held(links, cluster) for cluster in range(first, first + count)]


@pytest.mark.parametrize("seed", range(20))
def test_the_holders_of_some_clusters_are_those_that_a_walk_over_all_finds(seed):
    rng = np.random.default_rng(seed)
    links = []
    for _ in range(int(rng.integers(1, 6))):
        clusters = int(rng.integers(1, 3 * C // 8))
        codes = rng.choice(3, clusters, p=[0.6, 0.2, 0.2])
        codes[: int(rng.integers(0, clusters))] = 0
        links.append((clusters * C - int(rng.integers(0, C)), codes.tolist()))
    parts = [Link(point_id(9 - n), 9 - n, entry(9 - n, size=size)) for n, (size, _) in enumerate(links)]
    index = Index(Chain("vda", tuple(parts)), [FakeFile(codes) for _, codes in links])
    beyond = 4 * C // 8  # as of a disk that has grown since
    holders, entries = index.resolve(0, beyond)
    for some in (1, 5, 64, beyond):
        clusters = np.sort(rng.choice(beyond, some, replace=False))
        found = index.resolve_some(clusters)
        assert found[0].tolist() == holders[clusters].tolist()
        assert found[1].tolist() == entries[clusters].tolist()


def test_a_link_is_asked_once_for_all_of_some_clusters_in_a_table_and_not_where_newer_ones_say_all():
    index, files = large_index((5, 70), (5, 9000), (5, 70, 80, 9000))
    assert index.resolve_some(np.array([5, 70]))[0].tolist() == [0, 0]
    assert [file.asked for file in files] == [66, 0, 0]
    assert index.resolve_some(np.array([5, 70, 80, 9000, 9001]))[0].tolist() == [0, 0, 2, 1, NOBODY]
    assert [file.asked for file in files] == [66 + 76, 1 + 2, 1 + 1]


def test_older_links_are_not_asked_where_newer_ones_say_all():
    index, (newest, middle, full) = large_index((5,), (5,), (5,))
    newest.codes[:] = [2] * len(newest.codes)
    assert index.holds_data(0, 8192).all()
    assert (newest.asked, middle.asked, full.asked) == (8192, 0, 0)
