"""What a domain may have and be: raw disks, drives, network disks, disks that come and go, snapshots, a freeze."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from domains import Domain, kind_of, make_bootable, wait_until
from lab import MIB, call_pybackup, make_image, run

from backup.qmp.agent import AgentError
from backup.sources.libvirt import Libvirt
from backup.sources.libvirt_domain import Domain as OurDomain
from backup.sources.libvirt_job import Job


@pytest.fixture
def drawn(daemon, tmp_path):
    """A domain of one disk that is not defined yet."""
    domain = Domain.of(daemon, tmp_path / "repo", "t3", "vda")
    yield domain
    domain.remove()


def extra_image(domain: Domain, name: str, image_format: str = "raw", size: int = 4 * MIB) -> Path:
    image = make_image(domain.folder / name, size, image_format=image_format)
    domain.daemon.give(image)
    return image


def test_a_raw_disk_is_a_rescan_each_night_and_gets_no_checkpoint(drawn):
    image = extra_image(drawn, "vdb.raw")
    drawn.shapes["vdb"] = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{image}'/>"
        "<target dev='vdb' bus='virtio'/></disk>"
    )
    drawn.disks["vdb"] = image
    drawn.define().start()
    drawn.io("vdb", "write -P 7 1M 64k")
    drawn.require_night("full", "full")
    for on in (True, False):
        if on:
            drawn.io("vdb", "write -P 8 2M 64k", "write -z 1M 4k")
        else:
            drawn.destroy()
        held = drawn.hold()
        done = drawn.night()
        assert [kind_of(disk) for disk in done.machine["disks"]] == ["incremental", "rescan"], done
        drawn.require_holds(done.machine["point"], held)
        reasons = [disk["bitmap"]["why_none"] for disk in drawn.point("")["disks"]]
        assert reasons[0] is None
        assert "raw image cannot hold dirty bitmaps" in reasons[1]


def test_drives_are_left_out_unless_they_are_named(drawn):
    medium = extra_image(drawn, "cd.iso")
    drawn.devices = (
        f"<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{medium}'/>"
        "<target dev='sda' bus='sata'/><readonly/></disk>"
        "<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>"
    )
    drawn.define().start()
    assert [disk["name"] for disk in drawn.night("full").machine["disks"]] == ["vda"]
    named = drawn.night("full", "--disk", "vda", "--disk", "sda")
    assert [disk["name"] for disk in named.machine["disks"]] == ["vda", "sda"], named
    empty = drawn.night("full", "--disk", "sdb")
    assert (empty.rc, "has no medium" in empty.stderr) == (13, True), empty
    wrong = drawn.night("full", "--disk", "vdz")
    assert (wrong.rc, "it has: vda, sda, sdb" in wrong.stderr) == (13, True), wrong


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_floppy_with_a_medium_is_backed_up_if_it_is_named(drawn, image_format):
    medium = extra_image(drawn, f"floppy.{image_format}", image_format, 1440 << 10)
    run("qemu-io", "-f", image_format, "-c", "write -P 7 512k 256k", medium)
    drawn.devices = (
        f"<disk type='file' device='floppy'><driver name='qemu' type='{image_format}'/><source file='{medium}'/>"
        "<target dev='fda' bus='fdc'/></disk>"
    )
    drawn.define().start()
    assert [disk["name"] for disk in drawn.night("full").machine["disks"]] == ["vda"]
    both = ("--disk", "vda", "--disk", "fda")
    for on, wanted in ((True, "full"), (True, "incremental"), (False, "incremental")):
        if not on:
            drawn.destroy()
        done = drawn.night(wanted, *both)
        kinds = [kind_of(disk) for disk in done.machine["disks"]]
        again = "rescan" if image_format == "raw" else "incremental"
        assert kinds == (["full", "full"] if wanted == "full" else ["incremental", again]), done
    restored = drawn.folder / "fda.raw"
    done = call_pybackup(["restore", f"{drawn.name}/latest", restored, "--disk", "fda", "--repo", drawn.repository])
    assert done.rc == 0, done
    run("qemu-img", "compare", "-f", "raw", "-F", image_format, restored, medium)


@pytest.mark.parametrize(("on_crash", "state"), [("preserve", "crashed"), ("coredump-destroy", "shut off")])
def test_a_domain_whose_guest_panics_is_backed_up_as_it_was_left(drawn, on_crash, state):
    """The guest is a boot sector that tells QEMU's panic device of a panic."""
    make_bootable(drawn.disks["vda"], bytes.fromhex("ba0505 b001 ee f4 ebfd"))
    drawn.features = f"<on_crash>{on_crash}</on_crash>"
    drawn.devices = "<panic model='isa'/>"
    drawn.define()
    drawn.night("full")
    drawn.start()
    wait_until(lambda: drawn.state == state, "the panic")
    if state == "crashed":
        drawn.io("vda", "write -P 7 1M 64k")
    done = drawn.night()
    assert (done.rc, kind_of(done.disk)) == (0, "incremental"), done
    assert ("has crashed" in done.stderr) == (state == "crashed"), done
    drawn.require_night("incremental")
    assert drawn.state == state
    if state == "crashed":
        drawn.destroy()
    drawn.require_night("incremental")


@pytest.mark.parametrize("on", [True, False])
def test_a_network_disk_is_refused_in_so_many_words_and_can_be_excluded(drawn, on):
    with subprocess.Popen(
        ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw", "-k", drawn.daemon.place / "nbd", extra_image(drawn, "n.raw")]
    ) as server:
        try:
            for _ in range(100):
                if (drawn.daemon.place / "nbd").exists():
                    break
                subprocess.run(["sleep", "0.1"], check=True)
            (drawn.daemon.place / "nbd").chmod(0o777)
            drawn.devices = (
                "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd'>"
                f"<host transport='unix' socket='{drawn.daemon.place}/nbd'/></source>"
                "<target dev='vdc' bus='virtio'/><readonly/></disk>"
            )
            drawn.define()
            if on:
                drawn.start()
            refused = drawn.night("full")
            assert (refused.rc, "its source is on the network (nbd)" in refused.stderr) == (13, True), refused
            assert "--exclude vdc" in refused.stderr
            assert not drawn.repository.joinpath("t3").exists()
            assert drawn.night("full", "--exclude", "vdc").rc == 0
        finally:
            drawn.remove()
            server.kill()


def attach(domain: Domain, target: str, image: Path) -> None:
    words = ["attach-disk", domain.name, image, target, "--driver", "qemu", "--subdriver", "qcow2"]
    domain.daemon.virsh(*words, "--targetbus", "scsi")


def detach(domain: Domain, target: str) -> None:
    domain.daemon.virsh("detach-disk", domain.name, target)
    wait_until(lambda: target not in domain.daemon.virsh("domblklist", domain.name), f"{target} unplugged")


@pytest.fixture
def plugged(drawn):
    """A running domain, to whose SCSI controller disks are plugged; such a disk goes without a guest's consent."""
    drawn.devices = "<controller type='scsi' model='virtio-scsi'/>"
    return drawn.define().start()


def test_a_disk_that_came_gets_a_full_and_goes_on_when_it_comes_back(plugged):
    """A disk of earlier points that the domain has no longer is a warning, once."""
    plugged.require_night("full")
    image = extra_image(plugged, "sda.qcow2", "qcow2")
    attach(plugged, "sda", image)
    plugged.require_night("incremental", "full")
    plugged.require_night("incremental", "incremental")
    detach(plugged, "sda")
    rehearsed = plugged.night("incremental", "--dry-run")
    first, second = plugged.night(), plugged.night()
    assert (rehearsed.rc, first.rc, second.rc) == (3, 3, 0), (rehearsed, first, second)
    assert f"disk sda ({image}) is in point" in first.stderr
    assert [kind_of(disk) for disk in first.machine["disks"]] == ["incremental"]
    attach(plugged, "sda", image)
    plugged.require_night("incremental", "incremental")
    detach(plugged, "sda")
    assert plugged.night("incremental", "--exclude", "sda").rc == 0  # knowingly
    plugged.destroy()


@pytest.mark.parametrize("comes", [True, False])
def test_a_disk_is_plugged_or_cannot_be_unplugged_while_the_disks_are_read(plugged, monkeypatch, comes):
    """libvirt lets no disk of a backup job go."""
    image = extra_image(plugged, "sda.qcow2", "qcow2")
    if not comes:
        attach(plugged, "sda", image)
    plugged.require_night(*(["full"] if comes else ["full", "full"]))
    begin, said = Job.begin, []

    def begin_and_plug(job: Job) -> None:
        begin(job)
        if comes:
            attach(plugged, "sda", image)
        else:
            said.append(plugged.daemon.virsh("detach-disk", plugged.name, "sda", fails=True))

    with monkeypatch.context() as patch:
        patch.setattr(Job, "begin", begin_and_plug)
        done = plugged.night()
    assert done.rc == 0, done
    assert len(done.machine["disks"]) == (1 if comes else 2)
    assert comes or "already in active block job" in said[0], said
    plugged.require_night("incremental", "full" if comes else "incremental")


@pytest.mark.parametrize("on", [True, False])
def test_a_disk_that_is_a_part_of_its_file_is_refused(drawn, on):
    """While the domain is off, its file would be read as a whole: another disk."""
    image = extra_image(drawn, "whole.raw")
    drawn.shapes["vdb"] = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{image}'><slices>"
        "<slice type='storage' offset='1048576' size='2097152'/></slices></source>"
        "<target dev='vdb' bus='virtio'/></disk>"
    )
    drawn.define()
    if on:
        drawn.start()
    refused = drawn.night("full")
    assert (refused.rc, "a part of its file" in refused.stderr) == (13, True), refused
    assert drawn.night("full", "--exclude", "vdb").rc == 0


@pytest.mark.parametrize("on", [True, False])
def test_a_shared_disk_is_a_rescan_with_a_warning(drawn, on):
    image = extra_image(drawn, "shared.raw")
    drawn.disks["vda"] = image
    drawn.shapes["vda"] = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='{image}'/>"
        "<target dev='vda' bus='virtio'/><shareable/></disk>"
    )
    drawn.define()
    if on:
        drawn.start()
    drawn.night("full")
    done = drawn.night()
    assert (done.rc, kind_of(done.disk)) == (3, "rescan"), done
    assert "libvirt shares it with other machines" in done.stderr


def test_an_external_snapshot_and_its_commit_cost_rescans_and_no_byte(domain):
    domain.require_night("full", "full")
    domain.io("vda", "write -P 7 1M 64k")
    words = ["snapshot-create-as", domain.name, "s1", "--disk-only", "--no-metadata", "--diskspec"]
    base, top = domain.disks["vda"], domain.folder / "vda.s1"
    domain.daemon.virsh(*words, f"vda,file={top}", "--diskspec", "vdb,snapshot=no")
    domain.io("vda", "write -P 8 2M 64k")
    domain.disks["vda"] = top
    domain.require_night("rescan", "incremental")
    domain.io("vda", "write -P 9 3M 64k")
    domain.daemon.virsh("blockcommit", domain.name, "vda", "--active", "--pivot", "--wait")
    domain.disks["vda"] = base
    domain.require_night("rescan", "incremental")
    domain.require_night("incremental", "incremental")


def test_a_scratch_folder_without_room_is_refused_before_the_job(domain, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"repository: {domain.repository}\nbitmap: b1\nscratch_reserve: 1P\n"
        f"machines:\n  t1: {{libvirt: '{domain.daemon.uri}'}}\n"
    )
    done = call_pybackup(["--config", config, "full"])
    assert (done.rc, "1 PiB must stay free" in done.stderr) == (13, True), done
    assert domain.job() == ""


class Guest:
    """A guest agent that libvirt would reach, and what it was asked."""

    def __init__(self, monkeypatch, *, fails: bool = False) -> None:
        self.heard: list[str] = []
        self.frozen = False
        begin = OurDomain.begin_job

        def freeze(_domain: OurDomain) -> int:
            self.heard.append("freeze")
            if fails:
                raise AgentError("the agent is silent", hint="look")
            self.frozen = True
            return 1

        def thaw(_domain: OurDomain) -> int:
            self.heard.append("thaw")
            was, self.frozen = self.frozen, False
            return int(was)

        def begin_job(found: OurDomain, backup: str, checkpoint: str | None) -> None:
            self.heard.append("begin frozen" if self.frozen else "begin")
            begin(found, backup, checkpoint)

        monkeypatch.setattr(OurDomain, "freeze", freeze)
        monkeypatch.setattr(OurDomain, "thaw", thaw)
        monkeypatch.setattr(OurDomain, "begin_job", begin_job)
        monkeypatch.setattr(Libvirt, "require_agent", lambda _host: None)


def test_the_guest_is_frozen_for_the_begin_alone(domain, monkeypatch):
    guest = Guest(monkeypatch)
    done = domain.night("full", "--freeze")
    assert (done.rc, guest.heard) == (0, ["thaw", "freeze", "begin frozen", "thaw"]), done
    assert domain.point("")["disks"][0]["source"]["consistency"] == "filesystem"
    assert "file systems were frozen for" in done.stderr


def test_a_guest_that_another_program_thaws_too_early_is_not_called_frozen(domain, monkeypatch):
    guest = Guest(monkeypatch)
    begin = OurDomain.begin_job

    def thaw_and_begin(found: OurDomain, backup: str, checkpoint: str | None) -> None:
        guest.frozen = False
        begin(found, backup, checkpoint)

    monkeypatch.setattr(OurDomain, "begin_job", thaw_and_begin)
    done = domain.night("full", "--freeze")
    assert (done.rc, "is only crash-consistent: another program" in done.stderr) == (3, True), done
    assert domain.point("")["disks"][0]["source"]["consistency"] == "crash"


def test_the_guest_is_thawed_when_the_job_cannot_begin(domain, monkeypatch):
    guest = Guest(monkeypatch)
    monkeypatch.setattr("backup.sources.libvirt_job.backup_xml", lambda *_: "<nonsense/>")
    done = domain.night("full", "--freeze")
    assert (done.rc, guest.heard[-1], guest.frozen) == (13, "thaw", False), (done, guest.heard)


def test_a_guest_without_an_agent_is_backed_up_with_a_warning_unless_the_freeze_is_required(domain, tmp_path):
    done = domain.night("full", "--freeze")
    assert (done.rc, "has no agent channel" in done.stderr) == (3, True), done
    assert domain.point("")["disks"][0]["source"]["consistency"] == "crash"
    config = tmp_path / "c.yaml"
    config.write_text(
        f"repository: {domain.repository}\nbitmap: b1\n"
        f"machines:\n  t1: {{libvirt: '{domain.daemon.uri}', freeze: required}}\n"
    )
    done = call_pybackup(["--config", config, "incremental"])
    assert (done.rc, "cannot be frozen" in done.stderr) == (13, True), done
    assert domain.checkpoints() == []


def test_a_frozen_guest_of_a_killed_run_is_thawed_by_the_next(domain, monkeypatch):
    guest = Guest(monkeypatch)
    guest.frozen = True
    document = OurDomain.document
    connected = lambda found, *, on: replace(document(found, on=on), agent="connected")  # noqa: E731
    monkeypatch.setattr(OurDomain, "document", connected)
    done = domain.night("full", "--freeze")
    assert (done.rc, "a freeze of the guest's file systems" in done.stderr) == (0, True), done
    assert guest.heard[0] == "thaw"


def killed_while_frozen(domain: Domain) -> None:
    """A run of a process of its own is killed between freeze and thaw."""
    child = os.fork()
    if child == 0:
        OurDomain.begin_job = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        domain.night("full", "--freeze")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_run_without_a_freeze_thaws_the_guest_of_a_run_that_was_killed_meanwhile(domain, monkeypatch):
    """Neither a job nor a checkpoint tells of a run that was killed before both."""
    guest = Guest(monkeypatch)
    killed_while_frozen(domain)
    assert [name.rpartition("-")[2] for name in domain.leftovers()] == ["frozen"]
    guest.frozen = True
    document = OurDomain.document
    state = "disconnected"
    monkeypatch.setattr(OurDomain, "document", lambda found, *, on: replace(document(found, on=on), agent=state))
    silent = domain.night("full")
    assert (silent.rc, "may still be frozen" in silent.stderr, guest.frozen) == (3, True, True), silent
    state = "connected"
    done = domain.night()
    assert (done.rc, "a freeze of the guest's file systems" in done.stderr, guest.frozen) == (0, True, False), done
    assert domain.leftovers() == []
    heard = len(guest.heard)
    assert domain.night().rc == 0
    assert guest.heard[heard:] == ["begin"]  # the agent of a guest that was not frozen is not asked


@pytest.mark.parametrize("on", [True, False])
def test_without_bitmaps_a_domain_can_go_back_to_an_internal_snapshot(drawn, on):
    """With one, `virsh snapshot-revert` fails: QEMU does not load a snapshot of a disk that has a bitmap."""
    drawn.disks["vdb"] = extra_image(drawn, "vdb.qcow2", "qcow2")
    drawn.define().start()
    drawn.io("vda", "write -P 1 0 64k")
    drawn.daemon.virsh("snapshot-create-as", drawn.name, "before")
    then = drawn.hold()["vda"].rename(drawn.folder / "then.raw")
    drawn.io("vda", "write -P 2 0 64k")
    drawn.require_night("full", "full")
    if not on:
        drawn.destroy()
    words = ["clean", "--libvirt", drawn.daemon.uri, "--domain", drawn.name, "--repo", drawn.repository]
    listed = call_pybackup([*words, "--bitmaps", "--json"])
    assert (listed.rc, [found["place"] for found in listed.document["bitmaps"]]) == (0, ["disk vda", "disk vdb"]), (
        listed
    )
    assert not any(found["removed"] for found in listed.document["bitmaps"])
    removed = call_pybackup([*words, "--bitmaps", "--yes", "--json"])
    assert (removed.rc, [found["removed"] for found in removed.document["bitmaps"]]) == (0, [True, True]), removed
    assert drawn.checkpoints() == []
    drawn.daemon.virsh("snapshot-revert", drawn.name, "before", "--paused")
    run("qemu-img", "convert", "-U", "-O", "raw", drawn.disks["vda"], drawn.folder / "now.raw")
    run("cmp", then, drawn.folder / "now.raw")
    drawn.destroy()
    drawn.start()
    drawn.require_night("rescan", "rescan")
