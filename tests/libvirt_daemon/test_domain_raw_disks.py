"""A domain's raw disk behind a qcow2 image with bitmaps (docs/raw-disks.md), of which libvirt 9 knows nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import Domain
from lab import MIB, call_pybackup, put_in_front, run

TRUST = "--trust-data-file"


def behind(domain: Domain) -> Path:
    """Put vda behind a qcow2; the raw file is returned."""
    raw, image = domain.folder / "vda.raw", domain.disks["vda"]
    run("qemu-img", "convert", "-q", "-f", "qcow2", "-O", "raw", image, raw)
    image.unlink()
    put_in_front(image, raw, domain.size)
    for path in (raw, image):
        domain.daemon.give(path)
    return raw


@pytest.fixture
def raw_domain(daemon, tmp_path) -> Iterator[Domain]:
    domain = Domain.of(daemon, tmp_path / "repo", "raw1", "vda")
    behind(domain)
    yield domain.define()
    domain.remove()


def trusted(domain: Domain, kind: str) -> None:
    point = domain.require_night(kind, options=[TRUST])
    [disk] = domain.point(point)["disks"]
    assert disk["source"]["trusted_data_file"]["path"] == str(domain.folder / "vda.raw")


def test_nights_of_a_trusted_data_file_on_and_off(raw_domain):
    raw_domain.start()
    raw_domain.io("vda", "write -P 7 1M 1M")
    trusted(raw_domain, "full")
    raw_domain.io("vda", "write -P 8 2M 100k", "write -z 1M 64k", "discard 1216k 64k")
    trusted(raw_domain, "incremental")
    raw_domain.destroy()
    trusted(raw_domain, "incremental")
    raw_domain.start()
    raw_domain.daemon.virsh("blockresize", raw_domain.name, "vda", "12M")
    raw_domain.io("vda", "write -P 9 11M 64k")
    trusted(raw_domain, "incremental")
    assert (raw_domain.folder / "vda.raw").stat().st_size == 12 * MIB
    raw_domain.kill_qemu()
    trusted(raw_domain, "rescan")
    trusted(raw_domain, "incremental")


def test_a_raw_domain_that_is_converted_goes_on_with_its_chain(daemon, tmp_path):
    domain = Domain.of(daemon, tmp_path / "repo", "raw2", "vda")
    raw, image = domain.folder / "vda.raw", domain.disks["vda"]
    run("qemu-img", "convert", "-q", "-f", "qcow2", "-O", "raw", image, raw)
    daemon.give(raw)
    domain.disks["vda"] = raw
    domain.shapes["vda"] = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{raw}'/>"
        "<target dev='vda' bus='virtio'/></disk>"
    )
    try:
        domain.define().start()
        domain.require_night("full")
        domain.remove()
        image.unlink()
        domain.disks["vda"] = put_in_front(image, raw, domain.size)
        daemon.give(image)
        domain.shapes.clear()
        domain.define().start()
        domain.io("vda", "write -P 7 1M 64k")
        trusted(domain, "rescan")
        trusted(domain, "incremental")
    finally:
        domain.remove()


def test_without_the_users_word_every_night_reads_everything(raw_domain):
    raw_domain.start()
    raw_domain.require_night("full")
    raw_domain.io("vda", "write -P 7 1M 64k")
    raw_domain.require_night("rescan")
    assert "b1." not in run("qemu-img", "info", "-U", "-f", "qcow2", raw_domain.disks["vda"])


def test_a_machine_of_the_configuration_says_it_for_all_its_disks(raw_domain):
    raw_domain.start()
    config = raw_domain.folder / "pybackup.yaml"
    config.write_text(
        f"repository: {raw_domain.repository}\nbitmap: b1\nmachines:\n  {raw_domain.name}:\n"
        f"    libvirt: {raw_domain.daemon.uri}\n    trust_data_file: true\n"
    )
    for kind in ("full", "incremental"):
        done = call_pybackup(["--config", config, "incremental", "--json"])
        assert (done.rc, done.disk["kind"], done.disk["rescan"]) == (0, kind, False), done
