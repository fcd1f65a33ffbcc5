"""Nights of a domain that is on, off, transient or gone for a while: one chain, and no record in libvirt's way."""

from __future__ import annotations

from random import Random

import pytest
from domains import Domain, kind_of
from lab import MIB, call_pybackup, check_repository

from backup.sources.libvirt_domain import Domain as OurDomain
from backup.sources.libvirt_job import Job


def test_nights_on_and_off_are_one_chain(domain):
    domain.io("vda", "write -P 7 1M 1M")
    domain.require_night("full", "full")
    domain.io("vda", "write -P 8 2M 100k", "write -z 1M 64k")
    domain.io("vdb", "write -P 9 3M 4k", "discard 0 1M")
    domain.require_night("incremental", "incremental")
    domain.destroy()
    domain.require_night("incremental", "incremental")
    domain.start()
    domain.io("vda", "write -P 10 5M 4k")
    domain.require_night("incremental", "incremental")
    domain.daemon.virsh("suspend", domain.name)
    domain.require_night("incremental", "incremental")
    check_repository(domain.repository)


def test_the_point_says_that_libvirt_was_its_source_on_and_off(domain):
    on = domain.point(domain.require_night("full", "full"))
    domain.destroy()
    off = domain.point(domain.require_night("incremental", "incremental"))
    for point in (on, off):
        assert [disk["source"]["kind"] for disk in point["disks"]] == ["libvirt", "libvirt"]
        assert [disk["name"] for disk in point["disks"]] == ["vda", "vdb"]


def test_libvirt_lets_the_domain_be_undefined_between_nights(domain):
    domain.require_night("full", "full")
    domain.daemon.virsh("undefine", domain.name)
    domain.io("vda", "write -P 7 1M 1M")
    domain.require_night("incremental", "incremental")  # transient now
    domain.destroy()
    done = domain.night()
    assert (done.rc, "has no domain" in done.stderr) == (13, True), done
    domain.define().start()
    domain.require_night("incremental", "incremental")


def test_a_transient_domain_that_is_created_anew_goes_on(daemon, tmp_path):
    domain = Domain.of(daemon, tmp_path / "repo", "t2", "vda")
    try:
        domain.create()
        domain.require_night("full")
        domain.io("vda", "write -P 7 1M 1M")
        domain.destroy()
        domain.create()
        domain.require_night("incremental")
    finally:
        domain.remove()


def test_a_saved_domain_is_off_and_the_point_says_that_its_memory_is_missing(domain):
    domain.require_night("full", "full")
    domain.io("vda", "write -P 7 1M 1M")
    domain.daemon.virsh("managedsave", domain.name)
    done = domain.night()
    assert (done.rc, "is saved (managedsave)" in done.stderr) == (0, True), done
    domain.start()
    domain.require_night("incremental", "incremental")


def test_what_the_guest_writes_while_the_disks_are_read_is_in_the_next_point_only(domain, monkeypatch):
    """Random nights: writes, zeroes and discards of any size before and while each night reads."""
    random = Random(5)
    begin = Job.begin

    def scribble() -> None:
        for _ in range(12):
            target = random.choice(["vda", "vdb"])
            start = random.randrange(0, domain.size - MIB, 512)
            length = random.choice([512, 4096, 65536, random.randrange(512, MIB, 512)])
            kind = random.choice([f"write -P {random.randrange(1, 255)}", "write -z", "write -z -u", "discard"])
            domain.io(target, f"{kind} {start} {length}")

    def begin_and_scribble(job: Job) -> None:
        begin(job)
        scribble()

    domain.require_night("full", "full")
    for night in range(6):
        scribble()
        if night == 3:
            domain.destroy()
            domain.start()
        with monkeypatch.context() as patch:
            patch.setattr(Job, "begin", begin_and_scribble)
            domain.require_night("incremental", "incremental")
    domain.require_night("incremental", "incremental")


def test_an_audit_a_dry_run_and_a_map_change_nothing(domain):
    domain.require_night("full", "full")
    domain.io("vda", "write -P 7 1M 64k")
    rehearsed = domain.night("incremental", "--dry-run")
    assert (rehearsed.rc, rehearsed.machine["disks"][0]["dirty_bytes"]) == (0, 65536), rehearsed
    audited = domain.night("audit")
    assert audited.rc == 0, audited
    name = next(iter(domain.point("")["disks"]))["bitmap"]["started"]
    source = ["--libvirt", domain.daemon.uri, "--domain", domain.name, "--disk", "vda"]
    mapped = call_pybackup(["--json", "map", *source, "--bitmap", name, "--totals"])
    assert (mapped.rc, mapped.document["dirty_data"]) == (0, 65536), mapped
    assert domain.checkpoints() == []
    assert domain.job() == ""
    domain.require_night("incremental", "incremental")


def test_one_disk_of_a_night_leaves_the_other_disks_bitmap_alone(domain):
    """libvirt deletes a checkpoint's bitmaps on all of its disks."""
    domain.require_night("full", "full")
    domain.io("vdb", "write -P 7 1M 64k")
    done = domain.night("incremental", "--disk", "vda", "--exclude", "vdb")
    assert (done.rc, len(done.machine["disks"])) == (0, 1), done
    domain.require_night("incremental", "incremental")


def test_a_disk_that_is_neither_named_nor_excluded_is_a_warning(domain):
    done = domain.night("full", "--disk", "vda")
    assert done.rc == 3, done
    assert "disk vdb" in done.stderr
    assert "is in no point" in done.stderr


def test_two_repositories_of_one_domain_do_not_touch_each_others_bitmaps(domain, tmp_path):
    domain.require_night("full", "full")
    domain.io("vda", "write -P 7 1M 64k")
    ours, domain.repository = domain.repository, tmp_path / "other"
    domain.require_night("full", "full")
    domain.repository = ours
    domain.require_night("incremental", "incremental")
    domain.repository = tmp_path / "other"
    domain.require_night("incremental", "incremental")


def test_checkpoints_of_another_program_are_neither_changed_nor_asked_for(domain, monkeypatch):
    """A backup program can have hundreds, and libvirt asks QEMU for each one's size."""
    domain.require_night("full", "full")
    theirs = [f"theirs.{number}" for number in range(3)]
    with domain.found() as found:
        for name in theirs:
            found.checkpointCreateXML(f"<domaincheckpoint><name>{name}</name></domaincheckpoint>", 0)
    asked: list[str] = []
    sizes = OurDomain.bitmap_sizes

    def ask(ours: OurDomain, checkpoint: str) -> object:
        asked.append(checkpoint)
        return sizes(ours, checkpoint)

    monkeypatch.setattr(OurDomain, "bitmap_sizes", ask)
    domain.io("vda", "write -P 7 1M 64k")
    held = domain.hold()
    done = domain.night()
    assert (done.rc, [kind_of(disk) for disk in done.machine["disks"]]) == (0, ["incremental"] * 2), done
    domain.require_holds(done.machine["point"], held)
    assert sorted(domain.checkpoints()) == theirs
    assert asked
    assert not set(asked) & set(theirs)


def test_a_disk_that_is_copied_elsewhere_goes_on(domain):
    """libvirt takes the bitmaps along, also for what the guest writes while it copies."""
    domain.require_night("full", "full")
    copy = domain.folder / "copy.qcow2"
    domain.io("vda", "write -P 7 4M 64k")
    domain.daemon.virsh("blockcopy", domain.name, "vda", copy, "--wait", "--transient-job", "--format", "qcow2")
    domain.io("vda", "write -P 8 3M 64k", "write -z 1M 64k")
    domain.daemon.virsh("blockjob", domain.name, "vda", "--pivot")
    domain.disks["vda"] = copy
    domain.io("vda", "write -P 9 5M 64k")
    domain.require_night("incremental", "incremental")


@pytest.mark.parametrize("pattern", ["t*", "?1"])
def test_a_pattern_means_each_domain_that_matches(domain, pattern, tmp_path):
    other = Domain.of(domain.daemon, domain.repository, "t2", "vda").define()
    try:
        words = domain.words("full")
        words[words.index("--domain") + 1] = pattern
        done = call_pybackup(words)
        assert done.rc == 0, done
        expected = ["t1", "t2"] if pattern == "t*" else ["t1"]
        assert [machine["machine"] for machine in done.document] == expected
    finally:
        other.remove()


def test_a_domain_whose_name_no_machine_can_have_keeps_no_other_from_its_backup(domain):
    other = Domain.of(domain.daemon, domain.repository, "t2", "vda")
    other.name = "t 2"
    other.define()
    try:
        words = domain.words("full")
        words[words.index("--domain") + 1] = "t*"
        done = call_pybackup(words)
        assert done.rc == 2
        assert [(machine["machine"], machine["error"] is None) for machine in done.document] == [
            ("t 2", False),
            ("t1", True),
        ]
        assert "no name for the machine can be derived from 't 2'" in done.stderr
        assert "--domain 't 2' --machine NAME" in done.stderr
    finally:
        other.remove()


def test_a_name_of_a_pattern_that_no_domain_matches_or_that_is_a_domains_own(domain):
    words = domain.words("full")
    words[words.index("--domain") + 1] = "none*"
    nothing = call_pybackup(words)
    assert (nothing.rc, nothing.stderr.count("\n"), "matches 'none*'" in nothing.stderr) == (13, 2, True), nothing
    other = Domain.of(domain.daemon, domain.repository, "t2", "vda")
    other.name = "t[1]"
    other.define()
    try:
        both = other.night("full")
        assert [machine["machine"] for machine in both.document] == ["t1", "t[1]"], both
        assert (both.rc, both.document[0]["error"], "--machine NAME" in both.stderr) == (2, None, True), both
        own = other.night("full", "--machine", "t-1")
        assert (own.rc, own.machine["machine"]) == (0, "t-1"), own
        assert other.night("incremental", "--machine", "t-1").rc == 0
    finally:
        other.remove()


def test_map_says_where_the_exact_names_of_bitmaps_are(domain):
    domain.require_night("full", "full")
    words = ["map", "--libvirt", domain.daemon.uri, "--domain", domain.name, "--disk", "vda", "--bitmap", "b1"]
    done = call_pybackup(words)
    assert done.rc == 13
    assert "`pybackup show MACHINE` names the bitmap" in done.stderr


def test_a_renamed_domain_goes_on_under_the_old_name_if_it_is_given(domain):
    """Without --machine the new name is a new machine, whose disks begin with a full."""
    domain.require_night("full", "full")
    domain.destroy()
    domain.daemon.virsh("domrename", domain.name, "t1new")
    domain.name = "t1new"
    domain.start()
    domain.io("vda", "write -P 7 1M 64k")
    kept = domain.night("incremental", "--machine", "t1")
    assert (kept.rc, [kind_of(disk) for disk in kept.machine["disks"]]) == (0, ["incremental"] * 2), kept
    domain.require_night("full", "full")
