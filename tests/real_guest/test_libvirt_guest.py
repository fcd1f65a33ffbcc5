"""A real guest under libvirt: frozen through libvirt's agent channel, restored, defined anew and booted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from domains import Daemon, Domain, daemon_of, wait_until
from guest import MARKER, make_disks
from kills import DRIVER
from lab import init, run_pybackup


@pytest.fixture
def guest(system, tmp_path: Path):
    """A domain whose guest works on two disks, and whose agent is connected."""
    pytest.importorskip("libvirt", reason="python3-libvirt is missing: tools/setup libvirt")
    if shutil.which("libvirtd") is None:
        pytest.skip("libvirtd is missing: tools/setup libvirt")
    ballast = tmp_path / "ballast"
    ballast.write_bytes(os.urandom(1 << 20))
    with daemon_of(Daemon) as daemon:
        domain = Domain.of(daemon, tmp_path / "repo", "g1")
        for disk in make_disks(tmp_path, ballast):
            domain.disks[disk.path.stem] = Path(shutil.copy(disk.path, domain.folder))
        kernel, initrd = (shutil.copy(path, domain.folder) for path in (system.kernel, system.initrd))
        for path in domain.folder.iterdir():
            path.chmod(0o644)
            daemon.give(path)
        words = f"console=ttyS0 quiet panic=-1 random.trust_cpu=on no_timer_check mode=write marker={MARKER}"
        domain.os = f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{words}</cmdline>"
        domain.memory = 192
        domain.devices = (
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
            "<serial type='pty'><target port='0'/></serial>"
        )
        domain.define().start()
        wait_until(lambda: "state='connected'" in daemon.virsh("dumpxml", domain.name), "the agent", 240)
        yield domain
        domain.remove()


def frozen(domain: Domain) -> bool:
    said = domain.daemon.virsh("qemu-agent-command", domain.name, '{"execute":"guest-fsfreeze-status"}')
    return "frozen" in said


@pytest.mark.timeout(600)
def test_a_guest_is_frozen_for_the_begin_and_thawed_after_a_kill(guest):
    done = guest.night("full", "--freeze")
    assert (done.rc, "file systems were frozen for" in done.stderr) == (0, True), done
    assert [disk["source"]["consistency"] for disk in guest.point("")["disks"]] == ["filesystem", "filesystem"]
    assert not frozen(guest)

    words = guest.words("incremental", "--freeze")
    init(words)
    spec = f"backup.sources.libvirt_domain Domain.begin_job before 1 {int(signal.SIGKILL)}"
    killed = subprocess.run([sys.executable, "-c", DRIVER, spec, *map(str, words)], check=False, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert frozen(guest)

    done = guest.night("incremental", "--freeze")
    assert (done.rc, "a freeze of the guest's file systems" in done.stderr) == (0, True), done
    assert not frozen(guest)
    assert [disk["kind"] for disk in done.machine["disks"]] == ["incremental", "incremental"]


def mounted(domain: Domain, name: str) -> list[str]:
    """Where the guest of a domain has mounted file systems, as its agent tells."""
    said = domain.daemon.virsh("qemu-agent-command", name, '{"execute":"guest-get-fsinfo"}')
    return sorted(system["mountpoint"] for system in json.loads(said)["return"])


@pytest.mark.timeout(600)
def test_a_restored_machine_boots_as_a_new_domain_and_has_its_file_systems(guest):
    assert guest.night("full", "--freeze").rc == 0
    before = mounted(guest, guest.name)
    assert before
    guest.destroy()
    folder, virsh = guest.folder / "restored", guest.daemon.virsh
    words = ["restore", f"{guest.name}/latest", f"{folder}/", "--repo", guest.repository]
    done = run_pybackup([*words, "--define", "--name", "g2", "--libvirt", guest.daemon.uri])
    assert done.rc == 0, done
    folder.chmod(0o755)
    for path in folder.iterdir():
        guest.daemon.give(path)
    try:
        virsh("start", "g2")
        wait_until(lambda: "state='connected'" in virsh("dumpxml", "g2"), "the agent of the restored machine", 240)
        assert mounted(guest, "g2") == before
    finally:
        virsh("destroy", "g2", fails=True)
        virsh("undefine", "g2", fails=True)
