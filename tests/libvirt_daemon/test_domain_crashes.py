"""The crash matrix: pybackup, libvirtd, QEMU and other programs end at any step; the next night is right."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from domains import Domain, make_bootable, wait_until
from kills import DRIVER
from lab import bitmaps, call_pybackup, init, run

from backup.model.names import MARKER
from backup.sources.libvirt import Libvirt
from backup.sources.libvirt_domain import Domain as OurDomain
from backup.sources.libvirt_job import Job

DOMAIN, JOB, MACHINE = "backup.sources.libvirt_domain", "backup.sources.libvirt_job", "backup.repository.machine"
STEPS = {
    "before the job": f"{DOMAIN} Domain.begin_job before",
    "job begun": f"{DOMAIN} Domain.begin_job after",
    "disks open": f"{JOB} Job.open after",
    "read": f"{MACHINE} Machine.publish before",
    "published": f"{MACHINE} Machine.publish after",
    "job ended": f"{DOMAIN} Domain.end_job after",
    "old bitmap found": f"{DOMAIN} Domain.delete before",
    "old bitmap deleted": f"{DOMAIN} Domain.delete after",
    "record removed": f"{DOMAIN} Domain.close before",
}


def killed_night(domain: Domain, step: str, number: int = signal.SIGKILL) -> None:
    words = domain.words("incremental")
    init(words)
    command = [sys.executable, "-c", DRIVER, f"{STEPS[step]} 1 {int(number)}", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == (-number if number == signal.SIGKILL else 128 + number), done


def begun(domain: Domain) -> None:
    domain.io("vda", "write -P 7 1M 64k")
    domain.require_night("full", "full")
    domain.io("vda", "write -P 8 2M 64k")
    domain.io("vdb", "write -z 3M 64k")


@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_is_killed_leaves_nothing_that_the_next_one_does_not_mend(domain, step):
    begun(domain)
    killed_night(domain, step)
    domain.io("vda", "write -P 9 4M 64k")
    domain.require_night("incremental", "incremental")
    domain.destroy()
    names = [name for image in domain.disks.values() for name in bitmaps(image)]
    assert len(names) == len(set(names)) + 1 == 2, names  # the newest point's, on both disks


def test_a_stopped_run_ends_its_job_and_says_so(domain):
    begun(domain)
    killed_night(domain, "read", signal.SIGTERM)
    assert (domain.job(), domain.checkpoints(), domain.leftovers()) == ("", [], [])
    domain.require_night("incremental", "incremental")


def restarted(domain: Domain) -> None:
    domain.daemon.restart()
    wait_until(lambda: domain.state == "running", "the daemon's connection to the domain")


def off_and_on(domain: Domain) -> None:
    domain.destroy()
    domain.start()


def both(domain: Domain) -> None:
    restarted(domain)
    with suppress(Exception):  # libvirt may say that the domain is not running while it ends it
        domain.destroy()
    wait_until(lambda: domain.state == "shut off", "the end of the domain")
    domain.start()


def off(domain: Domain) -> None:
    domain.destroy()


@pytest.mark.parametrize("then", [restarted, off_and_on, both, off])
@pytest.mark.parametrize("step", ["job begun", "published"])
def test_a_killed_run_and_another_end_meanwhile(domain, step, then: Callable[[Domain], None]):
    begun(domain)
    killed_night(domain, step)
    then(domain)
    domain.require_night("incremental", "incremental")


def test_clean_removes_what_a_killed_run_left(domain):
    begun(domain)
    killed_night(domain, "job begun")
    assert domain.job()
    words = ["clean", "--repo", domain.repository, "--libvirt", domain.daemon.uri, "--domain", domain.name]
    done = call_pybackup(words)
    assert (done.rc, "backup job pybackup-" in done.stdout) == (0, True), done
    assert (domain.job(), domain.checkpoints(), domain.leftovers()) == ("", [], [])
    domain.require_night("incremental", "incremental")


def begin_foreign_job(domain: Domain, exports: str = "") -> None:
    """Begin a backup job of disk vda as another program does; `exports` are attributes that name the exports."""
    job = domain.folder / "job.xml"
    job.write_text(
        f"<domainbackup mode='pull'><server transport='unix' socket='{domain.folder}/s'/><disks>"
        f"<disk name='vda' backup='yes' type='file' {exports}><scratch file='{domain.folder}/x'/></disk>"
        "<disk name='vdb' backup='no'/></disks></domainbackup>"
    )
    domain.daemon.virsh("backup-begin", domain.name, job)


@pytest.mark.parametrize("exports", ["", "exportname='theirs'", "exportname='pybackup-12345678-abcdef12-vda'"])
def test_another_programs_job_is_refused_at_once_and_left_alone(domain, exports):
    begun(domain)
    begin_foreign_job(domain, exports)
    there = domain.job()
    began = time.monotonic()
    for wanted in ("incremental", "audit"):
        done = domain.night(wanted)
        assert (done.rc, "runs a backup job" in done.stderr, done.stderr.count("\n")) == (11, True, 2), done
    assert time.monotonic() - began < 25
    assert domain.job() == there
    domain.daemon.virsh("domjobabort", domain.name)
    domain.require_night("incremental", "incremental")


def test_a_killed_qemu_costs_a_rescan(domain):
    begun(domain)
    off_and_on(domain)  # the bitmaps are in the images
    domain.io("vda", "write -P 9 5M 64k", "flush")
    domain.kill_qemu()
    domain.start()
    domain.require_night("rescan", "rescan")
    domain.require_night("incremental", "incremental")
    domain.destroy()
    assert [len(bitmaps(image)) for image in domain.disks.values()] == [1, 1]


def tamper(domain: Domain, command: str) -> None:
    """Do something to the newest point's bitmap on vda, past pybackup and libvirt."""
    import libvirt_qemu

    name = domain.point("")["disks"][0]["bitmap"]["started"]
    with domain.found() as found:
        said = libvirt_qemu.qemuMonitorCommand(found, '{"execute":"query-named-block-nodes"}', 0)
        [node] = [
            node["node-name"]
            for node in json.loads(said)["return"]
            if any(bitmap["name"] == name for bitmap in node.get("dirty-bitmaps", ()))
            and node["image"]["filename"] == str(domain.disks["vda"])
        ]
        question = {"execute": command, "arguments": {"node": node, "name": name}}
        assert "error" not in json.loads(libvirt_qemu.qemuMonitorCommand(found, json.dumps(question), 0))


@pytest.mark.parametrize("command", ["block-dirty-bitmap-remove", "block-dirty-bitmap-disable"])
def test_a_bitmap_that_is_tampered_with_behind_our_back_costs_a_rescan_of_its_disk(domain, command):
    """A disabled bitmap is there, and says that nothing was written since."""
    begun(domain)
    tamper(domain, command)
    domain.io("vda", "write -P 11 6M 64k")
    domain.require_night("rescan", "incremental")
    domain.require_night("incremental", "incremental")


def test_a_night_of_one_disk_spares_the_others_bitmap_in_a_record_of_both(domain):
    """libvirt deletes a checkpoint's bitmap from every disk of the record, and a killed run leaves one of both."""
    begun(domain)
    killed_night(domain, "job begun")
    assert len(domain.checkpoints()) == 2
    done = domain.night("incremental", "--disk", "vda", "--exclude", "vdb")
    assert (done.rc, len(done.machine["disks"])) == (0, 1), done
    domain.io("vdb", "write -P 12 5M 64k")
    domain.require_night("incremental", "incremental")


def test_bitmaps_of_no_point_are_removed_from_the_image(domain):
    begun(domain)
    short = json.loads((domain.repository / MARKER).read_text())["id"][:8]
    domain.destroy()
    stray = f"b1.{short}.20200101T000000Z-00000001"
    foreign = "b1.12345678.20200101T000000Z-00000001"
    for name in (stray, foreign):
        run("qemu-img", "bitmap", "--add", "-f", "qcow2", domain.disks["vda"], name)
    domain.daemon.give(domain.disks["vda"])
    domain.start()
    domain.require_night("incremental", "incremental")
    domain.destroy()
    assert stray not in bitmaps(domain.disks["vda"])
    assert foreign in bitmaps(domain.disks["vda"])


@pytest.mark.parametrize("on", [True, False])
def test_clean_removes_the_bitmaps_that_a_newer_point_supersedes(domain, on):
    """Once libvirt has no record of them, no run sees them before QEMU has stored them."""
    begun(domain)
    killed_night(domain, "published")
    if not on:
        domain.destroy()
    domain.io("vda", "write -P 9 4M 64k") if on else None
    words = ["clean", "--repo", domain.repository, "--libvirt", domain.daemon.uri, "--domain", domain.name]
    done = call_pybackup(words)
    assert (done.rc, done.stdout.count("which a newer point supersedes")) == (0, 2), done
    assert (domain.job(), domain.checkpoints(), domain.leftovers()) == ("", [], [])
    domain.require_night("incremental", "incremental")
    if on:
        domain.destroy()
    assert [len(bitmaps(image)) for image in domain.disks.values()] == [1, 1]


def test_a_bitmap_whose_record_a_user_removed_goes_when_qemu_has_stored_it(domain):
    """libvirt does not list it, so that no run can see it before."""
    begun(domain)
    killed_night(domain, "job begun")
    domain.daemon.virsh("domjobabort", domain.name)
    for name in domain.checkpoints():
        domain.daemon.virsh("checkpoint-delete", domain.name, name, "--metadata")
    domain.require_night("incremental", "incremental")
    domain.destroy()
    assert [len(bitmaps(image)) for image in domain.disks.values()] == [2, 2]
    domain.start()
    domain.require_night("incremental", "incremental")
    domain.destroy()
    assert [len(bitmaps(image)) for image in domain.disks.values()] == [1, 1]


def during(monkeypatch, domain: Domain, event: Callable[[], object]) -> None:
    """Have something happen once, when the job has begun and before a byte is read."""
    begin = Job.begin
    happened: list[object] = []

    def begin_and_more(job: Job) -> None:
        begin(job)
        if not happened:
            happened.append(True)
            event()

    monkeypatch.setattr(Job, "begin", begin_and_more)


def test_the_daemon_is_restarted_while_the_disks_are_read(domain, monkeypatch):
    begun(domain)
    during(monkeypatch, domain, domain.daemon.restart)
    domain.require_night("incremental", "incremental")


def test_a_second_run_of_a_domain_is_refused_before_it_asks_libvirt_for_checkpoints(domain, monkeypatch, tmp_path):
    """libvirt 11.3 does not survive that while a backup begins."""
    begun(domain)
    ours, domain.repository = domain.repository, tmp_path / "other"
    second = domain.words("full")
    domain.repository = ours
    done = []
    during(monkeypatch, domain, lambda: done.append(call_pybackup(second)))
    domain.require_night("incremental", "incremental")
    [refused] = done
    assert (refused.rc, "another run of pybackup uses domain" in refused.stderr) == (11, True), refused
    assert call_pybackup(second).rc == 0


def quit_qemu(domain: Domain) -> None:
    """QEMU ends by itself, as after a guest has powered off."""
    domain.daemon.virsh("qemu-monitor-command", domain.name, "--hmp", "quit", fails=True)
    wait_until(lambda: domain.state != "running", "the end of the domain")


@pytest.mark.parametrize("how", ["destroy", "kill", "quit", "domjobabort"])
def test_what_ends_the_job_while_the_disks_are_read_fails_the_run_and_nothing_else(domain, monkeypatch, how):
    begun(domain)
    events = {
        "destroy": domain.destroy,
        "kill": domain.kill_qemu,
        "quit": lambda: quit_qemu(domain),
        "domjobabort": lambda: domain.daemon.virsh("domjobabort", domain.name),
    }
    during(monkeypatch, domain, events[how])
    done = domain.night()
    assert (done.rc, done.stderr.count("\n")) == (13, 2), done
    assert ("was shut off while" in done.stderr) == (how != "domjobabort"), done
    assert (domain.checkpoints(), domain.leftovers()) == ([], [])
    kind = "rescan" if how == "kill" else "incremental"
    if how != "domjobabort":
        if how == "kill":
            domain.require_night("rescan", "rescan")
            return
        domain.start()
    domain.require_night(kind, kind)


POWERS_OFF_AT_A_KEY = bytes.fromhex("31c0 cd16 ba0406 b80020 ef f4 ebfd")
"""Code of a boot sector: read a key by the BIOS, and write S5 to the control register of Q35's power management."""
PRESERVING = 11_010_000
"""The first libvirt that keeps a domain whose guest powers off until its backup job ends."""


@pytest.fixture
def guest(daemon, tmp_path):
    """A domain whose guest is a boot sector, which powers off when a key is pressed."""
    domain = Domain.of(daemon, tmp_path / "repo", "t1", "vda", "vdb")
    domain.features = "<features><acpi/></features>"
    make_bootable(domain.disks["vda"], POWERS_OFF_AT_A_KEY)
    yield domain.define().start()
    domain.remove()


def power_off(domain: Domain) -> None:
    """Press the key until the guest has powered off; before it boots, nothing is there that reads the key."""

    def pressed() -> bool:
        domain.daemon.virsh("send-key", domain.name, "KEY_ENTER", fails=True)
        return domain.state != "running"

    wait_until(pressed, "the end of the guest")


def test_a_guest_that_powers_off_while_the_disks_are_read(guest, monkeypatch):
    with guest.daemon.connected() as connection:
        preserves = connection.getLibVersion() >= PRESERVING
    begun(guest)
    held = guest.hold()
    during(monkeypatch, guest, lambda: power_off(guest))
    done = guest.night()
    if preserves:
        assert (done.rc, [disk["kind"] for disk in done.machine["disks"]]) == (0, ["incremental", "incremental"]), done
        guest.require_holds(str(done.machine["point"]), held)
    else:
        assert (done.rc, "was shut off while" in done.stderr) == (13, True), done
    wait_until(lambda: guest.state == "shut off", "the end of the domain")
    assert (guest.checkpoints(), guest.leftovers()) == ([], [])
    guest.require_night("incremental", "incremental")


def test_a_job_that_someone_ends_when_all_was_read_fails_the_run(domain, monkeypatch):
    """The reads went well, and yet may not be of the instant."""
    begun(domain)
    require = Job.require_sound

    def abort_and_require(job: Job) -> None:
        domain.daemon.virsh("domjobabort", domain.name)
        require(job)

    monkeypatch.setattr(Job, "require_sound", abort_and_require)
    done = domain.night()
    assert (done.rc, "job ended while disk vda was read" in done.stderr) == (13, True), done
    monkeypatch.undo()
    domain.require_night("incremental", "incremental")


def test_a_domain_that_ends_when_its_point_is_published_keeps_only_the_new_bitmaps(domain, monkeypatch):
    """libvirt removes no bitmaps of a domain that is off."""
    begun(domain)
    end = OurDomain.end_job

    def end_both(found: OurDomain) -> None:
        end(found)
        domain.destroy()

    monkeypatch.setattr(OurDomain, "end_job", end_both)
    done = domain.night()
    assert (done.rc, done.stderr, domain.checkpoints()) == (0, "", []), done
    assert [len(bitmaps(image)) for image in domain.disks.values()] == [1, 1]
    monkeypatch.undo()
    domain.require_night("incremental", "incremental")


@pytest.mark.parametrize("on", [True, False])
def test_a_domain_that_starts_or_stops_between_look_and_begin_is_an_error_and_no_wrong_point(domain, monkeypatch, on):
    begun(domain)
    if not on:
        domain.destroy()
    instant = Libvirt.instant

    def change_and_capture(host: Libvirt, *args, **keywords):
        if (domain.state == "running") == on:
            domain.destroy() if on else domain.start()
        return instant(host, *args, **keywords)

    monkeypatch.setattr(Libvirt, "instant", change_and_capture)
    done = domain.night()
    assert (done.rc, done.stderr.count("\n")) == (13, 2), done
    monkeypatch.undo()
    domain.require_night("incremental", "incremental")


def test_a_job_that_begins_after_our_look_is_refused_when_libvirts_wait_is_over(domain, monkeypatch):
    """Without the question beforehand, libvirt would let the run wait for half a minute, and then refuse."""
    begun(domain)
    monkeypatch.setattr(OurDomain, "job", lambda _domain: None)
    monkeypatch.setattr(OurDomain, "require_no_other_job", lambda _domain: None)
    begin_foreign_job(domain)
    done = domain.night()
    assert (done.rc, "busy with another job" in done.stderr) == (11, True), done
    monkeypatch.undo()
    assert domain.job()
    domain.daemon.virsh("domjobabort", domain.name)
    domain.require_night("incremental", "incremental")
