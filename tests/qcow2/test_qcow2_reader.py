"""The reader and the checker take nothing in a file on trust: what is not ours is Damaged, quickly and cheaply."""

from __future__ import annotations

import random
import struct
import subprocess
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qcow2_oracles import GIB, KIB, MIB, TIB, FileSink, decode, entries_of, open_reader, read_disk, run, write_image

from backup.errors import Damaged
from backup.qcow2 import COMPRESSED, RAW, Codec, Image, Reader, Writer, check

CLUSTER = 64 * KIB


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> bytearray:
    """An overlay with raw, compressed, zero and unallocated clusters, 66 MiB of disk in 4 KiB clusters."""
    path = tmp_path_factory.mktemp("sample") / "a.qcow2"
    rng = random.Random(1)
    writer = Writer(Image(66 * MIB, 4 * KIB, "base.qcow2", zstd=True), FileSink(path))
    codec = Codec(4 * KIB, 1)
    for first in range(0, 16_000, 100):
        writer.write(first, bytearray(rng.randbytes(8 * KIB) + rng.randbytes(1 * KIB) * 40), codec)
        writer.zero(first + 50, 30)
    writer.finish()
    return bytearray(path.read_bytes())


def reader_of(data: bytes | bytearray) -> Reader:
    return Reader(lambda offset, length: bytes(data[offset : offset + length]), len(data), "a.qcow2")


def changed(data: bytearray, offset: int, new: bytes) -> bytearray:
    copy = bytearray(data)
    copy[offset : offset + len(new)] = new
    return copy


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


# The header's fields by their offsets in QEMU's docs/interop/qcow2.txt.
@pytest.mark.parametrize(
    ("offset", "new", "message"),
    [
        (0, b"QFI\xfa", "not a qcow2 file"),
        (4, u32(2), "version is 2"),
        (8, u64(4090), "backing name at 4090"),
        (8, u64(1 << 63), "backing name at"),
        (8, u64(8), "header extensions have no end|backing name at 8"),
        (8, u64(0), "a backing format but no backing name"),
        (16, u32(1024), "backing name at"),
        (16, u32(0), "backing name at"),
        (20, u32(11), "cluster bits 11"),
        (20, u32(22), "cluster bits 22"),
        (20, u32(0xFFFFFFFF), "cluster bits"),
        (24, u64(66 * MIB + 1), "no multiple of 512"),
        (24, u64(1 << 63), "too large"),
        (24, u64(70 * MIB), "L1 table has 33 entries"),
        (32, u32(1), "encryption method is 1"),
        (36, u32(34), "L1 table has 34 entries"),
        (36, u32(0xFFFFFFFF), "L1 table has"),
        (40, u64(0), "L1 table at 0"),
        (40, u64(4097), "L1 table at 4097"),
        (40, u64(1 << 62), "L1 table at"),
        (48, u64(0), "refcount table at 0"),
        (48, u64(1 << 62), "refcount table at"),
        (56, u32(0), "refcount table of 0 clusters"),
        (56, u32(0xFFFFFFFF), "refcount table of"),
        (60, u32(1), "number of snapshots is 1"),
        (72, u64(9), "incompatible features is 1"),
        (72, u64(0), "compression type is 1"),
        (72, u64(1 << 40 | 8), "incompatible features"),
        (88, u64(1), "autoclear features is 1"),
        (96, u32(5), "refcount order is 5"),
        (100, u32(104), "header length is 104"),
        (104, b"\0", "compression type is 0"),
        (105, b"\1", "header padding"),
        (112, u32(0), "backing format is None"),
        (116, u32(1 << 31), "header extension is too large"),
        (132, u32(1 << 24), "header extension is too large"),  # of the one that ends them: QEMU refuses it too
        (120, b"raw\0\0", "backing format is"),
        (136, b"\xff\xff", "not UTF-8"),
        (136, b"/", "not a flat file name"),
    ],
)
def test_a_header_that_is_not_ours_names_its_fault(sample, offset, new, message):
    with pytest.raises(Damaged, match=message) as caught:
        reader_of(changed(sample, offset, new))
    assert "a.qcow2" in caught.value.message
    assert caught.value.hint


def test_a_truncated_file_is_damaged_wherever_it_ends(sample):
    for size in (0, 1, 71, 111, 112, 4095, 4096, len(sample) // 2, len(sample) - 4096, len(sample) - 1):
        with pytest.raises(Damaged):
            reader_of(sample[:size])


@settings(max_examples=300)
@given(st.binary(max_size=300), st.binary(min_size=1, max_size=40), st.integers(0, 159), st.integers(0, 3))
def test_hostile_headers_are_refused_quickly_and_cheaply(sample, noise, patch, at, how):
    if how == 0:
        data = bytearray(noise)
    elif how == 1:
        data = bytearray(b"QFI\xfb\0\0\0\x03" + noise).ljust(8192, b"\0")
    else:
        data = changed(sample, at, patch)
    start = time.monotonic()
    with suppress(Damaged):
        reader = reader_of(data)
        entries = entries_of(reader, 0, min(2048, reader.image.clusters))
        reader.spans(entries)
        check(reader)
    assert time.monotonic() - start < 5


def test_absurd_sizes_allocate_no_more_than_the_largest_l1_table():
    """A header of a sparse file that claims an exabyte, with every size at its limit."""
    head = bytearray(112)
    struct.pack_into(">4sIQIIQIIQQIIQQQQII", head, 0, b"QFI\xfb", 3, 0, 0, 12, 8 * TIB, 0, 4 << 20, 4096, 4096, 2048,
                     0, 0, 0, 0, 0, 4, 112)  # fmt: skip
    data = bytes(head).ljust(4096, b"\0")

    def read_at(offset: int, length: int) -> bytes:
        assert length <= 32 * MIB
        return (data[offset : offset + length]).ljust(length, b"\0")

    tracemalloc.start()
    try:
        reader = Reader(read_at, 1 << 60, "a.qcow2")
        assert not reader.allocated_tables().any()
        with pytest.raises(Damaged):
            check(reader)
        assert tracemalloc.get_traced_memory()[1] < 200 * MIB
    finally:
        tracemalloc.stop()


def test_entries_cross_tables_and_missing_tables_read_as_unallocated(tmp_path):
    path = tmp_path / "a.qcow2"
    writer = Writer(Image(TIB, 4 * KIB, None, zstd=True), FileSink(path))
    codec = Codec(4 * KIB, 1)
    for first in (0, 511, 512, 1535, 5_000_000):
        writer.write(first, bytearray(b"%4d" % (first % 1000) * KIB), codec)
    writer.finish()
    reader = open_reader(path)
    found = {first: entries_of(reader, first, 1)[0] for first in (0, 511, 512, 1535, 5_000_000)}
    assert (reader.kinds(np.array(list(found.values()))) == COMPRESSED).all()
    everything = entries_of(reader, 0, 2000)
    assert everything.nonzero()[0].tolist() == [0, 511, 512, 1535]
    assert [everything[i] for i in (0, 511, 512, 1535)] == [found[i] for i in (0, 511, 512, 1535)]
    assert entries_of(reader, 4_999_990, 20).nonzero()[0].tolist() == [10]
    assert reader.allocated_tables().nonzero()[0].tolist() == [0, 1, 2, 5_000_000 // 512]
    assert not entries_of(reader, 0, 0).size
    with pytest.raises(ValueError, match="a disk that has"):
        entries_of(reader, reader.image.clusters - 1, 2)


def test_a_span_holds_its_frame_and_ends_on_a_sector(sample):
    reader = reader_of(sample)
    entries = entries_of(reader, 0, reader.image.clusters)
    kinds = reader.kinds(entries)
    offsets, lengths = reader.spans(entries)
    packed = kinds == COMPRESSED
    assert packed.sum() == 160 * 10
    assert ((offsets[packed] + lengths[packed]) % 512 == 0).all()
    assert (lengths[kinds == RAW] == 4 * KIB).all()
    assert not lengths[kinds < RAW].any()
    codec = Codec(4 * KIB, None)
    for offset, length in zip(offsets[packed].tolist(), lengths[packed].tolist(), strict=True):
        assert len(decode(codec, reader.read(offset, length), 4 * KIB)) == 4 * KIB


def table_of(sample: bytearray, guest: int) -> int:
    """File offset of a guest cluster's L2 entry, by the format's own arithmetic; clusters of 4 KiB."""
    l1 = int.from_bytes(sample[40:48], "big")
    table = int.from_bytes(sample[l1 + guest // 512 * 8 :][:8], "big") & ((1 << 56) - 1)
    return table + guest % 512 * 8


@pytest.mark.parametrize(
    ("guest", "entry"),
    [
        (0, 1 << 63),  # raw at offset 0
        (0, 1 << 63 | 4096 * 5 + 512),  # not aligned
        (0, 1 << 63 | 1 << 40),  # beyond the file
        (0, 4096 * 5),  # without the COPIED flag
        (0, 1 << 63 | 4096 * 5 | 1),  # a zero cluster that is preallocated
        (0, 1 << 63 | 4096 * 5 | 2),  # reserved bits
        (0, 1 << 63 | 4096 * 5 | 1 << 57),
        (0, 3 << 62 | 4096 * 5),  # both kinds
        (2, 1 << 62 | 100),  # a frame in the header's cluster
        (2, 1 << 62 | 1 << 40),  # beyond the file
        (2, 1 << 62 | 1 << 57 | 8192),  # offset bits above 55
        (2, 1 << 62 | 15 << 58 | 8192),  # longer than a cluster
        (30, 2),
        (15_999, 1 << 55),
    ],
)
def test_a_malformed_entry_is_damage(sample, guest, entry):
    reader = reader_of(changed(sample, table_of(sample, guest), u64(entry)))
    with pytest.raises(Damaged, match=f"guest cluster {guest}: not a valid entry"):
        entries_of(reader, guest, 1)
    with pytest.raises(Damaged, match=f"guest cluster {guest}: not a valid entry"):
        entries_of(reader, 0, reader.image.clusters)  # several tables at a time
    with pytest.raises(Damaged):
        check(reader)


def test_a_compressed_entry_in_a_file_without_compression_is_damage(tmp_path):
    path = tmp_path / "a.qcow2"
    write_image(path, Image(MIB, 4 * KIB, None, zstd=False), b"x" * MIB, level=None)
    data = bytearray(path.read_bytes())
    reader = reader_of(changed(data, table_of(data, 3), u64(1 << 62 | 8192)))
    with pytest.raises(Damaged, match="guest cluster 3"):
        entries_of(reader, 0, 5)


def test_a_mapping_beyond_the_disk_is_damage(tmp_path):
    path = tmp_path / "a.qcow2"
    write_image(path, Image(MIB, 4 * KIB, None, zstd=True), b"x" * MIB)
    data = bytearray(path.read_bytes())
    with pytest.raises(Damaged, match="beyond the disk's 256"):
        entries_of(reader_of(changed(data, table_of(data, 256), u64(1))), 0, 1)


@pytest.mark.parametrize("entry", [1 << 62 | 4096, 4096, 1 << 63 | 4097, 1 << 63 | 1 << 50, 1 << 63, 1])
def test_a_malformed_l1_entry_is_damage(sample, entry):
    l1 = int.from_bytes(sample[40:48], "big")
    with pytest.raises(Damaged, match="L1 table"):
        reader_of(changed(sample, l1, u64(entry)))


def refcount_at(data: bytearray, cluster: int) -> int:
    """File offset of a host cluster's refcount."""
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table + cluster // 2048 * 8 :][:8], "big")
    return block + cluster % 2048 * 2


def qemu_finds_it_sound(tmp_path: Path, data: bytearray) -> bool:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "66M")
    path = tmp_path / "changed.qcow2"
    path.write_bytes(data)
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True, check=False)
    return "No errors were found" in done.stdout


def raw_offset(sample: bytearray, guest: int) -> int:
    reader = reader_of(sample)
    entries = entries_of(reader, guest, 1)
    assert reader.kinds(entries)[0] == RAW
    return int(reader.spans(entries)[0][0])


def test_every_wrong_refcount_is_found_as_qemu_finds_it(tmp_path, sample):
    assert qemu_finds_it_sound(tmp_path, sample)
    check(reader_of(sample))
    raw = raw_offset(sample, 0) // 4096
    clusters = len(sample) // 4096
    for cluster, count in ((raw, 0), (raw, 2), (0, 0), (clusters - 1, 2), (clusters - 1, 0), (raw + 2, 0x0100)):
        wrong = changed(sample, refcount_at(sample, cluster), count.to_bytes(2, "big"))
        assert not qemu_finds_it_sound(tmp_path, wrong)
        with pytest.raises(Damaged, match=f"host cluster at {cluster * 4096}: refcount is {count}"):
            check(reader_of(wrong))


def test_a_lost_reference_is_a_leak_and_a_double_one_is_damage(tmp_path, sample):
    assert qemu_finds_it_sound(tmp_path, sample)
    lost = changed(sample, table_of(sample, 1), u64(0))
    double = changed(sample, table_of(sample, 1), sample[table_of(sample, 0) :][:8])
    onto_table = changed(sample, table_of(sample, 1), u64(1 << 63 | (table_of(sample, 0) & ~4095)))
    onto_raw = changed(sample, table_of(sample, 2), u64(1 << 62 | raw_offset(sample, 0)))
    for wrong, message in (
        (lost, "refcount is 1, references are 0"),
        (double, "used twice"),
        (onto_table, "used twice"),
        (onto_raw, "holds frames and something else"),
    ):
        assert not qemu_finds_it_sound(tmp_path, wrong)
        with pytest.raises(Damaged, match=message):
            check(reader_of(wrong))


def test_one_l2_table_for_two_ranges_is_damage(sample):
    l1 = int.from_bytes(sample[40:48], "big")
    with pytest.raises(Damaged, match="used twice, the second time by L2 table 1"):
        check(reader_of(changed(sample, l1 + 8, sample[l1 : l1 + 8])))


def test_a_hole_in_the_refcount_table_is_damage(sample):
    table = int.from_bytes(sample[48:56], "big")
    with pytest.raises(Damaged, match="refcount is 0"):
        check(reader_of(changed(sample, table, u64(0))))
    with pytest.raises(Damaged, match="refcount table"):
        check(reader_of(changed(sample, table, u64(12345))))
    with pytest.raises(Damaged, match="beyond the file's"):
        check(reader_of(changed(sample, table + 4088, u64(4096))))


def test_refcounts_beyond_the_files_end_are_damage(sample):
    at = refcount_at(sample, len(sample) // 4096)
    with pytest.raises(Damaged, match="beyond the file's end"):
        check(reader_of(changed(sample, at, b"\0\1")))


def test_the_check_is_the_same_in_small_windows(sample):
    check(reader_of(sample), window=1)
    last = refcount_at(sample, len(sample) // 4096 - 1)
    with pytest.raises(Damaged, match="refcount is 7"):
        check(reader_of(changed(sample, last, b"\0\7")), window=1)


def test_a_fault_in_a_later_refcount_block_is_named_by_its_place(tmp_path):
    path = tmp_path / "a.qcow2"
    write_image(path, Image(10 * MIB, 4 * KIB, None, zstd=False), b"x" * (10 * MIB))
    data = bytearray(path.read_bytes())
    wrong = changed(data, refcount_at(data, 2100), b"\0\3")
    for window in (1, 1 << 24):
        with pytest.raises(Damaged, match=f"host cluster at {2100 * 4096}: refcount is 3, references are 1"):
            check(reader_of(wrong), window=window)


def test_a_deep_check_decodes_every_frame(sample):
    reader = reader_of(sample)
    codec = Codec(4 * KIB, None)
    check(reader, codec)
    entries = entries_of(reader, 15_900, 12)
    offset = int(reader.spans(entries)[0][5])
    wrong = changed(sample, offset + 600, bytes([sample[offset + 600] ^ 4]))
    check(reader_of(wrong))
    with pytest.raises(Damaged, match=f"guest cluster 15905, at {offset}: zstd frame"):
        check(reader_of(wrong), codec)


@pytest.mark.parametrize("options", [[], ["-c", "-o", "compression_type=zstd"]])
def test_files_by_qemu_with_the_same_features_are_understood(tmp_path, options):
    rng = random.Random(3)
    data = b"".join(rng.randbytes(CLUSTER) if i % 3 else rng.randbytes(99) * 662 for i in range(100))[: 6 * MIB]
    (tmp_path / "a.raw").write_bytes(data)
    path = tmp_path / "a.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, tmp_path / "a.raw", path)
    with path.open("r+b") as file:  # QEMU ends a file after a frame's last sector
        file.truncate(-(-path.stat().st_size // CLUSTER) * CLUSTER)
    reader = open_reader(path)
    check(reader)
    if not options:  # QEMU's frames have no checksum, which our decoder wants
        assert read_disk(reader, b"") == data


def test_a_short_read_is_damage(sample):
    with pytest.raises(Damaged, match="bytes at"):
        Reader(lambda offset, length: bytes(sample[offset : offset + length])[:-1], len(sample), "a.qcow2")


def test_reading_across_a_huge_disk_keeps_few_tables(tmp_path):
    path = tmp_path / "a.qcow2"
    writer = Writer(Image(64 * GIB, 64 * KIB, None, zstd=True), FileSink(path))
    for first in range(0, 1 << 20, 8192):
        writer.write(first, bytearray(b"x" * CLUSTER), Codec(CLUSTER, 1))
    writer.finish()
    reader = open_reader(path)
    tracemalloc.start()
    try:
        for first in range(0, 1 << 20, 8192):
            assert entries_of(reader, first, 8192).nonzero()[0].tolist() == [0]
        assert tracemalloc.get_traced_memory()[0] < 200 * KIB  # a table has 64 KiB; a chain has hundreds of readers
    finally:
        tracemalloc.stop()


def test_neighbouring_ranges_of_a_table_read_it_once(tmp_path):
    path, reads = tmp_path / "a.qcow2", []
    writer = Writer(Image(GIB, CLUSTER, None, zstd=True), FileSink(path))
    for first in (0, 8192):
        writer.write(first, bytearray(b"x" * CLUSTER), Codec(CLUSTER, 1))
    writer.finish()
    data = path.read_bytes()

    def read_at(offset: int, length: int) -> bytes:
        reads.append(offset)
        return data[offset : offset + length]

    reader = Reader(read_at, len(data), "a.qcow2")
    before = len(reads)
    held = [entries_of(reader, first, 1024).any() for first in range(0, 16384, 1024)]
    assert [number for number, any_ in enumerate(held) if any_] == [0, 8]
    assert len(reads) - before == 2
