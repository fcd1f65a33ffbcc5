"""The lab itself: a guest's writes arrive, its failures are seen, and what a backup could leave behind is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab import MIB, bitmaps, make_image, run
from live import Disk, Machine, Refused, Writer


@pytest.fixture
def machine(tmp_path: Path):
    with Machine.of(tmp_path, "a", "b") as found:
        yield found.start()


def test_what_the_guest_writes_is_in_the_image_and_in_the_model(machine):
    machine.write("a", 70_000, 100, 0x21)
    machine.write("b", 3 * MIB, MIB, 0x22)
    machine.zero("b", 3 * MIB, 65536)
    machine.zero("b", 3 * MIB + 65536, 65536, discard=True)
    machine.resize("a", 5 * MIB)
    machine.write("a", 4 * MIB, 10, 0x23)
    machine.resize("b", 3 * MIB + 200_704)
    machine.quit()


def test_a_write_that_the_model_does_not_know_is_noticed(machine):
    machine.guest("a", "write -q -P 1 0 512")
    with pytest.raises(AssertionError):
        machine.quit()


def test_a_write_that_fails_is_seen_and_not_modelled(machine):
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            machine.write("a", 4 * MIB, 512, 1)
    machine.write("a", 0, 512, 2)
    machine.quit()


def test_a_killed_machine_has_its_guests_writes_and_not_its_bitmaps(machine):
    machine.monitor("block-dirty-bitmap-add", node="a", name="x", persistent=True)
    machine.restart()
    assert machine.bitmaps("a")["x"]["recording"]
    machine.write("a", 0, 512, 1)
    machine.crash()
    assert machine.bitmaps("a")["x"]["inconsistent"]
    machine.quit()


def test_a_disk_is_unplugged_its_bitmaps_stored_and_plugged_again(machine):
    machine.monitor("block-dirty-bitmap-add", node="a", name="x", persistent=True)
    machine.write("a", 0, 512, 1)
    machine.unplug("a")
    assert bitmaps(machine.disks["a"].image) == {"x": ["auto"]}
    machine.plug("a")
    machine.write("a", 512, 512, 2)
    assert machine.bitmaps("a")["x"]["count"] == 65536
    machine.quit()


def test_raw_disks_and_other_names_of_nodes(tmp_path):
    image = make_image(tmp_path / "r.raw", MIB, image_format="raw")
    with Machine(tmp_path, Disk("r", image, bytearray(MIB), "raw", node="other")) as machine:
        machine.start()
        assert "other" in machine.nodes()
        machine.write("r", 5, 5, 5)
        machine.quit()


def test_everything_that_could_be_left_is_found(machine, tmp_path):
    assert machine.leftovers() == []
    scratch = make_image(tmp_path / "scratch", 4 * MIB)
    node = {"driver": "qcow2", "node_name": "pybackup-f", "file": {"driver": "file", "filename": str(scratch)}}
    machine.monitor("blockdev-add", **node)
    assert machine.leftovers() == ["node pybackup-f"]
    machine.monitor("blockdev-backup", device="a", target="pybackup-f", sync="none", job_id="j")
    machine.monitor("nbd-server-start", addr={"type": "unix", "data": {"path": str(machine.place / "nbd")}})
    machine.monitor("block-export-add", type="nbd", id="e", node_name="a", name="e")
    found = machine.leftovers()
    assert [text.split(":")[0] for text in found] == ["job j", "export e", "node pybackup-f", "nbd-server-start"]
    assert "already running" in found[-1]


def test_a_writers_ring_is_read_back_and_a_torn_one_is_refused(tmp_path):
    with Machine.of(tmp_path, "a", "b", size=Writer.END) as machine:
        require_ring(machine.start())


def require_ring(machine: Machine) -> None:
    with Writer(machine, "a", "b") as writer:
        writer.wait_for(3 * Writer.SLOTS + 5)
    machine.quit()
    counts = []
    for name, disk in machine.disks.items():
        raw = disk.image.with_name(f"{name}.raw")
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk.image, raw)
        counts.append(Writer.count(raw.read_bytes()))
    assert counts == [writer.written, writer.written]
    mixed = bytearray(machine.disks["a"].model)
    begin = Writer.BASE + 7 * 65536
    mixed[begin : begin + 4096] = bytes([9]) * 4096
    with pytest.raises(AssertionError, match="no instant"):
        Writer.count(mixed)
    mixed[begin] = 1
    with pytest.raises(AssertionError, match="torn"):
        Writer.count(mixed)


def test_a_refused_command_is_an_exception(machine):
    with pytest.raises(Refused, match="not found"):
        machine.monitor("block-dirty-bitmap-remove", node="a", name="nope")
