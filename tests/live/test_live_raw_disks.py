"""Raw disks of a running machine behind qcow2 images with bitmaps (docs/raw-disks.md)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lab import MIB, call_pybackup, put_in_front, run, write
from live import Disk, Machine, Nights, private_tmp

TRUST = "--trust-data-file"
SIZE = 4 * MIB


@pytest.fixture
def machine(tmp_path: Path):
    """Disk "a" is behind a.qcow2; its raw file is raw.tmp."""
    raw = tmp_path / "raw.tmp"
    run("qemu-img", "create", "-q", "-f", "raw", raw, str(SIZE))
    write(raw, "write -P 0x11 0 1M", image_format="raw")
    image = put_in_front(tmp_path / "a.qcow2", raw, SIZE)
    disk = Disk("a", image, bytearray(b"\x11" * MIB + bytes(SIZE - MIB)))
    with Machine(tmp_path, disk) as found, private_tmp(found.place):
        yield found.start()


@pytest.fixture
def nights(machine: Machine) -> Nights:
    nights = Nights.of(machine)
    nights.options = (TRUST,)
    nights.full()
    return nights


def raw_of(machine: Machine) -> Path:
    return machine.folder / "raw.tmp"


def test_nights_of_a_trusted_data_file(nights):
    machine = nights.machine
    assert nights.newest["disks"][0]["source"]["trusted_data_file"]["path"] == str(raw_of(machine))
    machine.write("a", MIB + 100, 70_000, 0x21)
    machine.zero("a", 0, 128 << 10)
    machine.zero("a", 256 << 10, 128 << 10, discard=True)
    done = nights.require_incremental()
    assert done.disk["data_bytes"] < MIB
    machine.restart()
    machine.write("a", 3 * MIB, 512, 0x22)
    nights.require_incremental()
    machine.resize("a", SIZE + MIB)
    machine.write("a", SIZE + MIB - 512, 512, 0x23)
    nights.require_incremental()
    assert raw_of(machine).stat().st_size == SIZE + MIB
    machine.quit()
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw_of(machine), machine.disks["a"].image)


def test_a_killed_qemu_makes_a_rescan_and_then_the_bitmap_counts_again(nights):
    nights.machine.write("a", 2 * MIB, 1000, 0x21)
    nights.machine.crash()
    nights.require_fallback("is inconsistent", "is missing")


def test_without_the_users_word_every_night_reads_everything(nights):
    nights.options = ()
    nights.machine.write("a", 2 * MIB, 1000, 0x21)
    for _ in range(2):
        done = nights.backup("incremental")
        assert done.disk["rescan"], done
        assert "external data file, whose writes no bitmap need see" in done.disk["reason"]
    nights.require_sound()
    assert not [name for name in nights.machine.bitmaps("a") if name.startswith("b1.")]


def test_a_raw_file_that_was_replaced_while_qemu_has_it_open_is_warned_of(nights):
    raw = raw_of(nights.machine)
    held = raw.with_name("held.tmp")
    os.link(raw, held)
    raw.with_name("other.tmp").write_bytes(raw.read_bytes())
    raw.with_name("other.tmp").rename(raw)
    done = nights.backup("incremental")
    assert (done.rc, done.disk["rescan"]) == (3, True), done
    assert "was replaced since the newest point" in done.disk["reason"]
    assert f"the external data file {raw} was replaced while QEMU has it open" in done.stderr
    held.rename(raw)  # as the model of the machine has it


def test_another_node_that_can_write_to_the_raw_file_ends_the_trust(nights):
    storage = {"driver": "file", "node-name": "past", "filename": str(raw_of(nights.machine)), "locking": "off"}
    nights.machine.monitor("blockdev-add", **storage)
    done = nights.backup("incremental")
    assert (done.rc, done.disk["rescan"]) == (3, True), done
    assert "node 'past' of the same QEMU has the same file open for writing" in done.disk["reason"]


def test_nights_on_and_off_are_one_chain(machine):
    nights = Nights.of(machine)
    assert nights.backup("full", TRUST).rc == 0
    machine.write("a", MIB, 1000, 0x31)
    for running in (True, False, False, True):
        if running != machine.running:
            machine.start() if running else machine.quit()
        if running:
            machine.write("a", 2 * MIB, 1000, 0x32)
        config = machine.folder / "c.yaml"
        config.write_text(
            f"repository: {nights.repository}\nbitmap: b1\nmachines:\n  m:\n    qmp: {machine.qmp}\n"
            f"    disks: {{a: {{node: a, image: {machine.disks['a'].image}, trust_data_file: true}}}}\n"
        )
        done = nights._noted(call_pybackup(["--config", config, "incremental", "--json"]))
        assert (done.rc, done.stderr, done.disk["kind"], done.disk["rescan"]) == (0, "", "incremental", False), done
    nights.require_sound()
