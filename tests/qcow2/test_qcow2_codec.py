"""A frame's end is found from its headers, and no damaged frame decodes to wrong bytes."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from qcow2_oracles import decode

from backup.errors import Damaged
from backup.qcow2 import Codec, frame_length

CLUSTER = 64 << 10


def content_of(kind: str, size: int) -> bytes:
    rng = random.Random(size)
    if kind == "random":
        return rng.randbytes(size)
    if kind == "one byte":
        return b"\xaa" * size
    if kind == "text":
        return b" ".join(b"%d" % rng.randrange(1 << 20) for _ in range(size // 6 + 1))[:size].ljust(size)
    return (rng.randbytes(size // 2 + 1) + bytes(size))[:size]


@pytest.mark.parametrize("kind", ["random", "one byte", "text", "half"])
@pytest.mark.parametrize("size", [1, 255, 256, 4096, 65536, 65792, 128 << 10, 2 << 20])
@pytest.mark.parametrize("level", [-5, 1, 3, 19])
@pytest.mark.parametrize("flags", range(4))
def test_a_frame_ends_where_zstandard_ended_it(kind, size, level, flags):
    compressor = zstandard.ZstdCompressor(
        level=level, write_checksum=bool(flags & 1), write_content_size=bool(flags & 2)
    )
    frame = compressor.compress(content_of(kind, size))
    assert frame_length(frame) == len(frame)
    assert frame_length(memoryview(frame + frame[:7])) == len(frame)
    for cut in {1, 4, len(frame) // 2, len(frame) - 4}:
        with pytest.raises(Damaged):
            frame_length(frame[: len(frame) - cut])


def test_a_streamed_frame_has_a_window_and_no_size_and_ends_as_well():
    stream = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
    frame = b"".join(stream.compress(content_of("text", 50_000)) for _ in range(20)) + stream.flush()
    assert frame_length(frame + b"tail") == len(frame)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_damage_or_a_length_inside(data, starts_well):
    data = b"\x28\xb5\x2f\xfd" + data if starts_well else data
    with suppress(Damaged):
        assert 0 < frame_length(data) <= len(data)


@pytest.mark.parametrize("cluster_size", [4096, CLUSTER, 2 << 20])
def test_encoded_clusters_decode_and_what_follows_is_not_looked_at(cluster_size):
    codec = Codec(cluster_size, 1)
    content = content_of("text", cluster_size)
    frame = codec.encode(memoryview(content))
    assert frame is not None
    assert decode(codec, frame + b"the next frame", cluster_size) == content
    assert zstandard.get_frame_parameters(frame).has_checksum
    assert zstandard.get_frame_parameters(frame).content_size == cluster_size


def test_a_cluster_that_does_not_shrink_has_no_frame():
    assert Codec(CLUSTER, 19).encode(memoryview(content_of("random", CLUSTER))) is None
    assert Codec(CLUSTER, None).encode(memoryview(bytes(CLUSTER))) is None


@pytest.mark.parametrize("kind", ["one byte", "text", "half"])
def test_no_flipped_bit_gives_wrong_bytes(kind):
    codec = Codec(4096, 1)
    content = content_of(kind, 4096)
    frame = codec.encode(memoryview(content))
    assert frame is not None
    noticed = 0
    for bit in range(len(frame) * 8):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert decode(codec, flipped, 4096) == content
        except Damaged:
            noticed += 1
    assert noticed > 0.98 * len(frame) * 8


def test_frames_that_are_not_ours_are_damage():
    codec = Codec(CLUSTER, 1)
    content = content_of("text", CLUSTER)
    frame = codec.encode(memoryview(content))
    assert frame is not None
    with pytest.raises(Damaged, match="a cluster is 4096 bytes"):
        decode(codec, frame, 4096)
    with pytest.raises(Damaged, match="checksum no"):
        decode(codec, zstandard.ZstdCompressor(write_checksum=False).compress(content), CLUSTER)
    with pytest.raises(Damaged, match="holds None bytes"):
        decode(
            codec, zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(content), CLUSTER
        )
    with pytest.raises(Damaged, match="not with a frame header"):
        decode(codec, bytes(CLUSTER), CLUSTER)


def test_a_frame_that_claims_exabytes_allocates_nothing():
    claim = b"\x28\xb5\x2f\xfd\xe4" + (1 << 60).to_bytes(8, "little") + b"\x01\x00\x00" + bytes(4)
    assert zstandard.get_frame_parameters(claim).content_size == 1 << 60
    with pytest.raises(Damaged, match="holds 1152921504606846976 bytes"):
        decode(Codec(CLUSTER, 1), claim, CLUSTER)


@pytest.mark.parametrize("kind", ["one byte", "text", "half"])
@pytest.mark.parametrize("size", [4096, CLUSTER, 2 << 20])
def test_a_frame_cut_anywhere_is_damage_also_where_its_content_is_whole(kind, size):
    codec = Codec(size, 1)
    frame = codec.encode(memoryview(content_of(kind, size)))
    assert frame is not None
    for cut in {1, 2, 3, 4, 5, 8, len(frame) // 2, len(frame) - 9, len(frame) - 5, len(frame) - 2, len(frame)}:
        with pytest.raises(Damaged):
            codec.decode_into(memoryview(frame[: len(frame) - cut]), memoryview(bytearray(size)))
    wrong = frame[:-1] + bytes([frame[-1] ^ 1])
    with pytest.raises(Damaged, match="checksum"):
        codec.decode_into(memoryview(wrong), memoryview(bytearray(size)))


def test_a_frame_with_a_window_is_decoded_as_well():
    content = content_of("text", CLUSTER)
    stream = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj(size=CLUSTER)
    frame = b"".join(stream.compress(content[at : at + 1000]) for at in range(0, CLUSTER, 1000)) + stream.flush()
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=12, write_checksum=True)
    narrow = zstandard.ZstdCompressor(compression_params=parameters).compress(content)
    assert not narrow[4] & 0x20
    for each in (frame, narrow):
        found = bytearray(CLUSTER)
        Codec(CLUSTER, 1).decode_into(memoryview(each + b"tail"), memoryview(found))
        assert found == content


def test_blocks_that_hold_another_number_of_bytes_than_the_head_says_are_damage():
    frame = Codec(CLUSTER, 1).encode(memoryview(content_of("text", CLUSTER)))
    other = Codec(CLUSTER // 2, 1).encode(memoryview(content_of("text", CLUSTER // 2)))
    assert frame is not None
    assert other is not None
    with pytest.raises(Damaged):  # the head of one before the blocks of the other
        decode(Codec(CLUSTER, 1), frame[:7] + other[7:], CLUSTER)
    with pytest.raises(Damaged):
        decode(Codec(CLUSTER // 2, 1), other[:7] + frame[7:], CLUSTER // 2)
