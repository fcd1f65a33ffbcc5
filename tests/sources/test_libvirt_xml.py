"""libvirt's documents: what is read from a domain's, and what a job is told."""

from xml.etree import ElementTree as ET

import pytest

from backup.sources.libvirt_xml import (
    DomainDocument,
    JobDisk,
    RunningJob,
    backup_xml,
    bitmap_sizes,
    checkpoint_xml,
)

DOMAIN = """
<domain type='kvm' id='1'><name>web1</name><iothreads>1</iothreads><devices>
  <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/v/top.qcow2' index='1'/>
    <backingStore type='file'><format type='qcow2'/><source file='/v/mid.qcow2'/>
      <backingStore type='network'><source protocol='nbd' name='x'/><backingStore/></backingStore></backingStore>
    <target dev='vda' bus='virtio'/></disk>
  <disk type='block' device='disk'><driver name='qemu' type='raw' iothread='1'/><source dev='/dev/vg/lv'/>
    <backingStore/><target dev='vdb' bus='virtio'/><shareable/></disk>
  <disk type='network' device='disk'><driver type='raw'/><source protocol='rbd' name='pool/x'/>
    <target dev='vdc' bus='virtio'/></disk>
  <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
  <disk type='file' device='floppy'><source file='/v/f.img'/><target dev='fda' bus='fdc'/></disk>
  <disk type='file' device='disk'><driver type='qcow2'/><source file='/v/s'><encryption format='luks'/></source>
    <target dev='sdb' bus='scsi'/><address type='drive' controller='1'/></disk>
  <disk type='file' device='disk'><driver type='qcow2'/><source file='/v/t'/>
    <target dev='sdc' bus='scsi'/><address type='drive' controller='0'/><transient/></disk>
  <disk type='file' device='disk'><driver type='qcow2'><iothreads><iothread id='1'/></iothreads></driver>
    <source file='/v/u'/><target dev='vdd' bus='virtio'/></disk>
  <controller type='scsi' index='0'/><controller type='scsi' index='1'><driver iothread='1'/></controller>
  <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
</devices><seclabel type='dynamic' model='apparmor' relabel='yes'><label>x</label></seclabel>
<seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+108</label></seclabel></domain>
"""


def test_a_domains_disks():
    document = DomainDocument.parse(DOMAIN)
    disks = {disk.target: disk for disk in document.disks}
    assert disks["vda"].path == "/v/top.qcow2"
    assert disks["vda"].backing == ("/v/mid.qcow2", None)
    assert (disks["vdb"].path, disks["vdb"].format, disks["vdb"].shareable) == ("/dev/vg/lv", "raw", True)
    assert (disks["vdc"].storage, disks["vdc"].path, disks["vdc"].medium) == ("network", None, True)
    assert [name for name, disk in disks.items() if disk.removable] == ["sda", "fda"]
    assert [name for name, disk in disks.items() if not disk.medium] == ["sda"]
    assert [name for name, disk in disks.items() if disk.encrypted] == ["sdb"]
    assert [name for name, disk in disks.items() if disk.lost] == ["sdc"]
    assert (document.agent, document.owner) == ("connected", (64055, 108))


@pytest.mark.parametrize(
    ("source", "medium"),
    [
        ("", False),
        ("<source index='2'/>", False),  # libvirt 12.9, while the domain is on
        ("<source startupPolicy='optional'/>", False),
        ("<source file='/iso' index='2'/>", True),
        ("<source protocol='https' name='iso'><host name='h'/></source>", True),
    ],
)
def test_a_drive_has_a_medium_where_a_source_names_one(source, medium):
    text = f"<domain><devices><disk device='cdrom'>{source}<target dev='sda'/></disk></devices></domain>"
    [drive] = DomainDocument.parse(text).disks
    assert drive.medium == medium


@pytest.mark.parametrize(
    ("device", "source", "why"),
    [
        ("disk", "<slices><slice type='storage' offset='1048576' size='4194304'/></slices>", "a part of its file"),
        ("lun", "", "SCSI commands go to the device itself"),
    ],
)
def test_a_disk_whose_bytes_are_not_its_sources_is_known(device, source, why):
    document = DomainDocument.parse(
        f"<domain><devices><disk type='block' device='{device}'><driver type='raw'/><source dev='/dev/x'>{source}"
        "</source><target dev='sda' bus='scsi'/></disk></devices></domain>"
    )
    assert why in (document.disks[0].lost or "")


CEPH = (
    "<auth username='c'><secret type='ceph' uuid='u'/></auth><source protocol='rbd' name='p/i'><host name='m'/>"
    "</source>"
)
ISCSI = (
    "<source protocol='iscsi' name='iqn.2013-07.com.example:target/1'><host name='example.com' port='3260'/></source>"
)


@pytest.mark.parametrize(
    ("storage", "source", "why", "way"),
    [
        ("network", CEPH, "on the network (rbd)", "rbd map"),
        ("network", ISCSI, "on the network (iscsi)", "iscsiadm"),
        ("network", "<source protocol='nbd' name='x'><host name='h'/></source>", "on the network (nbd)", "--nbd URI"),
        ("network", "<source protocol='nfs' name='x'><host name='h'/></source>", "on the network (nfs)", "mount the"),
        ("network", "<source protocol='gluster' name='v/i'/>", "on the network (gluster)", "mount the volume"),
        ("network", "<source protocol='https' name='x'><host name='h'/></source>", "on the network (https)", ""),
        ("network", "<source><host name='h'/></source>", "on the network (of an unknown protocol)", ""),
        ("volume", "<source pool='p' volume='v'/>", "of type volume", "virsh vol-path"),
        ("nvme", "<source type='pci' managed='yes' namespace='1'><address domain='0'/></source>", "of type nvme", ""),
        ("vhostuser", "<source type='unix' path='/run/s'/>", "of type vhostuser", ""),
        ("vhostvdpa", "<source dev='/dev/vhost-vdpa-0'/>", "of type vhostvdpa", ""),
        ("dir", "<source dir='/d'/>", "of type dir", ""),
    ],
)
def test_a_disk_whose_source_is_no_local_file_is_refused_with_what_can_be_done(storage, source, why, way):
    xml = f"<disk type='{storage}'><driver name='qemu' type='raw'/>{source}<target dev='vdb' bus='virtio'/></disk>"
    [disk] = DomainDocument.parse(f"<domain><devices>{xml}</devices></domain>").disks
    said, hint = disk.why_unreadable() or ("", "")
    assert (why in said, way in hint) == (True, True), (said, hint)
    assert "local files and block devices only" in said
    assert hint.startswith("leave the disk out: --exclude vdb")


@pytest.mark.parametrize(
    ("disk", "why"),
    [
        ("<disk type='file' device='floppy'><target dev='fda'/></disk>", "the floppy has no medium"),
        ("<disk type='file' device='cdrom'><target dev='sda'/></disk>", "the cdrom has no medium"),
        (
            "<disk type='file'><driver type='vmdk'/><source file='/x'/><target dev='vda'/></disk>",
            "its format is vmdk, and pybackup reads qcow2 and raw",
        ),
        ("<disk type='file'><source file='/x'/><target dev='vda'/></disk>", None),
        ("<disk type='block'><driver type='qcow2'/><source dev='/dev/x'/><target dev='vda'/></disk>", None),
        ("<disk type='file' device='floppy'><source file='/x'/><target dev='fda'/></disk>", None),
    ],
)
def test_a_disk_that_cannot_be_read_says_why(disk, why):
    [found] = DomainDocument.parse(f"<domain><devices>{disk}</devices></domain>").disks
    reason = found.why_unreadable()
    assert (None if reason is None else reason[0]) == why


def test_the_external_data_file_that_newer_libvirts_tell():
    store = "<dataStore type='file'><format type='raw'/><source file='/v/w.raw'/></dataStore>"
    disk = f"<disk type='file'><source file='/v/w.qcow2'>{store}</source><target dev='vda'/></disk>"
    [found] = DomainDocument.parse(f"<domain><devices>{disk}</devices></domain>").disks
    assert (found.path, found.data_store) == ("/v/w.qcow2", "/v/w.raw")
    assert {disk.data_store for disk in DomainDocument.parse(DOMAIN).disks} == {None}


def test_a_domain_without_agent_and_label():
    document = DomainDocument.parse("<domain><devices/></domain>")
    assert (document.disks, document.agent, document.owner) == ((), None, None)


@pytest.mark.parametrize(
    ("inside", "threaded"),
    [
        ("<iothreads>2</iothreads>", True),
        ("<devices><disk><driver iothread='1'/><target dev='vda'/></disk></devices>", True),
        ("<devices><disk><driver><iothreads/></driver><target dev='vda'/></disk></devices>", True),
        ("<devices><controller type='scsi'><driver iothread='1'/></controller></devices>", True),
        ("<q:commandline xmlns:q='u'><q:arg value='iothread,id=x'/></q:commandline>", True),
        ("<devices><disk><driver name='qemu' io='threads'/><target dev='vda'/></disk></devices>", False),
    ],
)
def test_a_domain_with_an_iothread_anywhere_is_recognised(inside, threaded):
    assert DomainDocument.parse(f"<domain>{inside}</domain>").iothreads == threaded


@pytest.mark.parametrize(
    ("machine", "least"),
    [
        ("machine='pc-q35-7.2'", "7.2"),
        ("machine='pc-i440fx-10.0'", "10.0"),
        ("machine='pc-q35-rhel9.6.0'", None),
        ("machine='pc-q35-noble'", None),
        ("machine='microvm'", None),
        ("", None),
    ],
)
def test_a_type_of_machine_tells_the_oldest_qemu_that_knows_it(machine, least):
    text = f"<domain><os><type {machine}>hvm</type></os></domain>"
    assert DomainDocument.parse(text).least_qemu == least


def test_a_job_names_every_disk_and_each_ones_bitmap():
    disks = [
        JobDisk("vda", "b1.r.P1", "b1.r.P2", "pybackup-r-x-vda", "/s/a"),
        JobDisk("vdb", None, "b1.r.P2", "pybackup-r-x-vdb", "/s/<b>"),
    ]
    root = ET.fromstring(backup_xml("/run/s", disks, ["sda"]))
    found = {disk.get("name"): disk.attrib for disk in root.iter("disk")}
    assert found["vda"]["incremental"] == found["vda"]["exportbitmap"] == "b1.r.P1"
    assert (found["vdb"]["backupmode"], found["sda"]["backup"]) == ("full", "no")
    assert root.find("server").get("socket") == "/run/s"
    assert [scratch.get("file") for scratch in root.iter("scratch")] == ["/s/a", "/s/<b>"]


def test_a_running_job_is_recognised_by_the_names_of_its_exports():
    job = RunningJob.parse(backup_xml("/s", [JobDisk("vda", None, None, "pybackup-r-x-vda", "/f")], ["vdb"]))
    assert job == RunningJob("/s", ("pybackup-r-x-vda",), ("/f",))
    assert job.is_named(["pybackup-r-"])
    assert not job.is_named(["pybackup-q-"])
    assert not job.is_named([])
    nameless = RunningJob.parse("<domainbackup><disks><disk name='vda' backup='yes'/></disks></domainbackup>")
    assert not nameless.is_named(["pybackup-r-"])
    assert not RunningJob(None, (), ()).is_named(["pybackup-r-"])
    assert not RunningJob(None, ("pybackup-r-x", "other"), ()).is_named(["pybackup-r-"])


def test_a_checkpoint_and_the_sizes_of_its_bitmaps():
    text = checkpoint_xml("P", ["vda", "vdb"], ["sda"]).replace('name="vda"', 'name="vda" size="65536"')
    assert bitmap_sizes(text) == {"vda": ("P", 65536), "vdb": ("P", None)}
