"""The machine itself: its definition and its firmware's variables with each point, and back as a domain that starts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from domains import Domain, wait_until
from lab import MIB, call_pybackup, run

FLASH = 4 * MIB
PASSWORD = "hidden-1"


@pytest.fixture
def flashed(daemon, tmp_path):
    """A domain of two disks with a firmware in flash, whose variables QEMU has open; and a drive and a password."""
    domain = Domain.of(daemon, tmp_path / "repo", "t9", "vda", "vdb")
    code, variables = domain.folder / "code.fd", domain.folder / "vars.fd"
    code.write_bytes(bytes(FLASH))  # no program: the guest does nothing
    variables.write_bytes(os.urandom(FLASH))
    for path in (code, variables):
        path.chmod(0o644 if path == code else 0o600)
        daemon.give(path)
    domain.os = f"<loader readonly='yes' type='pflash'>{code}</loader><nvram>{variables}</nvram>"
    domain.features = "<features><acpi/></features>"
    domain.devices = (
        f"<graphics type='vnc' passwd='{PASSWORD}'><listen type='socket'/></graphics>"
        "<interface type='user'><mac address='52:54:00:12:34:56'/><model type='virtio'/></interface>"
        "<disk type='file' device='cdrom'><source file='/nowhere/installer.iso' startupPolicy='optional'/>"
        "<target dev='sda' bus='sata'/><readonly/></disk>"
    )
    yield domain.define()
    domain.remove()
    for name in ("new", "t9"):
        daemon.virsh("destroy", name, fails=True)
        daemon.virsh("undefine", "--nvram", name, fails=True)


def variables(domain: Domain) -> Path:
    return domain.folder / "vars.fd"


def restored(domain: Domain, *options: str | Path, code: int = 0):
    target = domain.folder / "back"
    done = call_pybackup(["restore", domain.name, f"{target}/", "--repo", domain.repository, "--json", *options])
    assert done.rc == code, done
    for path in (target, *target.iterdir()) if target.exists() else ():
        domain.daemon.give(path)
    return done


def definition(domain: Domain) -> str:
    done = call_pybackup(["show", domain.name, "--definition", "--repo", domain.repository])
    assert done.rc == 0, done
    return done.stdout


def fact(text: str, path: str, attribute: str | None = None) -> str | None:
    element = ET.fromstring(text).find(path)
    return None if element is None else element.text if attribute is None else element.get(attribute)


def test_the_definition_and_the_firmwares_variables_are_in_each_point_on_and_off(flashed):
    for on in (True, False):
        if on:
            flashed.start()
        else:
            flashed.destroy()
        done = flashed.night("incremental")
        assert done.rc == 0, done
        point = flashed.point(str(done.machine["point"]))
        assert [file["role"] for file in point["machine_files"]] == ["definition", "nvram"]
        text = definition(flashed)
        assert text == flashed.daemon.virsh("dumpxml", "--inactive", flashed.name) + "\n"
        assert PASSWORD not in text
        assert PASSWORD in flashed.daemon.virsh("dumpxml", "--inactive", "--security-info", flashed.name)
        kept = flashed.repository / flashed.name / point["machine_files"][1]["file"]
        run("cmp", kept, variables(flashed))
        with variables(flashed).open("r+b") as file:  # the next point has other variables
            file.write(os.urandom(4096))


def test_a_restored_machine_is_defined_by_virsh_and_starts_after_the_original_is_gone(flashed):
    flashed.start()
    flashed.io("vda", "write -P 7 1M 64k")
    held = flashed.hold()
    assert flashed.night("full").rc == 0
    flashed.destroy()
    original = flashed.daemon.virsh("domuuid", flashed.name)
    flashed.daemon.virsh("undefine", "--nvram", flashed.name)
    for path in flashed.disks.values():
        path.unlink()

    done = restored(flashed, "--format", "qcow2")
    roles = {file["role"]: Path(file["target"]) for file in done.document["machine_files"]}
    assert roles["definition"] == flashed.folder / "back/t9.xml"
    flashed.daemon.virsh("define", roles["definition"])
    assert flashed.daemon.virsh("domuuid", flashed.name) == original
    flashed.start()
    assert flashed.state == "running"
    for target in ("vda", "vdb"):
        image = flashed.folder / f"back/{target}.qcow2"
        assert str(image) in flashed.daemon.virsh("domblklist", flashed.name)
        run("qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", image, held[target])
    assert fact(flashed.daemon.virsh("dumpxml", flashed.name), "./os/nvram") == str(roles["nvram"])
    assert "sda" in flashed.daemon.virsh("domblklist", flashed.name)  # the drive is empty now


def test_a_restored_machine_is_defined_beside_the_original_as_another_one(flashed):
    flashed.start()
    assert flashed.night("full").rc == 0
    kept = variables(flashed).read_bytes()

    refused = restored(flashed, "--define", "--libvirt", flashed.daemon.uri, code=2)
    assert "has a domain t9 already" in refused.stderr
    assert not (flashed.folder / "back").exists()

    done = restored(flashed, "--define", "--name", "new", "--libvirt", flashed.daemon.uri)
    assert done.document["defined"] == "new"
    before = flashed.daemon.virsh("dumpxml", flashed.name)
    after = flashed.daemon.virsh("dumpxml", "new")
    for path, attribute in (("./uuid", None), ("./devices/interface/mac", "address"), ("./os/nvram", None)):
        one, other = fact(before, path, attribute), fact(after, path, attribute)
        assert None not in (one, other)
        assert one != other, path
    assert not set(re.findall(r"file='([^']*/vd[ab][^']*)'", before)) & set(re.findall(r"file='([^']*)'", after))
    nvram = flashed.folder / "back/new.nvram"
    assert nvram.read_bytes() == kept
    flashed.daemon.virsh("start", "new")  # while the original runs
    assert flashed.daemon.virsh("domstate", "new") == "running"
    assert flashed.state == "running"

    again = restored(flashed, "--define", "--name", "new", "--libvirt", flashed.daemon.uri, code=2)
    assert "exists" in again.stderr  # the files


def test_an_excluded_disk_is_not_shared_with_the_original(flashed):
    assert flashed.night("full", "--exclude", "vdb").rc == 0
    done = restored(flashed, "--name", "new")
    text = (flashed.folder / "back/new.xml").read_text()
    assert [disk.find("target").get("dev") for disk in ET.fromstring(text).iterfind("./devices/disk")] == ["vda", "sda"]
    assert any("disk vdb is not in the point" in note for note in done.document["notes"])
    assert str(flashed.disks["vdb"]) not in text


def test_variables_that_cannot_be_read_are_a_warning_and_the_point_is_there(flashed):
    outside = variables(flashed)
    outside.unlink()
    os.mkfifo(outside)
    done = flashed.night("full")
    assert (done.rc, "vars.fd is not a plain file" in done.stderr) == (3, True), done
    assert [file["role"] for file in flashed.point("")["machine_files"]] == ["definition"]
    outside.unlink()
    outside.symlink_to("/etc/shadow")
    done = flashed.night("incremental")
    assert (done.rc, "it is a link" in done.stderr) == (3, True), done
    outside.unlink()
    done = flashed.night("incremental")
    assert (done.rc, "libvirt makes the file at the first start" in done.stderr) == (0, True), done
    restored(flashed)
    text = (flashed.folder / "back/t9.xml").read_text()
    assert fact(text, "./os/nvram") is None  # libvirt makes new ones from its template


def test_a_transient_domain_has_a_definition_too(daemon, tmp_path):
    domain = Domain.of(daemon, tmp_path / "repo", "t9", "vda").create()
    try:
        assert domain.night("full").rc == 0
        domain.destroy()
        wait_until(lambda: "t9" not in daemon.virsh("list", "--all", "--name"), "its end")
        restored(domain, "--define", "--libvirt", daemon.uri)
        domain.start()
        assert "file='" + str(domain.folder / "back/vda.raw") in daemon.virsh("dumpxml", "t9")
    finally:
        domain.remove()


def test_a_damaged_definition_never_keeps_the_disks_from_being_restored(flashed):
    assert flashed.night("full").rc == 0
    [kept] = flashed.repository.glob("t9/*.xml")
    kept.write_bytes(kept.read_bytes().replace(b"t9", b"t8"))
    done = restored(flashed, code=12)
    assert done.document["error"]["code"] == 12
    assert sorted(os.listdir(flashed.folder / "back")) == ["t9.nvram", "vda.raw", "vdb.raw"]
    refused = restored(flashed, "--define", "--force", "--libvirt", flashed.daemon.uri, code=12)
    assert "is not the file that the manifest describes" in refused.stderr
