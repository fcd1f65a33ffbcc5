"""What the writer makes is a qcow2 file that QEMU and dissect.hypervisor read, byte for byte, with exact refcounts."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from dissect.hypervisor.disk.qcow2 import QCow2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qcow2_oracles import (
    GIB,
    KIB,
    MIB,
    TIB,
    FileSink,
    NullSink,
    entries_of,
    open_reader,
    pad,
    read_disk,
    require_clean,
    require_equal,
    require_same,
    run,
    write_image,
)

from backup.errors import BackupError, UsageError
from backup.qcow2 import COMPRESSED, PART, RAW, UNALLOCATED, ZERO, Codec, Image, Writer, check
from backup.qcow2.space import ALIGN_FROM, STALE_BYTES, Space
from backup.qcow2.writer import count_blocks

CLUSTER_SIZES = [4 * KIB << n for n in range(10)]
SIZES = [0, 1, 511, 512, 513, 65535, 65536, 65537, 3 * MIB, 5 * MIB + 777]


def mixed(size: int, seed: int, cluster_size: int = 64 * KIB) -> bytes:
    """Clusters that are random, compressible or all zeroes."""
    rng = random.Random(seed)
    chunks = []
    for _ in range(-(-size // cluster_size)):
        kind = rng.randrange(3)
        chunks.append(
            rng.randbytes(cluster_size)
            if kind == 0
            else rng.randbytes(cluster_size // 16) * 16
            if kind == 1
            else bytes(cluster_size)
        )
    return b"".join(chunks)[:size]


def require_all_agree(path: Path, data: bytes) -> None:
    """qemu-img, our reader and our checker all find the file sound and its content to be `data`."""
    require_clean(path)
    require_equal(path, data)
    reader = open_reader(path)
    check(reader, Codec(reader.image.cluster_size, None))
    require_same(read_disk(reader, b""), pad(data, 512))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_read_back_exactly_and_padded_to_512(tmp_path, size):
    data = mixed(size, size, 4 * KIB)
    write_image(tmp_path / "a.qcow2", Image(size, 64 * KIB, None, zstd=True), data)
    require_all_agree(tmp_path / "a.qcow2", data)


@pytest.mark.parametrize("level", [None, 1, 19])
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_every_cluster_size_raw_and_compressed(tmp_path, cluster_size, level):
    size = 5 * max(cluster_size, 256 * KIB) + 1
    data = mixed(size, cluster_size, cluster_size)
    write_image(tmp_path / "a.qcow2", Image(size, cluster_size, None, level is not None), data, level=level, batch=3)
    require_all_agree(tmp_path / "a.qcow2", data)


def test_a_file_of_many_parts_mixed_and_pure(tmp_path):
    for name, data in {
        "mixed": mixed(40 * MIB + 13, 1),
        "random": random.Random(2).randbytes(17 * MIB),
        "packed": (random.Random(3).randbytes(30 * KIB) + bytes(34 * KIB)) * 320,
    }.items():
        path = tmp_path / f"{name}.qcow2"
        write_image(path, Image(len(data), 64 * KIB, None, zstd=True), data)
        require_all_agree(path, data)


def test_dissect_hypervisor_reads_the_same_bytes(tmp_path):
    data = mixed(7 * MIB + 512, 5)
    write_image(tmp_path / "a.qcow2", Image(len(data), 64 * KIB, None, zstd=True), data)
    with (tmp_path / "a.qcow2").open("rb") as file:
        require_same(QCow2(file).open().read(), data)


def test_an_all_zero_full_and_an_empty_plan_hold_no_data(tmp_path):
    image = Image(3 * MIB, 64 * KIB, None, zstd=True)
    sizes = {write_image(tmp_path / "zero.qcow2", image, bytes(3 * MIB))}
    sink = FileSink(tmp_path / "empty.qcow2")
    sizes.add(Writer(image, sink).finish())
    assert sizes == {4 * 64 * KIB}  # header, L1 table, refcount block, refcount table
    for name in ("zero", "empty"):
        require_all_agree(tmp_path / f"{name}.qcow2", bytes(3 * MIB))


def write_base(tmp_path: Path, size: int, cluster_size: int) -> bytes:
    data = random.Random(size).randbytes(size)
    write_image(tmp_path / "base.qcow2", Image(size, cluster_size, None, zstd=True), data)
    return data


def test_an_overlay_holds_data_zeroes_and_nothing_else(tmp_path):
    size, cluster = 5 * MIB + 100, 64 * KIB
    expected = bytearray(write_base(tmp_path, size, cluster))
    path = tmp_path / "over.qcow2"
    image = Image(size, cluster, "base.qcow2", zstd=True)
    writer = Writer(image, FileSink(path))
    codec = Codec(cluster, 1)
    data = bytearray(b"abc" * cluster)[: 2 * cluster] + bytearray(cluster)
    assert writer.write(3, data, codec) == 1
    expected[3 * cluster : 6 * cluster] = data
    writer.zero(10, 4)
    expected[10 * cluster : 14 * cluster] = bytes(4 * cluster)
    last = image.clusters - 1
    writer.zero(last, 1)
    expected[last * cluster :] = bytes(size - last * cluster)
    writer.finish()
    require_clean(path)
    require_equal(path, expected)
    reader = open_reader(path)
    check(reader)
    assert reader.image == Image(-(-size // 512) * 512, cluster, "base.qcow2", zstd=True)
    kinds = reader.kinds(entries_of(reader, 0, 15)).tolist()
    assert kinds == [0, 0, 0, COMPRESSED, COMPRESSED, ZERO, 0, 0, 0, 0, ZERO, ZERO, ZERO, ZERO, UNALLOCATED]
    info = run("qemu-img", "info", path)
    assert "backing file: base.qcow2" in info
    assert "backing file format: qcow2" in info
    assert "compression type: zstd" in info


def test_an_overlay_that_grew_and_one_that_shrank(tmp_path):
    base = write_base(tmp_path, 2 * MIB + 512, 64 * KIB)
    for name, size in (("grew", 4 * MIB), ("shrank", MIB)):
        Writer(Image(size, 64 * KIB, "base.qcow2", zstd=True), FileSink(tmp_path / f"{name}.qcow2")).finish()
        require_clean(tmp_path / f"{name}.qcow2")
        require_equal(tmp_path / f"{name}.qcow2", (base + bytes(size))[:size])


def test_a_tiny_increment_takes_six_clusters(tmp_path):
    for backing_data in (b"x", bytes(range(256))):
        sink = NullSink()
        writer = Writer(Image(GIB, 64 * KIB, "base.qcow2", zstd=True), sink)
        writer.write(99, bytearray(backing_data * (64 * KIB // len(backing_data))), Codec(64 * KIB, 1))
        assert writer.finish() == sink.size == 6 * 64 * KIB


def test_the_longest_backing_name_fits_the_smallest_header(tmp_path):
    name = "n" * 1023
    path = tmp_path / "a.qcow2"
    Writer(Image(MIB, 4 * KIB, name, zstd=False), FileSink(path)).finish()
    assert open_reader(path).image.backing == name
    assert f"backing file: {name}" in run("qemu-img", "info", path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image(MIB, 2 * KIB, None, zstd=True), "cluster size 2048"),
        (Image(MIB, 4 * MIB, None, zstd=True), "cluster size 4194304"),
        (Image(MIB, 65535, None, zstd=True), "cluster size 65535"),
        (Image(8 * TIB + 1, 4 * KIB, None, zstd=True), "too large for clusters of 4096 bytes"),
        (Image(-1, 4 * KIB, None, zstd=True), "disk of -1 bytes"),
        (Image(MIB, 4 * KIB, "n" * 1024, zstd=True), "1 to 1023 bytes"),
        (Image(MIB, 4 * KIB, "", zstd=True), "1 to 1023 bytes"),
        (Image(MIB, 4 * KIB, "../a.qcow2", zstd=True), "not a flat file name"),
        (Image(MIB, 4 * KIB, "nbd:unix", zstd=True), "not a flat file name"),
        (Image(MIB, 4 * KIB, "a\nb", zstd=True), "not a flat file name"),
    ],
)
def test_an_image_that_no_file_can_hold_is_refused(image, message):
    with pytest.raises(UsageError, match=message) as caught:
        Writer(image, NullSink())
    assert caught.value.hint


def test_8_tib_is_the_end_of_4_kib_clusters_and_qemu_opens_it(tmp_path):
    path = tmp_path / "a.qcow2"
    writer = Writer(Image(8 * TIB, 4 * KIB, None, zstd=True), FileSink(path))
    writer.write((8 * TIB >> 12) - 1, bytearray(b"U" * (4 * KIB)), Codec(4 * KIB, 1))
    writer.finish()
    require_clean(path)
    for pattern, at in ((0, 8 * TIB - 8 * KIB), (0x55, 8 * TIB - 4 * KIB)):
        out = run("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {pattern} {at} 4k", path)
        assert "read 4096/4096" in out
        assert "failed" not in out
    check(open_reader(path))


def test_zeroes_over_a_huge_disk_are_whole_tables_and_cut_ends(tmp_path):
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", str(16 * TIB))
    path = tmp_path / "a.qcow2"
    writer = Writer(Image(16 * TIB, 64 * KIB, "base.qcow2", zstd=True), FileSink(path))
    clusters = 16 * TIB >> 16
    writer.zero(5000, 3_000_000)
    writer.zero(clusters - 100, 100)
    writer.write(4000, bytearray(b"data" * (16 * KIB)), Codec(64 * KIB, 1))
    writer.completed_below(3_005_000)
    writer.write(3_005_000, bytearray(b"more" * (16 * KIB)), Codec(64 * KIB, 1))
    writer.finish()
    require_clean(path)
    reader = open_reader(path)
    check(reader)
    kinds = reader.kinds(entries_of(reader, 0, 3_100_000))
    assert (kinds == ZERO).nonzero()[0].tolist() == list(range(5000, 3_005_000))
    assert (kinds == COMPRESSED).nonzero()[0].tolist() == [4000, 3_005_000]
    assert (reader.kinds(entries_of(reader, clusters - 200, 200)) == ZERO).tolist() == [False] * 100 + [True] * 100


def test_threads_may_write_out_of_order(tmp_path):
    size, cluster, batch = 60 * MIB, 16 * KIB, 7
    data = mixed(size, 77, cluster)
    path = tmp_path / "a.qcow2"
    sink = FileSink(path)
    image = Image(size, cluster, None, zstd=True)
    writer = Writer(image, sink)
    firsts = list(range(0, image.clusters, batch))
    for at in range(0, len(firsts), 8):  # nearly ascending: shuffled within a window
        window = firsts[at : at + 8]
        random.Random(at).shuffle(window)
        firsts[at : at + 8] = window

    def work(mine: list[int]) -> None:
        codec = Codec(cluster, 1)
        for first in mine:
            writer.write(first, bytearray(data[first * cluster : (first + batch) * cluster]), codec)

    with ThreadPoolExecutor(4) as pool:
        for done in pool.map(work, [firsts[i::4] for i in range(4)]):
            assert done is None
    size = writer.finish()
    sink.require_parts_of(size)
    require_all_agree(path, data)


def test_memoryviews_and_bytearrays_are_stored_alike(tmp_path):
    data = bytearray(mixed(2 * MIB, 4))
    names = {"view": memoryview(data), "readonly": memoryview(bytes(data)), "array": data}
    for name, content in names.items():
        writer = Writer(Image(len(data), 64 * KIB, None, zstd=True), FileSink(tmp_path / name))
        zeroes = writer.write(0, content, Codec(64 * KIB, 1))
        assert zeroes == sum(not any(data[i : i + 64 * KIB]) for i in range(0, len(data), 64 * KIB))
        writer.finish()
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1


def test_memory_stays_bounded_while_tables_complete():
    writer = Writer(Image(64 * GIB, 4 * KIB, "base.qcow2", zstd=True), NullSink())
    codec = Codec(4 * KIB, 1)
    frame_of = bytearray(b"abcd" * KIB)
    for first in range(0, 64 * GIB >> 12, 1 << 12):
        writer.write(first, frame_of, codec)
        writer.zero(first + 1, 4095)
        writer.completed_below(first + (1 << 12))
        assert len(writer._live) == 0
        assert len(writer._parts._open) <= 3
        assert len(writer._refcounts._blocks) <= 3
    assert writer.finish() > 32768 * 4 * KIB  # all L2 tables


@pytest.mark.parametrize(("gib", "most"), [(0.01, 1.10), (0.1, 1.04), (1, 1.01), (20, 1.005)])
def test_raw_and_packed_clusters_that_alternate_waste_little(gib, most):
    rng = random.Random(1)
    cluster = 64 * KIB
    space = Space(Image(TIB, cluster, None, zstd=True))
    stored = cluster
    while stored < gib * GIB:
        lengths = np.array([rng.randrange(10_000, 60_000) for _ in range(8)], np.uint64)
        space.frames(lengths)
        space.clusters(8)
        stored += int(lengths.sum()) + 8 * cluster
    space.close()
    assert stored <= space.cursor * cluster < stored * most


def test_packed_clusters_alone_waste_less_than_a_cluster():
    space = Space(Image(TIB, 64 * KIB, None, zstd=True))
    for _ in range(1000):
        space.frames(np.full(16, 30_001, np.uint64))
    space.close()
    assert space.cursor == 1 + -(-16_000 * 30_001 // (64 * KIB))


def test_a_run_left_far_behind_is_closed_so_that_its_refcounts_settle():
    space = Space(Image(TIB, 64 * KIB, None, zstd=True))
    space.frames(np.full(1600, 60_000, np.uint64))
    space.clusters(1)
    space.frames(np.full(1, 60_000, np.uint64))  # opens a run of many clusters
    start = space.settled
    space.clusters(STALE_BYTES // (64 * KIB) - 1)
    assert space.close_stale() == []
    assert space.settled == start
    space.clusters(1)
    [(offset, length)] = space.close_stale()
    assert offset < (start + 1) * 64 * KIB < offset + length
    assert space.settled == space.cursor
    assert space.close_stale() == []


def test_whole_parts_of_raw_clusters_begin_on_a_part_once_the_file_is_large():
    space = Space(Image(TIB, 64 * KIB, None, zstd=True))
    per = PART // (64 * KIB)
    assert space.part() == (1, (0, 0))
    space.clusters(ALIGN_FROM // (64 * KIB))
    first, hole = space.part()
    assert first % per == 0
    assert hole == (0, 0)
    gap = 1 + ALIGN_FROM // (64 * KIB) + per
    assert space.settled == gap
    assert space.clusters(3) == gap  # what is smaller fills the gap
    assert space.clusters(per) == first + per  # ... and what is not, does not
    assert space.tables(2) == (gap + 3, 2)
    assert space.clusters(1) == gap + 5
    space.clusters(per - 1)
    old_gap = (gap + 6) * 64 * KIB
    first, hole = space.part()
    assert first % per == 0
    assert hole == (old_gap, hole[1])
    assert hole[1] % (64 * KIB) == 0


def test_a_gap_left_far_behind_is_closed_so_that_its_refcounts_settle():
    space = Space(Image(TIB, 64 * KIB, None, zstd=True))
    space.clusters(ALIGN_FROM // (64 * KIB))
    space.part()
    gap = space.settled
    while space.cursor * 64 * KIB < gap * 64 * KIB + STALE_BYTES:
        assert space.close_stale() == []
        space.part()
    while not (holes := space.close_stale()):
        space.part()
    assert holes == [(gap * 64 * KIB, holes[0][1])]
    assert space.settled == space.cursor


def test_refcounts_of_clusters_that_tables_may_still_take_do_not_settle():
    space = Space(Image(TIB, 64 * KIB, None, zstd=True))
    space.frames(np.full(1600, 60_000, np.uint64))
    space.clusters(1)
    space.frames(np.full(1, 60_000, np.uint64))
    space.clusters(100)
    space.close()
    first, count = space.spare()
    assert count > 10
    assert space.settled == first
    assert space.tables(3) == (first, 3)
    assert space.settled == first + 3
    assert space.tables(count) == (first + 3, count - 3)
    assert space.settled == space.cursor
    assert space.tables(2) == (space.cursor - 2, 2)


def write_interleaved(path: Path, data: bytes) -> None:
    """Packed and raw clusters in turns, and at the end a long run that little is in."""
    write_image(path, Image(len(data), 64 * KIB, None, zstd=True), data, batch=64)
    require_all_agree(path, data)


def interleaved() -> bytes:
    rng = random.Random(8)
    packed = [rng.randbytes(40 * KIB) + bytes(24 * KIB) for _ in range(64)]
    raw = rng.randbytes(64 * KIB) + bytes(63 * 64 * KIB)
    return b"".join(packed) * 8 + raw + b"".join(packed[:3]) + bytes(61 * 64 * KIB) + raw


def test_what_a_last_run_leaves_is_given_to_tables_or_cleared(tmp_path):
    write_interleaved(tmp_path / "a.qcow2", interleaved())
    reader = open_reader(tmp_path / "a.qcow2")
    entries = entries_of(reader, 0, reader.image.clusters)
    last_raw = reader.spans(entries)[0][reader.kinds(entries) == RAW].max()
    assert reader.refcount_table()[0] < last_raw < reader.header.refcount_table_offset


def test_stale_runs_leave_a_sound_file(tmp_path, monkeypatch):
    monkeypatch.setattr("backup.qcow2.space.STALE_BYTES", 64 * KIB)
    data = interleaved() * 2
    write_interleaved(tmp_path / "a.qcow2", data)


def test_unused_bytes_are_zeroes_whatever_the_buffers_held(tmp_path, monkeypatch):
    """A data file must not carry what this process had in memory, another disk's bytes perhaps."""
    data = interleaved() + mixed(20 * MIB, 3)
    monkeypatch.setattr("backup.qcow2.parts._KEPT_BUFFERS", 0)  # else most holes are in buffers that held other parts
    for name, byte in (("a", 0), ("b", 0xFF)):
        with monkeypatch.context() as patch:
            patch.setattr("backup.qcow2.parts.pages", lambda n, byte=byte: memoryview(bytearray([byte]) * n))
            write_image(tmp_path / name, Image(len(data), 64 * KIB, None, zstd=True), data, batch=8)
    require_same((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes())


@given(st.integers(1, 3), st.integers(-6, 6), st.integers(0, 2), st.integers(0, 3))
def test_refcount_blocks_are_as_many_as_count_the_file_with_themselves(blocks, off, written, spare):
    image = Image(GIB, 4 * KIB, None, zstd=True)
    clusters = blocks * 2048 + off
    written = min(written, clusters // 2048)

    def enough(count: int) -> bool:
        return clusters + max(0, count - written - spare) + 1 <= count * 2048

    found = count_blocks(image, clusters, written, spare)
    assert found == next(n for n in range(written, 9) if enough(n))


@pytest.mark.parametrize("count", range(2036, 2052))
def test_files_whose_refcounts_just_fill_a_block(tmp_path, count):
    """A refcount block of 4 KiB counts 2,048 clusters; the file's own tables take the last of them."""
    path = tmp_path / "a.qcow2"
    write_image(path, Image(count * 4 * KIB, 4 * KIB, None, zstd=False), b"x" * (count * 4 * KIB), batch=count)
    require_clean(path)
    check(open_reader(path))


@pytest.mark.parametrize("first", [-1, 15, 16])
def test_clusters_that_the_disk_does_not_have_are_a_mistake(first):
    writer = Writer(Image(MIB, 64 * KIB, "base", zstd=True), NullSink())
    with pytest.raises(ValueError, match="a disk that has 16"):
        writer.write(first, bytearray(b"x" * (128 * KIB)), Codec(64 * KIB, 1))
    with pytest.raises(ValueError, match="a disk that has 16"):
        writer.zero(first, 2)


def test_a_second_write_would_leak_and_is_a_mistake():
    cluster = 4 * KIB
    writer = Writer(Image(64 * MIB, cluster, "base", zstd=True), NullSink())
    codec = Codec(cluster, None)
    writer.write(5, bytearray(b"x" * cluster), codec)
    writer.zero(512, 1024)
    for again in (
        lambda: writer.write(5, bytearray(b"x" * cluster), codec),
        lambda: writer.zero(0, 6),
        lambda: writer.zero(0, 512),
        lambda: writer.write(513, bytearray(b"x" * cluster), codec),
    ):
        with pytest.raises(ValueError, match="written before"):
            again()
    writer.completed_below(512)
    with pytest.raises(ValueError, match="below the value of completed_below"):
        writer.write(7, bytearray(b"x" * cluster), codec)


def test_half_a_cluster_is_a_mistake():
    with pytest.raises(ValueError, match="not whole clusters"):
        Writer(Image(MIB, 4 * KIB, None, zstd=True), NullSink()).write(0, bytearray(100), Codec(4 * KIB, 1))


class FullDisk:
    def put(self, number, data):
        if number == 1:
            raise OSError(28, "No space left on device")


def test_a_file_whose_part_was_not_stored_is_never_finished():
    cluster = 64 * KIB
    writer = Writer(Image(16 * MIB, cluster, None, zstd=True), FullDisk(), level=None)
    codec = Codec(cluster, None)
    with pytest.raises(OSError, match="No space left"):
        writer.write(0, bytearray(b"x" * (16 * MIB)), codec)
    with pytest.raises(RuntimeError, match="were not stored"):
        writer.finish()


class Recorder:
    def __init__(self):
        self.numbers = []

    def put(self, number, data):
        self.numbers.append(number)


class Keeper:
    """Keeps the parts themselves, not copies."""

    def __init__(self):
        self.parts = {}

    def put(self, number, data):
        self.parts[number] = data


def test_whole_parts_of_raw_clusters_are_not_copied():
    sink = Keeper()
    writer = Writer(Image(GIB, 64 * KIB, None, zstd=False), sink, level=None)
    data = memoryview(bytearray(b"x" * PART))
    codec = Codec(64 * KIB, None)
    per = PART // (64 * KIB)
    for number in range(32):
        writer.write(number * per, data, codec)
    assert sum(np.shares_memory(np.frombuffer(data, np.uint8), part) for part in sink.parts.values()) == 16
    writer.finish()
    assert all(np.frombuffer(sink.parts[number], np.uint8).min() == ord("x") for number in range(17, 33))


def test_whole_parts_leave_at_once_and_part_0_last():
    sink = Recorder()
    writer = Writer(Image(16 * MIB, 64 * KIB, None, zstd=False), sink, level=None)
    writer.write(0, bytearray(b"x" * (16 * MIB)), Codec(64 * KIB, None))
    assert sorted(sink.numbers) == [1, 2, 3]
    assert writer.finish() > 4 * PART
    assert sink.numbers[-1] == 0


@pytest.mark.parametrize(("zstd", "level"), [(False, 1), (True, None), (False, None)])
def test_without_zstd_or_level_every_cluster_is_raw(tmp_path, zstd, level):
    path = tmp_path / "a.qcow2"
    writer = Writer(Image(MIB, 64 * KIB, None, zstd), FileSink(path), level=level)
    writer.write(0, bytearray(b"x" * MIB), Codec(64 * KIB, 1))
    writer.finish()
    assert set(entries_of(open_reader(path), 0, 16).tolist()) == {1 << 63 | (n + 1) << 16 for n in range(16)}
    require_all_agree(path, b"x" * MIB)


@st.composite
def layouts(draw):
    """Guest clusters in order, each left alone, zeroed, or written with random, compressible or zero bytes."""
    cluster_size = draw(st.sampled_from([4 * KIB, 8 * KIB, 64 * KIB]))
    runs = draw(st.lists(st.tuples(st.sampled_from("-zrcn"), st.integers(1, 700)), min_size=1, max_size=12))
    total = sum(count for _, count in runs) * cluster_size
    cut = draw(st.integers(0, cluster_size - 1))
    batch = draw(st.integers(1, 40) | st.just(256 * KIB // cluster_size))
    seed = draw(st.integers(0, 2**32))
    return cluster_size, [(k, n if cluster_size < 64 * KIB else n // 10 + 1) for k, n in runs], total, cut, batch, seed


@pytest.fixture(params=[PART, 256 * KIB], ids=["parts", "small parts"])
def _part(request, monkeypatch):
    """Parts so small that layouts of a few MiB have many, with gaps and stale runs between them."""
    for module in ("layout", "parts", "space", "writer"):
        monkeypatch.setattr(f"backup.qcow2.{module}.PART", request.param, raising=False)
    monkeypatch.setattr("qcow2_oracles.PART", request.param)
    monkeypatch.setattr("backup.qcow2.space.ALIGN_FROM", 2 * request.param)
    monkeypatch.setattr("backup.qcow2.space.STALE_BYTES", 8 * request.param)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layouts(), st.booleans(), st.booleans())
@pytest.mark.usefixtures("_part")
def test_any_layout_is_sound_and_reads_back(tmp_path, layout, overlay, completes):
    cluster, runs, _, cut, batch, seed = layout
    rng = random.Random(seed)
    count = sum(n for _, n in runs)
    size = count * cluster - cut
    for old in tmp_path.iterdir():
        old.unlink()
    expected = bytearray(size)
    if overlay:
        expected[:] = rng.randbytes(997) * (size // 997) + bytes(size % 997)
        write_image(tmp_path / "base.qcow2", Image(size, cluster, None, zstd=True), bytes(expected), batch=64)
    parent = bytes(expected)
    path = tmp_path / "a.qcow2"
    sink = FileSink(path)
    writer = Writer(Image(size, cluster, "base.qcow2" if overlay else None, zstd=True), sink)
    codec = Codec(cluster, 1)
    at = 0
    for kind, length in runs:
        if kind == "z":
            writer.zero(at, length)
            expected[at * cluster : (at + length) * cluster] = bytes(min(length * cluster, size - at * cluster))
        for first in range(at, at + length, batch) if kind in "rcn" else ():
            some = min(batch, at + length - first)
            pattern = {"r": rng.randbytes(cluster), "c": b"%8d" % first * (cluster // 8), "n": bytes(cluster)}[kind]
            content = pad((pattern * some)[: size - first * cluster], cluster)
            assert writer.write(first, content, codec) == (some if kind == "n" else 0)
            expected[first * cluster : (first + some) * cluster] = content[: size - first * cluster]
        at += length
        if completes:
            writer.completed_below(at)
    sink.require_parts_of(writer.finish())
    require_clean(path)
    require_equal(path, expected)
    reader = open_reader(path)
    check(reader, codec, window=1)
    require_same(read_disk(reader, parent), pad(expected, 512))


def test_a_file_cannot_outgrow_its_addresses(monkeypatch):
    monkeypatch.setattr(Image, "max_host_clusters", 20)
    writer = Writer(Image(16 * MIB, 64 * KIB, None, zstd=True), NullSink(), level=None)
    with pytest.raises(BackupError, match="cannot be larger than 1310720 bytes"):
        writer.write(0, bytearray(b"x" * (2 * MIB)), Codec(64 * KIB, None))


def test_incompressible_clusters_are_stored_raw(tmp_path):
    data = random.Random(9).randbytes(MIB)
    write_image(tmp_path / "a.qcow2", Image(MIB, 64 * KIB, None, zstd=True), data)
    reader = open_reader(tmp_path / "a.qcow2")
    assert set(reader.kinds(entries_of(reader, 0, 16)).tolist()) == {RAW}
