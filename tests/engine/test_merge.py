"""Merging links of a chain: what lies where, traps 39, 45 and 49, and that nothing is compressed again."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from forge import flipped, replaced
from histories import History, assert_same
from hypothesis import given
from hypothesis import strategies as st
from places import folder_of
from qcow2_oracles import entries_of

from backup import qcow2
from backup.cli.output import Quiet
from backup.engine import merge as consolidating
from backup.engine.merge import Merge, consolidate, estimate
from backup.errors import Damaged
from backup.model import chain as chains
from backup.model.manifest import DiskEntry
from backup.operations import restore as restoring
from backup.qcow2 import COMPRESSED, RAW, ZERO, Codec
from backup.repository import data_file, opened_chain
from backup.repository.cluster_index import NOBODY, Index
from backup.repository.replacement import exchange, settle

KIB = 1 << 10
CLUSTER = 4096
Z, N = "zero", "nothing"


class Built(History):
    """A history whose points hold what a test says: for each cluster a byte to repeat, "noise", "zero" or nothing."""

    wanted: dict[int, object]
    level: int | None

    def take(self, size: int, held: dict[int, object], *, full: bool = False, level: int | None = 1) -> str:
        self.wanted, self.level = held, level
        return self.point("vda", full=full, size=size)

    def any_level(self) -> int | None:
        return self.level

    def _fill(self, made, content, must, *, everything):
        for cluster, what in self.wanted.items():
            start, end = cluster * self.cluster, min(len(content), (cluster + 1) * self.cluster)
            if what == Z:
                content[start:end] = bytes(end - start)
                made.zero(cluster, 1)
                continue
            content[start:end] = os.urandom(end - start) if what == "noise" else bytes([what]) * (end - start)
            made.write(np.array([cluster]), memoryview(bytes(content[start:end]).ljust(self.cluster, b"\0")))

    def merge(self, point: str, depth: int) -> DiskEntry:
        """Merge the newest `depth` links of a point's chain, and exchange its file; its entry."""
        with self.machine.lock():
            manifests = self.manifests()
            merge = Merge(chains.build(manifests, point, "vda"), depth)
            guessed = estimate(self.machine, merge)
            entry = consolidate(self.machine, merge, workers=2, progress=Quiet())
            assert guessed.writes >= entry.data.size
            exchange(self.machine, manifests[point], entry)
        self.require_whole()
        return entry

    def kinds(self, entry: DiskEntry) -> list[int]:
        """What a data file holds of each cluster."""
        with data_file.peeked(
            self.machine.files, chains.Chain("vda", (chains.Link("", 1, entry),)), whole=False
        ) as index:
            [file] = index._files
            return file.kinds(entries_of(file, 0, -(-entry.size // self.cluster))).tolist()


@pytest.fixture
def built(tmp_path) -> Built:
    return Built.of(tmp_path, "built", CLUSTER)


def test_middle_links_are_not_lost(built):
    """Trap 39: what only a link in between holds must live on in the one that takes over."""
    built.take(6 * CLUSTER, {0: 1, 1: 1, 2: 1, 3: 1}, full=True)
    built.take(6 * CLUSTER, {1: 2, 4: 2, 5: "noise"})
    built.take(6 * CLUSTER, {2: Z, 4: 3})
    newest = built.take(6 * CLUSTER, {0: 4})
    entry = built.merge(newest, 3)
    assert built.kinds(entry) == [COMPRESSED, COMPRESSED, ZERO, 0, COMPRESSED, RAW]
    assert (entry.kind, entry.data.digests) == ("incremental", f"vda.{newest}.1.b3")
    entry = built.merge(newest, 2)
    assert built.kinds(entry) == [COMPRESSED, COMPRESSED, 0, COMPRESSED, COMPRESSED, RAW]
    assert (entry.kind, entry.parent, entry.data.digests) == ("full", None, f"vda.{newest}.2.b3")
    assert entry.reason == "incremental: test; merged with older points by prune"


def test_the_tail_that_a_shorter_link_hid_stays_hidden(built):
    """Trap 45, between clusters: zero clusters take the place of the shorter link's end."""
    built.take(8 * CLUSTER, dict.fromkeys(range(8), 1), full=True)
    built.take(4 * CLUSTER, {0: 2})
    newest = built.take(10 * CLUSTER, {9: 3})
    entry = built.merge(newest, 2)
    # Beyond the parent's end there is nothing to hide.
    assert built.kinds(entry) == [COMPRESSED, 0, 0, 0, ZERO, ZERO, ZERO, ZERO, 0, COMPRESSED]
    assert built.kinds(built.merge(newest, 2)) == [COMPRESSED] * 4 + [0] * 5 + [COMPRESSED]


@pytest.mark.parametrize("level", [1, None], ids=["zstd", "none"])
def test_a_cluster_that_a_shorter_link_cuts_is_stored_anew(built, level):
    """Trap 45, within a cluster: of the parent's chain, and of a merged link."""
    built.take(8 * CLUSTER, dict.fromkeys(range(8), 1), full=True, level=level)
    built.take(8 * CLUSTER, {6: 2}, level=level)
    built.take(6 * CLUSTER + 512, {0: 3}, level=level)
    built.take(2 * CLUSTER + 1024, {0: 4}, level=level)
    newest = built.take(8 * CLUSTER, {1: 5}, level=level)
    stored = RAW if level is None else COMPRESSED
    entry = built.merge(newest, 4)
    assert built.kinds(entry) == [stored, stored, stored, ZERO, ZERO, ZERO, ZERO, ZERO]
    assert built.kinds(built.merge(newest, 2)) == [stored, stored, stored, 0, 0, 0, 0, 0]


def test_a_cluster_that_merged_links_cut_is_stored_anew_where_the_longer_one_goes_too(built):
    built.take(8 * CLUSTER, {0: 1}, full=True)
    built.take(8 * CLUSTER, {6: "noise", 7: 2})
    built.take(6 * CLUSTER + 512, {})
    newest = built.take(8 * CLUSTER, {})
    entry = built.merge(newest, 3)
    assert built.kinds(entry) == [0, 0, 0, 0, 0, 0, COMPRESSED, ZERO]  # 512 bytes of noise compress


def test_a_cut_that_leaves_only_zeroes_is_a_zero_cluster(built):
    built.take(4 * CLUSTER, {2: Z, 3: 9}, full=True)
    built.take(4 * CLUSTER, {2: 7})
    built.take(2 * CLUSTER, {})
    newest = built.take(4 * CLUSTER, {})
    assert built.kinds(built.merge(newest, 3)) == [0, 0, ZERO, ZERO]


def test_a_disk_that_shrank_for_good_keeps_no_tail_in_its_last_cluster(built):
    built.take(4 * CLUSTER, dict.fromkeys(range(4), 1), full=True)
    newest = built.take(2 * CLUSTER + 100, {})
    entry = built.merge(newest, 2)
    assert built.kinds(entry) == [COMPRESSED] * 3
    with data_file.open_files(built.machine.files, chains.build(built.manifests(), newest, "vda")) as [file]:
        reader = file.reader
        offset, length = (int(value[0]) for value in reader.spans(entries_of(reader, 2, 1)))
        content = bytearray(CLUSTER)
        Codec(CLUSTER, None).decode_into(memoryview(reader.read(offset, length)), memoryview(content))
    assert content == b"\1" * 100 + bytes(CLUSTER - 100)


def test_an_empty_link_and_an_empty_disk(built):
    built.take(3 * CLUSTER, {}, full=True)
    built.take(3 * CLUSTER, {})
    newest = built.take(3 * CLUSTER, {})
    assert built.kinds(built.merge(newest, 2)) == [0, 0, 0]
    assert built.kinds(built.merge(newest, 2)) == [0, 0, 0]


def test_frames_are_copied_and_not_made_anew(built, monkeypatch):
    built.take(64 * CLUSTER, {cluster: cluster + 1 for cluster in range(64)}, full=True)
    newest = built.take(64 * CLUSTER, dict.fromkeys(range(0, 64, 3), 99))
    before = frames(built, newest)
    for name in ("encode", "decode_into"):
        monkeypatch.setattr(Codec, name, lambda *_: pytest.fail("a cluster was compressed or decompressed"))
    with built.machine.lock():
        manifests = built.manifests()
        merge = Merge(chains.build(manifests, newest, "vda"), 2)
        exchange(built.machine, manifests[newest], consolidate(built.machine, merge, workers=2, progress=Quiet()))
    monkeypatch.undo()
    assert frames(built, newest) == before
    built.require_whole()


def frames(built: Built, point: str) -> list[bytes]:
    """The stored frame of each cluster of a point."""
    found = []
    chain = chains.build(built.manifests(), point, "vda")
    with data_file.open_files(built.machine.files, chain) as files:
        holders, entries = Index(chain, [file.reader for file in files]).resolve(0, 64)
        offsets, lengths = files[0].reader.spans(entries)
        for holder, offset, length in zip(holders.tolist(), offsets.tolist(), lengths.tolist(), strict=True):
            stored = files[holder].reader.read(offset, length)
            found.append(stored[: qcow2.frame_length(stored)])
    return found


@pytest.mark.parametrize("levels", [(1, None), (None, 1), (None, None), (-3, 5)], ids=str)
def test_links_with_and_without_compression_become_one(built, levels):
    old, new = levels
    built.take(4 * CLUSTER, {0: 1, 1: "noise", 2: 1}, full=True, level=old)
    newest = built.take(4 * CLUSTER, {0: 2, 3: "noise"}, level=new)
    entry = built.merge(newest, 2)
    zstd = {level for level in levels if level is not None}
    level = new if new is not None else old
    assert entry.data.compression == ("none" if not zstd else f"zstd:{level}")
    kinds = built.kinds(entry)
    assert kinds[0] == (RAW if new is None else COMPRESSED)
    assert kinds[2] == (RAW if old is None else COMPRESSED)


def test_files_of_many_blocks_and_windows(tmp_path, monkeypatch):
    """Frames that cross from one 4 MiB block into the next, whole raw blocks, and windows of one L2 table."""
    monkeypatch.setattr(consolidating, "_WINDOW", 512)
    built = Built.of(tmp_path, "large", CLUSTER)
    clusters = 6000
    half = [os.urandom(2048) + bytes(2048) for _ in range(clusters)]

    def fill(made, content, must, *, everything):
        step, level = built.wanted["step"], built.level
        for first in range(0, clusters, 1024):
            some = np.arange(first, min(first + 1024, clusters), step)
            data = b"".join(os.urandom(CLUSTER) if level is None else half[cluster] for cluster in some.tolist())
            for at, cluster in enumerate(some.tolist()):
                content[cluster * CLUSTER : (cluster + 1) * CLUSTER] = data[at * CLUSTER : (at + 1) * CLUSTER]
            made.write(some, memoryview(data))

    built._fill = fill
    built.take(clusters * CLUSTER, {"step": 1}, full=True)
    built.take(clusters * CLUSTER, {"step": 3}, level=None)
    built.take(clusters * CLUSTER, {"step": 2})
    newest = built.take(clusters * CLUSTER, {"step": 7}, level=None)
    built.merge(newest, 3)
    built.merge(newest, 2)


def test_damage_in_what_is_read_stops_the_merge_and_leaves_nothing(built):
    full = built.take(4 * CLUSTER, {0: 1, 1: "noise"}, full=True)
    newest = built.take(4 * CLUSTER, {2: 1})
    before = sorted(folder_of(built.machine).iterdir())
    path = folder_of(built.machine) / f"vda.{full}.qcow2"
    content = path.read_bytes()
    with replaced(path, flipped(content, len(content) - 5 * CLUSTER, 3)), built.machine.lock():
        merge = Merge(chains.build(built.manifests(), newest, "vda"), 2)
        with pytest.raises(Damaged, match="is damaged between bytes"):
            consolidate(built.machine, merge, workers=2, progress=Quiet())
    assert sorted(folder_of(built.machine).iterdir()) == before
    built.require_whole()


def test_a_file_that_waits_and_is_damaged_is_taken_back(built):
    """An exchange that was cut off is completed only with a file that has the digests that the manifest lists."""
    built.take(4 * CLUSTER, {0: 1, 1: "noise"}, full=True)
    newest = built.take(4 * CLUSTER, {2: 1})
    with built.machine.lock():
        manifests = built.manifests()
        merge = Merge(chains.build(manifests, newest, "vda"), 2)
        entry = consolidate(built.machine, merge, workers=2, progress=Quiet())
        former = manifests[newest].disks[0]
        replaces = consolidating_former(former)
        built.machine.rewrite(manifests[newest].with_disk(replace(entry, replaces=replaces)))
    built.require_whole()
    waiting = folder_of(built.machine) / merge.file
    waiting.write_bytes(flipped(waiting.read_bytes(), 3 * CLUSTER, 0))
    with built.machine.lock():
        settle(built.machine)
    assert built.manifests()[newest].disks[0] == former
    built.require_tidy()
    built.require_whole()


def consolidating_former(entry: DiskEntry):
    from backup.model.manifest import Former

    return Former(entry.kind, entry.reason, entry.parent, entry.data)


def test_a_reader_of_a_chain_reads_on_while_the_chain_is_merged_and_its_parents_go(built):
    """What was opened stays what it was: the files that lose their names live on for who has them open."""
    built.take(4 * CLUSTER, {0: 1, 1: "noise", 2: 5}, full=True)
    newest = built.take(4 * CLUSTER, {2: 1})
    with opened_chain.open_chain(
        built.machine, newest, "vda", lambda chain: data_file.open_files(built.machine.files, chain)
    ) as (chain, files):
        built.merge(newest, 2)
        first, *_ = built.manifests()
        built.machine.remove_point(built.manifests()[first])
        index = Index(chain, [file.reader for file in files])
        assert index.resolve(0, 4)[0].tolist() == [1, 1, 0, NOBODY]
        for file in files:
            for block in range(file.file.blocks):
                file.file.check_block(block)
    built.require_whole()


def test_readers_get_every_point_while_prunes_go_on(tmp_path):
    """Restores in one thread, merges in another; a restore that meets an exchange tries again and never fails."""
    from backup.operations.prune import Request, prune
    from backup.operations.verify import verify_machine
    from backup.planning.retention import Batch, Policy

    history = History.of(tmp_path, "race", CLUSTER)
    for _ in range(24):
        history.point("vda", size=30 * CLUSTER)
    newest = history.newest["vda"][0]
    expected = history.contents[newest, "vda"]
    wrong: list[object] = []
    ended = threading.Event()
    rounds = 0

    def read() -> None:
        nonlocal rounds
        target = tmp_path / "read.raw"
        try:
            while not ended.is_set():
                restoring.restore_disk(
                    history.machine, newest, "vda", str(target), image_format="raw", force=True, workers=1,
                    progress=Quiet(),
                )  # fmt: skip
                assert_same(target.read_bytes(), expected, "while pruned")
                wrong.extend(verify_machine(history.machine, deep=False, workers=1, progress=lambda _: None).problems)
                rounds += 1
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            wrong.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for left in range(23, 0, -1):
            prune(history.machine, Request(Policy(last=left), Batch(1), workers=1), Quiet())
            time.sleep(0.01)
    finally:
        ended.set()
        reader.join()
    assert wrong == []
    assert rounds > 3
    assert set(history.manifests()) == {newest}
    history.require_whole()


@given(st.lists(st.binary(min_size=0, max_size=9000), min_size=1, max_size=12), st.sampled_from([4096, 65536, 1 << 21]))
def test_lengths_of_frames_are_measured_together_as_one_by_one(contents, size):
    codec = Codec(size, 1)
    made = [codec.encode(memoryview(content.ljust(size, b"\0"))) for content in contents]
    frames = [frame for frame in made if frame is not None]
    data = np.frombuffer(b"".join(frames), np.uint8)
    lengths = np.array([len(frame) for frame in frames], np.uint64)
    offsets = np.cumsum(lengths) - lengths
    assert qcow2.frame_lengths(data, offsets, size).tolist() == lengths.tolist()
    if frames:
        with pytest.raises(Damaged):
            qcow2.frame_lengths(data[:-1], offsets, size)
        with pytest.raises(Damaged):
            qcow2.frame_lengths(data, offsets + np.uint64(1), size)
