"""libvirtd of the system: QEMU runs as libvirt-qemu, and libvirt gives it the images while the domain is on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from domains import QEMU_USER, Domain, SystemDaemon, daemon_of
from lab import PYBACKUP, init, put_in_front, run


def require_system() -> None:
    """Skip the test where no libvirtd of the system can be started."""
    pytest.importorskip("libvirt", reason="python3-libvirt is missing: tools/setup libvirt")
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("only root starts the libvirtd of a system")
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")


@pytest.fixture(scope="module")
def system():
    require_system()
    with daemon_of(SystemDaemon) as daemon:
        yield daemon


@pytest.fixture
def owned(system, tmp_path):
    domain = Domain.of(system, tmp_path / "repo", "sys1", "vda", "vdb").define().start()
    yield domain
    domain.remove()


def test_nights_of_a_domain_whose_qemu_runs_as_another_user(owned):
    assert owned.disks["vda"].stat().st_uid == QEMU_USER
    assert Path(f"/proc/{owned.pid}").stat().st_uid == QEMU_USER
    owned.io("vda", "write -P 7 1M 64k")
    owned.require_night("full", "full")
    owned.io("vdb", "write -P 8 1M 64k")
    owned.require_night("incremental", "incremental")
    owned.destroy()
    owned.require_night("incremental", "incremental")
    owned.start()
    owned.io("vdb", "write -P 9 1M 64k")
    owned.require_night("incremental", "incremental")


def test_the_socket_lies_in_the_domains_own_folder_where_security_modules_allow_it(owned):
    """As on a host: pybackup is where the daemon is, and names qemu:///system."""
    words = ["full", "--repo", owned.repository, "--libvirt", "qemu:///system", "--domain", owned.name, "--json"]
    init(words)
    folder = next(iter(owned.daemon.place.glob(f"lib/qemu/domain-*-{owned.name}")))
    trace = owned.folder / "trace"
    command = [*owned.daemon.inside, "strace", "-f", "-e", "trace=connect", "-o", trace, PYBACKUP, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done
    assert f"/var/lib/libvirt/qemu/{folder.name}/pybackup-" in trace.read_text()
    point = json.loads(done.stdout)[0]["point"]
    owned.require_holds(point, owned.hold())
    assert owned.leftovers() == []


def test_a_killed_run_in_the_domains_folder_is_mended(owned):
    words = ["full", "--repo", owned.repository, "--libvirt", "qemu:///system", "--domain", owned.name]
    init(words)
    from kills import DRIVER

    spec = "backup.sources.libvirt_domain Domain.begin_job after 1 9"
    command = [*owned.daemon.inside, PYBACKUP.with_name("python"), "-c", DRIVER, spec, *words]
    subprocess.run(command, check=False, capture_output=True, timeout=100)
    assert owned.job()
    owned.require_night("full", "full")
    run("virsh", "-q", "-c", owned.daemon.uri, "domstate", owned.name)


def test_libvirt_9_does_not_give_the_raw_file_behind_a_qcow2_to_qemus_user(system, tmp_path):
    domain = Domain.of(system, tmp_path / "repo", "sys4", "vda")
    raw, image = domain.folder / "vda.raw", domain.disks["vda"]
    run("qemu-img", "convert", "-q", "-f", "qcow2", "-O", "raw", image, raw)
    image.unlink()
    put_in_front(image, raw, domain.size)
    raw.chmod(0o600)
    try:
        domain.define()
        said = system.virsh("start", domain.name, fails=True)
        if "error" in said:  # a newer libvirt may look for the data file in the image
            assert f"Could not open '{raw}': Permission denied" in said
            os.chown(raw, QEMU_USER, QEMU_USER)
            domain.start()
        domain.require_night("full", options=["--trust-data-file"])
        domain.io("vda", "write -P 7 1M 64k")
        domain.require_night("incremental", options=["--trust-data-file"])
        domain.destroy()
        domain.require_night("incremental", options=["--trust-data-file"])
    finally:
        domain.remove()
