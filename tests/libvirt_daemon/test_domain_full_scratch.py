"""
A scratch folder that fills up while a guest writes: the device stops the guest, and the guest goes on after the backup.

The guest is a boot sector that has the firmware write to its disk for ever, and so is stopped as every guest is: by
QEMU, when the device's write fails for lack of space.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import Domain, make_bootable, wait_until
from kills import DRIVER
from lab import MIB, Result, call_pybackup, init, run

from backup.sources import libvirt_job
from backup.sources.libvirt_domain import Domain as OurDomain

pytestmark = pytest.mark.timeout(300)
FIRST, END = 2048, 14336
"""The sectors that the guest writes again and again: 6 MiB."""
CODE = bytes.fromhex(
    "31c0 8ed8 8ec0 8ed0 bc007c fc"  # all segments 0, the stack below the code, strings go up
    "ff06 447c a1 447c bf0080 b90040 f3ab"  # next: count up, and fill 32 KiB at 0x8000 with the count
    "be 467c b443 b000 b280 cd13"  # have the firmware write what the packet says to the first disk
    "8306 4e7c 40 813e 4e7c 0038 72d9"  # the next 64 sectors; on to `next` before END
    "c706 4e7c 0008 ebd1"  # begin again at FIRST
)
PACKET = bytes.fromhex("1000 4000 0080 0000") + FIRST.to_bytes(8, "little")
"""What the firmware is to write: 64 sectors, from 0x8000, to this sector."""


def written(domain: Domain) -> int:
    """How many bytes the guest has written to vda."""
    with domain.found() as found:
        return int(found.blockStats("vda")[3])


def require_writing(domain: Domain, size: int = MIB) -> None:
    before = written(domain)
    wait_until(lambda: written(domain) >= before + size, "writes of the guest")


@pytest.fixture
def writer(daemon, tmp_path) -> Iterator[Domain]:
    """A running domain whose guest has overwritten its 6 MiB at least once."""
    domain = Domain.of(daemon, tmp_path / "repo", "w1", "vda", "vdb")
    make_bootable(domain.disks["vda"], CODE, bytes(2) + PACKET)
    domain.define().start()
    try:
        require_writing(domain, (END - FIRST) * 512)
        yield domain
    finally:
        domain.remove()


@pytest.fixture
def scratch(daemon) -> Iterator[Path]:
    """A file system with less room than the guest overwrites."""
    folder = daemon.place / "scratch"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=777", "none", folder]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        run("umount", "-l", folder)
        folder.rmdir()


def words(domain: Domain, scratch: Path, folder: Path, limit: str = "1M") -> list[str | Path]:
    """A slow incremental, without a reserve that would end it before the scratch folder is full."""
    config = folder / "c.yaml"
    config.write_text("scratch_reserve: 0\n")
    return ["--config", config, *domain.words("incremental", "--scratch", scratch, "--limit", "200K")]


def paused_night(domain: Domain, *kinds: str) -> None:
    """A night while the guest is suspended: what the point must hold does not change meanwhile."""
    domain.daemon.virsh("suspend", domain.name)
    domain.require_night(*kinds)
    domain.daemon.virsh("resume", domain.name)


def require_nothing_left(domain: Domain, scratch: Path) -> None:
    assert (domain.job(), domain.checkpoints(), list(scratch.iterdir())) == ("", [], [])
    assert domain.state == "running"
    require_writing(domain)


@pytest.mark.parametrize("seen", [True, False])
def test_a_guest_that_the_full_scratch_folder_stopped_goes_on_and_the_run_fails(
    writer, scratch, tmp_path, monkeypatch, seen
):
    """Also where the free space does not tell, under a quota for example."""
    paused_night(writer, "full", "full")
    resumed = []
    resume = OurDomain.resume

    def resume_and_tell(found: OurDomain) -> None:
        resumed.append(found.lacks_space())
        resume(found)

    monkeypatch.setattr(OurDomain, "resume", resume_and_tell)
    free_bytes = libvirt_job.free_bytes

    def free_bytes_later(folder: Path) -> int:
        wait_until(lambda: writer.state == "paused", "the stop of the guest")
        return free_bytes(folder) if seen else 1 << 40

    monkeypatch.setattr(libvirt_job, "free_bytes", free_bytes_later)
    monkeypatch.setattr(libvirt_job, "_LOOKS_PER_QUESTION", 1)
    require_writing(writer, (END - FIRST) * 512)  # all of it is read, so slowly that the guest fills the folder before
    done: Result = call_pybackup(words(writer, scratch, tmp_path, limit="256K"))
    assert (done.rc, done.stderr.count("\n"), resumed) == (13, 2, [True]), done
    assert (f"{scratch} ran out of space" if seen else "QEMU stopped the guest") in done.stderr
    require_nothing_left(writer, scratch)
    paused_night(writer, "incremental", "incremental")


def test_a_guest_that_a_killed_runs_scratch_folder_stopped_goes_on_with_the_next_run(writer, scratch, tmp_path):
    """Also if the folder has room again by then."""
    paused_night(writer, "full", "full")
    command = words(writer, scratch, tmp_path)
    init(command)
    step = "backup.sources.libvirt_job Job.open after 1 9"
    killed = subprocess.run([sys.executable, "-c", DRIVER, step, *map(str, command)], check=False, timeout=100)
    assert killed.returncode == -9
    wait_until(lambda: writer.state == "paused", "the stop of the guest")
    run("mount", "-o", "remount,size=64m", scratch)
    command[command.index("--limit") + 1] = "100M"
    done = call_pybackup(command)
    assert (done.rc, "a stop of the guest" in done.stderr) == (0, True), done
    require_nothing_left(writer, scratch)
    paused_night(writer, "incremental", "incremental")
