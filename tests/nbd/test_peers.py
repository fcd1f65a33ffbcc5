"""The test's own NBD server, held against clients that this project did not write: what it says is what they see."""

from __future__ import annotations

import subprocess

import nbd
import pytest
from peers import ALLOCATION, MULTI_CONN, Asked, Peer, listening, pattern
from servers import nbdinfo_map

MIB = 1 << 20


@pytest.mark.parametrize("flags", [0, MULTI_CONN])
@pytest.mark.parametrize("structured", [True, False])
def test_an_honest_peer_is_read_as_it_should_be(tmp_path, flags, structured):
    peer = Peer(size=3 * MIB + 512, flags=flags, structured=structured)
    copied = tmp_path / "copied"
    with listening(peer) as uri:
        subprocess.run(["nbdcopy", uri, copied], check=True)
    assert copied.read_bytes() == pattern(0, 3 * MIB + 512)


def test_its_pieces_and_holes_are_put_together(tmp_path):
    def in_pieces(asked: Asked) -> None:
        half = asked.length // 2
        asked.data(asked.offset + half, pattern(asked.offset + half, asked.length - half), done=False)
        asked.hole(asked.offset, half)

    copied = tmp_path / "copied"
    with listening(Peer(size=MIB, read=in_pieces)) as uri:
        subprocess.run(["nbdcopy", "--request-size=262144", uri, copied], check=True)
    quarter = MIB // 4
    wanted = b"".join(bytes(quarter // 2) + pattern(at + quarter // 2, quarter // 2) for at in range(0, MIB, quarter))
    assert copied.read_bytes() == wanted


def test_its_block_status_is_what_nbdinfo_sees():
    def in_two(asked: Asked) -> None:
        asked.extents((MIB, 0), (asked.length - MIB, 3))

    with listening(Peer(status=in_two)) as uri:
        assert nbdinfo_map(uri, ALLOCATION) == [(0, MIB, 0), (MIB, 3 * MIB, 3)]


def test_it_announces_and_enforces_its_block_sizes():
    peer = Peer(blocks=(4096, 65536, MIB))
    with listening(peer) as uri:
        done = subprocess.run(["nbdinfo", uri], check=True, capture_output=True, text=True)
        assert "block_size_minimum: 4096" in done.stdout
        handle = nbd.NBD()
        handle.set_strict_mode(0)
        handle.connect_uri(uri)
        with pytest.raises(nbd.Error, match="Invalid argument"):
            handle.pread(512, 512)
        handle.shutdown()
    assert peer.refused == 1
