"""A machine that runs on some nights and is off on others: one chain, read through QMP or from its images."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from lab import MIB, Result, call_pybackup, make_image, run, write
from live import Disk, Machine, Nights, below_the_guest, kinds, private_tmp


class Sometimes(Nights):
    """The nights of a machine that the configuration names by its nodes and its images."""

    def night(self, *options: str | Path, wanted: str = "incremental", qmp: Path | None = None) -> Result:
        config = self.machine.folder / "c.yaml"
        disks = [f"{disk.name}: {{node: {disk.node}, image: {disk.image}}}" for disk in self.machine.disks.values()]
        config.write_text(
            f"repository: {self.repository}\nbitmap: b1\nmachines:\n  m:\n    qmp: {qmp or self.machine.qmp}\n"
            f"    disks: {{{', '.join(disks)}}}\n"
        )
        return self._noted(call_pybackup(["--config", config, wanted, "--json", *options]))

    def require_quiet(self, kind: str) -> None:
        done = self.night("--no-fallback") if kind != "full" else self.night()
        assert (done.rc, done.stderr, kinds(done)) == (0, "", {kind}), done


@pytest.fixture
def nights(tmp_path: Path):
    """Two disks, one of them above a file that both ways must see as the same."""
    base = make_image(tmp_path / "base.tmp", 4 * MIB)
    write(base, "write -P 0x31 0 1M")
    overlay = tmp_path / "b.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.tmp", "-F", "qcow2", overlay)
    disks = [
        Disk("a", make_image(tmp_path / "a.qcow2", 4 * MIB), bytearray(4 * MIB)),
        Disk("b", overlay, bytearray(b"\x31" * MIB + bytes(3 * MIB))),
    ]
    with Machine(tmp_path, *disks) as machine, private_tmp(machine.place):
        yield Sometimes.of(machine)


def test_nights_on_and_off_are_one_chain_without_a_word(nights):
    machine = nights.machine
    nights.require_quiet("full")
    for night, on in enumerate((True, True, False, True, False, False), 1):
        if on and not machine.running:
            machine.start()
        if machine.running:
            machine.write("a", night * 300_000, 70_000, night)
            machine.write("b", night * 200_000, 1000, night)
        if not on and machine.running:
            machine.quit()
        nights.require_quiet("incremental")
    nights.require_sound()
    rehearsed = nights.night("--dry-run")
    assert (rehearsed.rc, rehearsed.stderr) == (0, "")
    assert nights.night(wanted="audit").rc == 0


def test_a_socket_that_a_killed_qemu_left_means_off(nights):
    nights.machine.start()
    nights.require_quiet("full")
    nights.machine.restart()
    nights.machine.write("a", MIB, 1000, 0x21)
    nights.machine.kill()
    assert nights.machine.qmp.exists()
    done = nights.night()
    assert (done.rc, "inconsistent" in done.stderr, kinds(done)) == (3, True, {"incremental"}), done
    nights.require_quiet("incremental")
    nights.require_sound()


def test_images_that_a_qemu_holds_whose_socket_is_gone_are_refused_with_a_hint(nights):
    nights.machine.start().qmp.unlink()
    done = nights.night()
    assert done.rc == 13, done
    assert "is in use by another program" in done.stderr
    assert f"nothing listens on {nights.machine.qmp}" in done.stderr
    assert nights.points() == set()


def test_a_socket_that_another_client_has_is_no_machine_that_is_off(nights):
    nights.machine.start()
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(nights.machine.qmp))
        done = nights.night()
    assert (done.rc, "another program connected" in done.stderr) == (13, True), done


def test_another_machines_socket_is_refused(nights, tmp_path):
    other_folder = tmp_path / "other.tmp"
    other_folder.mkdir()
    with Machine.of(other_folder, "a", "b") as other:
        done = nights.night(qmp=other.start().qmp)
    assert done.rc == 13, done
    assert "does the socket belong to another machine" in done.stderr
    assert nights.points() == set()


def test_a_snapshot_that_the_images_name_does_not_follow_is_a_warning_while_the_machine_runs(nights):
    machine = nights.machine
    machine.start()
    nights.require_quiet("full")
    image = machine.disks["a"].image
    below_the_guest(machine, "a")
    machine.write("a", MIB, 1000, 0x22)
    done = nights.night()
    assert done.rc == 3, done
    assert f"while it is off {image} would be read, which lies below it" in done.stderr
    nights.require_restored()
