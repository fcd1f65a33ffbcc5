"""
What a server may do to us: whatever it leaves out, repeats or never ends, no wrong byte is stored, and the run ends
within bounded time and memory.
"""

from __future__ import annotations

import os
import resource
import socket
import struct
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import nbd
import pytest
from lab import KIB, MIB, Result, call_pybackup, restore_and_cmp
from peers import ALLOCATION, MULTI_CONN, Asked, Peer, listening, pattern
from servers import nbdkit_tcp

from backup.model import names
from backup.nbd.export import Export

DIRTY = "qemu:dirty-bitmap:b0"
BIG = 2 * MIB


def full(uri: str, repository: Path, *options: str | Path) -> Result:
    return call_pybackup(["full", "--nbd", uri, "--machine", "m", "--disk", "d", "--repo", repository, *options])


def require_refused(done: Result, repository: Path, *words: str, rc: int = 13) -> None:
    """The code, two lines that say what happened, and no point."""
    lines = done.stderr.splitlines()
    assert done.rc == rc, done
    assert [line.split(": ")[:2] for line in lines] == [["pybackup", "error"], ["pybackup", "hint"]], lines
    assert all(word in lines[0] for word in words), lines
    assert not list(repository.rglob("*.qcow2*"))


# Reads that are answered with success and without all of their bytes (trap 53)


def _half(asked: Asked) -> None:
    asked.data(asked.offset, pattern(asked.offset, asked.length // 2))


def _hole_and_nothing(asked: Asked) -> None:
    asked.hole(asked.offset, 512)


def _twice_the_first_half(asked: Asked) -> None:
    """The lengths add up; the second half never comes."""
    half = asked.length // 2
    asked.data(asked.offset, pattern(asked.offset, half), done=False)
    asked.data(asked.offset, pattern(asked.offset, half))


def _twice_the_second_half(asked: Asked) -> None:
    half = asked.length // 2
    asked.data(asked.offset + half, pattern(asked.offset + half, half), done=False)
    asked.data(asked.offset + half, pattern(asked.offset + half, half))


def _hole_over_data(asked: Asked) -> None:
    half = asked.length // 2
    asked.data(asked.offset, pattern(asked.offset, half), done=False)
    asked.hole(asked.offset, asked.length - half)


def _overlapping(asked: Asked) -> None:
    quarter = asked.length // 4
    asked.data(asked.offset, pattern(asked.offset, 2 * quarter), done=False)
    asked.data(asked.offset + quarter, pattern(asked.offset + quarter, 2 * quarter))


def _all_and_some_again(asked: Asked) -> None:
    asked.data(asked.offset, pattern(asked.offset, asked.length), done=False)
    asked.data(asked.offset, bytes(512))


def _error_after_the_data(asked: Asked) -> None:
    asked.data(asked.offset, pattern(asked.offset, asked.length), done=False)
    asked.error()


def _beyond_what_was_asked(asked: Asked) -> None:
    asked.data(asked.offset, pattern(asked.offset, asked.length + 512))


def _before_what_was_asked(asked: Asked) -> None:
    asked.data((1 << 64) - 512, pattern(0, asked.length))


def _many_small_pieces_out_of_order(asked: Asked) -> None:
    """Notes of them would take more memory than the data."""
    for offset in range(asked.offset + 8 * KIB, asked.offset, -2):
        asked.data(offset, b"x", done=False)
    asked.end()


INCOMPLETE = [
    Asked.end,
    _half,
    _hole_and_nothing,
    _twice_the_first_half,
    _twice_the_second_half,
    _hole_over_data,
    _overlapping,
    _all_and_some_again,
    _error_after_the_data,
    _beyond_what_was_asked,
    _before_what_was_asked,
    _many_small_pieces_out_of_order,
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("answer", INCOMPLETE, ids=lambda answer: answer.__name__.strip("_"))
def test_a_read_that_is_answered_incompletely_stores_nothing(tmp_path, answer, late):
    def read(asked: Asked) -> None:
        if late and asked.offset + asked.length < BIG:
            asked.whole()
        else:
            answer(asked)

    with listening(Peer(size=BIG, read=read)) as uri:
        require_refused(full(uri, tmp_path / "repo"), tmp_path / "repo", uri)


def test_a_simple_reply_that_stops_half_way_stores_nothing(tmp_path):
    def read(asked: Asked) -> None:
        asked.simple(pattern(asked.offset, asked.length // 2))
        raise EOFError  # it hangs up

    with listening(Peer(size=BIG, structured=False, read=read)) as uri:
        require_refused(full(uri, tmp_path / "repo"), tmp_path / "repo", uri)


def _in_order(asked: Asked) -> list[tuple[int, int]]:
    return [(low, high) for low, high in pairwise([0, 512, asked.length // 2, asked.length]) if low < high]


def _backwards(asked: Asked) -> list[tuple[int, int]]:
    return _in_order(asked)[::-1]


@pytest.mark.parametrize("end", ["with the last piece", "on its own"])
@pytest.mark.parametrize("order", [_in_order, _backwards])
@pytest.mark.parametrize("flags", [0, MULTI_CONN])
def test_a_read_that_is_answered_in_pieces_is_put_together(
    tmp_path, end: str, order: Callable[[Asked], Sequence[tuple[int, int]]], flags: int
):
    def read(asked: Asked) -> None:
        if not asked.structured:
            asked.whole()
            return
        pieces = order(asked)
        for low, high in pieces:
            last = end == "with the last piece" and (low, high) == pieces[-1]
            start = asked.offset + low
            if start == 0:
                asked.hole(start, high - low, done=last)
            else:
                asked.data(start, pattern(start, high - low), done=last)
        if end == "on its own":
            asked.end()

    content = tmp_path / "content.raw"
    content.write_bytes(bytes(512) + pattern(512, BIG - 512))
    peer = Peer(size=BIG, read=read, flags=flags, content=lambda at, count: content.read_bytes()[at : at + count])
    with listening(peer) as uri:
        done = full(uri, tmp_path / "repo")
    assert (done.rc, done.stderr) == (0, "")
    restore_and_cmp(tmp_path / "repo", "m/latest", content)


# Block status


def _no_extents(asked: Asked) -> None:
    asked.extents((0, 0))


def _many_of_no_length(asked: Asked) -> None:
    asked.extents(*[(0, 3)] * 1000)


def _none_of_the_context(asked: Asked) -> None:
    asked.end()


def _twice(asked: Asked) -> None:
    asked.extents((asked.length, 3), done=False)
    asked.extents((asked.length, 0))


def _error_after_the_extents(asked: Asked) -> None:
    asked.extents((asked.length, 3), done=False)
    asked.error()


def _without_end(asked: Asked) -> None:
    while True:
        asked.extents((asked.length, 3), done=False)


def _another_context(asked: Asked) -> None:
    asked.chunk(5, struct.pack(">III", 77, asked.length, 3))


@pytest.mark.parametrize(
    "answer",
    [
        _no_extents,
        _many_of_no_length,
        _none_of_the_context,
        _twice,
        _error_after_the_extents,
        _without_end,
        _another_context,
    ],
    ids=lambda answer: answer.__name__.strip("_"),
)
def test_a_block_status_that_is_none_makes_no_point(tmp_path, answer):
    with listening(Peer(size=BIG, status=answer)) as uri:
        require_refused(full(uri, tmp_path / "repo"), tmp_path / "repo", uri)


def _short(asked: Asked) -> None:
    asked.extents((min(asked.length, 64 * KIB), 0))


def _beyond_the_export(asked: Asked) -> None:
    asked.extents(*[(0xFFFFFFFF, 0)] * 100)


def _odd_flags(asked: Asked) -> None:
    asked.extents((asked.length, 0xFFFFFFFC))


@pytest.mark.parametrize("answer", [_short, _odd_flags], ids=lambda answer: answer.__name__)
def test_a_block_status_that_is_odd_and_legal_is_understood(tmp_path, answer):
    content = tmp_path / "content.raw"
    content.write_bytes(pattern(0, BIG))
    with listening(Peer(size=BIG, status=answer)) as uri:
        assert full(uri, tmp_path / "repo").rc == 0
    restore_and_cmp(tmp_path / "repo", "m/latest", content)


def test_extents_far_beyond_the_export_are_clipped_where_libnbd_lets_them_through(tmp_path):
    """libnbd 1.14 does; the one of Debian 13 refuses them itself."""
    content = tmp_path / "content.raw"
    content.write_bytes(pattern(0, BIG))
    with listening(Peer(size=BIG, status=_beyond_the_export)) as uri:
        done = full(uri, tmp_path / "repo")
    if nbd.NBD().get_version().startswith("1.14."):
        assert done.rc == 0, done
    if done.rc == 0:
        restore_and_cmp(tmp_path / "repo", "m/latest", content)
    else:
        require_refused(done, tmp_path / "repo", "Protocol error")


# Exports


@pytest.mark.parametrize("contexts", [(ALLOCATION,), (ALLOCATION, DIRTY)])
def test_an_export_of_another_size_on_another_connection_makes_no_point(tmp_path, contexts):
    """Connections of a read, and those of a context each."""
    peer = Peer(sizes=(4 * MIB, 2 * MIB), flags=MULTI_CONN, contexts=contexts)
    with listening(peer) as uri:
        done = full(uri, tmp_path / "repo", *(["--bitmap", "b0"] if DIRTY in contexts else []))
    require_refused(done, tmp_path / "repo", "4194304", "2097152")


# Block sizes


@pytest.mark.parametrize("flags", [0, MULTI_CONN])
@pytest.mark.parametrize("blocks", [(65536, 65536, 65536), (65536, 65536, 1 * MIB), (4096, 65536, 0xFFFFFFFF)])
@pytest.mark.parametrize("dirty", [(20 * KIB, 4 * KIB), (60 * KIB, 72 * KIB), (3 * KIB, 2 * MIB)])
def test_every_request_is_aligned_to_the_servers_blocks(tmp_path, flags, blocks, dirty):
    """The full's, the incremental's, and the spot check's, with clusters smaller than the server's blocks."""
    start, length = dirty
    disk = bytearray(pattern(0, 4 * MIB))

    def status(asked: Asked) -> None:
        if DIRTY in asked.contexts:
            lows = [
                asked.offset,
                *(at for at in (start, start + length) if asked.offset < at < asked.offset + asked.length),
            ]
            runs = [
                (high - low, int(start <= low < start + length))
                for low, high in pairwise([*lows, asked.offset + asked.length])
            ]
            asked.extents(*runs, context=DIRTY, done=asked.contexts == [DIRTY])
        if ALLOCATION in asked.contexts:
            asked.extents((asked.length, 0))

    peer = Peer(
        contexts=(ALLOCATION, DIRTY),
        blocks=blocks,
        flags=flags,
        status=status,
        content=lambda at, count: bytes(disk[at : at + count]),
    )
    config = tmp_path / "config.yaml"
    config.write_text("cluster_size: 4K\nrequest_size: 68K\nspot_check: 20\n")
    options = ["--nbd", "URI", "--machine", "m", "--disk", "d", "--repo", tmp_path / "repo", "--json"]
    content = tmp_path / "content.raw"
    with listening(peer) as uri:
        options[1] = uri
        done = call_pybackup(["--config", config, "full", *options])
        assert (done.rc, done.stderr) == (0, "")
        disk[start : start + length] = b"\xaa" * length
        content.write_bytes(disk)
        claim = ["--bitmap", "b0", "--since", done.document[0]["point"]]
        done = call_pybackup(["--config", config, "incremental", *options, *claim])
        assert (done.rc, done.stderr, done.disk["kind"]) == (0, "", "incremental")
    assert peer.refused == 0
    restore_and_cmp(tmp_path / "repo", "m/latest", content)


def test_an_export_of_no_bytes_is_refused_as_an_empty_image_is(tmp_path):
    empty = tmp_path / "empty.raw"
    empty.touch()
    image = call_pybackup(["full", "--image", empty, "--image-format", "raw", "--repo", tmp_path / "repo"])
    with listening(Peer(size=0)) as uri:
        require_refused(full(uri, tmp_path / "repo"), tmp_path / "repo", f"{uri} is empty")
    assert (image.rc, "is empty" in image.stderr) == (13, True)


def test_an_export_without_a_name_is_the_disk_disk(tmp_path):
    with listening(Peer()) as uri:
        done = call_pybackup(["full", "--nbd", uri, "--machine", "m", "--repo", tmp_path / "repo", "--json"])
    assert (done.rc, done.disk["name"]) == (0, "disk")


# Lists without end


def _names_without_end(connection: socket.socket, option: int, name: bytes) -> bool:
    if option not in {9, 10}:
        return False
    reply = struct.pack(">QIII", 0x3E889045565A9, option, 4, 4 + len(name)) + struct.pack(">I", 1) + name
    while True:
        connection.sendall(reply * 64)


@pytest.mark.parametrize("name", [b"qemu:dirty-bitmap:x", b"qemu:dirty-bitmap:" + b"x" * 4000])
def test_a_list_of_bitmaps_without_end_ends_the_run_in_bounded_memory(tmp_path, name):
    peer = Peer(option=lambda connection, option: _names_without_end(connection, option, name))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with listening(peer) as uri:
        done = full(uri, tmp_path / "repo", "--bitmap", "b0")
    require_refused(done, tmp_path / "repo", "lists more dirty bitmaps than a disk can have")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 << 10, "KiB"


# Passwords


@pytest.mark.parametrize("there", [True, False])
def test_a_password_in_a_uri_is_neither_stored_nor_shown(tmp_path, there):
    with listening(Peer(blocks=(1, 512, MIB))) as uri:
        given = uri.replace(":///", "://scott:tiger@/") if there else "nbd://scott:tiger@localhost:1/x"
        command = ["--debug", "full", "--nbd", given, "--machine", "m", "--disk", "d", "--repo", tmp_path / "repo"]
        done = call_pybackup([*command, "--json"])
        assert done.rc == (0 if there else 13), done
    stored = b"".join(path.read_bytes() for path in (tmp_path / "repo").rglob("*.json"))
    assert b"tiger" not in stored
    assert (b"scott" in stored) is there
    assert "tiger" not in done.stderr + done.stdout


def test_a_password_in_a_uri_that_is_none_is_not_shown(tmp_path):
    for uri in ("nbd://scott:tiger@[::1/x", "foo://scott:tiger@host/x"):
        done = full(uri, tmp_path / "repo")
        assert done.rc != 0
        assert "tiger" not in done.stderr
    config = tmp_path / "c.yaml"
    config.write_text("repository: repo\nmachines: {a: {disks: {vda: {nbd: 'foo://scott:tiger@host/x'}}}}\n")
    done = call_pybackup(["--config", config, "check-config"])
    assert done.rc == 2
    assert "tiger" not in done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nbd://scott:tiger@host/x", "nbd://scott@host/x"),
        ("nbds://scott:ti:ger@host:10809/x: failed", "nbds://scott@host:10809/x: failed"),
        ("nbd://host:10809/a@b", "nbd://host:10809/a@b"),
        ("nbds://alice@host/?tls-psk-file=/a:b@c", "nbds://alice@host/?tls-psk-file=/a:b@c"),
        ("nbd+unix:///x?socket=/a:b@c", "nbd+unix:///x?socket=/a:b@c"),
        ("1:2@3", "1:2@3"),
    ],
)
def test_only_a_password_is_taken_out_of_a_uri(text, shown):
    assert names.without_password(text) == shown


def test_connections_over_tcp_are_kept_alive(tmp_path):
    content = tmp_path / "content"
    content.write_bytes(bytes(MIB))
    with nbdkit_tcp(tmp_path, "file", content) as port, Export(f"nbd://localhost:{port}") as export, export.lanes(2):
        for handle in export._handles:
            with socket.socket(fileno=os.dup(handle.aio_get_fd())) as connection:
                assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
