"""From a specification of a machine's disks to the host and the sources that read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from backup.model.disk import Claim
from backup.sources.choose import DiskSpecification, Specification, choose
from backup.sources.image import ImageSource
from backup.sources.nbd_server import NbdSource
from backup.sources.on_or_off import OnOrOff
from backup.sources.resting import AtRest
from backup.sources.running import Running

QMP = Path("/run/web1.qmp")
IMAGE = DiskSpecification("vda", image=Path("/a.qcow2"), image_format="qcow2")
SERVED = DiskSpecification("vdb", nbd="nbd://host/b", bitmap="theirs", since="20261122T010000Z-1f3a09c1")
NODE = DiskSpecification("vda", node="virtio0", allow_plaintext=True)
BOTH = DiskSpecification("vda", node="virtio0", image=Path("/a.qcow2"))


@pytest.mark.parametrize(
    ("specification", "host", "disks"),
    [
        (Specification((IMAGE, SERVED)), AtRest, ["vda", "vdb"]),
        (Specification((NODE,), qmp=QMP), Running, ["vda"]),
        (Specification(qmp=QMP), Running, []),
        (Specification((BOTH,), qmp=QMP), OnOrOff, ["vda"]),
    ],
)
def test_the_host_follows_from_what_is_specified(specification, host, disks):
    chosen, requests = choose(specification)
    assert type(chosen) is host
    assert [request.name for request in requests] == disks
    assert [request.source for request in requests] == list(chosen.sources)


def test_images_and_servers_keep_what_was_said_of_them():
    _, (image, served) = choose(Specification((IMAGE, SERVED)))
    assert image.source == ImageSource(Path("/a.qcow2"), "qcow2")
    assert (image.path, image.claim) == ("/a.qcow2", Claim(None, None))
    assert isinstance(served.source, NbdSource)
    assert (served.source.uri, served.source.bitmap) == ("nbd://host/b", "theirs")
    assert (served.path, served.claim) == (None, Claim("theirs", SERVED.since))


def test_a_disk_of_a_running_machine_keeps_its_node_and_the_users_permission():
    _, [disk] = choose(Specification((NODE,), qmp=QMP))
    assert disk.source.text == "virtio0"
    assert disk.allow_plaintext
