"""
Domains with an iothread: QEMU 7.2 aborts when an NBD client leaves a disk with a thread of its own.

The machine survives any end of a run, and the next run is right.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from domains import Daemon, Domain, wait_until
from kills import DATA, DRIVER, Step
from lab import call_pybackup, init, run
from live import lost_in_the_handshake

from backup.model.names import MARKER
from backup.qmp import leftovers
from backup.qmp.clients import may_abort
from backup.repository.data_file_writer import PartFile
from backup.sources.libvirt_domain import Domain as OurDomain
from backup.sources.libvirt_job import Job

DOMAIN = "backup.sources.libvirt_domain"
CLIENTS, LEFTOVERS = "backup.qmp.clients", "backup.qmp.leftovers"
COPYING = Step(DATA, "PartFile.put", "after")
STEPS = [
    Step(DOMAIN, "Domain.begin_job", "after"),
    Step(DOMAIN, "Domain.pass_fd", "before", 2),  # a client that QEMU does not keep yet
    Step(DOMAIN, "Domain.pass_fd", "after", 1),  # a client in its handshake
    Step(CLIENTS, "Clients.dial", "after", 4),
    Step("backup.nbd.export", "Export._split_contexts", "after"),
    COPYING,
    Step("backup.repository.machine", "Machine.publish", "after"),
    Step(LEFTOVERS, "_close_connections", "before", 2),  # the exports have ended; the first is that of `recover`
    Step(LEFTOVERS, "_close_connections", "after", 2),
    Step(DOMAIN, "Domain.end_job", "before"),
]
VERSION = re.search(r"version ([0-9.]+)", run("qemu-system-x86_64", "--version"))
GUARDED = VERSION is not None and may_abort(VERSION[1])
guarded = pytest.mark.skipif(not GUARDED, reason="this QEMU keeps no ends of connections: it does not abort")


@pytest.fixture
def threaded(daemon: Daemon, tmp_path):
    """A running domain with a full: a virtio disk with a thread, and a SCSI disk whose controller has one."""
    domain = Domain.of(daemon, tmp_path / "repo", "t5", "vda", "sdb")
    domain.iothreads = True
    domain.shapes["sdb"] = (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{domain.disks['sdb']}'/>"
        "<target dev='sdb' bus='scsi'/></disk>"
    )
    domain.devices = "<controller type='scsi' index='0' model='virtio-scsi'><driver iothread='1'/></controller>"
    domain.define().start()
    domain.io("vda", "write -P 7 1M 64k")
    domain.require_night("full", "full")
    domain.io("vda", "write -P 8 2M 1M")
    yield domain
    domain.remove()


def monitor(domain: Domain, command: str, **arguments: str) -> dict[str, object]:
    import libvirt_qemu

    with domain.found() as found:
        line = json.dumps({"execute": command, "arguments": arguments})
        return dict(json.loads(libvirt_qemu.qemuMonitorCommand(found, line, 0)))


def require_alive(domain: Domain, pid: int) -> None:
    """Also a moment later: what QEMU closes, its iothread closes in its own time."""
    time.sleep(0.3)
    assert domain.state == "running"
    assert domain.pid == pid
    domain.io("vda", "write -P 9 4M 64k")


def require_nothing_kept(domain: Domain) -> None:
    short_id = json.loads((domain.repository / MARKER).read_text())["id"][:8]
    for own in (f"pybackup-{short_id}-", "pybackup-00000000-"):
        assert "error" in monitor(domain, "closefd", fdname=leftovers.connection_name(own, 0))


def struck(domain: Domain, step: Step, number: int) -> None:
    words = domain.words("incremental")
    init(words)
    command = [sys.executable, "-c", DRIVER, step.spec(number), *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == (-number if number == signal.SIGKILL else 128 + number), done


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_domain_survives_a_run_that_ends_at_any_step(threaded, number):
    pid = threaded.pid
    steps = [
        step for step in STEPS if GUARDED or (step.module not in {CLIENTS, LEFTOVERS} and "pass_fd" not in step.name)
    ]
    for step in steps if number == signal.SIGKILL else [COPYING]:
        struck(threaded, step, number)
        require_alive(threaded, pid)
        threaded.io("vda", "write -P 10 5M 64k")
        threaded.require_night("incremental", "incremental")
        require_nothing_kept(threaded)
    require_alive(threaded, pid)


def test_looks_at_a_domain_leave_it_alive_and_nothing_in_qemu(threaded):
    pid = threaded.pid
    for look in (["incremental", "--dry-run"], ["audit"], ["full"]):
        done = threaded.night(*look)
        assert done.rc == 0, done
        require_alive(threaded, pid)
    bitmap = threaded.point("")["disks"][0]["bitmap"]["started"]
    source = ["--libvirt", threaded.daemon.uri, "--domain", threaded.name, "--disk", "vda"]
    done = call_pybackup(["map", *source, "--bitmap", bitmap, "--totals"])
    assert done.rc == 0, done
    require_alive(threaded, pid)
    require_nothing_kept(threaded)


def aborted(domain: Domain) -> None:
    domain.daemon.virsh("domjobabort", domain.name)


def restarted(domain: Domain) -> None:
    domain.daemon.restart()
    wait_until(lambda: domain.state == "running", "the daemon's connection to the domain")


@pytest.mark.parametrize(
    ("meanwhile", "step", "rc"),
    [
        # QEMU 7.2 may hang where somebody else ends the job while a read is in flight (docs/libvirt.md).
        (aborted, (Job, "require_sound"), 13),
        (restarted, (PartFile, "put"), 0),
    ],
)
def test_a_domain_survives_what_others_do_while_its_disks_are_open(
    threaded, monkeypatch, meanwhile: Callable[[Domain], None], step: tuple[type, str], rc: int
):
    pid, real, calls = threaded.pid, getattr(*step), []

    def first(*arguments: object, **keywords: object) -> object:
        if not calls:
            calls.append(meanwhile(threaded))
        return real(*arguments, **keywords)

    monkeypatch.setattr(*step, first)
    done = threaded.night()
    assert (done.rc, len(calls)) == (rc, 1), done
    require_alive(threaded, pid)
    threaded.require_night("incremental", "incremental")
    require_alive(threaded, pid)
    require_nothing_kept(threaded)


@guarded
def test_a_job_that_is_ended_while_a_client_is_in_its_handshake_does_not_hang_qemu(threaded):
    pid, began = threaded.pid, time.monotonic()
    with lost_in_the_handshake(Job, "_end_job"):
        done = threaded.night()
    assert (done.rc, "lost in the handshake" in done.stderr) == (13, True), done
    assert time.monotonic() - began < 20
    require_alive(threaded, pid)
    threaded.require_night("incremental", "incremental")
    require_nothing_kept(threaded)


@guarded
def test_clean_ends_the_job_of_a_killed_run_and_the_domain_goes_on(threaded):
    pid = threaded.pid
    struck(threaded, STEPS[2], signal.SIGKILL)
    assert threaded.job()
    words = ["clean", "--repo", threaded.repository, "--libvirt", threaded.daemon.uri, "--domain", threaded.name]
    done = call_pybackup(words)
    assert (done.rc, "backup job pybackup-" in done.stdout) == (0, True), done
    assert (threaded.job(), threaded.leftovers()) == ("", [])
    require_alive(threaded, pid)
    require_nothing_kept(threaded)


@guarded
@pytest.mark.parametrize("killed", [False, True])
def test_where_libvirt_passes_no_commands_nothing_is_begun_and_nothing_ended(threaded, monkeypatch, killed):
    pid = threaded.pid
    if killed:
        struck(threaded, COPYING, signal.SIGKILL)
    job = threaded.job()
    monkeypatch.setitem(sys.modules, "libvirt_qemu", None)
    done = threaded.night()
    assert (done.rc, "has an iothread" in done.stderr, "python3-libvirt" in done.stderr) == (13, True, True), done
    monkeypatch.undo()
    assert (threaded.job(), bool(job)) == (job, killed)
    require_alive(threaded, pid)


def test_a_domain_without_an_iothread_is_asked_nothing_through_its_monitor(domain, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(OurDomain, "_of_monitor", refuse)
    done = domain.night("full")
    assert done.rc == 0, done
    os.kill(domain.pid, 0)
