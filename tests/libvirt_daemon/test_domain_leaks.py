"""Nights that are killed, stopped or cut off: what a run makes in QEMU and on the host is gone after the next one."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from domains import Domain, wait_until
from kills import DRIVER
from lab import init

from backup.qemu import folders
from backup.sources.libvirt_job import Job

DOMAIN, JOB = "backup.sources.libvirt_domain", "backup.sources.libvirt_job"


def killed(domain: Domain, step: str, number: int) -> None:
    words = domain.words("incremental")
    init(words)
    command = [sys.executable, "-c", DRIVER, f"{step} 1 {int(number)}", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode in {-number, 128 + number}, done


def aborted(domain: Domain) -> None:
    """Another program ends the job while the disks are read."""
    begin = Job.begin

    def begin_and_abort(job: Job) -> None:
        begin(job)
        domain.daemon.virsh("domjobabort", domain.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "begin", begin_and_abort)
        assert domain.night().rc == 13


FAILURES: list[Callable[[Domain], None]] = [
    lambda domain: killed(domain, f"{DOMAIN} Domain.begin_job after", signal.SIGKILL),
    lambda domain: killed(domain, f"{JOB} Job.open after", signal.SIGKILL),
    lambda domain: killed(domain, f"{JOB} Job.open after", signal.SIGTERM),
    lambda domain: killed(domain, f"{DOMAIN} Domain.end_job after", signal.SIGKILL),
]


def in_qemu(domain: Domain) -> Counter[str]:
    """What a run may leave in QEMU, counted: the names of libvirt's nodes count up."""
    nodes = domain.qmp("query-named-block-nodes", flat=True)
    return Counter(
        [
            *(f"node {node['drv']}" for node in nodes),
            *(f"bitmap of {node['drv']}" for node in nodes for _ in node.get("dirty-bitmaps", ())),
            *(f"export {export['id']}" for export in domain.qmp("query-block-exports")),
            *(f"job {job['device']}" for job in domain.qmp("query-block-jobs")),
            *descriptors(domain.pid),
        ]
    )


def on_the_host(domain: Domain) -> Counter[str]:
    """What a run may leave beside QEMU, counted; what only an exception's traceback still holds is none of it."""
    gc.collect()
    listed = subprocess.run(["pgrep", "-P", str(os.getpid()), "qemu-nbd"], check=False, capture_output=True, text=True)
    return Counter(
        [
            *descriptors("self"),
            *(f"thread {thread.name}" for thread in threading.enumerate()),
            *map(str, domain.daemon.place.glob("**/pybackup-*")),
            *(f"qemu-nbd {pid}" for pid in listed.stdout.split()),
        ]
    )


def descriptors(pid: int | str) -> Iterator[str]:
    """What the descriptors of a process are, without the numbers of sockets and pipes."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the listing
            yield f"descriptor of {os.readlink(link).partition(':[')[0]}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("iothreads", [False, True])
def test_nights_that_fail_in_every_way_leave_nothing(daemon, tmp_path, monkeypatch, iothreads):
    monkeypatch.setenv("TMPDIR", str(daemon.place))
    monkeypatch.setattr(tempfile, "tempdir", str(daemon.place))
    monkeypatch.setattr(folders, "_YOUNG", 0.0)  # nothing else makes folders there
    domain = Domain.of(daemon, tmp_path / "repo", "leaks", "vda", "vdb")
    domain.iothreads = iothreads
    domain.define().start()
    failures = FAILURES[:2] if iothreads else [*FAILURES, aborted]
    try:
        domain.require_night("full", "full")
        before, around = in_qemu(domain), on_the_host(domain)
        for fail in failures:
            fail(domain)
            domain.require_night("incremental", "incremental")
        wait_until(lambda: not in_qemu(domain) - before, f"{in_qemu(domain)} and before {before}")
        wait_until(lambda: not on_the_host(domain) - around, f"{on_the_host(domain)} and before {around}")
        assert domain.job() == ""
    finally:
        domain.remove()
