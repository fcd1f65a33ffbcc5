"""
Audits: every difference that no bitmap knows of is found, with its range, and nothing is changed by looking.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from lab import (
    CLUSTER,
    KIB,
    MIB,
    Night,
    Result,
    bitmaps,
    call_pybackup,
    make_image,
    raw_copy,
    run,
    run_pybackup,
    write,
)
from lies import data_file, flip, lie, lie_to, stored_at
from live import Machine, Nights, private_tmp
from places import machine_at
from servers import qemu_nbd

from backup.engine import compare


def audit(night: Night, *options: str | Path) -> Result:
    return call_pybackup(["audit", "--image", night.image, "--repo", night.repository, "--json", *options])


def ranges(disk: Any) -> list[tuple[int, int]]:
    return [(found["start"], found["length"]) for found in disk["differences"]]


def require_true(night: Night) -> Any:
    before, content = night.state(), night.image.read_bytes()
    done = audit(night)
    assert (done.rc, done.stderr, done.disk["verdict"], ranges(done.disk)) == (0, "", "true", []), done
    assert (night.state(), night.image.read_bytes()) == (before, content)
    return done.disk


def require_lies(night: Night, *expected: tuple[int, int]) -> Result:
    before, content = night.state(), night.image.read_bytes()
    done = audit(night)
    assert (done.rc, done.disk["verdict"], ranges(done.disk)) == (12, "lies", list(expected)), done
    assert done.disk["differing_bytes"] == sum(length for _, length in expected)
    assert "the bitmap or the point is wrong" in done.stderr
    assert (night.state(), night.image.read_bytes()) == (before, content)
    return done


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night.with_incremental(tmp_path)


def test_an_honest_disk_and_its_changes_since_are_the_truth(night):
    point = night.newest["point"]
    disk = require_true(night)
    assert (disk["point"], disk["bitmap"], disk["dirty_bytes"]) == (point, night.own_bitmap, 0)
    assert disk["read_bytes"] == 11 * CLUSTER, "what is zero on both sides need not be read"
    write(night.image, "write -P 0x22 3M 1k", "write -z 0 64k", "discard 2M 64k")
    assert require_true(night)["dirty_bytes"] == 3 * CLUSTER
    night.require_incremental()
    require_true(night)


def test_lies_are_listed_by_range_and_merged(night):
    lie_to(
        night,
        "write -P 0x91 512 512",  # in data of the full
        "write -P 0x92 192k 64k",  # over the end of data, and a cluster's
        "write -P 0x93 256k 64k",  # where the chain holds nothing; touches the one before
        "write -z 1216k 8k",  # data of the full that became zero, in a part of a cluster
        "write -z 2M 64k",  # data of the incremental, a whole cluster
        "write -P 0x94 4194048 256",  # the last bytes
    )
    write(night.image, "write -P 0x95 3M 64k")  # after the bitmap began: no lie
    expected = [(512, 512), (192 * KIB, 128 * KIB), (1216 * KIB, 8 * KIB), (2 * MIB, 64 * KIB), (4 * MIB - 512, 512)]
    done = require_lies(night, *expected)
    assert done.disk["dirty_bytes"] == CLUSTER


def test_it_prints_ranges_for_people_and_nothing_else_with_quiet(night):
    lie_to(night, "write -P 0x91 70k 1k", "write -P 0x91 2M 512")
    given = ["audit", "--image", night.image, "--repo", night.repository]
    done = run_pybackup(given)
    assert done.rc == 12
    first, *rows = done.stdout.splitlines()
    assert first.startswith("disk/disk: 1536 bytes differ: compared with ")
    assert [row.split() for row in rows] == [["71680", "1024", "differs"], ["2097152", "512", "differs"]]
    assert [line.partition(": ")[2][:6] for line in done.stderr.splitlines()] == ["error:", "hint: "]
    quiet = call_pybackup(["--quiet", *given])
    app_is_loud_again()
    assert (quiet.rc, quiet.stdout, quiet.stderr) == (12, "", done.stderr)


def app_is_loud_again() -> None:
    from backup.cli import context

    context.options.quiet = False


def test_without_a_bitmap_equal_is_the_truth_and_a_difference_may_be_anything(night):
    run("qemu-img", "bitmap", "--remove", night.image, night.own_bitmap)
    disk = require_true(night)
    assert disk["bitmap"] is None
    assert "is missing" in disk["why"]
    write(night.image, "write -P 0x91 2M 1k")
    done = audit(night)
    assert (done.rc, done.disk["verdict"], ranges(done.disk)) == (14, "unknown", [(2 * MIB, KIB)])
    assert "it is unknown whether the disk changed" in done.stderr
    assert "is missing" in done.stderr


def test_another_size_is_a_change_that_a_bitmap_knows_and_nothing_else_does(night):
    run("qemu-img", "resize", "-q", night.image, "5M")
    require_true(night)
    run("qemu-img", "bitmap", "--remove", night.image, night.own_bitmap)
    done = audit(night)
    assert (done.rc, done.disk["verdict"], ranges(done.disk)) == (14, "unknown", [])
    run("qemu-img", "resize", "-q", "--shrink", night.image, str(MIB + 70 * KIB + 512))
    assert audit(night).rc == 14


def test_a_raw_image_that_nobody_wrote_to(tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(random.Random(1).randbytes(1_000_001))
    night = Night(image, tmp_path / "repo")
    assert night.backup("full").rc == 0
    require_true(night)
    with image.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"\0")
    done = audit(night)
    assert (done.rc, ranges(done.disk)) == (14, [(999_936, 65)]), done


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_damaged_chain_is_damage_and_not_a_difference(tmp_path, compression):
    night = Night.of(tmp_path)
    night.full("--compression", compression)
    path = data_file(night.repository, night.newest)
    flip(path, stored_at(path, MIB) + 9)
    done = audit(night)
    assert (done.rc, done.machine["error"]["code"]) == (12, 12)
    assert "damaged between bytes" in done.stderr


def test_what_is_not_there(night, tmp_path):
    assert audit(night, "--machine", "other").rc == 10
    assert audit(night, "--disk", "other").rc == 10
    given = ["audit", "--image", night.image, "--repo", tmp_path / "none"]
    assert call_pybackup(given).rc == 10
    assert not (tmp_path / "none").exists()


def test_a_machine_that_is_being_backed_up_is_left_alone(night):
    with machine_at(night.repository / "disk").lock():
        assert audit(night).rc == 11


def test_several_machines_and_the_worst_of_them_counts(tmp_path):
    for name in ("a", "b", "c"):
        write(make_image(tmp_path / f"{name}.qcow2", "1M"), "write -P 1 0 1M")
    machines = "".join(f"  {n}: {{disks: {{vda: {{image: {tmp_path / n}.qcow2}}}}}}\n" for n in ("a", "b", "c"))
    config = tmp_path / "c.yaml"
    config.write_text(f"repository: {tmp_path / 'repo'}\nbitmap: b1\nmachines:\n{machines}")
    assert call_pybackup(["--config", config, "full"]).rc == 0
    assert call_pybackup(["--config", config, "audit"]).rc == 0
    [name] = bitmaps(tmp_path / "b.qcow2")
    lie(tmp_path / "b.qcow2", name, "write -P 2 64k 512")
    (tmp_path / "c.qcow2").unlink()
    done = call_pybackup(["--config", config, "audit", "--json"])
    assert done.rc == 12
    assert [each["error"] and each["error"]["code"] for each in done.document] == [None, None, 13]
    assert call_pybackup(["--config", config, "audit", "a", "c"]).rc == 13
    assert call_pybackup(["--config", config, "audit", "a"]).rc == 0


def test_an_nbd_server_is_audited_by_the_users_word(tmp_path):
    image = make_image(tmp_path / "disk.qcow2", "2M")
    write(image, "write -P 1 0 2M")
    given = ["--repo", tmp_path / "repo", "--machine", "m", "--disk", "vda", "--json"]
    with qemu_nbd(image, "-t", "--shared=8") as uri:
        since = call_pybackup(["full", "--nbd", uri, *given]).machine["point"]
    run("qemu-img", "bitmap", "--add", image, "b0")
    write(image, "write -P 3 128k 512")
    with qemu_nbd(image, "-t", "--shared=8", "-B", "b0") as uri:
        assert call_pybackup(["audit", "--nbd", uri, *given, "--bitmap", "b0", "--since", since]).rc == 0
        assert call_pybackup(["audit", "--nbd", uri, *given]).rc == 14
    lie(image, "b0", "write -P 2 1M 1k")
    with qemu_nbd(image, "-B", "b0") as uri:
        done = call_pybackup(["audit", "--nbd", uri, *given, "--bitmap", "b0", "--since", since])
    assert (done.rc, ranges(done.disk)) == (12, [(128 * KIB, 512), (MIB, KIB)]), done


def test_a_running_machine_is_audited_at_one_instant(tmp_path):
    with Machine.of(tmp_path, "a", "b") as machine, private_tmp(machine.place):
        machine.start()
        machine.write("a", 0, MIB, 0x11)
        machine.write("b", MIB, MIB, 0x12)
        nights = Nights.of(machine)
        nights.full()
        machine.write("a", 300_032, 1024, 0x13)
        machine.zero("b", MIB, 100_000)
        names = [word for disk in machine.disks.values() for word in ("--node", disk.node, "--disk", disk.name)]
        given = ["audit", "--qmp", machine.qmp, "--machine", "m", "--repo", nights.repository, *names, "--json"]
        before = machine.bitmaps("a"), machine.bitmaps("b"), nights.points()
        done = call_pybackup(given)
        assert (done.rc, done.stderr) == (0, ""), done
        assert [disk["dirty_bytes"] for disk in done.machine["disks"]] == [CLUSTER, 2 * CLUSTER]
        assert (machine.bitmaps("a"), machine.bitmaps("b"), nights.points()) == before
        nights.require_nothing_left()
        machine.monitor("block-dirty-bitmap-clear", node="b", name=nights.own_bitmap)
        done = call_pybackup(given)
        assert done.rc == 12
        assert [ranges(disk) for disk in done.machine["disks"]] == [[], [(MIB, 100_352)]]
        nights.require_nothing_left()


def test_a_lie_in_a_long_chain_of_odd_sizes_is_found_exactly(tmp_path):
    """Held against a comparison, sector by sector, of what the disk was with what it is."""
    rng = random.Random(5)
    night = Night.of(tmp_path, 3 * MIB + 512, "-o", "cluster_size=4k")
    noise = tmp_path / "noise"
    noise.write_bytes(rng.randbytes(256 * KIB))
    night.full()
    for size in (3 * MIB + 512, 2 * MIB + 1536, 4 * MIB):
        run("qemu-img", "resize", "-q", "--shrink", night.image, str(size))
        write(night.image, *changes(rng, noise, size))
        assert night.incremental().rc == 0
    require_true(night)
    before = raw_copy(night.image, tmp_path / "before.raw").read_bytes()
    lie_to(night, *changes(rng, noise, 4 * MIB))
    after = raw_copy(night.image, tmp_path / "after.raw").read_bytes()
    sectors = [at for at in range(0, len(after), 512) if before[at : at + 512] != after[at : at + 512]]
    require_lies(night, *merged(sectors))


def changes(rng: random.Random, noise: Path, size: int) -> list[str]:
    places = [(rng.randrange(size // 512) * 512, rng.randint(1, 200) * 512) for _ in range(8)]
    commands = [f"write -s {noise}", "write -z", "write -P 7", f"write -s {noise}"]
    return [f"{rng.choice(commands)} {at} {min(length, size - at)}" for at, length in places]


def merged(sectors: list[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for at in sectors:
        if found and sum(found[-1]) == at:
            found[-1] = found[-1][0], found[-1][1] + 512
        else:
            found.append((at, 512))
    return found


def test_more_ranges_than_are_remembered_are_counted(tmp_path, monkeypatch):

    night = Night.of(tmp_path, "8M")
    write(night.image, "write -P 0x31 0 8M")
    night.full()
    monkeypatch.setattr(compare, "MOST_RANGES", 2)
    lie_to(night, *(f"write -P 0x91 {at}k 512" for at in range(10, 8192, 600)))
    done = audit(night)
    assert done.rc == 12
    assert (done.disk["complete"], done.disk["differing_bytes"]) == (False, 14 * 512)
    assert 2 < len(ranges(done.disk)) < 14
    people = call_pybackup(["audit", "--image", night.image, "--repo", night.repository])
    assert people.stdout.splitlines()[-1].strip() == "and more"


def test_options_that_mean_nothing_to_it_are_refused(tmp_path):
    for option in ("--dry-run", "--freeze", "--no-fallback"):
        assert call_pybackup(["audit", "--image", tmp_path / "x", option]).rc == 2


def test_a_range_over_several_batches_is_one(tmp_path):
    night = Night.of(tmp_path, "8M")
    write(night.image, "write -P 0x31 0 8M")
    night.full()
    lie_to(night, "write -P 0x91 300k 4M", "write -P 0x92 7M 1M")
    require_lies(night, (300 * KIB, 4 * MIB), (7 * MIB, MIB))
