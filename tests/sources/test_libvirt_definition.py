"""How a domain's definition is changed for a restored machine, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from backup.sources import libvirt_state
from backup.sources.libvirt_definition import BadDefinition, Nvram, RestoredDisk, Tpm, read, rewrite
from backup.sources.libvirt_state import machine_state, tpm_file

UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
DEFINITION = f"""<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web1</name>
  <uuid>{UUID}</uuid>
  <genid>{UUID}</genid>
  <sysinfo type='smbios'><system><entry name='serial'>7</entry><entry name='uuid'>{UUID}</entry></system></sysinfo>
  <os><type machine='pc-q35-7.2'>hvm</type><loader readonly='yes' type='pflash'>/usr/share/OVMF_CODE.fd</loader>
    <nvram template='/usr/share/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/web1_VARS.fd</nvram></os>
  <devices>
    <disk type='block' device='lun' sgio='filtered' rawio='yes'>
      <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>
      <source dev='/dev/vg/web1'><reservations managed='yes'/></source>
      <target dev='sda' bus='scsi'/><boot order='1'/><serial>1</serial>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'><metadata_cache><max_size unit='bytes'>1</max_size></metadata_cache></driver>
      <source file='/images/vdb.qcow2'><encryption format='luks'/></source>
      <backingStore type='file'><format type='raw'/><source file='/images/base'/><backingStore/></backingStore>
      <target dev='vdb' bus='virtio'/><shareable/>
    </disk>
    <disk type='network' device='disk'><source protocol='rbd' name='p/x'/><target dev='vdc' bus='virtio'/></disk>
    <disk type='file' device='disk'><source file='/images/was'/><target dev='vdd' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/iso/a.iso'/><target dev='sdb' bus='sata'/><readonly/></disk>
    <disk type='file' device='cdrom'><target dev='sdc' bus='sata'/><readonly/></disk>
    <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/>
      <virtualport type='openvswitch'><parameters interfaceid='{UUID}'/></virtualport></interface>
    <channel type='unix'><source mode='bind' path='/run/web1.agent'/><target type='virtio' name='a'/></channel>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'><source type='dir' path='/tpm/web1'/></backend></tpm>
  </devices>
  <qemu:commandline><qemu:arg value='-s'/></qemu:commandline>
</domain>
"""
DISKS = {
    "sda": RestoredDisk("/back/sda.raw", "raw", "/dev/vg/web1"),
    "vdb": RestoredDisk("/back/vdb.qcow2", "qcow2", "/images/vdb.qcow2"),
    "data": RestoredDisk("/back/data.raw", "raw", "/images/was"),
    "vde": RestoredDisk("/back/vde.raw", "raw", "/images/hot"),
}


def rewritten(name: str | None = None, nvram: str | None = "/back/web1.nvram") -> tuple[ET.Element, tuple[str, ...]]:
    made = rewrite(DEFINITION, DISKS, nvram=nvram, name=name)
    return ET.fromstring(made.text), made.notes


def disk(root: ET.Element, target: str) -> ET.Element:
    [found] = [found for found in root.iterfind("./devices/disk") if found.find("target").get("dev") == target]
    return found


def test_disks_become_the_restored_files():
    root, notes = rewritten()
    lun = disk(root, "sda")
    assert lun.attrib == {"type": "file", "device": "disk"}
    assert [child.tag for child in lun] == ["driver", "source", "target", "boot", "serial"]
    assert lun.find("source").attrib == {"file": "/back/sda.raw"}
    assert list(lun.find("source")) == []
    assert lun.find("driver").attrib == {
        "name": "qemu", "type": "raw", "cache": "none", "io": "native", "discard": "unmap"
    }  # fmt: skip
    overlay = disk(root, "vdb")
    assert [child.tag for child in overlay] == ["driver", "source", "target"]  # no backing, no sharing of a qcow2
    assert overlay.find("driver").get("type") == "qcow2"
    assert disk(root, "vdd").find("source").get("file") == "/back/data.raw"  # known by its path
    assert disk(root, "vdd").find("driver").attrib == {"name": "qemu", "type": "raw"}
    assert len(notes) == 2
    assert "disk vdc is not in the point" in notes[0]
    assert "disk vde is in the point, and the definition has no such disk" in notes[1]
    assert "/images/" not in ET.tostring(root, encoding="unicode")


def test_drives_keep_a_medium_that_may_be_gone():
    root, _ = rewritten()
    assert disk(root, "sdb").find("source").attrib == {"file": "/iso/a.iso", "startupPolicy": "optional"}
    assert disk(root, "sdc").find("source") is None


def test_the_firmware_keeps_its_loader_and_gets_the_restored_variables():
    root, _ = rewritten()
    assert root.findtext("./os/loader") == "/usr/share/OVMF_CODE.fd"
    assert root.findtext("./os/nvram") == "/back/web1.nvram"
    assert root.find("./os/nvram").get("template") == "/usr/share/OVMF_VARS.fd"
    without, _ = rewritten(nvram=None)
    assert without.find("./os/nvram").text is None


def test_the_original_keeps_what_others_know_it_by_and_gets_a_new_generation():
    root, _ = rewritten()
    assert (root.findtext("./name"), root.findtext("./uuid")) == ("web1", UUID)
    assert root.find("./genid").text is None
    assert root.find("./devices/interface/mac").get("address") == "52:54:00:00:00:01"
    assert root.find("{http://libvirt.org/schemas/domain/qemu/1.0}commandline") is not None


def test_a_new_machine_shares_no_identity_with_the_original():
    root, _ = rewritten("web2")
    assert root.findtext("./name") == "web2"
    text = ET.tostring(root, encoding="unicode")
    for shared in (UUID, "52:54:00", "/run/web1.agent", "/tpm/web1", "web1_VARS"):
        assert shared not in text, shared
    assert root.findtext("./sysinfo/system/entry") == "7"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><domain>&b;</domain>", "document type"),
        ("<domain>", "not XML"),
        ("<network/>", "does not define a domain"),
        ("<domain>" + "<a>" * 5000 + "</a>" * 5000 + "</domain>", "nested too deeply"),
    ],
)
def test_what_is_no_definition_is_refused(text, why):
    with pytest.raises(BadDefinition, match=why):
        read(text)


def test_a_path_that_xml_cannot_express_is_refused():
    for path in ("/back/\x01", "/back/\udcff"):
        with pytest.raises(BadDefinition, match="XML cannot express"):
            rewrite(DEFINITION, {"sda": RestoredDisk(path, "raw", "")}, nvram=None, name=None)


def test_virt_xml_validate_accepts_what_is_written(tmp_path):
    schema = Path("/usr/share/libvirt/schemas/domain.rng")
    if not schema.exists() or subprocess.run(["which", "xmllint"], check=False, capture_output=True).returncode:
        pytest.skip("libvirt's schema or xmllint is missing")
    path = tmp_path / "web2.xml"
    path.write_text(rewrite(DEFINITION, DISKS, nvram="/back/web2.nvram", name="web2").text)
    subprocess.run(["xmllint", "--noout", "--relaxng", schema, path], check=True)


# What is read of a domain


def of_state(tmp_path: Path) -> str:
    text = DEFINITION.replace("/tpm/web1", str(tmp_path / "tpm"))
    return text.replace("/var/lib/libvirt/qemu/nvram/web1_VARS.fd", str(tmp_path / "vars"))


def test_the_state_of_a_tpm_is_kept_while_the_domain_is_off(tmp_path):
    assert read(of_state(tmp_path)).tpm == Tpm("emulator", "2.0", str(tmp_path / "tpm"))
    (tmp_path / "vars").write_bytes(b"variables")
    (tmp_path / "tpm").mkdir()
    (tmp_path / "tpm/tpm2-00.permall").write_bytes(b"state")
    off = machine_state(of_state(tmp_path), "qemu:///system", running=None)
    assert off.files == {"definition": of_state(tmp_path).encode(), "nvram": b"variables", "tpm": b"state"}
    assert (off.warnings, off.notes) == ((), ())
    on = machine_state(of_state(tmp_path), "qemu:///system", running=of_state(tmp_path))
    assert set(on.files) == {"definition", "nvram"}
    assert "the state of the TPM is not in the point: swtpm can change it" in on.notes[0]
    (tmp_path / "tpm/tpm2-00.permall").unlink()
    [note] = machine_state(of_state(tmp_path), "qemu:///system", running=None).notes
    assert "No such file" in note


def test_what_is_too_large_or_empty_is_not_kept_and_warned_of(tmp_path):
    for size in (0, (64 << 20) + 1):
        with (tmp_path / "vars").open("wb") as file:
            file.truncate(size)
        state = machine_state(of_state(tmp_path), "qemu:///system", running=None)
        assert set(state.files) == {"definition"}
        assert f"it has {size} bytes" in state.warnings[0]
    state = machine_state(f"<domain>{' ' * (4 << 20)}</domain>", "qemu:///system", running=None)
    assert state.files == {}
    assert "the domain's definition is in no point" in state.warnings[0]


def test_variables_in_a_qcow2_are_kept_only_while_the_domain_is_off(tmp_path):
    (tmp_path / "vars").write_bytes(b"QFI\xfb")
    text = of_state(tmp_path).replace("<nvram ", "<nvram format='qcow2' ")
    assert "nvram" in machine_state(text, "qemu:///system", running=None).files
    on = machine_state(text, "qemu:///system", running=text)
    assert ("nvram" in on.files, "QEMU keeps in memory" in on.warnings[0]) == (False, True)


CHOSEN = f"<domain><name>web1</name><uuid>{UUID}</uuid><os firmware='efi'><type>hvm</type></os></domain>"
"""Where libvirt chooses the firmware; libvirt 9.0 names the variables only in the XML of the running domain."""


def test_variables_that_the_definition_does_not_name_are_kept_on_and_off(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "libvirt/qemu/nvram"
    folder.mkdir(parents=True)
    named = CHOSEN.replace("<type>", f"<nvram>{tmp_path}/vars</nvram><type>").replace(" firmware='efi'", "")
    (tmp_path / "vars").write_bytes(b"on")
    assert machine_state(CHOSEN, "qemu:///session", running=named).files["nvram"] == b"on"
    [note] = machine_state(CHOSEN, "qemu:///session", running=None).notes
    assert f"there is no {folder}/web1_VARS.fd" in note
    (folder / "web1_VARS.fd").write_bytes(b"off")
    assert machine_state(CHOSEN, "qemu:///session", running=None).files["nvram"] == b"off"
    [note] = machine_state(CHOSEN, "qemu+unix:///system?socket=/elsewhere", running=None).notes
    assert "pybackup knows no local file" in note
    [note] = machine_state(CHOSEN, "qemu:///system?socket=/run/libvirt/virtqemud-sock", running=None).notes
    assert "there is no /var/lib/libvirt/qemu/nvram/web1_VARS.fd" in note


@pytest.mark.parametrize(
    ("within", "found"),
    [
        ("<os firmware='efi'/>", Nvram(None, "raw", unnamed=True)),
        ("<os firmware='efi'><loader stateless='yes'/></os>", None),
        ("<os firmware='bios'/>", None),
        ("<os><loader type='rom'>/usr/share/OVMF.fd</loader></os>", None),
        ("<os><nvram template='/t'/></os>", Nvram(None, "raw", unnamed=True)),
        ("<os><nvram type='network'><source protocol='iscsi'/></nvram></os>", Nvram(None, "raw")),
        ("<os><nvram type='file' format='qcow2'><source file='/v'/></nvram></os>", Nvram("/v", "qcow2")),
    ],
)
def test_what_a_definition_says_of_variables(within, found):
    assert read(f"<domain>{within}</domain>").nvram == found


def test_restored_variables_get_a_name_in_a_definition_that_had_none():
    machine = ET.fromstring(rewrite(CHOSEN, {}, nvram="/back/web1.nvram", name=None).text)
    assert machine.findtext("./os/nvram") == "/back/web1.nvram"
    assert machine.find("./os").get("firmware") == "efi"
    assert ET.fromstring(rewrite(CHOSEN, {}, nvram=None, name=None).text).find("./os/nvram") is None


@pytest.mark.parametrize(
    ("tpm", "path"),
    [
        (Tpm("emulator", "2.0", None), f"/var/lib/libvirt/swtpm/{UUID}/tpm2/tpm2-00.permall"),
        (Tpm("emulator", "1.2", None), f"/var/lib/libvirt/swtpm/{UUID}/tpm1.2/tpm-00.permall"),
        (Tpm("emulator", "2.0", "/tpm"), "/tpm/tpm2-00.permall"),
        (Tpm("emulator", "2.0", None, in_file=True), None),
        (Tpm("emulator", "3.0", None), None),
    ],
)
def test_where_swtpm_keeps_the_state_of_a_tpm(tpm, path):
    assert tpm_file(tpm, UUID, "qemu:///system") == (None if path is None else Path(path))
    assert tpm_file(Tpm("emulator", "2.0", None), None, "qemu:///system") is None
    assert tpm_file(Tpm("emulator", "2.0", None), UUID, "qemu:///session?socket=/elsewhere") is None


def test_a_file_that_changes_is_read_until_it_rests(tmp_path, monkeypatch):
    path = tmp_path / "vars"
    path.write_bytes(b"0")
    reads = []

    def read_and_change(role, name):
        content = reading(role, name)
        reads.append(content)
        if len(reads) < 30:
            path.write_bytes(b"%d" % len(reads))
        return content

    reading = libvirt_state._read
    monkeypatch.setattr(libvirt_state, "_read", read_and_change)
    monkeypatch.setattr(libvirt_state, "_PAUSE", 0)
    assert machine_state(of_state(tmp_path), "qemu:///system", running=of_state(tmp_path)).files["nvram"] == b"29"
    monkeypatch.setattr(libvirt_state, "_PATIENCE", 0)
    reads.clear()
    state = machine_state(of_state(tmp_path), "qemu:///system", running=of_state(tmp_path))
    assert (set(state.files), "kept changing" in state.warnings[0]) == ({"definition"}, True)
