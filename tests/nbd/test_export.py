"""
The NBD client against real servers: maps equal nbdinfo's, backups through every kind of server restore to what it
serves, and what a server lacks is said and never taken for "nothing changed".
"""

from __future__ import annotations

import json
import random
import re
import socket
import struct
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import MANNERS, Disk, FakeBinding, FakeHandle, as_list
from lab import (
    GIB,
    KIB,
    MIB,
    Night,
    Result,
    call_pybackup,
    check_repository,
    make_image,
    restore_and_cmp,
    run,
    write,
)
from servers import nbdinfo_map, nbdkit, nbdkit_tcp, qemu_nbd

from backup.errors import BackupError, SourceError
from backup.model.extents import joined, windows
from backup.nbd import connection
from backup.nbd.export import Export
from backup.planning import extent_map
from backup.planning.plan import WINDOW

DIRTY = "qemu:dirty-bitmap:"


def own_map(export: Export, bitmap: str | None = None) -> list[tuple[int, int, int]]:
    """Start, length and flags of the whole disk, asked as the planner asks."""
    parts = [
        export.allocation(low, high) if bitmap is None else export.dirty(bitmap, low, high)
        for low, high in windows(0, export.size, WINDOW)
    ]
    return [(start, end - start, flags) for start, end, flags in as_list(joined(parts))]


def require_same_maps(uri: str, *bitmaps: str) -> None:
    with Export(uri, bitmaps) as export:
        assert own_map(export) == nbdinfo_map(uri)
        for name in bitmaps:
            assert own_map(export, name) == nbdinfo_map(uri, DIRTY + name)


def backup(wanted: str, uri: str, repository: Path, *options: str) -> Result:
    return call_pybackup(
        [wanted, "--nbd", uri, "--machine", "m", "--disk", "d", "--repo", repository, "--json", *options]
    )


def require_full(uri: str, repository: Path, content: Path) -> Result:
    """A full through this server restores to `content`; the dry run before it told its numbers."""
    rehearsed = backup("full", uri, repository, "--dry-run")
    assert rehearsed.rc == 0, rehearsed.stderr
    assert not list(repository.glob("*/*"))
    done = backup("full", uri, repository)
    assert (done.rc, done.stderr) == (0, "")
    for name in ("kind", "size", "dirty_bytes", "data_bytes", "zero_bytes"):
        assert rehearsed.disk[name] == done.disk[name]
    restore_and_cmp(repository, "m/latest", content)
    check_repository(repository)
    return done


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """Half a mebibyte and an odd bit: data, zeroes and a hole."""
    path = tmp_path / "content.raw"
    data = bytearray(random.Random(1).randbytes(512 * KIB + 77))
    data[128 * KIB : 256 * KIB] = bytes(128 * KIB)
    path.write_bytes(data)
    return path


# Maps


def fragmented(path: Path, clusters: int) -> Path:
    """
    An image of 4 KiB clusters of which each has another status than its neighbours, in a few MiB.

    Preallocated clusters whose file has a hole read as zero and are allocated; every other one gets the zero flag in
    its L2 entry (QEMU docs/interop/qcow2.txt, "Standard Cluster Descriptor").
    """
    make_image(path, clusters * 4 * KIB, "-o", "cluster_size=4k,preallocation=metadata")
    with open(path, "r+b") as file:
        head = file.read(72)
        [length], [table] = struct.unpack(">I", head[36:40]), struct.unpack(">Q", head[40:48])
        file.seek(table)
        for entry in struct.unpack(f">{length}Q", file.read(length * 8)):
            offset = entry & 0x00FFFFFFFFFFFE00
            file.seek(offset)
            entries = np.frombuffer(file.read(4 * KIB), dtype=">u8").copy()
            entries[::2][entries[::2] != 0] |= 1
            file.seek(offset)
            file.write(entries.tobytes())
    assert "No errors" in run("qemu-img", "check", "-f", "qcow2", path)
    return path


def test_contexts_of_unequal_length_beyond_the_cap_of_one_reply(tmp_path):
    """Traps 7 and 8: one reply holds 131,072 extents of allocation and few of the bitmap, which reach further."""
    image = fragmented(tmp_path / "disk.qcow2", 140_000)
    run("qemu-img", "bitmap", "--add", image, "b1")
    write(image, "write -P 1 400M 4k", "write -P 1 530M 70k", "write -z 3M 4k")
    with qemu_nbd(image, "-t", "-e", "8", "-B", "b1") as uri:
        with Export(uri, ["b1"]) as export:
            found = own_map(export)
            assert len(found) > 131_072
            asked: list[str] = []
            inner = export._asked
            export._asked = lambda *args: (asked.append(args[0]), inner(*args))[1]
            own_map(export)
            own_map(export, "b1")
        assert asked.count("base:allocation") == 2
        assert asked.count(DIRTY + "b1") == 1
        require_same_maps(uri, "b1")
        done = call_pybackup(["map", "--nbd", uri, "--bitmap", "b1", "--totals", "--json"])
        assert done.document["dirty"] == sum(row[1] for row in nbdinfo_map(uri, DIRTY + "b1") if row[2])
        assert done.document["zero"] == sum(row[1] for row in found if row[2] & 2)


def test_a_fragmented_disk_is_backed_up_through_one_connection_too(tmp_path):
    """The same replies where both contexts come in one."""
    image = fragmented(tmp_path / "disk.qcow2", 140_000)
    run("qemu-img", "bitmap", "--add", image, "b1")
    repository = tmp_path / "repo"
    with qemu_nbd(image) as uri:
        first = backup("full", uri, repository)
    write(image, "write -P 1 100M 4k", "write -P 2 530M 70k")
    since = first.machine["point"]
    with qemu_nbd(image, "-B", "b1") as uri:
        done = backup("incremental", uri, repository, "--bitmap", "b1", "--since", since)
    assert (done.rc, done.disk["kind"]) == (0, "incremental"), done
    stored = repository / "m" / f"d.{done.machine['point']}.qcow2"
    assert "identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", image, stored)
    check_repository(repository)


@pytest.mark.parametrize("size", [8 * GIB, 20 * GIB + 512])
def test_maps_beyond_32_bits_equal_nbdinfos(tmp_path, size):
    """Trap 11; data on both sides of each 4 GiB, and at the end."""
    image = make_image(tmp_path / "disk.qcow2", size)
    run("qemu-img", "bitmap", "--add", image, "b1")
    edges = [4 * GIB - 64 * KIB, 4 * GIB - 2 * MIB - 512, size - 512]
    edges += [8 * GIB - 4 * MIB, 16 * GIB - 8 * MIB] if size > 8 * GIB else []
    write(image, *(f"write -P 1 {edge} {min(128 * KIB, size - edge)}" for edge in edges), "write -z 6G 1G")
    with qemu_nbd(image, "-t", "-e", "8", "-B", "b1") as uri:
        require_same_maps(uri, "b1")
        shown = call_pybackup(["map", "--nbd", uri, "--bitmap", "b1", "--json"]).document
    assert shown[0]["start"] == 0
    assert all(one["start"] + one["length"] == other["start"] for one, other in pairwise(shown))
    assert shown[-1]["start"] + shown[-1]["length"] == size


@pytest.mark.parametrize("granularity", ["512", "4096", "64k", "2M", "64M", "2G"])
def test_bitmaps_of_any_granularity(tmp_path, granularity):
    night = Night.of(tmp_path, "20M")
    run("qemu-img", "bitmap", "--add", "-g", granularity, night.image, "b1")
    repository = tmp_path / "repo"
    with qemu_nbd(night.image) as uri:
        since = backup("full", uri, repository).machine["point"]
    write(night.image, "write -P 9 3M 1k", "write -z 1M 64k", "write -P 8 20479k 1k")
    with qemu_nbd(night.image, "-t", "-e", "8", "-B", "b1") as uri:
        require_same_maps(uri, "b1")
        done = backup("incremental", uri, repository, "--bitmap", "b1", "--since", since)
    assert (done.rc, done.disk["kind"]) == (0, "incremental"), done
    restore_and_cmp(repository, "m/latest", night.image)


@pytest.mark.parametrize("size", [1, 511, 513, 65_537, 1_000_001])
def test_sizes_that_are_no_multiple_of_512(tmp_path, size):
    content = tmp_path / "content.raw"
    content.write_bytes(random.Random(size).randbytes(size))
    with nbdkit(tmp_path, "-r", "file", content) as uri:
        require_same_maps(uri)
        require_full(uri, tmp_path / "repo", content)


def test_a_map_of_many_one_byte_extents(tmp_path):
    with nbdkit(tmp_path, "--filter=extentlist", "data", "1", "size=3000", f"extentlist={_stripes(tmp_path)}") as uri:
        require_same_maps(uri)
        with Export(uri) as export:
            assert len(own_map(export)) == 3000


def _stripes(folder: Path) -> Path:
    path = folder / "extents"
    path.write_text("".join(f"{at} 1{' hole,zero' * (at % 2)}\n" for at in range(3000)))
    return path


def test_the_map_of_an_image_equals_the_servers(tmp_path):
    night = Night.of(tmp_path)
    run("qemu-img", "bitmap", "--add", night.image, "b1")
    write(night.image, "write -P 3 2M 100k", "write -z 64k 64k", "discard 1M 128k")
    shown = call_pybackup(["map", "--image", night.image, "--bitmap", "b1", "--json"]).document
    with qemu_nbd(night.image, "-t", "-e", "8", "-B", "b1") as uri, Export(uri, ["b1"]) as export:
        assert shown == [
            {name: getattr(extent, name) for name in ("start", "length", "dirty", "data", "zero", "hole")}
            for extent in extent_map.read_map(export, "b1")
        ]
        dirty = sum(row[1] for row in nbdinfo_map(uri, DIRTY + "b1") if row[2])
    assert sum(row["length"] for row in shown if row["dirty"]) == dirty
    assert any(row["dirty"] and row["zero"] for row in shown)


# What a server lacks


@pytest.mark.parametrize("options", [["-t", "-e", "8"], []], ids=["many clients", "one client"])
def test_a_bitmap_that_the_server_lacks_is_an_error_that_names_what_it_offers(tmp_path, options):
    """Trap 14.  The names are asked for on the same connection: a server of one client lets a second one wait."""
    night = Night.of(tmp_path)
    run("qemu-img", "bitmap", "--add", night.image, "b1")
    with qemu_nbd(night.image, *options, "-B", "b1") as uri:
        done = call_pybackup(["map", "--nbd", uri, "--bitmap", "other", "--json"])
    assert done.rc == 13
    assert "no dirty bitmap 'other'" in done.document["error"]["message"]
    assert "it offers: b1;" in done.document["error"]["hint"]
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("bitmap", [[], ["--bitmap", "b1"]])
def test_an_export_that_is_not_there_is_an_error(tmp_path, bitmap):
    night = Night.of(tmp_path)
    with qemu_nbd(night.image, "-t") as uri:
        done = call_pybackup(["map", "--nbd", uri.replace("///", "///nonesuch"), *bitmap])
    assert done.rc == 13
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    "options",
    [["--no-sr"], ["--oldstyle"], ["--filter=noextents"], ["--filter=extentlist"]],
    ids=["no structured replies", "oldstyle", "no extents", "no bitmap"],
)
def test_a_server_without_bitmaps_is_read_whole_and_never_all_clean(tmp_path, content, options):
    """Trap 15."""
    arguments = [*options, "-r", "file", content]
    if "extentlist" in options[0]:
        listed = tmp_path / "extents"
        listed.write_text("0 1M\n")
        arguments.append(f"extentlist={listed}")
    repository = tmp_path / "repo"
    with nbdkit(tmp_path, *arguments) as uri:
        first = require_full(uri, repository, content)
        assert first.disk["data_bytes"] == content.stat().st_size
        shown = call_pybackup(["map", "--nbd", uri, "--json"]).document
        assert [(row["start"], row["length"], row["data"], row["dirty"]) for row in shown] == [
            (0, content.stat().st_size, True, None)
        ]
        assert call_pybackup(["map", "--nbd", uri, "--bitmap", "b1"]).rc == 13
        given = ["--bitmap", "b1", "--since", first.machine["point"]]
        refused = backup("incremental", uri, repository, *given, "--no-fallback")
        assert refused.rc == 14
        assert len(list(repository.glob("m/*.json"))) == 1
        done = backup("incremental", uri, repository, *given)
    assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (3, "incremental", True)
    assert "no bitmap b1" in done.disk["reason"]
    assert any("no bitmap b1" in warning for warning in done.machine["warnings"])
    restore_and_cmp(repository, "m/latest", content)


def test_a_hole_that_is_not_zero_is_read(tmp_path, content):
    """Trap 2: nbdkit serves what lies there."""
    listed = tmp_path / "extents"
    listed.write_text("0 64K hole\n64K 64K\n128K 128K hole,zero\n256K 64K zero\n320K 1M hole\n")
    expected = tmp_path / "expected.raw"
    held = bytearray(content.read_bytes())
    held[128 * KIB : 320 * KIB] = bytes(192 * KIB)
    expected.write_bytes(held)
    with nbdkit(tmp_path, "--filter=extentlist", "-r", "file", content, f"extentlist={listed}") as uri:
        require_same_maps(uri)
        done = require_full(uri, tmp_path / "repo", expected)
    assert done.disk["zero_bytes"] == 192 * KIB
    assert done.disk["data_bytes"] == content.stat().st_size - 192 * KIB


# Someone else's bitmap: --since


@pytest.fixture
def claimed(tmp_path: Path) -> SimpleNamespace:
    """A full through someone's server whose bitmap b1 records since before, and a later write."""
    night = Night.of(tmp_path)
    run("qemu-img", "bitmap", "--add", night.image, "b1")
    with qemu_nbd(night.image) as uri:
        done = backup("full", uri, night.repository)
    assert (done.rc, done.stderr) == (0, "")
    write(night.image, "write -P 5 1M 200k", "write -z 0 64k")
    return SimpleNamespace(image=night.image, repository=night.repository, point=done.machine["point"])


def _newest(repository: Path) -> dict:
    found = [json.loads(path.read_bytes()) for path in repository.glob("m/*.json")]
    return max(found, key=lambda manifest: manifest["sequence"])


def _incremental(claimed: SimpleNamespace, *options: str) -> Result:
    with qemu_nbd(claimed.image, "-B", "b1") as uri:
        return backup("incremental", uri, claimed.repository, *options)


def test_the_right_point_makes_an_incremental_that_is_marked_as_claimed(claimed):
    """Through a server of one client, which a second connection would have wait for ever."""
    done = _incremental(claimed, "--bitmap", "b1", "--since", claimed.point)
    assert (done.rc, done.stderr, done.disk["kind"]) == (0, "", "incremental")
    assert done.disk["dirty_bytes"] == 320 * KIB
    assert done.disk["zero_bytes"] == 64 * KIB
    [disk] = _newest(claimed.repository)["disks"]
    assert disk["bitmap"]["claimed"] is True
    assert disk["bitmap"]["read"] == "b1"
    assert disk["bitmap"]["started"] is None
    assert disk["parent"]["point"] == claimed.point
    restore_and_cmp(claimed.repository, "m/latest", claimed.image)
    check_repository(claimed.repository)


def test_a_rehearsed_incremental_has_the_numbers_of_the_run(claimed):
    given = ["--bitmap", "b1", "--since", claimed.point]
    rehearsed = _incremental(claimed, *given, "--dry-run")
    assert (rehearsed.rc, rehearsed.machine["point"]) == (0, None)
    assert len(list(claimed.repository.glob("m/*"))) == 4
    done = _incremental(claimed, *given)
    for name in ("kind", "reason", "size", "dirty_bytes", "data_bytes", "zero_bytes"):
        assert rehearsed.disk[name] == done.disk[name]


def test_without_the_point_all_is_read_with_a_warning(claimed):
    done = _incremental(claimed, "--bitmap", "b1")
    assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (3, "incremental", True)
    assert "--since" in done.disk["reason"]
    restore_and_cmp(claimed.repository, "m/latest", claimed.image)
    assert _incremental(claimed, "--bitmap", "b1", "--no-fallback").rc == 14


def test_a_point_that_is_not_the_newest_is_refused(claimed):
    assert _incremental(claimed, "--bitmap", "b1").rc == 3
    done = _incremental(claimed, "--bitmap", "b1", "--since", claimed.point)
    assert done.rc == 2
    assert "not the newest" in done.machine["error"]["message"]
    assert len(list(claimed.repository.glob("m/*.json"))) == 2


def test_a_point_of_a_disk_that_has_none_is_not_found(claimed, tmp_path):
    with qemu_nbd(claimed.image, "-B", "b1") as uri:
        done = backup("incremental", uri, tmp_path / "other", "--bitmap", "b1", "--since", claimed.point)
    assert done.rc == 10


def test_a_point_that_does_not_exist_is_not_found(claimed):
    done = _incremental(claimed, "--bitmap", "b1", "--since", "20200101T000000Z-00000000")
    assert done.rc == 10
    assert claimed.point in done.machine["error"]["message"]


def test_a_missing_bitmap_of_a_claim_is_a_rescan_or_an_error(claimed):
    given = ["--bitmap", "b2", "--since", claimed.point]
    refused = _incremental(claimed, *given, "--no-fallback")
    assert (refused.rc, refused.machine["error"]["code"]) == (14, 14)
    done = _incremental(claimed, *given)
    assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (3, "incremental", True)
    assert "no bitmap b2" in done.disk["reason"]


# Connections and limits


def _connections(log: Path) -> int:
    return len(set(re.findall(r"connection=([0-9]+) Connect ", log.read_text())))


@pytest.mark.parametrize("mode", ["disable", "plugin"])
def test_only_a_server_that_allows_it_gets_more_than_one_connection(tmp_path, content, mode):
    """Trap 16."""
    log = tmp_path / "log"
    filters = ["--filter=multi-conn", "--filter=log"]
    with nbdkit(
        tmp_path,
        *filters,
        "-r",
        "file",
        content,
        f"logfile={log}",
        f"multi-conn-mode={mode}",
        "multi-conn-track-dirty=off",
    ) as uri:
        assert backup("full", uri, tmp_path / "repo").rc == 0
    assert (_connections(log) == 1) == (mode == "disable")
    restore_and_cmp(tmp_path / "repo", "m/latest", content)


def test_a_server_of_one_client_that_ends_with_it_is_enough(tmp_path):
    """qemu-nbd without -t ends when its first client leaves: there must be one connection from end to end."""
    night = Night.of(tmp_path, "40M")
    write(night.image, "write -P 7 8M 20M")
    with qemu_nbd(night.image) as uri:
        done = backup("full", uri, night.repository)
    assert (done.rc, done.stderr) == (0, "")
    restore_and_cmp(night.repository, "m/latest", night.image)


def test_a_server_that_takes_fewer_connections_than_it_allows_is_used_with_those(tmp_path, monkeypatch):
    """qemu-nbd --shared=2 says multi-conn and lets the third client wait until one leaves."""
    monkeypatch.setattr("backup.nbd.export.EXTRA_SECONDS", 0.3)
    night = Night.of(tmp_path)
    run("qemu-img", "bitmap", "--add", night.image, "b1")
    with qemu_nbd(night.image, "-t", "--shared=2", "-B", "b1") as uri:
        with Export(uri, ["b1"]) as export:
            assert export.multi_conn
            with export.lanes(4) as lanes:
                assert len(lanes) == 2
        done = backup("full", uri, night.repository)
    assert (done.rc, done.stderr) == (0, "")
    restore_and_cmp(night.repository, "m/latest", night.image)


def test_contexts_share_a_connection_where_the_server_takes_no_more(monkeypatch):
    monkeypatch.setattr("backup.nbd.export.EXTRA_SECONDS", 0.01)
    disk = Disk(np.repeat([0, 3, 0], 1000), {"b": np.repeat([1, 0, 1], 1000)})
    for most, connections in ((1, 2), (2, 3), (3, 3)):
        server = FakeBinding(disk, MANNERS[-1], multi_conn=True, most_connections=most)
        monkeypatch.setattr("backup.nbd.export.load_binding", lambda server=server: server)
        with Export("nbd://fake", ["b"]) as export:
            assert own_map(export) == [(0, 1000, 0), (1000, 1000, 3), (2000, 1000, 0)]
            assert own_map(export, "b") == [(0, 1000, 1), (1000, 1000, 0), (2000, 1000, 1)]
            assert server.connections == connections
        assert server.open == 0


def test_a_connection_of_its_own_lets_a_bitmap_be_asked_alone(monkeypatch):
    """A server computes every negotiated context for every request; the bitmap must not cost the image's tables."""
    disk = Disk(np.repeat([0, 3, 0], 1000), {"b": np.repeat([1, 0, 1], 1000)})
    server = FakeBinding(disk, MANNERS[0], multi_conn=True)
    monkeypatch.setattr("backup.nbd.export.load_binding", lambda: server)
    with Export("nbd://fake", ["b"]) as export:
        export.dirty("b", 0, disk.size)
    assert [contexts for contexts, _, _ in server.requests] == [(DIRTY + "b",)]


def test_what_is_expected_is_asked_once_and_answered_as_ever(monkeypatch):
    disk = Disk(np.repeat([0, 3, 0], 1000), {"b": np.repeat([1, 0, 1], 1000)})
    server = FakeBinding(disk, MANNERS[1], multi_conn=True)
    monkeypatch.setattr("backup.nbd.export.load_binding", lambda: server)
    with Export("nbd://fake", ["b"]) as export:
        plainly = [as_list(export.dirty("b", 0, 2500)), as_list(export.allocation(500, 3000))]
        asked = list(server.requests)
        server.requests.clear()
        export.expect_dirty("b", 0, 2500)
        export.expect_allocation(500, 3000)
        assert [(at, count) for _, at, count in server.requests] == [(0, 2500), (500, 2500)]
        assert [as_list(export.dirty("b", 0, 2500)), as_list(export.allocation(500, 3000))] == plainly
        assert sorted(server.requests) == sorted(asked)
        export.expect_allocation(0, 7)  # never fetched: closing must not wait for it


def test_a_server_that_says_nothing_is_an_error_and_no_hang(tmp_path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        with pytest.raises(SourceError, match="does not answer") as caught:
            connection.connect(connection.load_binding(), f"nbd+unix:///?socket={tmp_path / 's'}", [], seconds=0.2)
    assert "--shared" in caught.value.hint


@pytest.mark.parametrize("uri", ["nbd+unix:///?socket=/nonexistent/s", "http://localhost/", "nbd://127.0.0.1:1/", "x"])
def test_what_cannot_be_reached_is_a_source_error_of_two_lines(tmp_path, uri):
    done = backup("full", uri, tmp_path / "repo")
    assert done.rc == 13
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [" error", " hint"]


@pytest.mark.parametrize(
    "limits",
    [
        ["blocksize-minimum=512", "blocksize-preferred=4K", "blocksize-maximum=16K"],
        ["blocksize-minimum=4K", "blocksize-preferred=64K", "blocksize-maximum=100K"],
        ["blocksize-minimum=64K", "blocksize-preferred=64K", "blocksize-maximum=64K"],
    ],
    ids=["16K at most", "100K at most", "64K"],
)
def test_a_servers_limits_on_requests_are_kept(tmp_path, limits):
    """Trap 13; the server refuses every other request."""
    content = tmp_path / "content.raw"
    content.write_bytes(random.Random(2).randbytes(1 * MIB))
    policy = ["--filter=blocksize-policy", "-r", "file", content, *limits, "blocksize-error-policy=error"]
    if "100K" in limits[-1]:
        limits[-1] = policy[-2] = "blocksize-maximum=96K"  # a multiple of the minimum
    with nbdkit(tmp_path, *policy) as uri:
        require_full(uri, tmp_path / "repo", content)


def test_over_tcp(tmp_path, content):
    with nbdkit_tcp(tmp_path, "-r", "file", content) as port:
        require_full(f"nbd://127.0.0.1:{port}/", tmp_path / "repo", content)


def test_over_tls_with_a_shared_key(tmp_path, content):
    keys, wrong = tmp_path / "keys.psk", tmp_path / "wrong.psk"
    for path in (keys, wrong):
        run("psktool", "-u", "alice", "-p", path)
    with nbdkit_tcp(tmp_path, "--tls=require", f"--tls-psk={keys}", "-r", "file", content) as port:
        require_full(f"nbds://alice@127.0.0.1:{port}/?tls-psk-file={keys}", tmp_path / "repo", content)
        for uri in (f"nbds://alice@127.0.0.1:{port}/?tls-psk-file={wrong}", f"nbd://127.0.0.1:{port}/"):
            assert backup("full", uri, tmp_path / "repo").rc == 13


def test_a_dry_run_of_an_image_has_the_numbers_of_the_run(tmp_path):
    night = Night.of(tmp_path)
    assert call_pybackup(["init", night.repository]).rc == 0
    for wanted in ("full", "incremental"):
        before = night.state()
        rehearsed = night.backup(wanted, "--bitmap", "b1", "--dry-run")
        assert night.state() == before
        done = night.backup(wanted, "--bitmap", "b1")
        assert (rehearsed.rc, done.rc) == (0, 0)
        for name in ("kind", "reason", "size", "dirty_bytes", "data_bytes", "zero_bytes"):
            assert rehearsed.disk[name] == done.disk[name]
        write(night.image, "write -P 3 300k 99k", "write -z 1M 64k", "discard 2M 64k")


# The binding


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("x", name="nbd"), "is missing"),
        (ModuleNotFoundError("x", name="libnbdmod"), "another Python"),
        (ImportError("broken.so"), "does not load: broken.so"),
    ],
)
def test_a_missing_binding_says_what_to_install(monkeypatch, error, said):
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(connection.importlib, "import_module", fail)
    with pytest.raises(BackupError, match=said) as caught:
        connection.load_binding()
    assert "apt-get install python3-libnbd" in caught.value.hint


def test_pypis_other_nbd_is_told_from_libnbd(monkeypatch):
    monkeypatch.setattr(
        connection.importlib, "import_module", lambda name: SimpleNamespace(__file__="/x/nbd/__init__.py")
    )
    with pytest.raises(BackupError, match="another program's") as caught:
        connection.load_binding()
    assert "pip uninstall nbd" in caught.value.hint


def test_the_fake_binding_has_no_method_that_libnbd_lacks():
    """The fake itself: what the program may call on it exists."""
    real = connection.load_binding().NBD
    assert {name for name in vars(FakeHandle) if not name.startswith("_")} <= set(dir(real))
