"""
Real firmware and a real TPM: UEFI (OVMF) that has written its variables, and swtpm, whose keys no other TPM has.

The daemon is the system's, and pybackup runs where the daemon is, as on a host: both find the files in libvirt's
folders.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from domains import Domain, SystemDaemon, daemon_of, wait_until
from lab import PYBACKUP, call_pybackup, run
from places import create_repository
from test_domain_system import require_system

FIRMWARES = "/usr/share/qemu/firmware"
TEMPLATE = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
NVRAM = "/var/lib/libvirt/qemu/nvram"
TPM = "/var/lib/libvirt/swtpm/{}/tpm2/tpm2-00.permall"
BOOT = 240.0
"""Seconds that an emulated machine may take until its firmware has written a variable; about fifteen when idle."""
READ_EK = bytes.fromhex("80010000000e0000017381010001")
"""TPM2_ReadPublic of the endorsement key, which swtpm makes for each TPM anew."""


@pytest.fixture(scope="module")
def system():
    require_system()
    if not TEMPLATE.exists() or not any(Path(FIRMWARES).glob("*.json")):
        pytest.skip("the firmware is missing: apt-get install ovmf")
    if shutil.which("swtpm") is None or shutil.which("swtpm_setup") is None:
        pytest.skip("the TPM is missing: apt-get install swtpm swtpm-tools")
    with daemon_of(SystemDaemon) as daemon:
        yield daemon


@pytest.fixture
def machine(system, tmp_path):
    """A domain whose firmware libvirt chooses, as virt-install and virt-manager define it, with a TPM."""
    domain = Domain.of(system, tmp_path / "repo", "uefi1", "vda")
    create_repository(domain.repository)
    domain.features = "<features><acpi/></features>"
    domain.memory = 256
    domain.devices = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    domain.os = "<firmware><feature enabled='no' name='secure-boot'/></firmware>"
    definition = domain.xml.read_text().replace("<os>", "<os firmware='efi'>")
    with system.connected() as connection:
        connection.defineXML(definition)
    yield domain
    for name in (domain.name, "new"):
        system.virsh("destroy", name, fails=True)
        system.virsh("undefine", "--nvram", name, fails=True)


def inside(domain: Domain, path: str) -> Path:
    """A file of the daemon's mount namespace, as the tests see it."""
    return domain.daemon.place / "lib" / Path(path).relative_to("/var/lib/libvirt")


def on_the_host(domain: Domain, *words: str | Path) -> tuple[object, str]:
    """Run pybackup where the daemon is; its JSON, and what it said."""
    command = [*domain.daemon.inside, PYBACKUP, *words, "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout), done.stderr


def backed_up(domain: Domain) -> tuple[dict[str, Path], str]:
    """Make a point; the machine's files in it by role, and what the run said."""
    words = ["incremental", "--bitmap", "b1", "--repo", domain.repository]
    [machine], said = on_the_host(domain, *words, "--libvirt", "qemu:///system", "--domain", domain.name)
    folder = domain.repository / domain.name
    files = {file["role"]: folder / file["file"] for file in domain.point(machine["point"])["machine_files"]}
    return files, said


@contextmanager
def tpm_of(state: Path):
    """A TPM with a copy of this state: what answers a command."""
    with tempfile.TemporaryDirectory(prefix="tpm-", dir="/tmp") as place:
        shutil.copy(state, Path(place, "tpm2-00.permall"))
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={place}", "--flags", "startup-clear"]
        command += ["--server", f"type=unixio,path={place}/tpm", "--ctrl", f"type=unixio,path={place}/control"]
        process = subprocess.Popen([*command, "--terminate"], stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: Path(place, "tpm").exists(), "the TPM")
            yield Path(place, "tpm")
        finally:
            process.kill()
            process.wait()


def endorsement_key(state: Path) -> bytes:
    with tpm_of(state) as address, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(address))
        connection.sendall(READ_EK)
        answer = connection.recv(4096)
    assert answer[6:10] == bytes(4), answer  # TPM_RC_SUCCESS
    return answer


def chosen_variables(domain: Domain, name: str) -> str:
    [line] = [line for line in domain.daemon.virsh("dumpxml", name).splitlines() if "</nvram>" in line]
    return line.split(">")[1].split("<")[0]


@pytest.mark.timeout(600)
def test_a_machine_with_uefi_and_a_tpm_comes_back_with_its_variables_and_its_keys(machine, tmp_path):
    virsh = machine.daemon.virsh
    variables = inside(machine, f"{NVRAM}/{machine.name}_VARS.fd")
    state = inside(machine, TPM.format(virsh("domuuid", machine.name)))
    machine.start()
    wait_until(lambda: variables.read_bytes() != TEMPLATE.read_bytes(), "the firmware's first variable", BOOT)

    files, said = backed_up(machine)  # on
    assert set(files) == {"definition", "nvram"}
    assert "the state of the TPM is not in the point: swtpm can change it" in said
    assert files["nvram"].read_bytes() != TEMPLATE.read_bytes()

    machine.destroy()
    files, said = backed_up(machine)  # off
    assert (set(files), said) == ({"definition", "nvram", "tpm"}, "")
    run("cmp", files["nvram"], variables)
    run("cmp", files["tpm"], state)
    key = endorsement_key(state)

    second = tmp_path / "second"
    assert call_pybackup(["init", second, "--copy-of", machine.repository]).rc == 0
    on_the_host(machine, "copy", machine.name, second, "--repo", machine.repository)
    on_the_host(machine, "verify", "--repo", second)
    folder = machine.folder / "back"
    words = ["restore", machine.name, f"{folder}/", "--repo", second, "--define", "--name", "new"]
    restored, _ = on_the_host(machine, *words, "--libvirt", "qemu:///system")
    new_state = inside(machine, TPM.format(virsh("domuuid", "new")))
    assert [note for note in restored["notes"] if "the state of the TPM is in place: /var/lib/libvirt/swtpm/" in note]
    run("cmp", new_state, state)
    run("cmp", folder / "new.nvram", variables)

    machine.start()
    virsh("start", "new")  # beside the original
    assert virsh("domstate", "new") == "running"
    assert chosen_variables(machine, "new") == str(folder / "new.nvram")
    virsh("destroy", "new")
    machine.destroy()
    assert (folder / "new.nvram").read_bytes() != TEMPLATE.read_bytes()
    assert endorsement_key(new_state) == endorsement_key(state) == key
    assert os.stat(new_state).st_uid == os.stat(state).st_uid


def test_the_state_of_a_tpm_is_never_put_over_another_one(machine):
    """For example that of a machine that was undefined with --keep-tpm."""
    machine.start()
    machine.destroy()
    backed_up(machine)
    virsh, uuid = machine.daemon.virsh, machine.daemon.virsh("domuuid", machine.name)
    state = inside(machine, TPM.format(uuid))
    virsh("undefine", "--nvram", machine.name)
    assert not state.exists()
    state.parent.mkdir(parents=True)
    state.write_bytes(b"another one")
    words = ["restore", machine.name, f"{machine.folder / 'back'}/", "--repo", machine.repository, "--define"]
    restored, _ = on_the_host(machine, *words, "--libvirt", "qemu:///system")
    [note] = restored["notes"]
    assert "is not in place yet" in note
    assert "File exists" in note
    assert state.read_bytes() == b"another one"
    subprocess.run([*machine.daemon.inside, "sh", "-c", note.rpartition("as root: ")[2]], check=True)
    assert state.read_bytes() == (machine.folder / "back/uefi1.tpm").read_bytes()
    virsh("start", machine.name)
    assert machine.state == "running"
