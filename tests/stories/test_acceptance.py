"""The main job on QEMU's worked example of dirty bitmaps, run as people run it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import (
    CLUSTER,
    MIB,
    bitmaps,
    check_repository,
    make_image,
    raw_copy,
    require_identical,
    run,
    run_pybackup,
    write,
)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """Eric Blake's: 3 MiB, 512 bytes written, a bitmap added, 512 bytes written."""
    image = make_image(tmp_path / "disk.qcow2", "3M")
    write(image, "write -P 0x11 1M 512")
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", image, "b1")
    write(image, "write -P 0x22 2M 512")
    return image


@contextmanager
def served(image: Path, bitmap: str) -> Iterator[str]:
    """The image under a qemu-nbd with its bitmap and its allocation depth."""
    socket = image.parent / "oracle.sock"
    command = ["qemu-nbd", "-r", "-f", "qcow2", "-A", "-B", bitmap, "-t", "-k", str(socket), str(image)]
    with subprocess.Popen(command) as server:
        try:
            uri = f"nbd+unix:///?socket={socket}"
            while not socket.exists():
                assert server.poll() is None
            yield uri
        finally:
            server.terminate()


def test_one_write_of_512_bytes_makes_one_dirty_cluster(example):
    extents = run_pybackup(["map", "--image", example, "--bitmap", "b1", "--json"]).document
    assert [e["start"] for e in extents] == [0, *(e["start"] + e["length"] for e in extents[:-1])]
    assert sum(e["length"] for e in extents) == 3 * MIB
    dirty = [range(e["start"], e["start"] + e["length"]) for e in extents if e["dirty"]]
    assert sum(len(found) for found in dirty) == CLUSTER
    assert (dirty[0].start, dirty[-1].stop) == (2 * MIB, 2 * MIB + CLUSTER)
    with served(example, "b1") as uri:
        oracle = json.loads(run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:b1", uri))
        allocation = json.loads(run("nbdinfo", "--json", "--map", uri))
    assert [(e["offset"], e["length"]) for e in oracle if e["type"]] == [(2 * MIB, CLUSTER)]
    for e in extents:
        [under] = [a for a in allocation if a["offset"] <= e["start"] < a["offset"] + a["length"]]
        assert (e["hole"], e["zero"]) == (bool(under["type"] & 1), bool(under["type"] & 2))


def test_the_nightly_loop_on_the_worked_example(example, tmp_path):
    repository = tmp_path / "repo"
    kept = []

    def backup(wanted: str) -> str:
        done = run_pybackup([wanted, "--image", example, "--repo", repository, "--bitmap", "b1", "--json"])
        assert (done.rc, done.stderr) == (0, "")
        kept.append(raw_copy(example, tmp_path / f"{len(kept)}.raw"))
        assert done.disk["kind"] == wanted
        if wanted == "incremental":
            assert done.disk["dirty_bytes"] == done.disk["data_bytes"] == CLUSTER
        return done.machine["manifest"]

    points = [backup("full")]
    write(example, "write -P 0x33 512k 512")
    points.append(backup("incremental"))
    write(example, "write -P 0x44 1M 512", "write -P 0x45 1025k 512")
    points.append(backup("incremental"))

    assert [name for name in bitmaps(example) if name != "b1"] == [
        json.loads(Path(points[-1]).read_bytes())["disks"][0]["bitmap"]["started"]
    ]
    for point, expected in zip(points, kept, strict=True):
        target = tmp_path / "restored"
        done = run_pybackup(["restore", point, target, "--json"])
        assert done.rc == 0, done.stderr
        require_identical(expected, target)
        target.unlink()
    newest = repository / "disk" / json.loads(Path(points[-1]).read_bytes())["disks"][0]["data"]["file"]
    run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", example, newest)
    check_repository(repository)
    assert run_pybackup(["verify", "--repo", repository, "--deep"]).rc == 0


def test_a_first_incremental_is_a_full_and_needs_no_excuse(example, tmp_path):
    given = ["incremental", "--image", example, "--repo", tmp_path / "repo", "--bitmap", "b1", "--json"]
    done = run_pybackup(given)
    assert (done.rc, done.stderr, done.disk["kind"]) == (0, "", "full")
    assert "first point" in done.disk["reason"]
    done = run_pybackup(given)
    assert (done.rc, done.disk["kind"], done.disk["data_bytes"]) == (0, "incremental", 0)
