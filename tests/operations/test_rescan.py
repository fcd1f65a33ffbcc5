"""
Rescans: a chain goes on without a bitmap, holding no more than what differs, and is repaired where a bitmap is wrong.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab import CLUSTER, MIB, Night, Result, bitmaps, call_pybackup, make_image, restore_and_cmp, run, write
from laws import Story
from lies import configured, data_file, flip, lie_to, stored_at
from live import Machine, Nights, private_tmp
from servers import qemu_nbd

RESCAN = "on_unusable_bitmap"


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night.with_incremental(tmp_path)


def rescanning(night: Night, unusable: str = "rescan", *options: str | Path) -> Result:
    """An incremental with the configuration's word on what to do without a bitmap."""
    config = configured(night.repository.parent, on_unusable_bitmap=unusable)
    given = ["incremental", "--image", night.image, "--repo", night.repository, "--bitmap", "b1", "--json"]
    return call_pybackup([*config, *given, *options])


def require_rescan(night: Night, done: Result, why: str, *, differing: int, rc: int = 3) -> Any:
    """It was one, says why and what it found, restores, and an incremental continues it."""
    disk = done.disk
    assert (done.rc, disk["kind"], disk["rescan"], disk["dirty_bytes"]) == (rc, "incremental", True, differing), done
    found = f"{differing} bytes differ from " if differing else "nothing differs"
    assert disk["reason"].startswith("rescan: ")
    assert why in disk["reason"]
    assert found in disk["reason"]
    [entry] = night.newest["disks"]
    assert (entry["reason"], entry["bytes"]["dirty"]) == (disk["reason"], differing)
    assert (entry["kind"], entry["bitmap"]["read"]) == ("incremental", None)
    assert (why in done.stderr) == (rc == 3)
    night.require_restored()
    return disk


def asked(night: Night, *options: str | Path) -> Result:
    return night.backup("rescan", "--bitmap", "b1", *options)


def test_an_unchanged_disk_costs_reading_and_no_space(night):
    disk = require_rescan(night, asked(night), "asked for", differing=0, rc=0)
    assert (disk["data_bytes"], disk["zero_bytes"]) == (11 * CLUSTER, 0)
    assert list(bitmaps(night.image)) == [night.own_bitmap]
    held = run("qemu-img", "map", "--output=json", "-f", "qcow2", data_file(night.repository, night.newest))
    assert '"depth": 0' not in held
    night.require_incremental("--no-fallback")


def test_only_what_differs_is_stored(night):
    write(night.image, "write -P 0x31 70k 1k", "write -P 0x32 3M 100k", "write -P 0x21 2M 64k")
    disk = require_rescan(night, asked(night), "asked for", differing=3 * CLUSTER, rc=0)
    assert disk["data_bytes"] == 13 * CLUSTER
    night.require_incremental("--no-fallback")


@pytest.mark.parametrize("command", ["write -z 1M 128k", "write -P 0 1M 128k", "discard 1M 128k"])
def test_what_became_zero_is_zero(night, command):
    write(night.image, command)
    # 1100k to 1164k is zero since the incremental, in parts of both clusters.
    require_rescan(night, asked(night), "asked for", differing=2 * CLUSTER, rc=0)


def test_a_lie_is_repaired_and_the_audit_is_clean(night):
    lie_to(night, "write -P 0x99 70k 1k", "write -z 2M 64k")
    audit = ["audit", "--image", night.image, "--repo", night.repository]
    assert call_pybackup(audit).rc == 12
    require_rescan(night, asked(night), "asked for", differing=2 * CLUSTER, rc=0)
    assert call_pybackup(audit).rc == 0
    night.require_incremental("--no-fallback")


def test_a_lie_that_the_spot_check_finds_is_repaired_by_a_rescan(night):
    lie_to(night, "write -P 0x99 70k 1k")
    refused = rescanning(night, "rescan", "--no-fallback")
    assert refused.rc == 14
    assert "needs a rescan: bitmap" in refused.stderr
    require_rescan(night, rescanning(night), "is wrong: 1 of 11", differing=CLUSTER)
    assert rescanning(night, "rescan", "--no-fallback").rc == 0


def test_zeroes_that_the_bitmap_missed_are_repaired_by_a_rescan(night):
    run("qemu-img", "resize", "-q", "--shrink", night.image, "1M")
    run("qemu-img", "resize", "-q", night.image, "4M")
    require_rescan(night, rescanning(night), "missed ", differing=7 * CLUSTER)


def test_a_lost_bitmap_is_a_rescan_a_full_or_a_failure_as_configured(night):
    def lose() -> None:
        run("qemu-img", "bitmap", "--remove", night.image, night.own_bitmap)
        write(night.image, "write -P 0x41 3M 1k")

    lose()
    before = night.state()
    failed = rescanning(night, "fail")
    assert (failed.rc, night.state()) == (14, before)
    assert "is missing" in failed.stderr
    require_rescan(night, rescanning(night), "is missing", differing=CLUSTER)
    lose()
    done = rescanning(night, "full")
    assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (3, "full", False)
    lose()
    dry = rescanning(night, "rescan", "--dry-run")
    assert (dry.rc, dry.disk["rescan"], dry.disk["dirty_bytes"], dry.machine["point"]) == (3, True, 4 * MIB, None)
    assert rescanning(night, "rescan").disk["data_bytes"] == dry.disk["data_bytes"]


def test_a_machine_has_its_own_word(tmp_path):
    for name in ("a", "b"):
        make_image(tmp_path / f"{name}.qcow2", "1M", "-o", "compat=0.10")
    config = tmp_path / "c.yaml"
    disks = {name: f"disks: {{vda: {{image: {tmp_path / name}.qcow2}}}}" for name in ("a", "b")}
    config.write_text(
        f"repository: {tmp_path / 'repo'}\nbitmap: b1\n{RESCAN}: rescan\nmachines:\n"
        f"  a: {{{disks['a']}}}\n  b: {{{disks['b']}, {RESCAN}: fail}}\n"
    )
    first = call_pybackup(["--config", config, "incremental", "--json"])
    assert first.rc == 0
    assert "every later one is a rescan" in first.document[0]["disks"][0]["reason"]
    done = call_pybackup(["--config", config, "incremental", "--json"])
    assert [each["error"] and each["error"]["code"] for each in done.document] == [None, 14]
    assert done.document[0]["disks"][0]["rescan"]


def test_an_image_that_can_hold_no_bitmap_gets_small_points_all_the_same(tmp_path):
    image = tmp_path / "disk.raw"
    content = random.Random(2).randbytes(1_000_001)
    image.write_bytes(content)
    night = Night(image, tmp_path / "repo")
    assert rescanning(night).disk["kind"] == "full"
    image.write_bytes(content[:500_000] + b"x" + content[500_001:])
    disk = require_rescan(night, rescanning(night), "raw image", differing=CLUSTER)
    assert disk["stored_bytes"] < 8 * CLUSTER
    image.write_bytes(content[:999_000])
    require_rescan(night, rescanning(night), "raw image", differing=CLUSTER, rc=0)
    image.write_bytes(content + bytes(MIB) + b"y")
    # The old tail shows again, which the short point between hides; then the last byte; in between are zeroes.
    size = len(content) + MIB + 1
    require_rescan(night, rescanning(night), "raw image", differing=CLUSTER + size % CLUSTER, rc=0)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("part", ["data", "table"])
def test_a_damaged_chain_becomes_a_full_that_leaves_no_trace_of_the_try(tmp_path, compression, part):
    image = make_image(tmp_path / "disk.qcow2", "24M")
    night = Night(image, tmp_path / "repo")
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(3).randbytes(MIB))
    write(image, f"write -s {noise} 0 24M")
    assert night.backup("full", "--bitmap", "b1", "--compression", compression).rc == 0
    write(image, "write -P 9 0 1M")
    path = data_file(night.repository, night.newest)
    if part == "data":
        flip(path, stored_at(path, 20 * MIB) + 9)
    else:
        flip(path, int.from_bytes(path.read_bytes()[40:48], "big") + 7)
    done = asked(night, "--compression", compression)
    assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (3, "full", False), done
    assert "full instead of rescan: the chain is broken" in done.stderr
    restore_and_cmp(night.repository, "disk/latest", image)
    assert len(list(night.repository.glob("disk/disk.*"))) == 4


def test_a_damaged_chain_with_no_fallback_changes_nothing(night):
    path = data_file(night.repository, night.newest)
    run("qemu-img", "bitmap", "--remove", night.image, night.own_bitmap)
    flip(path, stored_at(path, 2 * MIB) + 9)
    before = night.state()
    done = rescanning(night, "fail")
    assert (done.rc, night.state()) == (14, before)
    assert rescanning(night, "rescan", "--no-fallback").rc == 14
    assert night.state() == before


def test_damage_that_only_reading_finds_with_no_fallback_changes_nothing(night):
    """`rescan` was asked for; a full in its place is a fallback, which the configuration forbids."""
    path = data_file(night.repository, night.newest)
    flip(path, stored_at(path, 2 * MIB) + 9)
    before = night.state()
    config = configured(night.repository.parent, on_unusable_bitmap="fail")
    given = ["rescan", "--image", night.image, "--repo", night.repository, "--bitmap", "b1"]
    done = call_pybackup([*config, *given])
    assert (done.rc, night.state()) == (14, before), done
    assert "the chain is broken" in done.stderr


def test_the_first_point_and_the_last_of_a_long_chain_are_fulls(tmp_path):
    night = Night.of(tmp_path)
    done = asked(night)
    assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (0, "full", False)
    config = configured(tmp_path, max_chain=1)
    given = ["rescan", "--image", night.image, "--repo", night.repository, "--json"]
    done = call_pybackup([*config, *given])
    assert (done.rc, done.disk["kind"]) == (0, "full")
    assert "max_chain" in done.disk["reason"]


def test_the_chains_cluster_size_and_a_new_compression(tmp_path):
    night = Night.of(tmp_path, "3M")
    night.full("--compression", "none")
    write(night.image, "write -P 0x51 1030k 300k")
    config = configured(tmp_path, cluster_size="4K")
    given = ["rescan", "--image", night.image, "--repo", night.repository, "--bitmap", "b1", "--json"]
    done = call_pybackup([*config, *given])
    assert done.disk["dirty_bytes"] == 5 * CLUSTER
    night.require_restored()


def test_an_nbd_server_needs_neither_a_bitmap_nor_a_word(tmp_path):
    image = make_image(tmp_path / "disk.qcow2", "2M")
    write(image, "write -P 1 0 2M")
    given = ["--repo", tmp_path / "repo", "--machine", "m", "--disk", "vda", "--json"]
    with qemu_nbd(image) as uri:
        assert call_pybackup(["full", "--nbd", uri, *given]).rc == 0
    write(image, "write -P 3 128k 512", "write -z 1M 64k")
    with qemu_nbd(image) as uri:
        done = call_pybackup(["rescan", "--nbd", uri, *given])
    assert (done.rc, done.disk["rescan"], done.disk["dirty_bytes"]) == (0, True, 2 * CLUSTER)
    restore_and_cmp(tmp_path / "repo", "m/latest", image)
    with qemu_nbd(image) as uri:
        config = configured(tmp_path, on_unusable_bitmap="rescan")
        done = call_pybackup([*config, "incremental", "--nbd", uri, "--bitmap", "b0", *given])
    assert (done.rc, done.disk["rescan"], done.disk["dirty_bytes"]) == (3, True, 0)
    assert "--since POINT" in done.disk["reason"]


def test_the_examples_nbd_disk_is_backed_up_night_after_night(tmp_path):
    """Whatever bitmap of the server's is named with it: no configuration can say which point that starts from."""
    example = yaml.safe_load((Path(__file__).parents[2] / "config.example.yaml").read_text())
    db1 = example["machines"]["db1"]
    del example["copies"]  # which are not there
    image = make_image(tmp_path / "disk.qcow2", "2M")
    found = []
    for night, bitmap in enumerate([{}, {}, {"bitmap": "b0"}]):
        write(image, f"write -P {night + 1} 128k 512")
        with qemu_nbd(image) as uri:
            db1["disks"]["vda"] = {"nbd": uri, **bitmap}
            config = {**example, "repository": str(tmp_path / "repo"), "machines": {"db1": db1}}
            (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
            done = call_pybackup(["--config", tmp_path / "c.yaml", "incremental", "--json"])
        found.append((done.rc, done.disk["kind"], done.disk["rescan"]))
        restore_and_cmp(tmp_path / "repo", "db1/latest", image)
    assert found == [(0, "full", False), (3, "incremental", True), (3, "incremental", True)]


def test_a_running_machine_that_was_killed_loses_its_bitmaps_and_not_its_chain(tmp_path):
    with Machine.of(tmp_path, "a", "b") as machine, private_tmp(machine.place):
        machine.start()
        machine.write("a", 0, MIB, 0x11)
        machine.write("b", MIB, MIB, 0x12)
        nights = Nights.of(machine)
        nights.full()
        machine.write("a", 300_032, 1024, 0x13)
        machine.crash()
        machine.zero("b", MIB, 100_000)
        config = configured(tmp_path, on_unusable_bitmap="rescan")
        done = nights._noted(call_pybackup([*config, *nights.arguments("incremental"), "--json"]))
        assert done.rc == 3, done
        found = [(disk["kind"], disk["rescan"], disk["dirty_bytes"]) for disk in done.machine["disks"]]
        assert found == [("incremental", True, CLUSTER), ("incremental", True, 2 * CLUSTER)]
        nights.require_own_bitmap_alone()
        machine.write("a", 70_000, 100, 0x14)
        nights.require_incremental("--no-fallback")


@pytest.mark.parametrize("seed", range(5))
def test_every_point_restores_bit_for_bit_with_rescans_between(tmp_path, seed):
    """The law of test_laws.py, with rescans where there are bitmaps, where there are none, and where they lie."""
    story = Story(tmp_path, random.Random(f"rescan {seed}"))
    story.make_image(backed=seed % 2 == 1)
    for number in range(5):
        if number:
            story.guest_changes()
        wanted = story.rng.choice(["rescan", "rescan", "incremental"]) if number else "full"
        if wanted == "rescan" and story.rng.random() < 0.5:
            names = bitmaps(story.image)
            for name in names:
                run("qemu-img", "bitmap", "--remove", story.image, name)
                if story.rng.random() < 0.5:
                    run("qemu-img", "bitmap", "--add", story.image, name)
        point = story.back_up(wanted, "--image", str(story.image), "--bitmap", "b1")
        if wanted == "rescan":
            assert point.reason.startswith("rescan: asked for"), point.reason
        call = ["audit", "--image", story.image, "--repo", tmp_path / "repo", "--machine", "m"]
        assert call_pybackup(call).rc == 0
    story.check()
